//! Containers: create, inspect, start, end, wait, list.

use std::{collections::HashMap, time::Duration};

use bollard::{
    Docker,
    errors::Error,
    models::{ContainerCreateBody, ContainerInspectResponse, ContainerStateStatusEnum, ContainerSummaryStateEnum},
    query_parameters::{
        CreateContainerOptionsBuilder, InspectContainerOptions, KillContainerOptionsBuilder,
        ListContainersOptionsBuilder, RemoveContainerOptionsBuilder, StartContainerOptions,
        StopContainerOptionsBuilder, WaitContainerOptionsBuilder,
    },
};
use futures::StreamExt;
use peer_proto::id::Digest;
use tokio::time::timeout;

use super::{CHANGE, DockerEngine, LOOK_UP, call, failure, logs::parse_time};
use crate::{
    engine::{ContainerFacts, ContainerId, ContainerSummary, EngineError, quote},
    profile::{self, ContainerPlan, NODE_LABEL},
};

impl DockerEngine {
    pub(super) async fn create_container(&self, plan: &ContainerPlan) -> Result<ContainerId, EngineError> {
        self.create_body(&plan.name(), &plan.image(), profile::body(plan)).await
    }

    /// Makes a container of what a profile of ours has built.
    pub(super) async fn create_body(
        &self,
        name: &str,
        image: &Digest,
        body: ContainerCreateBody,
    ) -> Result<ContainerId, EngineError> {
        let options = CreateContainerOptionsBuilder::default().name(name).build();
        let creation = self.client()?.create_container(Some(options), body);
        match timeout(CHANGE, creation)
            .await
            .map_err(|_| EngineError::TimedOut { operation: "create container".into() })?
        {
            Ok(answer) => {
                // A weight that the kernel has not is discarded, as the check of what was made expects.
                for warning in answer.warnings.iter().filter(|warning| !warning.contains("Weight discarded")) {
                    tracing::warn!(container = %name, warning = %quote(warning), "the engine warns");
                }
                answer.id.parse()
            }
            Err(error) => Err(match failure::status(&error) {
                Some(404) => EngineError::NoSuchImage { image: image.to_string() },
                Some(409) => EngineError::AlreadyExists { container: name.to_owned() },
                _ => failure::translate("create container", error),
            }),
        }
    }

    pub(super) async fn inspect_container(&self, name: &str) -> Result<Option<ContainerFacts>, EngineError> {
        inspect(self.client()?, name).await
    }

    pub(super) async fn start_container(&self, id: &ContainerId) -> Result<(), EngineError> {
        let start = self.client()?.start_container(id.as_str(), None::<StartContainerOptions>);
        on_container("start container", id, CHANGE, start, &[304]).await
    }

    pub(super) async fn stop_container(&self, id: &ContainerId, grace: Duration) -> Result<(), EngineError> {
        let seconds = i32::try_from(grace.as_secs()).unwrap_or(i32::MAX);
        let options = StopContainerOptionsBuilder::default().t(seconds).build();
        let stop = self.client()?.stop_container(id.as_str(), Some(options));
        on_container("stop container", id, CHANGE + grace, stop, &[304]).await
    }

    pub(super) async fn kill_container(&self, id: &ContainerId) -> Result<(), EngineError> {
        let options = KillContainerOptionsBuilder::default().signal("SIGKILL").build();
        let kill = self.client()?.kill_container(id.as_str(), Some(options));
        // 409: it does not run.
        on_container("kill container", id, CHANGE, kill, &[409]).await
    }

    pub(super) async fn pause_container(&self, id: &ContainerId) -> Result<(), EngineError> {
        let pause = self.client()?.pause_container(id.as_str());
        unless_so(on_container("pause container", id, CHANGE, pause, &[]).await, "is already paused")
    }

    pub(super) async fn unpause_container(&self, id: &ContainerId) -> Result<(), EngineError> {
        let unpause = self.client()?.unpause_container(id.as_str());
        unless_so(on_container("unpause container", id, CHANGE, unpause, &[]).await, "is not paused")
    }

    pub(super) async fn remove_container(&self, id: &ContainerId) -> Result<(), EngineError> {
        let options = RemoveContainerOptionsBuilder::default().v(true).force(true).build();
        let removal = self.client()?.remove_container(id.as_str(), Some(options));
        match on_container("remove container", id, CHANGE, removal, &[404]).await {
            // "removal is already in progress": done once it is gone.
            Err(EngineError::InUse { message }) if message.contains("already in progress") => {
                self.await_removal(id).await
            }
            other => other,
        }
    }

    async fn await_removal(&self, id: &ContainerId) -> Result<(), EngineError> {
        let gone = async {
            while self.inspect_container(id.as_str()).await?.is_some() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Ok(())
        };
        timeout(CHANGE, gone).await.map_err(|_| EngineError::TimedOut { operation: "remove container".into() })?
    }

    pub(super) async fn wait_container(&self, id: &ContainerId, within: Duration) -> Result<Option<i64>, EngineError> {
        let options = WaitContainerOptionsBuilder::default().condition("not-running").build();
        let mut answers = self.client()?.wait_container(id.as_str(), Some(options)).boxed();
        match timeout(within, answers.next()).await {
            Err(_) => Ok(None),
            Ok(Some(Ok(answer))) => Ok(Some(answer.status_code)),
            // The client takes every code above zero for an error.
            Ok(Some(Err(Error::DockerContainerWaitError { code, .. }))) => Ok(Some(code)),
            Ok(Some(Err(error))) if failure::status(&error) == Some(404) => Err(no_such(id)),
            Ok(Some(Err(error))) => Err(failure::translate("wait for container", error)),
            Ok(None) => Err(EngineError::Unavailable { reason: "it hung up while a container ran".into() }),
        }
    }

    pub(super) async fn list_containers(&self, node: &str) -> Result<Vec<ContainerSummary>, EngineError> {
        let filters = HashMap::from([("label", vec![format!("{NODE_LABEL}={node}")])]);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let found = call("list containers", LOOK_UP, self.client()?.list_containers(Some(options))).await?;
        let summary = |found: bollard::models::ContainerSummary| {
            let name = found.names.unwrap_or_default().into_iter().next().unwrap_or_default();
            Ok(ContainerSummary {
                id: found.id.unwrap_or_default().parse()?,
                name: name.trim_start_matches('/').to_owned(),
                running: matches!(
                    found.state,
                    Some(ContainerSummaryStateEnum::RUNNING | ContainerSummaryStateEnum::PAUSED)
                ),
                ended: found.state == Some(ContainerSummaryStateEnum::EXITED),
                labels: found.labels.unwrap_or_default().into_iter().collect(),
            })
        };
        found.into_iter().map(summary).collect()
    }
}

/// Asks for one container by its id or name.
pub(super) async fn inspect(client: &Docker, name: &str) -> Result<Option<ContainerFacts>, EngineError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if name.is_empty() || name.len() > 255 || name.starts_with('.') || !name.bytes().all(plain) {
        return Err(EngineError::Refused { message: format!("'{}' is not a container's name", quote(name)) });
    }
    let inspection = client.inspect_container(name, None::<InspectContainerOptions>);
    match timeout(LOOK_UP, inspection)
        .await
        .map_err(|_| EngineError::TimedOut { operation: "inspect container".into() })?
    {
        Ok(report) => facts_of(report).map(Some),
        Err(error) if failure::status(&error) == Some(404) => Ok(None),
        Err(error) => Err(failure::translate("inspect container", error)),
    }
}

fn no_such(id: &ContainerId) -> EngineError {
    EngineError::NoSuchContainer { container: id.to_string() }
}

/// A change of one container, with the statuses that mean "that is so already".
async fn on_container(
    operation: &'static str,
    id: &ContainerId,
    within: Duration,
    change: impl Future<Output = Result<(), Error>>,
    already: &[u16],
) -> Result<(), EngineError> {
    match timeout(within, change).await.map_err(|_| EngineError::TimedOut { operation: operation.into() })? {
        Ok(()) => Ok(()),
        Err(error) => match failure::status(&error) {
            Some(status) if already.contains(&status) => match status {
                409 if !error.to_string().contains("is not running") => Err(failure::translate(operation, error)),
                _ => Ok(()),
            },
            Some(404) => Err(no_such(id)),
            _ => Err(failure::translate(operation, error)),
        },
    }
}

/// The engine has no status of its own for "that is so already" here, only words.
fn unless_so(done: Result<(), EngineError>, so: &str) -> Result<(), EngineError> {
    match done {
        Err(error) if error.to_string().contains(so) => Ok(()),
        done => done,
    }
}

pub(crate) fn facts_of(report: ContainerInspectResponse) -> Result<ContainerFacts, EngineError> {
    let state = report.state.clone().unwrap_or_default();
    let running = state.running.unwrap_or_default();
    let created = state.status == Some(ContainerStateStatusEnum::CREATED);
    let labels =
        report.config.as_ref().and_then(|config| config.labels.clone()).unwrap_or_default().into_iter().collect();
    Ok(ContainerFacts {
        id: report.id.clone().unwrap_or_default().parse()?,
        name: report.name.clone().unwrap_or_default().trim_start_matches('/').to_owned(),
        image: report.image.as_deref().and_then(|image| image.parse().ok()),
        running,
        frozen: running && state.paused.unwrap_or_default(),
        created,
        pid: state.pid.filter(|pid| running && *pid > 0).and_then(|pid| pid.try_into().ok()),
        exit_code: state.exit_code.filter(|_| !running && !created),
        out_of_memory: state.oom_killed.unwrap_or_default(),
        started_at: state.started_at.as_deref().and_then(parse_time),
        finished_at: state.finished_at.as_deref().and_then(parse_time),
        error: state.error.filter(|error| !error.is_empty()).map(|error| quote(&error)),
        log_path: report.log_path.clone().filter(|path| !path.is_empty()).map(Into::into),
        labels,
        report: Box::new(report),
    })
}
