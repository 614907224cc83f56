//! V1, V6 and roles: who gets in, who does not, and what is left behind.

use std::time::Duration;

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt, future, stream};
use libp2p::core::muxing::StreamMuxerExt;
use libp2p::core::transport::{DialOpts, PortUse};
use libp2p::core::{Endpoint, upgrade::Version};
use libp2p::{Transport, noise, tcp, yamux};
use peer_net::{
    ConnectionState, DialOnceError, Keypair, Limits, NetworkEvent, OpenError, Options, RefusalReason, Role, Traffic,
    dial_once,
};
use tokio::net::{TcpSocket, TcpStream};

use crate::fixture::{BULK, CONTROL, JOIN, Relay, key, node, node_with, options, pair, port, until};

#[tokio::test]
async fn v1_untrusted_peer_is_refused_before_any_protocol_inbound() {
    let (mut guarded, stranger) = (node(1).await, node(2).await);
    stranger.admit(guarded.id(), Role::Peer, vec![guarded.address()]);
    until(|| !matches!(stranger.network.connection_state(guarded.id()), ConnectionState::NotAdmitted)).await;
    let outcome = stranger.network.open(guarded.id(), CONTROL, Traffic::Control).await;
    assert_eq!(outcome.unwrap_err(), OpenError::RefusedByPeer { peer: guarded.id() });
    let refused = guarded.event(|event| matches!(event, NetworkEvent::Refused { .. })).await;
    let NetworkEvent::Refused { peer, reason, .. } = refused else { unreachable!() };
    assert_eq!((peer, reason), (Some(stranger.id()), RefusalReason::NotAdmitted));
    assert_eq!(guarded.network.counters().connections_established, 0);
    assert_eq!(guarded.network.tracked_peers(), 0);
}

#[tokio::test]
async fn v1_untrusted_peer_is_never_dialled() {
    let (node, stranger) = (node(1).await, node(2).await);
    let outcome = node.network.open(stranger.id(), CONTROL, Traffic::Control).await;
    assert_eq!(outcome.unwrap_err(), OpenError::NotAdmitted { peer: stranger.id() });
    assert_eq!(stranger.network.counters(), peer_net::CountersSnapshot::default());
}

/// A client of its own making that asks the multiplexed connection for the list of protocols.
#[tokio::test]
async fn v1_untrusted_peer_learns_no_protocol_name() {
    let mut guarded = node(1).await;
    let mut transport = tcp::tokio::Transport::new(tcp::Config::default())
        .upgrade(Version::V1)
        .authenticate(noise::Config::new(&Keypair::generate_ed25519()).unwrap())
        .multiplex(yamux::Config::default())
        .boxed();
    let how = DialOpts { role: Endpoint::Dialer, port_use: PortUse::New };
    let (peer, mut muxer) = transport.dial(guarded.address(), how).unwrap().await.unwrap();
    assert_eq!(peer, guarded.id());
    let mut answer = Vec::new();
    if let Ok(mut stream) = future::poll_fn(|context| muxer.poll_outbound_unpin(context)).await {
        let asking = async {
            stream.write_all(b"\x13/multistream/1.0.0\n\x03ls\n\x10/test/control/1\n").await.ok();
            stream.flush().await.ok();
            stream.read_to_end(&mut answer).await.ok();
        };
        let driving = future::poll_fn(|context| muxer.poll_unpin(context));
        future::select(Box::pin(asking), driving).await;
    }
    assert_eq!(answer, b"", "the refused client was answered");
    guarded.event(|event| matches!(event, NetworkEvent::Refused { .. })).await;
}

#[tokio::test]
async fn v1_removed_peer_loses_live_connections_at_once() {
    let (remover, mut removed) = pair().await;
    let mut incoming = removed.incoming.take().unwrap();
    let mut ours = remover.network.open(removed.id(), CONTROL, Traffic::Control).await.unwrap();
    let mut theirs = incoming.next().await.unwrap().stream;
    remover.remove(removed.id());
    let mut buffer = [0; 1];
    assert!(!matches!(theirs.read(&mut buffer).await, Ok(1..)), "the removed peer still has its stream");
    assert!(!matches!(ours.read(&mut buffer).await, Ok(1..)), "the remover still has its stream");
    assert!(matches!(remover.network.connection_state(removed.id()), ConnectionState::NotAdmitted));
    assert!(remover.network.connections().is_empty());
    removed.event(|event| matches!(event, NetworkEvent::Disconnected { .. })).await;
}

#[tokio::test]
async fn v1_removal_ends_a_stream_that_is_blocked_in_writing() {
    let (remover, mut removed) = pair().await;
    let mut incoming = removed.incoming.take().unwrap();
    let mut ours = remover.network.open(removed.id(), BULK, Traffic::Bulk).await.unwrap();
    let _never_read = incoming.next().await.unwrap();
    let removal = async {
        until(|| remover.network.counters().streams_opened == 1).await;
        remover.remove(removed.id());
    };
    let writing = async { while ours.write_all(&[0; 8192]).await.is_ok() {} };
    future::join(writing, removal).await;
}

#[tokio::test]
async fn v1_changed_role_ends_the_connections_made_under_the_old_one() {
    let (mut changer, changed) = pair().await;
    changer.admit(changed.id(), Role::Joiner, vec![changed.address()]);
    changer.event(|event| matches!(event, NetworkEvent::Disconnected { .. })).await;
    changer.connected(changed.id()).await;
    assert!(changer.network.connections().iter().all(|connection| connection.role == Role::Joiner));
}

#[tokio::test]
async fn v1_pending_handshakes_are_bounded_per_ip() {
    let limits = Limits { pending_handshakes_per_address: 4, pending_handshakes: 6, ..Limits::default() };
    let guarded = node_with(1, Options { limits, ..options() }).await;
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port(&guarded.address())));
    let mut silent = Vec::new();
    for _ in 0..10 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    until(|| guarded.network.counters().connections_over_limit == 6).await;
    assert_eq!(guarded.network.counters().handshakes_pending, 4);
    // Another address still gets in, up to the total.
    for _ in 0..3 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, 2], 0).into()).unwrap();
        silent.push(socket.connect(address).await.unwrap());
    }
    until(|| guarded.network.counters().connections_over_limit == 7).await;
    assert_eq!(guarded.network.counters().handshakes_pending, 6);
    drop(silent);
    until(|| guarded.network.counters().handshakes_pending == 0).await;
}

#[tokio::test]
async fn v1_a_crowd_of_strangers_leaves_places_to_those_who_are_known() {
    let limits = Limits { pending_handshakes: 6, ..Limits::default() };
    let guarded = node_with(1, Options { limits, ..options() }).await;
    let friend = key(2).public().to_peer_id();
    guarded.admit(friend, Role::Peer, vec!["/ip4/127.0.0.9/tcp/1".parse().unwrap()]);
    until(|| !matches!(guarded.network.connection_state(friend), ConnectionState::NotAdmitted)).await;
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port(&guarded.address())));
    let connect = async |last: u8| {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, last], 0).into()).unwrap();
        socket.connect(address).await.unwrap()
    };
    let mut silent = Vec::new();
    for last in 1..8 {
        silent.push(connect(last).await);
    }
    until(|| guarded.network.counters().connections_over_limit == 1).await;
    assert_eq!(guarded.network.counters().handshakes_pending, 6);
    silent.push(connect(9).await);
    until(|| guarded.network.counters().handshakes_pending == 7).await;
    silent.push(connect(8).await);
    until(|| guarded.network.counters().connections_over_limit == 2).await;
    drop(silent);
    until(|| guarded.network.counters().handshakes_pending == 0).await;
}

#[tokio::test]
async fn v1_established_connections_are_bounded_per_ip() {
    let limits = Limits { established_per_address: 1, ..Limits::default() };
    let mut guarded = node_with(1, Options { limits, ..options() }).await;
    let (first, second) = (node(2).await, node(3).await);
    for dialler in [&first, &second] {
        guarded.admit(dialler.id(), Role::Peer, vec![]);
    }
    first.admit(guarded.id(), Role::Peer, vec![guarded.address()]);
    guarded.connected(first.id()).await;
    second.admit(guarded.id(), Role::Peer, vec![guarded.address()]);
    let refused = guarded.event(|event| matches!(event, NetworkEvent::Refused { .. })).await;
    let NetworkEvent::Refused { peer, reason, .. } = refused else { unreachable!() };
    assert_eq!((peer, reason), (Some(second.id()), RefusalReason::TooManyConnections));
    // The place is free again once the first has gone.
    first.remove(guarded.id());
    guarded.connected(second.id()).await;
}

#[tokio::test]
async fn v1_refused_connections_leave_nothing_behind() {
    const ATTEMPTS: u64 = 2000;
    let guarded = node(1).await;
    let (peer, address) = (guarded.id(), guarded.address());
    let attempts = stream::iter(0..ATTEMPTS).for_each_concurrent(4, |_| async {
        let stranger = Keypair::generate_ed25519();
        let outcome = dial_once(stranger, peer, std::slice::from_ref(&address), CONTROL, Duration::from_secs(30)).await;
        let expected = OpenError::RefusedByPeer { peer };
        assert!(matches!(outcome, Err(DialOnceError::Open(error)) if error == expected));
    });
    attempts.await;
    let counters = guarded.network.counters();
    assert_eq!(counters.connections_not_admitted, ATTEMPTS);
    assert_eq!((counters.connections_established, counters.handshakes_pending), (0, 0));
    assert_eq!(guarded.network.tracked_peers(), 0);
}

#[tokio::test]
async fn v6_wrong_key_at_the_address_is_refused() {
    let (mut dialling, impostor, absent) = (node(1).await, node(2).await, Keypair::generate_ed25519());
    let expected = absent.public().to_peer_id();
    impostor.admit(dialling.id(), Role::Peer, Vec::new());
    dialling.admit(expected, Role::Peer, vec![impostor.address()]);
    let wrong = OpenError::WrongPeer { expected, obtained: impostor.id(), address: impostor.address() };
    until(|| !matches!(dialling.network.connection_state(expected), ConnectionState::NotAdmitted)).await;
    assert_eq!(dialling.network.open(expected, CONTROL, Traffic::Control).await.unwrap_err(), wrong);
    let event = dialling.event(|event| matches!(event, NetworkEvent::WrongPeer { .. })).await;
    let (obtained, address) = (impostor.id(), impostor.address());
    assert_eq!(event, NetworkEvent::WrongPeer { expected, obtained, address });
    assert_eq!(dialling.network.counters().connections_established, 0);
}

#[tokio::test]
async fn v6_wrong_key_at_one_address_does_not_hide_the_right_one() {
    let (dialling, impostor, mut right) = (node(1).await, node(2).await, node(3).await);
    right.admit(dialling.id(), Role::Peer, Vec::new());
    until(|| !matches!(right.network.connection_state(dialling.id()), ConnectionState::NotAdmitted)).await;
    dialling.admit(right.id(), Role::Peer, vec![impostor.address(), right.address()]);
    until(|| matches!(dialling.network.connection_state(right.id()), ConnectionState::Connected(_))).await;
    right.connected(dialling.id()).await;
}

#[tokio::test]
async fn joiner_role_can_open_only_join() {
    let mut provider = node(1).await;
    let ticket = Keypair::generate_ed25519();
    let (peer, address) = (provider.id(), [provider.address()]);
    let joiner = ticket.public().to_peer_id();
    provider.admit(joiner, Role::Joiner, Vec::new());
    until(|| !matches!(provider.network.connection_state(joiner), ConnectionState::NotAdmitted)).await;
    let patience = Duration::from_secs(30);
    let refused = dial_once(ticket.clone(), peer, &address, CONTROL, patience).await.unwrap_err();
    let expected = OpenError::NotOffered { peer, protocol: CONTROL };
    assert!(matches!(&refused, DialOnceError::Open(error) if *error == expected), "{refused:?}");
    let (mut stream, connection) = dial_once(ticket, peer, &address, JOIN, patience).await.unwrap();
    stream.close().await.unwrap();
    let inbound = provider.incoming.as_mut().unwrap().next().await.unwrap();
    assert_eq!((inbound.peer, inbound.role, inbound.protocol), (joiner, Role::Joiner, JOIN));
    connection.close().await;
}

#[tokio::test]
async fn peer_role_is_not_offered_the_joiners_protocol() {
    let (dialling, listening) = pair().await;
    let outcome = dialling.network.open(listening.id(), JOIN, Traffic::Control).await;
    assert_eq!(outcome.unwrap_err(), OpenError::NotOffered { peer: listening.id(), protocol: JOIN });
    assert!(matches!(dialling.network.connection_state(listening.id()), ConnectionState::Connected(_)));
}

#[tokio::test]
async fn v6_traffic_in_the_middle_holds_no_plaintext() {
    const MARKER: &[u8] = b"a marker that must not be readable on the way";
    let (mut dialling, mut listening) = (node(1).await, node(2).await);
    let relay = Relay::to(&listening.address()).await;
    listening.admit(dialling.id(), Role::Peer, Vec::new());
    dialling.admit(listening.id(), Role::Peer, vec![relay.address.clone()]);
    dialling.connected(listening.id()).await;
    let mut stream = dialling.network.open(listening.id(), CONTROL, Traffic::Control).await.unwrap();
    stream.write_all(MARKER).await.unwrap();
    stream.close().await.unwrap();
    let mut received = Vec::new();
    listening.incoming.as_mut().unwrap().next().await.unwrap().stream.read_to_end(&mut received).await.unwrap();
    assert_eq!(received, MARKER);
    let passed = relay.passed.lock().unwrap();
    let holds = |wanted: &[u8]| passed.windows(wanted.len()).any(|window| window == wanted);
    assert!(!holds(MARKER) && !holds(CONTROL.name().as_bytes()));
    assert!(holds(b"/noise"), "the relay has seen nothing");
}
