//! Owners whose deployments go on here on purpose although they are no peers any more, or may deploy no more.

use libp2p_identity::PeerId;
use peer_proto::unit::Timestamp;
use peer_state::database::{DatabaseError, Tx};

pub(crate) const TABLES: &str = "CREATE TABLE kept_owner (id BLOB PRIMARY KEY) STRICT;";

/// Ends of grants that have been told.
pub(crate) const ENDS: &str = "CREATE TABLE grant_end (id BLOB PRIMARY KEY, told INTEGER NOT NULL) STRICT;";

/// Notes that the end of a peer's grant is told; false if it was told before.
pub fn tell_end(tx: &Tx<'_>, peer: &PeerId, end: Timestamp) -> Result<bool, DatabaseError> {
    let changed = tx.execute(
        "INSERT INTO grant_end (id, told) VALUES (?1, ?2)
         ON CONFLICT (id) DO UPDATE SET told = excluded.told WHERE told <> excluded.told",
        rusqlite::params![peer.to_bytes(), end.0],
    )?;
    Ok(changed == 1)
}

/// Marks an owner, in the transaction that removes it from the list.
pub fn keep(tx: &Tx<'_>, owner: &PeerId) -> Result<(), DatabaseError> {
    tx.execute("INSERT OR IGNORE INTO kept_owner (id) VALUES (?1)", [owner.to_bytes()])?;
    Ok(())
}

/// Whether an owner is marked.
pub fn is_kept(tx: &Tx<'_>, owner: &PeerId) -> Result<bool, DatabaseError> {
    Ok(tx.query_row("SELECT count(*) FROM kept_owner WHERE id = ?1", [owner.to_bytes()], |row| row.get::<_, u32>(0))?
        > 0)
}

/// Takes the mark away.
pub fn forget(tx: &Tx<'_>, owner: &PeerId) -> Result<(), DatabaseError> {
    tx.execute("DELETE FROM kept_owner WHERE id = ?1", [owner.to_bytes()])?;
    Ok(())
}
