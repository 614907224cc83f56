//! Deployments as they are asked for and reported. Nothing here can say "privileged", "bind mount", "device" or
//! "host network": what the vocabulary lacks cannot be requested (I1, I2).

use std::fmt;
use std::str::FromStr;

use libp2p_identity::PeerId;
use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::code::{Code, Problem};
use crate::frame::peer_id;
use crate::id::{DeploymentId, Digest, Name, RequestHash};
use crate::unit::{ByteSize, Millicores, Port, Timestamp};

/// Largest image configuration (bytes).
pub const IMAGE_CONFIGURATION_MAX: usize = 256 * 1024;
/// Most layers of one image; overlayfs stacks no more than 127.
pub const LAYERS_MAX: usize = 127;
/// Largest single layer, uncompressed (bytes).
pub const LAYER_SIZE_MAX: u64 = 16 << 30;
/// Most environment variables, and most arguments of a command.
pub const LIST_MAX: usize = 512;
/// Longest single environment value or argument (bytes).
pub const TEXT_MAX: usize = 32 * 1024;
/// Longest path of a health check (bytes).
pub const PATH_MAX: usize = 1024;
/// Longest image name kept for display (bytes).
pub const IMAGE_NAME_MAX: usize = 255;

/// An image that its owner can send: the configuration itself and the size of each layer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ImageOffer {
    /// The image's configuration blob (OCI image specification), whose SHA-256 names the image.
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub configuration: Vec<u8>,
    /// Uncompressed size of each layer (bytes), lowest first; as many as the configuration names diff ids.
    #[n(1)]
    pub layer_sizes: Vec<u64>,
}

impl ImageOffer {
    /// The name of the image: SHA-256 of its configuration.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.configuration)
    }
}

/// Where the provider gets the image from.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ImageSource {
    /// From the requester, over the peer connection.
    #[n(0)]
    Offered(#[n(0)] ImageOffer),
    /// From a registry that the provider can reach: `host/name@sha256:…`, always pinned to a digest.
    #[n(1)]
    Registry(#[n(0)] RegistryReference),
}

/// A reference to an image in a registry, pinned to the digest of its manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[cbor(transparent)]
#[serde(try_from = "String", into = "String")]
pub struct RegistryReference(
    #[n(0)]
    #[cbor(with = "crate::frame::as_text")]
    RegistryReferenceText,
);

/// The checked text of a [`RegistryReference`].
#[derive(Debug, Clone, PartialEq, Eq)]
struct RegistryReferenceText {
    name: String,
    digest: Digest,
}

impl RegistryReference {
    /// Registry, repository and image name, without the digest.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Digest of the manifest.
    pub fn digest(&self) -> Digest {
        self.0.digest
    }
}

impl fmt::Display for RegistryReferenceText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.digest)
    }
}

impl FromStr for RegistryReferenceText {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let invalid =
            || format!("'{}' is not pinned to a digest; write it as registry/name@sha256:…", crate::text::escape(text));
        let (name, digest) = text.split_once('@').ok_or_else(invalid)?;
        let digest = digest.parse().map_err(|_| invalid())?;
        let component = |part: &str| {
            !part.is_empty()
                && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-:".contains(&b))
                && part.as_bytes()[0].is_ascii_alphanumeric()
        };
        if name.len() > IMAGE_NAME_MAX || !name.split('/').all(component) {
            return Err(invalid());
        }
        Ok(Self { name: name.to_owned(), digest })
    }
}

impl fmt::Display for RegistryReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for RegistryReference {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self)
    }
}

impl TryFrom<String> for RegistryReference {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<RegistryReference> for String {
    fn from(reference: RegistryReference) -> String {
        reference.to_string()
    }
}

/// What a container may use. Every field is a hard limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[serde(deny_unknown_fields)]
#[cbor(map)]
pub struct Limits {
    /// Processors (millicores).
    #[n(0)]
    pub cpu: Millicores,
    /// Memory (bytes); swap is not given on top.
    #[n(1)]
    pub memory: ByteSize,
    /// Processes and threads.
    #[n(2)]
    pub pids: u32,
    /// Open files per process.
    #[n(3)]
    pub files: u32,
    /// Writable space on `/tmp` (bytes); it counts as memory.
    #[n(4)]
    pub scratch: ByteSize,
}

impl Default for Limits {
    /// Half a processor, 256 MiB, 100 processes, 1,024 files, 64 MiB of scratch (SECURITY, starting budgets).
    fn default() -> Self {
        Self {
            cpu: Millicores::new(500).expect("within range"),
            memory: ByteSize::mebibytes(256),
            pids: 100,
            files: 1024,
            scratch: ByteSize::mebibytes(64),
        }
    }
}

/// What happens when the container ends by itself. Docker's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, Encode, Decode)]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    /// It stays ended.
    #[default]
    #[n(0)]
    No,
    /// It is started again after a failure, at most so many times in a row (no limit if absent).
    #[n(1)]
    OnFailure(#[n(0)] Option<u32>),
    /// It is started again whatever its exit code, until it is stopped.
    #[n(2)]
    Always,
}

impl fmt::Display for RestartPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::No => f.write_str("no"),
            Self::OnFailure(None) => f.write_str("on-failure"),
            Self::OnFailure(Some(limit)) => write!(f, "on-failure:{limit}"),
            Self::Always => f.write_str("always"),
        }
    }
}

impl FromStr for RestartPolicy {
    type Err = String;

    /// Docker's spellings: `no`, `on-failure`, `on-failure:3`, `always`, `unless-stopped`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "no" => Ok(Self::No),
            "on-failure" => Ok(Self::OnFailure(None)),
            // A stop by its owner always lasts here, so that the two are one.
            "always" | "unless-stopped" => Ok(Self::Always),
            _ => text
                .strip_prefix("on-failure:")
                .and_then(|limit| limit.parse().ok().filter(|limit| *limit > 0))
                .map(|limit| Self::OnFailure(Some(limit)))
                .ok_or_else(|| format!("'{text}' is not a restart policy; use no, on-failure[:N] or always")),
        }
    }
}

/// A health check over HTTP at the exposed port, made by the provider's daemon from outside the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[serde(deny_unknown_fields)]
#[cbor(map)]
pub struct HealthCheck {
    /// Path to request; any status from 200 to 399 is healthy.
    #[n(0)]
    pub path: String,
    /// Time between checks (seconds).
    #[n(1)]
    pub interval_seconds: u32,
    /// Failures in a row that make it unhealthy.
    #[n(2)]
    pub retries: u32,
}

/// Everything that determines how a deployment runs. All of it is signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[serde(deny_unknown_fields)]
#[cbor(map)]
pub struct Specification {
    /// Its name, unique among the owner's deployments on this provider.
    #[n(0)]
    pub name: Name,
    /// What the owner called the image; for display only.
    #[n(1)]
    pub image_name: String,
    /// Replaces the image's entrypoint.
    #[n(2)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command, if not empty.
    #[n(3)]
    #[serde(default)]
    pub command: Vec<String>,
    /// Environment variables on top of the image's own.
    #[n(4)]
    #[serde(default)]
    pub environment: Vec<Variable>,
    /// The one port that may be reached from outside.
    #[n(5)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expose: Option<Port>,
    /// Whether the exposed port gets a public name at the provider's gateway.
    #[n(6)]
    pub publish: bool,
    /// Hard limits.
    #[n(7)]
    pub limits: Limits,
    /// What happens when it ends by itself.
    #[n(8)]
    pub restart: RestartPolicy,
    /// Optional health check.
    #[n(9)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthCheck>,
    /// Time between the request to end and the kill (seconds).
    #[n(10)]
    pub stop_timeout_seconds: u32,
}

/// One environment variable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[serde(deny_unknown_fields)]
#[cbor(map)]
pub struct Variable {
    /// Name: a letter or `_`, then letters, digits or `_`.
    #[n(0)]
    pub name: String,
    /// Value; any text without NUL.
    #[n(1)]
    pub value: String,
}

impl FromStr for Variable {
    type Err = String;

    /// Parses `NAME=VALUE`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text
            .split_once('=')
            .ok_or_else(|| format!("environment '{}' has no '='; write NAME=VALUE", crate::text::escape(text)))?;
        let variable = Self { name: name.to_owned(), value: value.to_owned() };
        variable.check()?;
        Ok(variable)
    }
}

impl Variable {
    fn check(&self) -> Result<(), String> {
        let name = self.name.as_bytes();
        let valid_name = !name.is_empty()
            && name.len() <= 256
            && !name[0].is_ascii_digit()
            && name.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'_');
        if !valid_name {
            return Err(format!("environment name '{}' is not valid", crate::text::escape(&self.name)));
        }
        check_text(&self.value).map_err(|why| format!("environment '{}' {why}", self.name))
    }
}

fn check_text(text: &str) -> Result<(), String> {
    if text.len() > TEXT_MAX {
        return Err(format!("is longer than {TEXT_MAX} bytes"));
    }
    if text.contains('\0') { Err("contains a NUL character".into()) } else { Ok(()) }
}

impl Specification {
    /// Checks every rule that the types alone cannot express. The sentence names the field.
    pub fn check(&self) -> Result<(), Problem> {
        let check = || -> Result<(), String> {
            if self.image_name.len() > IMAGE_NAME_MAX || self.image_name.chars().any(char::is_control) {
                return Err(format!("image name is longer than {IMAGE_NAME_MAX} bytes or has control characters"));
            }
            for (field, list) in [("entrypoint", self.entrypoint.as_ref()), ("command", Some(&self.command))] {
                let list = list.map_or(&[][..], Vec::as_slice);
                if list.len() > LIST_MAX {
                    return Err(format!("{field} has more than {LIST_MAX} arguments"));
                }
                list.iter().try_for_each(|text| check_text(text).map_err(|why| format!("{field} argument {why}")))?;
            }
            if self.environment.len() > LIST_MAX {
                return Err(format!("environment has more than {LIST_MAX} variables"));
            }
            self.environment.iter().try_for_each(Variable::check)?;
            if self.publish && self.expose.is_none() {
                return Err("publish needs a port: add --expose PORT".into());
            }
            self.check_limits()?;
            self.check_health()?;
            match self.stop_timeout_seconds {
                0..=300 => Ok(()),
                other => Err(format!("stop timeout must be at most 300 seconds, not {other}")),
            }
        };
        check().map_err(|message| Problem::new(Code::InvalidArgument, message))
    }

    fn check_limits(&self) -> Result<(), String> {
        let limits = &self.limits;
        if limits.cpu.get() < 10 {
            return Err(format!("cpu must be at least 0.01, not {}", limits.cpu));
        }
        // Docker refuses less than 6 MiB; below that not even the init process starts.
        if limits.memory.get() < 6 << 20 {
            return Err(format!("memory must be at least 6 MiB, not {}", limits.memory));
        }
        if !(3..=4096).contains(&limits.pids) {
            return Err(format!("pids must be between 3 and 4096, not {}", limits.pids));
        }
        if !(64..=1_048_576).contains(&limits.files) {
            return Err(format!("files must be between 64 and 1048576, not {}", limits.files));
        }
        if limits.scratch.get() < 4096 || limits.scratch > limits.memory {
            return Err(format!("scratch must be between 4 KiB and the memory limit, not {}", limits.scratch));
        }
        Ok(())
    }

    fn check_health(&self) -> Result<(), String> {
        let Some(health) = &self.health else { return Ok(()) };
        let path = health.path.as_bytes();
        if self.expose.is_none() {
            return Err("health check needs a port: add --expose PORT".into());
        }
        if path.first() != Some(&b'/') || path.len() > PATH_MAX || !path.iter().all(u8::is_ascii_graphic) {
            return Err(format!("health check path '{}' is not an absolute path", crate::text::escape(&health.path)));
        }
        if !(1..=3600).contains(&health.interval_seconds) || !(1..=100).contains(&health.retries) {
            return Err("health check interval must be 1 to 3600 seconds and retries 1 to 100".into());
        }
        Ok(())
    }
}

/// Asks for a deployment.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct DeployRequest {
    /// How it runs.
    #[n(0)]
    pub specification: Specification,
    /// Where its image comes from.
    #[n(1)]
    pub image: ImageSource,
}

/// Requests that change state. Each travels inside an [`crate::envelope`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Request {
    /// Make a deployment.
    #[n(0)]
    Deploy(#[n(0)] Box<DeployRequest>),
    /// Bring an image, and nothing else.
    #[n(1)]
    Push(#[n(0)] ImageOffer),
    /// End a deployment's container, keep the deployment.
    #[n(2)]
    Stop(#[n(0)] DeploymentId),
    /// Start a stopped or failed deployment.
    #[n(3)]
    Start(#[n(0)] DeploymentId),
    /// Stop and start.
    #[n(4)]
    Restart(#[n(0)] DeploymentId),
    /// End the container if it runs and forget the deployment.
    #[n(5)]
    Remove(#[n(0)] DeploymentId),
}

impl Request {
    /// The verb, for the audit log.
    pub fn verb(&self) -> &'static str {
        match self {
            Self::Deploy(_) => "deploy",
            Self::Push(_) => "push",
            Self::Stop(_) => "stop",
            Self::Start(_) => "start",
            Self::Restart(_) => "restart",
            Self::Remove(_) => "remove",
        }
    }
}

/// Life cycle of a deployment. The names are those of the JSON output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Encode, Decode)]
#[serde(rename_all = "snake_case")]
#[cbor(index_only)]
pub enum State {
    /// Recorded, its share reserved; nothing has been done yet.
    #[n(0)]
    Pending,
    /// Its image is on the way.
    #[n(1)]
    Fetching,
    /// Its container is being made or started, or waits for its next start.
    #[n(2)]
    Starting,
    /// Its container runs.
    #[n(3)]
    Running,
    /// Its container is being ended.
    #[n(4)]
    Stopping,
    /// It does not run, as its owner or its own end with code 0 wanted.
    #[n(5)]
    Stopped,
    /// It does not run, and should.
    #[n(6)]
    Failed,
}

impl State {
    /// Whether it holds a share of the machine.
    pub fn holds_share(self) -> bool {
        !matches!(self, Self::Stopped | Self::Failed)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pending => "pending",
            Self::Fetching => "fetching",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        })
    }
}

/// What a health check says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[serde(rename_all = "snake_case")]
#[cbor(index_only)]
pub enum Health {
    /// Not checked yet.
    #[n(0)]
    Unknown,
    /// The last check succeeded.
    #[n(1)]
    Healthy,
    /// As many checks in a row as allowed have failed.
    #[n(2)]
    Unhealthy,
}

/// A deployment as its provider reports it to its owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[cbor(map)]
pub struct Status {
    /// Its id.
    #[n(0)]
    pub id: DeploymentId,
    /// How it runs.
    #[n(1)]
    pub specification: Specification,
    /// Its image: SHA-256 of the configuration blob. Absent while a registry image has not been fetched.
    #[n(2)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<Digest>,
    /// Where it is in its life.
    #[n(3)]
    pub state: State,
    /// Why it failed or waits.
    #[n(4)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
    /// When it was recorded.
    #[n(5)]
    pub created_at: Timestamp,
    /// When the current or last run began.
    #[n(6)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// Exit code of the last run.
    #[n(7)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i64>,
    /// Restarts made by the restart policy.
    #[n(8)]
    pub restarts: u32,
    /// Result of the health check, if there is one.
    #[n(9)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<Health>,
    /// Public address at the gateway, while it is live.
    #[n(10)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
}

/// What a request has led to, step by step. The last one of an answer is final.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Event {
    /// Recorded durably: it will be driven on even if either side crashes now.
    #[n(0)]
    Accepted(#[n(0)] DeploymentId),
    /// These layers are lacking; send each on the layers protocol under this transfer's id.
    #[n(1)]
    Want(#[n(0)] Vec<Digest>),
    /// The state or its detail changed.
    #[n(2)]
    Changed(#[n(0)] Box<Status>),
    /// Final: done; the deployment as it is now.
    #[n(3)]
    Done(#[n(0)] Box<Status>),
    /// Final: the deployment is gone.
    #[n(4)]
    Removed(#[n(0)] DeploymentId),
    /// Final: the image is complete.
    #[n(5)]
    Pushed(#[n(0)] Digest),
    /// Final: refused or failed.
    #[n(6)]
    Failed(#[n(0)] Refusal),
}

impl Event {
    /// Whether the answer ends with it.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Done(_) | Self::Removed(_) | Self::Pushed(_) | Self::Failed(_))
    }
}

/// A refusal with what its receiver needs to understand it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Refusal {
    /// Code and sentence.
    #[n(0)]
    pub problem: Problem,
    /// The provider's clock, so that the message can say whose clock is wrong and by how much.
    #[n(1)]
    pub clock: Timestamp,
    /// The recorded outcome of the first copy of a repeated request.
    #[n(2)]
    pub outcome: Option<String>,
}

/// One signed line of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Reply {
    /// The request that this answers.
    #[n(0)]
    pub request: RequestHash,
    /// Who asked.
    #[n(1)]
    #[cbor(with = "peer_id")]
    pub audience: PeerId,
    /// Position in the answer, from 0, without gaps.
    #[n(2)]
    pub sequence: u32,
    /// When it was said.
    #[n(3)]
    pub at: Timestamp,
    /// What happened.
    #[n(4)]
    pub event: Event,
}

/// Opens a layer's transfer on the layers protocol.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct LayerHeader {
    /// The request whose answer wanted this layer.
    #[n(0)]
    pub request: RequestHash,
    /// Digest of the uncompressed layer.
    #[n(1)]
    pub layer: Digest,
}

/// Answer to a [`LayerHeader`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum LayerReply {
    /// Send the rest from this offset (bytes); what came earlier is kept.
    #[n(0)]
    From(#[n(0)] u64),
    /// Complete, verified and stored.
    #[n(1)]
    Stored,
    /// Not taken.
    #[n(2)]
    Refused(#[n(0)] Problem),
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use super::*;

    pub(crate) fn specification() -> Specification {
        Specification {
            name: "web".parse().unwrap(),
            image_name: "web:1".into(),
            entrypoint: None,
            command: vec![],
            environment: vec!["A=b=c".parse().unwrap()],
            expose: Some(Port::new(8080).unwrap()),
            publish: true,
            limits: Limits::default(),
            restart: RestartPolicy::No,
            health: None,
            stop_timeout_seconds: 10,
        }
    }

    #[test]
    fn good_specification_is_accepted() {
        assert_eq!(specification().check(), Ok(()));
        assert_eq!(specification().environment[0].value, "b=c");
    }

    #[test]
    fn every_bad_field_is_named() {
        type Spoil = fn(&mut Specification);
        let cases: [(&str, Spoil); 9] = [
            ("cpu", |s| s.limits.cpu = Millicores::new(1).unwrap()),
            ("memory", |s| s.limits.memory = ByteSize::mebibytes(5)),
            ("pids", |s| s.limits.pids = 0),
            ("files", |s| s.limits.files = u32::MAX),
            ("scratch", |s| s.limits.scratch = ByteSize::mebibytes(257)),
            ("environment", |s| s.environment[0].name = "A B".into()),
            ("command", |s| s.command = vec!["a\0".into()]),
            ("publish", |s| s.expose = None),
            ("stop timeout", |s| s.stop_timeout_seconds = 301),
        ];
        for (field, spoil) in cases {
            let mut bad = specification();
            spoil(&mut bad);
            let problem = bad.check().unwrap_err();
            assert!(problem.message.contains(field), "{field}: {problem}");
        }
    }

    #[test]
    fn registry_references_must_be_pinned() {
        let digest = Digest::of(b"manifest");
        assert!(format!("registry.example/a/b@{digest}").parse::<RegistryReference>().is_ok());
        for text in ["a/b", "a/b:latest", "--privileged@sha256:00", "A/b@sha256:00", "a//b@sha256:"] {
            assert!(text.parse::<RegistryReference>().is_err(), "{text}");
        }
    }

    #[test]
    fn restart_policies_parse_as_dockers() {
        assert_eq!("on-failure:3".parse(), Ok(RestartPolicy::OnFailure(Some(3))));
        assert_eq!("unless-stopped".parse(), Ok(RestartPolicy::Always));
        assert!("on-failure:0".parse::<RestartPolicy>().is_err());
        assert!("sometimes".parse::<RestartPolicy>().is_err());
    }
}
