//! Gets images into the engine: from their owner's machine, layer by layer, or from a registry.
//!
//! What is complete in the spool, and who has supplied what, survives a crash; which transfers are under way does not. A
//! second try therefore sends only what is still lacking.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem, Threat};
use peer_proto::deploy::{ImageOffer, ImageSource, RegistryReference};
use peer_proto::id::{DeploymentId, Digest, RequestHash};
use peer_state::database::DatabaseError;
use peer_trust::refusal::Refusal;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use crate::driver::Trouble;
use crate::engine::{Engine, EngineError};
use crate::image::assemble::{LayerSource, assemble};
use crate::image::configuration::{ImageConfiguration, parse_offer};
use crate::image::missing::missing;
use crate::image::spool::{Receipt, Spool, SpoolError, Transfer as SpoolTransfer};
use crate::possession;
use crate::record::Record;
use crate::room::{Inner, Options, Room, database_problem};

/// Most transfers under way at one time, over all peers.
const TRANSFERS_MAX: usize = 256;
/// How long layers that nobody has fetched stay in the spool.
const SPOOL_AGE: Duration = Duration::from_hours(24);

/// Transfers under way, over the spool.
#[derive(Debug)]
pub(crate) struct Transfers {
    spool: Spool,
    patience: Duration,
    under_way: Mutex<HashMap<RequestHash, Arc<Transfer>>>,
    /// Requests whose requester is there to send what is lacking.
    attended: Mutex<HashSet<RequestHash>>,
}

/// The layers that one request waits for.
#[derive(Debug)]
struct Transfer {
    owner: PeerId,
    sizes: HashMap<Digest, u64>,
    progress: Notify,
    last_progress: Mutex<Instant>,
    /// Why it cannot be completed: a layer that came was refused.
    spoiled: Mutex<Option<Problem>>,
}

impl Transfer {
    /// Ends the wait for the layers at once: sending the same again would be refused again.
    fn spoil(&self, problem: Problem) {
        self.spoiled.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(problem);
        self.progress.notify_one();
    }

    fn spoiled(&self) -> Option<Problem> {
        self.spoiled.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn touch(&self) {
        *self.last_progress.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn idle(&self) -> Duration {
        self.last_progress.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }
}

impl Transfers {
    pub(crate) fn open(options: &Options) -> Result<Self, SpoolError> {
        let spool = Spool::open(&options.spool, options.image_size_max.get())?;
        Ok(Self { spool, patience: options.transfer_patience, under_way: Mutex::default(), attended: Mutex::default() })
    }

    fn map(&self) -> MutexGuard<'_, HashMap<RequestHash, Arc<Transfer>>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(
        &self,
        owner: PeerId,
        request: RequestHash,
        offer: &ImageOffer,
        layers: &[Digest],
    ) -> Result<(), Problem> {
        let mut map = self.map();
        if map.len() >= TRANSFERS_MAX && !map.contains_key(&request) {
            return Err(Problem::new(Code::NoCapacity, "too many images are on their way here; try again later"));
        }
        map.entry(request).or_insert_with(|| {
            Arc::new(Transfer {
                owner,
                sizes: layers.iter().copied().zip(offer.layer_sizes.iter().copied()).collect(),
                progress: Notify::new(),
                last_progress: Mutex::new(Instant::now()),
                spoiled: Mutex::default(),
            })
        });
        Ok(())
    }

    fn attended(&self) -> MutexGuard<'_, HashSet<RequestHash>> {
        self.attended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, request: RequestHash) -> Option<Arc<Transfer>> {
        self.map().get(&request).cloned()
    }

    fn end(&self, request: RequestHash) {
        self.map().remove(&request);
    }

    /// Drops transfers that nobody waits for any more, and old layers.
    pub(crate) fn clean(&self) {
        self.map().retain(|_, transfer| transfer.idle() < 2 * self.patience);
        if let Err(error) = self.spool.clean(SPOOL_AGE, SystemTime::now()) {
            tracing::warn!(%error, "old layers could not be removed");
        }
    }
}

/// Checks an offer before anything is done for it.
pub(crate) fn check_offer(offer: &ImageOffer, options: &Options) -> Result<(), Problem> {
    let configuration = parse_offer(offer).map_err(|error| error.problem())?;
    let size = total_size(offer);
    if size > options.image_size_max.get() {
        let message = format!(
            "the image has {}, and this machine accepts at most {}",
            peer_proto::unit::format_bytes(size),
            options.image_size_max
        );
        return Err(Problem::new(Code::ImageTooLarge, message));
    }
    let (image, machine) = (configuration.architecture.as_str(), architecture());
    if image != machine {
        let message = format!(
            "the image is for '{}', and this machine is {machine}; build it for {machine}",
            peer_proto::text::escape(image)
        );
        return Err(Problem::new(Code::InvalidImage, message));
    }
    Ok(())
}

/// The machine's architecture in the notation of container images.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn total_size(offer: &ImageOffer) -> u64 {
    offer.layer_sizes.iter().fold(0, |sum: u64, size| sum.saturating_add(*size))
}

fn configuration(offer: &ImageOffer) -> Result<ImageConfiguration, Problem> {
    parse_offer(offer).map_err(|error| error.problem())
}

/// Says that a request's requester is there to send layers. Once this is dropped, nobody waits for them any more.
#[derive(Debug)]
pub struct Attendance<E> {
    inner: Arc<Inner<E>>,
    request: RequestHash,
}

impl<E> Drop for Attendance<E> {
    fn drop(&mut self) {
        self.inner.transfers.attended().remove(&self.request);
        if let Some(transfer) = self.inner.transfers.find(self.request) {
            transfer.progress.notify_one();
        }
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
    /// Checks a push before anything is done for it.
    pub fn check_push(&self, offer: &ImageOffer) -> Result<(), Refusal> {
        check_offer(offer, &self.inner.options).map_err(|problem| Refusal {
            problem,
            threat: Threat::V4,
            outcome: None,
        })
    }

    /// Says, before a request is carried out, that its requester can send what its image lacks.
    pub fn attend(&self, request: RequestHash) -> Attendance<E> {
        self.inner.transfers.attended().insert(request);
        Attendance { inner: Arc::clone(&self.inner), request }
    }

    /// The layers that must come from the owner for this request, which may then be sent under its hash.
    pub async fn lacking(
        &self,
        owner: PeerId,
        request: RequestHash,
        offer: &ImageOffer,
    ) -> Result<Vec<Digest>, Problem> {
        lacking(&self.inner, owner, request, offer).await.map_err(into_problem)
    }

    /// Ends a deployment whose image cannot even be asked for; a new try may take its place.
    pub async fn abandon(&self, id: DeploymentId, problem: Problem) {
        if let Err(error) = crate::driver::fail(&self.inner, id, problem).await {
            tracing::error!(deployment = %id, %error, "a deployment could not be ended");
        }
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
        let transfer =
            self.inner.transfers.find(request).filter(|transfer| transfer.owner == owner).ok_or_else(unwanted)?;
        let size = *transfer.sizes.get(&layer).ok_or_else(unwanted)?;
        let receipt = self.inner.transfers.spool.receive(owner, layer, size).await.map_err(|error| error.problem())?;
        let spooled = match receipt {
            Receipt::Complete(_) => None,
            Receipt::Partial(spooled) => Some(spooled),
        };
        transfer.touch();
        Ok(IncomingLayer { inner: self.inner.clone(), transfer, layer, spooled })
    }

    /// Waits until a pushed image is complete, and puts it into the engine.
    pub async fn pushed(&self, owner: PeerId, request: RequestHash, offer: &ImageOffer) -> Result<Digest, Problem> {
        let image = offered(&self.inner, owner, request, offer).await;
        self.inner.transfers.end(request);
        image.map_err(into_problem)
    }
}

fn into_problem(trouble: Trouble) -> Problem {
    match trouble {
        Trouble::Engine(error) => error.problem(),
        Trouble::Database(error) => database_problem(&error),
        Trouble::Final(problem) => problem,
    }
}

async fn lacking<E: Engine>(
    inner: &Inner<E>,
    owner: PeerId,
    request: RequestHash,
    offer: &ImageOffer,
) -> Result<Vec<Digest>, Trouble> {
    let layers = configuration(offer)?.layers;
    let possessed = inner.database.write(move |tx| possession::layers_of(tx, &owner)).await?;
    let images = inner.engine.images().await?;
    let mut lacking = missing(&images, &layers, &possessed);
    lacking.retain(|layer| inner.transfers.spool.path(&owner, layer).is_none());
    if !lacking.is_empty() {
        inner.transfers.register(owner, request, offer, &layers)?;
    }
    Ok(lacking)
}

/// The deployment's image, in the engine.
pub(crate) async fn image<E: Engine>(inner: &Inner<E>, record: &Record) -> Result<Digest, Trouble> {
    match &record.source {
        ImageSource::Offered(offer) => {
            let (owner, request) = (record.owner, record.request_hash);
            // Nobody is there to send layers to a deployment that is merely started again.
            if record.started_at.is_some() && !lacking(inner, owner, request, offer).await?.is_empty() {
                let message =
                    "its image has been removed from the provider's engine; remove the deployment and deploy again";
                return Err(Problem::new(Code::NoSuchImage, message).into());
            }
            let image = offered(inner, owner, request, offer).await;
            inner.transfers.end(request);
            image
        }
        ImageSource::Registry(reference) => pulled(inner, record.owner, reference).await,
    }
}

async fn offered<E: Engine>(
    inner: &Inner<E>,
    owner: PeerId,
    request: RequestHash,
    offer: &ImageOffer,
) -> Result<Digest, Trouble> {
    let patience = inner.options.transfer_patience;
    while !lacking(inner, owner, request, offer).await?.is_empty() {
        let Some(transfer) = inner.transfers.find(request) else { continue };
        if let Some(problem) = transfer.spoiled() {
            return Err(problem.into());
        }
        let attended = inner.transfers.attended().contains(&request);
        let waited = if attended { timeout(patience, transfer.progress.notified()).await.is_ok() } else { false };
        if !attended || (!waited && transfer.idle() >= patience) {
            let message = "the image's layers stopped coming; deploy again and only what is lacking will be sent";
            return Err(Problem::new(Code::MissingLayer, message).into());
        }
    }
    load(inner, owner, offer).await
}

/// Puts a complete image into the engine. It is entered as ours first, so that a crash leaves nothing unaccounted for.
async fn load<E: Engine>(inner: &Inner<E>, owner: PeerId, offer: &ImageOffer) -> Result<Digest, Trouble> {
    let configuration = configuration(offer)?;
    let (image, layers) = (configuration.digest, configuration.layers);
    let present = inner.engine.has_image(image).await?.is_some();
    note_brought(inner, owner, image, total_size(offer), present).await?;
    if !present {
        let spool = &inner.transfers.spool;
        let source = |(layer, size): (&Digest, &u64)| LayerSource {
            layer: *layer,
            file: spool.path(&owner, layer).map(|path| (path, *size)),
        };
        let sources: Vec<_> = layers.iter().zip(&offer.layer_sizes).map(source).collect();
        let (archive, size) = assemble(&offer.configuration, &sources)
            .map_err(|error| EngineError::failed(&format!("the image could not be put together: {error}")))?;
        match inner.engine.load(archive, size).await {
            Err(error @ EngineError::MissingLayer { .. }) => {
                forget_layers(inner, owner, layers).await?;
                return Err(error.into());
            }
            other => other?,
        }
        if inner.engine.has_image(image).await?.is_none() {
            let message = "the engine did not make the image that was promised out of its layers";
            return Err(Problem::new(Code::InvalidImage, message).into());
        }
    }
    for layer in &layers {
        if let Err(error) = inner.transfers.spool.remove(&owner, layer) {
            tracing::warn!(%error, "a layer in use stays in the spool");
        }
    }
    Ok(image)
}

async fn note_brought<E: Engine>(
    inner: &Inner<E>,
    owner: PeerId,
    image: Digest,
    size: u64,
    present: bool,
) -> Result<(), DatabaseError> {
    let now = (inner.options.clock)();
    inner
        .database
        .write(move |tx| -> Result<(), DatabaseError> {
            // An image that was in the engine without us stays its owner's own, and is never removed by us.
            if !present || possession::used(tx, image, now)? {
                possession::brought(tx, &owner, image, size, now)?;
            }
            Ok(())
        })
        .await
}

/// The engine has lost layers that this owner once supplied: they must come again.
async fn forget_layers<E: Engine>(inner: &Inner<E>, owner: PeerId, layers: Vec<Digest>) -> Result<(), DatabaseError> {
    inner.database.write(move |tx| possession::forget_layers(tx, &owner, &layers)).await
}

/// Fetches a public image. That it can be fetched by anybody is proven by the registry, which is asked each time.
async fn pulled<E: Engine>(inner: &Inner<E>, owner: PeerId, reference: &RegistryReference) -> Result<Digest, Trouble> {
    let before = inner.engine.images().await?;
    let size_max = inner.options.image_size_max.get();
    let image = inner.engine.pull(reference, size_max, &mut |_| {}).await?;
    let facts = inner.engine.has_image(image).await?.ok_or(EngineError::NoSuchImage { image: image.to_string() })?;
    let present = before.iter().any(|known| known.digest == image);
    note_brought(inner, owner, image, facts.size, present).await?;
    inner
        .database
        .write(move |tx| facts.layers.iter().try_for_each(|layer| possession::supplied(tx, &owner, *layer)))
        .await?;
    Ok(image)
}

/// Removes images that we brought and that nothing has used for long.
pub(crate) async fn clean_images<E: Engine>(inner: &Inner<E>) -> Result<(), Trouble> {
    let now = (inner.options.clock)();
    for image in inner.database.write(possession::images).await? {
        if image.used_by > 0 || now.since(image.last_used_at) < inner.options.image_keep_milliseconds {
            continue;
        }
        match inner.engine.remove_image(image.digest).await {
            Ok(()) => inner.database.write(move |tx| possession::removed(tx, image.digest)).await?,
            // Somebody has made it theirs meanwhile, with a name or a container of their own.
            Err(EngineError::InUse { .. } | EngineError::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
