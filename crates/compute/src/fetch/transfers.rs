//! Layers on their way from their owners' machines, and who waits for them.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::deploy::ImageOffer;
use peer_proto::id::{Digest, RequestHash};
use peer_proto::unit::Timestamp;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use super::stock::Stock;
use crate::engine::Engine;
use crate::image::spool::{self, Receipt, Spool, SpoolError, Transfer as SpoolTransfer};
use crate::possession;
use crate::room::{Inner, Options, Room, database_problem};

/// Most transfers under way at one time, over all peers.
const TRANSFERS_MAX: usize = 256;
/// Most of them of one owner, so that nobody takes all the places (V5).
const TRANSFERS_PER_OWNER_MAX: usize = 16;
/// How long layers that nobody has fetched stay in the spool.
const SPOOL_AGE: Duration = Duration::from_hours(24);

/// Transfers under way, over the spool.
#[derive(Debug)]
pub(crate) struct Transfers {
    pub(super) spool: Spool,
    pub(super) stock: Stock,
    patience: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    under_way: HashMap<RequestHash, Arc<Transfer>>,
    /// Requests whose requester is there to send what is lacking.
    attended: HashSet<RequestHash>,
    /// Requests for whose layers somebody waits.
    awaited: HashSet<RequestHash>,
}

/// The layers that one request waits for.
#[derive(Debug)]
pub(super) struct Transfer {
    owner: PeerId,
    sizes: HashMap<Digest, u64>,
    progress: Notify,
    noted: Mutex<Noted>,
}

#[derive(Debug)]
struct Noted {
    last_progress: Instant,
    /// Why it cannot be completed: a layer that came was refused.
    spoiled: Option<Problem>,
    /// Whether its image is in the engine, by whichever way: nothing more need come.
    done: bool,
}

impl Transfer {
    fn noted(&self) -> MutexGuard<'_, Noted> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the wait for the layers at once: sending the same again would be refused again.
    fn spoil(&self, problem: Problem) {
        self.noted().spoiled.get_or_insert(problem);
        self.progress.notify_one();
    }

    pub(super) fn spoiled(&self) -> Option<Problem> {
        self.noted().spoiled.clone()
    }

    fn touch(&self) {
        self.noted().last_progress = Instant::now();
    }

    fn idle(&self) -> Duration {
        self.noted().last_progress.elapsed()
    }

    /// Waits for something to happen; says whether anything has within `patience`.
    pub(super) async fn progresses(&self, patience: Duration) -> bool {
        timeout(patience, self.progress.notified()).await.is_ok() || self.idle() < patience
    }
}

/// Says that somebody waits for a request's layers.
#[derive(Debug)]
pub(super) struct Waiting<'a> {
    transfers: &'a Transfers,
    request: RequestHash,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.transfers.state();
        state.awaited.remove(&self.request);
        if !state.attended.contains(&self.request) {
            state.under_way.remove(&self.request);
        }
    }
}

impl Transfers {
    pub(crate) fn open(options: &Options) -> Result<Self, SpoolError> {
        let spool = Spool::open(&options.spool, options.image_size_max.get())?;
        Ok(Self { spool, stock: Stock::default(), patience: options.transfer_patience, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attend(&self, request: RequestHash) {
        self.state().attended.insert(request);
    }

    /// The requester is gone. Whoever waits sees it; what nobody waits for has ended.
    fn leave(&self, request: RequestHash) {
        let mut state = self.state();
        state.attended.remove(&request);
        if !state.awaited.contains(&request) {
            state.under_way.remove(&request);
        } else if let Some(transfer) = state.under_way.get(&request) {
            transfer.progress.notify_one();
        }
    }

    pub(super) fn wait(&self, request: RequestHash) -> Waiting<'_> {
        self.state().awaited.insert(request);
        Waiting { transfers: self, request }
    }

    /// The transfer of a request, begun if it is new; none if nobody is there to send anything.
    pub(super) fn expect(
        &self,
        owner: PeerId,
        request: RequestHash,
        offer: &ImageOffer,
        layers: &[Digest],
    ) -> Result<Option<Arc<Transfer>>, Problem> {
        let mut state = self.state();
        if !state.attended.contains(&request) {
            return Ok(None);
        }
        if let Some(transfer) = state.under_way.get(&request) {
            return Ok(Some(Arc::clone(transfer)));
        }
        let full = |message| Problem::new(Code::NoCapacity, message);
        if state.under_way.values().filter(|transfer| transfer.owner == owner).count() >= TRANSFERS_PER_OWNER_MAX {
            return Err(full("too many images of yours are on their way here; try again when one has arrived"));
        }
        if state.under_way.len() >= TRANSFERS_MAX {
            return Err(full("too many images are on their way here; try again later"));
        }
        let noted = Noted { last_progress: Instant::now(), spoiled: None, done: false };
        let transfer = Arc::new(Transfer {
            owner,
            sizes: layers.iter().copied().zip(offer.layer_sizes.iter().copied()).collect(),
            progress: Notify::new(),
            noted: Mutex::new(noted),
        });
        state.under_way.insert(request, Arc::clone(&transfer));
        Ok(Some(transfer))
    }

    fn find(&self, request: RequestHash) -> Option<Arc<Transfer>> {
        self.state().under_way.get(&request).cloned()
    }

    /// The image is in the engine. As long as its sender is there, it is told that nothing more need come.
    pub(super) fn done(&self, request: RequestHash) {
        if let Some(transfer) = self.find(request) {
            transfer.noted().done = true;
        }
    }

    /// The image will not come.
    pub(super) fn fail(&self, request: RequestHash) {
        self.state().under_way.remove(&request);
    }

    /// Whether another request of this owner counts on the layer.
    pub(super) fn needed_elsewhere(&self, owner: PeerId, layer: &Digest, request: RequestHash) -> bool {
        let needs = |transfer: &Transfer| transfer.owner == owner && transfer.sizes.contains_key(layer);
        self.state().under_way.iter().any(|(other, transfer)| *other != request && needs(transfer))
    }

    /// Where layers arrive.
    pub(crate) fn spool(&self) -> &Spool {
        &self.spool
    }

    /// Drops transfers that nobody waits for any more, and old layers.
    pub(crate) fn clean(&self, now: Timestamp) {
        let mut state = self.state();
        let State { under_way, awaited, .. } = &mut *state;
        under_way.retain(|request, transfer| awaited.contains(request) || transfer.idle() < 2 * self.patience);
        drop(state);
        if let Err(error) = self.spool.clean(SPOOL_AGE, UNIX_EPOCH + Duration::from_millis(now.0)) {
            tracing::warn!(%error, "old layers could not be removed");
        }
    }

    /// Begins to take a layer. If another request is sending the same one, waits as long as that one gets on.
    async fn claim(
        &self,
        transfer: &Transfer,
        owner: PeerId,
        layer: Digest,
        size: u64,
        room: spool::Room,
    ) -> Result<Option<SpoolTransfer>, SpoolError> {
        let (mut arrived, mut since) = (0, Instant::now());
        loop {
            transfer.touch();
            if transfer.noted().done {
                return Ok(None);
            }
            let released = self.spool.released();
            match self.spool.receive(owner, layer, size, room).await {
                Ok(Receipt::Complete(_)) => return Ok(None),
                Ok(Receipt::Partial(spooled)) => return Ok(Some(spooled)),
                Err(SpoolError::Busy { .. }) if since.elapsed() < self.patience => {}
                Err(error) => return Err(error),
            }
            // Whether it was released or the time is over, the spool is asked again.
            drop(timeout(self.patience / 8, released).await);
            let length = self.spool.arrived(&owner, &layer);
            if length > arrived {
                (arrived, since) = (length, Instant::now());
            }
        }
    }
}

/// Says that a request's requester is there to send layers. Once this is dropped, nobody waits for them any more.
#[derive(Debug)]
pub struct Attendance<E> {
    inner: Arc<Inner<E>>,
    request: RequestHash,
}

impl<E> Drop for Attendance<E> {
    fn drop(&mut self) {
        self.inner.transfers.leave(self.request);
    }
}

/// A layer that a peer is sending. Dropping it keeps what has come.
#[derive(Debug)]
pub struct IncomingLayer<E> {
    inner: Arc<Inner<E>>,
    transfer: Arc<Transfer>,
    layer: Digest,
    spooled: Option<SpoolTransfer>,
}

impl<E: Engine> IncomingLayer<E> {
    /// Bytes that are here already.
    pub fn offset(&self) -> u64 {
        self.spooled.as_ref().map_or_else(|| self.size(), SpoolTransfer::offset)
    }

    /// Bytes that are still to come.
    pub fn rest(&self) -> u64 {
        self.size().saturating_sub(self.offset())
    }

    fn size(&self) -> u64 {
        self.transfer.sizes.get(&self.layer).copied().unwrap_or(0)
    }

    /// Takes the next bytes.
    pub async fn append(&mut self, bytes: Bytes) -> Result<(), Problem> {
        self.transfer.touch();
        match &mut self.spooled {
            Some(spooled) => {
                let appended = spooled.append(bytes).await;
                appended.map_err(|error| self.refused(&error))
            }
            None => Err(Problem::new(Code::Malformed, "more bytes came than the layer has")),
        }
    }

    /// Verifies the layer, makes it durable, and remembers who supplied it.
    pub async fn finish(mut self) -> Result<(), Problem> {
        if let Some(spooled) = self.spooled.take() {
            spooled.finish().await.map_err(|error| self.refused(&error))?;
        }
        let (owner, layer) = (self.transfer.owner, self.layer);
        let remembered = self.inner.database.write(move |tx| possession::supplied(tx, &owner, layer)).await;
        remembered.map_err(|error| database_problem(&error))?;
        self.transfer.touch();
        self.transfer.progress.notify_one();
        Ok(())
    }

    /// The image can never be completed with this layer, so that whoever waits for it need not wait longer.
    fn refused(&self, error: &SpoolError) -> Problem {
        // What is left of it would keep a full disk full.
        if matches!(error, SpoolError::DiskFull { .. })
            && let Err(error) = self.inner.transfers.spool.remove(&self.transfer.owner, &self.layer)
        {
            tracing::warn!(%error, "a part of a layer stays on the full disk");
        }
        self.transfer.spoil(error.problem());
        error.problem()
    }
}

impl<E: Engine> Room<E> {
    /// Says, before a request is carried out, that its requester can send what its image lacks.
    pub fn attend(&self, request: RequestHash) -> Attendance<E> {
        self.inner.transfers.attend(request);
        Attendance { inner: Arc::clone(&self.inner), request }
    }

    /// Begins to take a layer that a request waits for.
    pub async fn receive(
        &self,
        owner: PeerId,
        request: RequestHash,
        layer: Digest,
    ) -> Result<IncomingLayer<E>, Problem> {
        let unwanted =
            || Problem::new(Code::MissingLayer, "no request of yours waits for this layer; deploy or push again");
        let transfers = &self.inner.transfers;
        let transfer = transfers.find(request).filter(|transfer| transfer.owner == owner).ok_or_else(unwanted)?;
        let size = *transfer.sizes.get(&layer).ok_or_else(unwanted)?;
        let options = self.inner.options.clone();
        let room = self.inner.database.write(move |tx| super::stock::room_in_spool(tx, &options, &owner)).await;
        let room = room.map_err(|error| database_problem(&error))?;
        let spooled = transfers.claim(&transfer, owner, layer, size, room).await.map_err(|error| error.problem())?;
        transfer.touch();
        Ok(IncomingLayer { inner: self.inner.clone(), transfer, layer, spooled })
    }
}

#[cfg(test)]
#[path = "transfers_tests.rs"]
mod tests;
