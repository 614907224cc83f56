//! Who has supplied which layers, and which images we brought.
//!
//! A layer counts for a peer only once that peer has sent its bytes: naming a digest proves nothing. Images that this
//! table does not list were not brought by us, and are never removed by us.

use std::collections::HashSet;

use peer_proto::PeerId;
use peer_proto::id::Digest;
use peer_proto::unit::Timestamp;
use peer_state::database::{DatabaseError, Tx};
use peer_state::rusqlite::{self, params};

pub(crate) const TABLES: &str = "
    CREATE TABLE possession (owner BLOB NOT NULL, layer BLOB NOT NULL, PRIMARY KEY (owner, layer)) STRICT, WITHOUT ROWID;
    CREATE TABLE image (digest BLOB PRIMARY KEY, size INTEGER NOT NULL, last_used_at INTEGER NOT NULL) STRICT;
    CREATE TABLE image_owner (
        digest BLOB NOT NULL REFERENCES image (digest) ON DELETE CASCADE, owner BLOB NOT NULL,
        PRIMARY KEY (digest, owner)
    ) STRICT, WITHOUT ROWID;";

/// Pulls under way, with the images that were there before them; and the references that pulls gave to images of ours.
pub(crate) const PULLS: &str = "
    CREATE TABLE image_pull (
        owner BLOB NOT NULL, reference TEXT NOT NULL, present BLOB NOT NULL, PRIMARY KEY (owner, reference)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE image_reference (
        digest BLOB NOT NULL REFERENCES image (digest) ON DELETE CASCADE, reference TEXT NOT NULL,
        PRIMARY KEY (digest, reference)
    ) STRICT, WITHOUT ROWID;";

/// An image used within this time (milliseconds) is in use: the row of the deployment that needs it may still be to come.
const FRESH_MILLISECONDS: u64 = 60_000;

/// Remembers that `owner` has supplied the bytes of `layer`.
pub(crate) fn supplied(tx: &Tx<'_>, owner: &PeerId, layer: Digest) -> Result<(), DatabaseError> {
    tx.execute("INSERT OR IGNORE INTO possession VALUES (?1, ?2)", params![owner.to_bytes(), layer.0])?;
    Ok(())
}

/// Every layer that `owner` has supplied.
pub(crate) fn layers_of(tx: &Tx<'_>, owner: &PeerId) -> Result<HashSet<Digest>, DatabaseError> {
    let mut statement = tx.prepare_cached("SELECT layer FROM possession WHERE owner = ?1")?;
    let rows = statement.query_map([owner.to_bytes()], |row| row.get(0).map(Digest))?;
    rows.collect::<Result<_, _>>().map_err(Into::into)
}

/// Forgets that `owner` has supplied these layers.
pub(crate) fn forget_layers(tx: &Tx<'_>, owner: &PeerId, layers: &[Digest]) -> Result<(), DatabaseError> {
    for layer in layers {
        tx.execute("DELETE FROM possession WHERE owner = ?1 AND layer = ?2", params![owner.to_bytes(), layer.0])?;
    }
    Ok(())
}

/// Forgets what a removed peer has supplied.
pub(crate) fn forget_owner(tx: &Tx<'_>, owner: &PeerId) -> Result<(), DatabaseError> {
    tx.execute("DELETE FROM possession WHERE owner = ?1", [owner.to_bytes()])?;
    tx.execute("DELETE FROM image_owner WHERE owner = ?1", [owner.to_bytes()])?;
    Ok(())
}

/// An image that we brought into the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BroughtImage {
    /// SHA-256 of its configuration.
    pub digest: Digest,
    /// Size of its layers (bytes).
    pub size: u64,
    /// When it was last needed.
    pub last_used_at: Timestamp,
    /// Who brought it; nobody, once its owners have given it up.
    pub owners: Vec<PeerId>,
    /// Deployments that use it.
    pub used_by: u32,
}

/// Remembers that we brought an image, for `owner` or for nobody.
pub(crate) fn brought(
    tx: &Tx<'_>,
    owner: Option<&PeerId>,
    digest: Digest,
    size: u64,
    now: Timestamp,
) -> Result<(), DatabaseError> {
    tx.execute(
        "INSERT INTO image VALUES (?1, ?2, ?3) ON CONFLICT (digest) DO UPDATE SET last_used_at = excluded.last_used_at",
        params![digest.0, size, now.0],
    )?;
    if let Some(owner) = owner {
        tx.execute("INSERT OR IGNORE INTO image_owner VALUES (?1, ?2)", params![digest.0, owner.to_bytes()])?;
    }
    Ok(())
}

/// Corrects the size of an image by what the engine says of it, and gives it up for `owner` unless it may be kept.
pub(crate) fn weighed(tx: &Tx<'_>, owner: &PeerId, digest: Digest, size: u64, keep: bool) -> Result<(), DatabaseError> {
    tx.execute("UPDATE image SET size = max(size, ?2) WHERE digest = ?1", params![digest.0, size])?;
    if !keep {
        disown(tx, owner, digest)?;
    }
    Ok(())
}

fn disown(tx: &Tx<'_>, owner: &PeerId, digest: Digest) -> Result<(), DatabaseError> {
    tx.execute("DELETE FROM image_owner WHERE digest = ?1 AND owner = ?2", params![digest.0, owner.to_bytes()])?;
    Ok(())
}

/// Forgets that we brought an image for `owner`, which has not come after all.
pub(crate) fn take_back(tx: &Tx<'_>, owner: &PeerId, digest: Digest) -> Result<(), DatabaseError> {
    disown(tx, owner, digest)?;
    tx.execute(
        "DELETE FROM image WHERE digest = ?1 AND digest NOT IN (SELECT digest FROM image_owner)",
        params![digest.0],
    )?;
    Ok(())
}

/// Bytes of the images of `owner`, or of all, that deployments use, or that have just come, other than `except`.
pub(crate) fn in_use(
    tx: &Tx<'_>,
    owner: Option<&PeerId>,
    except: Option<Digest>,
    now: Timestamp,
) -> Result<u64, DatabaseError> {
    let images = images_of(tx, owner, now)?;
    Ok(images
        .iter()
        .filter(|image| image.used && Some(image.digest) != except)
        .fold(0, |sum: u64, image| sum.saturating_add(image.size)))
}

/// Bytes of the images of `owner`, or of all, whether they are in use or not.
pub(crate) fn size_of(tx: &Tx<'_>, owner: Option<&PeerId>, now: Timestamp) -> Result<u64, DatabaseError> {
    Ok(images_of(tx, owner, now)?.iter().fold(0, |sum: u64, image| sum.saturating_add(image.size)))
}

/// Gives up images that `owner`, or nobody, uses, oldest first, until the rest has at most `max` bytes. Says how many.
pub(crate) fn give_up(tx: &Tx<'_>, owner: Option<&PeerId>, max: u64, now: Timestamp) -> Result<usize, DatabaseError> {
    let images = images_of(tx, owner, now)?;
    let mut sum = images.iter().fold(0, |sum: u64, image| sum.saturating_add(image.size));
    let mut given_up = 0;
    for image in images.iter().filter(|image| !image.used) {
        if sum <= max {
            break;
        }
        match owner {
            Some(owner) => disown(tx, owner, image.digest)?,
            None => drop(tx.execute("DELETE FROM image_owner WHERE digest = ?1", [image.digest.0])?),
        }
        sum = sum.saturating_sub(image.size);
        given_up += 1;
    }
    Ok(given_up)
}

/// An image as it counts for one owner.
struct Counted {
    digest: Digest,
    size: u64,
    used: bool,
}

fn images_of(tx: &Tx<'_>, owner: Option<&PeerId>, now: Timestamp) -> Result<Vec<Counted>, DatabaseError> {
    let mut statement = tx.prepare_cached(
        "SELECT digest, size, last_used_at,
            EXISTS (SELECT 1 FROM deployment WHERE deployment.image = digest AND ifnull(deployment.owner = ?1, 1))
         FROM image WHERE ?1 IS NULL OR digest IN (SELECT digest FROM image_owner WHERE owner = ?1)
         ORDER BY last_used_at",
    )?;
    let rows = statement.query_map([owner.map(|owner| owner.to_bytes())], |row| {
        let fresh = now.since(Timestamp(row.get(2)?)) < FRESH_MILLISECONDS;
        Ok(Counted { digest: Digest(row.get(0)?), size: row.get(1)?, used: row.get::<_, bool>(3)? || fresh })
    })?;
    rows.collect::<Result<_, _>>().map_err(Into::into)
}

/// Notes the use of an image, if we brought it; says whether we did.
pub(crate) fn used(tx: &Tx<'_>, digest: Digest, now: Timestamp) -> Result<bool, DatabaseError> {
    Ok(tx.execute("UPDATE image SET last_used_at = ?2 WHERE digest = ?1", params![digest.0, now.0])? == 1)
}

/// Every image that we brought.
pub fn images(tx: &Tx<'_>) -> Result<Vec<BroughtImage>, DatabaseError> {
    let mut statement = tx.prepare_cached(
        "SELECT digest, size, last_used_at, (SELECT count(*) FROM deployment WHERE deployment.image = image.digest)
         FROM image ORDER BY last_used_at DESC",
    )?;
    let rows = statement.query_map([], |row| {
        Ok(BroughtImage {
            digest: Digest(row.get(0)?),
            size: row.get(1)?,
            last_used_at: Timestamp(row.get(2)?),
            owners: Vec::new(),
            used_by: row.get(3)?,
        })
    })?;
    let mut images = rows.collect::<Result<Vec<_>, _>>()?;
    for image in &mut images {
        let mut statement = tx.prepare_cached("SELECT owner FROM image_owner WHERE digest = ?1")?;
        let owners = statement.query_map([image.digest.0], |row| row.get::<_, Vec<u8>>(0))?;
        image.owners = owners.filter_map(|owner| PeerId::from_bytes(&owner.ok()?).ok()).collect();
    }
    Ok(images)
}

/// Forgets an image that has been removed from the engine.
pub(crate) fn removed(tx: &Tx<'_>, digest: Digest) -> Result<(), DatabaseError> {
    tx.execute("DELETE FROM image WHERE digest = ?1", [digest.0])?;
    Ok(())
}

/// A fetch of an image from a registry, from before it begins until its image has been entered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pull {
    /// For whom.
    pub(crate) owner: PeerId,
    /// What is fetched.
    pub(crate) reference: String,
    /// Images that were in the engine before.
    pub(crate) present: HashSet<Digest>,
}

/// Notes a pull before it begins. One that was cut short is taken up: what counts is what was there before that one.
pub(crate) fn intend(tx: &Tx<'_>, pull: Pull) -> Result<Pull, DatabaseError> {
    let earlier =
        pulls(tx)?.into_iter().find(|earlier| (earlier.owner, &earlier.reference) == (pull.owner, &pull.reference));
    if let Some(earlier) = earlier {
        return Ok(earlier);
    }
    let present: Vec<u8> = pull.present.iter().flat_map(|digest| digest.0).collect();
    tx.execute("INSERT INTO image_pull VALUES (?1, ?2, ?3)", params![pull.owner.to_bytes(), pull.reference, present])?;
    Ok(pull)
}

/// Forgets a pull whose image has been entered, or has not come.
pub(crate) fn settled(tx: &Tx<'_>, pull: &Pull) -> Result<(), DatabaseError> {
    tx.execute(
        "DELETE FROM image_pull WHERE owner = ?1 AND reference = ?2",
        params![pull.owner.to_bytes(), pull.reference],
    )?;
    Ok(())
}

/// Every pull that has not been settled.
pub(crate) fn pulls(tx: &Tx<'_>) -> Result<Vec<Pull>, DatabaseError> {
    let mut statement = tx.prepare_cached("SELECT owner, reference, present FROM image_pull")?;
    let rows = statement.query_map([], |row| {
        let owner: Vec<u8> = row.get(0)?;
        let owner = PeerId::from_bytes(&owner).map_err(|error| {
            rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Blob, Box::new(error))
        })?;
        let present: Vec<u8> = row.get(2)?;
        let present = present.as_chunks::<32>().0.iter().copied().map(Digest).collect();
        Ok(Pull { owner, reference: row.get(1)?, present })
    })?;
    rows.collect::<Result<_, _>>().map_err(Into::into)
}

/// Remembers a reference by which we fetched an image.
pub(crate) fn referred(tx: &Tx<'_>, digest: Digest, reference: &str) -> Result<(), DatabaseError> {
    tx.execute("INSERT OR IGNORE INTO image_reference VALUES (?1, ?2)", params![digest.0, reference])?;
    Ok(())
}

/// The references by which we fetched an image.
pub(crate) fn references_of(tx: &Tx<'_>, digest: Digest) -> Result<Vec<String>, DatabaseError> {
    let mut statement = tx.prepare_cached("SELECT reference FROM image_reference WHERE digest = ?1")?;
    let rows = statement.query_map([digest.0], |row| row.get(0))?;
    rows.collect::<Result<_, _>>().map_err(Into::into)
}

#[cfg(test)]
#[path = "possession_tests.rs"]
mod tests;
