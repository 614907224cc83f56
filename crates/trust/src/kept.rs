//! Owners who are no peers any more and whose deployments go on here on purpose.

use libp2p_identity::PeerId;
use peer_state::database::{DatabaseError, Tx};

pub(crate) const TABLES: &str = "CREATE TABLE kept_owner (id BLOB PRIMARY KEY) STRICT;";

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
