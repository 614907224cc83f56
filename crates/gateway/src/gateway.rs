//! The running gateway: what it owns, how it starts and how it ends.
//!
//! Identity, allow list and development certificate survive a restart; leases do not, since providers register them
//! again as soon as they are connected.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use peer_net::{Limits, Multiaddr, Network, Options, PeerId, Policy, Protocols, Role};
use peer_state::data_dir::{DataDir, DataDirError};
use peer_state::durable::{self, FileError};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::certificates::{self, CertificateError};
use crate::identity::{self, IdentityError};
use crate::lease_streams::{self, LEASE, PublicAddress};
use crate::leases::Leases;
use crate::limits::{Connections, Rates};
use crate::listen::{self, Door};
use crate::metrics::{Levels, Metrics};
use crate::metrics_listen;
use crate::pool::Pool;
use crate::providers::{self, ProvidersError};
use crate::proxy::{Patience, Proxy};
use crate::settings::{Certificate, Settings};
use crate::visitor_io::Waits;

/// Name of the file in the data directory that tells `peergate info` what the running gateway listens on.
const RUNNING_FILE: &str = "running.json";
const RUNNING_FILE_MAX: u64 = 64 * 1024;
/// Lease streams on one connection of a provider: one that lives, and some that are being replaced.
const LEASE_STREAMS_MAX: usize = 8;
/// Longest wait until a denied provider's connections are closed.
const CLOSING_TIME: Duration = Duration::from_secs(2);
/// Pause between two looks at whether something has been done.
const LOOK_PAUSE: Duration = Duration::from_millis(20);
/// Pause between two sweeps of kept streams and rate buckets.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Why the gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory cannot be used.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is no usable key.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The allow list cannot be read.
    #[error(transparent)]
    Providers(#[from] ProvidersError),
    /// There is no usable certificate.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// An address cannot be listened on.
    #[error("{0}; choose another address or stop the program that holds it")]
    Listen(#[from] std::io::Error),
    /// The network did not start.
    #[error(transparent)]
    Network(#[from] peer_net::StartError),
}

/// What others need to know of a gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Its PeerId, which providers pin.
    pub peer_id: String,
    /// Where providers reach it, with the PeerId at the end; where it listens on all of the machine's addresses, they are
    /// known while it runs.
    pub addresses: Vec<String>,
    /// The domain of all names.
    pub domain: String,
    /// What follows a name's label in its public address.
    pub url_suffix: String,
    /// Where visitors arrive.
    pub https_address: String,
    /// Certificate of the development authority, if that is in use.
    pub ca_certificate: Option<PathBuf>,
    /// Where metrics are served.
    pub metrics_address: Option<String>,
    /// Whether the gateway runs.
    pub running: bool,
}

/// What the running gateway writes down for other invocations of the program.
#[derive(Debug, Serialize, Deserialize)]
struct Running {
    #[serde(flatten)]
    info: Info,
    /// The allow list in force: whoever is not in it has no name and no connection any more.
    providers: Vec<String>,
}

/// Why nothing is known of a gateway.
#[derive(Debug, thiserror::Error)]
pub enum InfoError {
    /// It has never been started.
    #[error("there is no gateway in {}; start it once with 'peergate'", .0.display())]
    Absent(PathBuf),
    /// Its key cannot be read.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
}

/// A running gateway.
#[derive(Debug)]
pub struct Gateway {
    info: Info,
    https_address: SocketAddr,
    metrics_address: Option<SocketAddr>,
    network: Network,
    proxy: Arc<Proxy>,
    connections: Arc<Connections>,
    owned: Owned,
    data_dir: DataDir,
}

/// The tasks of a gateway, and how they are told to end.
#[derive(Debug)]
struct Owned {
    background: JoinSet<()>,
    /// Visitors' connections and relays.
    tasks: TaskTracker,
    /// Streams to deployments.
    streams: TaskTracker,
    stop: CancellationToken,
    kill: CancellationToken,
    drain: Duration,
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.stop.cancel();
        self.kill.cancel();
    }
}

impl Gateway {
    /// Binds everything and starts serving.
    pub async fn start(settings: &Settings) -> Result<Self, StartError> {
        let data_dir = DataDir::open(&settings.data_dir)?;
        let identity = identity::load_or_create(data_dir.path())?;
        let policy = watch::Sender::new(Arc::new(providers::load(data_dir.path())?.policy()));
        let followed = policy.subscribe();
        let tls = certificates::server_config(&settings.certificate, data_dir.path(), &settings.domain)?;
        let listener = listen::bind(settings.https_listen).await?;
        let https_address = listener.local_addr()?;
        let metrics_listener = match settings.metrics_listen {
            Some(address) => Some(listen::bind(address).await?),
            None => None,
        };
        let metrics_address = metrics_listener.as_ref().map(tokio::net::TcpListener::local_addr).transpose()?;
        let limits = Limits { inbound_streams_per_provider: LEASE_STREAMS_MAX, ..Limits::default() };
        let options = Options { listen: vec![settings.listen.clone()], limits, ..Options::default() };
        let protocols = Protocols::none().allow(Role::Provider, &[LEASE]);
        let (network, incoming) = Network::start(identity.to_keypair(), options, policy.subscribe(), protocols).await?;

        let public = PublicAddress {
            domain: settings.domain.clone(),
            port: settings.public_port.unwrap_or(https_address.port()),
        };
        let info = running_info(
            settings,
            &network.listen_addresses(),
            identity.peer_id(),
            &public,
            https_address,
            metrics_address,
        );
        let (stop, kill) = (CancellationToken::new(), CancellationToken::new());
        let (tasks, streams) = (TaskTracker::new(), TaskTracker::new());
        let pool = Pool::new(network.clone(), streams.clone());
        let proxy = Arc::new(new_proxy(settings, pool, tasks.clone(), stop.clone()));
        let bounds = &settings.bounds;
        let connections = Connections::new(bounds.connections_per_address, bounds.connections);
        let door = Door {
            acceptor: TlsAcceptor::from(Arc::new(tls)),
            proxy: Arc::clone(&proxy),
            connections: Arc::clone(&connections),
            waits: Waits { head: bounds.head, idle: bounds.idle },
            tasks: tasks.clone(),
            stop: stop.clone(),
            kill: kill.clone(),
        };
        let mut background = JoinSet::new();
        let allow_list = AllowList::new(followed, &proxy, &network, &info, &data_dir);
        allow_list.write()?;
        background.spawn(allow_list.follow());
        background.spawn(providers::follow(data_dir.path().to_owned(), policy));
        background.spawn(lease_streams::serve(incoming, Arc::clone(&proxy.leases), public, kill.clone()));
        background.spawn(listen::serve(listener, door));
        background.spawn(sweep(Arc::clone(&proxy)));
        if let Some(listener) = metrics_listener {
            background.spawn(metrics_listen::serve(listener, Arc::clone(&proxy), Arc::clone(&connections)));
        }
        let owned = Owned { background, tasks, streams, stop, kill, drain: bounds.drain };
        Ok(Self { info, https_address, metrics_address, network, proxy, connections, owned, data_dir })
    }

    /// What others need to know.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Where visitors arrive, with the real port.
    pub fn https_address(&self) -> SocketAddr {
        self.https_address
    }

    /// Where metrics are served, with the real port.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// What is open at this moment.
    pub fn levels(&self) -> Levels {
        levels(&self.proxy, &self.connections)
    }

    /// Stops accepting, lets answers in progress end within the time allowed, and ends everything else.
    pub async fn shutdown(mut self) {
        let owned = &mut self.owned;
        owned.stop.cancel();
        owned.tasks.close();
        owned.streams.close();
        if tokio::time::timeout(owned.drain, owned.tasks.wait()).await.is_err() {
            tracing::info!(left = owned.tasks.len(), "ending what is still in progress");
        }
        owned.kill.cancel();
        owned.background.shutdown().await;
        owned.tasks.wait().await;
        self.proxy.pool.clear();
        self.network.shutdown().await;
        owned.streams.wait().await;
        if let Err(error) = std::fs::remove_file(self.data_dir.join(RUNNING_FILE)) {
            tracing::warn!(%error, "cannot remove {RUNNING_FILE}");
        }
    }
}

/// What is open at this moment.
pub(crate) fn levels(proxy: &Proxy, connections: &Connections) -> Levels {
    Levels {
        connections: connections.len(),
        leases: proxy.leases.len(),
        providers: proxy.leases.providers().len(),
        idle_streams: proxy.pool.idle(),
        streams_opened: proxy.pool.opened(),
        rate_entries: proxy.rates.entries(),
    }
}

fn new_proxy(settings: &Settings, pool: Pool, tasks: TaskTracker, stop: CancellationToken) -> Proxy {
    let bounds = &settings.bounds;
    Proxy {
        domain: settings.domain.clone(),
        leases: Arc::new(Leases::new(bounds.leases_per_provider, bounds.visits_per_provider)),
        rates: Rates::new(bounds.requests_per_address, bounds.requests_per_name),
        pool,
        metrics: Arc::new(Metrics::default()),
        patience: Patience { idle: bounds.idle, upgraded_idle: bounds.websocket_idle },
        tasks,
        stop,
    }
}

fn running_info(
    settings: &Settings,
    addresses: &[Multiaddr],
    peer: PeerId,
    public: &PublicAddress,
    https_address: SocketAddr,
    metrics_address: Option<SocketAddr>,
) -> Info {
    Info {
        peer_id: peer.to_string(),
        addresses: addresses
            .iter()
            .filter(|address| !is_unspecified(address))
            .map(|address| format!("{address}/p2p/{peer}"))
            .collect(),
        domain: settings.domain.to_string(),
        url_suffix: public.suffix(),
        https_address: https_address.to_string(),
        ca_certificate: authority_of(settings),
        metrics_address: metrics_address.map(|address| address.to_string()),
        running: true,
    }
}

/// True for an address that stands for all of the machine's, and that nobody can dial.
fn is_unspecified(address: &Multiaddr) -> bool {
    let text = address.to_string();
    text.starts_with("/ip4/0.0.0.0/") || text.starts_with("/ip6/::/")
}

fn authority_of(settings: &Settings) -> Option<PathBuf> {
    (settings.certificate == Certificate::Development).then(|| certificates::authority_path(&settings.data_dir))
}

/// What is known of the gateway in a data directory: from the running one, or from its key and the settings.
pub fn info(settings: &Settings) -> Result<Info, InfoError> {
    let data_dir = &settings.data_dir;
    let identity = identity::load(data_dir)?.ok_or_else(|| InfoError::Absent(data_dir.clone()))?;
    if let Some(running) = read_running(data_dir)? {
        return Ok(running.info);
    }
    let public = PublicAddress {
        domain: settings.domain.clone(),
        port: settings.public_port.unwrap_or(settings.https_listen.port()),
    };
    let listen = std::slice::from_ref(&settings.listen);
    let info =
        running_info(settings, listen, identity.peer_id(), &public, settings.https_listen, settings.metrics_listen);
    Ok(Info { running: false, ..info })
}

/// What the running gateway has written; `None` if none runs.
fn read_running(data_dir: &Path) -> Result<Option<Running>, FileError> {
    let Err(DataDirError::InUse(_)) = DataDir::open(data_dir) else { return Ok(None) };
    let bytes = durable::read(&data_dir.join(RUNNING_FILE), RUNNING_FILE_MAX)?;
    Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
}

/// What a running gateway has made of a provider's removal from the allow list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denial {
    /// Its names and connections have ended.
    Done,
    /// The gateway runs, and has not said so within the time allowed.
    Pending,
    /// No gateway runs.
    NotRunning,
}

/// Waits until the running gateway has ended the names and connections of a provider that is off the list.
pub fn wait_until_denied(data_dir: &Path, provider: PeerId, patience: Duration) -> Result<Denial, FileError> {
    let (provider, since) = (provider.to_string(), Instant::now());
    loop {
        match read_running(data_dir)? {
            None => return Ok(Denial::NotRunning),
            Some(running) if !running.providers.contains(&provider) => return Ok(Denial::Done),
            Some(_) if since.elapsed() >= patience => return Ok(Denial::Pending),
            Some(_) => std::thread::sleep(LOOK_PAUSE),
        }
    }
}

/// Puts each change of the allow list into force, and then writes down that it is.
struct AllowList {
    policy: watch::Receiver<Arc<Policy>>,
    leases: Arc<Leases>,
    network: Network,
    info: Info,
    path: PathBuf,
}

impl AllowList {
    fn new(
        policy: watch::Receiver<Arc<Policy>>,
        proxy: &Proxy,
        network: &Network,
        info: &Info,
        data_dir: &DataDir,
    ) -> Self {
        let (leases, path) = (Arc::clone(&proxy.leases), data_dir.join(RUNNING_FILE));
        Self { policy, leases, network: network.clone(), info: info.clone(), path }
    }

    async fn follow(mut self) {
        while self.policy.changed().await.is_ok() {
            let admitted = Arc::clone(&self.policy.borrow_and_update());
            let is_denied = |provider: &PeerId| !admitted.admitted.contains_key(provider);
            // The names end at once; and once more after the connections, as a lease may have come in meanwhile.
            self.end_names(is_denied);
            let closed = async {
                while self.network.connections().iter().any(|connection| is_denied(&connection.peer)) {
                    tokio::time::sleep(LOOK_PAUSE).await;
                }
            };
            if tokio::time::timeout(CLOSING_TIME, closed).await.is_err() {
                tracing::warn!("a denied provider's connection is not closed yet");
                continue;
            }
            self.end_names(is_denied);
            if let Err(error) = self.write() {
                tracing::warn!(%error, "the allow list is in force, which cannot be written down");
            }
        }
    }

    fn end_names(&self, is_denied: impl Fn(&PeerId) -> bool) {
        for (provider, _) in self.leases.providers() {
            if is_denied(&provider) {
                tracing::info!(%provider, "provider is denied; its names end");
                self.leases.end_provider(provider);
            }
        }
    }

    fn write(&self) -> Result<(), FileError> {
        let providers = self.policy.borrow().admitted.keys().map(ToString::to_string).collect();
        let running = Running { info: self.info.clone(), providers };
        let text = serde_json::to_vec_pretty(&running).expect("plain texts have a JSON form");
        durable::write(&self.path, &text, 0o600)
    }
}

async fn sweep(proxy: Arc<Proxy>) {
    loop {
        tokio::time::sleep(SWEEP_INTERVAL).await;
        proxy.pool.sweep();
        proxy.rates.sweep();
    }
}
