//! Remembers every accepted request until it could no longer be valid, durably, so that a restart does not forget (V3).
//!
//! Ids are never evicted early: a peer that fills its share is told to wait instead.

use libp2p_identity::PeerId;
use peer_proto::envelope::{DRIFT_MAX_MILLISECONDS, Signed};
use peer_proto::id::RequestId;
use peer_proto::unit::Timestamp;
use peer_state::database::{DatabaseError, Tx};
use rusqlite::params;

pub(crate) const TABLES: &str = "
    CREATE TABLE request (
        signer BLOB NOT NULL, id BLOB NOT NULL, kept_until INTEGER NOT NULL, outcome TEXT NOT NULL,
        PRIMARY KEY (signer, id)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX request_kept_until ON request (kept_until);";

/// Most requests remembered for one signer.
pub const REQUESTS_MAX: u32 = 100_000;
/// Most rows that one request may clear away, so that no single one pays for a long pause.
const CLEARED_AT_ONCE: u32 = 200;

/// What is known of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Known {
    /// Never seen.
    New,
    /// Seen; this came of it.
    Repeated(String),
    /// Never seen, but no more can be remembered for its signer at present.
    Full,
}

pub(crate) fn look_up(tx: &Tx<'_>, request: &Signed, now: Timestamp, limit: u32) -> Result<Known, DatabaseError> {
    let signer = request.signer().to_bytes();
    let id = request.request_id().0;
    let found = tx
        .query_row("SELECT outcome FROM request WHERE signer = ?1 AND id = ?2", params![signer, id], |row| row.get(0));
    match found {
        Ok(outcome) => return Ok(Known::Repeated(outcome)),
        Err(rusqlite::Error::QueryReturnedNoRows) => {}
        Err(error) => return Err(error.into()),
    }
    tx.execute(
        "DELETE FROM request WHERE (signer, id) IN (SELECT signer, id FROM request WHERE kept_until < ?1 LIMIT ?2)",
        params![now.0, CLEARED_AT_ONCE],
    )?;
    let held: u32 = tx.query_row("SELECT count(*) FROM request WHERE signer = ?1", [signer], |row| row.get(0))?;
    Ok(if held < limit { Known::New } else { Known::Full })
}

pub(crate) fn remember(tx: &Tx<'_>, request: &Signed, now: Timestamp, outcome: &str) -> Result<(), DatabaseError> {
    // Kept past the end by the drift on both sides, and from our own clock's view as well, so that a signer's clock that
    // runs behind does not shorten it.
    let kept_until = request.not_after().max(now).plus(2 * DRIFT_MAX_MILLISECONDS);
    tx.execute(
        "INSERT INTO request (signer, id, kept_until, outcome) VALUES (?1, ?2, ?3, ?4)",
        params![request.signer().to_bytes(), request.request_id().0, kept_until.0, outcome],
    )?;
    Ok(())
}

/// Records what has come of a request, for its signer to learn if it asks again.
pub fn record_outcome(tx: &Tx<'_>, signer: &PeerId, id: &RequestId, outcome: &str) -> Result<(), DatabaseError> {
    tx.execute(
        "UPDATE request SET outcome = ?3 WHERE signer = ?1 AND id = ?2",
        params![signer.to_bytes(), id.0, outcome],
    )?;
    Ok(())
}

/// How many requests are remembered in all.
pub fn remembered(tx: &Tx<'_>) -> Result<u64, DatabaseError> {
    Ok(tx.query_row("SELECT count(*) FROM request", [], |row| row.get(0))?)
}
