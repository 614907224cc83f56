//! Peers who have not confirmed our own newest key yet. The key file is what counts; these rows follow it.

use libp2p_identity::PeerId;
use peer_state::database::{DatabaseError, Tx};

pub(crate) const TABLES: &str = "
    CREATE TABLE rotation_begun (id INTEGER PRIMARY KEY CHECK (id = 1), current BLOB NOT NULL) STRICT;
    CREATE TABLE unconfirmed (peer BLOB PRIMARY KEY) STRICT;";

/// Whether confirmations for the key `current` are counted on already.
pub fn is_begun(tx: &Tx<'_>, current: &PeerId) -> Result<bool, DatabaseError> {
    match tx.query_row("SELECT current FROM rotation_begun", [], |row| row.get::<_, Vec<u8>>(0)) {
        Ok(begun) => Ok(begun == current.to_bytes()),
        Err(rusqlite::Error::QueryReturnedNoRows) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Counts on the confirmation of each of `peers` for the key `current`.
pub fn begin<'a>(tx: &Tx<'_>, current: &PeerId, peers: impl Iterator<Item = &'a PeerId>) -> Result<(), DatabaseError> {
    tx.execute(
        "INSERT INTO rotation_begun (id, current) VALUES (1, ?1) ON CONFLICT (id) DO UPDATE SET current = excluded.current",
        [current.to_bytes()],
    )?;
    for peer in peers {
        tx.execute("INSERT OR IGNORE INTO unconfirmed (peer) VALUES (?1)", [peer.to_bytes()])?;
    }
    Ok(())
}

/// A peer follows our newest key.
pub fn confirm(tx: &Tx<'_>, peer: &PeerId) -> Result<(), DatabaseError> {
    tx.execute("DELETE FROM unconfirmed WHERE peer = ?1", [peer.to_bytes()])?;
    Ok(())
}

/// A peer goes on under another key itself.
pub(crate) fn moved(tx: &Tx<'_>, old: &PeerId, new: &PeerId) -> Result<(), DatabaseError> {
    if tx.execute("DELETE FROM unconfirmed WHERE peer = ?1", [old.to_bytes()])? == 1 {
        tx.execute("INSERT OR IGNORE INTO unconfirmed (peer) VALUES (?1)", [new.to_bytes()])?;
    }
    Ok(())
}

/// Waits for nobody any more.
pub fn clear(tx: &Tx<'_>) -> Result<(), DatabaseError> {
    tx.execute("DELETE FROM unconfirmed", [])?;
    Ok(())
}

/// Whose confirmation is missing. Those who are no peers any more do not count.
pub fn missing(tx: &Tx<'_>) -> Result<Vec<PeerId>, DatabaseError> {
    let mut statement =
        tx.prepare_cached("SELECT peer FROM unconfirmed WHERE peer IN (SELECT id FROM peer) ORDER BY peer")?;
    let rows = statement.query_map([], |row| row.get::<_, Vec<u8>>(0))?;
    let peers = rows.collect::<Result<Vec<_>, _>>()?;
    Ok(peers.iter().filter_map(|bytes| PeerId::from_bytes(bytes).ok()).collect())
}
