//! Keys that are refused for ever, each with the statement that ended it, so that the statement can be passed on.

use libp2p_identity::PeerId;
use minicbor::{Decode, Encode};
use peer_proto::frame::{decode_strict, encode, peer_id};
use peer_proto::id::Name;
use peer_proto::statement::STATEMENT_MAX;
use peer_proto::unit::Timestamp;
use peer_state::database::{DatabaseError, Tx};
use rusqlite::params;

pub(crate) const TABLES: &str = "CREATE TABLE refused_key (id BLOB PRIMARY KEY, record BLOB NOT NULL) STRICT;";

const RECORD_MAX: usize = STATEMENT_MAX + 1024;

/// A key that is refused.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct RefusedKey {
    /// The key.
    #[n(0)]
    #[cbor(with = "peer_id")]
    pub peer: PeerId,
    /// What its machine was called here last.
    #[n(1)]
    pub name: Option<Name>,
    /// The key that stands in its place.
    #[n(2)]
    successor: Option<Successor>,
    /// Whether the recovery key ended it; a rotation is the word of the ended key itself.
    #[n(3)]
    pub by_recovery: bool,
    /// The statement that ended it, encoded.
    #[n(4)]
    #[cbor(with = "minicbor::bytes")]
    pub statement: Vec<u8>,
    /// Since when it is refused here.
    #[n(5)]
    pub at: Timestamp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(transparent)]
struct Successor(
    #[n(0)]
    #[cbor(with = "peer_id")]
    PeerId,
);

impl RefusedKey {
    /// The refusal of `peer` by a statement.
    pub fn new(
        peer: PeerId,
        name: Option<Name>,
        successor: Option<PeerId>,
        statement: &peer_proto::statement::Statement,
        at: Timestamp,
    ) -> Self {
        let (by_recovery, statement_bytes) = (statement.recovery_key().is_some(), statement.as_bytes().to_vec());
        Self { peer, name, successor: successor.map(Successor), by_recovery, statement: statement_bytes, at }
    }

    /// The key that stands in its place.
    pub fn successor(&self) -> Option<PeerId> {
        self.successor.map(|successor| successor.0)
    }
}

/// The refusal of a key, if it is refused.
pub fn find(tx: &Tx<'_>, peer: &PeerId) -> Result<Option<RefusedKey>, DatabaseError> {
    match tx
        .query_row("SELECT record FROM refused_key WHERE id = ?1", [peer.to_bytes()], |row| row.get::<_, Vec<u8>>(0))
    {
        Ok(bytes) => Ok(Some(read(&bytes)?)),
        Err(rusqlite::Error::QueryReturnedNoRows) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn read(bytes: &[u8]) -> Result<RefusedKey, DatabaseError> {
    decode_strict(bytes, RECORD_MAX).map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Blob, Box::new(error)).into()
    })
}

/// Every refused key.
pub fn all(tx: &Tx<'_>) -> Result<Vec<RefusedKey>, DatabaseError> {
    let mut statement = tx.prepare_cached("SELECT record FROM refused_key ORDER BY id")?;
    let rows = statement.query_map([], |row| row.get::<_, Vec<u8>>(0))?.collect::<Result<Vec<_>, _>>()?;
    rows.iter().map(|bytes| read(bytes)).collect()
}

/// Refuses a key from now on. The recovery key's word goes before that of the ended key.
pub(crate) fn put(tx: &Tx<'_>, refused: &RefusedKey) -> Result<(), DatabaseError> {
    tx.execute(
        "INSERT INTO refused_key (id, record) VALUES (?1, ?2) ON CONFLICT (id) DO UPDATE SET record = excluded.record",
        params![refused.peer.to_bytes(), encode(refused)],
    )?;
    Ok(())
}
