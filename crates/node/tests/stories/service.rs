//! The units for systemd: how much they leave open, and that the programs work in what they leave.
//!
//! A service manager of the test's own starts the units as they are shipped. Different are the account, which no test makes,
//! and places and ports.

use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use crate::world::{Gate, Machine, Output, Pair, Services, docker, eventually};

const PEERD: &str = "peerd.service";
const PEERGATE: &str = "peergate.service";
/// A user whom nobody else is.
const HUMAN: u32 = 48_125;

/// A provider that is a service, and a requester. The files of both outlive the provider's containers.
struct Scene {
    pair: Pair,
    services: Services,
}

impl Drop for Scene {
    fn drop(&mut self) {
        // Nobody makes containers anew that are removed after this.
        self.services.end();
    }
}

/// A provider that is a service, with these variables; `further` is one more file of its unit.
fn scene(variables: &str, further: Option<&str>) -> Scene {
    let services = Services::start();
    let (data, socket) = (services.state("peer-compute"), services.runtime("peer-compute").join("peerd.sock"));
    let mut bob = Machine::prepared("bob", &[]).served(data.clone(), socket.clone());
    let group = std::fs::metadata("/var/run/docker.sock").unwrap().gid();
    let groups = std::fs::read_to_string("/etc/group").unwrap();
    let named = |line: &&str| line.split(':').nth(2) == Some(&group.to_string());
    let group = groups.lines().find(named).unwrap().split(':').next().unwrap();
    services.install(
        PEERD,
        &format!(
            "User=nobody\nSupplementaryGroups={group}\n\
             Environment=PEER_DATA_DIR={} PEER_SOCKET={} PEER_LISTEN={} {variables}\n",
            data.display(),
            socket.display(),
            bob.address,
        ),
    );
    if let Some(file) = further {
        let text = std::fs::read_to_string(Services::packaged(file)).unwrap();
        services.drop_in(PEERD, file, &text);
    }
    services.ctl(&["start", PEERD]);
    answers(&bob);
    bob.init();
    let pair = Pair::on(bob, &["--max-cpu", "2", "--max-memory", "2g", "--egress", "internet"]);
    Scene { pair, services }
}

fn answers(machine: &Machine) {
    eventually("the daemon answers", || (machine.try_ctl(&["status"]).status == 0).then_some(()));
}

/// How many forwarders this machine's deployments have.
fn forwarders(machine: &Machine) -> usize {
    let names = machine.containers().into_iter().map(|id| docker(&["inspect", "--format", "{{.Name}}", &id]));
    names.filter(|name| name.contains("forwarder")).count()
}

fn works(scene: &Scene, why: &str) {
    eventually(why, || {
        let logs = scene.pair.alice.try_ctl(&["logs", "web"]);
        (logs.status == 0).then_some(())
    });
    let forward = scene.pair.alice.forward("web", 8080);
    eventually(why, || forward.answers("/healthz").then_some(()));
}

/// Whether `systemd-analyze security` finds a unit exposed to no more than 2.0 of 10.
fn is_confined(unit: &std::path::Path) -> Output {
    let mut command = Command::new("systemd-analyze");
    Output::of(command.args(["--offline=true", "--no-pager", "--threshold=20", "security"]).arg(unit))
}

#[test]
fn units_leave_little_open() {
    for unit in [PEERD, PEERGATE] {
        is_confined(&Services::packaged(unit)).success();
    }
    let plain = tempfile::Builder::new().suffix(".service").tempfile().unwrap();
    std::fs::write(plain.path(), "[Service]\nExecStart=/usr/local/bin/peerd\n").unwrap();
    let plain = is_confined(plain.path());
    assert_ne!(plain.status, 0, "a unit that confines nothing: {plain:?}");
}

#[test]
fn a_confined_service_hosts_and_goes_on_after_its_end() {
    let scene = scene(&format!("PEER_EGRESS=off PEER_SOCKET_OWNER={HUMAN}"), None);
    let status = scene.services.process_status(PEERD);
    for line in ["CapEff:\t0000000000000001", "CapBnd:\t0000000000000001", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line} is not in {status}");
    }
    let socket = std::fs::metadata(scene.pair.bob.socket()).unwrap();
    assert_eq!((socket.uid(), socket.mode() & 0o777), (HUMAN, 0o600));
    scene.pair.hello("web", &["--expose", "8080", "--no-publish"]);
    works(&scene, "it runs");
    assert_eq!(forwarders(&scene.pair.bob), 1);
    assert!(scene.pair.alice.json(&["stats", "web", "--no-stream"])["memory_bytes"].as_u64().unwrap() > 0);

    scene.services.ctl(&["restart", PEERD]);
    answers(&scene.pair.bob);
    works(&scene, "the service was restarted");
    let before = scene.services.property(PEERD, "MainPID");
    scene.services.ctl(&["kill", "--signal=KILL", PEERD]);
    eventually("it is started again", || {
        let now = scene.services.property(PEERD, "MainPID");
        (now != before && now != "0").then_some(())
    });
    answers(&scene.pair.bob);
    works(&scene, "the service was killed");
    scene.services.ctl(&["stop", PEERD]);
    assert_eq!(scene.services.property(PEERD, "Result"), "success", "{}", scene.services.log(PEERD));
}

#[test]
fn alone_a_service_with_more_rights_gives_ways_out_and_needs_no_forwarder() {
    let scene = scene("PEER_EGRESS=auto", Some("peerd-ways-out.conf"));
    eventually("ways out are offered", || {
        let doctor = scene.pair.bob.try_ctl(&["--json", "doctor"]).json();
        let mut found = doctor.as_array().unwrap().iter();
        found.any(|finding| finding["check"] == "egress" && finding["level"] == "ok").then_some(())
    });
    scene.pair.hello("web", &["--expose", "8080", "--no-publish", "--egress", "internet"]);
    works(&scene, "it runs");
    assert_eq!(forwarders(&scene.pair.bob), 0);
    assert!(scene.services.process_status(PEERD).contains("CapBnd:\t0000000000281401"));
}

#[test]
fn a_confined_gateway_serves_at_a_privileged_port() {
    let services = Services::start();
    let port = (600..1000).find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).unwrap();
    let gate = Gate::served(services.state("peergate"), port);
    services.install(
        PEERGATE,
        &format!(
            "User=nobody\nEnvironment=PEERGATE_DATA_DIR={} PEERGATE_DOMAIN=peer.localhost \
             PEERGATE_HTTPS_LISTEN=127.0.0.1:{} PEERGATE_LISTEN=/ip4/127.0.0.1/tcp/{}\n",
            services.state("peergate").display(),
            gate.https_port,
            gate.port,
        ),
    );
    services.ctl(&["start", PEERGATE]);
    eventually("the gateway runs", || {
        let info = gate.ctl(&["info", "--json"]);
        (info.status == 0 && info.json()["running"] == true).then_some(())
    });
    let pair = Pair::start();
    // By root, whose files the service can read.
    gate.admit(&pair.bob);
    let archive = pair.files.write(&crate::world::hello());
    let deployed = pair.alice.json(&["deploy", &archive, "--peer", "bob", "--name", "web", "--expose", "8080"]);
    let url = deployed["url"].as_str().unwrap().to_owned();
    assert_eq!(gate.get(&url, "/healthz").status, 200);
    services.ctl(&["restart", PEERGATE]);
    eventually("it serves again", || (pair.bob.json(&["gateway", "list"])[0]["connected"] == true).then_some(()));
    eventually("the name is leased again", || (gate.get(&url, "/healthz").status == 200).then_some(()));
    services.ctl(&["stop", PEERGATE]);
    assert_eq!(services.property(PEERGATE, "Result"), "success", "{}", services.log(PEERGATE));
}
