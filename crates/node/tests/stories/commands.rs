//! Every command as people and scripts meet it: JSON that parses, stable names, logs in order, clean ends.

use std::collections::BTreeSet;
use std::net::TcpStream;

use rustix::process::Signal;
use serde_json::Value;

use crate::world::{Machine, Pair, eventually, shell};

/// Lines on both outputs, far enough apart that the engine receives them in their order.
const TALKER: &str = "for i in $(seq 1 20); do echo out $i; sleep 0.02; echo err $i >&2; sleep 0.02; done; sleep 600";

/// Asserts that all keys are snake_case. What an environment is called is its owner's business.
fn check_keys(value: &Value) {
    match value {
        Value::Object(fields) => fields.iter().for_each(|(key, value)| {
            let snake = key.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
            assert!(snake, "{key} is not snake_case");
            check_keys(value);
        }),
        Value::Array(items) => items.iter().for_each(check_keys),
        _ => {}
    }
}

/// Commands that other tests here run with `--json`, as [`every_command_answers_people_and_scripts`] does not: they begin
/// a machine's life, need an image, end a deployment, or go on.
const ELSEWHERE: [(&str, &str); 13] = [
    ("init", "identity: init_makes_a_private_key_once_and_force_keeps_a_backup"),
    ("identity seal", "sealing"),
    ("identity unlock", "sealing"),
    ("identity rotate", "rotation"),
    ("identity revoke", "rotation"),
    ("identity statement export", "rotation"),
    ("identity statement apply", "rotation"),
    ("join", "identity: a_ticket_works_once_and_in_its_time"),
    ("panic", "emergency"),
    ("deploy", "images"),
    ("push", "images"),
    ("rm", "main_job"),
    ("port-forward", "every test that forwards a port"),
];

/// The command, of those that there are, that these words run.
fn leaf_of(words: &[&str], leaves: &[String]) -> Option<String> {
    let begins = |leaf: &&String| leaf.split(' ').eq(words.iter().take(leaf.split(' ').count()).copied());
    leaves.iter().filter(begins).max_by_key(|leaf| leaf.len()).cloned()
}

#[test]
fn every_command_answers_people_and_scripts() {
    let pair = Pair::start();
    pair.hello("web", &["--expose", "8080", "--no-publish", "-e", "GREETING=x"]);
    let ticket = pair.bob.json(&["invite"])["id"].as_str().unwrap().to_owned();
    let (alice, bob) = (&pair.alice, &pair.bob);
    let commands: [(&Machine, &[&str]); 29] = [
        (alice, &["whoami"]),
        (alice, &["identity", "status"]),
        (alice, &["peers", "list"]),
        (alice, &["peers", "show", "bob"]),
        (alice, &["peers", "rename", "bob", "bob"]),
        (alice, &["ps"]),
        (alice, &["ls", "--all"]),
        (alice, &["ps", "--peer", "bob"]),
        (bob, &["ps", "--hosted"]),
        (alice, &["status"]),
        (bob, &["status"]),
        (alice, &["status", "web"]),
        (alice, &["inspect", "web"]),
        (alice, &["stats", "web", "--no-stream"]),
        (alice, &["logs", "web"]),
        (alice, &["events"]),
        (bob, &["events"]),
        (alice, &["doctor"]),
        (bob, &["doctor"]),
        (bob, &["images"]),
        (bob, &["limits"]),
        (bob, &["invite", "list"]),
        (bob, &["audit"]),
        (bob, &["audit", "verify"]),
        (bob, &["gateway", "list"]),
        (bob, &["config", "show"]),
        (bob, &["version"]),
        (bob, &["completion", "bash"]),
        (bob, &["invite", "revoke", &ticket]),
    ];
    for (machine, command) in commands {
        let revokes = command == ["invite", "revoke", &ticket];
        if !revokes {
            let people = machine.ctl(command);
            assert!(!people.stdout.contains('\u{1b}') && !people.stderr.contains('\u{1b}'), "{command:?}: {people:?}");
            let may_be_empty = command.contains(&"list") || command[0] == "logs";
            assert!(!people.stdout.is_empty() || may_be_empty, "{command:?} prints nothing");
        }
        let lines = machine.ctl(&[command, &["--json"]].concat()).lines();
        let streams = ["events", "logs"].contains(&command[0]);
        assert!(streams || lines.len() == 1, "{command:?}");
        lines.iter().for_each(check_keys);
    }
    let gateway = peer_proto::identity::Identity::generate().peer_id().to_string();
    let gateway_address = format!("/ip4/127.0.0.1/tcp/9/p2p/{gateway}");
    let card = alice.json(&["whoami"])["card"].as_str().unwrap().to_owned();
    let changes: [(&Machine, &[&str]); 13] = [
        (bob, &["limits", "set", "--disk", "10g", "--hours", "0:00-23:00,22:00-1:00"]),
        (bob, &["limits", "unset", "disk", "hours"]),
        (bob, &["pause", "web"]),
        (bob, &["resume", "--all"]),
        (alice, &["stop", "web"]),
        (alice, &["start", "web"]),
        (alice, &["restart", "web"]),
        (bob, &["gateway", "add", &gateway_address]),
        (bob, &["gateway", "remove", &gateway]),
        (bob, &["peers", "allow", "alice", "--nothing"]),
        (bob, &["peers", "addresses", "alice", "/ip4/127.0.0.1/tcp/9"]),
        (bob, &["peers", "remove", "alice"]),
        (bob, &["peers", "add", &card]),
    ];
    for (machine, command) in changes {
        check_keys(&machine.json(command));
    }
    let reference = bob.json(&["markdown"]);
    let leaves: Vec<String> = serde_json::from_value(reference["commands"].clone()).unwrap();
    let run = commands.iter().chain(&changes).filter_map(|(_, command)| leaf_of(command, &leaves));
    // The ticket above came from it.
    let run: BTreeSet<String> =
        run.chain(ELSEWHERE.map(|(leaf, _)| leaf.to_owned())).chain(["invite".to_owned()]).collect();
    assert_eq!(run, leaves.into_iter().collect(), "a command is not run with --json by any test, or is no more");
    assert!(bob.ctl(&["--quiet", "invite"]).stderr.is_empty());
}

#[test]
fn peerctl_says_when_no_daemon_answers() {
    let machine = Machine::prepared("alice", &["--engine", "none"]);
    let sentence = machine.try_ctl(&["ps"]).refused("daemon_unavailable", 7);
    assert!(sentence.contains("peerd") && sentence.contains(machine.socket().to_str().unwrap()), "{sentence}");
    assert_eq!(machine.try_ctl(&["ps", "--json"]).json()["error"]["code"], "daemon_unavailable");
    // A version is told even so.
    assert!(machine.json(&["version"])["peerd"].is_null());
}

#[test]
fn logs_keep_both_outputs_in_their_order() {
    let pair = Pair::start();
    let archive = pair.files.write(&shell(TALKER));
    pair.alice.deploy_to("bob", &archive, "talker", &[]);
    let expected: Vec<String> = (1..=20).flat_map(|i| [format!("out {i}\n"), format!("err {i}\n")]).collect();
    let lines = eventually("everything is said", || {
        let lines = pair.alice.ctl(&["logs", "talker", "--json"]).lines();
        (lines.len() == 40).then_some(lines)
    });
    let texts: Vec<_> = lines.iter().map(|line| line["text"].as_str().unwrap()).collect();
    assert_eq!(texts, expected);
    let outputs: Vec<_> = lines.iter().map(|line| line["output"].as_str().unwrap()).collect();
    assert!(outputs.chunks(2).all(|pair| pair == ["stdout", "stderr"]), "{outputs:?}");

    let plain = pair.alice.ctl(&["logs", "talker"]);
    assert!(plain.stdout.starts_with("out 1\nout 2\n") && plain.stderr.starts_with("err 1\nerr 2\n"), "{plain:?}");
    let tail = pair.alice.ctl(&["logs", "talker", "--tail", "3", "--json"]).lines();
    assert_eq!(
        tail.iter().map(|line| line["text"].as_str().unwrap()).collect::<Vec<_>>(),
        ["err 19\n", "out 20\n", "err 20\n"]
    );
    assert!(pair.alice.ctl(&["logs", "talker", "--tail", "0"]).stdout.is_empty());
    let moment = lines[30]["at"].as_u64().unwrap();
    let since = pair.alice.ctl(&["logs", "talker", "--since", &format_moment(moment), "--json"]).lines();
    assert!((9..=11).contains(&since.len()), "{} lines since the 31st", since.len());
    let stamped = pair.alice.ctl(&["logs", "talker", "-t", "--tail", "2"]).stdout;
    assert!(stamped.starts_with("20") && stamped.contains('T') && stamped.ends_with("Z out 20\n"), "{stamped}");
}

/// RFC 3339, as `--since` takes it.
fn format_moment(milliseconds: u64) -> String {
    let (seconds, rest) = (milliseconds / 1000, milliseconds % 1000);
    let output =
        std::process::Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%S"]).arg(format!("-d@{seconds}")).output();
    format!("{}.{rest:03}Z", String::from_utf8(output.unwrap().stdout).unwrap().trim())
}

#[test]
fn followed_logs_go_on_and_end_cleanly() {
    let pair = Pair::start();
    pair.hello("web", &["--expose", "8080", "--no-publish"]);
    let forward = pair.alice.forward("web", 8080);
    let following = pair.alice.begin(&["logs", "web", "--follow", "--tail", "0"]);
    eventually("a new line comes", || {
        forward.get("/healthz");
        following.stdout().contains("GET /healthz 200").then_some(())
    });
    let ended = pair.alice.begin(&["logs", "web", "-f", "--tail", "1"]);
    pair.alice.ctl(&["stop", "web"]);
    for running in [following, ended] {
        let output = running.end();
        assert_eq!((output.status, output.stderr.as_str()), (0, ""), "{output:?}");
    }
    // What was said is kept while it is stopped.
    assert!(pair.alice.ctl(&["logs", "web"]).stdout.contains("GET /healthz 200"));
    let interrupted = pair.bob.begin(&["events", "-f"]);
    eventually("it follows", || {
        pair.alice.ctl(&["start", "web"]);
        pair.alice.ctl(&["stop", "web"]);
        (!interrupted.stdout().is_empty()).then_some(())
    });
    interrupted.signal(Signal::INT);
    assert_eq!(interrupted.end().status, 130);
}

#[test]
fn a_port_is_forwarded_on_the_loopback_interface_only() {
    let pair = Pair::start();
    pair.hello("web", &["--expose", "8080", "--no-publish"]);
    let forward = pair.alice.forward("web", 8080);
    assert!(forward.address.starts_with("127.0.0.1:"));
    let many: Vec<_> = (0..20).map(|_| forward.connect()).collect();
    assert_eq!(forward.get("/bytes/3000000").body.len(), 3_000_000);
    drop(many);
    forward.running.signal(Signal::INT);
    eventually("the port is closed", || TcpStream::connect(&forward.address).is_err().then_some(()));
    assert_eq!(forward.running.end().status, 130);
    let forward = pair.alice.forward("web", 8080);
    pair.alice.ctl(&["rm", "--force", "web"]);
    drop(forward.connect());
    let ended = forward.running.end();
    assert!(ended.status == 3 && ended.stderr.contains("'web' has been removed"), "{ended:?}");
}

#[test]
fn a_failure_of_old_is_no_news_to_whoever_removes() {
    let pair = Pair::start();
    let archive = pair.files.write(&shell("exit 3"));
    // Whether it is seen running before it ends is chance.
    pair.alice.try_ctl(&["deploy", &archive, "--peer", "bob", "--name", "brief"]);
    pair.alice.wait_for_state("brief", "failed");
    let removed = pair.alice.ctl(&["rm", "brief"]);
    assert_eq!((removed.stdout.as_str(), removed.stderr.as_str()), ("brief is removed\n", ""));
}

#[test]
fn no_command_at_all_gets_help() {
    let machine = Machine::prepared("alice", &["--engine", "none"]);
    let help = machine.try_ctl(&[]);
    assert!(help.status == 2 && help.stderr.contains("Usage: peerctl") && help.stdout.is_empty(), "{help:?}");
    assert!(!help.stderr.contains("markdown"), "{help:?}");
}

#[test]
fn events_tell_what_happens() {
    let pair = Pair::start();
    let following = pair.bob.begin(&["events", "-f", "--json"]);
    pair.hello("web", &[]);
    pair.alice.ctl(&["stop", "web"]);
    pair.bob.ctl(&["peers", "remove", "alice"]);
    for kind in ["deployment_changed", "peer_disconnected", "peer_removed"] {
        eventually(kind, || following.stdout().contains(&format!("\"kind\":\"{kind}\"")).then_some(()));
    }
}

#[test]
fn metrics_are_served_on_the_loopback_interface() {
    let port = crate::world::free_port().to_string();
    let machine = Machine::with("alice", &["--engine", "none", "--metrics-listen", &format!("127.0.0.1:{port}")]);
    let mut stream = TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
    std::io::Write::write_all(&mut stream, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .unwrap();
    let answer = crate::world::Answer::read(&mut stream);
    assert_eq!(answer.status, 200);
    assert!(answer.text().contains("# EOF") && answer.text().contains("peer"), "{}", answer.text());
    let public = Machine::prepared("bob", &["--metrics-listen", "0.0.0.0:0"]).launch().end();
    assert!(public.status == 2 && public.stderr.contains("metrics_listen"), "{public:?}");
    drop(machine);
}
