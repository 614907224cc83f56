//! Watching a container that runs: its end, the engine's end, and a flood of its log.

use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::StreamExt;
use peer_proto::code::{Code, Problem};
use peer_proto::id::DeploymentId;
use peer_proto::unit::Timestamp;
use peer_state::database::Tx;
use peer_trust::pause::{self, Means};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use super::start::{check, open_endpoint};
use super::{RETRY, Round, Trouble, remove_forwarder};
use crate::deployment::{Life, Step, restarts_in_row};
use crate::engine::{ContainerFacts, Engine, EngineError};
use crate::profile::advice::{EARLY_MILLISECONDS, advise};
use crate::profile::container_name;
use crate::record::{self, Record};
use crate::room::Inner;

/// How long the engine may be waited on before the row is read again.
const WATCH: Duration = Duration::from_secs(20);

/// Watches a running container until it ends, somebody wakes us, or it floods its log.
pub(super) async fn watch<E: Engine>(
    inner: &Inner<E>,
    record: &Record,
    since: Timestamp,
    wake: &Notify,
) -> Result<Round, Trouble> {
    let name = container_name(&record.id);
    let facts = match inner.engine.inspect(&name).await {
        Ok(Some(facts)) if facts.running => facts,
        Ok(facts) => return ended(inner, record, since, facts).await,
        Err(EngineError::Unavailable { .. }) => return interrupted(inner, record).await,
        Err(error) => return Err(error.into()),
    };
    adopt(inner, record, &facts).await?;
    tokio::select! {
        () = wake.notified() => Ok(Round::Again),
        flooded = flood(inner, record.id, &facts) => {
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

/// Judges a container that an earlier daemon left running, and opens its network again.
async fn adopt<E: Engine>(inner: &Inner<E>, record: &Record, facts: &ContainerFacts) -> Result<(), Trouble> {
    judge(inner, record, facts).await?;
    let open = inner.live().get(&record.id).is_none_or(|live| live.endpoint.is_some());
    if !open && record.specification.expose.is_some() {
        open_endpoint(inner, record, facts).await?;
        inner.announce(record);
    }
    Ok(())
}

/// Judges a container that an earlier daemon left, if that has not been done yet.
pub(super) async fn judge<E: Engine>(inner: &Inner<E>, record: &Record, facts: &ContainerFacts) -> Result<(), Trouble> {
    let judged = inner.live().get(&record.id).is_none_or(|live| live.judged);
    if !judged {
        // By what made it, not by what would make it today: an upgrade leaves containers running.
        let id = record.id;
        let told = inner.database.write(move |tx| record::told(tx, id)).await?;
        // Nothing was noted: no container of ours runs then, so that this one differs from whatever it should be.
        check(inner, &told.unwrap_or_default(), facts, record).await?;
        if let Some(live) = inner.live().get_mut(&record.id) {
            live.judged = true;
        }
    }
    Ok(())
}

/// The engine has gone away. Once it is back, a container that does not run any more is started again, whatever the policy
/// and its exit code: an engine that ends takes its containers down, and many a program then ends with code 0.
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

/// Samples the log once a second. What has been seen is kept over rounds and restarts, which a flood could hide behind.
async fn flood<E: Engine>(inner: &Inner<E>, id: DeploymentId, facts: &ContainerFacts) -> Problem {
    let mut samples = inner.engine.log_growth(&facts.id);
    let mut last = Instant::now();
    while let Some(Ok(file)) = samples.next().await {
        let elapsed = last.elapsed();
        last = Instant::now();
        if inner.live().get_mut(&id).is_some_and(|live| live.log.sample(file, elapsed)) {
            let message = format!(
                "the container wrote more than {} a second to its log for several seconds and was ended",
                peer_proto::unit::format_bytes(crate::logflood::RATE_MAX)
            );
            return Problem::new(Code::LogFlood, message);
        }
    }
    // The log cannot be seen now; the next round tries again.
    std::future::pending().await
}

/// Exit code of a program that was killed.
const KILLED: i64 = 128 + 9;

/// The container has ended by itself, or is gone.
///
/// One that the machine's owner has had stopped has not ended by itself, however soon that is seen.
pub(super) async fn ended<E: Engine>(
    inner: &Inner<E>,
    record: &Record,
    since: Timestamp,
    facts: Option<ContainerFacts>,
) -> Result<Round, Trouble> {
    remove_forwarder(inner, record).await?;
    let at = (inner.options.clock)();
    let exit_code = facts.as_ref().and_then(|facts| facts.exit_code);
    let out_of_memory = facts.is_some_and(|facts| facts.out_of_memory);
    // What this daemon has seen running did not end with the host; a clock that was set must not make it seem so.
    let seen = inner.live().get(&record.id).is_some_and(|live| live.judged);
    let before_reboot = !seen && booted_at(at).is_some_and(|boot| since < boot);
    let advice = advice(inner, record, since, at).await;
    let closed = inner.closed.load(Ordering::SeqCst);
    let by_itself = move |tx: &Tx<'_>, record: &Record| {
        let hold = pause::of_deployment(tx, &record.owner, record.id, at)?;
        Ok(!closed && hold.is_none_or(|hold| hold.means == Means::Freeze))
    };
    inner
        .change_if(record.id, by_itself, move |record| {
            // Whoever ended the container may have said why already.
            if !matches!(record.life, Life::Running(_)) {
                return Ok(());
            }
            if before_reboot {
                return record.step(Step::Interrupted);
            }
            record.exit_code = exit_code;
            record.step(Step::Ended { exit_code, at })?;
            match &mut record.life {
                Life::Starting(_) => record.restarts_in_row = restarts_in_row(record.restarts_in_row, since, at),
                // The engine does not always learn the reason in time, and nobody else kills a container that is to run.
                Life::Failed(problem) if out_of_memory || exit_code == Some(KILLED) => {
                    let surely = if out_of_memory { "" } else { "most likely " };
                    problem.message = format!(
                        "the container was killed, {surely}because it used more than its memory limit of {}; give it more with --memory",
                        record.specification.limits.memory
                    );
                }
                Life::Failed(problem) => {
                    if let Some(advice) = advice {
                        problem.message = format!("{}. {advice}", problem.message);
                    }
                }
                _ => {}
            }
            Ok(())
        })
        .await?;
    Ok(Round::Again)
}

/// What may help an image that wanted to run as somebody else, if it ended early.
async fn advice<E: Engine>(inner: &Inner<E>, record: &Record, since: Timestamp, at: Timestamp) -> Option<String> {
    let image = record.image.filter(|_| at.since(since) < EARLY_MILLISECONDS)?;
    let image = inner.engine.has_image(image).await.ok()??;
    advise(&image.wishes, &record.specification)
}

/// When the host was started, by its own count of seconds since then.
fn booted_at(now: Timestamp) -> Option<Timestamp> {
    let uptime = rustix::system::sysinfo().uptime;
    // One second of grace for the rounding of the count.
    let milliseconds = u64::try_from(uptime).ok()?.checked_add(1)?.checked_mul(1000)?;
    Some(Timestamp(now.since(Timestamp(milliseconds))))
}
