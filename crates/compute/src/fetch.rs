//! Gets images into the engine: from their owner's machine, layer by layer, or from a registry.
//!
//! What is complete in the spool, and who has supplied what, survives a crash; which transfers are under way does not. A
//! second try therefore sends only what is still lacking. [`transfers`] holds what is on its way, [`stock`] what has come.

mod stock;
mod transfers;

use peer_proto::PeerId;
use peer_proto::code::{Code, Problem, Threat};
use peer_proto::deploy::{ImageOffer, ImageSource};
use peer_proto::id::{DeploymentId, Digest, RequestHash};
use peer_state::database::{DatabaseError, Tx};
use peer_trust::authorise::Authorised;
use peer_trust::refusal::Refusal;

use crate::driver::Trouble;
use crate::engine::Engine;
use crate::image::configuration::{ImageConfiguration, parse_offer};
use crate::image::missing::missing;
use crate::possession;
use crate::profile;
use crate::record::Record;
use crate::room::{Inner, Options, Room, database_problem};

pub use self::stock::IMAGES_PER_OWNER;
pub(crate) use self::stock::clean_images;
pub(crate) use self::transfers::Transfers;
pub use self::transfers::{Attendance, IncomingLayer};

/// Checks an offer before anything is done for it, and gives what its configuration says.
pub(crate) fn check_offer(offer: &ImageOffer, options: &Options) -> Result<ImageConfiguration, Problem> {
    let configuration = configuration(offer)?;
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
    profile::check_image(&configuration.wishes)?;
    Ok(configuration)
}

/// Checks that an offered image fits beside those that its owner uses here.
pub(crate) fn check_room(
    tx: &Tx<'_>,
    options: &Options,
    owner: &PeerId,
    offer: &ImageOffer,
) -> Result<Result<(), Problem>, DatabaseError> {
    stock::check_room(tx, options, owner, offer.digest(), total_size(offer))
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

impl<E: Engine> Room<E> {
    /// Checks a push before anything is done for it, in the transaction that authorised it.
    pub fn check_push(
        &self,
        tx: &Tx<'_>,
        authorised: &Authorised<'_>,
        offer: &ImageOffer,
    ) -> Result<Result<(), Refusal>, DatabaseError> {
        let options = &self.inner.options;
        if let Err(problem) = check_offer(offer, options) {
            return Ok(Err(Refusal { problem, threat: Threat::V4, outcome: None }));
        }
        let room = check_room(tx, options, &authorised.owner(), offer)?;
        Ok(room.map_err(|problem| Refusal { problem, threat: Threat::V5, outcome: None }))
    }

    /// The layers that must come from the owner for this request, which may then be sent under its hash.
    pub async fn lacking(
        &self,
        owner: PeerId,
        request: RequestHash,
        offer: &ImageOffer,
    ) -> Result<Vec<Digest>, Problem> {
        let layers = configuration(offer)?.layers;
        let lacking = lacking(&self.inner, owner, &layers).await.map_err(into_problem)?;
        if !lacking.is_empty() {
            self.inner.transfers.expect(owner, request, offer, &layers)?;
        }
        Ok(lacking)
    }

    /// Ends a deployment whose image cannot even be asked for; a new try may take its place.
    pub async fn abandon(&self, id: DeploymentId, problem: Problem) {
        if let Err(error) = crate::driver::fail(&self.inner, id, problem).await {
            tracing::error!(deployment = %id, %error, "a deployment could not be ended");
        }
    }

    /// Waits until a pushed image is complete, and puts it into the engine.
    pub async fn pushed(&self, owner: PeerId, request: RequestHash, offer: &ImageOffer) -> Result<Digest, Problem> {
        offered(&self.inner, owner, request, offer).await.map_err(into_problem)
    }
}

fn into_problem(trouble: Trouble) -> Problem {
    match trouble {
        Trouble::Engine(error) => error.problem(),
        Trouble::Database(error) => database_problem(&error),
        Trouble::Final(problem) => problem,
    }
}

async fn lacking<E: Engine>(inner: &Inner<E>, owner: PeerId, layers: &[Digest]) -> Result<Vec<Digest>, Trouble> {
    let possessed = inner.database.write(move |tx| possession::layers_of(tx, &owner)).await?;
    let images = inner.engine.images().await?;
    let mut lacking = missing(&images, layers, &possessed);
    lacking.retain(|layer| inner.transfers.spool.path(&owner, layer).is_none());
    Ok(lacking)
}

/// The deployment's image, in the engine.
pub(crate) async fn image<E: Engine>(inner: &Inner<E>, record: &Record) -> Result<Digest, Trouble> {
    match &record.source {
        ImageSource::Offered(offer) => {
            let (owner, request) = (record.owner, record.request_hash);
            // Nobody is there to send layers to a deployment that is merely started again.
            if record.started_at.is_some() && !lacking(inner, owner, &configuration(offer)?.layers).await?.is_empty() {
                let message =
                    "its image has been removed from the provider's engine; remove the deployment and deploy again";
                return Err(Problem::new(Code::NoSuchImage, message).into());
            }
            offered(inner, owner, request, offer).await
        }
        ImageSource::Registry(reference) => stock::pulled(inner, record.owner, reference).await,
    }
}

async fn offered<E: Engine>(
    inner: &Inner<E>,
    owner: PeerId,
    request: RequestHash,
    offer: &ImageOffer,
) -> Result<Digest, Trouble> {
    let _waiting = inner.transfers.wait(request);
    let image = awaited(inner, owner, request, offer).await;
    match &image {
        Ok(_) => inner.transfers.done(request),
        // It is tried again, and what is on its way is still wanted.
        Err(Trouble::Database(_)) => {}
        Err(Trouble::Engine(error)) if error.is_transient() => {}
        Err(_) => inner.transfers.fail(request),
    }
    image
}

async fn awaited<E: Engine>(
    inner: &Inner<E>,
    owner: PeerId,
    request: RequestHash,
    offer: &ImageOffer,
) -> Result<Digest, Trouble> {
    let (layers, patience) = (configuration(offer)?.layers, inner.options.transfer_patience);
    loop {
        if lacking(inner, owner, &layers).await?.is_empty() {
            let _turn = inner.transfers.stock.turn(owner).await;
            // The load before may have used up, or dropped, what was complete.
            if lacking(inner, owner, &layers).await?.is_empty() {
                return stock::load(inner, owner, request, offer).await;
            }
        }
        let transfer = inner.transfers.expect(owner, request, offer, &layers)?;
        let stopped = || {
            let message = "the image's layers stopped coming; deploy again and only what is lacking will be sent";
            Problem::new(Code::MissingLayer, message)
        };
        let transfer = transfer.ok_or_else(stopped)?;
        if let Some(problem) = transfer.spoiled() {
            return Err(problem.into());
        }
        if !transfer.progresses(patience).await {
            return Err(stopped().into());
        }
    }
}
