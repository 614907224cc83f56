//! Identities, and how machines come to trust each other: by ticket, by card, in one direction.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::world::{Machine, Pair, eventually, hello};

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn init_makes_a_private_key_once_and_force_keeps_a_backup() {
    let mut machine = Machine::bare("alice", &["--engine", "none"]);
    for command in [&["whoami"][..], &["ps"], &["peers", "list"], &["invite"], &["stop", "web"]] {
        let sentence = machine.try_ctl(command).refused("no_identity", 7);
        assert!(sentence.contains("peerctl init"), "{command:?}: {sentence}");
    }
    machine.init();
    let key = machine.data().join("identity.key");
    let former = std::fs::read(&key).unwrap();
    assert_eq!((mode(&key), mode(&machine.data())), (0o600, 0o700));
    assert_eq!((mode(&machine.socket()), mode(machine.socket().parent().unwrap())), (0o600, 0o700));

    let sentence = machine.try_ctl(&["init"]).refused("identity_exists", 4);
    assert!(sentence.contains(&machine.peer_id) && sentence.contains("--force"), "{sentence}");
    assert_eq!(std::fs::read(&key).unwrap(), former);

    let reply = machine.json(&["init", "--force"]);
    let backup = Path::new(reply["backup"].as_str().unwrap());
    assert_eq!((std::fs::read(backup).unwrap(), mode(backup)), (former, 0o600));
    assert_eq!(reply["recovery_phrase"].as_str().unwrap().split_whitespace().count(), 24);
    let whoami = machine.json(&["whoami"]);
    assert_eq!(whoami["peer_id"], reply["peer_id"]);
    assert_ne!(whoami["peer_id"], machine.peer_id.as_str());
    let phrase = reply["recovery_phrase"].as_str().unwrap();
    assert!(!machine.log().contains(phrase) && !machine.audit().iter().any(|line| line.to_string().contains(phrase)));
    // A restart finds the same identity.
    machine.stop().success();
    machine.up();
    assert_eq!(machine.json(&["whoami"])["peer_id"], reply["peer_id"]);
}

#[test]
fn a_ticket_works_once_and_in_its_time() {
    let [alice, bob, carol] = ["alice", "bob", "carol"].map(Machine::without_engine);
    let invite = |flags: &[&str]| {
        let invitation = bob.json(&[&["invite"], flags].concat());
        (invitation["ticket"].as_str().unwrap().to_owned(), invitation["id"].as_str().unwrap().to_owned())
    };
    let (ticket, _) = invite(&["--allow", "deploy", "--max-cpu", "1"]);
    let joined = alice.json(&["join", &ticket]);
    assert_eq!(joined["peer"]["name"], "bob");
    assert_eq!(joined["granted"]["deploy"]["max_cpu"], 1000, "{joined}");
    let there = bob.json(&["peers", "show", "alice"]);
    assert_eq!(there["verification_code"], joined["peer"]["verification_code"]);

    carol.try_ctl(&["join", &ticket]).refused("invalid_ticket", 4);
    let (revoked, id) = invite(&[]);
    assert!(bob.json(&["invite", "list"]).to_string().contains(&id));
    bob.ctl(&["invite", "revoke", &id]);
    carol.try_ctl(&["join", &revoked]).refused("invalid_ticket", 4);
    let (expired, _) = invite(&["--ticket-expires", "1s"]);
    std::thread::sleep(std::time::Duration::from_millis(1200));
    carol.try_ctl(&["join", &expired]).refused("invalid_ticket", 4);
    for garbage in
        ["ticket", "peerticket1.AAAA", &ticket[..ticket.len() - 3], bob.ctl(&["whoami", "--card"]).stdout.trim()]
    {
        let output = carol.try_ctl(&["join", garbage]);
        assert!(["invalid_ticket", "invalid_argument"].contains(&output.code()), "{output:?}");
    }
    assert_eq!(carol.json(&["peers", "list"]), serde_json::json!([]));
    assert_eq!(bob.json(&["peers", "list"]).as_array().unwrap().len(), 1);
}

#[test]
fn v3_two_machines_racing_with_one_ticket_do_not_both_join() {
    let [bob, carol, dave] = ["bob", "carol", "dave"].map(Machine::without_engine);
    let ticket = bob.json(&["invite"])["ticket"].as_str().unwrap().to_owned();
    let racing = [&carol, &dave].map(|machine| machine.begin(&["join", &ticket]));
    let mut ended = racing.map(|running| running.end().status);
    ended.sort_unstable();
    assert_eq!(ended, [0, 4]);
    assert_eq!(bob.json(&["peers", "list"]).as_array().unwrap().len(), 1);
}

#[test]
fn peers_are_added_by_card_shown_renamed_and_removed() {
    let [alice, bob] = ["alice", "bob"].map(Machine::without_engine);
    let card = |machine: &Machine| machine.ctl(&["whoami", "--card"]).stdout.trim().to_owned();
    let (alices, bobs) = (card(&alice), card(&bob));
    alice.ctl(&["peers", "add", &bobs]);
    alice.try_ctl(&["peers", "add", &bobs]).refused("peer_exists", 4);
    alice.try_ctl(&["peers", "add", &alices]).refused("invalid_argument", 2);
    let spoiled = bobs.replace(&bobs[20..24], if bobs[20..24] == *"AAAA" { "BBBB" } else { "AAAA" });
    assert_ne!(alice.try_ctl(&["peers", "add", &spoiled]).status, 0);
    bob.ctl(&["peers", "add", &alices, "--name", "al", "--allow", "deploy", "--max-memory", "1g", "--expires", "24h"]);
    let shown = bob.json(&["peers", "show", "al"]);
    assert_eq!(shown["grants"]["deploy"]["max_memory"], 1 << 30);
    assert!(shown["grants"]["deploy"]["expires_at"].is_u64());
    bob.ctl(&["peers", "rename", "al", "alice"]);
    bob.try_ctl(&["peers", "show", "al"]).refused("unknown_peer", 3);
    eventually("they are connected", || {
        (!bob.json(&["peers", "show", &alice.peer_id])["connection"].is_null()).then_some(())
    });
    assert!(bob.ctl(&["peers", "list"]).stdout.contains("alice"));
    bob.ctl(&["peers", "addresses", "alice", "/ip4/127.0.0.1/tcp/9"]);
    assert_eq!(bob.json(&["peers", "show", "alice"])["addresses"][0], "/ip4/127.0.0.1/tcp/9");
    bob.ctl(&["peers", "remove", "alice"]);
    assert_eq!(bob.json(&["peers", "list"]), serde_json::json!([]));
    // The gate at bob's refuses at once, and alice is told so.
    eventually("alice is refused", || {
        let output = alice.try_ctl(&["ps", "--peer", "bob", "--json"]);
        let unreachable = output.json()["unreachable"].to_string();
        (unreachable.contains("refused_by_peer") || unreachable.contains("peer_offline")).then_some(())
    });
}

#[test]
fn g4_trust_gives_nothing_back() {
    let [alice, bob] = ["alice", "bob"].map(Machine::start);
    alice.join(&bob, &[]);
    let pair = Pair { alice, bob, files: crate::world::Files::new() };
    let archive = pair.files.write(&hello());
    let sentence = pair.bob.try_ctl(&["deploy", &archive, "--peer", "alice"]).refused("not_granted", 4);
    assert!(sentence.contains("alice") && sentence.contains("peers allow"), "{sentence}");
    pair.bob.try_ctl(&["push", &archive, "--peer", "alice"]).refused("not_granted", 4);
    assert!(pair.alice.has_audited("G4"));
    assert_eq!(pair.alice.json(&["ps", "--hosted", "--all"])["deployments"], serde_json::json!([]));
    assert_eq!(pair.alice.json(&["images"]), serde_json::json!([]));
    assert!(std::fs::read_dir(pair.alice.data().join("spool")).unwrap().next().is_none(), "nothing was transferred");
}
