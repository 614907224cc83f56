//! Leases and visits: what a provider and a gateway say to each other.
//!
//! The gateway can name a deployment and nothing else; it cannot express an address, a port or a path to dial (SECURITY M17).

use std::net::IpAddr;

use minicbor::{Decode, Encode};

use crate::code::Problem;
use crate::frame::as_text;
use crate::id::DeploymentId;

/// Most leases of one provider at one gateway.
pub const LEASES_MAX: usize = 256;

/// From provider to gateway on the lease protocol. Leases live no longer than the stream.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum LeaseRequest {
    /// Begin to route the label derived from the provider's PeerId and this deployment.
    #[n(0)]
    Register(#[n(0)] DeploymentId),
    /// Stop routing it; answered once no new visit can reach it.
    #[n(1)]
    Release(#[n(0)] DeploymentId),
}

/// From gateway to provider on the lease protocol, one for each request, in order.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum LeaseReply {
    /// Routed at this public address (`https://<label>.<domain>[:port]`).
    #[n(0)]
    Live(#[n(0)] String),
    /// Not routed any more.
    #[n(1)]
    Released,
    /// Not accepted.
    #[n(2)]
    Refused(#[n(0)] Problem),
}

/// First frame on the tunnel protocol, from gateway to provider. A [`crate::query::StreamReply`] answers.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct VisitHeader {
    /// The deployment that the visitor asked for.
    #[n(0)]
    pub deployment: DeploymentId,
    /// The visitor's address, for the deployment's access records.
    #[n(1)]
    #[cbor(with = "as_text")]
    pub visitor: IpAddr,
}
