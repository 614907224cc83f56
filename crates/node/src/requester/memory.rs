//! What providers last said of our deployments, so that a name or an id leads to its provider even when that is offline.

use peer_compute::room::database_problem;
use peer_proto::PeerId;
use peer_proto::code::Problem;
use peer_proto::deploy::{Specification, State, Status};
use peer_proto::frame::{decode_strict, encode};
use peer_proto::id::DeploymentId;
use peer_proto::unit::Timestamp;
use peer_state::database::{Database, DatabaseError, Schema, Tx};
use peer_state::rusqlite::params;

/// This part's table.
pub const SCHEMA: Schema = Schema {
    room: "requester",
    steps: &["CREATE TABLE remote_deployment (
        id BLOB PRIMARY KEY, peer BLOB NOT NULL, status BLOB NOT NULL, as_of INTEGER NOT NULL
    ) STRICT;"],
};

const STATUS_MAX: usize = 2 * 1024 * 1024;

/// A deployment of ours as its provider last reported it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remembered {
    /// The provider.
    pub peer: PeerId,
    /// What it said.
    pub status: Status,
    /// When.
    pub as_of: Timestamp,
}

/// Notes a deployment before its request is sent.
pub(super) async fn intend(
    database: &Database,
    peer: PeerId,
    id: DeploymentId,
    specification: Specification,
    now: Timestamp,
) -> Result<(), Problem> {
    let status = Status {
        id,
        specification,
        image: None,
        state: State::Pending,
        problem: None,
        created_at: now,
        started_at: None,
        exit_code: None,
        restarts: 0,
        health: None,
        url: None,
        isolation: None,
    };
    write(database, move |tx| put(tx, peer, &status, now)).await
}

/// Notes what a provider says.
pub(super) async fn remember(database: &Database, peer: PeerId, status: Status, now: Timestamp) -> Result<(), Problem> {
    write(database, move |tx| report(tx, peer, &status, now)).await
}

/// Notes everything that a provider has of ours; what it does not name any more is forgotten.
pub(super) async fn replace(
    database: &Database,
    peer: PeerId,
    statuses: Vec<Status>,
    now: Timestamp,
) -> Result<(), Problem> {
    write(database, move |tx| {
        // What was noted a moment ago may be on its way there still.
        let settled = Timestamp(now.0.saturating_sub(60_000));
        tx.execute(
            "DELETE FROM remote_deployment WHERE peer = ?1 AND as_of < ?2",
            params![peer.to_bytes(), settled.0],
        )?;
        statuses.iter().try_for_each(|status| report(tx, peer, status, now))
    })
    .await
}

/// Forgets a deployment.
pub(super) async fn forget(database: &Database, id: DeploymentId) -> Result<(), Problem> {
    write(database, move |tx| {
        tx.execute("DELETE FROM remote_deployment WHERE id = ?1", [id.0])?;
        Ok(())
    })
    .await
}

/// A provider goes on under a new key.
pub fn change_provider(tx: &Tx<'_>, old: &PeerId, new: &PeerId) -> Result<(), DatabaseError> {
    tx.execute("UPDATE remote_deployment SET peer = ?2 WHERE peer = ?1", params![old.to_bytes(), new.to_bytes()])?;
    Ok(())
}

/// Everything that is noted, oldest deployment first.
pub(super) async fn all(database: &Database) -> Result<Vec<Remembered>, Problem> {
    let mut all = write(database, |tx| {
        let mut statement = tx.prepare_cached("SELECT peer, status, as_of FROM remote_deployment")?;
        let rows = statement
            .query_map([], |row| Ok((row.get::<_, Vec<u8>>(0)?, row.get::<_, Vec<u8>>(1)?, Timestamp(row.get(2)?))))?;
        rows.collect::<Result<Vec<_>, _>>().map_err(DatabaseError::from)
    })
    .await?
    .into_iter()
    .filter_map(|(peer, status, as_of)| {
        let status = decode_strict(&status, STATUS_MAX).ok()?;
        Some(Remembered { peer: PeerId::from_bytes(&peer).ok()?, status, as_of })
    })
    .collect::<Vec<_>>();
    all.sort_by_key(|remembered| (remembered.status.created_at, remembered.status.id));
    Ok(all)
}

/// Notes a provider's word. It has one deployment of a name for each owner, so that an older one of that name is gone.
fn report(tx: &Tx<'_>, peer: PeerId, status: &Status, now: Timestamp) -> Result<(), DatabaseError> {
    put(tx, peer, status, now)?;
    let others = {
        let mut statement = tx.prepare_cached("SELECT status FROM remote_deployment WHERE peer = ?1 AND id <> ?2")?;
        let rows = statement.query_map(params![peer.to_bytes(), status.id.0], |row| row.get::<_, Vec<u8>>(0))?;
        rows.collect::<Result<Vec<_>, _>>()?
    };
    for other in others.iter().filter_map(|other| decode_strict::<Status>(other, STATUS_MAX).ok()) {
        if other.specification.name == status.specification.name && other.created_at <= status.created_at {
            tx.execute("DELETE FROM remote_deployment WHERE id = ?1", [other.id.0])?;
        }
    }
    Ok(())
}

/// A provider speaks of its own deployments only: a row of another provider stays as it is.
fn put(tx: &Tx<'_>, peer: PeerId, status: &Status, now: Timestamp) -> Result<(), DatabaseError> {
    tx.execute(
        "INSERT INTO remote_deployment (id, peer, status, as_of) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (id) DO UPDATE SET status = excluded.status, as_of = excluded.as_of
         WHERE remote_deployment.peer = excluded.peer",
        params![status.id.0, peer.to_bytes(), encode(status), now.0],
    )?;
    Ok(())
}

async fn write<T, F>(database: &Database, work: F) -> Result<T, Problem>
where
    T: Send + 'static,
    F: FnOnce(&Tx<'_>) -> Result<T, DatabaseError> + Send + 'static,
{
    database.write(work).await.map_err(|error| database_problem(&error))
}
