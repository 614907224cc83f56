//! The rows of deployments: what survives a crash. Truth is here, not in the engine's labels (SECURITY M13).

use bollard::models::ContainerCreateBody;
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::deploy::{ImageSource, Specification, Status};
use peer_proto::envelope::Signed;
use peer_proto::frame::{decode_strict, encode};
use peer_proto::id::{DeploymentId, Digest, RequestHash, RequestId};
use peer_proto::unit::Timestamp;
use peer_state::database::{DatabaseError, Schema, Tx};
use peer_state::rusqlite::types::ValueRef;
use peer_state::rusqlite::{self, Row, params};
use peer_trust::pause;

use crate::deployment::{Life, Restarts, Step, Wanted};
use crate::possession;
use crate::wall::rows;

/// This room's tables.
pub const SCHEMA: Schema = Schema {
    room: "compute",
    steps: &[TABLES, possession::TABLES, MARK, MADE, possession::PULLS, KEPT, REASON, rows::TABLE, SIGNERS],
};

const TABLES: &str = "
    CREATE TABLE deployment (
        id BLOB PRIMARY KEY,
        owner BLOB NOT NULL,
        name TEXT NOT NULL,
        specification BLOB NOT NULL,
        source BLOB NOT NULL,
        image BLOB,
        request BLOB NOT NULL,
        request_hash BLOB NOT NULL,
        slot INTEGER NOT NULL UNIQUE,
        wanted BLOB NOT NULL,
        life BLOB NOT NULL,
        restarts INTEGER NOT NULL,
        restarts_in_row INTEGER NOT NULL,
        exit_code INTEGER,
        created_at INTEGER NOT NULL,
        started_at INTEGER,
        UNIQUE (owner, name)
    ) STRICT;";

const MARK: &str = "CREATE TABLE room_mark (id INTEGER PRIMARY KEY CHECK (id = 1), mark TEXT NOT NULL) STRICT;";

const MADE: &str = "CREATE TABLE container (
        deployment BLOB PRIMARY KEY, told TEXT NOT NULL
    ) STRICT;";

/// Whose signature the kept request of a deployment bears, where its owner has another key by now.
const SIGNERS: &str = "CREATE TABLE request_signer (deployment BLOB PRIMARY KEY, signer BLOB NOT NULL) STRICT;";

const KEPT: &str = "CREATE TABLE kept_request (
        deployment BLOB PRIMARY KEY, audience BLOB NOT NULL, envelope BLOB NOT NULL
    ) STRICT;";
/// Why a deployment was stopped, where that was not its owner's wish.
const REASON: &str = "ALTER TABLE deployment ADD COLUMN reason BLOB;";

const BLOB_MAX: usize = 2 * 1024 * 1024;

/// A deployment as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its id.
    pub id: DeploymentId,
    /// Whose it is.
    pub owner: PeerId,
    /// How it runs.
    pub specification: Specification,
    /// Where its image comes from.
    pub source: ImageSource,
    /// Its image, once it is known.
    pub image: Option<Digest>,
    /// The request that made it.
    pub request: RequestId,
    /// Hash of that request, under which its layers are sent.
    pub request_hash: RequestHash,
    /// Number from which its user id is made; no two deployments share one.
    pub slot: u32,
    /// What its owner wants of it.
    pub wanted: Wanted,
    /// Where it is in its life.
    pub life: Life,
    /// Restarts by the policy since its owner last started it.
    pub restarts: u32,
    /// Restarts in a row without a long run between them.
    pub restarts_in_row: u32,
    /// Exit code of its last run.
    pub exit_code: Option<i64>,
    /// When it was recorded.
    pub created_at: Timestamp,
    /// When its present or last run began.
    pub started_at: Option<Timestamp>,
    /// Why it was stopped, where that was not its owner's wish.
    pub reason: Option<Problem>,
}

impl Record {
    /// Moves it on by one step. The caller stores it.
    pub fn step(&mut self, step: Step) -> Result<(), Problem> {
        let restarts = Restarts { policy: self.specification.restart, in_row: self.restarts_in_row };
        let next = self.life.next(step, restarts).map_err(|error| Problem::new(Code::WrongState, error.to_string()))?;
        self.life = next;
        Ok(())
    }

    /// As its owner sees it. Health and public address are not stored; whoever knows them fills them in.
    pub fn status(&self) -> Status {
        let problem = match &self.life {
            Life::Failed(problem) | Life::Paused(problem, _) => Some(problem.clone()),
            Life::Stopping | Life::Stopped => self.reason.clone(),
            _ => None,
        };
        Status {
            id: self.id,
            specification: self.specification.clone(),
            image: self.image,
            state: self.life.state(),
            problem,
            created_at: self.created_at,
            started_at: self.started_at,
            exit_code: self.exit_code,
            restarts: self.restarts,
            health: None,
            url: None,
            isolation: None,
        }
    }
}

const COLUMNS: &str = "id, owner, specification, source, image, request, request_hash, slot, wanted, life, restarts,
    restarts_in_row, exit_code, created_at, started_at, reason";

fn read(row: &Row<'_>) -> rusqlite::Result<Record> {
    Ok(Record {
        id: DeploymentId(row.get(0)?),
        owner: PeerId::from_bytes(&row.get::<_, Vec<u8>>(1)?).map_err(|error| damaged(1, error))?,
        specification: blob(row, 2)?,
        source: blob(row, 3)?,
        image: row.get::<_, Option<[u8; 32]>>(4)?.map(Digest),
        request: RequestId(row.get(5)?),
        request_hash: RequestHash(row.get(6)?),
        slot: row.get(7)?,
        wanted: blob(row, 8)?,
        life: blob(row, 9)?,
        restarts: row.get(10)?,
        restarts_in_row: row.get(11)?,
        exit_code: row.get(12)?,
        created_at: Timestamp(row.get(13)?),
        started_at: row.get::<_, Option<u64>>(14)?.map(Timestamp),
        reason: if row.get_ref(15)? == ValueRef::Null { None } else { Some(blob(row, 15)?) },
    })
}

fn blob<T>(row: &Row<'_>, column: usize) -> rusqlite::Result<T>
where
    T: minicbor::Encode<()> + for<'b> minicbor::Decode<'b, ()>,
{
    decode_strict(row.get_ref(column)?.as_blob()?, BLOB_MAX).map_err(|error| damaged(column, error))
}

fn damaged(column: usize, error: impl std::error::Error + Send + Sync + 'static) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Blob, Box::new(error))
}

/// All deployments, oldest first.
pub fn all(tx: &Tx<'_>) -> Result<Vec<Record>, DatabaseError> {
    select(tx, "ORDER BY created_at, id", [])
}

/// All deployments of one owner, oldest first.
pub fn of_owner(tx: &Tx<'_>, owner: &PeerId) -> Result<Vec<Record>, DatabaseError> {
    select(tx, "WHERE owner = ?1 ORDER BY created_at, id", [owner.to_bytes()])
}

/// One deployment.
pub fn find(tx: &Tx<'_>, id: DeploymentId) -> Result<Option<Record>, DatabaseError> {
    Ok(select(tx, "WHERE id = ?1", [id.0])?.pop())
}

/// One deployment of this owner. Somebody else's looks exactly like one that does not exist.
pub fn find_owned(tx: &Tx<'_>, owner: &PeerId, id: DeploymentId) -> Result<Option<Record>, DatabaseError> {
    Ok(find(tx, id)?.filter(|record| record.owner == *owner))
}

fn select(tx: &Tx<'_>, rest: &str, params: impl rusqlite::Params) -> Result<Vec<Record>, DatabaseError> {
    let mut statement = tx.prepare_cached(&format!("SELECT {COLUMNS} FROM deployment {rest}"))?;
    let rows = statement.query_map(params, read)?;
    rows.collect::<Result<_, _>>().map_err(Into::into)
}

/// Adds a deployment. The name must be free: see [`find_by_name`].
pub(crate) fn insert(tx: &Tx<'_>, record: &Record) -> Result<(), DatabaseError> {
    tx.prepare_cached(
        "INSERT INTO deployment (id, owner, name, specification, source, image, request, request_hash, slot, wanted,
            life, restarts, restarts_in_row, exit_code, created_at, started_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)",
    )?
    .execute(params![
        record.id.0,
        record.owner.to_bytes(),
        record.specification.name.as_str(),
        encode(&record.specification),
        encode(&record.source),
        record.image.map(|image| image.0),
        record.request.0,
        record.request_hash.0,
        record.slot,
        encode(&record.wanted),
        encode(&record.life),
        record.restarts,
        record.restarts_in_row,
        record.exit_code,
        record.created_at.0,
        record.started_at.map(|at| at.0),
    ])?;
    Ok(())
}

/// Stores what may change in a deployment's life.
pub(crate) fn update(tx: &Tx<'_>, record: &Record) -> Result<(), DatabaseError> {
    tx.prepare_cached(
        "UPDATE deployment SET image = ?2, wanted = ?3, life = ?4, restarts = ?5, restarts_in_row = ?6,
            exit_code = ?7, started_at = ?8, reason = ?9 WHERE id = ?1",
    )?
    .execute(params![
        record.id.0,
        record.image.map(|image| image.0),
        encode(&record.wanted),
        encode(&record.life),
        record.restarts,
        record.restarts_in_row,
        record.exit_code,
        record.started_at.map(|at| at.0),
        record.reason.as_ref().map(encode),
    ])?;
    Ok(())
}

/// What the engine was told when the deployment's container was made last, perhaps by an older version of this program.
pub(crate) fn told(tx: &Tx<'_>, id: DeploymentId) -> Result<Option<ContainerCreateBody>, DatabaseError> {
    let text: Option<String> =
        match tx.query_row("SELECT told FROM container WHERE deployment = ?1", [id.0], |row| row.get(0)) {
            Ok(text) => Some(text),
            Err(rusqlite::Error::QueryReturnedNoRows) => None,
            Err(error) => return Err(error.into()),
        };
    Ok(text.map(|text| serde_json::from_str(&text)).transpose().map_err(|error| damaged(0, error))?)
}

/// Notes what the engine is about to be told, so that a later version can judge the container by it.
pub(crate) fn tell(tx: &Tx<'_>, id: DeploymentId, told: &ContainerCreateBody) -> Result<(), DatabaseError> {
    let text = serde_json::to_string(told).map_err(|error| damaged(0, error))?;
    tx.execute(
        "INSERT INTO container (deployment, told) VALUES (?1, ?2)
         ON CONFLICT (deployment) DO UPDATE SET told = excluded.told",
        params![id.0, text],
    )?;
    Ok(())
}

/// Keeps the signed request that made a deployment: its containers are made from it, and from nothing else.
pub(crate) fn keep(tx: &Tx<'_>, id: DeploymentId, signed: &Signed) -> Result<(), DatabaseError> {
    tx.execute(
        "INSERT INTO kept_request (deployment, audience, envelope) VALUES (?1, ?2, ?3)",
        params![id.0, signed.audience().to_bytes(), signed.envelope()],
    )?;
    Ok(())
}

/// The signed request that made a deployment, and the machine that it was made for. A deployment of a version that kept
/// none has none.
pub(crate) fn kept(tx: &Tx<'_>, id: DeploymentId) -> Result<Option<(PeerId, Vec<u8>)>, DatabaseError> {
    let row = tx.query_row("SELECT audience, envelope FROM kept_request WHERE deployment = ?1", [id.0], |row| {
        let audience = PeerId::from_bytes(&row.get::<_, Vec<u8>>(0)?).map_err(|error| damaged(0, error))?;
        Ok((audience, row.get(1)?))
    });
    match row {
        Ok(kept) => Ok(Some(kept)),
        Err(rusqlite::Error::QueryReturnedNoRows) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whose signature the kept request of a deployment bears: its owner's, under the key that it had then.
pub(crate) fn signer(tx: &Tx<'_>, record: &Record) -> Result<PeerId, DatabaseError> {
    let row = tx.query_row("SELECT signer FROM request_signer WHERE deployment = ?1", [record.id.0], |row| {
        PeerId::from_bytes(&row.get::<_, Vec<u8>>(0)?).map_err(|error| damaged(0, error))
    });
    match row {
        Ok(signer) => Ok(signer),
        Err(rusqlite::Error::QueryReturnedNoRows) => Ok(record.owner),
        Err(error) => Err(error.into()),
    }
}

/// Gives the deployments of `old` to `new`, as far as their names are free there; who signed for them is kept.
pub(crate) fn change_owner(tx: &Tx<'_>, old: &PeerId, new: &PeerId) -> Result<(), DatabaseError> {
    tx.execute(
        "INSERT OR IGNORE INTO request_signer (deployment, signer) SELECT id, owner FROM deployment WHERE owner = ?1",
        [old.to_bytes()],
    )?;
    tx.execute("UPDATE OR IGNORE deployment SET owner = ?2 WHERE owner = ?1", params![old.to_bytes(), new.to_bytes()])?;
    Ok(())
}

/// Forgets a deployment.
pub(crate) fn delete(tx: &Tx<'_>, id: DeploymentId) -> Result<(), DatabaseError> {
    tx.execute("DELETE FROM request_signer WHERE deployment = ?1", [id.0])?;
    tx.execute("DELETE FROM kept_request WHERE deployment = ?1", [id.0])?;
    tx.execute("DELETE FROM container WHERE deployment = ?1", [id.0])?;
    pause::clear(tx, &pause::Subject::Deployment(id))?;
    tx.execute("DELETE FROM deployment WHERE id = ?1", [id.0])?;
    Ok(())
}

/// The deployment that an owner calls by this name.
pub(crate) fn find_by_name(tx: &Tx<'_>, owner: &PeerId, name: &str) -> Result<Option<Record>, DatabaseError> {
    Ok(select(tx, "WHERE owner = ?1 AND name = ?2", params![owner.to_bytes(), name])?.pop())
}

/// The mark of this machine's containers in the engine, drawn when it is first needed.
pub(crate) fn mark(tx: &Tx<'_>) -> Result<String, DatabaseError> {
    let drawn = RequestId::random().to_string();
    tx.execute("INSERT OR IGNORE INTO room_mark (id, mark) VALUES (1, ?1)", [drawn])?;
    Ok(tx.query_row("SELECT mark FROM room_mark", [], |row| row.get(0))?)
}

/// The smallest slot that no deployment holds.
pub(crate) fn free_slot(tx: &Tx<'_>) -> Result<u32, DatabaseError> {
    let slot = tx.query_row(
        "SELECT min(candidate) FROM (SELECT 0 AS candidate UNION SELECT slot + 1 FROM deployment)
         WHERE candidate NOT IN (SELECT slot FROM deployment)",
        [],
        |row| row.get(0),
    )?;
    Ok(slot)
}
