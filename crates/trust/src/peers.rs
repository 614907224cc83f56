//! The tables of peers and invitations, and the seal over them and over the refused keys.
//!
//! A digest over all rows is written in the same transaction as every change. If it does not fit at the start, the list
//! has been damaged, and the daemon stops: it never starts open.

use libp2p_identity::PeerId;
use minicbor::{Decode, Encode};
use peer_proto::Multiaddr;
use peer_proto::card::SignedCard;
use peer_proto::frame::{as_text, decode_strict, encode, peer_id};
use peer_proto::grant::Grants;
use peer_proto::id::Name;
use peer_proto::unit::Timestamp;
use peer_state::database::{DatabaseError, Tx};
use rusqlite::params;

pub(crate) const TABLES: &str = "
    CREATE TABLE peer (id BLOB PRIMARY KEY, record BLOB NOT NULL) STRICT;
    CREATE TABLE invitation (id BLOB PRIMARY KEY, record BLOB NOT NULL) STRICT;
    CREATE TABLE trust_seal (id INTEGER PRIMARY KEY CHECK (id = 1), digest BLOB NOT NULL) STRICT;";

const RECORD_MAX: usize = 64 * 1024;

/// A peer in the trust list.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct PeerRecord {
    /// Its PeerId.
    #[n(0)]
    #[cbor(with = "peer_id")]
    pub peer: PeerId,
    /// The name that it has here.
    #[n(1)]
    pub name: Name,
    /// Its card as it was given, encoded.
    #[n(2)]
    #[cbor(with = "minicbor::bytes")]
    pub card: Vec<u8>,
    /// Addresses at which it is dialled.
    #[n(3)]
    addresses: Vec<Address>,
    /// What it is allowed here.
    #[n(4)]
    pub grants: Grants,
    /// When it was added.
    #[n(5)]
    pub added_at: Timestamp,
    /// The highest epoch of its rotations that is known here.
    #[n(6)]
    #[cbor(default, skip_if = "is_zero")]
    pub epoch: u64,
    /// When its recovery key spoke last.
    #[n(7)]
    #[cbor(default, skip_if = "is_never")]
    pub recovery_at: Timestamp,
    /// How many keys it has had here before this one.
    #[n(8)]
    #[cbor(default, skip_if = "is_first")]
    pub moves: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the encoder calls it so")]
fn is_zero(epoch: &u64) -> bool {
    *epoch == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the encoder calls it so")]
fn is_never(at: &Timestamp) -> bool {
    at.0 == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the encoder calls it so")]
fn is_first(moves: &u32) -> bool {
    *moves == 0
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(transparent)]
struct Address(
    #[n(0)]
    #[cbor(with = "as_text")]
    Multiaddr,
);

impl PeerRecord {
    /// A record of the machine that `card` describes.
    pub fn new(card: &SignedCard, name: Name, grants: Grants, added_at: Timestamp) -> Self {
        let addresses = card.card().addresses().cloned().map(Address).collect();
        let (epoch, recovery_at, moves) = (0, Timestamp(0), 0);
        Self {
            peer: card.card().peer,
            name,
            card: card.to_bytes(),
            addresses,
            grants,
            added_at,
            epoch,
            recovery_at,
            moves,
        }
    }

    /// Public half of the recovery key that the peer's card names; nothing if the card cannot be read.
    pub fn recovery_key(&self) -> Option<[u8; 32]> {
        Some(SignedCard::decode(&self.card).ok()?.card().recovery_key)
    }

    /// Takes over what a newer card of the same machine says. Name and grants stay.
    pub(crate) fn refresh(&mut self, card: &SignedCard) {
        self.addresses = card.card().addresses().cloned().map(Address).collect();
        self.card = card.to_bytes();
    }

    /// Addresses at which the peer is dialled.
    pub fn addresses(&self) -> Vec<Multiaddr> {
        self.addresses.iter().map(|address| address.0.clone()).collect()
    }

    /// Replaces the addresses.
    pub fn set_addresses(&mut self, addresses: Vec<Multiaddr>) {
        self.addresses = addresses.into_iter().map(Address).collect();
    }
}

/// An open invitation. Of the secret in the ticket only the public half is here.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct InvitationRecord {
    /// PeerId of the one-time key.
    #[n(0)]
    #[cbor(with = "peer_id")]
    pub ticket: PeerId,
    /// What the one who joins is allowed here.
    #[n(1)]
    pub grants: Grants,
    /// Name to give the one who joins.
    #[n(2)]
    pub name: Option<Name>,
    /// When it ends.
    #[n(3)]
    pub expires_at: Timestamp,
}

/// Why the list cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// The rows are not those that were sealed.
    #[error(
        "the trust list is damaged: {0}; the daemon does not start with it. Restore the data directory from a backup"
    )]
    Damaged(&'static str),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl From<rusqlite::Error> for ListError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error.into())
    }
}

/// Everything in the list.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Rows {
    pub(crate) peers: Vec<PeerRecord>,
    pub(crate) invitations: Vec<InvitationRecord>,
}

/// Reads the whole list and checks its seal.
pub(crate) fn load(tx: &Tx<'_>) -> Result<Rows, ListError> {
    let sealed = match tx.query_row("SELECT digest FROM trust_seal", [], |row| row.get::<_, Vec<u8>>(0)) {
        Ok(digest) => Some(digest),
        Err(rusqlite::Error::QueryReturnedNoRows) => None,
        Err(error) => return Err(error.into()),
    };
    let (peers, invitations, refused) = (blobs(tx, "peer")?, blobs(tx, "invitation")?, blobs(tx, "refused_key")?);
    if sealed.is_none() && (!peers.is_empty() || !invitations.is_empty() || !refused.is_empty()) {
        return Err(ListError::Damaged("its seal is missing"));
    }
    if sealed.is_some_and(|sealed| sealed != digest(&peers, &invitations, &refused)) {
        return Err(ListError::Damaged("its rows are not those that were sealed"));
    }
    let unreadable = |_| ListError::Damaged("a row cannot be read");
    Ok(Rows {
        peers: peers
            .iter()
            .map(|(_, row)| decode_strict(row, RECORD_MAX))
            .collect::<Result<_, _>>()
            .map_err(unreadable)?,
        invitations: invitations
            .iter()
            .map(|(_, row)| decode_strict(row, RECORD_MAX))
            .collect::<Result<_, _>>()
            .map_err(unreadable)?,
    })
}

/// Seals the list as it stands now in this transaction.
pub(crate) fn seal(tx: &Tx<'_>) -> Result<(), DatabaseError> {
    let digest = digest(&blobs(tx, "peer")?, &blobs(tx, "invitation")?, &blobs(tx, "refused_key")?);
    tx.execute(
        "INSERT INTO trust_seal (id, digest) VALUES (1, ?1) ON CONFLICT (id) DO UPDATE SET digest = excluded.digest",
        [digest],
    )?;
    Ok(())
}

type Blobs = Vec<(Vec<u8>, Vec<u8>)>;

fn blobs(tx: &Tx<'_>, table: &'static str) -> Result<Blobs, DatabaseError> {
    let mut statement = tx.prepare_cached(&format!("SELECT id, record FROM {table} ORDER BY id"))?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    rows.collect::<Result<_, _>>().map_err(Into::into)
}

fn digest(peers: &Blobs, invitations: &Blobs, refused: &Blobs) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("peer-compute 2026 trust list seal");
    // As long as no key is refused the digest is that of a list that knew of none.
    for table in [peers, invitations].into_iter().chain((!refused.is_empty()).then_some(refused)) {
        hasher.update(&(table.len() as u64).to_be_bytes());
        for bytes in table.iter().flat_map(|(id, record)| [id, record]) {
            hasher.update(&(bytes.len() as u64).to_be_bytes());
            hasher.update(bytes);
        }
    }
    *hasher.finalize().as_bytes()
}

pub(crate) fn put_peer(tx: &Tx<'_>, record: &PeerRecord) -> Result<(), DatabaseError> {
    tx.execute(
        "INSERT INTO peer (id, record) VALUES (?1, ?2) ON CONFLICT (id) DO UPDATE SET record = excluded.record",
        params![record.peer.to_bytes(), encode(record)],
    )?;
    Ok(())
}

pub(crate) fn delete_peer(tx: &Tx<'_>, peer: &PeerId) -> Result<bool, DatabaseError> {
    Ok(tx.execute("DELETE FROM peer WHERE id = ?1", [peer.to_bytes()])? == 1)
}

/// One peer's record; `None` if it is not trusted.
pub fn find_peer(tx: &Tx<'_>, peer: &PeerId) -> Result<Option<PeerRecord>, DatabaseError> {
    match tx.query_row("SELECT record FROM peer WHERE id = ?1", [peer.to_bytes()], |row| row.get::<_, Vec<u8>>(0)) {
        // A row that cannot be read trusts nobody.
        Ok(bytes) => Ok(decode_strict(&bytes, RECORD_MAX).ok()),
        Err(rusqlite::Error::QueryReturnedNoRows) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(crate) fn put_invitation(tx: &Tx<'_>, record: &InvitationRecord) -> Result<(), DatabaseError> {
    tx.execute(
        "INSERT INTO invitation (id, record) VALUES (?1, ?2)",
        params![record.ticket.to_bytes(), encode(record)],
    )?;
    Ok(())
}

/// Takes an invitation out of the list: who gets it here is the only one who ever does (SECURITY M7).
pub(crate) fn take_invitation(tx: &Tx<'_>, ticket: &PeerId) -> Result<Option<InvitationRecord>, DatabaseError> {
    let taken = tx.query_row("DELETE FROM invitation WHERE id = ?1 RETURNING record", [ticket.to_bytes()], |row| {
        row.get::<_, Vec<u8>>(0)
    });
    match taken {
        Ok(bytes) => Ok(decode_strict(&bytes, RECORD_MAX).ok()),
        Err(rusqlite::Error::QueryReturnedNoRows) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
