//! The seam to the container engine: what this room needs of it, in this room's own words.
//!
//! Every call has a deadline of its own; a stream has one for each step. [`EngineError`]'s variants say what to do.

pub mod docker;
mod error;
mod network;

use std::{fmt, future::Future, io, net::Ipv4Addr, str::FromStr, time::Duration};

use bollard::models::{ContainerCreateBody, ContainerInspectResponse};
use bytes::Bytes;
use futures::stream::BoxStream;
use minicbor::{Decode, Encode};
use peer_proto::{
    deploy::{Limits, RegistryReference, RuntimeName},
    frame::as_text,
    id::{DeploymentId, Digest},
    query::{LogLine, Usage},
    unit::{Port, Timestamp},
};

pub use error::EngineError;

use crate::{
    connector::{ConnectError, Network},
    image::assemble::LayerSource,
    image::configuration::Wishes,
    logflood::LogFile,
    order::Order,
    wall::rules::FilterOrder,
};

pub use network::{NetworkFacts, NetworkPlan, ResolverSockets, Target};

/// Pieces of an archive on their way to the engine.
pub type ArchiveStream = BoxStream<'static, io::Result<Bytes>>;
/// Pieces of an archive on their way from the engine.
pub type ExportStream = BoxStream<'static, Result<Bytes, EngineError>>;
/// A container's log, both outputs in the order in which they were written.
pub type LogStream = BoxStream<'static, Result<LogLine, EngineError>>;

/// A container's log file at one moment after the other.
pub type GrowthStream = BoxStream<'static, Result<LogFile, EngineError>>;

/// What this room needs of a container engine, and of the host where it shows what the engine does not. Nothing else looks
/// at a container's processes, files or networks.
pub trait Engine: Send + Sync + 'static {
    /// What kind of engine it is. Fails with [`EngineError::BelowFloor`] if it cannot isolate well enough.
    fn facts(&self) -> impl Future<Output = Result<EngineFacts, EngineError>> + Send;

    /// Every image with its layers, lowest first.
    fn images(&self) -> impl Future<Output = Result<Vec<ImageChain>, EngineError>> + Send;

    /// What is known of the image with this digest, if the engine has it.
    fn has_image(&self, image: Digest) -> impl Future<Output = Result<Option<ImageFacts>, EngineError>> + Send;

    /// Loads an image: its configuration and its layers, lowest first. The caller checks afterwards that it is there.
    fn load(
        &self,
        configuration: &[u8],
        layers: &[LayerSource],
    ) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// The image as a tar, by name or digest.
    fn export(&self, name: &str) -> ExportStream;

    /// The digest of the image that the engine knows by this name.
    fn resolve(&self, name: &str) -> impl Future<Output = Result<Digest, EngineError>> + Send;

    /// Fetches an image of at most `size_max` bytes, packed and unpacked, from its registry. A larger one is not kept.
    fn pull(
        &self,
        reference: &RegistryReference,
        size_max: u64,
        progress: &mut (dyn FnMut(PullProgress) + Send),
    ) -> impl Future<Output = Result<Digest, EngineError>> + Send;

    /// Removes the image. One that is not there is no error; one that a container uses or that somebody has named is kept
    /// ([`EngineError::InUse`]).
    fn remove_image(&self, image: Digest) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Says what marks this machine's containers. It is said before anything else is asked of one, and never changes.
    fn mark(&self, mark: &str) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Verifies the order and decides how its container is to run. It is known by its deployment from then on.
    fn plan(&self, order: &Order) -> impl Future<Output = Result<Planned, EngineError>> + Send;

    /// Makes the container that was planned last for this deployment, without starting it. One that differs from its plan is
    /// removed again ([`EngineError::Violated`]).
    fn create(&self, deployment: DeploymentId) -> impl Future<Output = Result<ContainerId, EngineError>> + Send;

    /// What the engine says of the container with this id or name, if there is one.
    fn inspect(&self, name: &str) -> impl Future<Output = Result<Option<ContainerFacts>, EngineError>> + Send;

    /// Starts the container, which must equal what was planned last for its deployment: else it is removed
    /// ([`EngineError::Violated`]). One that runs already is no error.
    fn start(&self, id: &ContainerId) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Waits until the program of a container that has been started has begun or cannot, for some seconds at most, and says
    /// what the engine says then. One that differs from its plan is removed ([`EngineError::Violated`]).
    fn began(&self, id: &ContainerId) -> impl Future<Output = Result<ContainerFacts, EngineError>> + Send;

    /// Asks the container to end and kills it after `grace`. One that has ended already is no error.
    fn stop(&self, id: &ContainerId, grace: Duration) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Kills the container. One that has ended already is no error.
    fn kill(&self, id: &ContainerId) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Freezes every process of the container, which keeps its memory. One that is frozen already is no error.
    fn pause(&self, id: &ContainerId) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Lets a frozen container go on. One that is not frozen is no error.
    fn unpause(&self, id: &ContainerId) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Kills and removes the container with its anonymous volumes. One that is gone already is no error.
    fn remove(&self, id: &ContainerId) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Waits until the container has ended and gives its exit code, or nothing if it still runs after `within`.
    fn wait(&self, id: &ContainerId, within: Duration)
    -> impl Future<Output = Result<Option<i64>, EngineError>> + Send;

    /// Every container, running or not, that carries [`crate::profile::NODE_LABEL`] with this value.
    fn list(&self, node: &str) -> impl Future<Output = Result<Vec<ContainerSummary>, EngineError>> + Send;

    /// The names of all networks that carry [`crate::profile::NODE_LABEL`] with this value.
    fn networks(&self, node: &str) -> impl Future<Output = Result<Vec<String>, EngineError>> + Send;

    /// Compares the network of the plan's name with the plan, if there is one.
    fn compare_network(
        &self,
        plan: &NetworkPlan,
    ) -> impl Future<Output = Result<Option<NetworkFacts>, EngineError>> + Send;

    /// Makes the network.
    fn create_network(&self, plan: &NetworkPlan) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Removes the network. One that is gone already is no error; one with running containers is kept
    /// ([`EngineError::InUse`]).
    fn remove_network(&self, name: &str) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Makes and starts the container of the wall's test in this network; all of it is ours.
    fn start_test(&self, network: &NetworkPlan) -> impl Future<Output = Result<ContainerId, EngineError>> + Send;

    /// Carries out an order on the host's packet filter, and gives what it reports.
    fn filter(&self, order: &FilterOrder) -> impl Future<Output = Result<String, EngineError>> + Send;

    /// Binds the sockets of a resolver (UDP and TCP, not blocking) at port 53 of this address of a bridge, which may
    /// appear later.
    fn resolver_sockets(&self, address: Ipv4Addr) -> impl Future<Output = Result<ResolverSockets, EngineError>> + Send;

    /// Tries from inside a running container which of these answer within a time.
    fn reach(
        &self,
        id: &ContainerId,
        targets: &[Target],
        within: Duration,
    ) -> impl Future<Output = Result<Vec<bool>, ConnectError>> + Send;

    /// The container's log. It ends when everything kept has been read or, if followed, when the container ends.
    fn logs(&self, id: &ContainerId, options: &LogOptions) -> LogStream;

    /// The container's log file, once a second for as long as somebody asks. It ends where the log cannot be seen.
    fn log_growth(&self, id: &ContainerId) -> GrowthStream;

    /// What a running container uses, measured over a moment.
    fn usage(&self, id: &ContainerId, limits: &Limits) -> impl Future<Output = Result<Usage, EngineError>> + Send;

    /// Opens the network of a running container for those who may reach this one port of it: by entering its namespace or,
    /// where that is not possible, by a forwarder beside it.
    fn network(&self, id: &ContainerId, port: Port) -> impl Future<Output = Result<Network, ConnectError>> + Send;
}

/// How a deployment's container is to run.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// The deployment.
    pub deployment: DeploymentId,
    /// What the engine will be told, so that a later version can judge the container by it.
    pub told: Box<ContainerCreateBody>,
}

/// The id that the engine gave to a container: 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode)]
#[cbor(transparent)]
pub struct ContainerId(
    #[n(0)]
    #[cbor(with = "as_text")]
    ContainerIdText,
);

/// The checked text of a [`ContainerId`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct ContainerIdText(String);

impl ContainerId {
    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0.0
    }
}

impl FromStr for ContainerIdText {
    type Err = EngineError;

    fn from_str(text: &str) -> Result<Self, EngineError> {
        if text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            Ok(Self(text.to_owned()))
        } else {
            Err(EngineError::failed(&format!("'{text}' is not a container's id")))
        }
    }
}

impl fmt::Display for ContainerIdText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ContainerId {
    type Err = EngineError;

    fn from_str(text: &str) -> Result<Self, EngineError> {
        text.parse().map(Self)
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What kind of engine answers. The default is one that has told nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Encode, Decode)]
#[cbor(map)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts as the engine reports them")]
pub struct EngineFacts {
    /// Version of the engine's program.
    #[n(0)]
    pub version: String,
    /// Highest version of the engine's interface that it speaks, such as `1.41`.
    #[n(1)]
    pub api_version: String,
    /// Version of its kernel.
    #[n(2)]
    pub kernel_version: String,
    /// Version of runc, with what a distribution adds, such as `1.1.5+ds1-1+deb12u1`; empty if it is not told.
    #[n(3)]
    pub runc_version: String,
    /// Version of containerd, likewise.
    #[n(4)]
    pub containerd_version: String,
    /// Security options as the engine lists them, such as `name=seccomp,profile=default`.
    #[n(5)]
    pub security_options: Vec<String>,
    /// Whether system calls are filtered by default. Always true: without it the engine is below the floor.
    #[n(6)]
    pub seccomp: bool,
    /// Whether AppArmor confines containers.
    #[n(7)]
    pub apparmor: bool,
    /// Whether the engine maps users of containers to other users of the host (`userns-remap`).
    #[n(8)]
    pub user_namespace: bool,
    /// Whether the engine itself runs without root.
    #[n(9)]
    pub rootless: bool,
    /// `cgroupfs` or `systemd`.
    #[n(10)]
    pub cgroup_driver: String,
    /// 1 or 2.
    #[n(11)]
    pub cgroup_version: u8,
    /// Processors.
    #[n(12)]
    pub cpus: u32,
    /// Memory (bytes).
    #[n(13)]
    pub memory: u64,
    /// In the notation of container images, such as `amd64`.
    #[n(14)]
    pub architecture: String,
    /// Such as `overlay2`.
    #[n(15)]
    pub storage_driver: String,
    /// The runtime that starts containers unless another is named, such as `runc`.
    #[n(16)]
    pub runtime: String,
    /// Every runtime that it has.
    #[n(17)]
    pub runtimes: Vec<String>,
    /// The runtime that this machine's owner wants for every container of a peer.
    #[n(18)]
    pub owner_runtime: Option<RuntimeName>,
    /// Whether it holds the root of a container to a size.
    #[n(19)]
    pub sized_root: bool,
    /// Whether containers go on when the engine restarts.
    #[n(20)]
    pub live_restore: bool,
}

/// An image and its layers.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ImageChain {
    /// SHA-256 of the configuration.
    #[n(0)]
    pub digest: Digest,
    /// Digests of the uncompressed layers, lowest first.
    #[n(1)]
    pub layers: Vec<Digest>,
}

/// What the engine knows of an image.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ImageFacts {
    /// SHA-256 of the configuration.
    #[n(0)]
    pub digest: Digest,
    /// Digests of the uncompressed layers, lowest first.
    #[n(1)]
    pub layers: Vec<Digest>,
    /// Such as `amd64`.
    #[n(2)]
    pub architecture: String,
    /// Unpacked size (bytes).
    #[n(3)]
    pub size: u64,
    /// How it wants to run.
    #[n(4)]
    pub wishes: Wishes,
    /// Names by which the engine knows it.
    #[n(5)]
    pub names: Vec<String>,
    /// References with a digest by which it was fetched.
    #[n(6)]
    pub references: Vec<String>,
}

/// How far a fetch from a registry has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct PullProgress {
    /// Bytes fetched.
    #[n(0)]
    pub received: u64,
    /// Bytes to fetch, as far as known.
    #[n(1)]
    pub total: u64,
}

/// A container as the engine reports it.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts as the engine reports them")]
pub struct ContainerFacts {
    /// Its id.
    pub id: ContainerId,
    /// Its name.
    pub name: String,
    /// Its image.
    pub image: Option<Digest>,
    /// Whether it runs, frozen or not.
    pub running: bool,
    /// Whether it runs and is frozen.
    pub frozen: bool,
    /// Whether it was made and never started.
    pub created: bool,
    /// Its first process on the host, while it runs.
    pub pid: Option<u32>,
    /// Exit code of the last run, once it has ended.
    pub exit_code: Option<i64>,
    /// Whether the kernel killed its first process for lack of memory. A killed child does not show here.
    pub out_of_memory: bool,
    /// When the last run began.
    pub started_at: Option<Timestamp>,
    /// When the last run ended.
    pub finished_at: Option<Timestamp>,
    /// What the engine says went wrong.
    pub error: Option<String>,
    /// The engine's log file of it.
    pub log_path: Option<std::path::PathBuf>,
    /// Its labels. They are never proof of anything: our database is.
    pub labels: std::collections::BTreeMap<String, String>,
    /// Everything, for [`crate::inspect::differences`].
    pub report: Box<ContainerInspectResponse>,
}

/// A container in a list.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ContainerSummary {
    /// Its id.
    #[n(0)]
    pub id: ContainerId,
    /// Its name.
    #[n(1)]
    pub name: String,
    /// Whether it runs, frozen or not.
    #[n(2)]
    pub running: bool,
    /// Whether it ran and has ended.
    #[n(4)]
    pub ended: bool,
    /// Its labels. They are never proof of anything: our database is.
    #[n(3)]
    pub labels: std::collections::BTreeMap<String, String>,
}

/// Which part of a log is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
#[cbor(map)]
pub struct LogOptions {
    /// Only so many last lines; everything kept, if absent.
    #[n(0)]
    pub tail: Option<u32>,
    /// Only lines from this moment on.
    #[n(1)]
    pub since: Option<Timestamp>,
    /// Go on until the container ends.
    #[n(2)]
    pub follow: bool,
}

/// The engine repeats texts of images and guests: escaped and at most 512 bytes of them are shown.
pub(crate) fn quote(message: &str) -> String {
    let mut end = message.len().min(512);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    peer_proto::text::escape(message[..end].trim())
}
