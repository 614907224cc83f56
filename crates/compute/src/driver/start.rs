//! Starting a container: made from its plan, judged before it runs and once more when it does.

use std::time::Duration;

use bollard::models::ContainerCreateBody;
use peer_proto::code::{Code, Problem, Threat};
use peer_proto::id::DeploymentId;
use peer_proto::unit::Timestamp;
use peer_state::audit::{self, Entry, Outcome};
use peer_state::database::DatabaseError;
use peer_trust::authorise::may_go_on;
use peer_trust::refusal::Refusal;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Round, Trouble};
use crate::connector::ConnectError;
use crate::deployment::{PAUSE_MAX_MILLISECONDS, Step};
use crate::engine::{ContainerFacts, ContainerId, Engine, EngineError, Planned};
use crate::inspect;
use crate::ledger;
use crate::order::Order;
use crate::profile;
use crate::record::{self, Record};
use crate::room::{Endpoint, Inner};
use crate::wall::attach;

pub(super) async fn start<E: Engine>(
    inner: &Inner<E>,
    record: &Record,
    not_before: Option<Timestamp>,
) -> Result<Round, Trouble> {
    let now = (inner.options.clock)();
    if let Some(wait) = not_before.and_then(|at| still_to_wait(inner, record.id, at, now)) {
        return Ok(Round::Pause(wait));
    }
    still_granted(inner, record, now).await?;
    let planned = plan(inner, record).await?;
    let facts = match run(inner, &planned, record).await {
        Err(Trouble::Engine(error @ EngineError::Violated { .. })) => return Err(violated(inner, record, error).await?),
        other => other?,
    };
    if let Some(problem) = not_begun(&facts) {
        return Err(problem.into());
    }
    open_endpoint(inner, record, &facts).await?;
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

/// Its owner's grant may have ended or been narrowed since it was accepted.
async fn still_granted<E: Engine>(inner: &Inner<E>, record: &Record, now: Timestamp) -> Result<(), Trouble> {
    let one = record.clone();
    let decision = inner
        .database
        .write(move |tx| -> Result<_, DatabaseError> {
            let held = ledger::held_before(&record::of_owner(tx, &one.owner)?, &one);
            let decision = may_go_on(tx, &one.owner, now, held, &one.specification)?;
            if let Err(refusal) = &decision {
                let entry = Entry {
                    at: now,
                    actor: one.owner.to_string(),
                    action: "start".into(),
                    outcome: Outcome::Refused(refusal.threat),
                    detail: format!("deployment {}: {}", one.id, refusal.problem.message),
                };
                audit::append(tx, &entry)?;
            }
            Ok(decision)
        })
        .await?;
    decision.map_err(|Refusal { problem, .. }| {
        Problem::new(problem.code, format!("the deployment is not started: {}", problem.message)).into()
    })
}

/// Has the engine's side decide how the container runs, from what the owner signed.
async fn plan<E: Engine>(inner: &Inner<E>, record: &Record) -> Result<Planned, Trouble> {
    let image = record.image.ok_or_else(|| Problem::new(Code::NoSuchImage, "the deployment's image is not known"))?;
    let id = record.id;
    let one = record.clone();
    let kept = inner.database.write(move |tx| -> Result<_, DatabaseError> {
        let signer = record::signer(tx, &one)?;
        Ok(record::kept(tx, id)?.map(|(audience, envelope)| (signer, audience, envelope)))
    });
    let (owner, audience, envelope) = kept.await?.ok_or_else(|| {
        let message =
            "the deployment was made by a version that did not keep the signed request; remove it and deploy again";
        Problem::new(Code::WrongState, message)
    })?;
    let (slot, node) = (record.slot, inner.mark.clone());
    let attachment = attach::attach(inner, record).await?;
    let order = Order { owner, audience, envelope, image, slot, node, attachment };
    match inner.engine.plan(&order).await {
        Ok(planned) if planned.deployment == id => Ok(planned),
        Ok(_) => Err(Problem::new(Code::Internal, "the signed request that was kept is another deployment's").into()),
        Err(EngineError::NoSuchImage { image }) => {
            let message = format!(
                "image {image} is not in the provider's engine any more; remove the deployment and deploy again"
            );
            Err(Problem::new(Code::NoSuchImage, message).into())
        }
        Err(error) => Err(error.into()),
    }
}

async fn run<E: Engine>(inner: &Inner<E>, planned: &Planned, record: &Record) -> Result<ContainerFacts, Trouble> {
    let container = prepare(inner, planned, record).await?;
    inner.engine.start(&container).await?;
    Ok(inner.engine.began(&container).await?)
}

/// A container that equals its plan: the one that is there, or a new one. Anything else is destroyed (I1, I2).
async fn prepare<E: Engine>(inner: &Inner<E>, planned: &Planned, record: &Record) -> Result<ContainerId, Trouble> {
    let (id, name, told) = (record.id, profile::container_name(&record.id), &planned.told);
    let existing = inner.engine.inspect(&name).await?;
    let equal = existing.as_ref().is_some_and(|facts| inspect::differences_from(&name, told, &facts.report).is_empty());
    let judged_by = told.clone();
    let before = inner
        .database
        .write(move |tx| -> Result<_, DatabaseError> {
            let before = record::told(tx, id)?;
            if before.as_ref() != Some(&judged_by) {
                record::tell(tx, id, &judged_by)?;
            }
            Ok(before)
        })
        .await?;
    match existing {
        Some(facts) if equal => return Ok(facts.id),
        Some(facts) => {
            // An older version of this program made it so; anything else has been tampered with, which is audited.
            check(inner, before.as_ref().unwrap_or(told), &facts, record).await.or_else(no_violation)?;
            inner.engine.remove(&facts.id).await?;
        }
        None => {}
    }
    match inner.engine.create(id).await {
        // Made by a call whose answer was lost: the next round finds and judges it.
        Err(EngineError::AlreadyExists { container }) => {
            Err(EngineError::InUse { message: format!("container {container} has just been made") }.into())
        }
        made => Ok(made?),
    }
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
    Err(violated(inner, record, EngineError::Violated { differences: differences.join("; ") }).await?)
}

/// Audits that a container has been destroyed because it differed.
async fn violated<E: Engine>(inner: &Inner<E>, record: &Record, error: EngineError) -> Result<Trouble, DatabaseError> {
    let problem = error.problem();
    let threat = if problem.message.to_lowercase().contains("privileged") { Threat::I1 } else { Threat::I2 };
    let entry = Entry {
        at: (inner.options.clock)(),
        actor: record.owner.to_string(),
        action: "container destroyed".into(),
        outcome: Outcome::Refused(threat),
        detail: format!("deployment {}: {}", record.id, problem.message),
    };
    inner.database.write(move |tx| audit::append(tx, &entry)).await?;
    Ok(problem.into())
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
pub(super) async fn open_endpoint<E: Engine>(
    inner: &Inner<E>,
    record: &Record,
    facts: &ContainerFacts,
) -> Result<(), DatabaseError> {
    let Some(port) = record.specification.expose else { return Ok(()) };
    match inner.engine.network(&facts.id, port).await {
        Ok(network) => {
            let publish = record.specification.publish;
            let closed = CancellationToken::new();
            let guard = closed.clone().drop_guard();
            let endpoint = Endpoint { owner: record.owner, port, publish, network, closed };
            if let Some(live) = inner.live().get_mut(&record.id) {
                live.open = Some(guard);
                live.endpoint = Some(endpoint);
            }
        }
        Err(ConnectError::Engine(error @ EngineError::Violated { .. })) => {
            tracing::error!(deployment = %record.id, %error, "the forwarder to the container may not run");
            violated(inner, record, error).await?;
        }
        Err(error @ (ConnectError::NotPermitted | ConnectError::Elsewhere)) => {
            tracing::warn!(deployment = %record.id, %error, "the container's network is not reachable");
        }
        // A container that has ended at once has no network; the watch notices its end.
        Err(error) => tracing::info!(deployment = %record.id, %error, "the container's network is not reachable"),
    }
    Ok(())
}
