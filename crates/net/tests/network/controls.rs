//! The same attacks where a protection is off: they succeed, so that the attack tests beside them attack something.
//!
//! The product has no switch for this. Here stands what remains without it: libp2p's own transports, or plain TCP.

use futures::{AsyncReadExt, AsyncWriteExt, future};
use libp2p::core::muxing::{StreamMuxerBox, StreamMuxerExt};
use libp2p::core::transport::{Boxed, DialOpts, ListenerId, PortUse, TransportEvent};
use libp2p::core::{Endpoint, upgrade::Version};
use libp2p::{Transport, noise, tcp, yamux};
use peer_net::{Keypair, Limits, Multiaddr, Options, PeerId};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::fixture::{Relay, key, loopback, node_with, options, port, until};

const MARKER: &[u8] = b"a marker that must not be readable on the way";

/// TCP, Noise and Yamux as the product has them, without its gate and without a pinned key.
fn transport(key: &Keypair) -> Boxed<(PeerId, StreamMuxerBox)> {
    tcp::tokio::Transport::new(tcp::Config::default())
        .upgrade(Version::V1)
        .authenticate(noise::Config::new(key).unwrap())
        .multiplex(yamux::Config::default())
        .boxed()
}

/// A listener without a gate that sends everybody's bytes back.
async fn unguarded(key: Keypair) -> (Multiaddr, JoinSet<()>) {
    let mut listening = transport(&key);
    listening.listen_on(ListenerId::next(), loopback()).unwrap();
    let address = loop {
        if let TransportEvent::NewAddress { listen_addr, .. } = next(&mut listening).await {
            break listen_addr;
        }
    };
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        loop {
            let TransportEvent::Incoming { upgrade, .. } = next(&mut listening).await else { continue };
            // The handshake goes on only while its transport is polled.
            let (_, mut muxer) = upgrade.await.unwrap();
            let mut stream = future::poll_fn(|context| drive_inbound(&mut muxer, context)).await;
            let echoing = async {
                let mut bytes = vec![0; MARKER.len()];
                stream.read_exact(&mut bytes).await.unwrap();
                stream.write_all(&bytes).await.unwrap();
                stream.close().await.ok();
            };
            // What was written leaves only while the connection is driven: until the other side has let go.
            let ended = future::poll_fn(|context| muxer.poll_unpin(context));
            if let future::Either::Left(((), ended)) = future::select(Box::pin(echoing), ended).await {
                ended.await.ok();
            }
        }
    });
    (address, serving)
}

fn drive_inbound(
    muxer: &mut StreamMuxerBox,
    context: &mut std::task::Context<'_>,
) -> std::task::Poll<libp2p::core::muxing::SubstreamBox> {
    if let std::task::Poll::Ready(stream) = muxer.poll_inbound_unpin(context) {
        return std::task::Poll::Ready(stream.unwrap());
    }
    assert!(!matches!(muxer.poll_unpin(context), std::task::Poll::Ready(Err(_))), "the connection ended");
    std::task::Poll::Pending
}

async fn next(
    transport: &mut Boxed<(PeerId, StreamMuxerBox)>,
) -> TransportEvent<<Boxed<(PeerId, StreamMuxerBox)> as Transport>::ListenerUpgrade, std::io::Error> {
    future::poll_fn(|context| std::pin::Pin::new(&mut *transport).poll(context)).await
}

/// Dials an address without saying who must answer. Gives who did, and what came back for the marker.
async fn dial(address: Multiaddr) -> (PeerId, Vec<u8>) {
    let mut transport = transport(&Keypair::generate_ed25519());
    let how = DialOpts { role: Endpoint::Dialer, port_use: PortUse::New };
    let (peer, mut muxer) = transport.dial(address, how).unwrap().await.unwrap();
    let mut stream = future::poll_fn(|context| muxer.poll_outbound_unpin(context)).await.unwrap();
    let mut answer = Vec::new();
    let talking = async {
        stream.write_all(MARKER).await.unwrap();
        stream.flush().await.unwrap();
        stream.read_to_end(&mut answer).await.ok();
    };
    future::select(Box::pin(talking), future::poll_fn(|context| muxer.poll_unpin(context))).await;
    (peer, answer)
}

/// Beside `v1_untrusted_peer_is_refused_before_any_protocol_inbound`.
#[tokio::test]
async fn control_v1_g3_without_the_gate_a_stranger_is_served() {
    let (address, _serving) = unguarded(key(1)).await;
    let (_, answer) = dial(address).await;
    assert_eq!(answer, MARKER);
}

/// Beside `v6_wrong_key_at_the_address_is_refused`.
#[tokio::test]
async fn control_v6_g3_without_a_pinned_key_the_impostor_is_told_everything() {
    let expected = key(1).public().to_peer_id();
    let (address, _serving) = unguarded(key(2)).await;
    let (answered, answer) = dial(address).await;
    assert_ne!(answered, expected);
    assert_eq!(answer, MARKER, "the impostor has the bytes that were meant for another");
}

/// Beside `v6_traffic_in_the_middle_holds_no_plaintext`: the same relay between two ends of plain TCP.
#[tokio::test]
async fn control_g1_v6_i4_without_noise_the_relay_reads_everything() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("/ip4/127.0.0.1/tcp/{}", listener.local_addr().unwrap().port()).parse().unwrap();
    let relay = Relay::to(&address).await;
    let mut sending = TcpStream::connect(("127.0.0.1", port(&relay.address))).await.unwrap();
    sending.write_all(MARKER).await.unwrap();
    let (mut receiving, _) = listener.accept().await.unwrap();
    let mut received = vec![0; MARKER.len()];
    receiving.read_exact(&mut received).await.unwrap();
    assert_eq!(received, MARKER);
    assert_eq!(*relay.passed.lock().unwrap(), MARKER);
}

/// Beside `v1_pending_handshakes_are_bounded_per_ip`: where the bounds are far away, every silent connection is held.
#[tokio::test]
async fn control_g6_without_near_bounds_every_silent_connection_is_held() {
    const SILENT: usize = 200;
    let limits = Limits { pending_handshakes_per_address: 10_000, pending_handshakes: 10_000, ..Limits::default() };
    let node = node_with(1, Options { limits, ..options() }).await;
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port(&node.address())));
    let mut silent = Vec::new();
    for _ in 0..SILENT {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    until(|| node.network.counters().handshakes_pending == SILENT as u64).await;
    assert_eq!(node.network.counters().connections_over_limit, 0);
}
