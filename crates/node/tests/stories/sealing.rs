//! The passphrase over a machine's key: given, changed, forgotten, guessed, and taken off.

use std::fmt::Write;
use std::process::Command;
use std::time::Duration;

use peer_proto::id::DeploymentId;
use tempfile::TempDir;

use crate::world::{Machine, Output, Pair, Running, eventually};

const PASSPHRASE: &str = "correct horse battery staple";
const OTHER: &str = "another passphrase altogether";

/// Runs `peerctl` with these secrets on file descriptors 3 and 4, where a shell puts them.
pub(crate) fn with_secrets(machine: &Machine, arguments: &[&str], secrets: &[&str]) -> Output {
    let (running, _files) = begin_with_secrets(machine, arguments, secrets);
    running.end()
}

fn begin_with_secrets(machine: &Machine, arguments: &[&str], secrets: &[&str]) -> (Running, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let peerctl = machine.command(arguments);
    let mut script = "exec \"$0\" \"$@\"".to_owned();
    for (number, secret) in (3..).zip(secrets) {
        let path = directory.path().join(format!("secret{number}"));
        std::fs::write(&path, format!("{secret}\n")).unwrap();
        write!(script, " {number}<'{}'", path.display()).unwrap();
    }
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]).arg(peerctl.get_program()).args(peerctl.get_args());
    for (name, value) in peerctl.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    (Running::start(&mut shell), directory)
}

fn seal(machine: &Machine, passphrase: &str) -> Output {
    with_secrets(machine, &["--json", "identity", "seal", "--passphrase-fd", "3"], &[passphrase])
}

fn unlock(machine: &Machine, passphrase: &str) -> Output {
    with_secrets(machine, &["--json", "identity", "unlock", "--passphrase-fd", "3"], &[passphrase])
}

/// Asserts that neither the log, nor the audit log, nor any file holds the secret.
fn assert_nowhere(machine: &Machine, secret: &str) {
    assert!(!machine.log().contains(secret));
    assert!(!machine.audit().iter().any(|line| line.to_string().contains(secret)));
    for entry in std::fs::read_dir(machine.data()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let bytes = std::fs::read(&path).unwrap();
            assert!(!bytes.windows(secret.len()).any(|part| part == secret.as_bytes()), "{}", path.display());
        }
    }
}

#[test]
fn g3_a_sealed_machine_serves_nobody_until_its_passphrase_is_given() {
    let mut pair = Pair::start();
    pair.hello("web", &["--expose", "8080", "--no-publish"]);
    let running = pair.bob.containers_with(&[]);
    let bob = &mut pair.bob;
    let plain = std::fs::read(bob.data().join("identity.key")).unwrap();
    seal(bob, "short").refused("invalid_argument", 2);
    let sealed = seal(bob, PASSPHRASE).success().json();
    assert_eq!((&sealed["sealed"], &sealed["locked"]), (&true.into(), &false.into()), "{sealed}");
    assert!(sealed["plain_backups"].as_array().unwrap().is_empty());
    // Nothing of the plain file is left in the directory, and the running daemon goes on.
    for entry in std::fs::read_dir(bob.data()).unwrap() {
        let path = entry.unwrap().path();
        let found = path.is_file() && std::fs::read(&path).unwrap().windows(32).any(|part| part == &plain[4..36]);
        assert!(!found, "{} holds the key", path.display());
    }
    assert_eq!(pair.alice.state("web"), "running");

    let bob = &mut pair.bob;
    bob.stop().success();
    bob.up();
    let state = bob.json(&["identity", "status"]);
    assert_eq!((&state["locked"], &state["peer_id"]), (&true.into(), &bob.peer_id.as_str().into()));
    assert_eq!(bob.json(&["status"])["locked"], true);
    assert!(bob.ctl(&["status"]).stdout.contains("identity unlock"));
    let doctor = bob.try_ctl(&["doctor", "--json"]);
    assert!(doctor.status == 1 && doctor.stdout.contains("identity unlock"), "{doctor:?}");
    for command in [&["whoami"][..], &["peers", "list"], &["invite"]] {
        let sentence = bob.try_ctl(command).refused("locked", 7);
        assert!(sentence.contains("peerctl identity unlock"), "{sentence}");
    }
    // What runs is left alone; a visitor from outside finds nobody.
    assert_eq!(bob.containers_with(&[]), running);
    let away = pair.alice.try_ctl(&["ps", "--peer", "bob", "--json"]);
    assert!(away.json()["unreachable"].to_string().contains("peer_offline"), "{away:?}");
    // Neither init nor a wrong passphrase harms it.
    let bob = &mut pair.bob;
    assert!(bob.try_ctl(&["init"]).refused("identity_exists", 4).contains(&bob.peer_id));
    unlock(bob, OTHER).refused("wrong_passphrase", 4);
    assert!(bob.has_audited("G3"));
    let opened = unlock(bob, PASSPHRASE).success().json();
    assert_eq!((&opened["locked"], &opened["peer_id"]), (&false.into(), &bob.peer_id.as_str().into()));
    unlock(bob, PASSPHRASE).refused("wrong_state", 4);
    eventually("alice reaches bob", || {
        (pair.alice.try_ctl(&["stats", "web", "--no-stream"]).status == 0).then_some(())
    });
    assert_eq!(pair.bob.containers_with(&[]), running);
    assert_nowhere(&pair.bob, PASSPHRASE);
}

#[test]
fn a_passphrase_is_changed_read_from_a_file_at_the_start_and_removed() {
    let mut bob = Machine::without_engine("bob");
    seal(&bob, PASSPHRASE).success();
    let change = |machine: &Machine, new: &str, current: &str| {
        let arguments = ["identity", "seal", "--passphrase-fd", "3", "--current-fd", "4"];
        with_secrets(machine, &arguments, &[new, current])
    };
    change(&bob, OTHER, "not the present one").refused("wrong_passphrase", 4);
    change(&bob, OTHER, PASSPHRASE).success();
    bob.stop().success();
    // A service manager hands it over in a file.
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("passphrase");
    std::fs::write(&file, format!("{PASSPHRASE}\n")).unwrap();
    bob.argue(&["--passphrase-file", file.to_str().unwrap()]);
    let ended = bob.launch().end();
    assert!(ended.status == 1 && ended.stderr.contains("passphrase is wrong"), "{ended:?}");
    std::fs::write(&file, format!("{OTHER}\n")).unwrap();
    bob.up();
    assert_eq!(bob.json(&["identity", "status"])["locked"], false);
    let remove = |current| with_secrets(&bob, &["identity", "seal", "--remove", "--current-fd", "3"], &[current]);
    remove(PASSPHRASE).refused("wrong_passphrase", 4);
    remove(OTHER).success();
    assert_eq!(bob.json(&["identity", "status"])["sealed"], false);
    bob.kill();
    bob.up();
    assert_eq!(bob.json(&["whoami"])["peer_id"], bob.peer_id.as_str());
    assert!(bob.try_ctl(&["identity", "seal", "--remove"]).refused("invalid_argument", 2).contains("not sealed"));
}

#[test]
fn g3_guessing_a_passphrase_is_slowed_down_and_audited() {
    let mut bob = Machine::without_engine("bob");
    seal(&bob, PASSPHRASE).success();
    bob.kill();
    bob.up();
    for _ in 0..5 {
        unlock(&bob, OTHER).refused("wrong_passphrase", 4);
    }
    // Now not even the right one, for a moment.
    unlock(&bob, PASSPHRASE).refused("too_many_requests", 6);
    let lines = bob.audit();
    assert_eq!(lines.iter().filter(|line| line["action"] == "identity unlocked" && line["threat"] == "G3").count(), 5);
    eventually("the pause is over", || (unlock(&bob, PASSPHRASE).status == 0).then_some(()));
}

#[test]
fn kills_while_sealing_leave_a_key_that_opens() {
    let mut bob = Machine::without_engine("bob");
    for round in 0..10 {
        let arguments = ["identity", "seal", "--passphrase-fd", "3"];
        let (running, _files) = begin_with_secrets(&bob, &arguments, &[PASSPHRASE]);
        std::thread::sleep(Duration::from_millis(u64::from(DeploymentId::random().0[0])));
        bob.kill();
        let reported = running.end().status == 0;
        bob.up();
        let state = bob.json(&["identity", "status"]);
        assert_eq!(state["peer_id"], bob.peer_id.as_str());
        assert!(!reported || state["sealed"] == true, "round {round}");
        if state["sealed"] == true {
            unlock(&bob, PASSPHRASE).success();
            let remove = ["identity", "seal", "--remove", "--current-fd", "3"];
            with_secrets(&bob, &remove, &[PASSPHRASE]).success();
        }
        assert_eq!(bob.json(&["whoami"])["peer_id"], bob.peer_id.as_str());
    }
}
