//! The trust list as it changes under a running daemon, under crashes, and when it is damaged.

use std::time::Duration;

use peer_proto::id::DeploymentId;

use crate::world::{Machine, Pair, eventually, hello};

#[test]
fn g4_grants_limit_cpu_memory_and_number() {
    let pair = Pair::granted(&["--max-cpu", "1", "--max-memory", "512m", "--max-containers", "2"]);
    let archive = pair.files.write(&hello());
    let deploy = |name: &str, flags: &[&str]| {
        pair.alice.try_ctl(&[&["deploy", &archive, "--peer", "bob", "--name", name], flags].concat())
    };
    for (field, flags) in [("cpu", ["--cpu", "1.5"]), ("memory", ["--memory", "513m"])] {
        let sentence = deploy("big", &flags).refused("over_limit", 4);
        assert!(sentence.contains(field), "{sentence}");
    }
    assert!(pair.bob.has_audited("V5"));
    deploy("one", &["--cpu", "0.2", "--memory", "64m"]).success();
    assert!(deploy("rest", &["--cpu", "0.9", "--memory", "64m"]).refused("over_limit", 4).contains("cpu"));
    deploy("two", &["--cpu", "0.2", "--memory", "64m"]).success();
    deploy("three", &["--cpu", "0.2", "--memory", "64m"]).refused("over_limit", 4);
    // A stopped one holds no share.
    pair.alice.ctl(&["stop", "one"]);
    deploy("three", &["--cpu", "0.2", "--memory", "64m"]).success();
    pair.alice.try_ctl(&["start", "one"]).refused("over_limit", 4);
    assert_eq!(pair.bob.containers_with(&[]).len(), 2);
}

#[test]
fn g4_grants_change_and_expire_under_the_running_daemon() {
    let pair = Pair::start();
    let archive = pair.files.write(&hello());
    let deploy = || pair.alice.try_ctl(&["deploy", &archive, "--peer", "bob", "--name", "web"]);
    pair.bob.ctl(&["peers", "allow", "alice", "--nothing"]);
    deploy().refused("not_granted", 4);
    pair.bob.ctl(&["peers", "allow", "alice", "--allow", "deploy", "--expires", "1s"]);
    std::thread::sleep(Duration::from_millis(1200));
    assert!(deploy().refused("not_granted", 4).contains("expired"));
    pair.bob.ctl(&["peers", "allow", "alice", "--allow", "deploy"]);
    deploy().success();
    pair.bob.ctl(&["peers", "allow", "alice", "--nothing"]);
    // What one owns can still be ended.
    pair.alice.ctl(&["stop", "web"]);
    pair.alice.try_ctl(&["start", "web"]).refused("not_granted", 4);
    pair.alice.ctl(&["rm", "web"]);
}

#[test]
fn v1_removal_closes_connections_and_refuses_at_once() {
    let pair = Pair::start();
    let pid = pair.bob.pid();
    pair.hello("web", &["--expose", "8080", "--no-publish"]);
    pair.hello("other", &[]);
    let mut following = pair.alice.begin(&["logs", "-f", "web"]);
    let forward = pair.alice.forward("web", 8080);
    assert_eq!(forward.get("/").status, 200);
    let mut open = forward.connect();
    assert!(!following.is_over());

    pair.bob.ctl(&["peers", "remove", "alice"]);
    assert_ne!(following.end().status, 0, "a log that breaks off is no success");
    std::io::copy(&mut open, &mut std::io::sink()).unwrap();
    let archive = pair.files.write(&hello());
    let refused = pair.alice.try_ctl(&["deploy", &archive, "--peer", "bob"]);
    assert!(["refused_by_peer", "peer_offline"].contains(&refused.code()), "{refused:?}");
    eventually("its deployments are gone", || pair.bob.containers().is_empty().then_some(()));
    eventually("the refusal is audited", || pair.bob.has_audited("V1").then_some(()));
    assert_eq!(pair.bob.pid(), pid);
}

#[test]
fn removal_may_keep_the_deployments() {
    let mut pair = Pair::start();
    pair.hello("web", &[]);
    let running = pair.bob.containers_with(&[]);
    assert_eq!(running.len(), 1);
    pair.bob.ctl(&["peers", "remove", "alice", "--keep-deployments"]);
    assert_eq!(pair.bob.containers_with(&[]), running);
    assert_eq!(pair.bob.json(&["ps", "--hosted"])["deployments"][0]["state"], "running");
    // They are kept over a restart, and the host can still end them.
    pair.bob.stop().success();
    pair.bob.up();
    assert_eq!(pair.bob.containers_with(&[]), running);
    pair.bob.try_ctl(&["peers", "remove", "12D3KooWNobody"]).refused("unknown_peer", 3);
    let removed = pair.bob.json(&["peers", "remove", &pair.alice.peer_id]);
    assert_eq!((&removed["name"], &removed["ended"][0]), (&serde_json::Value::Null, &"web".into()));
    eventually("they are gone", || pair.bob.containers().is_empty().then_some(()));
}

#[test]
fn v1_deployments_of_an_owner_who_is_no_peer_end_at_the_next_start() {
    let mut pair = Pair::start();
    pair.hello("web", &[]);
    pair.bob.ctl(&["peers", "remove", "alice", "--keep-deployments"]);
    pair.bob.stop().success();
    // As if the daemon had been killed between the end of trust and the end of the deployments.
    pair.bob.database().execute("DELETE FROM kept_owner", []).unwrap();
    pair.bob.up();
    eventually("they are gone", || pair.bob.containers().is_empty().then_some(()));
    assert!(pair.bob.audit().iter().any(|line| line["action"] == "deployments ended"));
}

#[test]
fn a_provider_of_ones_own_deployments_is_removed_on_purpose_only() {
    let pair = Pair::start();
    pair.hello("web", &[]);
    let sentence = pair.alice.try_ctl(&["peers", "remove", "bob"]).refused("deployments_there", 4);
    assert!(sentence.contains("web") && sentence.contains("--force"), "{sentence}");
    assert_eq!(pair.alice.json(&["peers", "list"]).as_array().unwrap().len(), 1);
    assert_eq!(pair.alice.json(&["peers", "remove", "bob", "--force"])["out_of_reach"][0], "web");
}

#[test]
fn the_trust_list_survives_kills_in_the_middle_of_changes() {
    let alice = Machine::without_engine("alice");
    let mut bob = Machine::without_engine("bob");
    let card = alice.ctl(&["whoami", "--card"]).stdout.trim().to_owned();
    for round in 0..12 {
        let change: &[&str] = if round % 2 == 0 { &["peers", "add", &card] } else { &["peers", "remove", "alice"] };
        let running = bob.begin(change);
        std::thread::sleep(Duration::from_micros(u64::from(DeploymentId::random().0[0]) * 100));
        bob.kill();
        let reported = running.end().status == 0;
        bob.up();
        let peers = bob.json(&["peers", "list"]);
        let present = peers.as_array().unwrap().len() == 1;
        // What was reported as done is done; what was not is either done or not begun.
        assert!(!reported || present == (round % 2 == 0), "round {round}: {peers}");
        if present != (round % 2 == 0) {
            bob.ctl(change);
        }
        assert!(bob.json(&["audit", "verify"])["fault"].is_null());
    }
}

#[test]
fn a_damaged_trust_list_stops_the_daemon() {
    let alice = Machine::without_engine("alice");
    let mut bob = Machine::without_engine("bob");
    bob.ctl(&["peers", "add", alice.ctl(&["whoami", "--card"]).stdout.trim()]);
    bob.stop().success();
    let refuses = |machine: &Machine| {
        let output = machine.launch().end();
        assert_eq!(output.status, 1, "{output:?}");
        assert!(output.stderr.contains("the trust list is damaged"), "{output:?}");
        assert!(output.stderr.contains("backup"), "{output:?}");
    };
    let database = bob.database();
    let sound: Vec<u8> = database.query_row("SELECT record FROM peer", [], |row| row.get(0)).unwrap();
    for position in [0, 10, sound.len() / 2, sound.len() - 1] {
        let mut spoiled = sound.clone();
        spoiled[position] ^= 1;
        database.execute("UPDATE peer SET record = ?1", [spoiled]).unwrap();
        refuses(&bob);
    }
    database.execute("UPDATE peer SET record = ?1", [sound]).unwrap();
    database.execute_batch("CREATE TABLE kept AS SELECT * FROM trust_seal; DELETE FROM trust_seal").unwrap();
    refuses(&bob);
    database.execute_batch("INSERT INTO trust_seal SELECT * FROM kept; DROP TABLE kept").unwrap();
    drop(database);
    bob.up();
    assert_eq!(bob.json(&["peers", "list"]).as_array().unwrap().len(), 1);
}

#[test]
fn a_changed_audit_log_is_told() {
    let mut bob = Machine::without_engine("bob");
    for _ in 0..3 {
        bob.ctl(&["invite"]);
    }
    assert!(bob.json(&["audit", "verify"])["lines"].as_u64().unwrap() >= 3);
    bob.stop().success();
    let database = bob.database();
    let audit =
        database.query_row("SELECT name FROM sqlite_schema WHERE type = 'table' AND name LIKE 'audit%'", [], |row| {
            row.get::<_, String>(0)
        });
    let table = audit.unwrap();
    // Whoever can write the file can also take the triggers away that keep lines from being changed.
    let mut statement = database.prepare("SELECT name FROM sqlite_schema WHERE type = 'trigger'").unwrap();
    let triggers: Vec<String> = statement.query_map([], |row| row.get(0)).unwrap().flatten().collect();
    for name in &triggers {
        database.execute_batch(&format!("DROP TRIGGER {name}")).unwrap();
    }
    drop(statement);
    database.execute_batch(&format!("DELETE FROM {table} WHERE rowid = 2")).unwrap();
    drop(database);
    bob.up();
    assert_eq!(bob.try_ctl(&["audit", "verify"]).code(), "audit_broken");
    assert!(bob.try_ctl(&["audit", "verify", "--json"]).json()["fault"].is_string());
}
