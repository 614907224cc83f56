//! What becomes of containers that end by themselves, are stopped, are unwell, or outlive their daemon.

use serde_json::{Value, json};

use crate::world::{Pair, Trio, docker, eventually, salted, shell};

/// What the engine says of bob's only container: its id and when it was started.
fn identity(pair: &Pair) -> Value {
    let container = pair.bob.containers().pop().expect("there is a container");
    let inspected: Value = serde_json::from_str(&docker(&["inspect", &container])).unwrap();
    json!([inspected[0]["Id"], inspected[0]["State"]["StartedAt"], inspected[0]["State"]["Running"]])
}

#[test]
fn a_container_that_crashes_is_not_running() {
    let pair = Pair::start();
    pair.hello("web", &["--expose", "8080", "--no-publish"]);
    pair.alice.forward("web", 8080).get("/exit/3");
    let status = pair.alice.wait_for_state("web", "failed");
    assert_eq!((&status["exit_code"], &status["problem"]["code"]), (&json!(3), &json!("container_exited")), "{status}");
    assert!(pair.alice.ctl(&["ps"]).stdout.contains("failed (exit code 3)"));
    pair.alice.ctl(&["start", "web"]);
    pair.alice.forward("web", 8080).get("/exit/0");
    assert_eq!(pair.alice.wait_for_state("web", "stopped")["exit_code"], 0);
    // One that ends at once is told by the command itself.
    let archive = pair.files.write(&shell("exit 7"));
    let output = pair.alice.try_ctl(&["deploy", &archive, "--peer", "bob", "--name", "short"]);
    let ended = pair.alice.wait_for_state("short", "failed");
    assert!(output.code() == "container_exited" || output.status == 0, "{output:?}");
    assert_eq!(ended["exit_code"], 7);
}

#[test]
fn a_program_that_cannot_begin_is_told_at_once() {
    let pair = Pair::start();
    let archive = pair.files.write(&shell("exit 0"));
    for (program, why) in [("/no/such", "was not found"), ("/etc", "cannot be executed")] {
        let flags = ["--peer", "bob", "--name", "wrong", "--restart", "always", "--", program];
        let sentence = pair.alice.try_ctl(&[&["deploy", &archive], &flags[..]].concat()).refused("container_exited", 1);
        assert!(sentence.contains(why), "{program}: {sentence}");
        assert_eq!(pair.alice.state("wrong"), "failed");
    }
}

#[test]
fn g4_without_a_grant_nothing_is_started_again() {
    let pair = Pair::start();
    let archive = pair.files.write(&shell("sleep 2"));
    let flags = ["--peer", "bob", "--name", "web", "--restart", "always", "--cpu", "0.1"];
    pair.alice.ctl(&[&["deploy", &archive], &flags[..]].concat());
    pair.bob.ctl(&["peers", "allow", "alice", "--nothing"]);
    assert_eq!(pair.alice.wait_for_state("web", "stopped")["problem"]["code"], "not_granted");
    assert!(pair.bob.containers_with(&[]).is_empty());
}

/// Changes a limit of bob's only container behind the daemon's back.
fn tamper(pair: &Pair) {
    let container = pair.bob.containers().pop().expect("there is a container");
    docker(&["update", "--cpu-shares", "512", &container]);
}

#[test]
fn i2_a_container_that_was_tampered_with_is_destroyed_and_audited() {
    let mut pair = Pair::start();
    pair.hello("web", &["--expose", "8080", "--no-publish"]);
    pair.bob.kill();
    tamper(&pair);
    pair.bob.up();
    let status = eventually("it is judged", || {
        let status = pair.alice.try_ctl(&["status", "web", "--json"]).json();
        (status["state"] == "failed").then_some(status)
    });
    assert_eq!(status["problem"]["code"], "isolation_violated", "{status}");
    assert!(pair.bob.containers().is_empty() && pair.bob.has_audited("I2"));
    // One that does not run is replaced, and that too is in the log.
    pair.alice.ctl(&["start", "web"]);
    pair.alice.ctl(&["stop", "web"]);
    let lines = pair.bob.audit().len();
    tamper(&pair);
    pair.alice.ctl(&["start", "web"]);
    assert!(pair.bob.audit()[lines..].iter().any(|line| line.to_string().contains("CpuShares")));
    assert_eq!(pair.alice.forward("web", 8080).get("/").status, 200);
}

#[test]
fn a_container_that_an_older_version_made_runs_on() {
    let mut pair = Pair::start();
    pair.hello("web", &["--expose", "8080", "--no-publish"]);
    let before = identity(&pair);
    pair.bob.kill();
    // As if the profile of then had had another weight.
    tamper(&pair);
    let told = "UPDATE container SET told = json_set(told, '$.HostConfig.CpuShares', 512)";
    assert_eq!(pair.bob.database().execute(told, []).unwrap(), 1);
    pair.bob.up();
    eventually("it is served again", || {
        (pair.alice.try_ctl(&["status", "web", "--json"]).json()["state"] == "running").then_some(())
    });
    assert_eq!(pair.alice.forward("web", 8080).get("/").status, 200);
    assert_eq!(identity(&pair), before);
    // Its next start is in today's profile.
    pair.alice.ctl(&["restart", "web"]);
    assert_ne!(identity(&pair)[0], before[0]);
    assert!(!pair.bob.has_audited("I2"));
}

#[test]
fn restart_policies_are_kept() {
    let pair = Pair::start();
    let archive = pair.files.write(&shell("sleep 0.2; exit 1"));
    let deploy = |name: &str, policy: &str| {
        let flags = ["--name", name, "--restart", policy, "--cpu", "0.1", "--detach"];
        pair.alice.try_ctl(&[&["deploy", &archive, "--peer", "bob"], &flags[..]].concat());
    };
    deploy("twice", "on-failure:2");
    deploy("always", "always");
    assert_eq!(pair.alice.wait_for_state("twice", "failed")["restarts"], 2);
    eventually("it is started again", || {
        (pair.alice.json(&["status", "always"])["restarts"].as_u64()? >= 2).then_some(())
    });
    pair.alice.ctl(&["stop", "always"]);
    assert_eq!(pair.alice.state("always"), "stopped");
    assert!(pair.bob.containers_with(&[]).is_empty());
}

#[test]
fn health_is_checked_from_outside() {
    let pair = Pair::start();
    let flags =
        ["--expose", "8080", "--no-publish", "--health-interval", "1s", "--health-retries", "2", "--cpu", "0.2"];
    pair.hello("well", &[&flags[..], &["--health-path", "/healthz"]].concat());
    pair.hello("ill", &[&flags[..], &["--health-path", "/nothing"]].concat());
    for (name, health) in [("well", "healthy"), ("ill", "unhealthy")] {
        eventually(&format!("{name} is {health}"), || {
            (pair.alice.json(&["status", name])["health"] == health).then_some(())
        });
    }
    assert!(pair.alice.ctl(&["ps"]).stdout.contains("running (unhealthy)"));
}

#[test]
fn a_stop_is_asked_for_before_it_is_forced() {
    let pair = Pair::start();
    let polite = "trap 'echo bye; exit 0' TERM; echo ready; while true; do sleep 0.05; done";
    pair.alice.deploy_to("bob", &pair.files.write(&shell(polite)), "polite", &["--cpu", "0.2"]);
    let stubborn = "trap '' TERM; echo ready; while true; do sleep 0.05; done";
    let flags = ["--cpu", "0.2", "--stop-timeout", "1s"];
    pair.alice.deploy_to("bob", &pair.files.write(&shell(stubborn)), "stubborn", &flags);
    for name in ["polite", "stubborn"] {
        eventually("it is ready", || pair.alice.ctl(&["logs", name]).stdout.contains("ready").then_some(()));
    }
    pair.alice.ctl(&["stop", "polite", "stubborn"]);
    assert!(pair.alice.ctl(&["logs", "polite"]).stdout.contains("bye"));
    assert_eq!(pair.alice.json(&["status", "stubborn"])["exit_code"], 137);
    pair.alice.ctl(&["stop", "polite"]);
}

#[test]
fn an_upgrade_or_a_crash_of_the_daemon_leaves_containers_running() {
    let mut trio = Trio::start();
    let (_, url) = trio.hello("web", &[]);
    let before = identity(&trio.pair);
    for crash in [false, true] {
        if crash {
            trio.pair.bob.kill();
        } else {
            trio.pair.bob.stop().success();
        }
        assert_eq!(identity(&trio.pair), before, "it runs on without the daemon");
        trio.pair.bob.up();
        eventually("it is served again", || {
            let url = trio.pair.alice.try_ctl(&["status", "web", "--json"]).json()["url"].clone();
            (url.is_string() && trio.gate.get(url.as_str()?, "/").status == 200).then_some(())
        });
        assert_eq!(trio.url("web"), url);
        assert_eq!(identity(&trio.pair), before, "it was not started again");
    }
    trio.pair.alice.ctl(&["stop", "web"]);
    trio.pair.bob.kill();
    trio.pair.bob.up();
    eventually("a stopped one stays stopped", || {
        (trio.pair.alice.try_ctl(&["status", "web", "--json"]).json()["state"] == "stopped").then_some(())
    });
    assert!(trio.pair.bob.containers_with(&[]).is_empty());
}

#[test]
fn an_offline_provider_is_told_and_its_last_word_remembered() {
    let mut pair = Pair::start();
    pair.hello("web", &[]);
    pair.bob.stop().success();
    let listed = eventually("bob is offline", || {
        let listed = pair.alice.json(&["ps"]);
        (listed["deployments"][0]["reachable"] == false).then_some(listed)
    });
    assert_eq!(listed["unreachable"][0]["peer"], "bob");
    assert!(pair.alice.ctl(&["ps"]).stdout.contains("peer offline"));
    let sentence = pair.alice.try_ctl(&["stop", "web"]).refused("peer_offline", 5);
    assert!(sentence.contains("bob"), "{sentence}");
    pair.bob.up();
    eventually("bob is back", || (pair.alice.json(&["status", "web"])["reachable"] == true).then_some(()));
    assert_eq!(pair.alice.state("web"), "running");
}

#[test]
fn environment_files_commands_and_entrypoints_reach_the_container() {
    let pair = Pair::start();
    let file = pair.files.bytes("variables", b"# a remark\nFROM_FILE=a=b c\n\nGREETING=file\n");
    let image = salted("hello").environment("FROM_IMAGE", "i").build().unwrap();
    let archive = pair.files.write(&image);
    let flags = ["--env-file", &file, "-e", "GREETING=flag", "--expose", "8080", "--no-publish"];
    pair.alice.deploy_to("bob", &archive, "web", &flags);
    assert!(pair.alice.forward("web", 8080).get("/").text().contains("flag"));
    let inspected = pair.alice.json(&["inspect", "web"])["specification"]["environment"].to_string();
    assert!(inspected.contains("FROM_FILE") && inspected.contains("a=b c"), "{inspected}");
    let script = "echo \"$FROM_FILE|$1|$2\"; sleep 600";
    let archive = pair.files.write(&shell("exit 1"));
    let arguments =
        ["deploy", &archive, "--peer", "bob", "--name", "args", "-e", "FROM_FILE=x", "--entrypoint", "/bin/sh"];
    pair.alice.ctl(&[&arguments[..], &["--", "-c", script, "sh", "one two", "--json"]].concat());
    let said =
        eventually("it speaks", || Some(pair.alice.ctl(&["logs", "args"]).stdout).filter(|said| !said.is_empty()));
    assert_eq!(said, "x|one two|--json\n");
}
