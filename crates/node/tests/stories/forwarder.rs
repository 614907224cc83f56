//! A provider's daemon that is not root: a forwarder beside each guest carries what root would carry by itself, with the
//! same guarantees.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};

use peer_node::protocols::FORWARD;
use peer_proto::code::Code;
use peer_proto::query::{ForwardHeader, StreamReply};
use peer_proto::unit::Port;
use serde_json::{Value, json};

use crate::world::{Answer, Pair, Trio, Wire, docker, eventually, hello, host_of, probe, shell};

/// The forwarders that bob has in the engine, running or not.
fn forwarders(pair: &Pair) -> Vec<Value> {
    let containers = pair.bob.containers();
    let inspected = containers.iter().filter_map(|container| {
        // One of them may go while we look.
        let output = crate::world::docker_try(&["inspect", container]);
        (output.status == 0).then(|| output.json()[0].clone())
    });
    inspected.filter(|container| container["Name"].as_str().unwrap().starts_with("/peer-compute-forwarder-")).collect()
}

fn running(pair: &Pair) -> Vec<String> {
    let running = forwarders(pair).into_iter().filter(|container| container["State"]["Running"] == true);
    running.map(|container| container["Id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn v4n_i1_without_root_a_forwarder_reaches_the_one_port_and_is_confined_itself() {
    let mut pair = Pair::without_root();
    let status = std::fs::read_to_string(format!("/proc/{}/status", pair.bob.pid())).unwrap();
    assert!(status.contains("CapEff:\t0000000000000000"), "bob could enter namespaces: {status}");
    let id = pair.hello("web", &["--expose", "8080", "--no-publish"]);
    assert_eq!(pair.alice.forward("web", 8080).get("/healthz").status, 200);
    let doctor = pair.bob.try_ctl(&["--json", "doctor"]).json();
    let finding = doctor.as_array().unwrap().iter().find(|finding| finding["check"] == "rights").unwrap();
    assert!(finding["message"].as_str().unwrap().contains("forwarder"), "{finding}");
    assert!(pair.alice.json(&["stats", "web", "--no-stream"])["memory_bytes"].as_u64().unwrap() > 0);
    assert!(pair.alice.ctl(&["logs", "web"]).stdout.contains("GET /healthz 200"));

    let all = forwarders(&pair);
    let [forwarder] = &all[..] else { panic!("not one forwarder: {all:?}") };
    let (host, config) = (&forwarder["HostConfig"], &forwarder["Config"]);
    for (field, value) in [
        ("Privileged", json!(false)),
        ("ReadonlyRootfs", json!(true)),
        ("CapDrop", json!(["ALL"])),
        ("Memory", json!(48 << 20)),
        ("PidsLimit", json!(4)),
        ("LogConfig", json!({ "Type": "none", "Config": {} })),
    ] {
        assert_eq!(host[field], value, "{field}");
    }
    assert!(host["NetworkMode"].as_str().unwrap().starts_with("container:"), "{host}");
    assert!(host["SecurityOpt"].to_string().contains("no-new-privileges"), "{host}");
    assert_eq!(forwarder["Mounts"], json!([]));
    let uid = |user: &Value| user.as_str().unwrap().split(':').next().unwrap().parse::<u32>().unwrap();
    let guest: Value = serde_json::from_str(&docker(&["inspect", &format!("peer-compute-{id}")])).unwrap();
    assert!(uid(&config["User"]) > 10_000 && uid(&config["User"]) != uid(&guest[0]["Config"]["User"]));
    // In the guest's network nothing listens but the guest.
    let pid = forwarder["State"]["Pid"].to_string();
    let listening = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap();
    let ports: Vec<_> = listening.lines().filter(|line| line.contains(" 0A ")).collect();
    assert!(ports.len() <= 1 && ports.iter().all(|line| line.contains(":1F90 ")), "{listening}");

    pair.alice.try_ctl(&["port-forward", "web", "0:22"]).refused("port_closed", 5);
    let closed: String = pair.hello("closed", &["--expose", "9999", "--no-publish", "--cpu", "0.2"]);
    pair.alice.kill();
    let wire = Wire::of(&pair.alice, &[&pair.bob]);
    let header = ForwardHeader { deployment: closed.parse().unwrap(), port: Port::new(9999).unwrap() };
    let reply: StreamReply = wire.exchange(&pair.bob, FORWARD, &header).unwrap();
    assert!(matches!(&reply, StreamReply::Refused(problem) if problem.code == Code::PortClosed), "{reply:?}");
}

#[test]
fn without_root_visitors_send_and_get_whole_messages() {
    let trio = Trio::of(Pair::without_root());
    let (_, url) = trio.hello("web", &[]);
    let body: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let length = format!("Content-Length: {}", body.len());
    assert!(trio.gate.ask(&url, "POST /echo", &[&length], &body).body == body, "not what was sent");
    assert_eq!(trio.gate.get(&url, "/bytes/20000000").body.len(), 20_000_000);
    assert!(trio.gate.get(&url, "/stream").text().ends_with("line 20\n"));

    let mut visit = trio.gate.visit(&url);
    let fields = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                  Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==";
    write!(visit, "GET /ws HTTP/1.1\r\nHost: {}\r\n{fields}\r\n\r\n", host_of(&url)).unwrap();
    assert_eq!(Answer::read_head(&mut visit).status, 101);
    visit.write_all(&[0x81, 0x82, 0, 0, 0, 0, b'h', b'i']).unwrap();
    let mut echoed = [0; 4];
    visit.read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed[2..], b"hi");

    // A half-close: the guest counts what came until its end, and answers after it.
    let archive = trio.pair.files.write(&shell("exec nc -ll -p 8080 -e wc -c"));
    trio.pair.alice.deploy_to("bob", &archive, "count", &["--expose", "8080", "--no-publish", "--cpu", "0.3"]);
    let forward = trio.pair.alice.forward("count", 8080);
    let counted = eventually("the guest counts", || {
        let mut stream = forward.connect();
        stream.write_all(&body[..1_000_000]).ok()?;
        stream.shutdown(Shutdown::Write).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer).filter(|answer| !answer.is_empty())
    });
    assert_eq!(counted.trim(), "1000000");
}

#[test]
fn without_root_forwarders_heal_follow_their_guests_and_leave_nothing() {
    let mut pair = Pair::without_root();
    pair.hello("web", &["--expose", "8080", "--no-publish"]);
    let works = |pair: &Pair, why: &str| {
        let forward = pair.alice.forward("web", 8080);
        eventually(why, || forward.answers("/healthz").then_some(()));
        eventually("there is one forwarder", || (forwarders(pair).len() == 1).then_some(()));
    };
    works(&pair, "it answers");

    let first = running(&pair);
    docker(&["kill", &first[0]]);
    works(&pair, "the forwarder was killed and has been replaced");
    assert_ne!(running(&pair), first);

    pair.alice.ctl(&["restart", "web"]);
    works(&pair, "the guest was restarted");

    let before = running(&pair);
    pair.bob.kill();
    // It ends with the daemon's connection.
    eventually("the forwarder has ended", || running(&pair).is_empty().then_some(()));
    pair.bob.up();
    works(&pair, "the daemon was killed and started again");
    assert_ne!(running(&pair), before);

    pair.bob.ctl(&["pause"]);
    eventually("a frozen guest has no forwarder", || forwarders(&pair).is_empty().then_some(()));
    pair.bob.ctl(&["resume"]);
    works(&pair, "the owner has let it go on");

    // An emergency ends it as all that is ours.
    let report = pair.bob.json(&["panic"]);
    assert_eq!((&report["still_running"], &report["problems"]), (&json!([]), &json!([])));
    assert!(pair.bob.containers_with(&[]).is_empty(), "{report}");
    pair.bob.ctl(&["resume", "--all"]);
    pair.alice.wait_for_state("web", "running");
    works(&pair, "the machine was opened again");

    pair.alice.ctl(&["stop", "web"]);
    eventually("the forwarder has gone with its guest", || forwarders(&pair).is_empty().then_some(()));
    pair.alice.ctl(&["start", "web"]);
    works(&pair, "the guest was started again");
    pair.alice.ctl(&["rm", "--force", "web"]);
    eventually("nothing is left", || pair.bob.containers().is_empty().then_some(()));
}

#[test]
fn v4_v4n_without_root_a_guest_reaches_nothing_outside_its_container() {
    let pair = Pair::without_root();
    let service = TcpListener::bind("0.0.0.0:0").unwrap();
    service.set_nonblocking(true).unwrap();
    let targets = crate::isolation::targets(service.local_addr().unwrap().port());
    let flags = ["--expose", "8080", "--no-publish", "-e", &format!("PROBE_TARGETS={targets}")];
    pair.alice.deploy_to("bob", &pair.files.write(&probe()), "probe", &flags);
    eventually("its forwarder runs beside it", || (running(&pair).len() == 1).then_some(()));
    let report = crate::isolation::report(&pair, "probe");
    crate::isolation::assert_nothing_reached(&report);
    assert!(service.accept().is_err(), "the host's service was reached");
}

#[test]
fn v5_without_root_a_flood_of_log_lines_ends_the_flooder() {
    let pair = Pair::without_root();
    let archive = pair.files.write(&probe());
    let flags = ["-e", "PROBE_MODE=flood", "-e", "PROBE_SECONDS=120", "--cpu", "0.3"];
    pair.alice.deploy_to("bob", &archive, "flood", &flags);
    let status = pair.alice.wait_for_state("flood", "failed");
    assert_eq!(status["problem"]["code"], "log_flood", "{status}");
    // The program's name is judged as root would: init is seen, whoever looks.
    let wrong = pair.files.write(&hello());
    let failed = pair.alice.try_ctl(&["deploy", &wrong, "--peer", "bob", "--name", "wrong", "--", "/nothing"]);
    failed.refused("container_exited", 1);
}
