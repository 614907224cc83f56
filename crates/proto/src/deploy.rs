//! Deployments as they are asked for and reported. Nothing here can say "privileged", "bind mount", "device" or
//! "host network": what the vocabulary lacks cannot be requested (I1, I2).

mod demands;
mod egress;
mod image;
mod privilege;
mod specification;
mod writable;

use std::fmt;

use libp2p_identity::PeerId;
use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::code::Problem;
use crate::frame::peer_id;
use crate::id::{DeploymentId, Digest, RequestHash};
use crate::unit::Timestamp;

pub use demands::{Demands, Isolation, RuntimeName};
pub use egress::{Destination, Egress, EgressGrant, HOSTS_MAX, Host, HostName, HostPattern};
pub use image::{
    IMAGE_CONFIGURATION_MAX, IMAGE_NAME_MAX, ImageOffer, ImageSource, LAYER_SIZE_MAX, LAYERS_MAX, RegistryReference,
};
pub use privilege::{Capability, User, list_capabilities};
pub use specification::{HealthCheck, LIST_MAX, Limits, PATH_MAX, RestartPolicy, Specification, TEXT_MAX, Variable};
pub use writable::{MountPath, WRITABLE_MAX, Writable};

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
    /// The owner of the machine keeps it from running; it goes on when he lets it.
    #[n(7)]
    Paused,
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
            Self::Paused => "paused",
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
    /// Why it failed or is paused.
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
    /// How well the machine keeps it apart, as far as is known there.
    #[n(20)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolation: Option<Isolation>,
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
