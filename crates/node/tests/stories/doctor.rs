//! `peerctl doctor` on machines with something wrong: it names the fault, and its advice repairs it.

use std::process::Command;

use serde_json::Value;

use crate::engines::SecondEngine;
use crate::world::{Machine, Output, Pair, eventually};

const OPERATIONS: &str = include_str!("../../../../docs/operations.md");

/// What `doctor` found, whatever its exit status, which must fit.
fn findings(machine: &Machine) -> Vec<Value> {
    let output = machine.try_ctl(&["doctor", "--json"]);
    let findings = output.json().as_array().unwrap().clone();
    let failed = findings.iter().any(|finding| finding["level"] == "failure");
    assert_eq!(output.status, i32::from(failed), "{output:?}");
    for finding in &findings {
        let id = finding["check"].as_str().unwrap();
        assert!(OPERATIONS.contains(&format!("`{id}`")), "docs/operations.md explains {id}");
        assert_eq!(finding["level"] == "ok", finding["advice"].is_null(), "{finding}");
    }
    findings
}

#[track_caller]
fn finding(machine: &Machine, check: &str) -> Value {
    let findings = findings(machine);
    let found = findings.iter().find(|finding| finding["check"] == check);
    found.unwrap_or_else(|| panic!("no {check}: {findings:?}")).clone()
}

fn shell(line: &str) {
    Output::of(Command::new("sh").args(["-c", line])).success();
}

#[test]
fn wrong_modes_and_owners_are_named_and_the_advice_repairs_them() {
    let files = tempfile::tempdir().unwrap();
    let configuration = files.path().join("peerd.toml");
    std::fs::write(&configuration, "log = \"info\"\n").unwrap();
    let configuration = configuration.to_str().unwrap();
    let alice = Machine::with("alice", &["--engine", "none", "--config", configuration]);
    let data = alice.data().display().to_string();
    let socket = alice.socket();
    let (run, socket) = (socket.parent().unwrap().display().to_string(), socket.display().to_string());
    let faults = [
        ("data_directory", format!("chmod 0755 {data}")),
        ("data_directory", format!("chown 4242 {data}")),
        ("key_file", format!("chmod 0640 {data}/identity.key")),
        ("key_file", format!("chown 4242 {data}/identity.key")),
        ("database", format!("chmod 0644 {data}/peer.db")),
        ("database", format!("chmod 0604 {data}/peer.db-wal")),
        ("socket", format!("chmod 0777 {run}")),
        ("socket", format!("chmod 0666 {socket}")),
        ("socket", format!("chown 4242 {socket}")),
        ("configuration_file", format!("chmod 0666 {configuration}")),
        ("configuration_file", format!("chown 4242 {configuration}")),
    ];
    for (check, fault) in faults {
        assert_eq!(finding(&alice, check)["level"], "ok", "before {fault}");
        shell(&fault);
        let found = finding(&alice, check);
        assert_eq!(found["level"], "failure", "{fault}: {found}");
        let people = alice.try_ctl(&["doctor"]);
        assert!(people.status == 1 && people.stdout.contains(&format!("FAILURE  {check}: ")), "{people:?}");
        shell(found["advice"].as_str().unwrap().strip_prefix("run: ").unwrap());
        assert_eq!(finding(&alice, check)["level"], "ok", "after the advice against {fault}");
    }
}

#[test]
fn the_engine_and_its_walls_are_described_as_they_are() {
    let Pair { alice, bob, .. } = Pair::start();
    let version = crate::world::docker(&["version", "--format", "{{json .Server}}"]);
    let version: Value = serde_json::from_str(version.trim()).unwrap();
    let info: Value = serde_json::from_str(crate::world::docker(&["info", "--format", "{{json .}}"]).trim()).unwrap();
    let found = findings(&bob);
    let named = |check: &str| found.iter().find(|finding| finding["check"] == check).unwrap();
    assert!(named("engine_version")["message"].as_str().unwrap().contains(version["Version"].as_str().unwrap()));
    for component in version["Components"].as_array().unwrap() {
        let check = match component["Name"].as_str().unwrap() {
            "runc" => "runc_version",
            "containerd" => "containerd_version",
            _ => continue,
        };
        let (message, number) = (&named(check)["message"], component["Version"].as_str().unwrap());
        assert!(message.as_str().unwrap().contains(number), "{message} {number}");
    }
    let options = info["SecurityOptions"].to_string();
    for (check, holds) in [
        ("seccomp", options.contains("name=seccomp")),
        ("user_namespace", options.contains("name=userns") || options.contains("name=rootless")),
        ("apparmor", options.contains("name=apparmor") || options.contains("name=selinux")),
        ("cgroup", info["CgroupVersion"] == "2"),
        ("live_restore", info["LiveRestoreEnabled"] == true),
    ] {
        assert_eq!(named(check)["level"] == "ok", holds, "{check}");
    }
    assert_eq!(named("clock_peers")["level"], "ok");
    assert!(!findings(&alice).iter().any(|finding| finding["check"] == "runc_version"), "alice has no engine");
    eventually("alice has seen bob's clock", || {
        finding(&alice, "clock_peers")["message"].as_str().unwrap().contains("agree").then_some(())
    });
}

#[test]
fn alone_an_engine_that_listens_on_tcp_is_a_failure() {
    let engine = SecondEngine::start_with(&["--host=tcp://127.0.0.1:2375", "--tls=false"]);
    let mut bob = Machine::prepared("bob", &["--engine-socket", &engine.socket()]).within(engine.namespace());
    bob.up();
    bob.init();
    let found = finding(&bob, "engine_port");
    assert_eq!(found["level"], "failure", "{found}");
    assert!(found["message"].as_str().unwrap().contains("127.0.0.1:2375"), "{found}");
    // The same daemon's namespace with an engine that listens on its socket alone.
    drop(bob);
    drop(engine);
    let engine = SecondEngine::start();
    let mut bob = Machine::prepared("bob", &["--engine-socket", &engine.socket()]).within(engine.namespace());
    bob.up();
    bob.init();
    assert_eq!(finding(&bob, "engine_port")["level"], "ok");
    shell(&format!("chmod 0666 {}", engine.socket()));
    let found = finding(&bob, "engine_socket");
    assert_eq!(found["level"], "failure", "{found}");
    shell(found["advice"].as_str().unwrap().strip_prefix("run: ").unwrap());
    assert_ne!(finding(&bob, "engine_socket")["level"], "failure");
}
