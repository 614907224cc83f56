//! What the host shows of containers and the engine does not: their first program, their log file, what they use.

use std::{path::Path, time::Duration};

use futures::{StreamExt, stream};
use peer_proto::{deploy::Limits, query::Usage};
use tokio::time::{Instant, sleep};

use super::DockerEngine;
use crate::{
    engine::{ContainerFacts, ContainerId, EngineError, GrowthStream},
    logflood::{LOG_SAMPLE, LogFile},
    usage::{self, UsageError},
};

/// How long a container's first process is given to begin its program.
const BEGIN: Duration = Duration::from_secs(2);
/// How long a container is measured.
const USAGE_SPAN: Duration = Duration::from_millis(200);

impl DockerEngine {
    /// Waits until the program itself has begun, which takes some milliseconds after the engine's word, or cannot.
    ///
    /// The engine's small init is the first process: it is there however wrong the program's name is.
    pub(super) async fn await_begin(&self, id: &ContainerId) -> Result<ContainerFacts, EngineError> {
        let deadline = Instant::now() + BEGIN;
        loop {
            let facts = self.present(id).await?;
            let Some(pid) = facts.pid.filter(|_| facts.running) else { return Ok(facts) };
            while has_begun(pid) == Some(false) && Instant::now() < deadline {
                sleep(Duration::from_millis(2)).await;
            }
            let gone = !Path::new(&format!("/proc/{pid}")).exists();
            if !gone || Instant::now() >= deadline {
                return Ok(facts);
            }
            // The engine learns a moment later how it ended.
            sleep(Duration::from_millis(10)).await;
        }
    }

    pub(super) async fn measure(&self, id: &ContainerId, limits: &Limits) -> Result<Usage, EngineError> {
        let told = |error: UsageError| EngineError::Problem(error.problem());
        let pid = self.present(id).await?.pid.ok_or_else(|| told(UsageError::NotRunning))?;
        usage::measure(pid, id, limits, USAGE_SPAN).await.map_err(told)
    }

    /// The engine is asked once where the log is; after that a sample costs one system call.
    pub(super) fn sample_log(&self, id: &ContainerId) -> GrowthStream {
        let client = match self.client() {
            Ok(client) => client.clone(),
            Err(error) => return stream::once(async { Err(error) }).boxed(),
        };
        let id = id.clone();
        let path = async move { super::containers::inspect(&client, id.as_str()).await.map(|facts| facts?.log_path) };
        stream::once(path)
            .flat_map(|path| match path {
                Ok(Some(path)) => stream::unfold(path, |path| async {
                    // While the engine begins a new file there is none for a moment.
                    loop {
                        sleep(LOG_SAMPLE).await;
                        if let Ok(file) = LogFile::read(&path) {
                            return Some((Ok(file), path));
                        }
                    }
                })
                .boxed(),
                Ok(None) => stream::empty().boxed(),
                Err(error) => stream::once(async { Err(error) }).boxed(),
            })
            .boxed()
    }

    pub(super) async fn present(&self, id: &ContainerId) -> Result<ContainerFacts, EngineError> {
        let facts = self.inspect_container(id.as_str()).await?;
        facts.ok_or_else(|| EngineError::NoSuchContainer { container: id.to_string() })
    }
}

/// Whether the child of the container's init runs another program than init itself. `None` where the host does not show it,
/// or the process is gone.
fn has_begun(init: u32) -> Option<bool> {
    let program = |pid: &str| std::fs::read_link(format!("/proc/{pid}/exe")).ok();
    let own = program(&init.to_string())?;
    let children = std::fs::read_to_string(format!("/proc/{init}/task/{init}/children")).ok()?;
    let Some(child) = children.split_whitespace().next() else { return Some(false) };
    let differs = program(child).is_some_and(|program| program != own);
    // The first process may have become init between the two looks, which says nothing of its child.
    Some(differs && program(&init.to_string())? == own)
}
