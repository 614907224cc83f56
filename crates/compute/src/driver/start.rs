//! Starting a container: made from its plan, judged before it runs and once more when it does.

use std::time::Duration;

use bollard::models::ContainerCreateBody;
use peer_proto::code::{Code, Problem, Threat};
use peer_proto::id::DeploymentId;
use peer_proto::unit::Timestamp;
use peer_state::audit::{self, Entry, Outcome};
use peer_state::database::DatabaseError;
use peer_trust::authorise::may_go_on;
use tokio::time::Instant;

use super::{Round, Trouble};
use crate::deployment::{PAUSE_MAX_MILLISECONDS, Step};
use crate::engine::{ContainerFacts, ContainerId, Engine, EngineError};
use crate::inspect;
use crate::profile::{self, ContainerPlan};
use crate::record::{self, Record};
use crate::room::{Endpoint, Inner};

pub(super) async fn start<E: Engine>(
    inner: &Inner<E>,
    record: &Record,
    not_before: Option<Timestamp>,
) -> Result<Round, Trouble> {
    let now = (inner.options.clock)();
    if let Some(wait) = not_before.and_then(|at| still_to_wait(inner, record.id, at, now)) {
        return Ok(Round::Pause(wait));
    }
    let owner = record.owner;
    if !inner.database.write(move |tx| may_go_on(tx, &owner, now)).await? {
        let message = "its owner's permission to deploy on this machine has ended, so that it is not started again";
        return Err(Problem::new(Code::NotGranted, message).into());
    }
    let plan = plan(inner, record).await?;
    let container = prepare(inner, &plan, record).await?;
    inner.engine.start(&container).await?;
    let facts = inner.engine.began(&container).await?;
    check(inner, &profile::body(&plan), &facts, record).await?;
    if let Some(problem) = not_begun(&facts) {
        return Err(problem.into());
    }
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

pub(super) async fn plan<E: Engine>(inner: &Inner<E>, record: &Record) -> Result<ContainerPlan, Trouble> {
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
    let (id, name, told) = (record.id, plan.name(), profile::body(plan));
    let existing = inner.engine.inspect(&name).await?;
    let equal = existing.as_ref().is_some_and(|facts| inspect::differences(plan, &facts.report).is_empty());
    let judged_by = told.clone();
    let before = inner
        .database
        .write(move |tx| -> Result<_, DatabaseError> {
            let before = record::told(tx, id)?;
            record::tell(tx, id, &judged_by)?;
            Ok(before)
        })
        .await?;
    match existing {
        Some(facts) if equal => return Ok(facts.id),
        Some(facts) => {
            // An older version of this program made it so; anything else has been tampered with, which is audited.
            check(inner, before.as_ref().unwrap_or(&told), &facts, record).await.or_else(no_violation)?;
            inner.engine.remove(&facts.id).await?;
        }
        None => {}
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
    check(inner, &told, &facts, record).await?;
    Ok(id)
}

/// A container that is to be replaced anyway may differ: that it did is in the audit log.
fn no_violation(trouble: Trouble) -> Result<(), Trouble> {
    match trouble {
        Trouble::Final(problem) if problem.code == Code::IsolationViolated => Ok(()),
        trouble => Err(trouble),
    }
}

/// The last-moment check of the invariants: a container that differs from what the engine was told is destroyed, audited,
/// and fails.
pub(super) async fn check<E: Engine>(
    inner: &Inner<E>,
    told: &ContainerCreateBody,
    facts: &ContainerFacts,
    record: &Record,
) -> Result<(), Trouble> {
    let differences = inspect::differences_from(&profile::container_name(&record.id), told, &facts.report);
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
        "the engine's container differs from the isolation profile ({}); it has been destroyed",
        differences.join("; ")
    );
    Err(Problem::new(Code::IsolationViolated, message).into())
}

/// How long a restart has to wait still. The wall clock is looked at once; from there on the pause is counted by the monotonic
/// clock, and never longer than any pause is, wherever the wall clock goes.
fn still_to_wait<E>(inner: &Inner<E>, id: DeploymentId, at: Timestamp, now: Timestamp) -> Option<Duration> {
    let longest = Duration::from_millis(PAUSE_MAX_MILLISECONDS);
    let mut live = inner.live();
    let live = live.get_mut(&id)?;
    let due = match live.due {
        Some((known, due)) if known == at => due,
        _ => Instant::now() + Duration::from_millis(at.since(now)).min(longest),
    };
    live.due = Some((at, due));
    Some(due.saturating_duration_since(Instant::now())).filter(|wait| !wait.is_zero())
}

/// Exit codes by which init, like a shell, says that a program could not be begun.
fn not_begun(facts: &ContainerFacts) -> Option<Problem> {
    let why = match facts.exit_code.filter(|_| !facts.running)? {
        126 => "cannot be executed",
        127 => "was not found",
        _ => return None,
    };
    let message =
        format!("the container ended at once: its program {why}; `peerctl logs` shows the name that was tried");
    Some(Problem::new(Code::ContainerExited, message))
}

/// Opens the container's network for those who may reach its one port.
pub(super) async fn open_endpoint<E: Engine>(inner: &Inner<E>, record: &Record, facts: &ContainerFacts) {
    let Some(port) = record.specification.expose else { return };
    match inner.engine.network(&facts.id).await {
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
