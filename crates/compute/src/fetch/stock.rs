//! The images that we brought into the engine: entered before they come, bounded for each owner, removed when unused.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::deploy::{ImageOffer, RegistryReference};
use peer_proto::id::{Digest, RequestHash};
use peer_proto::unit::{ByteSize, Timestamp, format_bytes};
use peer_state::database::{DatabaseError, Tx};
use peer_trust::{limits, peers};

use super::{configuration, total_size};
use crate::driver::Trouble;
use crate::engine::{Engine, EngineError, ImageFacts};
use crate::image::assemble::LayerSource;
use crate::image::spool::Room;
use crate::possession::{self, BroughtImage, Pull};
use crate::room::{Inner, Options};

/// The images of one owner may have so many times the size of the largest image accepted.
pub const IMAGES_PER_OWNER: u64 = 4;

/// What is being brought at this moment.
#[derive(Debug, Default)]
pub(crate) struct Stock {
    /// Held while an image is entered, looked for or removed, and not while it comes.
    entries: tokio::sync::Mutex<()>,
    /// One load of an owner at a time: two images may wait for the same layers of the spool.
    owners: Mutex<HashMap<PeerId, Arc<tokio::sync::Mutex<()>>>>,
    coming: Mutex<Vec<Coming>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Coming {
    Load(Digest),
    Pull(PeerId, String),
}

/// Says that an image is on its way into the engine.
#[derive(Debug)]
struct Underway<'a> {
    stock: &'a Stock,
    what: Coming,
}

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        let mut coming = self.stock.coming();
        if let Some(place) = coming.iter().position(|what| *what == self.what) {
            coming.swap_remove(place);
        }
    }
}

impl Stock {
    fn coming(&self) -> MutexGuard<'_, Vec<Coming>> {
        self.coming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn under_way(&self, what: Coming) -> Underway<'_> {
        self.coming().push(what.clone());
        Underway { stock: self, what }
    }

    pub(super) async fn turn(&self, owner: PeerId) -> tokio::sync::OwnedMutexGuard<()> {
        let turn = Arc::clone(self.owners.lock().unwrap_or_else(PoisonError::into_inner).entry(owner).or_default());
        turn.lock_owned().await
    }
}

/// Most bytes that the images of one owner may have together (V5): what its grant says, and what any may have.
fn images_max(tx: &Tx<'_>, options: &Options, owner: &PeerId) -> Result<u64, DatabaseError> {
    let granted = peers::find_peer(tx, owner)?.and_then(|peer| peer.grants.deploy?.max_disk);
    let any = options.image_size_max.get().saturating_mul(IMAGES_PER_OWNER);
    Ok(granted.map_or(any, |granted| granted.get().min(any)))
}

/// Most bytes that the images of all owners may have together, if the machine's owner has bounded them.
fn all_images_max(tx: &Tx<'_>) -> Result<u64, DatabaseError> {
    Ok(limits::load(tx)?.disk.map_or(u64::MAX, ByteSize::get))
}

/// How much of the disk is left for layers on their way beside the images that are in use.
pub(super) fn room_in_spool(tx: &Tx<'_>, options: &Options, owner: &PeerId) -> Result<Room, DatabaseError> {
    let now = (options.clock)();
    let own = images_max(tx, options, owner)?.saturating_sub(possession::in_use(tx, Some(owner), None, now)?);
    let all = all_images_max(tx)?.saturating_sub(possession::in_use(tx, None, None, now)?);
    Ok(Room { own, all })
}

/// Checks that one more image of this size fits beside those of its owner that are in use. Those that are not make room.
pub(super) fn check_room(
    tx: &Tx<'_>,
    options: &Options,
    owner: &PeerId,
    image: Digest,
    size: u64,
) -> Result<Result<(), Problem>, DatabaseError> {
    let (max, now) = (images_max(tx, options, owner)?, (options.clock)());
    let sum = possession::in_use(tx, Some(owner), Some(image), now)?.saturating_add(size);
    if sum <= max {
        let all = possession::in_use(tx, None, Some(image), now)?.saturating_add(size);
        let full = "this machine has not enough disk free for the image at present; use a smaller one, or try later";
        let fits = all <= all_images_max(tx)?;
        return Ok(if fits { Ok(()) } else { Err(Problem::new(Code::NoCapacity, full)) });
    }
    let message = format!(
        "the images that you use on this machine would have {} together, and at most {} are allowed; remove deployments \
         that you no longer need with `peerctl rm`, and try again in a minute",
        format_bytes(sum),
        format_bytes(max)
    );
    Ok(Err(Problem::new(Code::OverLimit, message)))
}

/// Puts a complete image into the engine. It is entered as ours first, so that a crash leaves nothing unaccounted for.
pub(super) async fn load<E: Engine>(
    inner: &Inner<E>,
    owner: PeerId,
    request: RequestHash,
    offer: &ImageOffer,
) -> Result<Digest, Trouble> {
    let configuration = configuration(offer)?;
    let (image, layers) = (configuration.digest, configuration.layers);
    let _underway = inner.transfers.stock.under_way(Coming::Load(image));
    let present = {
        let _entries = inner.transfers.stock.entries.lock().await;
        let facts = inner.engine.has_image(image).await?;
        let size = facts.as_ref().map_or(0, |facts| facts.size).max(total_size(offer));
        enter(inner, owner, image, size, facts.is_some()).await?;
        facts.is_some()
    };
    if !present && let Err(trouble) = put(inner, owner, offer, image, &layers).await {
        let invalid = matches!(&trouble, Trouble::Engine(EngineError::InvalidImage { .. }));
        for layer in layers.iter().filter(|_| invalid) {
            if !inner.transfers.needed_elsewhere(owner, layer, request) {
                drop_spooled(inner, &owner, layer);
            }
        }
        take_back(inner, owner, image, &trouble).await?;
        return Err(trouble);
    }
    for layer in &layers {
        drop_spooled(inner, &owner, layer);
    }
    make_room(inner, owner).await?;
    Ok(image)
}

async fn put<E: Engine>(
    inner: &Inner<E>,
    owner: PeerId,
    offer: &ImageOffer,
    image: Digest,
    layers: &[Digest],
) -> Result<(), Trouble> {
    let spool = &inner.transfers.spool;
    let source = |(layer, size): (&Digest, &u64)| LayerSource {
        layer: *layer,
        file: spool.path(&owner, layer).map(|path| (path, *size)),
    };
    let sources: Vec<_> = layers.iter().zip(&offer.layer_sizes).map(source).collect();
    match inner.engine.load(&offer.configuration, &sources).await {
        Err(error @ EngineError::MissingLayer { .. }) => {
            // The engine has lost layers that this owner once supplied: they must come again.
            let lost: Vec<_> =
                sources.iter().filter(|source| source.file.is_none()).map(|source| source.layer).collect();
            inner.database.write(move |tx| possession::forget_layers(tx, &owner, &lost)).await?;
            return Err(error.into());
        }
        other => other?,
    }
    let Some(facts) = inner.engine.has_image(image).await? else {
        let message = "it is not the image that was promised".to_owned();
        return Err(EngineError::InvalidImage { message }.into());
    };
    // Sizes of layers that need not come are the owner's word alone: here is what they are.
    let size_max = inner.options.image_size_max.get();
    let too_large = facts.size > size_max;
    inner.database.write(move |tx| possession::weighed(tx, &owner, image, facts.size, !too_large)).await?;
    if too_large {
        inner.untidy.notify_one();
        return Err(EngineError::ImageTooLarge { size_max }.into());
    }
    Ok(())
}

fn drop_spooled<E>(inner: &Inner<E>, owner: &PeerId, layer: &Digest) {
    if let Err(error) = inner.transfers.spool.remove(owner, layer) {
        tracing::warn!(%error, "a layer in use stays in the spool");
    }
}

async fn enter<E: Engine>(
    inner: &Inner<E>,
    owner: PeerId,
    image: Digest,
    size: u64,
    present: bool,
) -> Result<(), Trouble> {
    let options = inner.options.clone();
    let entered = inner
        .database
        .write(move |tx| -> Result<_, DatabaseError> {
            let now = (options.clock)();
            // An image that was in the engine without us stays its owner's own, and is never removed by us.
            if present && !possession::used(tx, image, now)? {
                return Ok(Ok(()));
            }
            if let Err(problem) = check_room(tx, &options, &owner, image, size)? {
                return Ok(Err(problem));
            }
            possession::brought(tx, Some(&owner), image, size, now)?;
            Ok(Ok(()))
        })
        .await?;
    Ok(entered?)
}

/// An image that never came is not counted. One that may have come after all is looked for later.
async fn take_back<E: Engine>(
    inner: &Inner<E>,
    owner: PeerId,
    image: Digest,
    trouble: &Trouble,
) -> Result<(), Trouble> {
    let transient = matches!(trouble, Trouble::Engine(error) if error.is_transient());
    if !transient && matches!(inner.engine.has_image(image).await, Ok(None)) {
        inner.database.write(move |tx| possession::take_back(tx, &owner, image)).await?;
    }
    Ok(())
}

/// Gives up images that the owner no longer uses, oldest first, until the rest is within bounds.
async fn make_room<E: Engine>(inner: &Inner<E>, owner: PeerId) -> Result<(), Trouble> {
    let options = inner.options.clone();
    let given_up = inner.database.write(move |tx| -> Result<_, DatabaseError> {
        let (max, now) = (images_max(tx, &options, &owner)?, (options.clock)());
        let own = possession::give_up(tx, Some(&owner), max, now)?;
        Ok(own + possession::give_up(tx, None, all_images_max(tx)?, now)?)
    });
    if given_up.await? > 0 {
        inner.untidy.notify_one();
    }
    Ok(())
}

/// Fetches a public image. That it can be fetched by anybody is proven by the registry, which is asked each time.
pub(super) async fn pulled<E: Engine>(
    inner: &Inner<E>,
    owner: PeerId,
    reference: &RegistryReference,
) -> Result<Digest, Trouble> {
    let text = reference.to_string();
    let _underway = inner.transfers.stock.under_way(Coming::Pull(owner, text.clone()));
    let pull = {
        let _entries = inner.transfers.stock.entries.lock().await;
        let present = inner.engine.images().await?.iter().map(|known| known.digest).collect();
        let pull = Pull { owner, reference: text, present };
        inner.database.write(move |tx| possession::intend(tx, pull)).await?
    };
    let size_max = inner.options.image_size_max.get();
    let image = match inner.engine.pull(reference, size_max, &mut |_| {}).await {
        Ok(image) => image,
        Err(error) => {
            if !error.is_transient() {
                inner.database.write(move |tx| possession::settled(tx, &pull)).await?;
            }
            return Err(error.into());
        }
    };
    let facts = inner.engine.has_image(image).await?.ok_or(EngineError::NoSuchImage { image: image.to_string() })?;
    let options = inner.options.clone();
    let entered = inner.database.write(move |tx| enter_pulled(tx, &options, &pull, &facts)).await?;
    if let Err(problem) = entered {
        inner.untidy.notify_one();
        return Err(problem.into());
    }
    make_room(inner, owner).await?;
    Ok(image)
}

/// Enters what has been pulled. What is too much for its owner is entered as nobody's, to be removed soon.
fn enter_pulled(
    tx: &Tx<'_>,
    options: &Options,
    pull: &Pull,
    facts: &ImageFacts,
) -> Result<Result<(), Problem>, DatabaseError> {
    let (owner, image, now) = (&pull.owner, facts.digest, (options.clock)());
    let mut room = Ok(());
    if !pull.present.contains(&image) || possession::used(tx, image, now)? {
        room = check_room(tx, options, owner, image, facts.size)?;
        possession::brought(tx, room.is_ok().then_some(owner), image, facts.size, now)?;
        possession::referred(tx, image, &pull.reference)?;
    }
    if room.is_ok() {
        facts.layers.iter().try_for_each(|layer| possession::supplied(tx, owner, *layer))?;
    }
    possession::settled(tx, pull)?;
    Ok(room)
}

/// Removes images that we brought and that nothing has used for long, and forgets those that are gone.
pub(crate) async fn clean_images<E: Engine>(inner: &Inner<E>) -> Result<(), Trouble> {
    settle_pulls(inner).await?;
    let known: HashSet<_> = inner.engine.images().await?.into_iter().map(|image| image.digest).collect();
    let keep = inner.options.image_keep_milliseconds;
    for image in inner.database.write(possession::images).await? {
        let digest = image.digest;
        let absent = !known.contains(&digest);
        if !absent && !is_due(&image, (inner.options.steady_clock)(), keep) {
            continue;
        }
        let _entries = inner.transfers.stock.entries.lock().await;
        if absent {
            let coming = inner.transfers.stock.coming().contains(&Coming::Load(digest));
            if !coming && inner.engine.has_image(digest).await?.is_none() {
                inner.database.write(move |tx| possession::removed(tx, digest)).await?;
            }
            continue;
        }
        // It may have been used since the list was made.
        let (again, references) = inner
            .database
            .write(move |tx| -> Result<_, DatabaseError> {
                Ok((possession::images(tx)?, possession::references_of(tx, digest)?))
            })
            .await?;
        let due =
            again.iter().any(|image| image.digest == digest && is_due(image, (inner.options.steady_clock)(), keep));
        if !due || is_kept(inner.engine.has_image(digest).await?.as_ref(), &references) {
            continue;
        }
        match inner.engine.remove_image(digest).await {
            Ok(()) => inner.database.write(move |tx| possession::removed(tx, digest)).await?,
            // Somebody has made it theirs meanwhile, with a name or a container of their own.
            Err(EngineError::InUse { .. } | EngineError::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn is_due(image: &BroughtImage, now: Timestamp, keep: u64) -> bool {
    image.used_by == 0 && (image.owners.is_empty() || now.since(image.last_used_at) >= keep)
}

/// Whether somebody else wants to keep the image: they have named it, or fetched it by a reference that is not ours.
fn is_kept(facts: Option<&ImageFacts>, ours: &[String]) -> bool {
    let ours: Vec<_> = ours.iter().map(|reference| familiar(reference)).collect();
    facts.is_some_and(|facts| {
        !facts.names.is_empty() || facts.references.iter().any(|reference| !ours.contains(&familiar(reference)))
    })
}

/// A reference as the engine shows it: without the parts that stand for its usual registry.
fn familiar(reference: &str) -> &str {
    let short = reference.strip_prefix("index.docker.io/").or_else(|| reference.strip_prefix("docker.io/"));
    short.map_or(reference, |short| short.strip_prefix("library/").unwrap_or(short))
}

/// Enters the images of pulls that a crash or a lost answer cut short.
async fn settle_pulls<E: Engine>(inner: &Inner<E>) -> Result<(), Trouble> {
    for pull in inner.database.write(possession::pulls).await? {
        let _entries = inner.transfers.stock.entries.lock().await;
        if inner.transfers.stock.coming().contains(&Coming::Pull(pull.owner, pull.reference.clone())) {
            continue;
        }
        let facts = match inner.engine.resolve(&pull.reference).await {
            Ok(image) => inner.engine.has_image(image).await?,
            Err(EngineError::NoSuchImage { .. } | EngineError::Refused { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let options = inner.options.clone();
        inner
            .database
            .write(move |tx| -> Result<(), DatabaseError> {
                match facts {
                    // Too much or not, it is entered, and leaves as any other.
                    Some(facts) => enter_pulled(tx, &options, &pull, &facts).map(drop),
                    None => possession::settled(tx, &pull),
                }
            })
            .await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(names: &[&str], references: &[&str]) -> ImageFacts {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        ImageFacts { names: texts(names), references: texts(references), ..crate::profile::tests::image() }
    }

    #[test]
    fn an_image_that_somebody_fetched_to_keep_is_kept() {
        let ours = ["docker.io/library/hello@sha256:00".to_owned()];
        assert!(!is_kept(None, &[]));
        assert!(!is_kept(Some(&facts(&[], &["hello@sha256:00"])), &ours));
        assert!(is_kept(Some(&facts(&[], &["hello@sha256:00"])), &[]));
        assert!(is_kept(Some(&facts(&[], &["hello@sha256:00", "quay.io/hello@sha256:00"])), &ours));
        assert!(is_kept(Some(&facts(&["hello:1"], &[])), &ours));
    }
}
