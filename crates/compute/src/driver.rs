//! The task that moves one deployment towards what its owner wants.
//!
//! It is level-triggered: each round reads the row, looks at the engine where it must, makes one durable step, and begins
//! again. A crash between any two lines is therefore the same as a pause: the next start reads the row and goes on.

use std::sync::Arc;
use std::time::Duration;

use peer_proto::code::{Code, Problem, Threat};
use peer_proto::id::DeploymentId;
use peer_proto::unit::Timestamp;
use peer_state::audit::{self, Entry, Outcome};
use peer_state::database::DatabaseError;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use crate::deployment::{Life, Step, Wanted, restarts_in_row};
use crate::engine::{ContainerFacts, ContainerId, Engine, EngineError};
use crate::inspect;
use crate::logflood::{FloodWatch, LogFile};
use crate::possession;
use crate::profile::{self, ContainerPlan, container_name};
use crate::record::{self, Record};
use crate::room::{Endpoint, Inner};

/// Pause before a transient failure is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How long the engine may be waited on before the row is read again.
const WATCH: Duration = Duration::from_secs(20);
/// How often the log of a running container is measured.
const LOG_SAMPLE: Duration = Duration::from_secs(1);
/// How often leftovers are looked for.
const TIDY: Duration = Duration::from_mins(1);

/// What a round has come to.
enum Round {
    /// The row has changed, or may have: read it again.
    Again,
    /// Nothing to do until somebody changes the row.
    Rest,
    /// Nothing to do for so long, unless somebody changes the row.
    Pause(Duration),
    /// The deployment is gone.
    Gone,
}

/// Why a round could not be finished.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// The deployment cannot go on.
    #[error(transparent)]
    Final(#[from] Problem),
}

/// Drives one deployment until it is gone.
pub(crate) async fn drive<E: Engine>(inner: &Inner<E>, id: DeploymentId, wake: &Notify) {
    loop {
        let pause = match round(inner, id, wake).await {
            Ok(Round::Again) => continue,
            Ok(Round::Gone) => return inner.forget(id),
            Ok(Round::Rest) => None,
            Ok(Round::Pause(pause)) => Some(pause),
            Err(trouble) => Some(after_trouble(inner, id, trouble).await),
        };
        match pause {
            None => wake.notified().await,
            // Whether it was woken or the time is over, the row is read again.
            Some(pause) => drop(timeout(pause, wake.notified()).await),
        }
    }
}

async fn after_trouble<E: Engine>(inner: &Inner<E>, id: DeploymentId, trouble: Trouble) -> Duration {
    let problem = match trouble {
        Trouble::Engine(error) if error.is_transient() => {
            tracing::warn!(deployment = %id, %error, "the engine is tried again");
            return RETRY;
        }
        Trouble::Database(error) => {
            tracing::error!(deployment = %id, %error, "the database is tried again");
            return RETRY;
        }
        Trouble::Engine(error) => error.problem(),
        Trouble::Final(problem) => problem,
    };
    tracing::info!(deployment = %id, code = %problem.code, message = problem.message, "deployment failed");
    if let Err(error) = fail(inner, id, problem).await {
        tracing::error!(deployment = %id, %error, "the database is tried again");
    }
    RETRY
}

/// Ends a deployment that cannot go on. Its owner may have ended it meanwhile; then its failure is of no interest.
pub(crate) async fn fail<E: Engine>(inner: &Inner<E>, id: DeploymentId, problem: Problem) -> Result<(), Trouble> {
    inner
        .change(id, move |record| {
            if record.wanted == Wanted::Running && record.life.state().holds_share() {
                record.step(Step::Fail(problem))
            } else {
                Ok(())
            }
        })
        .await
}

async fn round<E: Engine>(inner: &Inner<E>, id: DeploymentId, wake: &Notify) -> Result<Round, Trouble> {
    let Some(record) = inner.database.write(move |tx| record::find(tx, id)).await? else {
        return Ok(Round::Gone);
    };
    match (record.wanted, &record.life) {
        (Wanted::Removed, Life::Stopped | Life::Failed(_)) => remove(inner, &record).await,
        (_, Life::Stopping) => end(inner, &record).await,
        (Wanted::Restarted, Life::Stopped | Life::Failed(_)) => start_again(inner, id).await,
        (Wanted::Running | Wanted::Stopped, Life::Stopped | Life::Failed(_)) => Ok(Round::Rest),
        (Wanted::Running, Life::Pending | Life::Fetching) => fetch(inner, &record, wake).await,
        (Wanted::Running, Life::Starting(not_before)) => start(inner, &record, *not_before).await,
        (Wanted::Running, Life::Running(since)) => watch(inner, &record, *since, wake).await,
        (_, Life::Pending | Life::Fetching | Life::Starting(_) | Life::Running(_)) => {
            inner.change(id, |record| record.step(Step::Stop)).await?;
            Ok(Round::Again)
        }
    }
}

async fn start_again<E: Engine>(inner: &Inner<E>, id: DeploymentId) -> Result<Round, Trouble> {
    inner
        .change(id, |record| {
            if record.wanted == Wanted::Restarted {
                (record.wanted, record.restarts, record.restarts_in_row) = (Wanted::Running, 0, 0);
                record.step(Step::Start)?;
            }
            Ok(())
        })
        .await?;
    Ok(Round::Again)
}

/// Gets the image, by whichever way the deployment names.
async fn fetch<E: Engine>(inner: &Inner<E>, record: &Record, wake: &Notify) -> Result<Round, Trouble> {
    if record.life == Life::Pending {
        inner.change(record.id, |record| record.step(Step::Fetch)).await?;
    }
    let fetched = tokio::select! {
        image = crate::fetch::image(inner, record) => Some(image?),
        // A stop must not wait for a slow sender.
        () = wake.notified() => None,
    };
    if let Some(image) = fetched {
        inner
            .change(record.id, move |record| {
                record.image = Some(image);
                record.step(Step::Fetched)
            })
            .await?;
    }
    Ok(Round::Again)
}

async fn start<E: Engine>(inner: &Inner<E>, record: &Record, not_before: Option<Timestamp>) -> Result<Round, Trouble> {
    let now = (inner.options.clock)();
    if let Some(wait) = not_before.map(|at| at.since(now)).filter(|wait| *wait > 0) {
        return Ok(Round::Pause(Duration::from_millis(wait)));
    }
    let plan = plan(inner, record).await?;
    let container = prepare(inner, &plan, record).await?;
    inner.engine.start(&container).await?;
    let facts = inner.engine.inspect(container.as_str()).await?;
    let facts = facts.ok_or(EngineError::NoSuchContainer { container: container.to_string() })?;
    check(inner, &plan, &facts, record).await?;
    open_endpoint(inner, record, &facts).await;
    let at = (inner.options.clock)();
    let restarted = not_before.is_some();
    let started = inner
        .change(record.id, move |record| {
            record.step(Step::Started(at))?;
            record.started_at = Some(at);
            record.restarts += u32::from(restarted);
            Ok(())
        })
        .await;
    match started {
        // Its owner has ended it meanwhile: the next round sees to that.
        Err(Trouble::Final(problem)) if problem.code == Code::WrongState => Ok(Round::Again),
        Err(trouble) => Err(trouble),
        Ok(()) => Ok(Round::Again),
    }
}

async fn plan<E: Engine>(inner: &Inner<E>, record: &Record) -> Result<ContainerPlan, Trouble> {
    let image = record.image.ok_or_else(|| Problem::new(Code::NoSuchImage, "the deployment's image is not known"))?;
    let facts = inner.engine.has_image(image).await?.ok_or_else(|| {
        let message =
            format!("image {image} is not in the provider's engine any more; remove the deployment and deploy again");
        Problem::new(Code::NoSuchImage, message)
    })?;
    let engine = inner.engine.facts().await?;
    let uid = profile::uid_for(record.slot, engine.user_namespace)
        .ok_or_else(|| Problem::new(Code::NoCapacity, "no user id is free for one more deployment"))?;
    Ok(profile::plan(&record.specification, &facts, record.id, record.owner, &inner.mark, uid)?)
}

/// A container that equals its plan: the one that is there, or a new one. Anything else is destroyed (I1, I2).
async fn prepare<E: Engine>(inner: &Inner<E>, plan: &ContainerPlan, record: &Record) -> Result<ContainerId, Trouble> {
    let name = plan.name();
    if let Some(existing) = inner.engine.inspect(&name).await? {
        if inspect::differences(plan, &existing.report).is_empty() {
            return Ok(existing.id);
        }
        inner.engine.remove(&existing.id).await?;
    }
    let id = match inner.engine.create(plan).await {
        Ok(id) => id,
        // Made by a call whose answer was lost: the next round finds and judges it.
        Err(EngineError::AlreadyExists { container }) => {
            return Err(EngineError::InUse { message: format!("container {container} has just been made") }.into());
        }
        Err(error) => return Err(error.into()),
    };
    let facts = inner.engine.inspect(id.as_str()).await?;
    let facts = facts.ok_or(EngineError::NoSuchContainer { container: id.to_string() })?;
    check(inner, plan, &facts, record).await?;
    Ok(id)
}

/// The last-moment check of the invariants: a container that differs from its plan is destroyed, audited, and fails.
async fn check<E: Engine>(
    inner: &Inner<E>,
    plan: &ContainerPlan,
    facts: &ContainerFacts,
    record: &Record,
) -> Result<(), Trouble> {
    let differences = inspect::differences(plan, &facts.report);
    if differences.is_empty() {
        return Ok(());
    }
    inner.engine.remove(&facts.id).await?;
    let threat = if differences.iter().any(|difference| difference.to_lowercase().contains("privileged")) {
        Threat::I1
    } else {
        Threat::I2
    };
    let entry = Entry {
        at: (inner.options.clock)(),
        actor: record.owner.to_string(),
        action: "container destroyed".into(),
        outcome: Outcome::Refused(threat),
        detail: format!("deployment {}: {}", record.id, differences.join("; ")),
    };
    inner.database.write(move |tx| audit::append(tx, &entry)).await?;
    let message = format!(
        "the engine made a container that differs from the isolation profile ({}); it has been destroyed",
        differences.join("; ")
    );
    Err(Problem::new(Code::IsolationViolated, message).into())
}

/// Opens the container's network for those who may reach its one port.
async fn open_endpoint<E: Engine>(inner: &Inner<E>, record: &Record, facts: &ContainerFacts) {
    let Some(port) = record.specification.expose else { return };
    match inner.connector.open(&inner.engine, &facts.id).await {
        Ok(namespace) => {
            let publish = record.specification.publish;
            let endpoint = Endpoint { owner: record.owner, port, publish, namespace };
            if let Some(live) = inner.live().get_mut(&record.id) {
                live.endpoint = Some(endpoint);
            }
        }
        // A container that has ended at once has no network; the watch notices its end.
        Err(error) => tracing::info!(deployment = %record.id, %error, "the container's network is not reachable"),
    }
}

/// Watches a running container until it ends, somebody wakes us, or it floods its log.
async fn watch<E: Engine>(
    inner: &Inner<E>,
    record: &Record,
    since: Timestamp,
    wake: &Notify,
) -> Result<Round, Trouble> {
    let name = container_name(&record.id);
    let Some(facts) = inner.engine.inspect(&name).await? else { return ended(inner, record, since, None).await };
    if !facts.running {
        return ended(inner, record, since, Some(facts)).await;
    }
    let reopened = inner.live().get(&record.id).is_some_and(|live| live.endpoint.is_none());
    if reopened && record.specification.expose.is_some() {
        let plan = plan(inner, record).await?;
        check(inner, &plan, &facts, record).await?;
        open_endpoint(inner, record, &facts).await;
        inner.announce(record);
    }
    tokio::select! {
        () = wake.notified() => Ok(Round::Again),
        flooded = flood(&facts) => {
            inner.engine.kill(&facts.id).await?;
            Err(flooded.into())
        }
        waited = inner.engine.wait(&facts.id, WATCH) => match waited {
            Ok(_) | Err(EngineError::TimedOut { .. } | EngineError::NoSuchContainer { .. }) => Ok(Round::Again),
            Err(EngineError::Unavailable { .. }) => interrupted(inner, record).await,
            Err(error) => Err(error.into()),
        },
    }
}

/// The engine has gone away. Once it is back, a container that it took down is started again, whatever the policy: it did
/// not end by itself.
async fn interrupted<E: Engine>(inner: &Inner<E>, record: &Record) -> Result<Round, Trouble> {
    loop {
        sleep(RETRY).await;
        match inner.engine.inspect(&container_name(&record.id)).await {
            Err(EngineError::Unavailable { .. } | EngineError::TimedOut { .. }) => {}
            Ok(Some(facts)) if facts.running => return Ok(Round::Again),
            Ok(_) => break,
            Err(error) => return Err(error.into()),
        }
        let (id, wanted) = (record.id, record.wanted);
        let present = inner.database.write(move |tx| record::find(tx, id)).await?;
        if present.is_none_or(|present| present.wanted != wanted) {
            return Ok(Round::Again);
        }
    }
    inner.change(record.id, |record| record.step(Step::Interrupted)).await?;
    Ok(Round::Again)
}

async fn flood(facts: &ContainerFacts) -> Problem {
    let mut watch = FloodWatch::default();
    let mut last = Instant::now();
    loop {
        sleep(LOG_SAMPLE).await;
        let elapsed = last.elapsed();
        last = Instant::now();
        let sample = facts.log_path.as_deref().and_then(|path| LogFile::read(path).ok());
        if sample.is_some_and(|file| watch.sample(file, elapsed)) {
            let message = format!(
                "the container wrote more than {} a second to its log for several seconds and was ended",
                peer_proto::unit::format_bytes(crate::logflood::RATE_MAX)
            );
            return Problem::new(Code::LogFlood, message);
        }
    }
}

/// The container has ended by itself, or is gone.
async fn ended<E: Engine>(
    inner: &Inner<E>,
    record: &Record,
    since: Timestamp,
    facts: Option<ContainerFacts>,
) -> Result<Round, Trouble> {
    let at = (inner.options.clock)();
    let exit_code = facts.as_ref().and_then(|facts| facts.exit_code);
    let out_of_memory = facts.is_some_and(|facts| facts.out_of_memory);
    let before_reboot = booted_at(at).is_some_and(|boot| since < boot);
    inner
        .change(record.id, move |record| {
            if before_reboot {
                return record.step(Step::Interrupted);
            }
            record.exit_code = exit_code;
            record.step(Step::Ended { exit_code, at })?;
            match &mut record.life {
                Life::Starting(_) => record.restarts_in_row = restarts_in_row(record.restarts_in_row, since, at),
                Life::Failed(problem) if out_of_memory => {
                    problem.message = format!(
                        "the container was killed because it used more than its memory limit of {}; give it more with --memory",
                        record.specification.limits.memory
                    );
                }
                _ => {}
            }
            Ok(())
        })
        .await?;
    Ok(Round::Again)
}

/// When the host was started, by its own count of seconds since then.
fn booted_at(now: Timestamp) -> Option<Timestamp> {
    let uptime = rustix::system::sysinfo().uptime;
    // One second of grace for the rounding of the count.
    let milliseconds = u64::try_from(uptime).ok()?.checked_add(1)?.checked_mul(1000)?;
    Some(Timestamp(now.since(Timestamp(milliseconds))))
}

/// Ends the container. It stays in the engine, so that its log can still be read.
async fn end<E: Engine>(inner: &Inner<E>, record: &Record) -> Result<Round, Trouble> {
    let mut exit_code = record.exit_code;
    let container = inner.engine.inspect(&container_name(&record.id)).await?;
    if let Some(facts) = container.filter(|facts| facts.running) {
        let grace = Duration::from_secs(record.specification.stop_timeout_seconds.into());
        inner.engine.stop(&facts.id, grace).await?;
        let after = inner.engine.inspect(facts.id.as_str()).await?;
        exit_code = after.and_then(|facts| facts.exit_code);
    }
    inner
        .change(record.id, move |record| {
            record.exit_code = exit_code;
            record.step(Step::StopDone)
        })
        .await?;
    Ok(Round::Again)
}

async fn remove<E: Engine>(inner: &Inner<E>, record: &Record) -> Result<Round, Trouble> {
    if let Some(facts) = inner.engine.inspect(&container_name(&record.id)).await? {
        inner.engine.remove(&facts.id).await?;
    }
    let (id, image, now) = (record.id, record.image, (inner.options.clock)());
    inner
        .database
        .write(move |tx| -> Result<(), DatabaseError> {
            if let Some(image) = image {
                possession::used(tx, image, now)?;
            }
            record::delete(tx, id)
        })
        .await?;
    inner.announce_removed(record);
    inner.untidy.notify_one();
    Ok(Round::Gone)
}

impl<E: Engine> Inner<E> {
    /// Changes a row durably, then announces it. A row that is gone is left alone.
    async fn change<F>(&self, id: DeploymentId, change: F) -> Result<(), Trouble>
    where
        F: FnOnce(&mut Record) -> Result<(), Problem> + Send + 'static,
    {
        let changed = self
            .database
            .write(move |tx| -> Result<_, Trouble> {
                let Some(mut record) = record::find(tx, id)? else { return Ok(None) };
                change(&mut record)?;
                record::update(tx, &record)?;
                peer_trust::replay::record_outcome(tx, &record.owner, &record.request, &outcome(&record))?;
                Ok(Some(record))
            })
            .await?;
        if let Some(record) = changed {
            self.announce(&record);
        }
        Ok(())
    }
}

fn outcome(record: &Record) -> String {
    format!("deployment {} ({})", record.id, record.life.state())
}

/// Removes containers of ours that no row knows, and images of ours that nothing uses; at the start and now and then.
pub(crate) async fn tidy_up<E: Engine>(inner: Arc<Inner<E>>) {
    loop {
        let pause = match tidy_once(&inner).await {
            Ok(()) => TIDY,
            Err(Trouble::Engine(error)) if error.is_transient() => RETRY,
            Err(Trouble::Engine(error)) => {
                tracing::warn!(%error, "leftovers could not be removed");
                TIDY
            }
            Err(Trouble::Database(error)) => {
                tracing::error!(%error, "leftovers could not be removed");
                TIDY
            }
            Err(Trouble::Final(problem)) => {
                tracing::warn!(%problem, "leftovers could not be removed");
                TIDY
            }
        };
        if inner.cancel.run_until_cancelled(timeout(pause, inner.untidy.notified())).await.is_none() {
            return;
        }
    }
}

async fn tidy_once<E: Engine>(inner: &Inner<E>) -> Result<(), Trouble> {
    // The engine is asked first: a container whose row is made afterwards is not in its list.
    let containers = inner.engine.list(&inner.mark).await?;
    for container in containers {
        let Some(id) = profile::deployment_of(&container.name) else { continue };
        if inner.database.write(move |tx| record::find(tx, id)).await?.is_none() {
            tracing::info!(container = container.name, "removing a container that no deployment knows");
            inner.engine.remove(&container.id).await?;
        }
    }
    inner.wake_all_but(&inner.database.write(record::all).await?);
    crate::fetch::clean_images(inner).await?;
    inner.transfers.clean();
    Ok(())
}
