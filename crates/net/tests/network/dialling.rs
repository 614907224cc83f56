//! Dialling: again after a loss, not when nobody is there, and in order at the end.

use std::time::Duration;

use futures::AsyncReadExt;
use peer_net::{ConnectionState, Keypair, NetworkEvent, OpenError, Options, Role, StartError, Traffic};

use crate::fixture::{BULK, CONTROL, Node, Relay, loopback, node, node_with, options, pair, until};

#[tokio::test]
async fn reconnects_after_the_other_side_restarts() {
    let (mut dialling, listening) = pair().await;
    let address = listening.address();
    let Node { network, incoming, .. } = listening;
    network.shutdown().await;
    drop(incoming);
    dialling.event(|event| matches!(event, NetworkEvent::Disconnected { .. })).await;
    let mut restarted = node_with(2, Options { listen: vec![address], ..options() }).await;
    restarted.admit(dialling.id(), Role::Peer, Vec::new());
    dialling.connected(restarted.id()).await;
    let _stream = dialling.network.open(restarted.id(), CONTROL, Traffic::Control).await.unwrap();
    assert_eq!(restarted.incoming.as_mut().unwrap().next().await.unwrap().peer, dialling.id());
}

#[tokio::test]
async fn connects_once_the_other_side_has_added_us() {
    let (mut early, late) = (node(1).await, node(2).await);
    early.admit(late.id(), Role::Peer, vec![late.address()]);
    early.event(|event| matches!(event, NetworkEvent::RefusedByPeer { .. })).await;
    late.admit(early.id(), Role::Peer, Vec::new());
    early.connected(late.id()).await;
}

#[tokio::test]
async fn peers_that_dial_each_other_end_with_one_bulk_connection_at_least() {
    let (left, right) = (node(1).await, node(2).await);
    left.admit(right.id(), Role::Peer, vec![right.address()]);
    right.admit(left.id(), Role::Peer, vec![left.address()]);
    for (here, there) in [(&left, &right), (&right, &left)] {
        until(|| {
            let connections = here.network.connections();
            [Traffic::Control, Traffic::Bulk].iter().all(|kind| connections.iter().any(|c| c.traffic == *kind))
        })
        .await;
        let _stream = here.network.open(there.id(), BULK, Traffic::Bulk).await.unwrap();
    }
}

#[tokio::test]
async fn offline_peer_is_named_with_the_addresses_that_were_tried() {
    let node = node(1).await;
    let absent = Keypair::generate_ed25519().public().to_peer_id();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let address: peer_net::Multiaddr = format!("/ip4/127.0.0.1/tcp/{}", closed.port()).parse().unwrap();
    node.admit(absent, Role::Peer, vec![address.clone()]);
    until(|| !matches!(node.network.connection_state(absent), ConnectionState::NotAdmitted)).await;
    let error = node.network.open(absent, CONTROL, Traffic::Control).await.unwrap_err();
    let OpenError::Offline { peer, tried, reason } = &error else { panic!("{error}") };
    assert_eq!((*peer, tried), (absent, &vec![address]));
    assert!(reason.contains("refused"), "{reason}");
    let ConnectionState::Offline { last_error: Some(shown) } = node.network.connection_state(absent) else { panic!() };
    assert_eq!(shown, error.to_string());
}

#[tokio::test]
async fn peer_without_an_address_is_not_waited_for() {
    let node = node(1).await;
    let absent = Keypair::generate_ed25519().public().to_peer_id();
    node.admit(absent, Role::Peer, Vec::new());
    until(|| !matches!(node.network.connection_state(absent), ConnectionState::NotAdmitted)).await;
    let error = node.network.open(absent, CONTROL, Traffic::Control).await.unwrap_err();
    assert!(matches!(error, OpenError::Offline { tried, .. } if tried.is_empty()));
}

#[tokio::test]
async fn taken_address_is_named() {
    let holder = node(1).await;
    let options = Options { listen: vec![loopback(), holder.address()], ..options() };
    let (_policy, policy) = tokio::sync::watch::channel(std::sync::Arc::default());
    let started = peer_net::Network::start(Keypair::generate_ed25519(), options, policy, peer_net::Protocols::none());
    let error = started.await.unwrap_err();
    assert!(matches!(&error, StartError::Listen { address, .. } if *address == holder.address()), "{error}");
}

#[tokio::test]
async fn shutdown_ends_streams_and_the_queue_of_incoming_ones() {
    let (dialling, mut listening) = pair().await;
    let mut incoming = listening.incoming.take().unwrap();
    let mut stream = dialling.network.open(listening.id(), CONTROL, Traffic::Control).await.unwrap();
    let _held = incoming.next().await.unwrap();
    let handle = listening.network.clone();
    listening.network.shutdown().await;
    assert!(!matches!(stream.read(&mut [0; 1]).await, Ok(1..)));
    assert!(incoming.next().await.is_none());
    assert_eq!(handle.open(dialling.id(), CONTROL, Traffic::Control).await.unwrap_err(), OpenError::Stopped);
}

#[tokio::test]
async fn host_name_in_an_address_is_looked_up() {
    let (mut dialling, listening) = (node(1).await, node(2).await);
    listening.admit(dialling.id(), Role::Peer, Vec::new());
    let named = listening.address().to_string().replace("/ip4/127.0.0.1/", "/dns4/localhost/");
    dialling.admit(listening.id(), Role::Peer, vec![named.parse().unwrap()]);
    dialling.connected(listening.id()).await;
}

#[tokio::test]
async fn peer_that_falls_silent_is_given_up_and_found_again() {
    let lively =
        || Options { ping_interval: Duration::from_millis(20), ping_timeout: Duration::from_millis(200), ..options() };
    let (mut dialling, listening) = (node_with(1, lively()).await, node(2).await);
    let relay = Relay::to(&listening.address()).await;
    listening.admit(dialling.id(), Role::Peer, Vec::new());
    dialling.admit(listening.id(), Role::Peer, vec![relay.address.clone()]);
    dialling.connected(listening.id()).await;
    relay.frozen.send_replace(true);
    let event = dialling.event(|event| matches!(event, NetworkEvent::Disconnected { .. })).await;
    assert!(matches!(event, NetworkEvent::Disconnected { reason, .. } if reason.contains("liveness")));
    relay.frozen.send_replace(false);
    dialling.connected(listening.id()).await;
}
