//! Docker Engine over its Unix socket, by its HTTP interface.
//!
//! Each call opens a connection of its own, so that a restart of the engine heals by itself.

mod attach;
mod containers;
mod disk;
mod failure;
mod forwarding;
mod guest_image;
mod host;
mod images;
mod logs;
mod networks;
mod planned;
mod wall_test;

pub(crate) use containers::facts_of;

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{Mutex, OnceLock},
    time::Duration,
};

use bollard::{API_DEFAULT_VERSION, Docker};
use guest_image::GuestImage;
use peer_proto::{
    code::{Code, Problem},
    deploy::{Limits, RegistryReference, RuntimeName},
    id::{DeploymentId, Digest},
    query::Usage,
    unit::Port,
};
use tokio::time::timeout;

use super::{
    ContainerFacts, ContainerId, ContainerSummary, Engine, EngineError, EngineFacts, ExportStream, GrowthStream,
    ImageChain, ImageFacts, LogOptions, LogStream, NetworkFacts, NetworkPlan, Planned, PullProgress, ResolverSockets,
    Target,
};
use crate::connector::{ConnectError, Connector, Network};
use crate::image::assemble::{LayerSource, assemble};
use crate::order::Order;
use crate::wall::nft::{Nft, NftError};
use crate::wall::rules::FilterOrder;
use crate::wall::sockets;
use planned::Plans;

/// Where Docker Engine listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/var/run/docker.sock";

/// Version 1.41 came with Docker Engine 20.10, the first with private cgroup namespaces.
const API_VERSION_MIN: (u32, u32) = (1, 41);
/// For calls that only look something up.
const LOOK_UP: Duration = Duration::from_secs(30);
/// For calls that start, end or remove something.
const CHANGE: Duration = Duration::from_mins(2);
/// The client's own limit must never come first: each call here has its deadline.
const CLIENT_TIMEOUT_SECONDS: u64 = 7 * 24 * 3600;
/// Threads that may be inside containers' network namespaces at one time.
const NAMESPACE_THREADS: usize = 64;

/// A Docker Engine.
pub struct DockerEngine {
    socket: PathBuf,
    client: OnceLock<Docker>,
    /// Layers of the images seen at the last listing; an image never changes.
    chains: Mutex<HashMap<Digest, Vec<Digest>>>,
    connector: Connector,
    guest: GuestImage,
    plans: Plans,
    runtime: Option<RuntimeName>,
    nft: Nft,
}

impl fmt::Debug for DockerEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DockerEngine").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl DockerEngine {
    /// The engine that listens on `socket`. Nothing is opened yet: the engine may come later.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            client: OnceLock::new(),
            chains: Mutex::default(),
            connector: Connector::new(NAMESPACE_THREADS),
            guest: GuestImage::default(),
            plans: Plans::default(),
            runtime: None,
            nft: Nft::default(),
        }
    }

    /// The same with a program of ours to run inside containers' networks, which lies at this path.
    #[must_use]
    pub fn with_guest_program(self, path: &Path) -> Self {
        Self { guest: GuestImage::at(path), ..self }
    }

    /// The same with a runtime that every container of a peer must have.
    #[must_use]
    pub fn with_runtime(self, runtime: Option<RuntimeName>) -> Self {
        Self { runtime, ..self }
    }

    /// The same engine once more, for something that outlives a call.
    fn another(&self) -> Self {
        Self { guest: self.guest.clone(), ..Self::new(&self.socket) }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    fn client(&self) -> Result<&Docker, EngineError> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let unavailable = |reason: String| EngineError::Unavailable { reason };
        let socket = self.socket.to_str().ok_or_else(|| unavailable("the socket's path is not UTF-8".into()))?;
        let client = Docker::connect_with_unix(socket, CLIENT_TIMEOUT_SECONDS, API_DEFAULT_VERSION)
            .map_err(|_| unavailable(format!("there is no socket {socket}")))?;
        Ok(self.client.get_or_init(|| client))
    }
}

/// Runs one call with its deadline.
async fn call<T>(
    operation: &'static str,
    within: Duration,
    future: impl Future<Output = Result<T, bollard::errors::Error>>,
) -> Result<T, EngineError> {
    match timeout(within, future).await {
        Ok(result) => result.map_err(|error| failure::translate(operation, error)),
        Err(_) => Err(EngineError::TimedOut { operation: operation.into() }),
    }
}

impl Engine for DockerEngine {
    async fn facts(&self) -> Result<EngineFacts, EngineError> {
        let client = self.client()?;
        let version = call("version", LOOK_UP, client.version()).await?;
        let info = call("info", LOOK_UP, client.info()).await?;
        let component = |name| component(version.components.as_deref().unwrap_or_default(), name);
        let (runc_version, containerd_version) = (component("runc"), component("containerd"));
        let facts = judge(version.api_version.unwrap_or_default(), info)?;
        Ok(EngineFacts { runc_version, containerd_version, owner_runtime: self.runtime.clone(), ..facts })
    }

    async fn images(&self) -> Result<Vec<ImageChain>, EngineError> {
        self.list_chains().await
    }

    async fn has_image(&self, image: Digest) -> Result<Option<ImageFacts>, EngineError> {
        self.image_facts(&image.to_string()).await
    }

    async fn load(&self, configuration: &[u8], layers: &[LayerSource]) -> Result<(), EngineError> {
        let unread = |error: std::io::Error| EngineError::Unavailable { reason: error.to_string() };
        let (archive, size) = assemble(configuration, layers).map_err(unread)?;
        self.load_archive(archive, size).await
    }

    fn export(&self, name: &str) -> ExportStream {
        self.export_image(name)
    }

    async fn resolve(&self, name: &str) -> Result<Digest, EngineError> {
        let facts = self.image_facts(name).await?;
        facts.map(|facts| facts.digest).ok_or_else(|| EngineError::NoSuchImage { image: super::quote(name) })
    }

    async fn pull(
        &self,
        reference: &RegistryReference,
        size_max: u64,
        progress: &mut (dyn FnMut(PullProgress) + Send),
    ) -> Result<Digest, EngineError> {
        self.pull_image(reference, size_max, progress).await
    }

    async fn remove_image(&self, image: Digest) -> Result<(), EngineError> {
        self.delete_image(image).await
    }

    async fn mark(&self, _: &str) -> Result<(), EngineError> {
        Ok(())
    }

    async fn plan(&self, order: &Order) -> Result<Planned, EngineError> {
        self.plan_container(order).await
    }

    async fn create(&self, deployment: DeploymentId) -> Result<ContainerId, EngineError> {
        let plan = self.planned(&deployment)?;
        self.create_planned(&plan).await
    }

    async fn inspect(&self, name: &str) -> Result<Option<ContainerFacts>, EngineError> {
        self.inspect_container(name).await
    }

    async fn start(&self, id: &ContainerId) -> Result<(), EngineError> {
        self.start_judged(id).await
    }

    async fn began(&self, id: &ContainerId) -> Result<ContainerFacts, EngineError> {
        let facts = self.await_begin(id).await?;
        self.judge(&facts).await?;
        Ok(facts)
    }

    async fn stop(&self, id: &ContainerId, grace: Duration) -> Result<(), EngineError> {
        self.stop_container(id, grace).await
    }

    async fn kill(&self, id: &ContainerId) -> Result<(), EngineError> {
        self.kill_container(id).await
    }

    async fn pause(&self, id: &ContainerId) -> Result<(), EngineError> {
        self.pause_container(id).await
    }

    async fn unpause(&self, id: &ContainerId) -> Result<(), EngineError> {
        self.unpause_container(id).await
    }

    async fn remove(&self, id: &ContainerId) -> Result<(), EngineError> {
        self.remove_container(id).await
    }

    async fn wait(&self, id: &ContainerId, within: Duration) -> Result<Option<i64>, EngineError> {
        self.wait_container(id, within).await
    }

    async fn list(&self, node: &str) -> Result<Vec<ContainerSummary>, EngineError> {
        self.list_containers(node).await
    }

    async fn networks(&self, node: &str) -> Result<Vec<String>, EngineError> {
        self.list_own_networks(node).await
    }

    async fn compare_network(&self, plan: &NetworkPlan) -> Result<Option<NetworkFacts>, EngineError> {
        self.judge_network(plan).await
    }

    async fn create_network(&self, plan: &NetworkPlan) -> Result<(), EngineError> {
        self.make_network(plan).await
    }

    async fn remove_network(&self, name: &str) -> Result<(), EngineError> {
        self.delete_network(name).await
    }

    async fn start_test(&self, network: &NetworkPlan) -> Result<ContainerId, EngineError> {
        self.start_wall_test(network).await
    }

    async fn filter(&self, order: &FilterOrder) -> Result<String, EngineError> {
        let failed = |error: NftError| EngineError::Problem(Problem::new(Code::EgressUnavailable, error.to_string()));
        self.nft.run(&order.line()).await.map_err(failed)
    }

    async fn resolver_sockets(&self, address: Ipv4Addr) -> Result<ResolverSockets, EngineError> {
        sockets::bind(address).map_err(|error| {
            let message = format!("the resolver cannot listen at port 53 of {address}: {error}");
            EngineError::Problem(Problem::new(Code::EgressUnavailable, message))
        })
    }

    async fn reach(&self, id: &ContainerId, targets: &[Target], within: Duration) -> Result<Vec<bool>, ConnectError> {
        self.connector.open(self, id).await?.reach(targets, within).await
    }

    fn logs(&self, id: &ContainerId, options: &LogOptions) -> LogStream {
        self.read_logs(id, *options)
    }

    fn log_growth(&self, id: &ContainerId) -> GrowthStream {
        self.sample_log(id)
    }

    async fn usage(&self, id: &ContainerId, limits: &Limits) -> Result<Usage, EngineError> {
        self.measure(id, limits).await
    }

    async fn network(&self, id: &ContainerId, port: Port) -> Result<Network, ConnectError> {
        match self.connector.open(self, id).await {
            Err(error @ (ConnectError::NotPermitted | ConnectError::Elsewhere)) => match self.guest_program().await {
                Ok(_) => self.forwarded(id, port).await,
                Err(reason) => {
                    tracing::warn!(%reason, "nothing of ours can run inside containers' networks");
                    Err(error)
                }
            },
            entered => entered.map(Network::Entered),
        }
    }
}

/// Refuses an engine below the floor, and says what the others are.
fn judge(api_version: String, info: bollard::models::SystemInfo) -> Result<EngineFacts, EngineError> {
    let below = |reason: &str| Err(EngineError::BelowFloor { reason: reason.to_owned() });
    let parsed =
        api_version.split_once('.').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    if parsed.is_none_or(|version: (u32, u32)| version < API_VERSION_MIN) {
        return below("it is older than Docker Engine 20.10; update it");
    }
    let security_options = info.security_options.unwrap_or_default();
    let has = |name: &str| security_options.iter().any(|option| option.split(',').any(|part| part == name));
    if !has("name=seccomp") || has("profile=unconfined") {
        return below("it does not filter system calls (seccomp); use a kernel and an engine with seccomp");
    }
    let status = info.driver_status.unwrap_or_default();
    if status.iter().any(|pair| pair.iter().any(|text| text.contains("io.containerd.snapshotter"))) {
        return below(
            "it keeps images in containerd, where their names are not their digests; \
             set \"features\": {\"containerd-snapshotter\": false} in its daemon.json",
        );
    }
    let driver = info.driver.unwrap_or_default();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let sized_root = disk::keeps_sizes(&driver, &status, &info.docker_root_dir.unwrap_or_default(), &mounts);
    for (has, what) in [
        (info.memory_limit, "memory"),
        (info.swap_limit, "swap"),
        (info.pids_limit, "process"),
        (info.cpu_cfs_quota, "processor"),
    ] {
        if has == Some(false) {
            return below(&format!("its kernel has no {what} limits; enable that cgroup controller"));
        }
    }
    Ok(EngineFacts {
        version: info.server_version.unwrap_or_default(),
        api_version,
        kernel_version: info.kernel_version.unwrap_or_default(),
        runc_version: String::new(),
        containerd_version: String::new(),
        seccomp: true,
        apparmor: has("name=apparmor"),
        user_namespace: has("name=userns"),
        rootless: has("name=rootless"),
        security_options,
        cgroup_driver: info.cgroup_driver.map(|driver| driver.to_string()).unwrap_or_default(),
        cgroup_version: info.cgroup_version.and_then(|version| version.to_string().parse().ok()).unwrap_or(1),
        cpus: info.ncpu.and_then(|count| count.try_into().ok()).unwrap_or_default(),
        memory: info.mem_total.and_then(|bytes| bytes.try_into().ok()).unwrap_or_default(),
        architecture: architecture(&info.architecture.unwrap_or_default()).to_owned(),
        storage_driver: driver,
        runtime: info.default_runtime.unwrap_or_default(),
        runtimes: info.runtimes.unwrap_or_default().into_keys().collect(),
        owner_runtime: None,
        sized_root,
        live_restore: info.live_restore_enabled.unwrap_or_default(),
    })
}

/// The version of a part of the engine. Distributions write theirs in full where others name a commit.
fn component(all: &[bollard::models::SystemVersionComponents], name: &str) -> String {
    let Some(found) = all.iter().find(|component| component.name == name) else { return String::new() };
    let full = found.details.as_ref().and_then(|details| details.get("GitCommit"));
    full.filter(|full| full.starts_with(&found.version)).unwrap_or(&found.version).clone()
}

/// The kernel's name of an architecture in the notation of container images.
fn architecture(kernel: &str) -> &str {
    match kernel {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "armv7l" | "armv6l" => "arm",
        "i386" | "i686" => "386",
        other => other,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use bollard::models::SystemInfo;

    use super::*;

    fn info() -> SystemInfo {
        SystemInfo {
            security_options: Some(vec!["name=seccomp,profile=default".into()]),
            architecture: Some("x86_64".into()),
            ..SystemInfo::default()
        }
    }

    #[test]
    fn v4_engine_below_the_floor_is_refused() {
        let refused = |version: &str, info: SystemInfo| {
            matches!(judge(version.to_owned(), info), Err(EngineError::BelowFloor { .. }))
        };
        assert!(refused("1.40", info()));
        assert!(refused("", info()));
        assert!(refused("1.41", SystemInfo { security_options: None, ..info() }));
        let unconfined = Some(vec!["name=seccomp,profile=unconfined".to_owned()]);
        assert!(refused("1.41", SystemInfo { security_options: unconfined, ..info() }));
        assert!(refused("1.41", SystemInfo { swap_limit: Some(false), ..info() }));
        let status = Some(vec![vec!["driver-type".to_owned(), "io.containerd.snapshotter.v1".to_owned()]]);
        assert!(refused("1.51", SystemInfo { driver_status: status, ..info() }));
        assert_eq!(judge("1.41".into(), info()).unwrap().architecture, "amd64");
    }

    #[tokio::test]
    async fn engine_that_is_not_there_is_unavailable() {
        let engine = DockerEngine::new("/nonexistent/engine.sock");
        let error = engine.facts().await.unwrap_err();
        assert!(matches!(error, EngineError::Unavailable { .. }), "{error}");
        assert!(error.is_transient());
    }

    #[tokio::test]
    async fn engine_that_hangs_up_is_unavailable() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("engine.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let hang_up = async {
            for _ in 0..2 {
                drop(listener.accept().await.unwrap());
            }
        };
        let engine = DockerEngine::new(&socket);
        let ask = async {
            let (facts, load) = (engine.facts().await, engine.load(b"{}", &[]).await);
            assert!(matches!(facts, Err(EngineError::Unavailable { .. })), "{facts:?}");
            assert!(matches!(load, Err(EngineError::Unavailable { .. })), "{load:?}");
        };
        tokio::join!(hang_up, ask);
    }
}
