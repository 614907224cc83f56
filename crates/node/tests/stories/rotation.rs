//! New keys and lost ones: how friends learn of them, and what a key that was ended can still do.

use std::time::{Duration, Instant};

use peer_node::protocols;
use peer_proto::card::{Card, SignedCard};
use peer_proto::id::DeploymentId;
use peer_proto::identity::Identity;
use peer_proto::query::{Answer, Call, Offered};
use peer_proto::statement::{OFFERS_MAX, Statement};
use peer_proto::unit::Timestamp;

use crate::revocation::SOON;
use crate::sealing::with_secrets;
use crate::world::{Machine, Output, Pair, Wire, eventually, key_of};

/// A machine with its recovery phrase.
fn with_phrase(name: &str) -> (Machine, String) {
    let mut machine = Machine::bare(name, &["--engine", "none"]);
    let reply = machine.json(&["init", "--name", name]);
    reply["peer_id"].as_str().unwrap().clone_into(&mut machine.peer_id);
    (machine, reply["recovery_phrase"].as_str().unwrap().to_owned())
}

/// What a machine calls this peer's key, if it trusts it.
fn id_at(machine: &Machine, name: &str) -> Option<String> {
    let shown = machine.try_ctl(&["peers", "show", name, "--json"]);
    (shown.status == 0).then(|| shown.json()["peer_id"].as_str().unwrap().to_owned())
}

fn connected(machine: &Machine, name: &str) -> bool {
    let shown = machine.try_ctl(&["peers", "show", name, "--json"]);
    shown.status == 0 && !shown.json()["connection"].is_null()
}

/// Rotates, and gives the former id.
fn rotate(machine: &mut Machine) -> String {
    let rotated = machine.json(&["identity", "rotate"]);
    let former = std::mem::replace(&mut machine.peer_id, rotated["peer_id"].as_str().unwrap().to_owned());
    assert_eq!(rotated["former"], former.as_str());
    former
}

fn revoke(machine: &Machine, phrase: &str, flags: &[&str]) -> Output {
    with_secrets(machine, &[&["--json", "identity", "revoke", "--phrase-fd", "3"], flags].concat(), &[phrase])
}

fn unconfirmed(machine: &Machine) -> Vec<serde_json::Value> {
    machine.json(&["identity", "status"])["unconfirmed"].as_array().unwrap().clone()
}

/// Sends a statement as any peer may; gives the code of the refusal, if it is refused.
fn tell(wire: &Wire, to: &Machine, bytes: &[u8]) -> Option<String> {
    let (mut stream, _) = wire.greet(to);
    match wire.exchange_on(&mut stream, &Call::Statement(bytes.to_vec())) {
        // Whose own key it ends loses the connection before the answer.
        Ok(Answer::Followed) | Err(_) => None,
        Ok(Answer::Problem(problem)) => Some(problem.code.to_string()),
        Ok(other) => panic!("{other:?}"),
    }
}

#[test]
fn a_rotated_owner_keeps_its_grants_and_deployments_and_loses_its_old_key() {
    let mut pair = Pair::start();
    pair.hello("web", &["--expose", "8080", "--no-publish"]);
    let running = pair.bob.containers_with(&[]);
    let old = key_of(&pair.alice);
    let card = pair.alice.ctl(&["whoami", "--card"]).stdout.trim().to_owned();
    let before = pair.bob.json(&["peers", "show", "alice"]);

    let former = rotate(&mut pair.alice);
    let (alice, bob) = (&pair.alice, &pair.bob);
    eventually("bob follows", || (id_at(bob, "alice").as_ref() == Some(&alice.peer_id)).then_some(()));
    assert_eq!(bob.json(&["peers", "show", "alice"])["grants"], before["grants"]);
    assert_eq!(bob.json(&["ps", "--hosted"])["deployments"][0]["peer_id"], alice.peer_id.as_str());
    assert!(bob.audit().iter().any(|line| line["action"] == "peer rotated"));
    // It is hers as before: seen, reached, stopped and started, by no other container.
    eventually("alice reaches bob", || {
        (alice.try_ctl(&["ps", "--peer", "bob"]).status == 0 && connected(alice, "bob")).then_some(())
    });
    assert_eq!(alice.state("web"), "running");
    assert_eq!(alice.forward("web", 8080).get("/").status, 200);
    assert_eq!(bob.containers_with(&[]), running);
    alice.ctl(&["restart", "web"]);
    // The old key opens nothing, and cannot come back.
    assert!(Wire::with(old.clone(), &[bob]).open(bob, protocols::CONTROL).is_err());
    bob.try_ctl(&["peers", "add", &card]).refused("revoked_key", 4);
    assert!(bob.has_audited("I3"));
    eventually("all have confirmed, and the old key is destroyed", || {
        let bytes = std::fs::read(alice.data().join("identity.key")).unwrap();
        let held = bytes.windows(32).any(|part| part == &old.seed()[..]);
        (unconfirmed(alice).is_empty() && !held).then_some(())
    });
    assert_eq!(alice.json(&["identity", "status"])["ended"][0]["peer_id"], former.as_str());

    // The provider's turn: what runs there goes on, and its owner still finds it.
    rotate(&mut pair.bob);
    let (alice, bob) = (&pair.alice, &pair.bob);
    eventually("alice follows", || (id_at(alice, "bob").as_ref() == Some(&bob.peer_id)).then_some(()));
    eventually("web is reached", || (connected(alice, "bob") && alice.state("web") == "running").then_some(()));
    let deployment = alice.json(&["status", "web"]);
    assert_eq!((&deployment["reachable"], &deployment["peer_id"]), (&true.into(), &bob.peer_id.as_str().into()));
    alice.ctl(&["rm", "--force", "web"]);
}

#[test]
fn who_was_offline_is_told_later_by_the_machine_or_by_a_common_friend() {
    let [mut alice, bob, mut carol] = ["alice", "bob", "carol"].map(Machine::without_engine);
    alice.join(&bob, &[]);
    alice.join(&carol, &[]);
    bob.join(&carol, &[]);
    carol.stop().success();
    rotate(&mut alice);
    assert_eq!(unconfirmed(&alice), ["carol"]);
    carol.up();
    eventually("carol is told by alice", || (id_at(&carol, "alice").as_ref() == Some(&alice.peer_id)).then_some(()));
    eventually("she confirms", || unconfirmed(&alice).is_empty().then_some(()));
    // Twice while she is away, and alice is gone when she comes back: bob knows.
    carol.stop().success();
    rotate(&mut alice);
    rotate(&mut alice);
    eventually("bob follows", || (id_at(&bob, "alice").as_ref() == Some(&alice.peer_id)).then_some(()));
    alice.stop().success();
    carol.up();
    eventually("carol is told by bob", || (id_at(&carol, "alice").as_ref() == Some(&alice.peer_id)).then_some(()));
    alice.up();
    eventually("they are connected", || connected(&carol, "alice").then_some(()));
    assert_eq!(carol.json(&["peers", "list"]).as_array().unwrap().len(), 2);
}

#[test]
fn i3_a_lost_machines_key_is_refused_everywhere_by_its_recovery_phrase() {
    let (server, phrase) = with_phrase("server");
    let [laptop, friend] = ["laptop", "friend"].map(Machine::without_engine);
    laptop.join(&server, &[]);
    friend.join(&server, &[]);
    laptop.join(&friend, &[]);
    eventually("all are connected", || (connected(&friend, "server") && connected(&friend, "laptop")).then_some(()));
    revoke(&laptop, &"abandon ".repeat(24), &[]).refused("wrong_recovery_phrase", 4);
    let other = with_phrase("other").1;
    revoke(&laptop, &other, &[]).refused("wrong_recovery_phrase", 4);
    revoke(&laptop, &other, &["--peer", "server"]).refused("wrong_signer", 4);
    assert!(id_at(&laptop, "server").is_some());
    assert!(connected(&friend, "server"), "the control: until then the stolen machine is welcome");

    let card = server.ctl(&["whoami", "--card"]).stdout.trim().to_owned();
    let revoked = revoke(&laptop, &phrase, &[]).success().json();
    let begun = Instant::now();
    assert_eq!((&revoked["peer_id"], &revoked["name"]), (&server.peer_id.as_str().into(), &"server".into()));
    eventually("the friend refuses it too", || id_at(&friend, "server").is_none().then_some(()));
    eventually("its connection is dead", || (!connected(&server, "friend")).then_some(()));
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    for machine in [&laptop, &friend] {
        machine.try_ctl(&["peers", "add", &card]).refused("revoked_key", 4);
        let ticket = machine.json(&["invite"])["ticket"].as_str().unwrap().to_owned();
        server.try_ctl(&["join", &ticket]).refused("revoked_key", 4);
        assert!(machine.has_audited("I3"));
    }
    assert!(!friend.log().contains(&phrase) && !laptop.log().contains(&phrase));
    // By hand to somebody whom nobody reaches.
    let hermit = Machine::without_engine("hermit");
    hermit.ctl(&["peers", "add", &card]);
    let file = laptop.data().join("statements");
    std::fs::write(&file, laptop.ctl(&["identity", "statement", "export"]).stdout).unwrap();
    assert_eq!(laptop.json(&["identity", "statement", "export", "server"])[0]["kind"], "revocation");
    let applied = hermit.json(&["identity", "statement", "apply", file.to_str().unwrap()]);
    assert_eq!((&applied[0]["kind"], &applied[0]["changed"]), (&"revocation".into(), &true.into()), "{applied}");
    assert_eq!(hermit.json(&["peers", "list"]), serde_json::json!([]));
    let again = hermit.json(&["identity", "statement", "apply", file.to_str().unwrap()]);
    assert_eq!(again[0]["changed"], false);
}

#[test]
fn g3_a_stolen_key_is_replaced_over_what_the_thief_did_with_it() {
    let (mut alice, phrase) = with_phrase("alice");
    let bob = Machine::without_engine("bob");
    alice.join(&bob, &[]);
    eventually("they are connected", || connected(&bob, "alice").then_some(()));
    let stolen = key_of(&alice);
    let compromised = |phrase: &str| {
        let arguments = ["--json", "identity", "rotate", "--compromised", "--phrase-fd", "3"];
        with_secrets(&alice, &arguments, &[phrase])
    };
    compromised("one two three").refused("wrong_recovery_phrase", 4);
    assert_eq!(alice.json(&["whoami"])["peer_id"], alice.peer_id.as_str());
    // The control: with the key alone a thief can take alice's place at bob's.
    let thief = Identity::generate();
    let own: SignedCard = alice.ctl(&["whoami", "--card"]).stdout.trim().parse().unwrap();
    let recovery_key = own.card().recovery_key;
    let card = Card::new(&thief, "alice".parse().unwrap(), &[], recovery_key, Timestamp(1));
    let rotation = Statement::rotate(&stolen, &thief, &SignedCard::sign(&thief, card), 1, Timestamp(1));
    assert_eq!(tell(&Wire::with(stolen.clone(), &[&bob]), &bob, rotation.as_bytes()), None);
    eventually("bob takes him for alice", || (id_at(&bob, "alice") == Some(thief.peer_id().to_string())).then_some(()));

    let rotated = compromised(&phrase).success().json();
    rotated["peer_id"].as_str().unwrap().clone_into(&mut alice.peer_id);
    assert_eq!(rotated["unconfirmed"], serde_json::json!(["bob"]), "he refuses her old key by now");
    let file = alice.data().join("statements");
    std::fs::write(&file, rotated["statement"].as_str().unwrap()).unwrap();
    bob.ctl(&["identity", "statement", "apply", file.to_str().unwrap()]);
    assert_eq!(id_at(&bob, "alice").as_ref(), Some(&alice.peer_id));
    for key in [stolen, thief] {
        assert!(Wire::with(key, &[&bob]).open(&bob, protocols::CONTROL).is_err());
    }
    eventually("they are connected", || connected(&bob, "alice").then_some(()));
    eventually("she knows that he follows", || unconfirmed(&alice).is_empty().then_some(()));
}

#[test]
fn v2_v3_what_a_rogue_friend_says_of_other_keys_moves_nothing() {
    let [mut alice, bob] = ["alice", "bob"].map(Machine::without_engine);
    let mut mallory = Machine::without_engine("mallory");
    alice.join(&bob, &[]);
    mallory.join(&bob, &[]);
    let own = key_of(&mallory);
    mallory.stop().success();
    let wire = Wire::with(own, &[&bob]);
    let signed_card = |identity: &Identity| {
        SignedCard::sign(identity, Card::new(identity, "alice".parse().unwrap(), &[], [9; 32], Timestamp(1)))
    };
    let stranger = Identity::generate();
    let successor = Identity::generate();
    let foreign = Statement::rotate(&stranger, &successor, &signed_card(&successor), 1, Timestamp(1));
    assert_eq!(tell(&wire, &bob, foreign.as_bytes()).as_deref(), Some("unknown_peer"));
    let peer = alice.peer_id.parse().unwrap();
    let forged = Statement::revoke(&stranger, peer, Timestamp(1));
    assert_eq!(tell(&wire, &bob, forged.as_bytes()).as_deref(), Some("wrong_signer"));
    for index in [0, 10, 60, foreign.as_bytes().len() - 1] {
        let mut changed = foreign.as_bytes().to_vec();
        changed[index] ^= 1;
        assert_eq!(tell(&wire, &bob, &changed).as_deref(), Some("invalid_signature"));
    }
    assert_eq!(tell(&wire, &bob, &vec![0; 300 * 1024]).as_deref(), Some("invalid_signature"));
    // What is offered is recognised only by whoever knows the key.
    let (mut stream, hello) = wire.greet(&bob);
    let offer = |peer| Offered::new(&peer, &hello.incarnation, true);
    let offers = Call::Offer(vec![offer(stranger.peer_id()), offer(alice.peer_id.parse().unwrap())]);
    assert_eq!(wire.exchange_on(&mut stream, &offers), Ok(Answer::Wanted(vec![1])));
    let (mut stream, _) = wire.greet(&bob);
    let flood = Call::Offer(vec![offer(stranger.peer_id()); OFFERS_MAX + 1]);
    assert!(matches!(wire.exchange_on(&mut stream, &flood), Ok(Answer::Problem(_))));
    // A statement that was true once does not bring an old key back, whoever carries it.
    let first = alice.json(&["identity", "rotate"]);
    rotate_again(&mut alice);
    eventually("bob follows", || (id_at(&bob, "alice").as_ref() == Some(&alice.peer_id)).then_some(()));
    let replayed: Statement = first["statement"].as_str().unwrap().parse().unwrap();
    assert_eq!(tell(&wire, &bob, replayed.as_bytes()), None, "in force already, and nothing more");
    assert_eq!(id_at(&bob, "alice").as_ref(), Some(&alice.peer_id));
    assert_eq!(bob.json(&["peers", "list"]).as_array().unwrap().len(), 2);
    assert!(bob.has_audited("V2"));
}

fn rotate_again(machine: &mut Machine) {
    let rotated = machine.json(&["identity", "rotate"]);
    rotated["peer_id"].as_str().unwrap().clone_into(&mut machine.peer_id);
}

#[test]
fn kills_at_any_point_of_a_rotation_leave_one_of_the_two_states() {
    let [mut alice, mut bob] = ["alice", "bob"].map(Machine::without_engine);
    alice.join(&bob, &[]);
    for round in 0..8 {
        eventually("they are connected", || (connected(&bob, "alice") && connected(&alice, "bob")).then_some(()));
        let running = alice.begin(&["identity", "rotate"]);
        let pause = Duration::from_millis(u64::from(DeploymentId::random().0[0]) * 2);
        std::thread::sleep(pause);
        if round % 2 == 0 {
            alice.kill();
        } else {
            bob.kill();
        }
        drop(running.end());
        if round % 2 == 0 {
            alice.up();
        } else {
            bob.up();
        }
        let now = alice.json(&["whoami"])["peer_id"].as_str().unwrap().to_owned();
        eventually("bob follows the key that counts", || (id_at(&bob, "alice").as_ref() == Some(&now)).then_some(()));
        assert_eq!(bob.json(&["peers", "list"]).as_array().unwrap().len(), 1, "round {round}");
        eventually("nobody is waited for", || unconfirmed(&alice).is_empty().then_some(()));
        for machine in [&alice, &bob] {
            assert!(machine.json(&["audit", "verify"])["fault"].is_null());
        }
        alice.peer_id = now;
    }
}

#[test]
fn a_rotation_that_somebody_never_hears_of_is_given_up() {
    let [mut alice, mut bob] = ["alice", "bob"].map(Machine::without_engine);
    alice.join(&bob, &[]);
    bob.stop().success();
    let old = key_of(&alice);
    rotate(&mut alice);
    assert_eq!(unconfirmed(&alice), ["bob"]);
    // It is remembered over a restart.
    alice.kill();
    alice.up();
    assert_eq!(unconfirmed(&alice), ["bob"]);
    let state = alice.json(&["identity", "rotate", "--give-up"]);
    assert_eq!(state["unconfirmed"], serde_json::json!([]));
    let bytes = std::fs::read(alice.data().join("identity.key")).unwrap();
    assert!(!bytes.windows(32).any(|part| part == &old.seed()[..]));
    bob.up();
    // By hand it still works.
    let file = alice.data().join("statements");
    std::fs::write(&file, alice.ctl(&["identity", "statement", "export"]).stdout).unwrap();
    bob.ctl(&["identity", "statement", "apply", file.to_str().unwrap()]);
    assert_eq!(id_at(&bob, "alice").as_ref(), Some(&alice.peer_id));
}
