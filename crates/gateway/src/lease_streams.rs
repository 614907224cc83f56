//! The gateway's end of the lease protocol: one task for each stream; its leases end with it.

use std::sync::Arc;
use std::time::Duration;

use peer_net::exchange::{Deadline, ExchangeError, read_frame, write_frame};
use peer_net::{InboundStream, Incoming, PeerId, Protocol, Stream};
use peer_proto::code::{Code, Problem};
use peer_proto::frame::TUNNEL_FRAME_MAX;
use peer_proto::id::Label;
use peer_proto::tunnel::{LeaseReply, LeaseRequest};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::leases::{Leases, Session};
use crate::names::Domain;

/// The protocol that leases live on.
pub const LEASE: Protocol = Protocol::new("/peer-compute/lease/1");

/// Longest silence on a lease stream: for ever in practice, as the connection's own liveness checks end it when the
/// provider is gone.
const SILENCE: Duration = Duration::from_hours(365 * 24);
/// Longest time that a provider may take to read an answer.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// How public addresses are written.
#[derive(Debug, Clone)]
pub struct PublicAddress {
    /// The domain of all names.
    pub domain: Domain,
    /// The port that visitors use.
    pub port: u16,
}

impl PublicAddress {
    /// The address of a name.
    pub fn url(&self, label: &Label) -> String {
        format!("https://{}{}", self.domain.host_of(label), self.port_suffix())
    }

    /// What follows the name's label in its address.
    pub fn suffix(&self) -> String {
        format!(".{}{}", self.domain, self.port_suffix())
    }

    fn port_suffix(&self) -> String {
        if self.port == 443 { String::new() } else { format!(":{}", self.port) }
    }
}

/// Serves lease streams until the network or the gateway stops.
pub async fn serve(mut incoming: Incoming, leases: Arc<Leases>, public: PublicAddress, stop: CancellationToken) {
    let mut streams = JoinSet::new();
    loop {
        tokio::select! {
            arrived = incoming.next() => match arrived {
                Some(InboundStream { peer, protocol: LEASE, stream, .. }) => {
                    streams.spawn(serve_stream(peer, stream, Arc::clone(&leases), public.clone()));
                }
                // No other protocol is offered, so nothing else arrives.
                Some(_) => {}
                None => break,
            },
            Some(_) = streams.join_next(), if !streams.is_empty() => {}
            () = stop.cancelled() => break,
        }
    }
    streams.shutdown().await;
}

/// Ends the session's leases however the task ends.
struct SessionEnd {
    leases: Arc<Leases>,
    session: Session,
}

impl Drop for SessionEnd {
    fn drop(&mut self) {
        self.leases.end(self.session);
    }
}

async fn serve_stream(peer: PeerId, mut stream: Stream, leases: Arc<Leases>, public: PublicAddress) {
    let session = leases.begin(peer);
    let ends = SessionEnd { leases, session };
    tracing::info!(provider = %peer, "provider connected");
    let end = answer_all(peer, &mut stream, &ends, &public).await;
    match end {
        Ok(()) | Err(ExchangeError::Ended | ExchangeError::Broken(_)) => {
            tracing::info!(provider = %peer, "provider left");
        }
        Err(error) => tracing::warn!(provider = %peer, %error, "lease stream ended"),
    }
}

async fn answer_all(
    peer: PeerId,
    stream: &mut Stream,
    ends: &SessionEnd,
    public: &PublicAddress,
) -> Result<(), ExchangeError> {
    loop {
        let request = read_frame::<LeaseRequest, _>(stream, TUNNEL_FRAME_MAX, Deadline::after(SILENCE)).await?;
        let reply = answer(peer, &request, ends, public);
        write_frame(stream, &reply, TUNNEL_FRAME_MAX, Deadline::after(ANSWER_TIME)).await?;
    }
}

fn answer(peer: PeerId, request: &LeaseRequest, ends: &SessionEnd, public: &PublicAddress) -> LeaseReply {
    match request {
        LeaseRequest::Register(deployment) => match ends.leases.register(ends.session, *deployment) {
            Ok(label) => {
                tracing::info!(provider = %peer, %deployment, %label, "name is live");
                LeaseReply::Live(public.url(&label))
            }
            Err(error) => {
                tracing::warn!(provider = %peer, %deployment, %error, "name refused");
                LeaseReply::Refused(Problem::new(Code::GatewayRefused, error.to_string()))
            }
        },
        LeaseRequest::Release(deployment) => {
            ends.leases.release(ends.session, *deployment);
            tracing::info!(provider = %peer, %deployment, "name is released");
            LeaseReply::Released
        }
    }
}
