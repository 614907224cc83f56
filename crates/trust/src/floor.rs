//! The clock's floor: the latest time that this machine has ever seen, durably, so that turning the clock back makes
//! nothing valid again that has ended (V3, SECURITY M4).

use peer_proto::code::{Code, Problem};
use peer_proto::envelope::DRIFT_MAX_MILLISECONDS;
use peer_proto::unit::{Timestamp, in_words};
use peer_state::database::{DatabaseError, Tx};

pub(crate) const TABLES: &str = "
    CREATE TABLE clock_floor (id INTEGER PRIMARY KEY CHECK (id = 1), latest INTEGER NOT NULL) STRICT;";

/// The latest time ever seen; zero before the first.
pub fn latest(tx: &Tx<'_>) -> Result<Timestamp, DatabaseError> {
    match tx.query_row("SELECT latest FROM clock_floor", [], |row| row.get(0)) {
        Ok(latest) => Ok(Timestamp(latest)),
        Err(rusqlite::Error::QueryReturnedNoRows) => Ok(Timestamp(0)),
        Err(error) => Err(error.into()),
    }
}

/// Remembers `now` if it is the latest time, and says what is wrong if it lies before one by more than the allowed drift.
pub fn pass(tx: &Tx<'_>, now: Timestamp) -> Result<Result<(), Problem>, DatabaseError> {
    let latest = latest(tx)?;
    if now.plus(DRIFT_MAX_MILLISECONDS) < latest {
        return Ok(Err(behind(latest.since(now))));
    }
    if now > latest {
        set(tx, now)?;
    }
    Ok(Ok(()))
}

/// Takes `now` for right, and gives the floor that stood before. For a machine whose clock once stood in the future, and
/// only together with a new run: see [`crate::run::Run::accept_clock`].
pub(crate) fn accept(tx: &Tx<'_>, now: Timestamp) -> Result<Timestamp, DatabaseError> {
    let former = latest(tx)?;
    set(tx, now)?;
    Ok(former)
}

fn set(tx: &Tx<'_>, latest: Timestamp) -> Result<(), DatabaseError> {
    tx.execute(
        "INSERT INTO clock_floor (id, latest) VALUES (1, ?1) ON CONFLICT (id) DO UPDATE SET latest = excluded.latest",
        [latest.0],
    )?;
    Ok(())
}

fn behind(milliseconds: u64) -> Problem {
    let message = format!(
        "the machine's clock stands {} before a time that it has shown already; set it (timedatectl set-ntp true), or, if \
         it is right now and stood in the future once, run there: peerctl doctor --accept-clock",
        in_words(milliseconds)
    );
    Problem::new(Code::ClockBehind, message)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use peer_state::database::Database;

    use super::*;

    #[test]
    fn v3_clock_that_went_back_is_refused_until_it_is_accepted() {
        let directory = tempfile::tempdir().unwrap();
        let open = || Database::open(&directory.path().join("db"), &[crate::SCHEMA]).unwrap();
        let at = |now: u64| open().write_blocking(|tx| pass(tx, Timestamp(now))).unwrap();
        let late = 1_800_000_000_000;
        assert_eq!(at(late), Ok(()));
        assert_eq!(at(late - DRIFT_MAX_MILLISECONDS), Ok(()), "drift is no fault");
        let problem = at(late - 2 * 3_600_000).unwrap_err();
        assert_eq!(problem.code, Code::ClockBehind);
        assert!(problem.message.contains("2 hours"), "{problem}");
        let former = open().write_blocking(|tx| accept(tx, Timestamp(1000))).unwrap();
        assert_eq!((former, at(1000)), (Timestamp(late), Ok(())));
    }
}
