//! Reads: answered from proven connection and grant, without an envelope, because they change nothing.

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::code::Problem;
use crate::deploy::Status;
use crate::id::{DeploymentId, Incarnation};
pub use crate::statement::Offered;
use crate::unit::{ByteSize, Millicores, Port, Timestamp};

/// First frame of every control stream, written by the provider.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Hello {
    /// The present run of the daemon.
    #[n(0)]
    pub incarnation: Incarnation,
    /// Its clock.
    #[n(1)]
    pub clock: Timestamp,
    /// Its program's version, for people.
    #[n(2)]
    pub version: String,
}

/// Second frame of a control stream, written by the requester.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Call {
    /// A signed request; signed replies follow.
    #[n(0)]
    Signed(
        #[n(0)]
        #[cbor(with = "minicbor::bytes")]
        Vec<u8>,
    ),
    /// A read; one [`Answer`] follows.
    #[n(1)]
    Query(#[n(0)] Query),
    /// Keys about which the caller holds a statement; [`Answer::Wanted`] follows.
    #[n(2)]
    Offer(#[n(0)] Vec<Offered>),
    /// A [`crate::statement::Statement`]; [`Answer::Followed`] follows.
    #[n(3)]
    Statement(
        #[n(0)]
        #[cbor(with = "minicbor::bytes")]
        Vec<u8>,
    ),
}

/// What can be read on the control protocol. Only the asker's own deployments are ever seen.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Query {
    /// All deployments of the asker.
    #[n(0)]
    List,
    /// One deployment.
    #[n(1)]
    Inspect(#[n(0)] DeploymentId),
    /// What a deployment uses at present.
    #[n(2)]
    Stats(#[n(0)] DeploymentId),
    /// What the asker may still use.
    #[n(3)]
    Capacity,
}

/// The answer to a [`Query`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Answer {
    /// To [`Query::List`].
    #[n(0)]
    List(#[n(0)] Vec<Status>),
    /// To [`Query::Inspect`].
    #[n(1)]
    Inspect(#[n(0)] Box<Status>),
    /// To [`Query::Stats`].
    #[n(2)]
    Stats(#[n(0)] Usage),
    /// To [`Query::Capacity`].
    #[n(3)]
    Capacity(#[n(0)] Box<Capacity>),
    /// Refused or failed.
    #[n(4)]
    Problem(#[n(0)] Problem),
    /// To [`Call::Offer`]: the positions of those that are wanted.
    #[n(5)]
    Wanted(#[n(0)] Vec<u32>),
    /// To [`Call::Statement`]: it is in force here, from now on or already.
    #[n(6)]
    Followed,
}

/// What a running container uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[cbor(map)]
pub struct Usage {
    /// Processor time since its start (microseconds).
    #[n(0)]
    pub cpu_microseconds: u64,
    /// Present use of processors (thousandths of one), over the moment of measuring.
    #[n(1)]
    pub cpu_millicores: u32,
    /// Memory in use (bytes).
    #[n(2)]
    pub memory_bytes: u64,
    /// Memory limit (bytes).
    #[n(3)]
    pub memory_limit_bytes: u64,
    /// Processes and threads.
    #[n(4)]
    pub pids: u64,
    /// Limit of processes and threads.
    #[n(5)]
    pub pids_limit: u64,
}

/// What a peer is granted and what is left of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[cbor(map)]
pub struct Capacity {
    /// The grant; absent if the peer may not deploy here.
    #[n(0)]
    pub granted: Option<crate::grant::DeployGrant>,
    /// Processors that a new deployment could get now (millicores).
    #[n(1)]
    pub free_cpu: Option<Millicores>,
    /// Memory that a new deployment could get now (bytes).
    #[n(2)]
    pub free_memory: Option<ByteSize>,
    /// Deployments that could be added now.
    #[n(3)]
    pub free_containers: u32,
    /// Architecture of the machine in the notation of container images, such as `amd64`.
    #[n(4)]
    pub architecture: String,
    /// How well the machine keeps containers apart, as far as is known there.
    #[n(20)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolation: Option<crate::deploy::Isolation>,
}

/// First frame on the logs protocol.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct LogsQuery {
    /// Whose log.
    #[n(0)]
    pub deployment: DeploymentId,
    /// Only so many last lines; all that are kept, if absent.
    #[n(1)]
    pub tail: Option<u32>,
    /// Only lines from this moment on.
    #[n(2)]
    pub since: Option<Timestamp>,
    /// Go on with new lines until the container ends.
    #[n(3)]
    pub follow: bool,
}

/// Which output a line was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[serde(rename_all = "snake_case")]
#[cbor(index_only)]
pub enum Output {
    /// Standard output.
    #[n(0)]
    Stdout,
    /// Standard error.
    #[n(1)]
    Stderr,
}

/// One piece of a container's log, in the order in which it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[cbor(map)]
pub struct LogLine {
    /// When the engine received it.
    #[n(0)]
    pub at: Timestamp,
    /// Which output.
    #[n(1)]
    pub output: Output,
    /// The bytes, usually one line with its end; text that is not UTF-8 has its bad bytes replaced.
    #[n(2)]
    pub text: String,
}

/// Frames of the logs protocol after the query.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum LogFrame {
    /// Some lines.
    #[n(0)]
    Lines(#[n(0)] Vec<LogLine>),
    /// The log is over: the container ended, or everything kept has been sent.
    #[n(1)]
    End,
    /// Refused or failed.
    #[n(2)]
    Problem(#[n(0)] Problem),
}

/// First frame on the forward protocol.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ForwardHeader {
    /// Whose port.
    #[n(0)]
    pub deployment: DeploymentId,
    /// The port, which must be the one that the deployment exposes.
    #[n(1)]
    pub port: Port,
}

/// Answer to a [`ForwardHeader`] or a [`crate::tunnel::VisitHeader`]; after `Open` raw bytes follow both ways.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum StreamReply {
    /// Connected.
    #[n(0)]
    Open,
    /// Not connected.
    #[n(1)]
    Refused(#[n(0)] Problem),
}
