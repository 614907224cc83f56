//! The room as the rest of the program sees it: it takes authorised requests, drives deployments, and reports.
//!
//! Rows of [`crate::record`] are the truth and survive a crash. What is in memory here (open network namespaces, health,
//! public addresses, transfers under way) is made again after one. Each deployment has one task that moves it towards what
//! its owner wants ([`crate::driver`]); whoever changes a row wakes that task.

mod capacity;
pub mod emergency;
mod endpoint;
mod intent;
mod paused;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::deploy::{Health, Isolation, Request, RuntimeName, State, Status};
use peer_proto::id::DeploymentId;
use peer_proto::query::Usage;
use peer_proto::unit::{ByteSize, Timestamp};
use peer_state::database::{Database, DatabaseError, Tx};
use peer_trust::authorise::{Held, Share};
use tokio::sync::{Notify, broadcast};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::deployment::{Life, Wanted};
use crate::driver;
use crate::engine::{ContainerFacts, Engine, EngineError, EngineFacts, LogOptions, LogStream};
use crate::fetch::Transfers;
use crate::image::spool::SpoolError;
use crate::isolation;
use crate::ledger::{self, Offer};
use crate::logflood::FloodWatch;
use crate::possession::{self, BroughtImage};
use crate::profile::container_name;
use crate::record::{self, Record};
use crate::wall::{self, Availability, Wall, keep};

pub use endpoint::Endpoint;

/// Changes that a slow listener may lag behind by.
const CHANGES_KEPT: usize = 1024;

/// How the room runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// What this machine offers to all peers together.
    pub offer: Offer,
    /// Where layers are kept while they arrive.
    pub spool: PathBuf,
    /// Largest image accepted (bytes, unpacked).
    pub image_size_max: ByteSize,
    /// How long a deployment waits for its layers when nothing arrives.
    pub transfer_patience: Duration,
    /// How long an image that we brought is kept when nothing uses it (milliseconds).
    pub image_keep_milliseconds: u64,
    /// The wall around containers' networks.
    pub wall: wall::Options,
    /// The wall clock.
    pub clock: fn() -> Timestamp,
    /// The clock by which things grow old: never ahead of what the wall clock would be if nobody had set it.
    pub steady_clock: fn() -> Timestamp,
}

/// Why the room cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// The spool cannot be used.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The engine's side refuses to serve this room.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// A change of a deployment, announced after it has been committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The deployment.
    pub id: DeploymentId,
    /// Whose it is.
    pub owner: PeerId,
    /// As it is now; `None` if it has been forgotten.
    pub status: Option<Status>,
}

/// A deployment that is kept from running, as far as visitors are concerned.
#[derive(Debug, Clone)]
pub(crate) struct Paused {
    publish: bool,
    problem: Problem,
}

#[derive(Debug, Default)]
pub(crate) struct Live {
    pub(crate) wake: Arc<Notify>,
    /// Whether this daemon has compared the running container with its plan.
    pub(crate) judged: bool,
    /// How fast its log has grown lately.
    pub(crate) log: FloodWatch,
    pub(crate) endpoint: Option<Endpoint>,
    /// Closes that endpoint when this is dropped.
    pub(crate) open: Option<DropGuard>,
    /// The moment before which it is not started again, and when that is by the monotonic clock.
    pub(crate) due: Option<(Timestamp, Instant)>,
    /// Why it is paused, once that has been announced.
    paused: Option<Paused>,
    health: Option<Health>,
    url: Option<String>,
}

#[derive(Debug)]
pub(crate) struct Inner<E> {
    /// Marks this machine's containers in the engine; the same after every start, and with every identity.
    pub(crate) mark: String,
    pub(crate) database: Database,
    pub(crate) engine: E,
    pub(crate) options: Options,
    pub(crate) transfers: Transfers,
    pub(crate) wall: Wall,
    pub(crate) cancel: CancellationToken,
    /// Whether the machine was closed in an emergency.
    pub(crate) closed: AtomicBool,
    /// Asks for a look at leftovers before the next one is due.
    pub(crate) untidy: Notify,
    /// What the engine said of itself last; none before it has answered for the first time.
    known_engine: Mutex<Option<EngineFacts>>,
    live: Mutex<HashMap<DeploymentId, Live>>,
    changes: broadcast::Sender<Change>,
    tasks: TaskTracker,
}

/// A handle to the room; clones share it.
#[derive(Debug)]
pub struct Room<E> {
    pub(crate) inner: Arc<Inner<E>>,
}

impl<E> Clone for Room<E> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<E: Engine> Room<E> {
    /// Takes up every recorded deployment where it was left, and removes containers that no row knows.
    pub async fn start(database: Database, engine: E, options: Options) -> Result<Self, StartError> {
        let transfers = Transfers::open(&options)?;
        let mark = database.write(record::mark).await?;
        engine.mark(&mark).await?;
        let inner = Inner {
            wall: Wall::new(&mark, options.wall.clone()),
            mark,
            database,
            engine,
            transfers,
            options,
            cancel: CancellationToken::new(),
            closed: AtomicBool::new(false),
            untidy: Notify::new(),
            known_engine: Mutex::default(),
            live: Mutex::default(),
            changes: broadcast::Sender::new(CHANGES_KEPT),
            tasks: TaskTracker::new(),
        };
        let room = Self { inner: Arc::new(inner) };
        for record in room.all().await? {
            room.drive(record.id);
        }
        let inner = room.inner.clone();
        room.inner.tasks.spawn(driver::tidy_up(inner));
        let inner = room.inner.clone();
        room.inner.tasks.spawn(keep::keep(inner));
        Ok(room)
    }

    /// Ends the tasks. Containers are left running: the next start takes them up again.
    pub async fn shutdown(&self) {
        self.inner.cancel.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    /// What the owner's deployments hold at this moment.
    pub fn held(&self, tx: &Tx<'_>, owner: &PeerId) -> Result<Held, DatabaseError> {
        Ok(ledger::held(&record::of_owner(tx, owner)?, Some(owner)))
    }

    /// What the request would have running.
    pub fn share(&self, tx: &Tx<'_>, owner: &PeerId, request: &Request) -> Result<Option<Share>, DatabaseError> {
        Ok(match request {
            Request::Deploy(deploy) => Some(Share::more(deploy.specification.clone())),
            Request::Start(id) | Request::Restart(id) => record::find_owned(tx, owner, *id)?
                .map(|record| Share { adds: !record.life.state().holds_share(), specification: record.specification }),
            Request::Push(_) | Request::Stop(_) | Request::Remove(_) => None,
        })
    }

    /// Announces a row that has just been committed, and sees to it that its task goes on.
    pub fn committed(&self, record: &Record) {
        self.inner.announce(record);
        self.drive(record.id);
    }

    /// Lets the deployment's port be reached in the name of its present owner.
    pub(crate) fn change_endpoint_owner(&self, record: &Record) {
        if let Some(endpoint) = self.inner.live().get_mut(&record.id).and_then(|live| live.endpoint.as_mut()) {
            endpoint.owner = record.owner;
        }
    }

    /// Starts the deployment's task, or wakes it.
    fn drive(&self, id: DeploymentId) {
        let mut live = self.inner.live();
        if let Some(entry) = live.get(&id) {
            entry.wake.notify_one();
            return;
        }
        let entry = Live::default();
        let wake = entry.wake.clone();
        live.insert(id, entry);
        drop(live);
        let inner = self.inner.clone();
        self.inner.tasks.spawn(async move {
            let _ = inner.cancel.clone().run_until_cancelled(driver::drive(&inner, id, &wake)).await;
        });
    }

    /// Every deployment on this machine.
    pub async fn all(&self) -> Result<Vec<Record>, DatabaseError> {
        self.inner.database.write(record::all).await
    }

    /// Every deployment on this machine, as reported to its owner, with that owner.
    pub async fn all_statuses(&self) -> Result<Vec<(PeerId, Status)>, DatabaseError> {
        let records = self.all().await?;
        Ok(records.iter().map(|record| (record.owner, self.inner.status(record))).collect())
    }

    /// The owner's deployments.
    pub async fn statuses(&self, owner: PeerId) -> Result<Vec<Status>, DatabaseError> {
        let records = self.inner.database.write(move |tx| record::of_owner(tx, &owner)).await?;
        Ok(records.iter().map(|record| self.inner.status(record)).collect())
    }

    /// One deployment of this owner. Somebody else's cannot be told from one that does not exist.
    pub async fn status(&self, owner: PeerId, id: DeploymentId) -> Result<Status, Problem> {
        Ok(self.inner.status(&self.owned(owner, id).await?))
    }

    /// The same, and whether it is only on the way: stopped in order to be started again.
    pub async fn progress(&self, owner: PeerId, id: DeploymentId) -> Result<(Status, bool), Problem> {
        let record = self.owned(owner, id).await?;
        Ok((self.inner.status(&record), record.wanted == Wanted::Restarted))
    }

    async fn owned(&self, owner: PeerId, id: DeploymentId) -> Result<Record, Problem> {
        let found = self.inner.database.write(move |tx| record::find_owned(tx, &owner, id)).await;
        found.map_err(|error| database_problem(&error))?.ok_or_else(no_such_deployment)
    }

    /// Follows all changes.
    pub fn changes(&self) -> broadcast::Receiver<Change> {
        self.inner.changes.subscribe()
    }

    /// Notes what a health check found. `None` where nothing runs any more.
    pub async fn set_health(&self, id: DeploymentId, health: Option<Health>) -> Result<(), DatabaseError> {
        self.amend(id, |live| std::mem::replace(&mut live.health, health) != health).await
    }

    /// Notes the public address that a gateway gave, or that it is gone.
    pub async fn set_url(&self, id: DeploymentId, url: Option<String>) -> Result<(), DatabaseError> {
        self.amend(id, |live| std::mem::replace(&mut live.url, url.clone()) != url).await
    }

    async fn amend(&self, id: DeploymentId, change: impl FnOnce(&mut Live) -> bool) -> Result<(), DatabaseError> {
        let changed = self.inner.live().get_mut(&id).is_some_and(change);
        if changed && let Some(record) = self.inner.database.write(move |tx| record::find(tx, id)).await? {
            self.inner.announce(&record);
        }
        Ok(())
    }

    /// What the deployment uses at present.
    pub async fn usage(&self, owner: PeerId, id: DeploymentId) -> Result<Usage, Problem> {
        let record = self.owned(owner, id).await?;
        let Some(facts) = self.container(id).await?.filter(|facts| facts.running) else {
            let message = format!("the deployment is {} and uses nothing", record.life.state());
            return Err(Problem::new(Code::WrongState, message));
        };
        let usage = self.inner.engine.usage(&facts.id, &record.specification.limits).await;
        usage.map_err(|error| error.problem())
    }

    /// The deployment's log.
    pub async fn logs(&self, owner: PeerId, id: DeploymentId, options: &LogOptions) -> Result<LogStream, Problem> {
        let record = self.owned(owner, id).await?;
        let facts = self.container(id).await?.ok_or_else(|| {
            let message = format!("the deployment is {} and has written nothing yet", record.life.state());
            Problem::new(Code::WrongState, message)
        })?;
        Ok(self.inner.engine.logs(&facts.id, options))
    }

    async fn container(&self, id: DeploymentId) -> Result<Option<ContainerFacts>, Problem> {
        self.inner.engine.inspect(&container_name(&id)).await.map_err(|error| error.problem())
    }

    /// Every image that peers brought here.
    pub async fn images(&self) -> Result<Vec<BroughtImage>, DatabaseError> {
        self.inner.database.write(possession::images).await
    }

    /// The engine, asked now.
    pub async fn engine_facts(&self) -> Result<EngineFacts, EngineError> {
        self.inner.look_at_engine().await
    }

    /// Whether ways out and shared networks are offered.
    pub fn wall(&self) -> Availability {
        self.inner.wall.availability()
    }

    /// The engine itself, for exporting images of this machine's own user.
    pub fn engine(&self) -> &E {
        &self.inner.engine
    }
}

/// Has everything removed that belongs to an owner who is trusted no more, in the transaction that says so. Gives what was
/// still wanted; after the commit each of these goes to [`Room::committed`].
pub fn end_all_of(tx: &Tx<'_>, owner: &PeerId) -> Result<Vec<Record>, DatabaseError> {
    let mut ended = Vec::new();
    for mut record in record::of_owner(tx, owner)? {
        if record.wanted != Wanted::Removed && intent::want_removed(&mut record).is_ok() {
            record.reason = Some(Problem::new(Code::UntrustedPeer, "its owner is trusted here no more"));
            record::update(tx, &record)?;
            ended.push(record);
        }
    }
    possession::forget_owner(tx, owner)?;
    Ok(ended)
}

/// Has everything stopped that runs here of an owner who may run it no more, in the transaction that says so. It is kept, and
/// can be started again by its owner once that is allowed. Gives what is being stopped; after the commit each of these goes
/// to [`Room::committed`].
pub fn stop_all_of(tx: &Tx<'_>, owner: &PeerId, reason: &Problem) -> Result<Vec<Record>, DatabaseError> {
    let mut stopped = Vec::new();
    for mut record in record::of_owner(tx, owner)? {
        let goes_on = record.life.state().holds_share() || record.wanted == Wanted::Restarted;
        let ends = matches!(record.wanted, Wanted::Running | Wanted::Restarted) && goes_on;
        if ends && intent::want_stopped(&mut record).is_ok() {
            record.reason = Some(reason.clone());
            record::update(tx, &record)?;
            stopped.push(record);
        }
    }
    Ok(stopped)
}

impl<E: Engine> Inner<E> {
    /// Asks the engine what it is, and remembers it for decisions that cannot wait for an answer.
    pub(crate) async fn look_at_engine(&self) -> Result<EngineFacts, EngineError> {
        let facts = self.engine.facts().await?;
        *self.known_engine.lock().unwrap_or_else(PoisonError::into_inner) = Some(facts.clone());
        Ok(facts)
    }
}

impl<E> Inner<E> {
    pub(crate) fn known_engine(&self) -> Option<EngineFacts> {
        self.known_engine.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn live(&self) -> MutexGuard<'_, HashMap<DeploymentId, Live>> {
        // Held for single map operations only; nothing in them can leave the map half changed.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self, record: &Record) -> Status {
        let mut status = record.status();
        status.isolation = self.known_engine().map(|engine| {
            let asked = record.specification.demands.runtime.as_ref().filter(|_| engine.owner_runtime.is_none());
            let isolation = isolation::of(&engine);
            Isolation { runtime: asked.map_or(isolation.runtime, RuntimeName::to_string), ..isolation }
        });
        if let Some(live) = self.live().get(&record.id) {
            if matches!(status.state, State::Running | State::Paused) {
                status.url.clone_from(&live.url);
            }
            if status.state != State::Running {
                return status;
            }
            status.health = record.specification.health.as_ref().map(|_| live.health.unwrap_or(Health::Unknown));
        }
        status
    }

    /// Tells everybody about a committed row. What may not be reached any more is closed first.
    pub(crate) fn announce(&self, record: &Record) {
        if let Some(live) = self.live().get_mut(&record.id) {
            live.paused = match &record.life {
                Life::Paused(problem, _) => {
                    let publish = record.specification.publish && record.specification.expose.is_some();
                    Some(Paused { publish, problem: problem.clone() })
                }
                _ => None,
            };
            if record.life.state() != State::Running {
                (live.judged, live.endpoint, live.health, live.open) = (false, None, None, None);
                // A paused deployment keeps its name.
                live.url.take_if(|_| live.paused.is_none());
            }
        }
        let change = Change { id: record.id, owner: record.owner, status: Some(self.status(record)) };
        // Nobody may be listening.
        drop(self.changes.send(change));
    }

    /// Wakes the tasks of deployments whose rows are gone, so that they end.
    pub(crate) fn wake_all_but(&self, kept: &[Record]) {
        for (id, live) in self.live().iter() {
            if kept.iter().all(|record| record.id != *id) {
                live.wake.notify_one();
            }
        }
    }

    /// Forgets what is in memory of a deployment whose row is gone.
    pub(crate) fn forget(&self, id: DeploymentId) {
        self.live().remove(&id);
    }

    pub(crate) fn announce_removed(&self, record: &Record) {
        self.forget(record.id);
        drop(self.changes.send(Change { id: record.id, owner: record.owner, status: None }));
    }
}

/// The same words for what does not exist and for what is somebody else's.
pub fn no_such_deployment() -> Problem {
    Problem::new(
        Code::NoSuchDeployment,
        "you have no such deployment on this machine; `peerctl ps -a` shows those that you have",
    )
}

/// A failure of the database as it is told to an asker.
pub fn database_problem(error: &DatabaseError) -> Problem {
    let code = if matches!(error, DatabaseError::DiskFull) { Code::DiskFull } else { Code::Internal };
    Problem::new(code, error.to_string())
}
