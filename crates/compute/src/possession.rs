//! Who has supplied which layers, and which images we brought.
//!
//! A layer counts for a peer only once that peer has sent its bytes: naming a digest proves nothing. Images that this
//! table does not list were not brought by us, and are never removed by us.

use std::collections::HashSet;

use peer_proto::PeerId;
use peer_proto::id::Digest;
use peer_proto::unit::Timestamp;
use peer_state::database::{DatabaseError, Tx};
use peer_state::rusqlite::params;

pub(crate) const TABLES: &str = "
    CREATE TABLE possession (owner BLOB NOT NULL, layer BLOB NOT NULL, PRIMARY KEY (owner, layer)) STRICT, WITHOUT ROWID;
    CREATE TABLE image (digest BLOB PRIMARY KEY, size INTEGER NOT NULL, last_used_at INTEGER NOT NULL) STRICT;
    CREATE TABLE image_owner (
        digest BLOB NOT NULL REFERENCES image (digest) ON DELETE CASCADE, owner BLOB NOT NULL,
        PRIMARY KEY (digest, owner)
    ) STRICT, WITHOUT ROWID;";

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
    /// Who brought it.
    pub owners: Vec<PeerId>,
    /// Deployments that use it.
    pub used_by: u32,
}

/// Remembers that we brought an image for `owner`.
pub(crate) fn brought(
    tx: &Tx<'_>,
    owner: &PeerId,
    digest: Digest,
    size: u64,
    now: Timestamp,
) -> Result<(), DatabaseError> {
    tx.execute(
        "INSERT INTO image VALUES (?1, ?2, ?3) ON CONFLICT (digest) DO UPDATE SET last_used_at = excluded.last_used_at",
        params![digest.0, size, now.0],
    )?;
    tx.execute("INSERT OR IGNORE INTO image_owner VALUES (?1, ?2)", params![digest.0, owner.to_bytes()])?;
    Ok(())
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
