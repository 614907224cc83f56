//! What the owner of this machine lets all peers together use of it, beside what the settings say.

use peer_proto::frame::{decode_strict, encode};
use peer_proto::limits::{Bounds, ChangeLimits};
use peer_proto::unit::Timestamp;
use peer_state::audit::{self, Entry, Outcome};
use peer_state::database::{DatabaseError, Tx};
use rusqlite::types::Type;

pub(crate) const TABLES: &str = "
    CREATE TABLE owner_limits (id INTEGER PRIMARY KEY CHECK (id = 1), bounds BLOB NOT NULL) STRICT;";

const BOUNDS_MAX: usize = 4096;

/// The machine's limits as they were set; nothing, if they never were.
pub fn load(tx: &Tx<'_>) -> Result<Bounds, DatabaseError> {
    match tx.query_row("SELECT bounds FROM owner_limits", [], |row| row.get::<_, Vec<u8>>(0)) {
        // A row that cannot be read is no freedom: whoever asks gets the failure.
        Ok(bytes) => decode_strict(&bytes, BOUNDS_MAX)
            .map_err(|error| rusqlite::Error::FromSqlConversionFailure(0, Type::Blob, Box::new(error)).into()),
        Err(rusqlite::Error::QueryReturnedNoRows) => Ok(Bounds::default()),
        Err(error) => Err(error.into()),
    }
}

/// Changes the machine's limits, with a line in the audit log.
pub fn change(tx: &Tx<'_>, change: &ChangeLimits, now: Timestamp) -> Result<Bounds, DatabaseError> {
    let former = load(tx)?;
    let mut bounds = former.clone();
    bounds.change(&change.set, &change.unset);
    tx.execute(
        "INSERT INTO owner_limits (id, bounds) VALUES (1, ?1) ON CONFLICT (id) DO UPDATE SET bounds = excluded.bounds",
        [encode(&bounds)],
    )?;
    let entry = Entry {
        at: now,
        actor: "local".to_owned(),
        action: "limits changed".to_owned(),
        outcome: Outcome::Allowed,
        detail: format!("whole machine: {} -> {}", former.in_words(), bounds.in_words()),
    };
    audit::append(tx, &entry)?;
    Ok(bounds)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use peer_proto::limits::LimitKey;
    use peer_state::database::Database;

    use super::*;

    #[test]
    fn limits_survive_a_restart_are_audited_and_never_misread() {
        let directory = tempfile::tempdir().unwrap();
        let open = || Database::open(&directory.path().join("db"), &[audit::SCHEMA, crate::SCHEMA]).unwrap();
        assert_eq!(open().write_blocking(load).unwrap(), Bounds::default());
        let set = Bounds { cpu: Some("1.5".parse().unwrap()), ..Bounds::default() };
        let wanted = ChangeLimits { set: set.clone(), ..ChangeLimits::default() };
        open().write_blocking(|tx| change(tx, &wanted, Timestamp(1))).unwrap();
        assert_eq!(open().write_blocking(load).unwrap(), set);
        let back = ChangeLimits { unset: vec![LimitKey::Cpu], ..ChangeLimits::default() };
        open().write_blocking(|tx| change(tx, &back, Timestamp(2))).unwrap();
        let lines = open().write_blocking(|tx| audit::newest(tx, 2)).unwrap();
        assert!(lines[0].detail.contains("nothing -> cpu=1.5") && lines[1].detail.contains("cpu=1.5 -> nothing"));
        let damage =
            |tx: &Tx<'_>| tx.execute("UPDATE owner_limits SET bounds = x'ff'", []).map_err(DatabaseError::from);
        open().write_blocking(damage).unwrap();
        assert!(open().write_blocking(load).is_err());
    }
}
