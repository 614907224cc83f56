//! The task that moves one deployment towards what its owner wants.
//!
//! It is level-triggered: each round reads the row, looks at the engine where it must, makes one durable step, and begins
//! again. A crash between any two lines is therefore the same as a pause: the next start reads the row and goes on.

mod pause;
mod start;
mod tidy;
mod watch;

use std::sync::atomic::Ordering;
use std::time::Duration;

use peer_proto::code::Problem;
use peer_proto::id::DeploymentId;
use peer_state::database::{DatabaseError, Tx};
use peer_trust::pause as hold;
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::deployment::{Life, Step, Wanted};
use crate::engine::{Engine, EngineError};
use crate::possession;
use crate::profile::container_name;
use crate::profile::forwarder::forwarder_name;
use crate::record::{self, Record};
use crate::room::Inner;

pub(crate) use tidy::tidy_up;

/// How long a program is given to end whose owner may not run it here any more.
const WITHDRAWN_GRACE: Duration = Duration::from_secs(1);
/// Pause before a transient failure is tried again.
const RETRY: Duration = Duration::from_secs(1);

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
    let now = (inner.options.clock)();
    let found = inner.database.write(move |tx| -> Result<_, DatabaseError> {
        let Some(record) = record::find(tx, id)? else { return Ok(None) };
        let hold = hold::of_deployment(tx, &record.owner, id, now)?;
        Ok(Some((record, hold)))
    });
    let Some((record, hold)) = found.await? else { return Ok(Round::Gone) };
    let hold = if inner.closed.load(Ordering::SeqCst) { Some(hold::emergency()) } else { hold };
    match (record.wanted, &record.life) {
        (Wanted::Running, Life::Starting(_) | Life::Running(_)) if let Some(hold) = hold => {
            pause::pause(inner, &record, &hold).await
        }
        (Wanted::Running, Life::Paused(_, since)) => match hold {
            Some(hold) => pause::keep(inner, &record, *since, &hold).await,
            None => pause::resume(inner, &record, *since).await,
        },
        (Wanted::Removed, Life::Stopped | Life::Failed(_)) => remove(inner, &record).await,
        (_, Life::Stopping) => end(inner, &record).await,
        (Wanted::Restarted, Life::Stopped | Life::Failed(_)) => start_again(inner, id).await,
        (Wanted::Running | Wanted::Stopped, Life::Stopped | Life::Failed(_)) => Ok(Round::Rest),
        (Wanted::Running, Life::Pending | Life::Fetching) => fetch(inner, &record, wake).await,
        (Wanted::Running, Life::Starting(not_before)) => start::start(inner, &record, *not_before).await,
        (Wanted::Running, Life::Running(since)) => watch::watch(inner, &record, *since, wake).await,
        (_, Life::Pending | Life::Fetching | Life::Starting(_) | Life::Running(_) | Life::Paused(..)) => {
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
                record.reason = None;
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

/// Ends the container. It stays in the engine, so that its log can still be read.
async fn end<E: Engine>(inner: &Inner<E>, record: &Record) -> Result<Round, Trouble> {
    let mut exit_code = record.exit_code;
    let container = inner.engine.inspect(&container_name(&record.id)).await?;
    if let Some(facts) = container.filter(|facts| facts.running) {
        let grace = Duration::from_secs(record.specification.stop_timeout_seconds.into());
        let grace = if record.reason.is_some() { grace.min(WITHDRAWN_GRACE) } else { grace };
        inner.engine.stop(&facts.id, grace).await?;
        let after = inner.engine.inspect(facts.id.as_str()).await?;
        exit_code = after.and_then(|facts| facts.exit_code);
    }
    remove_forwarder(inner, record).await?;
    inner
        .change(record.id, move |record| {
            record.exit_code = exit_code;
            record.step(Step::StopDone)
        })
        .await?;
    Ok(Round::Again)
}

/// A forwarder ends with its guest; what is left of it goes at once.
async fn remove_forwarder<E: Engine>(inner: &Inner<E>, record: &Record) -> Result<(), Trouble> {
    if record.specification.expose.is_some()
        && let Some(facts) = inner.engine.inspect(&forwarder_name(&record.id)).await?
    {
        inner.engine.remove(&facts.id).await?;
    }
    Ok(())
}

async fn remove<E: Engine>(inner: &Inner<E>, record: &Record) -> Result<Round, Trouble> {
    remove_forwarder(inner, record).await?;
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
        self.change_if(id, |_, _| Ok(true), change).await
    }

    /// The same, unless `check` finds in the same transaction that it must not be so.
    async fn change_if<C, F>(&self, id: DeploymentId, check: C, change: F) -> Result<(), Trouble>
    where
        C: FnOnce(&Tx<'_>, &Record) -> Result<bool, DatabaseError> + Send + 'static,
        F: FnOnce(&mut Record) -> Result<(), Problem> + Send + 'static,
    {
        let changed = self
            .database
            .write(move |tx| -> Result<_, Trouble> {
                let Some(mut record) = record::find(tx, id)? else { return Ok(None) };
                if !check(tx, &record)? {
                    return Ok(None);
                }
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
