//! The local interface between `peerctl` and `peerd`: JSON over HTTP/1.1 on a Unix socket.
//!
//! Answers that take time are streams of JSON objects, one a line (NDJSON). A failure is a [`Problem`] as JSON with a 4xx
//! or 5xx status, or as the last object of a stream. Field names are stable; scripts see them through `--json`.

mod finding;
mod identity;

use serde::{Deserialize, Serialize};

use crate::code::Problem;
use crate::deploy::{RegistryReference, Specification, Status};
use crate::grant::Grants;
use crate::id::{DeploymentId, Digest, Name, RequestHash};
use crate::pause::PauseShown;
use crate::query::{Capacity, LogLine};
use crate::unit::Timestamp;

pub use finding::{Finding, Level};
pub use identity::{
    ApplyStatement, EndedKey, FollowedStatement, IdentityState, InitReply, InitRequest, Revoke, Revoked, Rotate,
    Rotated, Seal, Sealed, Secret, Unlock, Unseal, Whoami,
};

/// Header that every request must carry, so that no web page can make one (value: `1`).
pub const REQUIRED_HEADER: &str = "peer-compute-client";
/// Protocol named in `Upgrade` by a port-forwarding request.
pub const FORWARD_UPGRADE: &str = "peer-compute-forward";

/// `GET /v1/version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Version of the program.
    pub version: String,
    /// Version of this interface.
    pub api: u32,
}

/// A trusted peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// PeerId.
    pub peer_id: String,
    /// The name that it has here.
    pub name: Name,
    /// What it is allowed here.
    pub grants: Grants,
    /// Addresses at which it is dialled.
    pub addresses: Vec<String>,
    /// When it was added.
    pub added_at: Timestamp,
    /// Nine digits that must be the same on both sides.
    pub verification_code: String,
    /// The live connection, if there is one.
    pub connection: Option<Connection>,
    /// Why there is none, if that is known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub last_error: Option<String>,
}

/// Answer to `DELETE /v1/peers/{peer}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovedPeer {
    /// PeerId.
    pub peer_id: String,
    /// The name that it had here; absent if it was no peer any more.
    pub name: Option<Name>,
    /// Its deployments here that are being removed.
    pub ended: Vec<Name>,
    /// Our deployments there, which are out of reach now.
    pub out_of_reach: Vec<Name>,
}

/// A live connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// The other side's address.
    pub address: String,
    /// Whether we made it.
    pub outbound: bool,
    /// Since when.
    pub since: Timestamp,
    /// Round trip of the last ping (microseconds).
    pub round_trip_microseconds: Option<u64>,
}

/// `POST /v1/peers`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddPeer {
    /// The other machine's card.
    pub card: String,
    /// Name to give it here, instead of the one that it suggests.
    pub name: Option<Name>,
    /// What to allow it.
    #[serde(default)]
    pub grants: Grants,
}

/// `PATCH /v1/peers/{peer}`; absent fields stay as they are.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangePeer {
    /// New name.
    pub name: Option<Name>,
    /// New grants, replacing the old.
    pub grants: Option<Grants>,
    /// Whether its deployments go on if it may deploy no more.
    #[serde(default)]
    pub keep_deployments: bool,
    /// New addresses, replacing the old.
    pub addresses: Option<Vec<String>>,
}

/// `POST /v1/invitations`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Invite {
    /// What the one who joins is allowed here.
    #[serde(default)]
    pub grants: Grants,
    /// Name to give the one who joins, instead of the one that it suggests.
    pub name: Option<Name>,
    /// Life of the invitation (seconds), at most an hour.
    pub expires_seconds: u64,
}

/// An open invitation.
#[derive(Clone, Serialize, Deserialize)]
pub struct Invitation {
    /// Names it in `invite list` and `invite revoke`: the PeerId of its one-time key.
    pub id: String,
    /// The secret text; present only in the answer to the request that made it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ticket: Option<String>,
    /// When it ends.
    pub expires_at: Timestamp,
    /// What the one who joins is allowed here.
    pub grants: Grants,
}

impl std::fmt::Debug for Invitation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Invitation({})", self.id)
    }
}

/// `POST /v1/join`.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Join {
    /// The ticket.
    pub ticket: String,
    /// Name to give the inviter here, instead of the one that it suggests.
    pub name: Option<Name>,
    /// What to allow the inviter here.
    #[serde(default)]
    pub grants: Grants,
}

impl std::fmt::Debug for Join {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Join")
    }
}

/// Answer to [`Join`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// The inviter, now a peer.
    pub peer: Peer,
    /// What it allows us.
    pub granted: Grants,
}

/// `POST /v1/gateways`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddGateway {
    /// Address with the pinned PeerId: `/ip4/…/tcp/…/p2p/…`.
    pub address: String,
}

/// A gateway that this machine serves through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gateway {
    /// Pinned PeerId.
    pub peer_id: String,
    /// Its address.
    pub address: String,
    /// Whether the tunnel stands.
    pub connected: bool,
    /// Names that it routes to us at present.
    pub leases: u32,
    /// Why it does not stand, if that is known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub last_error: Option<String>,
}

/// `POST /v1/deployments`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deploy {
    /// Name, PeerId or unique prefix of the peer to run on.
    pub peer: String,
    /// How to run.
    pub specification: Specification,
    /// Where the image comes from.
    pub image: Image,
}

/// An image as `peerctl` offers it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Image {
    /// `peerctl` holds it and uploads what is wanted.
    Offered {
        /// The configuration blob, base64.
        configuration: String,
        /// Uncompressed size of each layer (bytes), lowest first.
        layer_sizes: Vec<u64>,
    },
    /// The provider fetches it from a registry.
    Registry(RegistryReference),
}

/// `POST /v1/images`: bring an image to a peer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Push {
    /// Name, PeerId or unique prefix of the peer.
    pub peer: String,
    /// The image.
    pub image: Image,
}

/// One object of the stream that answers a request about deployments or images. The last one is `done`, `removed`,
/// `pushed` or `failed`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Progress {
    /// Recorded durably by the provider.
    Accepted {
        /// The new deployment.
        deployment: DeploymentId,
    },
    /// Upload these layers with `PUT /v1/transfers/{transfer}/layers/{digest}`.
    Want {
        /// The transfer.
        transfer: RequestHash,
        /// The layers.
        layers: Vec<Digest>,
    },
    /// The state or its detail changed.
    Changed {
        /// As it is now.
        deployment: Box<Deployment>,
    },
    /// Done.
    Done {
        /// As it is now.
        deployment: Box<Deployment>,
    },
    /// The deployment is gone.
    Removed {
        /// Its id.
        deployment: DeploymentId,
    },
    /// The image is complete.
    Pushed {
        /// The image.
        image: Digest,
    },
    /// Refused or failed.
    Failed(Problem),
}

/// Answer to `PUT /v1/transfers/{transfer}/layers/{digest}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerSent {
    /// The layer.
    pub digest: Digest,
    /// Bytes that travelled; less than its size if a part had arrived earlier.
    pub bytes_sent: u64,
}

/// A deployment with the peer that runs it (or, for hosted ones, that owns it).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployment {
    /// PeerId of the other side.
    pub peer_id: String,
    /// Name of the other side here; its PeerId if it has none any more.
    pub peer: String,
    /// When this was true; older than now if the peer cannot be reached.
    pub as_of: Timestamp,
    /// Whether the peer answered just now.
    pub reachable: bool,
    /// What its provider says.
    #[serde(flatten)]
    pub status: Status,
}

/// `GET /v1/deployments`: ours on other machines; `?hosted=true`: those of others on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployments {
    /// All of them.
    pub deployments: Vec<Deployment>,
    /// Peers that did not answer, with the reason.
    pub unreachable: Vec<Unreachable>,
}

/// A peer that did not answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unreachable {
    /// Its name.
    pub peer: String,
    /// Why.
    pub problem: Problem,
}

/// One object of the logs stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogEntry {
    /// A line.
    Line(LogLine),
    /// The log is over.
    End,
    /// Refused or failed.
    Problem(Problem),
}

/// One object of `GET /v1/events`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// When.
    pub at: Timestamp,
    /// What kind, in stable snake_case: `peer_connected`, `peer_disconnected`, `peer_refused`, `peer_added`,
    /// `peer_removed`, `peer_rotated`, `identity_confirmed`, `identity_revoked`, `deployment_changed`, `lease_live`,
    /// `lease_lost`, `request_refused`, `grant_ended`.
    pub kind: String,
    /// The peer concerned.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub peer: Option<String>,
    /// The deployment concerned.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub deployment: Option<DeploymentId>,
    /// A sentence.
    pub message: String,
}

/// One line of the audit log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditLine {
    /// Position, from 1, without gaps.
    pub sequence: u64,
    /// When.
    pub at: Timestamp,
    /// Who asked: a PeerId, or `local`.
    pub actor: String,
    /// What was asked.
    pub action: String,
    /// `allowed` or `refused`.
    pub outcome: String,
    /// The threat that a refusal answers.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub threat: Option<String>,
    /// A sentence.
    pub detail: String,
    /// Hash of this line and the one before (BLAKE3, hexadecimal).
    pub hash: String,
}

/// Answer to `GET /v1/audit/verify`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditVerdict {
    /// Lines checked.
    pub lines: u64,
    /// Hash of the last line.
    pub head: String,
    /// The first fault, if there is one.
    pub fault: Option<String>,
}

/// `GET /v1/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Version of the daemon.
    pub version: String,
    /// Identity; absent before `init`, and while it is locked.
    pub identity: Option<Whoami>,
    /// Whether the identity is sealed and waits for its passphrase: nobody is served then.
    #[serde(default)]
    pub locked: bool,
    /// When the daemon began.
    pub started_at: Timestamp,
    /// Peers in the trust list.
    pub peers: u32,
    /// Peers with a live connection.
    pub peers_connected: u32,
    /// Gateways.
    pub gateways: Vec<Gateway>,
    /// The container engine; absent if this machine runs none.
    pub engine: Option<EngineStatus>,
    /// Deployments of others that hold a share of this machine.
    pub hosted: u32,
    /// What the owner of this machine has paused.
    pub pauses: Vec<PauseShown>,
    /// What this machine offers in sum.
    pub offered: Capacity,
}

/// The container engine as the daemon sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineStatus {
    /// Whether it answers.
    pub available: bool,
    /// Its version.
    pub version: Option<String>,
    /// Why it does not answer, or may not be used.
    pub problem: Option<Problem>,
    /// Why containers get no ways out and no shared networks now; absent if they do.
    pub egress_problem: Option<Problem>,
}

/// An image that was brought to this machine by peers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostedImage {
    /// SHA-256 of its configuration.
    pub digest: Digest,
    /// Size of its layers (bytes).
    pub size_bytes: u64,
    /// Who brought it.
    pub brought_by: Vec<String>,
    /// Deployments that use it.
    pub used_by: u32,
    /// When it was last needed.
    pub last_used_at: Timestamp,
}

/// One key of the resolved configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// The key as in the file.
    pub key: String,
    /// Its value.
    pub value: String,
    /// Where it comes from: `default`, `file`, `environment` or `flag`.
    pub source: String,
}
