//! `peerd` as one value: what lives from start to end, and the node that exists once there is an identity.

mod identity;
mod rotation;

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use peer_compute::record::{self, Record};
use peer_compute::room::end_all_of;
use peer_compute::runner::Channel;
use peer_proto::PeerId;
use peer_proto::unit::Timestamp;
use peer_state::audit::{self, Entry, Outcome};
use peer_state::data_dir::{DataDir, DataDirError};
use peer_state::database::{Database, DatabaseError, Tx};
use peer_trust::key_file::{KeyFileError, Loaded};
use peer_trust::peers::ListError;
use peer_trust::refused::Refused;
use peer_trust::run::Run;
use peer_trust::seal::SealKey;
use peer_trust::trust::{ChangeError, Snapshot, Trust};
use peer_trust::{floor, kept};
use tokio::sync::{Notify, RwLock, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::identity::PassphraseFileError;
use self::identity::Slot;
use crate::api::ServeError;
use crate::api::socket::SocketError;
use crate::attempts::Attempts;
use crate::bandwidth::Bandwidth;
use crate::clock;
use crate::confinement::{ConfineError, Confinement};
use crate::emergency;
use crate::gateways::{self, Gateways};
use crate::metrics::Metrics;
use crate::node::{Node, StartError};
use crate::notices::Notices;
use crate::quota::Quotas;
use crate::requester;
use crate::settings::Settings;

/// How often counted refusals are looked at.
const REFUSED_PAUSE: Duration = Duration::from_secs(5);
/// How often the time is remembered.
const CLOCK_PAUSE: Duration = Duration::from_mins(1);
/// Longest wait for what the program still does at its very end.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the daemon does not start, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The data directory.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The database.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// The trust list.
    #[error(transparent)]
    Trust(#[from] ListError),
    /// The identity.
    #[error(transparent)]
    Identity(#[from] KeyFileError),
    /// The file with its passphrase.
    #[error(transparent)]
    Passphrase(#[from] PassphraseFileError),
    /// The identity is there, and what belongs to it is not.
    #[error(
        "{} is there, but the database beside it is new: there would be no trust list and no audit log; restore peer.db \
         from a backup, or start once with --accept-empty-database",
        .0.display()
    )]
    EmptyDatabase(std::path::PathBuf),
    /// A change of the trust list.
    #[error(transparent)]
    Change(#[from] ChangeError),
    /// The node.
    #[error(transparent)]
    Node(#[from] StartError),
    /// The local interface.
    #[error(transparent)]
    Api(#[from] ServeError),
    /// The socket of the local interface.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The process that speaks with other machines could not give up its rights.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// The operating system.
    #[error("the program cannot be set up: {0}")]
    System(#[from] io::Error),
}

/// Everything that the daemon holds.
#[derive(Debug)]
pub struct Daemon {
    /// The resolved configuration.
    pub settings: Settings,
    /// The data directory and its lock.
    pub data_dir: DataDir,
    /// The database.
    pub database: Database,
    /// The trust list.
    pub trust: Trust,
    /// This run of the daemon.
    pub run: Arc<Run>,
    /// What each peer may ask of this machine.
    pub quotas: Arc<Quotas>,
    /// Bytes per second of peers.
    pub bandwidth: Arc<Bandwidth>,
    /// Refused requests, counted for the audit log.
    pub refused: Arc<Refused>,
    /// The gateways that this machine serves through.
    pub gateways: Gateways,
    /// Events for people and scripts.
    pub notices: Notices,
    /// Counters.
    pub metrics: Metrics,
    /// When the daemon began.
    pub started_at: Timestamp,
    /// Whether the machine was closed in an emergency: nobody may connect then.
    pub closed: watch::Sender<bool>,
    /// Tasks that outlive the request that began them.
    pub tasks: TaskTracker,
    /// Ends those tasks.
    pub cancel: CancellationToken,
    /// The way to the engine, which the runner holds; absent if this machine runs nobody's containers.
    pub runner: Option<Arc<Channel>>,
    /// What this process has given up.
    pub confinement: Option<Confinement>,
    node: RwLock<Slot>,
    /// What the key file is sealed with while it is open.
    seal: Mutex<Option<SealKey>>,
    /// Wakes the task that passes statements on.
    pub(crate) statements: Notify,
    attempts: Mutex<Attempts>,
}

impl Daemon {
    /// Opens everything durable and, if there is an identity, starts the node. Whatever is damaged stops it here.
    pub async fn open(settings: Settings) -> Result<Arc<Self>, DaemonError> {
        let data_dir = DataDir::open(&settings.data_dir)?;
        Self::open_with(settings, data_dir, None, None).await
    }

    /// The same with what the runner has handed over.
    pub(crate) async fn open_with(
        settings: Settings,
        data_dir: DataDir,
        runner: Option<Arc<Channel>>,
        confinement: Option<Confinement>,
    ) -> Result<Arc<Self>, DaemonError> {
        let schemas =
            [audit::SCHEMA, peer_trust::SCHEMA, peer_compute::record::SCHEMA, gateways::SCHEMA, requester::SCHEMA];
        let database = Database::open(&data_dir.join("peer.db"), &schemas)?;
        let trust = Trust::open(database.clone())?;
        let gateways = Gateways::open(database.clone())?;
        let (loaded, seal) = identity::load(&data_dir, settings.passphrase_file.as_deref())?;
        let started_at = clock::now();
        if !matches!(loaded, Loaded::Absent) {
            check_filled(&settings, &data_dir, &database, started_at)?;
        }
        database.write_blocking(|tx| end_untrusted(tx, &trust.snapshot(), started_at))?;
        let closed = database.write_blocking(emergency::is_closed)?;
        let bounds = database.write_blocking(peer_trust::limits::load)?;
        let daemon = Arc::new(Self {
            bandwidth: Arc::new(Bandwidth::new(trust.watch(), bounds.bandwidth)),
            quotas: Arc::new(Quotas::new(settings.rates)),
            refused: Arc::default(),
            settings,
            data_dir,
            database,
            trust,
            run: Arc::new(Run::begin()),
            gateways,
            notices: Notices::default(),
            metrics: Metrics::new(started_at),
            started_at,
            closed: watch::Sender::new(closed),
            tasks: TaskTracker::new(),
            cancel: CancellationToken::new(),
            runner,
            confinement,
            node: RwLock::new(Slot::Empty),
            seal: Mutex::new(seal),
            statements: Notify::new(),
            attempts: Mutex::default(),
        });
        let telling = tell_refused(daemon.database.clone(), daemon.refused.clone());
        daemon.tasks.spawn(daemon.cancel.clone().run_until_cancelled_owned(telling));
        let keeping = keep_time(daemon.database.clone());
        daemon.tasks.spawn(daemon.cancel.clone().run_until_cancelled_owned(keeping));
        *daemon.node.write().await = match loaded {
            Loaded::Absent => Slot::Empty,
            Loaded::Locked(locked) => Slot::Locked(locked),
            Loaded::Open(identity) => {
                daemon.take_up_rotation(&identity).await?;
                Slot::Running(Node::start(&daemon, identity).await?)
            }
        };
        Ok(daemon)
    }

    /// Ends the node in order. Containers are left running.
    pub async fn shutdown(&self) {
        self.cancel.cancel();
        self.tasks.close();
        if tokio::time::timeout(LEAVE_TIMEOUT, self.tasks.wait()).await.is_err() {
            tracing::warn!(tasks = self.tasks.len(), "some requests did not end in time");
        }
        let slot = std::mem::replace(&mut *self.node.write().await, Slot::Closed);
        if let Slot::Running(node) = slot {
            node.shutdown().await;
        }
        write_refused(&self.database, self.refused.rest(clock::now())).await;
    }

    /// What a peer is called here: its name, or else its PeerId.
    pub fn name_of(&self, peer: &PeerId) -> String {
        match self.trust.snapshot().peers.get(peer) {
            Some(record) => format!("'{}'", record.name),
            None => peer.to_string(),
        }
    }
}

/// The names of deployments, for a line of the audit log.
pub(crate) fn names_of(records: &[Record]) -> String {
    let names: Vec<_> = records.iter().map(|record| record.specification.name.as_str()).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// Ends the deployments of owners who are trusted no more, unless they were kept on purpose.
fn end_untrusted(tx: &Tx<'_>, list: &Snapshot, now: Timestamp) -> Result<(), DatabaseError> {
    let owners: BTreeSet<_> = record::all(tx)?.into_iter().map(|record| record.owner).collect();
    for owner in owners.into_iter().filter(|owner| !list.peers.contains_key(owner)) {
        if kept::is_kept(tx, &owner)? {
            continue;
        }
        let ended = end_all_of(tx, &owner)?;
        if !ended.is_empty() {
            let detail = format!("{owner} is trusted no more: {}", names_of(&ended));
            audit::append(tx, &allowed(now, "deployments ended", detail))?;
        }
    }
    Ok(())
}

/// Every start of a machine with an identity finds at least the line that tells how it was made.
fn check_filled(
    settings: &Settings,
    data_dir: &DataDir,
    database: &Database,
    now: Timestamp,
) -> Result<(), DaemonError> {
    if !database.write_blocking(audit::is_empty)? {
        return Ok(());
    }
    if !settings.accept_empty_database {
        return Err(DaemonError::EmptyDatabase(data_dir.join("identity.key")));
    }
    let entry = allowed(now, "empty database accepted", "the log begins anew".to_owned());
    Ok(database.write_blocking(|tx| audit::append(tx, &entry))?)
}

/// Writes now and then how many requests were refused beside those that have lines of their own.
async fn tell_refused(database: Database, refused: Arc<Refused>) {
    let mut moments = tokio::time::interval(REFUSED_PAUSE);
    loop {
        moments.tick().await;
        write_refused(&database, refused.due(clock::now())).await;
    }
}

async fn write_refused(database: &Database, entries: Vec<Entry>) {
    if entries.is_empty() {
        return;
    }
    let written = database.write(move |tx| entries.iter().try_for_each(|entry| audit::append(tx, entry))).await;
    if let Err(error) = written {
        tracing::error!(%error, "refused requests could not be audited");
    }
}

/// Remembers how late it is, so that a clock that goes back is known by the time that it has shown.
async fn keep_time(database: Database) {
    let mut moments = tokio::time::interval(CLOCK_PAUSE);
    loop {
        moments.tick().await;
        match database.write(|tx| floor::pass(tx, clock::now())).await {
            Ok(Ok(())) => {}
            Ok(Err(problem)) => tracing::warn!(%problem, "the clock went back"),
            Err(error) => tracing::warn!(%error, "the time could not be remembered"),
        }
    }
}

/// A line of the audit log about what this machine did by itself or for its own user.
fn allowed(at: Timestamp, action: &str, detail: String) -> Entry {
    Entry { at, actor: "local".to_owned(), action: action.to_owned(), outcome: Outcome::Allowed, detail }
}

#[cfg(test)]
#[path = "daemon_tests.rs"]
mod tests;
