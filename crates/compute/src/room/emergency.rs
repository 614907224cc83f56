//! Ending everything at once, and what can be told of it afterwards.

use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use peer_proto::code::Problem;
use peer_proto::id::DeploymentId;
use peer_state::database::{DatabaseError, Tx};
use peer_trust::pause::{self, Means, Pause, Subject};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use super::Room;
use crate::engine::{ContainerSummary, Engine, EngineError, LogOptions};
use crate::profile::forwarder::forwarder_of;
use crate::profile::{container_name, deployment_of};
use crate::record;

/// Pause between two looks at what still runs.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Most bytes of one container's log that are kept.
const LOG_MAX: usize = 1 << 20;
/// How long one container may take to be described.
const DESCRIBE: Duration = Duration::from_secs(5);

/// What became of containers that were to be killed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Killed {
    /// Names of containers that ran and run no more.
    pub stopped: Vec<String>,
    /// Names of containers that may still run.
    pub left: Vec<String>,
    /// What kept them from being killed, or from being found.
    pub problem: Option<Problem>,
}

/// What is known of one deployment and its container.
#[derive(Debug, Clone, PartialEq)]
pub struct Evidence {
    /// The deployment.
    pub id: DeploymentId,
    /// Its row. Values of its environment are its owner's secrets, and are left out.
    pub row: Value,
    /// What the engine says of the container, without those values.
    pub inspection: Option<Value>,
    /// The end of its log.
    pub log: Vec<u8>,
    /// What could not be had.
    pub problems: Vec<String>,
}

/// Closes the machine in an emergency, in one transaction: nothing new is taken, and what runs or is about to may not until
/// the machine's owner resumes it by itself.
pub fn close(tx: &Tx<'_>, pause: &Pause) -> Result<Vec<DeploymentId>, DatabaseError> {
    pause::set(tx, &Subject::Machine, pause)?;
    let held: Vec<_> = record::all(tx)?
        .into_iter()
        .filter(|record| record.life.state().holds_share())
        .map(|record| record.id)
        .collect();
    for id in &held {
        // When it was ended first is what counts.
        if pause::find(tx, &Subject::Deployment(*id))?.is_none_or(|former| former.means < Means::Kill) {
            pause::set(tx, &Subject::Deployment(*id), pause)?;
        }
    }
    Ok(held)
}

/// The mark of this machine's containers in the engine.
pub fn mark(tx: &Tx<'_>) -> Result<String, DatabaseError> {
    record::mark(tx)
}

/// Kills every container that bears this mark, and no other, all at the same time, until none runs or the time is over.
/// Whoever calls it has closed the machine before, so that nothing is started again.
pub async fn kill_all<E: Engine>(engine: &E, mark: &str, within: Duration) -> Killed {
    let end = Instant::now() + within;
    let mut killed = Killed::default();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match timeout(left, running(engine, mark)).await {
            Ok(Ok(running)) => {
                killed.left = running.iter().map(|container| container.name.clone()).collect();
                if running.is_empty() {
                    killed.problem = None;
                    return killed;
                }
                let left = end.saturating_duration_since(Instant::now());
                if timeout(left, kill_each(engine, &running, &mut killed)).await.is_err() {
                    return killed;
                }
            }
            Ok(Err(error)) => {
                killed.problem = Some(error.problem());
                if !error.is_transient() || Instant::now() + LOOK_AGAIN > end {
                    return killed;
                }
            }
            Err(_) => return killed,
        }
        sleep(LOOK_AGAIN).await;
    }
}

async fn kill_each<E: Engine>(engine: &E, running: &[ContainerSummary], killed: &mut Killed) {
    let mut kills: FuturesUnordered<_> = running.iter().map(|container| kill_one(engine, container)).collect();
    while let Some(done) = kills.next().await {
        match done {
            Ok(name) => {
                killed.left.retain(|left| *left != name);
                if !killed.stopped.contains(&name) {
                    killed.stopped.push(name);
                }
            }
            Err(error) => killed.problem = Some(error.problem()),
        }
    }
}

/// Containers that bear our mark and the name of a deployment or its forwarder, and run.
async fn running<E: Engine>(engine: &E, mark: &str) -> Result<Vec<ContainerSummary>, EngineError> {
    let mut containers = engine.list(mark).await?;
    let ours = |name: &str| deployment_of(name).or_else(|| forwarder_of(name)).is_some();
    containers.retain(|container| container.running && ours(&container.name));
    Ok(containers)
}

async fn kill_one<E: Engine>(engine: &E, container: &ContainerSummary) -> Result<String, EngineError> {
    match engine.kill(&container.id).await {
        Ok(()) | Err(EngineError::NoSuchContainer { .. }) => Ok(container.name.clone()),
        Err(error) => Err(error),
    }
}

impl<E: Engine> Room<E> {
    /// Lets nothing run, or lets it run again, as far as what is recorded allows it.
    pub fn set_closed(&self, closed: bool) {
        self.inner.closed.store(closed, Ordering::SeqCst);
        self.wake_all();
    }

    /// Kills every container of ours, all at the same time, until none runs or the time is over. Nothing is started again
    /// until [`Room::set_closed`] says so.
    pub async fn kill_all(&self, within: Duration) -> Killed {
        self.set_closed(true);
        kill_all(&self.inner.engine, &self.inner.mark, within).await
    }

    /// What is known of every deployment here, within so much time. Without an engine, the rows alone.
    pub async fn evidence(&self, within: Duration) -> Result<Vec<Evidence>, DatabaseError> {
        let end = Instant::now() + within;
        let mut found = Vec::new();
        for record in self.all().await? {
            let mut evidence =
                Evidence { id: record.id, row: row(&record), inspection: None, log: Vec::new(), problems: Vec::new() };
            let left = end.saturating_duration_since(Instant::now()).min(DESCRIBE);
            if timeout(left, self.describe(&mut evidence)).await.is_err() {
                evidence.problems.push("the engine did not say more in time".to_owned());
            }
            found.push(evidence);
        }
        Ok(found)
    }

    async fn describe(&self, evidence: &mut Evidence) {
        let facts = match self.inner.engine.inspect(&container_name(&evidence.id)).await {
            Ok(Some(facts)) => facts,
            Ok(None) => return,
            Err(error) => return evidence.problems.push(error.to_string()),
        };
        let mut report = serde_json::to_value(&facts.report).unwrap_or_default();
        if let Some(variables) = report.pointer_mut("/Config/Env").and_then(Value::as_array_mut) {
            for variable in variables {
                let name = variable.as_str().and_then(|text| text.split('=').next()).unwrap_or_default().to_owned();
                *variable = Value::from(name);
            }
        }
        evidence.inspection = Some(report);
        let options = LogOptions { tail: Some(10_000), ..LogOptions::default() };
        let mut lines = self.inner.engine.logs(&facts.id, &options);
        while let Some(line) = lines.next().await {
            match line {
                Ok(line) => evidence.log.extend(format!("{} {:?} {}", line.at.0, line.output, line.text).bytes()),
                Err(error) => return evidence.problems.push(error.to_string()),
            }
            if evidence.log.len() > 2 * LOG_MAX {
                evidence.log.drain(..LOG_MAX);
            }
        }
        let surplus = evidence.log.len().saturating_sub(LOG_MAX);
        evidence.log.drain(..surplus);
    }
}

fn row(record: &record::Record) -> Value {
    let mut status = record.status();
    for variable in &mut status.specification.environment {
        variable.value.clear();
    }
    let source = match &record.source {
        peer_proto::deploy::ImageSource::Offered(offer) => format!("brought by its owner: {}", offer.digest()),
        peer_proto::deploy::ImageSource::Registry(reference) => format!("pulled: {reference}"),
    };
    json!({
        "owner": record.owner.to_string(),
        "wanted": format!("{:?}", record.wanted),
        "image_source": source,
        "request": record.request.to_string(),
        "slot": record.slot,
        "status": status,
    })
}
