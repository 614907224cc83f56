//! Visitors at the gateway, through to a real container, and the ways in which a gateway or a provider may misbehave.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use peer_node::protocols::{FORWARD, LEASE};
use peer_proto::code::Code;
use peer_proto::id::{DeploymentId, Label};
use peer_proto::identity::Identity;
use peer_proto::query::{ForwardHeader, StreamReply};
use peer_proto::tunnel::{LeaseReply, LeaseRequest};
use peer_proto::unit::Port;

use crate::world::{Answer, Gate, Machine, Pair, Trio, Wire, eventually, host_of, shell};

#[test]
fn visitors_send_and_get_whole_messages() {
    let trio = Trio::start();
    let (_, url) = trio.hello("web", &[]);
    let fields = ["X-Many: 1", "X-Many: 2", "X-Forwarded-For: 10.0.0.1", "Connection: X-Hop", "X-Hop: 1"];
    let head = trio.gate.ask(&url, "GET /headers", &fields, b"").text().to_ascii_lowercase();
    assert!(head.contains("x-many: 1\r\n") && head.contains("x-many: 2\r\n"), "{head}");
    assert!(head.contains("x-forwarded-for: 127.0.0.1\r\n") && !head.contains("10.0.0.1"), "{head}");
    assert!(head.contains("forwarded: for=127.0.0.1") && !head.contains("x-hop"), "{head}");
    assert!(head.contains(&format!("host: {}", host_of(&url).to_ascii_lowercase())), "{head}");

    let body: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    let length = format!("Content-Length: {}", body.len());
    assert_eq!(trio.gate.ask(&url, "POST /echo", &[&length], &body).body, body);
    let chunked = b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
    assert_eq!(trio.gate.ask(&url, "POST /echo", &["Transfer-Encoding: chunked"], chunked).text(), "abcde");
    assert_eq!(trio.gate.get(&url, "/bytes/8000000").body.len(), 8_000_000);
    assert!(trio.gate.get(&url, "/stream").text().ends_with("line 20\n"));
}

#[test]
fn a_websocket_is_echoed_through_tls() {
    let trio = Trio::start();
    let (_, url) = trio.hello("web", &[]);
    let mut visit = trio.gate.visit(&url);
    let fields = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                  Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==";
    write!(visit, "GET /ws HTTP/1.1\r\nHost: {}\r\n{fields}\r\n\r\n", host_of(&url)).unwrap();
    let answer = Answer::read_head(&mut visit);
    assert_eq!((answer.status, answer.field("sec-websocket-accept")), (101, Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")));
    for text in ["hello", "again"] {
        // A text frame as a client sends it: final, masked with zeros.
        let mut frame = vec![0x81, 0x80 | u8::try_from(text.len()).unwrap(), 0, 0, 0, 0];
        frame.extend(text.bytes());
        visit.write_all(&frame).unwrap();
        let mut echoed = vec![0; 2 + text.len()];
        visit.read_exact(&mut echoed).unwrap();
        assert_eq!(&echoed[2..], text.as_bytes());
    }
}

#[test]
fn v7_no_path_and_no_redirect_makes_anything_dial_elsewhere() {
    let trio = Trio::start();
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    service.set_nonblocking(true).unwrap();
    let there = service.local_addr().unwrap();
    let (_, url) = trio.hello("web", &[]);
    for target in [
        format!("@{there}/"),
        format!("http://{there}/"),
        format!("//{there}/"),
        format!("/@{there}/"),
        format!("/../../{there}"),
        format!("/?url=http://{there}/"),
        "@10.0.0.1/".to_owned(),
        "*".to_owned(),
    ] {
        let answer = trio.gate.ask(&url, &format!("GET {target}"), &[], b"");
        let from_web = !answer.is_gateways();
        assert!(from_web || (400..500).contains(&answer.status), "{target}: {answer:?}");
    }
    assert!(trio.gate.ask(&url, &format!("CONNECT {there}"), &[], b"").is_gateways());
    let script = format!(
        "while true; do printf 'HTTP/1.1 302 Found\\r\\nLocation: http://{there}/\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n' | nc -l -p 8080; done"
    );
    let archive = trio.pair.files.write(&shell(&script));
    trio.pair.alice.deploy_to("bob", &archive, "redirect", &["--expose", "8080", "--cpu", "0.2"]);
    let url = trio.url("redirect");
    let answer = eventually("the redirect is passed on", || {
        Some(trio.gate.get(&url, "/")).filter(|answer| answer.status == 302)
    });
    assert!(answer.field("location").unwrap().contains(&there.to_string()));
    assert!(service.accept().is_err(), "somebody was made to dial the host's service");
}

#[test]
fn v4n_only_the_recorded_port_can_be_dialled() {
    let mut trio = Trio::start();
    // A service of the host on a port that a deployment exposes without listening on it.
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    service.set_nonblocking(true).unwrap();
    let port = service.local_addr().unwrap().port();
    let archive = trio.pair.files.write(&crate::world::hello());
    trio.pair.alice.deploy_to("bob", &archive, "other", &["--expose", &port.to_string(), "--cpu", "0.2"]);
    let answer = trio.gate.get(&trio.url("other"), "/");
    assert!(answer.is_gateways() && answer.status >= 500, "{answer:?}");
    assert!(service.accept().is_err(), "the provider dialled its own loopback interface");

    let (id, _) = trio.hello("web", &["--cpu", "0.2"]);
    trio.pair.alice.try_ctl(&["port-forward", "web", "0:22"]).refused("port_closed", 5);
    trio.pair.alice.kill();
    let wire = Wire::of(&trio.pair.alice, &[&trio.pair.bob]);
    let forward = |port| {
        let header = ForwardHeader { deployment: id.parse().unwrap(), port: Port::new(port).unwrap() };
        wire.exchange::<_, StreamReply>(&trio.pair.bob, FORWARD, &header).unwrap()
    };
    for port in [22, 2375, 8081] {
        let StreamReply::Refused(problem) = forward(port) else { panic!("port {port} was opened") };
        assert_eq!(problem.code, Code::PortClosed);
    }
    assert_eq!(forward(8080), StreamReply::Open);
}

#[test]
fn v8_a_name_proves_its_claim_and_ends_with_its_tunnel() {
    let mut trio = Trio::start();
    let (id, url) = trio.hello("web", &[]);
    let id: DeploymentId = id.parse().unwrap();
    let label = |provider: &str| Label::derive(&provider.parse().unwrap(), &id).to_string();
    assert_eq!(host_of(&url).split('.').next(), Some(&*label(&trio.pair.bob.peer_id)));

    // Another provider of the same gateway claims the same deployment: it gets a name, but not this one.
    let thief = Identity::generate();
    let wire = Wire::provider(thief.clone(), &trio.gate);
    assert!(wire.open_gate(&trio.gate, LEASE).is_err(), "a provider that was not allowed is refused");
    trio.gate.ctl(&["allow", &thief.peer_id().to_string()]).success();
    let mut lease = eventually("the gateway lets it in", || wire.open_gate(&trio.gate, LEASE).ok());
    let reply: LeaseReply = wire.exchange_on(&mut lease, &LeaseRequest::Register(id)).unwrap();
    assert!(!format!("{reply:?}").contains(host_of(&url)), "{reply:?}");
    assert_eq!(trio.gate.get(&url, "/").status, 200);
    let released: Result<LeaseReply, _> = wire.exchange_on(&mut lease, &LeaseRequest::Release(id));
    drop(released);
    assert_eq!(trio.gate.get(&url, "/").status, 200, "nobody else can release it");

    trio.pair.bob.kill();
    eventually("the name is gone", || trio.gate.get(&url, "/").is_gateways().then_some(()));
}

#[test]
fn a_gateway_that_vanishes_and_returns_heals_by_itself() {
    let mut trio = Trio::start();
    let (_, url) = trio.hello("web", &[]);
    let started = trio.pair.alice.json(&["status", "web"])["started_at"].clone();
    trio.gate.kill();
    eventually("the loss is noticed", || {
        (trio.pair.bob.json(&["gateway", "list"])[0]["connected"] == false).then_some(())
    });
    assert!(trio.pair.alice.json(&["status", "web"])["url"].is_null());
    trio.gate.up();
    assert_eq!(trio.url("web"), url);
    eventually("it is served again", || (trio.gate.get(&url, "/").status == 200).then_some(()));
    assert_eq!(trio.pair.alice.json(&["status", "web"])["started_at"], started);
    trio.pair.bob.ctl(&["gateway", "remove", trio.gate.info()["peer_id"].as_str().unwrap()]);
    eventually("the name is gone", || trio.gate.get(&url, "/").is_gateways().then_some(()));
}

#[test]
fn v8_a_provider_that_the_gateway_does_not_allow_is_told() {
    let (pair, gate) = (Pair::start(), Gate::start());
    pair.bob.ctl(&["gateway", "add", &gate.address()]);
    let listed = eventually("the refusal is told", || {
        let listed = pair.bob.json(&["gateway", "list"]);
        listed[0]["last_error"].as_str().filter(|error| error.contains("refused")).map(str::to_owned)
    });
    assert!(listed.contains(&format!("peergate allow {}", pair.bob.peer_id)), "{listed}");
    gate.ctl(&["allow", &pair.bob.peer_id]).success();
    pair.hello("web", &["--expose", "8080"]);
    let url =
        eventually("it is allowed now", || pair.alice.json(&["status", "web"])["url"].as_str().map(str::to_owned));
    assert_eq!(gate.get(&url, "/").status, 200);
    gate.ctl(&["deny", &pair.bob.peer_id]).success();
    eventually("its names end at once", || gate.get(&url, "/").is_gateways().then_some(()));
}

#[test]
fn expose_without_a_gateway_says_what_to_do() {
    let pair = Pair::start();
    let archive = pair.files.write(&crate::world::hello());
    let output = pair.alice.ctl(&["deploy", &archive, "--peer", "bob", "--name", "web", "--expose", "8080"]);
    assert!(output.stderr.contains("peerctl gateway add"), "{output:?}");
    assert!(output.stderr.contains("peerctl port-forward web 8080"), "{output:?}");
    assert_eq!(pair.alice.forward("web", 8080).get("/").status, 200);
    for address in ["", "bob", "/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/0/p2p/12D3", "https://gate"] {
        assert!(!pair.bob.try_ctl(&["gateway", "add", address]).refused("invalid_argument", 2).is_empty());
    }
    pair.bob.try_ctl(&["gateway", "remove", "12D3KooWNobody"]).refused("unknown_gateway", 3);
}

#[test]
fn only_the_owner_of_the_socket_is_served() {
    let machine = Machine::without_engine("alice");
    let ask = |head: &str| {
        let mut stream = std::os::unix::net::UnixStream::connect(machine.socket()).unwrap();
        write!(stream, "{head}\r\n\r\n").unwrap();
        Answer::read(&mut stream).status
    };
    // A page in a browser cannot add the header that every request must carry.
    assert!((400..500).contains(&ask("GET /v1/status HTTP/1.1\r\nHost: localhost\r\nConnection: close")));
    let marked = "GET /v1/status HTTP/1.1\r\nHost: localhost\r\npeer-compute-client: 1\r\nConnection: close";
    assert_eq!(ask(marked), 200);
}

/// Passes bytes on between a provider and its gateway, and keeps them.
fn listen_in(gateway: std::net::SocketAddr) -> (u16, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, heard) = (listener.local_addr().unwrap().port(), Arc::<Mutex<Vec<u8>>>::default());
    let kept = Arc::clone(&heard);
    std::thread::spawn(move || {
        for provider in listener.incoming().flatten() {
            let gateway = TcpStream::connect(gateway).unwrap();
            for (mut from, mut to) in [
                (provider.try_clone().unwrap(), gateway.try_clone().unwrap()),
                (gateway.try_clone().unwrap(), provider.try_clone().unwrap()),
            ] {
                let kept = Arc::clone(&kept);
                std::thread::spawn(move || {
                    let mut bytes = [0; 16 * 1024];
                    while let Ok(length @ 1..) = from.read(&mut bytes) {
                        kept.lock().unwrap().extend(&bytes[..length]);
                        if to.write_all(&bytes[..length]).is_err() {
                            break;
                        }
                    }
                });
            }
        }
    });
    (port, heard)
}

#[test]
fn v6_i4_the_tunnel_holds_no_plaintext() {
    let (pair, gate) = (Pair::start(), Gate::start());
    let address = gate.address();
    let (_, rest) = address.split_once("/tcp/").unwrap();
    let (port, id) = rest.split_once('/').unwrap();
    let (relay, heard) = listen_in(([127, 0, 0, 1], port.parse().unwrap()).into());
    gate.ctl(&["allow", &pair.bob.peer_id]).success();
    pair.bob.ctl(&["gateway", "add", &format!("/ip4/127.0.0.1/tcp/{relay}/{id}")]);
    pair.hello("web", &["--expose", "8080"]);
    let url = eventually("it is published", || pair.alice.json(&["status", "web"])["url"].as_str().map(str::to_owned));
    let secret = "a-visitors-own-words";
    let length = format!("Content-Length: {}", secret.len());
    assert_eq!(gate.ask(&url, "POST /echo", &[&length], secret.as_bytes()).text(), secret);
    let heard = heard.lock().unwrap();
    assert!(heard.len() > 2 * secret.len(), "the visit went another way");
    for plain in [secret, "HTTP/1.1", "POST /echo", "/peer-compute/"] {
        assert!(!heard.windows(plain.len()).any(|window| window == plain.as_bytes()), "'{plain}' was heard");
    }
}
