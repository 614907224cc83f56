//! Keeping a deployment from running because the machine's owner wants it so, and letting it go on.
//!
//! Why it is held is asked for anew in each round, so that nothing here depends on having seen it begin or end.

use std::time::Duration;

use peer_proto::unit::Timestamp;
use peer_trust::pause::{Hold, Means};

use super::watch::{ended, judge};
use super::{Round, Trouble, remove_forwarder};
use crate::deployment::{Life, Step};
use crate::engine::{ContainerFacts, Engine, EngineError};
use crate::profile::container_name;
use crate::record::Record;
use crate::room::Inner;

/// How long a paused deployment is left alone: hours pass without anybody's telling.
const LOOK_AGAIN: Duration = Duration::from_secs(20);

/// Pauses what starts or runs.
pub(super) async fn pause<E: Engine>(inner: &Inner<E>, record: &Record, hold: &Hold) -> Result<Round, Trouble> {
    let facts = inner.engine.inspect(&container_name(&record.id)).await?;
    let running = facts.as_ref().filter(|facts| facts.running);
    let frozen = match (&record.life, running) {
        (Life::Running(_), Some(facts)) if hold.means == Means::Freeze => freeze(inner, record, facts).await?,
        // It ended by itself, just before it would have been frozen.
        (Life::Running(since), None) if hold.means == Means::Freeze => {
            return ended(inner, record, *since, facts).await;
        }
        (_, Some(facts)) => {
            end(inner, record, facts, hold.means).await?;
            false
        }
        (_, None) => false,
    };
    note(inner, record, hold, frozen).await
}

/// Sees to it that a paused deployment stays so, by the means that is asked for now.
pub(super) async fn keep<E: Engine>(
    inner: &Inner<E>,
    record: &Record,
    since: Option<Timestamp>,
    hold: &Hold,
) -> Result<Round, Trouble> {
    let facts = inner.engine.inspect(&container_name(&record.id)).await?;
    let running = facts.filter(|facts| facts.running);
    let frozen = match running {
        None => false,
        Some(facts) if facts.frozen && hold.means == Means::Freeze && since.is_some() => true,
        Some(facts) if hold.means == Means::Freeze && since.is_some() => freeze(inner, record, &facts).await?,
        Some(facts) => {
            end(inner, record, &facts, hold.means).await?;
            false
        }
    };
    let told = inner.is_told_paused(record);
    let same = matches!(&record.life, Life::Paused(problem, _) if *problem == hold.problem);
    if same && told && frozen == since.is_some() {
        return Ok(Round::Pause(LOOK_AGAIN));
    }
    note(inner, record, hold, frozen).await
}

/// Lets a deployment go on that nothing holds any more.
pub(super) async fn resume<E: Engine>(
    inner: &Inner<E>,
    record: &Record,
    since: Option<Timestamp>,
) -> Result<Round, Trouble> {
    if since.is_some() {
        let facts = inner.engine.inspect(&container_name(&record.id)).await?;
        let Some(facts) = facts.filter(|facts| facts.running) else {
            // The engine or the host took it down meanwhile.
            let Life::Paused(problem, _) = record.life.clone() else { return Ok(Round::Again) };
            inner.change(record.id, |record| record.step(Step::Hold(problem))).await?;
            return Ok(Round::Again);
        };
        // A container that is not the one that was frozen must not run for a moment.
        judge(inner, record, &facts).await?;
        inner.engine.unpause(&facts.id).await?;
    }
    inner.change(record.id, |record| record.step(Step::Resume)).await?;
    Ok(Round::Again)
}

/// Freezes a running container, and says whether it could be. One that cannot be is stopped.
async fn freeze<E: Engine>(inner: &Inner<E>, record: &Record, facts: &ContainerFacts) -> Result<bool, Trouble> {
    match inner.engine.pause(&facts.id).await {
        Ok(()) => Ok(true),
        Err(error @ (EngineError::Refused { .. } | EngineError::Failed { .. })) => {
            tracing::warn!(deployment = %record.id, %error, "it cannot be frozen and is stopped instead");
            end(inner, record, facts, Means::Stop).await?;
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

async fn end<E: Engine>(
    inner: &Inner<E>,
    record: &Record,
    facts: &ContainerFacts,
    means: Means,
) -> Result<(), Trouble> {
    let grace = Duration::from_secs(record.specification.stop_timeout_seconds.into());
    match means {
        Means::Kill => inner.engine.kill(&facts.id).await?,
        Means::Freeze | Means::Stop => inner.engine.stop(&facts.id, grace).await?,
    }
    Ok(())
}

/// Records how it stands. Its owner may have ended it meanwhile: the next round sees to that.
async fn note<E: Engine>(inner: &Inner<E>, record: &Record, hold: &Hold, frozen: bool) -> Result<Round, Trouble> {
    let problem = hold.problem.clone();
    let step = if frozen { Step::Freeze(problem) } else { Step::Hold(problem) };
    match inner.change(record.id, |record| record.step(step)).await {
        Err(Trouble::Final(problem)) if problem.code == peer_proto::code::Code::WrongState => Ok(Round::Again),
        Err(trouble) => Err(trouble),
        Ok(()) => {
            // Nobody reaches it now, frozen or not: its way in is made anew when it goes on.
            remove_forwarder(inner, record).await?;
            Ok(Round::Again)
        }
    }
}
