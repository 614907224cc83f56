//! What a running container uses, read from its control group's files: a thousand times cheaper than the engine's own
//! statistics.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use peer_proto::{
    code::{Code, Problem},
    deploy::Limits,
    query::Usage,
};

use crate::engine::ContainerId;

const ROOT: &str = "/sys/fs/cgroup";
/// Longest file of a control group that is read (bytes).
const FILE_MAX: u64 = 64 << 10;

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// The container does not run, or its process number belongs to something else by now.
    #[error("the container does not run")]
    NotRunning,
    /// A file is not what the kernel's documents say.
    #[error("the control group's file {} cannot be read: {reason}", .path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl UsageError {
    /// Code and sentence.
    pub fn problem(&self) -> Problem {
        let code = match self {
            Self::NotRunning => Code::WrongState,
            Self::Unreadable { .. } => Code::Internal,
        };
        Problem::new(code, self.to_string())
    }
}

/// Where the numbers of one container stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ControlGroup {
    /// Version 1: a directory for each controller.
    Separate {
        /// Processor time.
        cpu: PathBuf,
        /// Memory.
        memory: PathBuf,
        /// Processes.
        pids: PathBuf,
    },
    /// Version 2: one directory.
    Unified(PathBuf),
}

/// The numbers at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// When.
    pub at: Instant,
    /// Processor time so far (microseconds).
    pub cpu_microseconds: u64,
    /// Memory in use (bytes), without the cache of files that can be dropped.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub pids: u64,
}

/// Measures a running container, whose first process is `pid`, over `span`.
pub async fn measure(pid: u32, id: &ContainerId, limits: &Limits, span: Duration) -> Result<Usage, UsageError> {
    let group = ControlGroup::find(pid, id)?;
    let before = group.sample()?;
    tokio::time::sleep(span).await;
    Ok(usage(&before, &group.sample()?, limits))
}

/// What two samples say together.
pub fn usage(before: &Sample, after: &Sample, limits: &Limits) -> Usage {
    let microseconds = after.at.saturating_duration_since(before.at).as_micros().max(1);
    let used = u128::from(after.cpu_microseconds.saturating_sub(before.cpu_microseconds));
    Usage {
        cpu_microseconds: after.cpu_microseconds,
        cpu_millicores: u32::try_from(used * 1000 / microseconds).unwrap_or(u32::MAX),
        memory_bytes: after.memory_bytes,
        memory_limit_bytes: limits.memory.get(),
        pids: after.pids,
        pids_limit: limits.pids.into(),
    }
}

impl ControlGroup {
    /// Finds the control group of a container by its first process.
    pub fn find(pid: u32, id: &ContainerId) -> Result<Self, UsageError> {
        let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let text = read(&path).map_err(|_| UsageError::NotRunning)?;
        Self::parse(&text, id, Path::new(ROOT)).ok_or(UsageError::NotRunning)
    }

    /// Reads the kernel's list of a process's control groups. The path must name the container: the process number may
    /// have passed to another process.
    fn parse(text: &str, id: &ContainerId, root: &Path) -> Option<Self> {
        let lines = || text.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
        let own = |path: &str| {
            let path = path.strip_prefix('/')?;
            let plain = !path.split('/').any(|part| matches!(part, ".." | "." | ""));
            (plain && path.contains(id.as_str())).then(|| path.to_owned())
        };
        let controller = |name: &str| {
            let (names, path) = lines().find(|(names, _)| names.split(',').any(|each| each == name))?;
            let directory = if root.join(name).exists() { name } else { names };
            Some(root.join(directory).join(own(path)?))
        };
        if let Some(memory) = controller("memory") {
            return Some(Self::Separate { cpu: controller("cpuacct")?, memory, pids: controller("pids")? });
        }
        let (_, path) = lines().find(|(names, _)| names.is_empty())?;
        Some(Self::Unified(root.join(own(path)?)))
    }

    /// Takes the numbers.
    pub fn sample(&self) -> Result<Sample, UsageError> {
        let at = Instant::now();
        let (cpu_microseconds, memory, cache, pids) = match self {
            Self::Separate { cpu, memory, pids } => (
                number(&cpu.join("cpuacct.usage"))? / 1000,
                number(&memory.join("memory.usage_in_bytes"))?,
                field(&memory.join("memory.stat"), "total_inactive_file")?,
                number(&pids.join("pids.current"))?,
            ),
            Self::Unified(group) => (
                field(&group.join("cpu.stat"), "usage_usec")?,
                number(&group.join("memory.current"))?,
                field(&group.join("memory.stat"), "inactive_file")?,
                number(&group.join("pids.current"))?,
            ),
        };
        Ok(Sample { at, cpu_microseconds, memory_bytes: memory.saturating_sub(cache), pids })
    }
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(fs::File::open(path)?, FILE_MAX), &mut text)?;
    Ok(text)
}

fn read_number<T>(path: &Path, find: impl FnOnce(&str) -> Option<T>) -> Result<T, UsageError> {
    match read(path) {
        Ok(text) => find(&text).ok_or_else(|| UsageError::Unreadable { path: path.into(), reason: "no number".into() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(UsageError::NotRunning),
        Err(error) => Err(UsageError::Unreadable { path: path.into(), reason: error.to_string() }),
    }
}

fn number(path: &Path) -> Result<u64, UsageError> {
    read_number(path, |text| text.trim().parse().ok())
}

fn field(path: &Path, name: &str) -> Result<u64, UsageError> {
    let find =
        |text: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok());
    read_number(path, find)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn id() -> ContainerId {
        "ab".repeat(32).parse().unwrap()
    }

    #[test]
    fn both_versions_are_found() {
        let (id, root) = (id(), Path::new("/nonexistent"));
        let one = format!("4:memory:/docker/{id}\n3:pids:/docker/{id}\n2:cpu,cpuacct:/docker/{id}\n0::/docker/{id}\n");
        let Some(ControlGroup::Separate { cpu, .. }) = ControlGroup::parse(&one, &id, root) else {
            panic!("version 1")
        };
        assert_eq!(cpu, root.join(format!("cpu,cpuacct/docker/{id}")));
        let two = format!("0::/system.slice/docker-{id}.scope\n");
        let expected = ControlGroup::Unified(root.join(format!("system.slice/docker-{id}.scope")));
        assert_eq!(ControlGroup::parse(&two, &id, root), Some(expected));
    }

    #[test]
    fn another_process_is_never_measured() {
        let root = Path::new("/nonexistent");
        for text in ["0::/\n", "0::/docker/other\n", "", "garbage", &format!("0::/../{}\n", id())] {
            assert_eq!(ControlGroup::parse(text, &id(), root), None, "{text}");
        }
    }

    #[test]
    fn two_samples_give_the_share() {
        let at = Instant::now();
        let before = Sample { at, cpu_microseconds: 1_000, memory_bytes: 1, pids: 1 };
        let later = at + Duration::from_millis(200);
        let after = Sample { at: later, cpu_microseconds: 101_000, memory_bytes: 2, pids: 3 };
        let usage = usage(&before, &after, &Limits::default());
        assert_eq!((usage.cpu_millicores, usage.memory_bytes, usage.pids), (500, 2, 3));
    }

    #[test]
    fn files_of_version_2_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        write("cpu.stat", "usage_usec 42\nuser_usec 1\n");
        write("memory.current", "1000\n");
        write("memory.stat", "anon 1\ninactive_file 400\n");
        write("pids.current", "3\n");
        let sample = ControlGroup::Unified(directory.path().into()).sample().unwrap();
        assert_eq!((sample.cpu_microseconds, sample.memory_bytes, sample.pids), (42, 600, 3));
    }
}
