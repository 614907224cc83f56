//! The emergency stop: everything of others ends at once, nothing else is touched, and it stays so.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::world::{Machine, Pair, Trio, docker, docker_try, eventually, hello, shell};

/// A container of somebody else's in the same engine. It is removed at the end.
struct Foreign(String);

impl Foreign {
    fn start(pair: &Pair) -> Self {
        let mut image = shell("exit 0");
        image.name = format!("peer-foreign-{}:1", crate::world::salt());
        docker(&["load", "--input", &pair.files.write(&image)]);
        let flags = ["run", "--detach", "--network", "none", "--label", "peer-compute.node=another", &image.name];
        Self(docker(&[&flags[..], &["/bin/sleep", "600"]].concat()).trim().to_owned())
    }

    fn runs(&self) -> bool {
        docker(&["inspect", "--format", "{{.State.Running}}", &self.0]).trim() == "true"
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let image = docker_try(&["inspect", "--format", "{{.Config.Image}}", &self.0]).stdout;
        docker_try(&["rm", "--force", &self.0]);
        docker_try(&["rmi", "--force", image.trim()]);
    }
}

/// Everything in an archive of evidence.
fn evidence(path: &Path) -> BTreeMap<String, String> {
    let mode = std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    let packed = std::process::Command::new("gzip").args(["-dc"]).arg(path).output().unwrap().stdout;
    let mut tar = tar::Archive::new(packed.as_slice());
    tar.entries()
        .unwrap()
        .map(|entry| {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            (name, String::from_utf8_lossy(&bytes).into_owned())
        })
        .collect()
}

fn parsed(files: &BTreeMap<String, String>, name: &str) -> Value {
    serde_json::from_str(&files[&format!("evidence/{name}")]).unwrap()
}

fn is_served(trio: &Trio, url: &str) -> bool {
    trio.gate.get(url, "/").status == 200
}

#[test]
fn a_panic_ends_ours_and_only_ours_cuts_everybody_off_and_keeps_the_evidence() {
    let mut trio = Trio::start();
    let (id, url) = trio.hello("web", &["--cpu", "0.2", "-e", "GREETING=tellnobody", "--restart", "always"]);
    trio.pair.hello("other", &["--cpu", "0.1", "--restart", "always"]);
    trio.pair.bob.ctl(&["pause", "other"]);
    let foreign = Foreign::start(&trio.pair);
    assert!(is_served(&trio, &url));
    let report = trio.pair.bob.json(&["panic"]);
    assert_eq!(report["stopped"].as_array().unwrap().len(), 2, "a frozen one too: {report}");
    assert_eq!((&report["still_running"], &report["problems"]), (&json!([]), &json!([])));
    assert!(trio.pair.bob.containers_with(&[]).is_empty());
    assert_eq!(trio.pair.bob.containers().len(), 2, "they are kept");
    assert!(foreign.runs(), "what is not ours is not touched");
    let answer = trio.gate.get(&url, "/");
    assert!(answer.is_gateways() && answer.status == 503, "{answer:?}");
    assert_eq!(trio.pair.bob.json(&["gateway", "list"])[0]["connected"], false);
    let peers = trio.pair.bob.json(&["peers", "list"]);
    assert_eq!(peers[0]["connection"], Value::Null);
    // The evidence holds what is known, and no secret.
    let files = evidence(Path::new(report["evidence"].as_str().unwrap()));
    assert!(parsed(&files, "audit-verify.json")["lines"].as_u64().unwrap() > 0);
    assert_eq!(parsed(&files, "trust.json")["peers"][0]["name"], "alice");
    let of_web = |name: &str| parsed(&files, &format!("deployments/{id}/{name}.json"));
    assert_eq!(of_web("inspection")["State"]["Running"], false);
    assert_eq!(of_web("row")["status"]["specification"]["name"], "web");
    assert!(
        files.keys().any(|name| name.ends_with("engine.txt")) && files.keys().any(|name| name.ends_with("log.txt"))
    );
    assert!(!files.values().any(|text| text.contains("tellnobody")), "the owner's secret");
    let key = std::fs::read(trio.pair.bob.data().join("identity.key")).unwrap();
    let key = String::from_utf8_lossy(&key).into_owned();
    assert!(!files.values().any(|text| text.contains(key.trim())));
    // It stays so: over a crash, and for whoever asks.
    trio.pair.bob.kill();
    trio.pair.bob.up();
    assert!(trio.pair.bob.ctl(&["status"]).stdout.contains("emergency"));
    let refused =
        trio.pair.alice.try_ctl(&["deploy", &trio.pair.files.write(&hello()), "--peer", "bob", "--name", "new"]);
    assert!(["refused_by_peer", "peer_offline"].contains(&refused.code()), "{refused:?}");
    assert!(trio.pair.bob.containers_with(&[]).is_empty());
    // A second one finds nothing to end, and keeps its own evidence.
    let again = trio.pair.bob.json(&["panic"]);
    assert_eq!(again["stopped"], json!([]));
    assert_ne!(again["evidence"], report["evidence"]);
    // Opened again, what was ended stays so until it is resumed by itself.
    trio.pair.bob.ctl(&["resume"]);
    let status = eventually("alice is let in again", || {
        let status = trio.pair.alice.try_ctl(&["status", "web", "--json"]);
        (status.status == 0 && status.json()["reachable"] == true).then(|| status.json())
    });
    assert_eq!((&status["state"], &status["problem"]["code"]), (&json!("paused"), &json!("paused")), "{status}");
    assert!(trio.pair.bob.containers_with(&[]).is_empty());
    trio.pair.bob.ctl(&["resume", "--all"]);
    trio.pair.alice.wait_for_state("web", "running");
    trio.pair.alice.wait_for_state("other", "running");
    eventually("it is served again", || is_served(&trio, &url).then_some(()));
    assert!(foreign.runs());
}

#[test]
fn a_panic_that_is_cut_short_is_gone_through_with_by_the_next_start() {
    let mut pair = Pair::start();
    pair.hello("web", &["--cpu", "0.2", "--restart", "always"]);
    // As far as the first step, which is durable before anything is ended.
    pair.bob.kill();
    let insert = "INSERT INTO pause (subject, pause) VALUES (x'820080', x'a20002011864')";
    assert_eq!(pair.bob.database().execute(insert, []).unwrap(), 1);
    assert_eq!(pair.bob.containers_with(&[]).len(), 1, "it runs on without the daemon");
    pair.bob.up();
    eventually("it is ended", || pair.bob.containers_with(&[]).is_empty().then_some(()));
    assert!(pair.bob.ctl(&["status"]).stdout.contains("emergency"));
    let refused = pair.alice.try_ctl(&["ps", "--peer", "bob"]);
    assert!(refused.stderr.contains("bob"), "{refused:?}");
    pair.bob.ctl(&["resume", "--all"]);
    pair.alice.wait_for_state("web", "running");
}

#[test]
fn a_panic_killed_at_any_moment_is_run_again_to_its_end() {
    let mut pair = Pair::start();
    let ids = ["one", "two"].map(|name| pair.hello(name, &["--cpu", "0.1", "--restart", "always"]));
    let foreign = Foreign::start(&pair);
    let mut cut_short = 0;
    for delay in [0, 5, 15, 40, 80, 150, 300, 600] {
        let panic = pair.bob.begin(&["panic"]);
        std::thread::sleep(Duration::from_millis(delay));
        pair.bob.kill();
        cut_short += u32::from(panic.end().status != 0);
        pair.bob.up();
        // Either nothing of it is durable and everything runs, or the start goes through with it.
        let closed = pair.bob.ctl(&["status"]).stdout.contains("emergency");
        let running = if closed { 0 } else { 2 };
        let seen = || (pair.bob.containers_with(&[]).len() == running).then_some(());
        eventually(&format!("after {delay} ms, {running} run"), seen);
        let report = pair.bob.json(&["panic"]);
        assert_eq!((&report["still_running"], &report["problems"]), (&json!([]), &json!([])));
        assert_eq!((pair.bob.containers_with(&[]).len(), pair.bob.containers().len()), (0, 2), "stopped, and kept");
        assert!(foreign.runs(), "what is not ours is not touched");
        // Every archive is whole, also those of runs that were cut short; the last one tells of everything.
        let last = PathBuf::from(report["evidence"].as_str().unwrap());
        for archive in std::fs::read_dir(pair.bob.data().join("evidence")).unwrap().flatten() {
            if archive.file_name().to_string_lossy().starts_with("panic-") {
                assert_eq!(parsed(&evidence(&archive.path()), "panic.json")["complete"], true);
            }
        }
        let files = evidence(&last);
        for id in &ids {
            assert_eq!(parsed(&files, &format!("deployments/{id}/inspection.json"))["State"]["Running"], false);
        }
        pair.bob.ctl(&["resume", "--all"]);
        pair.alice.wait_for_state("one", "running");
        pair.alice.wait_for_state("two", "running");
    }
    assert!(cut_short > 1, "only {cut_short} were cut short");
}

#[test]
fn a_panic_without_an_engine_says_so_and_does_the_rest() {
    let bob = Machine::with("bob", &["--engine-socket", "/nonexistent/engine.sock"]);
    let output = bob.try_ctl(&["--json", "panic"]);
    assert_eq!(output.status, 1, "{output:?}");
    let report = output.json();
    assert_eq!(report["problems"][0]["code"], "engine_unavailable", "{report}");
    let files = evidence(&PathBuf::from(report["evidence"].as_str().unwrap()));
    assert!(files.contains_key("evidence/engine.problem") && files.contains_key("evidence/audit.json"));
    assert!(bob.ctl(&["status"]).stdout.contains("emergency"));
    bob.try_ctl(&["join", "peerticket1.x"]).refused("paused", 6);
    bob.ctl(&["resume"]);
}
