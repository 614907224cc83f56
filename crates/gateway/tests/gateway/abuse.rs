//! Visitors who mean harm (V7): what they send reaches nobody, and others are still served.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use peer_gateway::settings::Keys;
use std::num::NonZeroU32;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::world::{Answer, Origin, World, fields, read_request, within};

/// An origin that counts what reaches it.
async fn counting() -> (Origin, Arc<AtomicUsize>) {
    let seen = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&seen);
    let origin = Origin::start(move |mut stream: TcpStream| {
        let seen = Arc::clone(&counter);
        async move {
            while read_request(&mut stream).await.is_some() {
                seen.fetch_add(1, Ordering::SeqCst);
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
            }
        }
    })
    .await;
    (origin, seen)
}

#[tokio::test(flavor = "multi_thread")]
async fn v7_smuggling_shapes_are_answered_400_and_reach_nobody() {
    let world = World::start().await;
    let (origin, seen) = counting().await;
    let (_provider, host) = world.serve(origin.address).await;
    for rest in [
        "POST / HTTP/1.1\r\nHost: {h}\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\nHost: {h}\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: {h}\r\nContent-Length: 3\r\nContent-Length: 30\r\n\r\nabc",
        "POST / HTTP/1.1\r\nHost: {h}\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: {h}\r\nX: a\r\n b\r\n\r\n",
        "GET / HTTP/1.1\nHost: {h}\n\n",
        "GET / HTTP/1.1\r\nHost: {h}\r\nX : a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: {h}\r\nHost: {h}\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET http://10.0.0.1/ HTTP/1.1\r\nHost: {h}\r\n\r\n",
        "GET https://10.0.0.1/ HTTP/1.1\r\nHost: {h}\r\n\r\n",
        "CONNECT 10.0.0.1:22 HTTP/1.1\r\nHost: {h}\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        let request = rest.replace("{h}", &host);
        let mut stream = world.visit(&host).await;
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut all = Vec::new();
        drop(within(stream.read_to_end(&mut all)).await);
        let all = String::from_utf8(all).unwrap();
        assert!(all.starts_with("HTTP/1.1 400 "), "{rest:?}: {all}");
        assert_eq!((all.matches("x-peergate-error").count(), all.matches("200 OK").count()), (1, 0), "{rest:?}: {all}");
    }
    assert_eq!(seen.load(Ordering::SeqCst), 0);
    assert_eq!(world.get(&host, "/").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn v7_a_bad_request_behind_a_good_one_is_answered_in_order() {
    let world = World::start().await;
    let (origin, seen) = counting().await;
    let (_provider, host) = world.serve(origin.address).await;
    let mut stream = world.visit(&host).await;
    let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\nGET / HTTP/1.1\nHost: {host}\n\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(within(Answer::read(&mut stream)).await.status, 200);
    assert_eq!(within(Answer::read(&mut stream)).await.status, 400);
    assert_eq!(seen.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn v7_broken_chunks_never_complete_a_request() {
    let world = World::start().await;
    let (origin, seen) = counting().await;
    let (_provider, host) = world.serve(origin.address).await;
    for body in ["3\r\nabcd\r\n0\r\n\r\n", "3\nabc\n0\n\n", "0x3\r\nabc\r\n0\r\n\r\n", "0\r\nHost: x\r\n\r\n"] {
        let request = format!("POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
        let mut stream = world.visit(&host).await;
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut all = Vec::new();
        drop(within(stream.read_to_end(&mut all)).await);
        assert!(!all.starts_with(b"HTTP/1.1 200"), "{body:?}: {}", String::from_utf8_lossy(&all));
    }
    assert_eq!(seen.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn v7_no_path_or_redirect_makes_anybody_dial() {
    // Whoever is dialled on the visitor's word would be this one.
    let forbidden = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = forbidden.local_addr().unwrap();
    let (world, origin) = (World::start().await, Origin::echo().await);
    let (_provider, host) = world.serve(origin.address).await;
    for path in
        [format!("/@{target}/"), format!("//{target}/"), format!("/http://{target}/"), format!("/?url=http://{target}")]
    {
        let answer = world.get(&host, &path).await;
        assert!(answer.text().starts_with(&format!("GET {path} HTTP/1.1\r\n")), "{answer:?}");
    }
    let answer = world.get(&host, &format!("@{target}/")).await;
    assert_eq!(answer.status, 400);
    let spoofed = format!(
        "GET / HTTP/1.1\r\nHost: {host}\r\nX-Forwarded-Host: {target}\r\nX-Forwarded-Port: 1\r\nConnection: close\r\n\r\n"
    );
    let answer = world.ask(&host, &spoofed).await;
    assert_eq!(fields(answer.text(), "x-forwarded-host"), [host.as_str()]);
    let location: &'static str =
        format!("HTTP/1.1 302 Found\r\nLocation: http://{target}/\r\nContent-Length: 0\r\n\r\n").leak();
    let redirecting = Origin::fixed(location).await;
    let (_other, host) = world.serve(redirecting.address).await;
    let answer = world.get(&host, "/").await;
    assert_eq!((answer.status, answer.field("location")), (302, Some(format!("http://{target}/").as_str())));
    let dialled = tokio::time::timeout(std::time::Duration::from_millis(200), forbidden.accept()).await;
    assert!(dialled.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn v7_hosts_that_are_not_the_connections_are_refused() {
    let world = World::start().await;
    let (origin, seen) = counting().await;
    let (_one, host) = world.serve(origin.address).await;
    let (_two, other) = world.serve(origin.address).await;
    let ask = async |sni: &str, host: &str| {
        world.ask(sni, &format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")).await
    };
    assert_eq!(ask(&other, &host).await.status, 421);
    assert_eq!(ask(&host, "example.org").await.status, 421);
    assert_eq!(ask(&host, "10.0.0.1").await.status, 421);
    assert_eq!(ask(&host, &format!("user@{host}")).await.status, 400);
    assert_eq!(ask("aaaa.peer.localhost", "aaaa.peer.localhost").await.status, 404);
    assert_eq!(ask("peer.localhost", "peer.localhost").await.status, 404);
    assert_eq!(seen.load(Ordering::SeqCst), 0);
    assert_eq!(ask(&host, &format!("{}:8443", host.to_uppercase())).await.status, 200);
    // The certificate vouches for nothing outside the domain.
    assert!(world.try_visit("example.org").await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn v7_header_bombs_are_answered_431() {
    let world = World::start().await;
    let (origin, seen) = counting().await;
    let (_provider, host) = world.serve(origin.address).await;
    let many = format!("GET / HTTP/1.1\r\nHost: {host}\r\n{}\r\n", "X: y\r\n".repeat(200));
    assert_eq!(world.ask(&host, &many).await.status, 431);
    let long = format!("GET / HTTP/1.1\r\nHost: {host}\r\nX: {}\r\n\r\n", "y".repeat(200 * 1024));
    assert_eq!(world.ask(&host, &long).await.status, 431);
    let target = format!("GET /{} HTTP/1.1\r\nHost: {host}\r\n\r\n", "y".repeat(20 * 1024));
    assert_eq!(world.ask(&host, &target).await.status, 414);
    assert_eq!(seen.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn v7_slow_heads_and_idle_connections_are_cut() {
    let one = NonZeroU32::new(1);
    let world = World::with(Keys { header_seconds: one, idle_seconds: one, ..Keys::default() }).await;
    let (origin, seen) = counting().await;
    let (_provider, host) = world.serve(origin.address).await;
    let mut silent = world.visit(&host).await;
    let mut slow = world.visit(&host).await;
    slow.write_all(b"GET / HTTP/1.1\r\nX-Slow: ").await.unwrap();
    let dripping = async {
        // Each byte comes in time; the head as a whole does not.
        loop {
            let mut byte = [0];
            tokio::select! {
                read = slow.read(&mut byte) => {
                    let mut all = byte[..read.unwrap_or(0)].to_vec();
                    drop(slow.read_to_end(&mut all).await);
                    return String::from_utf8(all).unwrap();
                }
                () = tokio::time::sleep(std::time::Duration::from_millis(100)) => {}
            }
            drop(slow.write_all(b"a").await);
        }
    };
    assert!(within(dripping).await.starts_with("HTTP/1.1 408 "));
    let mut nothing = Vec::new();
    drop(within(silent.read_to_end(&mut nothing)).await);
    assert!(nothing.is_empty());
    // A body that stands still is given up as well, and so is a connection between two requests.
    let mut stalled = world.visit(&host).await;
    stalled
        .write_all(format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n\r\nabc").as_bytes())
        .await
        .unwrap();
    let mut all = Vec::new();
    drop(within(stalled.read_to_end(&mut all)).await);
    assert!(!all.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&all));
    assert_eq!(seen.load(Ordering::SeqCst), 0);
    let mut kept = world.visit(&host).await;
    kept.write_all(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).await.unwrap();
    assert_eq!(within(Answer::read(&mut kept)).await.status, 200);
    drop(within(kept.read_to_end(&mut Vec::new())).await);
    assert_eq!(world.get(&host, "/").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn v7_deployment_that_never_answers_is_given_up() {
    let world = World::with(Keys { idle_seconds: NonZeroU32::new(1), ..Keys::default() }).await;
    let origin = Origin::start(async |mut stream: TcpStream| {
        read_request(&mut stream).await.unwrap();
        std::future::pending::<()>().await;
    })
    .await;
    let (_provider, host) = world.serve(origin.address).await;
    let answer = world.get(&host, "/").await;
    assert_eq!((answer.status, answer.code()), (504, "deployment_timed_out"));
}

#[tokio::test(flavor = "multi_thread")]
async fn v7_requests_per_second_are_bounded() {
    let world = World::with(Keys { requests_per_second_per_address: NonZeroU32::new(1), ..Keys::default() }).await;
    let (origin, seen) = counting().await;
    let (_provider, host) = world.serve(origin.address).await;
    let mut stream = world.visit(&host).await;
    let mut refused = 0;
    for _ in 0..20 {
        stream.write_all(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).await.unwrap();
        let answer = within(Answer::read(&mut stream)).await;
        if answer.status == 429 {
            assert!(answer.field("retry-after").is_some());
            refused += 1;
        }
    }
    assert!(refused > 0);
    assert_eq!(seen.load(Ordering::SeqCst), 20 - refused);
    let world = World::with(Keys { requests_per_second_per_name: NonZeroU32::new(1), ..Keys::default() }).await;
    let (_one, busy) = world.serve(origin.address).await;
    let (_two, quiet) = world.serve(origin.address).await;
    let mut statuses = Vec::new();
    for _ in 0..10 {
        statuses.push(world.get(&busy, "/").await.status);
    }
    assert!(statuses.contains(&429), "{statuses:?}");
    assert_eq!(world.get(&quiet, "/").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn v7_connections_per_address_are_bounded() {
    let world = World::with(Keys { connections_per_address_max: Some(3), ..Keys::default() }).await;
    let (origin, _seen) = counting().await;
    let (_provider, host) = world.serve(origin.address).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(world.visit(&host).await);
    }
    assert!(world.try_visit(&host).await.is_err());
    held.pop();
    crate::world::eventually("a place is free again", async || world.try_visit(&host).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn v7_visits_per_provider_are_bounded() {
    let world = World::with(Keys { visits_per_provider_max: Some(2), ..Keys::default() }).await;
    let origin = Origin::start(async |mut stream: TcpStream| {
        read_request(&mut stream).await.unwrap();
        std::future::pending::<()>().await;
    })
    .await;
    let (_provider, host) = world.serve(origin.address).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = world.visit(&host).await;
        stream.write_all(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).await.unwrap();
        held.push(stream);
    }
    crate::world::eventually("both visits have begun", async || world.gateway.levels().streams_opened == 2).await;
    let answer = world.get(&host, "/").await;
    assert_eq!((answer.status, answer.code()), (503, "provider_busy"));
    let (other, _seen) = counting().await;
    let (_other, host) = world.serve(other.address).await;
    assert_eq!(world.get(&host, "/").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn v7_metrics_are_served_on_loopback() {
    let world = World::with(Keys { metrics_listen: Some("127.0.0.1:0".parse().unwrap()), ..Keys::default() }).await;
    let (origin, _seen) = counting().await;
    let (_provider, host) = world.serve(origin.address).await;
    assert_eq!(world.get(&host, "/").await.status, 200);
    let mut stream = TcpStream::connect(world.gateway.metrics_address().unwrap()).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
    let answer = within(Answer::read(&mut stream)).await;
    for line in
        ["peergate_leases 1", "peergate_responses_total{class=\"2xx\"} 1", "peergate_tunnel_streams_opened_total 1"]
    {
        assert!(answer.text().contains(line), "{line} in {}", answer.text());
    }
}
