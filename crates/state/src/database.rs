//! One SQLite file with one writer.
//!
//! A commit is durable when it returns (WAL with `synchronous = FULL`). A damaged file is refused at the start.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::durable::FileError;
use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};

/// The tables of one room. Steps are only ever appended; each has run exactly once on every database.
#[derive(Debug, Clone, Copy)]
pub struct Schema {
    /// Name of the room.
    pub room: &'static str,
    /// SQL of each step, oldest first.
    pub steps: &'static [&'static str],
}

/// Why a database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// SQLite reports damage.
    #[error("{} is damaged ({detail}); stop, keep a copy, and restore it from a backup: it is never used as it is", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// A newer program has written it.
    #[error("{} was written by a newer version of this program (room '{room}'); update this one", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// The room whose tables are newer.
        room: &'static str,
    },
    /// The file cannot be made.
    #[error(transparent)]
    File(FileError),
    /// No space is left.
    #[error("the disk that holds the database is full; free some space and try again")]
    DiskFull,
    /// Anything else that SQLite reports.
    #[error("database: {0}")]
    Sqlite(rusqlite::Error),
    /// The program ends.
    #[error("database: the program is shutting down")]
    Closed,
}

impl From<rusqlite::Error> for DatabaseError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::DiskFull,
            _ => Self::Sqlite(error),
        }
    }
}

/// An open transaction. Rooms pass it to one another, and never each other's SQL.
pub type Tx<'a> = rusqlite::Transaction<'a>;

/// A handle to the database; clones share it.
#[derive(Debug, Clone)]
pub struct Database {
    connection: Arc<Mutex<Connection>>,
    /// Whose turn it is, in the order of asking: nobody who comes back again and again goes before those who wait.
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Database {
    /// Opens or creates the file, checks it, and brings the tables of each room up to date.
    pub fn open(path: &Path, schemas: &[Schema]) -> Result<Self, DatabaseError> {
        let damaged = |detail: String| DatabaseError::Damaged { path: path.to_owned(), detail };
        create_private(path).map_err(DatabaseError::File)?;
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(path, flags)?;
        let prepared = prepare(&mut connection).and_then(|()| check(&connection));
        match prepared {
            Ok(None) => {}
            Ok(Some(detail)) => return Err(damaged(detail)),
            Err(error) => {
                return Err(match error.sqlite_error_code() {
                    Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => damaged(error.to_string()),
                    _ => error.into(),
                });
            }
        }
        for schema in schemas {
            migrate(&mut connection, path, schema)?;
        }
        Ok(Self { connection: Arc::new(Mutex::new(connection)), turn: Arc::default() })
    }

    /// Runs `work` in a transaction of its own, off the async threads. It is committed durably if and only if `work` returns `Ok`.
    pub async fn write<T, E, F>(&self, work: F) -> Result<T, E>
    where
        F: FnOnce(&Tx<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: From<DatabaseError> + Send + 'static,
    {
        self.run(move |database| database.write_blocking(work)).await?
    }

    /// Runs `work` off the async threads. Once begun it goes on to its end, even if nobody waits for it any more: what must
    /// follow a commit belongs inside.
    pub async fn run<T, F>(&self, work: F) -> Result<T, DatabaseError>
    where
        F: FnOnce(&Self) -> T + Send + 'static,
        T: Send + 'static,
    {
        let database = self.clone();
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let work = move || {
            let _turn = turn;
            work(&database)
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => Ok(result),
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(DatabaseError::Closed),
        }
    }

    /// As [`Database::write`], on the calling thread.
    pub fn write_blocking<T, E, F>(&self, work: F) -> Result<T, E>
    where
        F: FnOnce(&Tx<'_>) -> Result<T, E>,
        E: From<DatabaseError>,
    {
        // A panic inside a transaction rolls it back when it is dropped, so a poisoned lock holds a sound connection.
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(DatabaseError::from)?;
        let value = work(&tx)?;
        tx.commit().map_err(DatabaseError::from)?;
        Ok(value)
    }
}

/// SQLite gives its other files the mode of this one.
fn create_private(path: &Path) -> Result<(), FileError> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path);
    file.map(drop).map_err(FileError::at("cannot create", path))
}

fn prepare(connection: &mut Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(std::time::Duration::from_secs(10))?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    connection.pragma_update(None, "synchronous", "full")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    // The daemon may write nowhere but in its data directory.
    connection.pragma_update(None, "temp_store", "memory")?;
    connection.set_prepared_statement_cache_capacity(64);
    connection.execute_batch(
        "CREATE TABLE IF NOT EXISTS schema_version (room TEXT PRIMARY KEY, version INTEGER NOT NULL) STRICT",
    )
}

fn check(connection: &Connection) -> rusqlite::Result<Option<String>> {
    let verdict: String = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    Ok((verdict != "ok").then_some(verdict))
}

fn migrate(connection: &mut Connection, path: &Path, schema: &Schema) -> Result<(), DatabaseError> {
    let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let found: usize = tx
        .query_row("SELECT version FROM schema_version WHERE room = ?1", [schema.room], |row| row.get(0))
        .or_else(|error| if error == rusqlite::Error::QueryReturnedNoRows { Ok(0) } else { Err(error) })?;
    if found > schema.steps.len() {
        return Err(DatabaseError::Newer { path: path.to_owned(), room: schema.room });
    }
    for step in &schema.steps[found..] {
        tx.execute_batch(step)?;
    }
    tx.execute(
        "INSERT INTO schema_version (room, version) VALUES (?1, ?2)
         ON CONFLICT (room) DO UPDATE SET version = excluded.version",
        rusqlite::params![schema.room, schema.steps.len()],
    )?;
    tx.commit()?;
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;

    const ROOM: Schema = Schema { room: "test", steps: &["CREATE TABLE thing (name TEXT PRIMARY KEY) STRICT"] };

    #[tokio::test]
    async fn write_commits_on_ok_and_rolls_back_on_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("db");
        let database = Database::open(&path, &[ROOM]).unwrap();
        let insert = |name: &'static str, fail: bool| {
            database.write(move |tx| -> Result<(), DatabaseError> {
                tx.execute("INSERT INTO thing VALUES (?1)", [name])?;
                if fail { Err(DatabaseError::Closed) } else { Ok(()) }
            })
        };
        insert("kept", false).await.unwrap();
        insert("lost", true).await.unwrap_err();
        drop(database);
        let database = Database::open(&path, &[ROOM]).unwrap();
        let names: Vec<String> = database
            .write(|tx| -> Result<_, DatabaseError> {
                let mut statement = tx.prepare("SELECT name FROM thing")?;
                let names = statement.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
                Ok(names)
            })
            .await
            .unwrap();
        assert_eq!(names, ["kept"]);
    }

    #[test]
    fn damaged_and_newer_files_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("db");
        std::fs::write(&path, vec![7; 8192]).unwrap();
        assert!(matches!(Database::open(&path, &[ROOM]), Err(DatabaseError::Damaged { .. })));
        std::fs::remove_file(&path).unwrap();
        let two = Schema { room: "test", steps: &["SELECT 1", "SELECT 2"] };
        drop(Database::open(&path, &[two]).unwrap());
        assert!(matches!(Database::open(&path, &[ROOM]), Err(DatabaseError::Newer { .. })));
    }
}
