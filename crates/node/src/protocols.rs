//! The protocols that machines speak with one another, and who may open which.

use peer_net::{Protocol, Protocols, Role};

/// Requests and reads.
pub const CONTROL: Protocol = Protocol::new("/peer-compute/control/1");
/// Layers of images, from requester to provider.
pub const LAYERS: Protocol = Protocol::new("/peer-compute/layers/1");
/// Logs, from provider to requester.
pub const LOGS: Protocol = Protocol::new("/peer-compute/logs/1");
/// A deployment's port on the requester's loopback.
pub const FORWARD: Protocol = Protocol::new("/peer-compute/forward/1");
/// Answers to invitations.
pub const JOIN: Protocol = Protocol::new("/peer-compute/join/1");
/// Leases, from provider to gateway.
pub const LEASE: Protocol = Protocol::new("/peer-compute/lease/1");
/// Visits, from gateway to provider.
pub const TUNNEL: Protocol = Protocol::new("/peer-compute/tunnel/1");

/// What this machine's gate offers to each role.
pub fn offered() -> Protocols {
    Protocols::none()
        .allow(Role::Peer, &[CONTROL, LAYERS, LOGS, FORWARD])
        .allow(Role::Joiner, &[JOIN])
        .allow(Role::Gateway, &[TUNNEL])
}
