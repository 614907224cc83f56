//! The owner of a machine comes first: limits that hold at once, and work of others that is paused and goes on.

use std::io::Read as _;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::world::{Machine, Pair, Trio, docker, eventually, hello, noise, salted, shell};

/// What the engine says of the state of bob's only container.
fn container(bob: &Machine) -> Value {
    let container = bob.containers().pop().expect("there is a container");
    let inspected: Value = serde_json::from_str(&docker(&["inspect", &container])).unwrap();
    inspected[0]["State"].clone()
}

/// One line of a report of limits.
fn limit<'a>(report: &'a Value, key: &str) -> &'a Value {
    let lines = report["machine"].as_array().filter(|lines| !lines.is_empty());
    let lines = lines.or(report["peers"][0]["limits"].as_array()).unwrap();
    lines.iter().find(|line| line["key"] == key).unwrap()
}

/// A counter that shows whether its processes get on.
fn counter() -> xtask::image::Image {
    shell("n=0; while true; do n=$((n+1)); echo $n; sleep 0.1; done")
}

fn counted(machine: &Machine, name: &str) -> u64 {
    let said = machine.ctl(&["logs", "--tail", "1", name]).stdout;
    said.trim().parse().unwrap_or(0)
}

#[test]
fn v5_limits_of_the_owner_act_at_once_and_survive_a_restart() {
    let mut pair = Pair::start();
    pair.hello("one", &["--memory", "64m", "--cpu", "0.1"]);
    pair.bob.ctl(&["limits", "set", "--containers", "1", "--memory", "128m"]);
    let archive = pair.files.write(&hello());
    let deploy = |name: &str| {
        pair.alice.try_ctl(&["deploy", &archive, "--peer", "bob", "--name", name, "--memory", "64m", "--cpu", "0.1"])
    };
    deploy("two").refused("no_capacity", 6);
    pair.bob.kill();
    pair.bob.up();
    eventually("bob answers", || (pair.alice.try_ctl(&["ps", "--peer", "bob"]).status == 0).then_some(()));
    deploy("three").refused("no_capacity", 6);
    pair.bob.ctl(&["limits", "set", "--containers", "3"]);
    deploy("two").success();
    deploy("three").refused("no_capacity", 6);
    // Lowered below what is held, nothing ends by itself.
    let report = pair.bob.json(&["limits", "set", "--containers", "1", "--memory", "100m"]);
    assert_eq!((&limit(&report, "containers")["held"], &limit(&report, "containers")["over"]), (&json!(2), &json!(1)));
    assert_eq!(limit(&report, "memory")["over"], json!(28 << 20));
    assert_eq!(limit(&report, "memory")["source"], "limits");
    assert_eq!([pair.alice.state("one"), pair.alice.state("two")], ["running", "running"]);
    assert!(pair.bob.ctl(&["limits"]).stdout.contains("28 MiB"));
    let report = pair.bob.json(&["limits", "unset", "containers", "memory"]);
    assert_eq!(
        (&limit(&report, "memory")["over"], &limit(&report, "memory")["source"]),
        (&Value::Null, &json!("default"))
    );
    deploy("three").success();
    let lines = pair.bob.audit();
    assert!(lines.iter().any(|line| line["action"] == "limits changed" && line["detail"].as_str().unwrap().contains("containers=3")));
}

#[test]
fn v5_limits_of_one_peer_bind_it_alone_and_are_not_reset_by_allowing() {
    let pair = Pair::start();
    let alice = ["--peer", "alice"];
    let set = ["limits", "set", "--containers", "1", "--disk", "1m", "--hours", "0:00-23:59,23:59-0:00"];
    let report = pair.bob.json(&[&set[..], &alice].concat());
    assert_eq!(limit(&report, "disk")["limit"], json!(1 << 20));
    // What is allowed anew keeps the limits that it does not name.
    pair.bob.ctl(&["peers", "allow", "alice", "--allow", "deploy", "--max-cpu", "1.5"]);
    let report = pair.bob.json(&[&["limits"], &alice[..]].concat());
    assert_eq!((&limit(&report, "cpu")["limit"], &limit(&report, "containers")["limit"]), (&json!(1500), &json!(1)));
    assert_eq!(limit(&report, "hours")["hours"], "00:00-23:59,23:59-00:00");
    let large =
        salted("hello").layer(xtask::image::Layer::new().file("/blob", &noise(2 << 20), 0o644)).build().unwrap();
    let large = pair.files.write(&large);
    pair.alice.try_ctl(&["push", &large, "--peer", "bob"]).refused("over_limit", 4);
    pair.alice.try_ctl(&["deploy", &large, "--peer", "bob", "--name", "web"]).refused("over_limit", 4);
    pair.bob.ctl(&[&["limits", "unset", "disk", "containers", "hours"], &alice[..]].concat());
    let report = pair.bob.json(&[&["limits"], &alice[..]].concat());
    assert_eq!((&limit(&report, "containers")["limit"], &limit(&report, "hours")["hours"]), (&json!(4), &Value::Null));
    pair.alice.ctl(&["push", &large, "--peer", "bob"]);
    let held = limit(&pair.bob.json(&[&["limits"], &alice[..]].concat()), "disk")["held"].as_u64().unwrap();
    assert!(held >= 2 << 20, "{held}");
    // The whole machine's disk is bounded too.
    pair.bob.ctl(&["limits", "set", "--disk", "3m"]);
    let more = salted("hello").layer(xtask::image::Layer::new().file("/blob", &noise(2 << 20), 0o644)).build().unwrap();
    pair.alice.try_ctl(&["push", &pair.files.write(&more), "--peer", "bob"]).refused("no_capacity", 6);
    let unknown = pair.bob.try_ctl(&["limits", "set", "--cpu", "1", "--peer", "carol"]);
    unknown.refused("unknown_peer", 3);
}

#[test]
fn v5_bytes_of_a_peer_take_at_least_their_share_of_time() {
    const RATE: usize = 512 << 10;
    const SIZE: usize = 2 << 20;
    // Half of a second's bytes may come at once.
    const LEAST: Duration = Duration::from_millis(((SIZE - RATE / 2) * 1000 / RATE) as u64);
    let pair = Pair::start();
    let image = || salted("hello").layer(xtask::image::Layer::new().file("/blob", &noise(SIZE), 0o644));
    let pushed = || {
        let archive = pair.files.write(&image().build().unwrap());
        let begun = Instant::now();
        pair.alice.ctl(&["push", &archive, "--peer", "bob"]);
        begun.elapsed()
    };
    // Through a forwarded port too, which counts both ways together.
    let program = shell("while true; do /bin/busybox head -c 2097152 /dev/zero | nc -l -p 8080; done");
    let program = pair.files.write(&program);
    pair.alice.deploy_to("bob", &program, "bytes", &["--cpu", "0.5", "--expose", "8080"]);
    let fetched = || {
        let forward = pair.alice.forward("bytes", 8080);
        let begun = Instant::now();
        let mut received = Vec::new();
        forward.connect().read_to_end(&mut received).unwrap();
        assert_eq!(received.len(), SIZE);
        begun.elapsed()
    };
    let (quick_push, quick_fetch) = (pushed(), fetched());
    for whose in [&["--peer", "alice"][..], &[]] {
        pair.bob.ctl(&[&["limits", "set", "--bandwidth", "512k"], whose].concat());
        let (push, fetch) = (pushed(), fetched());
        eprintln!("{SIZE} bytes: pushed in {quick_push:?}, then {push:?}; fetched in {quick_fetch:?}, then {fetch:?}");
        assert!(push >= LEAST && fetch >= LEAST, "{push:?} and {fetch:?} are less than {LEAST:?}");
        pair.bob.ctl(&[&["limits", "unset", "bandwidth"], whose].concat());
    }
}

#[test]
fn a_pause_freezes_what_runs_and_loses_nothing() {
    let mut trio = Trio::start();
    let (_, url) = trio.hello("web", &["--cpu", "0.2"]);
    let before = container(&trio.pair.bob);
    let paused = trio.pair.bob.json(&["pause"]);
    assert_eq!(
        (&paused["pauses"][0]["subject"], &paused["deployments"][0]["state"]),
        (&json!("machine"), &json!("paused"))
    );
    assert_eq!(container(&trio.pair.bob)["Paused"], true);
    let status = trio.pair.alice.json(&["status", "web"]);
    assert_eq!(
        (&status["state"], &status["problem"]["code"], &status["url"]),
        (&json!("paused"), &json!("paused"), &json!(url))
    );
    assert!(trio.pair.alice.ctl(&["ps"]).stdout.contains("paused"));
    assert!(trio.pair.bob.ctl(&["status"]).stdout.contains("the whole machine is paused"));
    let answer = trio.gate.get(&url, "/");
    assert_eq!((answer.status, answer.field("x-peergate-error")), (503, Some("paused")), "{answer:?}");
    // Nothing new, and nothing of his own accord.
    let archive = trio.pair.files.write(&hello());
    trio.pair.alice.try_ctl(&["deploy", &archive, "--peer", "bob", "--name", "new"]).refused("paused", 6);
    trio.pair.alice.try_ctl(&["restart", "web"]).refused("paused", 6);
    trio.pair.alice.try_ctl(&["push", &archive, "--peer", "bob"]).refused("paused", 6);
    // It lasts over a crash of the daemon.
    trio.pair.bob.kill();
    trio.pair.bob.up();
    eventually("bob answers", || {
        (trio.pair.alice.try_ctl(&["status", "web", "--json"]).json()["reachable"] == true).then_some(())
    });
    assert_eq!((trio.pair.alice.state("web").as_str(), &container(&trio.pair.bob)["Paused"]), ("paused", &json!(true)));
    eventually("its name is kept", || {
        (trio.gate.get(&url, "/").field("x-peergate-error") == Some("paused")).then_some(())
    });
    let resumed = trio.pair.bob.json(&["resume"]);
    assert_eq!((&resumed["pauses"], &resumed["deployments"][0]["state"]), (&json!([]), &json!("running")));
    eventually("it is served again", || (trio.gate.get(&url, "/").status == 200).then_some(()));
    let after = container(&trio.pair.bob);
    assert_eq!((&after["StartedAt"], &after["Pid"]), (&before["StartedAt"], &before["Pid"]), "it is the same run");
    assert!(trio.pair.bob.has_audited("G6"));
}

#[test]
fn a_pause_concerns_what_it_names_and_can_free_memory() {
    let pair = Pair::start();
    let archive = pair.files.write(&counter());
    for name in ["one", "two"] {
        pair.alice.deploy_to("bob", &archive, name, &["--cpu", "0.1", "--stop-timeout", "1s", "--restart", "always"]);
    }
    eventually("both count", || (counted(&pair.alice, "one") > 3 && counted(&pair.alice, "two") > 3).then_some(()));
    pair.bob.ctl(&["pause", "one"]);
    let at = counted(&pair.alice, "one");
    let other = counted(&pair.alice, "two");
    eventually("the other goes on", || (counted(&pair.alice, "two") > other + 5).then_some(()));
    assert!(counted(&pair.alice, "one") <= at + 1, "it does not count");
    pair.bob.ctl(&["resume", "one"]);
    eventually("it goes on where it was", || (counted(&pair.alice, "one") > at).then_some(()));
    assert_eq!(pair.alice.json(&["status", "one"])["restarts"], 0);
    // Stopped, whatever its restart policy says, and started anew.
    let report = pair.bob.json(&["pause", "--peer", "alice", "--stop"]);
    assert_eq!(report["deployments"].as_array().unwrap().len(), 2);
    assert!(pair.bob.containers_with(&[]).is_empty());
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!([pair.alice.state("one"), pair.alice.state("two")], ["paused", "paused"]);
    pair.alice.try_ctl(&["deploy", &archive, "--peer", "bob", "--name", "three"]).refused("paused", 6);
    // Its owner may still end it.
    pair.alice.ctl(&["stop", "one"]);
    pair.alice.ctl(&["rm", "one"]);
    pair.bob.ctl(&["resume", "--peer", "alice"]);
    pair.alice.wait_for_state("two", "running");
    pair.bob.try_ctl(&["pause", "none"]).refused("no_such_deployment", 3);
}

#[test]
fn outside_of_the_hours_everything_is_paused() {
    let pair = Pair::start();
    let archive = pair.files.write(&counter());
    pair.alice.deploy_to("bob", &archive, "web", &["--cpu", "0.1"]);
    // Hours that begin in two hours and last one, whatever the time is.
    let minutes = std::process::Command::new("date").args(["+%H"]).output().unwrap().stdout;
    let hour: u32 = String::from_utf8(minutes).unwrap().trim().parse().unwrap();
    let closed = format!("{}:00-{}:00", (hour + 2) % 24, (hour + 3) % 24);
    for whose in [&["--peer", "alice"][..], &[]] {
        pair.bob.ctl(&[&["limits", "set", "--hours", &closed], whose].concat());
        let status = pair.alice.wait_for_state("web", "paused");
        assert!(status["problem"]["message"].as_str().unwrap().contains("local time"), "{status}");
        pair.alice.try_ctl(&["deploy", &archive, "--peer", "bob", "--name", "new"]).refused("paused", 6);
        assert_eq!(container(&pair.bob)["Paused"], true);
        pair.bob.ctl(&[&["limits", "unset", "hours"], whose].concat());
        pair.alice.wait_for_state("web", "running");
    }
}

/// A process of the owner's that takes all the processor time that it gets. It ends when it is dropped.
struct Busy(std::process::Child);

impl Busy {
    fn start() -> Self {
        Self(std::process::Command::new("/bin/sh").args(["-c", "while :; do :; done"]).spawn().unwrap())
    }

    /// Processor time so far (microseconds).
    fn used(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        ticks * 10_000
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn alone_v5_the_owners_work_comes_before_hungry_guests() {
    let pair = Pair::start();
    let archive = pair.files.write(&shell("while :; do :; done"));
    let guests = ["one", "two"];
    for name in guests {
        pair.alice.deploy_to("bob", &archive, name, &["--cpu", "1", "--memory", "32m"]);
    }
    let own = [(); 2].map(|()| Busy::start());
    let used = |name: &str| pair.alice.json(&["stats", name, "--no-stream"])["cpu_microseconds"].as_u64().unwrap();
    let measure = || (own.iter().map(Busy::used).sum::<u64>(), guests.map(used));
    let (owner_before, guests_before) = measure();
    std::thread::sleep(Duration::from_secs(5));
    let (owner_after, guests_after) = measure();
    let owner = owner_after - owner_before;
    for (before, after) in guests_before.into_iter().zip(guests_after) {
        let guest = after - before;
        eprintln!("the owner's process had {owner} us, a guest {guest} us");
        assert!(owner > guest * 3 / 2, "the owner's process had {owner} us, a guest {guest} us");
    }
}
