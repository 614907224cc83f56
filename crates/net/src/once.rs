//! One stream to one peer under an identity of its own: what joining with a ticket needs.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use libp2p::identity::Keypair;
use libp2p::{Multiaddr, PeerId};
use tokio::sync::watch;

use crate::connection::Traffic;
use crate::gate::{Admission, Policy, Role};
use crate::network::{Network, OpenError, StartError};
use crate::options::Options;
use crate::protocol::{Protocol, Protocols};
use crate::streams::Stream;

/// Why the stream was not opened.
#[derive(Debug, thiserror::Error)]
pub enum DialOnceError {
    /// The local side could not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The peer could not be reached, or refused.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// Keeps the connection of a [`dial_once`] alive; dropping it ends the connection at once.
#[derive(Debug)]
pub struct Dialed {
    network: Network,
}

impl Dialed {
    /// Closes the connection in order.
    pub async fn close(self) {
        self.network.shutdown().await;
    }
}

/// Dials `peer` at `addresses` with the given identity and opens one stream, all within `timeout`. Nothing is offered
/// to the other side, and nobody else can connect.
pub async fn dial_once(
    keypair: Keypair,
    peer: PeerId,
    addresses: &[Multiaddr],
    protocol: Protocol,
    timeout: Duration,
) -> Result<(Stream, Dialed), DialOnceError> {
    let admission = Admission { role: Role::Peer, addresses: addresses.to_vec() };
    let policy = Policy { admitted: HashMap::from([(peer, admission)]) };
    let (_unchanging, policy) = watch::channel(Arc::new(policy));
    let options = Options { open_timeout: timeout, bulk_connection: false, ..Options::default() };
    let (network, _nothing_comes_in) = Network::start(keypair, options, policy, Protocols::none()).await?;
    let stream = network.open(peer, protocol, Traffic::Control).await?;
    Ok((stream, Dialed { network }))
}
