//! Starting a container: made from its plan, judged before it runs and once more when it does.

use std::time::Duration;

use peer_proto::code::{Code, Problem, Threat};
use peer_proto::unit::Timestamp;
use peer_state::audit::{self, Entry, Outcome};

use super::{Round, Trouble};
use crate::deployment::Step;
use crate::engine::{ContainerFacts, ContainerId, Engine, EngineError};
use crate::inspect;
use crate::profile::{self, ContainerPlan};
use crate::record::Record;
use crate::room::{Endpoint, Inner};

pub(super) async fn start<E: Engine>(
    inner: &Inner<E>,
    record: &Record,
    not_before: Option<Timestamp>,
) -> Result<Round, Trouble> {
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
pub(super) async fn check<E: Engine>(
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
pub(super) async fn open_endpoint<E: Engine>(inner: &Inner<E>, record: &Record, facts: &ContainerFacts) {
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
