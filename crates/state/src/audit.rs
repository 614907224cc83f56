//! The audit log: append-only and hash-chained. Each line's hash covers the line and the hash before it, so that changing,
//! removing or inserting a line anywhere breaks every later one.

use minicbor::{Decode, Encode};
use peer_proto::code::Threat;
use peer_proto::control::{AuditLine, AuditVerdict};
use peer_proto::unit::Timestamp;
use rusqlite::params;

use crate::database::{DatabaseError, Schema, Tx};

/// The log's table. Triggers refuse what an append-only log must not do.
pub const SCHEMA: Schema = Schema {
    room: "audit",
    steps: &["CREATE TABLE audit (
            sequence INTEGER PRIMARY KEY, line BLOB NOT NULL, hash BLOB NOT NULL
        ) STRICT;
        CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'audit log is append-only'); END;
        CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'audit log is append-only'); END;"],
};

/// Longest detail kept (bytes).
const DETAIL_MAX: usize = 1024;

/// Whether something was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Allowed,
    /// Refused, and the threat that the refusal answers.
    Refused(Threat),
}

/// What is to be remembered.
#[derive(Debug, Clone)]
pub struct Entry {
    /// When.
    pub at: Timestamp,
    /// Who asked: a PeerId, or `local` for this machine's own user.
    pub actor: String,
    /// What was asked, in a word or two.
    pub action: String,
    /// What came of it.
    pub outcome: Outcome,
    /// A sentence without secrets.
    pub detail: String,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Line {
    #[n(0)]
    at: Timestamp,
    #[n(1)]
    actor: String,
    #[n(2)]
    action: String,
    #[n(3)]
    threat: Option<String>,
    #[n(4)]
    detail: String,
}

/// Adds a line, in the transaction of what it tells.
pub fn append(tx: &Tx<'_>, entry: &Entry) -> Result<(), DatabaseError> {
    let mut detail = peer_proto::text::escape(&entry.detail);
    if detail.len() > DETAIL_MAX {
        let end = (0..=DETAIL_MAX).rev().find(|index| detail.is_char_boundary(*index)).unwrap_or(0);
        detail.truncate(end);
    }
    let threat = match entry.outcome {
        Outcome::Allowed => None,
        Outcome::Refused(threat) => Some(threat.to_string()),
    };
    let actor = peer_proto::text::escape(&entry.actor);
    let line = Line { at: entry.at, actor, action: entry.action.clone(), threat, detail };
    let (sequence, previous) = last(tx)?;
    let line = peer_proto::frame::encode(&line);
    let hash = chain(&previous, sequence + 1, &line);
    tx.execute("INSERT INTO audit (sequence, line, hash) VALUES (?1, ?2, ?3)", params![sequence + 1, line, hash])?;
    Ok(())
}

fn last(tx: &Tx<'_>) -> Result<(u64, [u8; 32]), DatabaseError> {
    let found = tx.query_row("SELECT sequence, hash FROM audit ORDER BY sequence DESC LIMIT 1", [], |row| {
        Ok((row.get(0)?, row.get(1)?))
    });
    match found {
        Ok(found) => Ok(found),
        Err(rusqlite::Error::QueryReturnedNoRows) => Ok((0, [0; 32])),
        Err(error) => Err(error.into()),
    }
}

fn chain(previous: &[u8; 32], sequence: u64, line: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("peer-compute 2026 audit chain");
    hasher.update(previous);
    hasher.update(&sequence.to_be_bytes());
    hasher.update(line);
    *hasher.finalize().as_bytes()
}

/// The newest `limit` lines, oldest of them first.
pub fn newest(tx: &Tx<'_>, limit: u32) -> Result<Vec<AuditLine>, DatabaseError> {
    let mut statement = tx.prepare_cached(
        "SELECT sequence, line, hash FROM (SELECT * FROM audit ORDER BY sequence DESC LIMIT ?1) ORDER BY sequence",
    )?;
    let rows = statement.query_map([limit], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    rows.map(|row| row.map(|(sequence, line, hash): (u64, Vec<u8>, [u8; 32])| describe(sequence, &line, &hash)))
        .collect::<Result<_, _>>()
        .map_err(Into::into)
}

fn describe(sequence: u64, bytes: &[u8], hash: &[u8; 32]) -> AuditLine {
    let hash = data_encoding::HEXLOWER.encode(hash);
    match minicbor::decode::<Line>(bytes) {
        Ok(line) => AuditLine {
            sequence,
            at: line.at,
            actor: line.actor,
            action: line.action,
            outcome: if line.threat.is_some() { "refused" } else { "allowed" }.into(),
            threat: line.threat,
            detail: line.detail,
            hash,
        },
        Err(error) => AuditLine {
            sequence,
            at: Timestamp(0),
            actor: String::new(),
            action: "unreadable".into(),
            outcome: "unreadable".into(),
            threat: None,
            detail: error.to_string(),
            hash,
        },
    }
}

/// Whether nothing was ever written.
pub fn is_empty(tx: &Tx<'_>) -> Result<bool, DatabaseError> {
    Ok(last(tx)?.0 == 0)
}

/// Walks the whole chain and names the first fault. `noted` is a head that was shown earlier: it must still be in the chain.
/// Without one nobody can tell that the newest lines were cut off.
pub fn verify(tx: &Tx<'_>, noted: Option<[u8; 32]>) -> Result<AuditVerdict, DatabaseError> {
    let mut statement = tx.prepare_cached("SELECT sequence, line, hash FROM audit ORDER BY sequence")?;
    let mut rows = statement.query([])?;
    let (mut lines, mut previous) = (0_u64, [0_u8; 32]);
    let (mut fault, mut missing) = (None, noted.filter(|noted| *noted != previous));
    while let Some(row) = rows.next()? {
        let (sequence, line, hash): (u64, Vec<u8>, Vec<u8>) = (row.get(0)?, row.get(1)?, row.get(2)?);
        if sequence != lines + 1 {
            fault = Some(format!("line {} is missing", lines + 1));
        } else if hash != chain(&previous, sequence, &line) {
            fault = Some(format!("line {sequence} has been changed"));
        }
        if fault.is_some() {
            break;
        }
        previous = chain(&previous, sequence, &line);
        lines += 1;
        missing = missing.filter(|noted| *noted != previous);
    }
    if fault.is_none() && missing.is_some() {
        fault = Some(
            "no line has the hash that was noted: the newest lines were cut off, or the log was written anew".into(),
        );
    }
    Ok(AuditVerdict { lines, head: data_encoding::HEXLOWER.encode(&previous), fault })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;
    use crate::database::Database;

    fn database(directory: &std::path::Path) -> Database {
        Database::open(&directory.join("db"), &[SCHEMA]).unwrap()
    }

    fn fill(database: &Database) {
        for (number, outcome) in [Outcome::Allowed, Outcome::Refused(Threat::V3), Outcome::Allowed].iter().enumerate() {
            let entry = Entry {
                at: Timestamp(number as u64),
                actor: "local".into(),
                action: "test".into(),
                outcome: *outcome,
                detail: "one\nline".into(),
            };
            database.write_blocking(|tx| append(tx, &entry)).unwrap();
        }
    }

    #[test]
    fn chain_verifies_and_lines_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let database = database(directory.path());
        fill(&database);
        let verdict = database.write_blocking(|tx| verify(tx, None)).unwrap();
        assert_eq!((verdict.lines, verdict.fault), (3, None));
        let lines = database.write_blocking(|tx| newest(tx, 2)).unwrap();
        assert_eq!(lines.iter().map(|line| line.sequence).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(lines[0].threat.as_deref(), Some("V3"));
        assert_eq!(lines[0].detail, "one\\u{a}line");
    }

    #[test]
    fn lines_cut_off_at_the_end_show_against_a_noted_head() {
        let directory = tempfile::tempdir().unwrap();
        let database = database(directory.path());
        assert!(database.write_blocking(is_empty).unwrap());
        fill(&database);
        let head_of = |database: &Database| database.write_blocking(last).unwrap().1;
        let noted = head_of(&database);
        fill(&database);
        let fault = |noted| database.write_blocking(|tx| verify(tx, noted)).unwrap().fault;
        for known in [None, Some([0; 32]), Some(noted), Some(head_of(&database))] {
            assert_eq!(fault(known), None, "an older head stays in the chain");
        }
        let cut = "DROP TRIGGER audit_no_delete; DELETE FROM audit WHERE sequence >= 3";
        database.write_blocking(|tx| tx.execute_batch(cut).map_err(DatabaseError::from)).unwrap();
        assert_eq!(fault(None), None, "nobody can tell by the log alone");
        assert!(fault(Some(noted)).is_some());
    }

    #[test]
    fn every_change_behind_our_back_is_found() {
        for attack in [
            "UPDATE audit SET line = x'a0' WHERE sequence = 2",
            "DELETE FROM audit WHERE sequence = 1",
            "UPDATE audit SET hash = zeroblob(32) WHERE sequence = 3",
        ] {
            let directory = tempfile::tempdir().unwrap();
            let database = database(directory.path());
            fill(&database);
            let through_triggers = database.write_blocking(|tx| tx.execute_batch(attack).map_err(DatabaseError::from));
            assert!(through_triggers.is_err(), "the table is append-only");
            let drop_triggers = "DROP TRIGGER audit_no_update; DROP TRIGGER audit_no_delete;";
            database
                .write_blocking(|tx| tx.execute_batch(&format!("{drop_triggers}{attack}")).map_err(DatabaseError::from))
                .unwrap();
            assert!(database.write_blocking(|tx| verify(tx, None)).unwrap().fault.is_some(), "{attack}");
        }
    }
}
