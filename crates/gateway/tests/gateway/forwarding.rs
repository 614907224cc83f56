//! What crosses the gateway, and how: bodies, repeated fields, switches of protocol, streams without an end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use peer_proto::id::DeploymentId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::world::{Answer, Origin, World, eventually, fields, read_request, within};

/// More than all buffers and windows on the way can hold.
const LARGE: u64 = 64 * 1024 * 1024;

#[tokio::test(flavor = "multi_thread")]
async fn request_bodies_arrive() {
    let (world, origin) = (World::start().await, Origin::echo().await);
    let (_provider, host) = world.serve(origin.address).await;
    let answer = world.ask(&host, &format!("POST /a HTTP/1.1\r\nHost: {host}\r\nContent-Length: 5\r\n\r\nhello")).await;
    assert_eq!(answer.status, 200);
    assert!(
        answer.text().starts_with("POST /a HTTP/1.1\r\n") && answer.text().ends_with("\r\n\r\nhello"),
        "{answer:?}"
    );
    for method in ["POST", "GET", "DELETE"] {
        let chunked = format!(
            "{method} /b HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n"
        );
        assert!(world.ask(&host, &chunked).await.text().ends_with("\r\n\r\nabcde"), "{method}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn http_1_0_gets_one_answer_that_closes() {
    let (world, origin) = (World::start().await, Origin::echo().await);
    let (_provider, host) = world.serve(origin.address).await;
    for host_field in [host.as_str(), "example.org"] {
        let mut stream = world.visit(&host).await;
        let request = format!("GET / HTTP/1.0\r\nHost: {host_field}\r\nConnection: keep-alive\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        drop(within(stream.read_to_end(&mut answer)).await);
        let answer = String::from_utf8(answer).unwrap();
        assert_eq!(fields(answer.split("\r\n\r\n").next().unwrap(), "connection"), ["close"], "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn v7_fields_are_repeated_rewritten_and_removed_as_they_should() {
    let (world, origin) = (World::start().await, Origin::echo().await);
    let (_provider, host) = world.serve(origin.address).await;
    let request = format!(
        "GET / HTTP/1.1\r\nHost: {host}\r\nX-Many: 1\r\nX-Many: 2\r\nX-Many: 1\r\nX-Forwarded-For: 10.0.0.1\r\n\
         Forwarded: for=10.0.0.1\r\nX-Real-IP: 10.0.0.1\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nUpgrade: h2c\r\n\r\n"
    );
    let answer = world.ask(&host, &request).await;
    let head = answer.text();
    assert_eq!(fields(head, "x-many"), ["1", "2", "1"]);
    assert_eq!(fields(head, "x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(fields(head, "x-real-ip"), ["127.0.0.1"]);
    assert_eq!(fields(head, "x-forwarded-proto"), ["https"]);
    assert_eq!(fields(head, "forwarded"), [format!("for=127.0.0.1;host=\"{host}\";proto=https")]);
    assert_eq!(fields(head, "via"), ["1.1 peergate"]);
    for removed in ["x-hop", "connection", "upgrade"] {
        assert!(fields(head, removed).is_empty(), "{removed} in {head}");
    }
    let fixed = "HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2; Domain=localhost\r\nConnection: X-Hop\r\n\
                 X-Hop: 1\r\nContent-Length: 2\r\n\r\nok";
    let origin = Origin::fixed(fixed).await;
    let (_provider, host) = world.serve(origin.address).await;
    let answer = world.get(&host, "/").await;
    assert_eq!(answer.fields("set-cookie"), ["a=1", "b=2"]);
    assert_eq!((answer.field("x-hop"), answer.field("via"), answer.text()), (None, Some("1.1 peergate"), "ok"));
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_without_body_expectations_and_trailers_pass() {
    let world = World::start().await;
    let origin = Origin::fixed("HTTP/1.1 204 No Content\r\nX-A: 1\r\n\r\n").await;
    let (_one, host) = world.serve(origin.address).await;
    assert_eq!(world.get(&host, "/").await.status, 204);
    let origin = Origin::fixed("HTTP/1.1 304 Not Modified\r\nETag: \"a\"\r\n\r\n").await;
    let (_two, host) = world.serve(origin.address).await;
    assert_eq!(world.get(&host, "/").await.field("etag"), Some("\"a\""));
    let origin = Origin::fixed("HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n").await;
    let (_three, host) = world.serve(origin.address).await;
    let mut stream = world.visit(&host).await;
    for _ in 0..2 {
        stream.write_all(format!("HEAD / HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).await.unwrap();
        let head = within(Answer::read_head(&mut stream)).await;
        assert_eq!((head.status, head.field("content-length")), (200, Some("1234")));
    }

    let origin = Origin::echo().await;
    let (_four, host) = world.serve(origin.address).await;
    let mut stream = world.visit(&host).await;
    let head = format!("PUT / HTTP/1.1\r\nHost: {host}\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    assert_eq!(within(Answer::read_head(&mut stream)).await.status, 100);
    stream.write_all(b"abc").await.unwrap();
    assert!(within(Answer::read(&mut stream)).await.text().ends_with("abc"));
    let trailers = format!(
        "POST / HTTP/1.1\r\nHost: {host}\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-Sum: 9\r\n\r\n"
    );
    let answer = world.ask(&host, &trailers).await;
    assert!(answer.text().to_lowercase().ends_with("ax-sum: 9\r\n"), "{answer:?}");

    let chunked =
        "HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 7\r\n\r\n";
    let origin = Origin::fixed(chunked).await;
    let (_five, host) = world.serve(origin.address).await;
    let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nTE: trailers\r\nConnection: TE\r\n\r\n");
    let answer = world.ask(&host, &request).await;
    assert!(answer.text().to_lowercase().ends_with("x-sum: 7\r\n\r\n"), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn websocket_passes_and_early_bytes_wait_for_the_switch() {
    let world = World::start().await;
    let (allowed, was_early) = (Arc::new(tokio::sync::Notify::new()), Arc::new(AtomicUsize::new(0)));
    let (gate, early) = (Arc::clone(&allowed), Arc::clone(&was_early));
    let origin = Origin::start(move |mut stream: TcpStream| {
        let (gate, early) = (Arc::clone(&gate), Arc::clone(&early));
        async move {
            let (head, _) = read_request(&mut stream).await.unwrap();
            assert_eq!((fields(&head, "upgrade"), fields(&head, "connection")), (vec!["websocket"], vec!["Upgrade"]));
            gate.notified().await;
            early.store(stream.try_read(&mut [0; 64]).unwrap_or(0), Ordering::SeqCst);
            let answer =
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nX-Key: k\r\n\r\n";
            stream.write_all(answer.as_bytes()).await.unwrap();
            let (mut read, mut write) = stream.split();
            drop(tokio::io::copy(&mut read, &mut write).await);
        }
    })
    .await;
    let (provider, host) = world.serve(origin.address).await;
    let mut stream = world.visit(&host).await;
    let request = format!(
        "GET /chat HTTP/1.1\r\nHost: {host}\r\nUpgrade: WebSocket\r\nConnection: keep-alive, Upgrade\r\n\
         Sec-WebSocket-Key: a\r\nSec-WebSocket-Version: 13\r\n\r\n\x01early"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    allowed.notify_one();
    let answer = within(Answer::read_head(&mut stream)).await;
    assert_eq!((answer.status, answer.field("upgrade"), answer.field("x-key")), (101, Some("websocket"), Some("k")));
    let mut echoed = [0; 6];
    within(stream.read_exact(&mut echoed)).await.unwrap();
    assert_eq!((&echoed, was_early.load(Ordering::SeqCst)), (b"\x01early", 0));
    stream.write_all(&[0x89, 0x00]).await.unwrap();
    within(stream.read_exact(&mut echoed[..2])).await.unwrap();
    assert_eq!(echoed[..2], [0x89, 0x00]);
    // The provider's loss ends a switched connection as well.
    provider.network.shutdown().await;
    drop(within(stream.read_to_end(&mut Vec::new())).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn v7_a_refused_switch_ends_the_connection() {
    let world = World::start().await;
    let requests = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&requests);
    let origin = Origin::start(move |mut stream: TcpStream| {
        let seen = Arc::clone(&seen);
        async move {
            while read_request(&mut stream).await.is_some() {
                seen.fetch_add(1, Ordering::SeqCst);
                stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\nno").await.unwrap();
            }
        }
    })
    .await;
    let (_provider, host) = world.serve(origin.address).await;
    let request = format!(
        "GET / HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n\
         GET /smuggled HTTP/1.1\r\nHost: {host}\r\n\r\n"
    );
    let mut stream = world.visit(&host).await;
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut all = Vec::new();
    drop(within(stream.read_to_end(&mut all)).await);
    let all = String::from_utf8(all).unwrap();
    assert_eq!((all.matches("HTTP/1.1 400").count(), all.matches("HTTP/1.1").count()), (1, 1), "{all}");
    assert_eq!(requests.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn large_answers_stream_at_the_visitors_pace() {
    let world = World::start().await;
    let sent = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&sent);
    let origin = Origin::start(move |mut stream: TcpStream| {
        let sent = Arc::clone(&counter);
        async move {
            read_request(&mut stream).await.unwrap();
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {LARGE}\r\n\r\n");
            stream.write_all(head.as_bytes()).await.unwrap();
            let piece = vec![7; 65536];
            while sent.load(Ordering::SeqCst) < LARGE {
                stream.write_all(&piece).await.unwrap();
                sent.fetch_add(piece.len() as u64, Ordering::SeqCst);
            }
        }
    })
    .await;
    let (_provider, host) = world.serve(origin.address).await;
    let mut stream = world.visit(&host).await;
    stream.write_all(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).await.unwrap();
    let head = within(Answer::read_head(&mut stream)).await;
    assert_eq!(head.field("content-length"), Some(LARGE.to_string().as_str()));
    let mut before = u64::MAX;
    eventually("the origin stands still", async || {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = sent.load(Ordering::SeqCst);
        now == std::mem::replace(&mut before, now)
    })
    .await;
    assert!(before < LARGE, "{before} bytes were taken in without being read");
    let mut read = 0;
    let mut buffer = vec![0; 65536];
    while read < LARGE {
        let count = within(stream.read(&mut buffer)).await.unwrap();
        assert!(count > 0 && buffer[..count].iter().all(|byte| *byte == 7));
        read += count as u64;
    }
    assert_eq!(read, LARGE);
}

#[tokio::test(flavor = "multi_thread")]
async fn large_requests_stream_at_the_origins_pace() {
    let world = World::start().await;
    let go = Arc::new(tokio::sync::Notify::new());
    let gate = Arc::clone(&go);
    let origin = Origin::start(move |mut stream: TcpStream| {
        let gate = Arc::clone(&gate);
        async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            gate.notified().await;
            let read = tokio::io::copy(&mut (&mut stream).take(LARGE), &mut tokio::io::sink()).await.unwrap();
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{read}");
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    })
    .await;
    let (_provider, host) = world.serve(origin.address).await;
    let stream = world.visit(&host).await;
    let (mut read, mut write) = tokio::io::split(stream);
    let sent = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&sent);
    let mut sender = tokio::task::JoinSet::new();
    sender.spawn(async move {
        write
            .write_all(format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: {LARGE}\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let piece = vec![7; 65536];
        while counter.load(Ordering::SeqCst) < LARGE {
            write.write_all(&piece).await.unwrap();
            counter.fetch_add(piece.len() as u64, Ordering::SeqCst);
        }
        write.flush().await.unwrap();
    });
    let mut before = u64::MAX;
    eventually("the visitor stands still", async || {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = sent.load(Ordering::SeqCst);
        now == std::mem::replace(&mut before, now)
    })
    .await;
    assert!(before < LARGE, "{before} bytes were taken in without being read");
    go.notify_one();
    let answer = within(Answer::read(&mut read)).await;
    assert_eq!((answer.status, answer.text()), (200, LARGE.to_string().as_str()));
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_used_again_for_the_same_deployment_only() {
    let (world, one, two) = (World::start().await, Origin::echo().await, Origin::echo().await);
    let mut provider = world.provider().await;
    let first = provider.expose(DeploymentId::random(), one.address).await;
    let second = provider.expose(DeploymentId::random(), two.address).await;
    for _ in 0..3 {
        assert_eq!(world.get(&first, "/").await.status, 200);
    }
    assert_eq!(world.gateway.levels().streams_opened, 1);
    let answer = world.get(&second, "/").await;
    assert_eq!(fields(answer.text(), "host"), [second]);
    assert_eq!(world.gateway.levels().streams_opened, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_died_between_two_requests_is_replaced() {
    let world = World::start().await;
    // Answers once on each connection, then closes it without a word.
    let origin = Origin::start(async |mut stream: TcpStream| {
        read_request(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
    })
    .await;
    let (_provider, host) = world.serve(origin.address).await;
    for _ in 0..20 {
        assert_eq!(world.get(&host, "/").await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_deployments_get_pages_that_say_so() {
    let world = World::start().await;
    let silent = Origin::start(async |stream: TcpStream| drop(stream)).await;
    let (mut provider, host) = world.serve(silent.address).await;
    let answer = world.get(&host, "/").await;
    assert_eq!((answer.status, answer.code()), (502, "deployment_failed"));
    let garbage = Origin::fixed("hello there\r\n\r\n").await;
    let host = provider.expose(DeploymentId::random(), garbage.address).await;
    assert_eq!(world.get(&host, "/").await.status, 502);
    let switching =
        Origin::fixed("HTTP/1.1 101 Switching Protocols\r\nUpgrade: tcp\r\nConnection: Upgrade\r\n\r\n").await;
    let host = provider.expose(DeploymentId::random(), switching.address).await;
    assert_eq!(world.get(&host, "/").await.status, 502);
    let closed = silent.address;
    drop(silent);
    let host = provider.expose(DeploymentId::random(), closed).await;
    assert_eq!(world.get(&host, "/").await.status, 502);
    let short = Origin::start(async |mut stream: TcpStream| {
        read_request(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc").await.unwrap();
    })
    .await;
    let host = provider.expose(DeploymentId::random(), short.address).await;
    let mut stream = world.visit(&host).await;
    stream.write_all(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).await.unwrap();
    assert_eq!(within(Answer::read_head(&mut stream)).await.status, 200);
    let mut body = Vec::new();
    drop(within(stream.read_to_end(&mut body)).await);
    assert_eq!(body, b"abc");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_visitors_are_served_at_once() {
    let (world, origin) = (World::start().await, Origin::echo().await);
    let (_provider, host) = world.serve(origin.address).await;
    let (world, mut visitors) = (Arc::new(world), tokio::task::JoinSet::new());
    for visitor in 0..50 {
        let (world, host) = (Arc::clone(&world), host.clone());
        visitors.spawn(async move {
            let mut stream = world.visit(&host).await;
            for request in 0..4 {
                let path = format!("/{visitor}/{request}");
                stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).await.unwrap();
                let answer = within(Answer::read(&mut stream)).await;
                assert!(answer.text().starts_with(&format!("GET {path} ")), "{answer:?}");
            }
        });
    }
    while let Some(visitor) = visitors.join_next().await {
        visitor.unwrap();
    }
}
