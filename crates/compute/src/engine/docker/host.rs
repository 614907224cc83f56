//! What the host shows of containers and the engine does not: their first program, their log file, what they use. Where it
//! shows nothing (another user's files, or an engine in a machine of its own), the engine is asked for what it knows.

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bollard::{
    Docker,
    container::LogOutput,
    models::ContainerStatsResponse,
    query_parameters::{LogsOptionsBuilder, StatsOptionsBuilder},
};
use futures::{StreamExt, TryStreamExt, stream, stream::BoxStream};
use peer_proto::{deploy::Limits, query::Usage};
use tokio::time::{Instant, sleep, timeout_at};

use super::{DockerEngine, LOOK_UP, call, failure, logs::parse_time};
use crate::{
    engine::{ContainerFacts, ContainerId, EngineError, GrowthStream},
    logflood::{LOG_SAMPLE, LogFile},
    usage::{self, ControlGroup, UsageError},
};

/// How long a container's first process is given to begin its program.
const BEGIN: Duration = Duration::from_secs(2);
/// The same where nothing shows it but an end.
const BEGIN_UNSEEN: Duration = Duration::from_millis(300);
/// How long a container is measured.
const USAGE_SPAN: Duration = Duration::from_millis(200);
/// What the engine writes to its log file beside the text of a line (bytes).
const LINE_FRAME: u64 = 76;

impl DockerEngine {
    /// Waits until the program itself has begun, which takes some milliseconds after the engine's word, or cannot.
    ///
    /// The engine's small init is the first process: it is there however wrong the program's name is.
    pub(super) async fn await_begin(&self, id: &ContainerId) -> Result<ContainerFacts, EngineError> {
        let deadline = Instant::now() + BEGIN;
        loop {
            let facts = self.present(id).await?;
            let Some(pid) = facts.pid.filter(|_| facts.running) else { return Ok(facts) };
            if ControlGroup::find(pid, id).is_err() {
                // It has ended meanwhile, or is no process of this host.
                self.wait_container(id, BEGIN_UNSEEN).await?;
                return self.present(id).await;
            }
            while has_begun(pid) == Some(false) && Instant::now() < deadline {
                sleep(Duration::from_millis(2)).await;
            }
            if ControlGroup::find(pid, id).is_ok() || Instant::now() >= deadline {
                return Ok(facts);
            }
            // The engine learns a moment later how it ended.
            sleep(Duration::from_millis(10)).await;
        }
    }

    pub(super) async fn measure(&self, id: &ContainerId, limits: &Limits) -> Result<Usage, EngineError> {
        let told = |error: UsageError| EngineError::Problem(error.problem());
        let pid = self.present(id).await?.pid.ok_or_else(|| told(UsageError::NotRunning))?;
        match usage::measure(pid, id, limits, USAGE_SPAN).await {
            Ok(usage) => Ok(usage),
            Err(_) => self.usage_by_engine(id, limits).await,
        }
    }

    /// What a running container uses in the engine's own words, which take it a second or two.
    pub async fn usage_by_engine(&self, id: &ContainerId, limits: &Limits) -> Result<Usage, EngineError> {
        let options = StatsOptionsBuilder::default().stream(false).build();
        let mut samples = self.client()?.stats(id.as_str(), Some(options)).boxed();
        let sample = call("look at what a container uses", LOOK_UP, samples.try_next()).await?;
        let usage = sample.as_ref().and_then(|sample| usage_of(sample, limits));
        usage.ok_or_else(|| EngineError::Problem(UsageError::NotRunning.problem()))
    }

    /// The engine is asked once where the log is; after that a sample costs one system call. Where the file cannot be seen,
    /// the log itself is followed, and what comes is counted.
    pub(super) fn sample_log(&self, id: &ContainerId) -> GrowthStream {
        let client = match self.client() {
            Ok(client) => client.clone(),
            Err(error) => return stream::once(async { Err(error) }).boxed(),
        };
        let id = id.clone();
        let samples = async move {
            let facts = super::containers::inspect(&client, id.as_str()).await?;
            Ok::<_, EngineError>(match facts.and_then(|facts| facts.log_path) {
                Some(path) if is_seen(&path) => sample_file(path),
                Some(_) => count_log(&client, &id),
                None => stream::empty().boxed(),
            })
        };
        stream::once(samples).try_flatten().boxed()
    }

    pub(super) async fn present(&self, id: &ContainerId) -> Result<ContainerFacts, EngineError> {
        let facts = self.inspect_container(id.as_str()).await?;
        facts.ok_or_else(|| EngineError::NoSuchContainer { container: id.to_string() })
    }
}

/// Whether the file can be looked at. While the engine begins a new one there is none for a moment, but its directory is.
fn is_seen(path: &Path) -> bool {
    match LogFile::read(path) {
        Ok(_) => true,
        Err(error) => error.kind() == io::ErrorKind::NotFound && path.parent().is_some_and(Path::is_dir),
    }
}

fn sample_file(path: PathBuf) -> GrowthStream {
    let next = |path: PathBuf| async {
        loop {
            sleep(LOG_SAMPLE).await;
            if let Ok(file) = LogFile::read(&path) {
                return Some((Ok(file), path));
            }
        }
    };
    stream::unfold(path, next).boxed()
}

/// Counts what is logged from now on, as if it were a file that is never begun anew.
fn count_log(client: &Docker, id: &ContainerId) -> GrowthStream {
    let options = LogsOptionsBuilder::default().follow(true).stdout(true).stderr(true).tail("0").build();
    let lines: BoxStream<'static, _> = client.logs(id.as_str(), Some(options)).boxed();
    let next = |(mut lines, mut size): (BoxStream<'static, Result<LogOutput, _>>, u64)| async move {
        let end = Instant::now() + LOG_SAMPLE;
        loop {
            match timeout_at(end, lines.next()).await {
                Ok(Some(Ok(line))) => size = size.saturating_add(LINE_FRAME + line.into_bytes().len() as u64),
                Ok(Some(Err(error))) => return Some((Err(failure::translate("follow a log", error)), (lines, size))),
                Ok(None) => return None,
                Err(_) => return Some((Ok(LogFile { size, inode: 0, created: None }), (lines, size))),
            }
            if Instant::now() >= end {
                return Some((Ok(LogFile { size, inode: 0, created: None }), (lines, size)));
            }
        }
    };
    stream::unfold((lines, 0), next).boxed()
}

/// What the engine's statistics say, which are two samples in one.
fn usage_of(sample: &ContainerStatsResponse, limits: &Limits) -> Option<Usage> {
    let total = |stats: &bollard::models::ContainerCpuStats| stats.cpu_usage.as_ref()?.total_usage;
    let now = sample.cpu_stats.as_ref().and_then(total)?;
    let before = sample.precpu_stats.as_ref().and_then(total).unwrap_or(now);
    let span = parse_time(sample.read.as_deref()?)?.since(parse_time(sample.preread.as_deref()?)?).max(1);
    let memory = sample.memory_stats.as_ref()?;
    let field = |name: &str| memory.stats.as_ref()?.get(name).copied();
    let cache = field("inactive_file").or_else(|| field("total_inactive_file")).unwrap_or(0);
    Some(Usage {
        cpu_microseconds: now / 1000,
        // Nanoseconds of processor time over milliseconds.
        cpu_millicores: u32::try_from(now.saturating_sub(before) / 1000 / span).unwrap_or(u32::MAX),
        memory_bytes: memory.usage?.saturating_sub(cache),
        memory_limit_bytes: limits.memory.get(),
        pids: sample.pids_stats.as_ref()?.current?,
        pids_limit: limits.pids.into(),
    })
}

/// Whether the child of the container's init runs another program than init itself. `None` where the host does not show it,
/// or the process is gone.
fn has_begun(init: u32) -> Option<bool> {
    // Another user is shown the name alone.
    let program = |pid: &str| {
        let path = std::fs::read_link(format!("/proc/{pid}/exe")).map(PathBuf::into_os_string);
        path.or_else(|_| std::fs::read_to_string(format!("/proc/{pid}/comm")).map(OsString::from)).ok()
    };
    let own = program(&init.to_string())?;
    let children = std::fs::read_to_string(format!("/proc/{init}/task/{init}/children")).ok()?;
    let Some(child) = children.split_whitespace().next() else { return Some(false) };
    let differs = program(child).is_some_and(|program| program != own);
    // The first process may have become init between the two looks, which says nothing of its child.
    Some(differs && program(&init.to_string())? == own)
}
