//! Remembers every accepted request until it could no longer be valid, durably, so that a restart does not forget (V3).
//!
//! Ids are never evicted early: a peer that fills its share is told to wait instead. One of the present run is cleared away
//! when the wall clock and the monotonic clock both say that its time is over, so that a clock that jumps ahead and comes
//! back makes none forgotten (SECURITY M4). Those of earlier runs name a run that no request is accepted for any more.

use std::time::Duration;

use libp2p_identity::PeerId;
use peer_proto::envelope::{DRIFT_MAX_MILLISECONDS, Signed};
use peer_proto::id::RequestId;
use peer_state::database::{DatabaseError, Tx};
use rusqlite::params;

use crate::run::Moment;

pub(crate) const TABLES: &str = "
    CREATE TABLE request (
        signer BLOB NOT NULL, id BLOB NOT NULL, kept_until INTEGER NOT NULL, outcome TEXT NOT NULL,
        PRIMARY KEY (signer, id)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX request_kept_until ON request (kept_until);";
/// The run in which a request was remembered, and the time since its beginning (milliseconds) until which it is kept.
pub(crate) const RUNS: &str = "
    ALTER TABLE request ADD COLUMN run BLOB NOT NULL DEFAULT x'';
    ALTER TABLE request ADD COLUMN kept_elapsed INTEGER NOT NULL DEFAULT 0;";

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

pub(crate) fn look_up(tx: &Tx<'_>, request: &Signed, moment: Moment, limit: u32) -> Result<Known, DatabaseError> {
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
        "DELETE FROM request WHERE (signer, id) IN (SELECT signer, id FROM request
         WHERE kept_until < ?1 AND (run <> ?2 OR kept_elapsed < ?3) LIMIT ?4)",
        params![moment.now.0, moment.incarnation.0, milliseconds(moment.elapsed), CLEARED_AT_ONCE],
    )?;
    let held: u32 = tx.query_row("SELECT count(*) FROM request WHERE signer = ?1", [signer], |row| row.get(0))?;
    Ok(if held < limit { Known::New } else { Known::Full })
}

fn milliseconds(elapsed: Duration) -> u64 {
    // What SQLite holds ends there.
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).min(i64::MAX.unsigned_abs())
}

pub(crate) fn remember(tx: &Tx<'_>, request: &Signed, moment: Moment, outcome: &str) -> Result<(), DatabaseError> {
    // Kept past the end by the drift on both sides, and from our own clock's view as well, so that a signer's clock that
    // runs behind does not shorten it.
    let kept_until = request.not_after().max(moment.now).plus(2 * DRIFT_MAX_MILLISECONDS);
    let kept_elapsed = milliseconds(moment.elapsed).saturating_add(kept_until.since(moment.now));
    tx.execute(
        "INSERT INTO request (signer, id, kept_until, outcome, run, kept_elapsed) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![
            request.signer().to_bytes(),
            request.request_id().0,
            kept_until.0,
            outcome,
            moment.incarnation.0,
            kept_elapsed
        ],
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

#[cfg(test)]
#[path = "replay_tests.rs"]
mod tests;
