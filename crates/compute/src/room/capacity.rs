//! What is offered, what is held, and what is left of it.

use peer_proto::PeerId;
use peer_proto::query::Capacity;
use peer_state::database::{DatabaseError, Tx};
use peer_trust::authorise::Held;
use peer_trust::peers::PeerRecord;

use super::Room;
use crate::engine::Engine;
use crate::isolation;
use crate::ledger::{self, Offer};
use crate::possession;
use crate::record;

impl<E: Engine> Room<E> {
    /// What a peer may still use of what it is granted.
    pub async fn capacity(&self, peer: &PeerRecord, architecture: &str) -> Result<Capacity, DatabaseError> {
        let settings = self.inner.options.offer;
        let read = move |tx: &Tx<'_>| Ok::<_, DatabaseError>((record::all(tx)?, ledger::offer(tx, settings)?));
        let (records, offer) = self.inner.database.write(read).await?;
        let mine = ledger::held(&records, Some(&peer.peer));
        let now = (self.inner.options.clock)();
        let granted = peer.grants.deploy.clone().filter(|grant| grant.is_live(now));
        // What others hold is left out: it is not this peer's business. Without a grant, so is the machine's size.
        let nothing = Offer { cpu: 0, memory: 0, containers: 0 };
        let offer = if granted.is_some() { offer } else { nothing };
        let isolation = granted.as_ref().and_then(|_| self.inner.known_engine()).map(|engine| isolation::of(&engine));
        Ok(Capacity { isolation, ..ledger::free(granted, offer, mine, mine, architecture) })
    }

    /// What the deployments of one owner, or of all, hold, and how much disk their images and arriving layers take (bytes).
    pub async fn holding(&self, owner: Option<PeerId>) -> Result<(Held, u64), DatabaseError> {
        let (now, spool) = ((self.inner.options.clock)(), self.inner.transfers.spool().clone());
        let read = move |tx: &Tx<'_>| {
            let held = ledger::held(&record::all(tx)?, owner.as_ref());
            let disk = possession::size_of(tx, owner.as_ref(), now)?.saturating_add(spool.used(owner.as_ref()));
            Ok((held, disk))
        };
        self.inner.database.write(read).await
    }

    /// What this machine offers in sum, and what is left of it.
    pub async fn offered(&self, architecture: &str) -> Result<Capacity, DatabaseError> {
        let settings = self.inner.options.offer;
        let read = move |tx: &Tx<'_>| Ok::<_, DatabaseError>((record::all(tx)?, ledger::offer(tx, settings)?));
        let (records, offer) = self.inner.database.write(read).await?;
        let isolation = self.inner.known_engine().map(|engine| isolation::of(&engine));
        let all = ledger::held(&records, None);
        Ok(Capacity { isolation, ..ledger::free(None, offer, Held::default(), all, architecture) })
    }
}
