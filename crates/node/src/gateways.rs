//! The gateways that this machine serves through: a durable list, each with its pinned PeerId.

use std::sync::Arc;

use multiaddr::{Multiaddr, Protocol};
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem, Threat};
use peer_proto::text::escape;
use peer_proto::unit::Timestamp;
use peer_state::audit::{self, Entry, Outcome};
use peer_state::database::{Database, DatabaseError, Schema, Tx};
use peer_state::rusqlite::params;
use tokio::sync::{Mutex, watch};

use crate::settings::peer_address;

/// This list's table.
pub const SCHEMA: Schema = Schema {
    room: "gateways",
    steps: &["CREATE TABLE gateway (id BLOB PRIMARY KEY, address TEXT NOT NULL, added_at INTEGER NOT NULL) STRICT"],
};

/// Most gateways in the list.
pub const GATEWAYS_MAX: usize = 16;

/// A gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayRecord {
    /// The only key that is accepted at its address.
    pub peer: PeerId,
    /// Where it listens, without the PeerId.
    pub address: Multiaddr,
    /// When it was added.
    pub added_at: Timestamp,
}

impl GatewayRecord {
    /// Address and pinned PeerId as one text.
    pub fn pinned_address(&self) -> String {
        self.address.clone().with(Protocol::P2p(self.peer)).to_string()
    }
}

/// Why the list was not changed.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The text is no address with a PeerId at its end.
    #[error(
        "'{0}' is not a gateway's address; it must name host, port and PeerId: /ip4/192.0.2.1/tcp/4101/p2p/12D3Koo…"
    )]
    Address(String),
    /// The gateway would be this machine itself.
    #[error("this is the PeerId of this machine; a gateway is another program with a key of its own")]
    Own,
    /// The PeerId belongs to a peer.
    #[error("this is the PeerId of a peer; a gateway has a key of its own")]
    Peer,
    /// The list is full.
    #[error("the list holds {GATEWAYS_MAX} gateways, its limit; remove one first")]
    TooMany,
    /// There is no such gateway.
    #[error("there is no gateway '{0}' in the list; `peerctl gateway list` shows them")]
    Unknown(String),
    /// The text fits more than one.
    #[error("'{0}' fits more than one gateway; write more of its PeerId")]
    Ambiguous(String),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl From<GatewayError> for Problem {
    fn from(error: GatewayError) -> Self {
        let code = match &error {
            GatewayError::Address(_) | GatewayError::Own | GatewayError::Peer => Code::InvalidArgument,
            GatewayError::TooMany => Code::OverLimit,
            GatewayError::Unknown(_) => Code::UnknownGateway,
            GatewayError::Ambiguous(_) => Code::Ambiguous,
            GatewayError::Database(error) => return peer_compute::room::database_problem(error),
        };
        Problem::new(code, error.to_string())
    }
}

/// A handle to the list; clones share it.
#[derive(Debug, Clone)]
pub struct Gateways {
    database: Database,
    /// Held from before a change is committed until it has been published.
    order: Arc<Mutex<()>>,
    sender: Arc<watch::Sender<Arc<Vec<GatewayRecord>>>>,
    peers: Arc<watch::Sender<Arc<Vec<PeerId>>>>,
}

impl Gateways {
    /// Reads the list.
    pub fn open(database: Database) -> Result<Self, DatabaseError> {
        let list = database.write_blocking(load)?;
        let peers = Arc::new(watch::Sender::new(Arc::new(peers_of(&list))));
        Ok(Self { database, order: Arc::default(), sender: Arc::new(watch::Sender::new(Arc::new(list))), peers })
    }

    /// The list now, oldest first.
    pub fn list(&self) -> Arc<Vec<GatewayRecord>> {
        self.sender.borrow().clone()
    }

    /// Follows the list.
    pub fn watch(&self) -> watch::Receiver<Arc<Vec<GatewayRecord>>> {
        self.sender.subscribe()
    }

    /// Follows the PeerIds alone.
    pub fn watch_peers(&self) -> watch::Receiver<Arc<Vec<PeerId>>> {
        self.peers.subscribe()
    }

    /// Adds a gateway, or gives one that is there a new address.
    pub async fn add(&self, address: &str, now: Timestamp) -> Result<GatewayRecord, GatewayError> {
        let (address, peer) = parse_pinned(address)?;
        let record = GatewayRecord { peer, address, added_at: now };
        let added = record.clone();
        self.change(now, "gateway added", move |tx, list| {
            if list.len() >= GATEWAYS_MAX && list.iter().all(|other| other.peer != added.peer) {
                return Err(GatewayError::TooMany);
            }
            tx.execute(
                "INSERT INTO gateway (id, address, added_at) VALUES (?1, ?2, ?3)
                 ON CONFLICT (id) DO UPDATE SET address = excluded.address",
                params![added.peer.to_bytes(), added.address.to_string(), added.added_at.0],
            )
            .map_err(DatabaseError::from)?;
            Ok(added)
        })
        .await?;
        Ok(record)
    }

    /// Removes the gateway with this PeerId, or with the only one that begins or ends so.
    pub async fn remove(&self, reference: &str, now: Timestamp) -> Result<GatewayRecord, GatewayError> {
        let reference = reference.to_owned();
        self.change(now, "gateway removed", move |tx, list| {
            let found = find(list, &reference)?.clone();
            tx.execute("DELETE FROM gateway WHERE id = ?1", [found.peer.to_bytes()]).map_err(DatabaseError::from)?;
            Ok(found)
        })
        .await
    }

    async fn change<F>(&self, now: Timestamp, action: &'static str, work: F) -> Result<GatewayRecord, GatewayError>
    where
        F: FnOnce(&Tx<'_>, &[GatewayRecord]) -> Result<GatewayRecord, GatewayError> + Send + 'static,
    {
        let order = self.order.clone().lock_owned().await;
        let (list, peers) = (self.sender.clone(), self.peers.clone());
        let write = move |tx: &Tx<'_>| -> Result<_, GatewayError> {
            let changed = work(tx, &load(tx)?)?;
            let detail = changed.pinned_address();
            let entry =
                Entry { at: now, actor: "local".into(), action: action.into(), outcome: Outcome::Allowed, detail };
            audit::append(tx, &entry)?;
            Ok((changed, load(tx)?))
        };
        // To its end, even if whoever asked goes away: a committed change is always published.
        let change = self.database.run(move |database| {
            let _order = order;
            match database.write_blocking(write) {
                Ok((changed, now_listed)) => {
                    let now_admitted = Arc::new(peers_of(&now_listed));
                    // The gate first: whoever follows the PeerIds dials at once.
                    list.send_replace(Arc::new(now_listed));
                    peers.send_replace(now_admitted);
                    Ok(changed)
                }
                Err(error) => {
                    let entry = refusal(now, action, &error);
                    database.write_blocking(|tx| audit::append(tx, &entry))?;
                    Err(error)
                }
            }
        });
        change.await?
    }
}

fn refusal(at: Timestamp, action: &str, error: &GatewayError) -> Entry {
    let (actor, outcome) = ("local".to_owned(), Outcome::Refused(Threat::G4));
    Entry { at, actor, action: action.to_owned(), outcome, detail: error.to_string() }
}

/// Splits `/…/tcp/…/p2p/PEERID` into address and PeerId.
pub fn parse_pinned(text: &str) -> Result<(Multiaddr, PeerId), GatewayError> {
    let invalid = || GatewayError::Address(escape(text));
    let mut address: Multiaddr = text.parse().map_err(|_| invalid())?;
    let Some(Protocol::P2p(peer)) = address.pop() else { return Err(invalid()) };
    let address = peer_address(&address.to_string()).ok_or_else(invalid)?;
    Ok((address, peer))
}

fn peers_of(list: &[GatewayRecord]) -> Vec<PeerId> {
    list.iter().map(|gateway| gateway.peer).collect()
}

fn find<'a>(list: &'a [GatewayRecord], reference: &str) -> Result<&'a GatewayRecord, GatewayError> {
    let reference = parse_pinned(reference).map_or_else(|_| reference.to_owned(), |(_, peer)| peer.to_string());
    let fits = |gateway: &&GatewayRecord| {
        let id = gateway.peer.to_string();
        id == reference || (reference.len() >= 4 && (id.starts_with(&reference) || id.ends_with(&reference)))
    };
    let mut found = list.iter().filter(fits);
    match (found.next(), found.next()) {
        (Some(gateway), None) => Ok(gateway),
        (None, _) => Err(GatewayError::Unknown(escape(&reference))),
        (Some(_), Some(_)) => Err(GatewayError::Ambiguous(escape(&reference))),
    }
}

fn load(tx: &Tx<'_>) -> Result<Vec<GatewayRecord>, DatabaseError> {
    let mut statement = tx.prepare_cached("SELECT id, address, added_at FROM gateway ORDER BY added_at, id")?;
    let rows = statement
        .query_map([], |row| Ok((row.get::<_, Vec<u8>>(0)?, row.get::<_, String>(1)?, row.get::<_, u64>(2)?)))?
        .collect::<Result<Vec<_>, _>>()?;
    // A row that cannot be read is a gateway that is never dialled.
    let read = |(id, address, added_at): (Vec<u8>, String, u64)| {
        let peer = PeerId::from_bytes(&id).ok()?;
        Some(GatewayRecord { peer, address: peer_address(&address)?, added_at: Timestamp(added_at) })
    };
    Ok(rows.into_iter().filter_map(read).collect())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use peer_proto::identity::Identity;

    use super::*;

    fn open(path: &std::path::Path) -> Gateways {
        let database = Database::open(&path.join("db"), &[audit::SCHEMA, SCHEMA]).unwrap();
        Gateways::open(database).unwrap()
    }

    fn pinned(port: u16) -> String {
        format!("/ip4/192.0.2.1/tcp/{port}/p2p/{}", Identity::generate().peer_id())
    }

    #[tokio::test]
    async fn list_survives_a_restart_and_is_followed() {
        let directory = tempfile::tempdir().unwrap();
        let gateways = open(directory.path());
        let mut watch = gateways.watch();
        let (first, second) = (pinned(1), pinned(2));
        let added = gateways.add(&first, Timestamp(1)).await.unwrap();
        gateways.add(&second, Timestamp(2)).await.unwrap();
        assert!(watch.has_changed().unwrap());
        assert_eq!(watch.borrow_and_update().len(), 2);
        drop(gateways);
        let gateways = open(directory.path());
        let listed: Vec<_> = gateways.list().iter().map(GatewayRecord::pinned_address).collect();
        assert_eq!(listed, [first.clone(), second]);
        let id = added.peer.to_string();
        gateways.remove(&id[id.len() - 8..], Timestamp(3)).await.unwrap();
        assert_eq!(gateways.list().len(), 1);
        assert!(matches!(gateways.remove(&first, Timestamp(4)).await, Err(GatewayError::Unknown(_))));
    }

    #[tokio::test]
    async fn address_without_pinned_key_is_refused_and_audited() {
        let directory = tempfile::tempdir().unwrap();
        let gateways = open(directory.path());
        let peer = Identity::generate().peer_id();
        for text in [
            String::new(),
            "gateway.example.org:4101".to_owned(),
            "/ip4/192.0.2.1/tcp/4101".to_owned(),
            format!("/ip4/192.0.2.1/tcp/0/p2p/{peer}"),
            format!("/ip4/192.0.2.1/udp/4101/p2p/{peer}"),
            format!("/p2p/{peer}"),
            format!("/ip4/192.0.2.1/tcp/4101/p2p/{peer}/p2p-circuit"),
        ] {
            assert!(matches!(gateways.add(&text, Timestamp(1)).await, Err(GatewayError::Address(_))), "{text}");
        }
        assert!(gateways.list().is_empty());
    }

    #[tokio::test]
    async fn list_has_an_end_and_adding_again_moves() {
        let directory = tempfile::tempdir().unwrap();
        let gateways = open(directory.path());
        for _ in 0..GATEWAYS_MAX {
            gateways.add(&pinned(1), Timestamp(1)).await.unwrap();
        }
        assert!(matches!(gateways.add(&pinned(1), Timestamp(1)).await, Err(GatewayError::TooMany)));
        let moved = gateways.list()[0].peer;
        gateways.add(&format!("/dns/example.org/tcp/9/p2p/{moved}"), Timestamp(2)).await.unwrap();
        assert_eq!(gateways.list().len(), GATEWAYS_MAX);
        assert!(gateways.list().iter().any(|gateway| gateway.address.to_string() == "/dns/example.org/tcp/9"));
    }
}
