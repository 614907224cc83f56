//! Streams: none is lost, none stalls another, and each limit is visible.

use std::io::ErrorKind;
use std::num::NonZeroU32;
use std::time::Duration;

use futures::{AsyncReadExt, AsyncWriteExt, future};
use peer_net::{Direction, Limits, Options, Traffic};
use tokio::task::JoinSet;

use crate::fixture::{BULK, CONTROL, JOIN, options, pair, pair_with, until};

async fn echo(stream: peer_net::Stream, text: Vec<u8>) -> Vec<u8> {
    let (mut reader, mut writer) = stream.split();
    let send = async {
        writer.write_all(&text).await.unwrap();
        writer.close().await.unwrap();
    };
    let mut echoed = Vec::new();
    let ((), received) = future::join(send, reader.read_to_end(&mut echoed)).await;
    received.unwrap();
    echoed
}

#[tokio::test(flavor = "multi_thread")]
async fn thousand_concurrent_streams_echo_without_loss() {
    let (dialling, mut listening) = pair().await;
    let echoing = listening.echo();
    let mut tasks = JoinSet::new();
    for number in 0..1000_u32 {
        let (network, peer) = (dialling.network.clone(), listening.id());
        tasks.spawn(async move { (number, network.open(peer, CONTROL, Traffic::Control).await.unwrap()) });
    }
    let streams = tasks.join_all().await;
    assert_eq!(streams.len(), 1000);
    let mut tasks = JoinSet::new();
    for (number, stream) in streams {
        tasks.spawn(async move {
            let text = number.to_be_bytes().repeat(1024);
            assert_eq!(echo(stream, text.clone()).await, text);
        });
    }
    tasks.join_all().await;
    assert_eq!(listening.network.counters().streams_accepted, 1000);
    assert_eq!(listening.network.counters().streams_refused, 0);
    listening.network.shutdown().await;
    echoing.join_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_openers_than_streams_allowed_wait_and_all_are_served() {
    let limits = Limits { outbound_streams_to_peer: 8, ..options().limits };
    let (dialling, mut listening) = pair_with(Options { limits, ..options() }, options()).await;
    let _echoing = listening.echo();
    let mut tasks = JoinSet::new();
    for number in 0..200_u8 {
        let (network, peer) = (dialling.network.clone(), listening.id());
        tasks.spawn(async move {
            let stream = network.open(peer, CONTROL, Traffic::Control).await.unwrap();
            assert_eq!(echo(stream, vec![number; 100]).await, vec![number; 100]);
        });
    }
    tasks.join_all().await;
}

#[tokio::test]
async fn control_is_usable_while_a_bulk_stream_is_stalled() {
    let (dialling, mut listening) = pair().await;
    let both = || dialling.network.connections().iter().any(|connection| connection.traffic == Traffic::Bulk);
    until(both).await;
    let mut incoming = listening.incoming.take().unwrap();
    let mut stalled = dialling.network.open(listening.id(), BULK, Traffic::Bulk).await.unwrap();
    let _never_read = incoming.next().await.unwrap();
    let stalling = async { while stalled.write_all(&[0; 8192]).await.is_ok() {} };
    let control = async {
        for _ in 0..100 {
            let stream = dialling.network.open(listening.id(), CONTROL, Traffic::Control).await.unwrap();
            let answer = async {
                let mut inbound = incoming.next().await.unwrap().stream;
                let mut text = [0; 4];
                inbound.read_exact(&mut text).await.unwrap();
                inbound.write_all(&text).await.unwrap();
                inbound.close().await.unwrap();
            };
            let (echoed, ()) = future::join(echo(stream, b"ping".to_vec()), answer).await;
            assert_eq!(echoed, b"ping");
        }
    };
    let first = future::select(Box::pin(stalling), Box::pin(control)).await;
    assert!(matches!(first, future::Either::Right(_)), "the stalled stream ended");
}

#[tokio::test]
async fn either_sides_connection_serves_both() {
    let (mut dialling, mut listening) = pair().await;
    let _echoing = (dialling.echo(), listening.echo());
    let there = dialling.network.open(listening.id(), CONTROL, Traffic::Control).await.unwrap();
    assert_eq!(echo(there, b"there".to_vec()).await, b"there");
    let back = listening.network.open(dialling.id(), CONTROL, Traffic::Control).await.unwrap();
    assert_eq!(echo(back, b"back".to_vec()).await, b"back");
    assert!(listening.network.connections().iter().all(|connection| connection.direction == Direction::Inbound));
}

#[tokio::test]
async fn bulk_and_control_are_different_connections_on_both_sides() {
    let (mut dialling, mut listening) = pair().await;
    let kinds = |network: &peer_net::Network| {
        let mut kinds: Vec<_> = network.connections().iter().map(|connection| connection.traffic).collect();
        kinds.sort_by_key(|kind| *kind == Traffic::Bulk);
        kinds
    };
    let expected = [Traffic::Control, Traffic::Bulk];
    until(|| kinds(&dialling.network) == expected && kinds(&listening.network) == expected).await;

    let mut incoming = listening.incoming.take().unwrap();
    let control = dialling.network.open(listening.id(), CONTROL, Traffic::Control).await.unwrap();
    let control_at = incoming.next().await.unwrap().address;
    let bulk = dialling.network.open(listening.id(), BULK, Traffic::Bulk).await.unwrap();
    let bulk_at = incoming.next().await.unwrap().address;
    assert_ne!(control_at, bulk_at);
    drop((control, bulk));

    // The listening side finds the same bulk connection.
    let address_of = |traffic| {
        listening.network.connections().iter().find(|c| c.traffic == traffic).map(|c| c.address.clone()).unwrap()
    };
    assert_eq!((address_of(Traffic::Control), address_of(Traffic::Bulk)), (control_at, bulk_at));
    let _bulk = listening.network.open(dialling.id(), BULK, Traffic::Bulk).await.unwrap();
    dialling.incoming.as_mut().unwrap().next().await.unwrap();
}

#[tokio::test]
async fn v5_stream_beyond_the_peers_limit_is_reset_and_counted() {
    let limits = Limits { inbound_streams_per_peer: 2, ..options().limits };
    let (dialling, mut listening) = pair_with(options(), Options { limits, ..options() }).await;
    let mut incoming = listening.incoming.take().unwrap();
    let mut held = Vec::new();
    for _ in 0..2 {
        let stream = dialling.network.open(listening.id(), CONTROL, Traffic::Control).await.unwrap();
        held.push((stream, incoming.next().await.unwrap()));
    }
    let mut third = dialling.network.open(listening.id(), CONTROL, Traffic::Control).await.unwrap();
    assert!(!matches!(third.read(&mut [0; 1]).await, Ok(1..)));
    assert_eq!(listening.network.counters().streams_refused, 1);
    // Room comes back with the first stream that is dropped.
    held.pop();
    let _fourth = dialling.network.open(listening.id(), CONTROL, Traffic::Control).await.unwrap();
    incoming.next().await.unwrap();
}

#[tokio::test]
async fn stream_that_finds_the_queue_full_is_reset_and_counted() {
    let limits = Limits { incoming_queue: 1, ..options().limits };
    let (dialling, listening) = pair_with(options(), Options { limits, ..options() }).await;
    let _queued = dialling.network.open(listening.id(), CONTROL, Traffic::Control).await.unwrap();
    let mut refused = dialling.network.open(listening.id(), CONTROL, Traffic::Control).await.unwrap();
    assert!(!matches!(refused.read(&mut [0; 1]).await, Ok(1..)));
    assert_eq!(listening.network.counters().streams_refused, 1);
}

#[tokio::test]
async fn early_stream_carries_its_first_bytes_with_the_proposal() {
    let (dialling, mut listening) = pair().await;
    let _echoing = listening.echo();
    for _ in 0..100 {
        let stream = dialling.network.open_early(listening.id(), CONTROL, Traffic::Control).await.unwrap();
        assert_eq!(echo(stream, b"early".to_vec()).await, b"early");
    }
}

#[tokio::test]
async fn early_stream_that_the_peer_refuses_fails_in_reading_and_stays_failed() {
    let (dialling, listening) = pair().await;
    let mut stream = dialling.network.open_early(listening.id(), JOIN, Traffic::Control).await.unwrap();
    stream.write_all(b"bytes that nobody reads").await.unwrap();
    stream.flush().await.unwrap();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::BrokenPipe);
    assert_eq!(stream.write(&[0; 1]).await.unwrap_err().kind(), ErrorKind::BrokenPipe);
    assert_eq!(stream.close().await.unwrap_err().kind(), ErrorKind::BrokenPipe);
    assert_eq!(listening.network.counters().streams_accepted, 0);
    let _after = dialling.network.open(listening.id(), CONTROL, Traffic::Control).await.unwrap();
}

/// The multiplexer ends the whole connection when it holds too many streams, those just dropped included.
#[tokio::test(flavor = "multi_thread")]
async fn all_streams_dropped_and_opened_again_at_once_do_not_cost_the_connection() {
    let (dialling, mut listening) = pair().await;
    let _echoing = listening.echo();
    until(|| dialling.network.counters().connections_established == 2).await;
    for _round in 0..5 {
        let mut tasks = JoinSet::new();
        for _ in 0..1000 {
            let (network, peer) = (dialling.network.clone(), listening.id());
            tasks.spawn(async move {
                let mut stream = network.open_early(peer, CONTROL, Traffic::Control).await.unwrap();
                stream.write_all(b"dropped").await.unwrap();
                stream.flush().await.unwrap();
                stream
            });
        }
        drop(tasks.join_all().await);
    }
    until(|| {
        let counters = listening.network.counters();
        counters.streams_accepted + counters.streams_refused == 5000
    })
    .await;
    let stream = dialling.network.open(listening.id(), CONTROL, Traffic::Control).await.unwrap();
    assert_eq!(echo(stream, b"alive".to_vec()).await, b"alive");
    assert_eq!(dialling.network.counters().connections_established, 2);
}

/// What one peer opens over several connections is counted together, and another peer's streams are served meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn v5_streams_of_one_peer_are_counted_over_all_of_its_connections() {
    let limits = Limits { inbound_streams_per_peer: 4, ..options().limits };
    let (dialling, mut listening) = pair_with(options(), Options { limits, ..options() }).await;
    until(|| dialling.network.connections().len() == 2).await;
    let mut incoming = listening.incoming.take().unwrap();
    let mut held = Vec::new();
    for traffic in [Traffic::Control, Traffic::Bulk, Traffic::Control, Traffic::Bulk] {
        let stream = dialling.network.open(listening.id(), CONTROL, traffic).await.unwrap();
        held.push((stream, incoming.next().await.unwrap()));
    }
    for traffic in [Traffic::Control, Traffic::Bulk] {
        let mut refused = dialling.network.open(listening.id(), CONTROL, traffic).await.unwrap();
        assert!(!matches!(refused.read(&mut [0; 1]).await, Ok(1..)));
    }
    assert_eq!(listening.network.counters().streams_refused, 2);
}

/// Whoever opens streams faster than he may is read more slowly; nothing of his is lost.
#[tokio::test(flavor = "multi_thread")]
async fn v5_streams_are_taken_at_the_peers_pace() {
    let paced = |pace| {
        let limits = Limits { stream_pace: NonZeroU32::new(pace), ..options().limits };
        async move {
            let (dialling, mut listening) = pair_with(options(), Options { limits, ..options() }).await;
            let _echoing = listening.echo();
            let begun = std::time::Instant::now();
            for number in 0..60_u8 {
                let stream = dialling.network.open(listening.id(), CONTROL, Traffic::Control).await.unwrap();
                assert_eq!(echo(stream, vec![number; 10]).await, vec![number; 10]);
            }
            begun.elapsed()
        }
    };
    // Twenty at once, and then ten a second: at least three seconds for the other forty.
    let slow = paced(10).await;
    assert!(slow > Duration::from_secs(3), "{slow:?}");
    // The control: nothing else makes it slow.
    let fast = paced(100_000).await;
    assert!(fast * 2 < slow, "{fast:?}");
}
