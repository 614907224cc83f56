//! What a deployment may ask for beyond the plain profile (V4, V5): root and powers of it, and writable places.

use serde_json::Value;

use crate::world::{Files, Machine, Pair, eventually, ordinary, shell};

/// Runs a script on bob, and gives what it has printed once it has said that it is done.
fn said(pair: &Pair, name: &str, script: &str, flags: &[&str]) -> String {
    let archive = pair.files.write(&shell(&format!("{script}; echo done; sleep 600")));
    pair.alice.deploy_to("bob", &archive, name, &[&["--cpu", "0.2"], flags].concat());
    eventually("the script is done", || {
        let output = pair.alice.try_ctl(&["logs", name]);
        output.stdout.contains("done\n").then_some(output.stdout)
    })
}

/// The value of a line of `/proc/self/status`.
fn status<'a>(text: &'a str, field: &str) -> &'a str {
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {field} in {text}")).trim()
}

const CAPABILITIES: [&str; 3] = ["CapPrm", "CapEff", "CapBnd"];
/// `CAP_CHOWN` (0) and `CAP_SETUID` (7).
const CHOWN_AND_SETUID: &str = "0000000000000081";
const ATTEMPTS: &str = "/bin/busybox chown 1:1 /tmp 2>&1; /bin/busybox chmod 4755 /bin/busybox 2>&1; \
    /bin/busybox mount -t tmpfs none /data 2>&1; /bin/busybox mknod /tmp/disk b 8 0 2>&1; \
    /bin/busybox chroot /tmp /bin/sh 2>&1; /bin/busybox hostname evil 2>&1; /bin/busybox kill -0 1 2>&1";

#[test]
fn v4_root_has_the_powers_that_were_granted_and_asked_for_and_no_others() {
    let pair = Pair::granted(&["--root", "--cap", "chown,setuid,kill", "--max-containers", "8"]);
    let script = format!("/bin/busybox cat /proc/self/status; {ATTEMPTS}");
    let asked = said(&pair, "asked", &script, &["--user", "root", "--cap", "CAP_CHOWN", "--cap", "setuid"]);
    assert!(status(&asked, "Uid").split_whitespace().all(|uid| uid == "0"), "{asked}");
    for set in CAPABILITIES {
        assert_eq!(status(&asked, set), CHOWN_AND_SETUID, "{set}");
    }
    for set in ["CapInh", "CapAmb"] {
        // Older engines fill the inheritable set, which gives nothing without a file that asks for it.
        assert!([CHOWN_AND_SETUID, "0000000000000000"].contains(&status(&asked, set)), "{set}: {asked}");
    }
    assert_eq!((status(&asked, "NoNewPrivs"), status(&asked, "Seccomp")), ("1", "2"));
    // The control: root without the power, and the private user, cannot do what this one could.
    let failed = |text: &str, what: &str| text.lines().any(|line| line.starts_with(what));
    assert!(!failed(&asked, "chown:"), "{asked}");
    for what in ["chmod:", "mount:", "mknod:", "chroot:", "hostname:"] {
        assert!(failed(&asked, what), "{what} {asked}");
    }
    let powerless = said(&pair, "powerless", &script, &["--user", "root"]);
    let private = said(&pair, "private", &script, &[]);
    for text in [&powerless, &private] {
        assert!(failed(text, "chown:"), "{text}");
        for set in CAPABILITIES {
            assert_eq!(status(text, set), "0000000000000000", "{set}");
        }
    }
    assert_eq!(status(&powerless, "Uid").split_whitespace().next(), Some("0"));
    let uid: u32 = status(&private, "Uid").split_whitespace().next().unwrap().parse().unwrap();
    assert!(uid >= 10_000, "{uid}");
}

#[test]
fn v4_what_was_not_granted_is_refused_by_name() {
    let pair = Pair::granted(&["--root", "--cap", "chown"]);
    let archive = pair.files.write(&shell("sleep 600"));
    let deploy = |flags: &[&str]| {
        let arguments = [&["deploy", &archive, "--peer", "bob", "--name", "web", "--cpu", "0.2"], flags].concat();
        pair.alice.try_ctl(&arguments)
    };
    let sentence = deploy(&["--user", "root", "--cap", "setuid"]).refused("not_granted", 4);
    assert!(sentence.contains("--allow deploy ... --root --cap chown,setuid"), "{sentence}");
    let sentence = deploy(&["--writable-root", "64m"]).refused("not_granted", 4);
    assert!(sentence.contains("--writable-root 64m"), "{sentence}");
    assert!(pair.bob.has_audited("V4") && pair.bob.has_audited("V5"));
    // What makes no sense is said before anybody is asked.
    assert!(deploy(&["--cap", "chown"]).refused("invalid_argument", 2).contains("--user root"));
    for flags in [["--cap", "sys-admin"], ["--user", "1000"], ["--writable", "/proc=1m"], ["--writable", "/data"]] {
        assert_eq!(deploy(&flags).status, 2, "{flags:?}");
    }
    assert!(deploy(&["--memory", "64m", "--writable", "/data=65m"]).refused("invalid_argument", 2).contains("memory"));
    assert!(pair.bob.containers().is_empty());
    let allowed = pair.bob.ctl(&["peers", "show", "alice"]).stdout;
    assert!(allowed.contains("root with chown"), "{allowed}");
}

#[test]
fn an_image_that_begins_as_root_fails_with_its_remedy_and_runs_with_it() {
    let pair = Pair::granted(&["--root", "--cap", "chown,setgid,setuid"]);
    let archive = pair.files.write(&ordinary());
    let flags = ["--expose", "8080", "--no-publish", "--cpu", "0.2"];
    pair.alice.try_ctl(&[&["deploy", &archive, "--peer", "bob", "--name", "plain"], &flags[..]].concat());
    let problem = pair.alice.wait_for_state("plain", "failed")["problem"].clone();
    assert_eq!(problem["code"], "container_exited", "{problem}");
    let sentence = problem["message"].as_str().unwrap();
    for part in
        ["made to run as root", "--user root --cap chown,setgid,setuid", "peerctl peers allow YOU", "--root --cap"]
    {
        assert!(sentence.contains(part), "{part}: {sentence}");
    }
    let remedy = ["--user", "root", "--cap", "chown,setgid,setuid"];
    pair.alice.deploy_to("bob", &archive, "remedied", &[&flags[..], &remedy].concat());
    let forward = pair.alice.forward("remedied", 8080);
    let answer = eventually("it serves", || Some(forward.get("/")).filter(|answer| answer.status == 200));
    assert_eq!(answer.body, b"hello\n");
    // Root alone does not do, and the sentence says what it had.
    pair.alice
        .try_ctl(&[&["deploy", &archive, "--peer", "bob", "--name", "half", "--user", "root"], &flags[..]].concat());
    let problem = pair.alice.wait_for_state("half", "failed")["problem"].clone();
    assert!(problem["message"].as_str().unwrap().contains("as root with no capability"), "{problem}");
}

#[test]
fn v4_what_the_machine_cannot_meet_is_refused_before_anything_travels() {
    let pair = Pair::granted(&["--writable-root", "1g"]);
    let archive = pair.files.write(&shell("sleep 600"));
    let deploy = |flags: &[&str]| {
        let arguments = [&["deploy", &archive, "--peer", "bob", "--name", "web", "--cpu", "0.2"], flags].concat();
        pair.alice.try_ctl(&arguments)
    };
    let info = crate::world::docker(&["info", "--format", "{{.Driver}} {{.SecurityOptions}}"]);
    if !info.contains("name=userns") {
        assert!(deploy(&["--require-userns"]).refused("isolation_lacking", 4).contains("does not map"));
    }
    if info.starts_with("overlay2") {
        assert!(deploy(&["--writable-root", "64m"]).refused("isolation_lacking", 4).contains("--writable PATH=SIZE"));
    }
    assert!(deploy(&["--runtime", "kata-fc"]).refused("isolation_lacking", 4).contains("offers"));
    assert_eq!(deploy(&["--runtime", "../sh"]).status, 2);
    assert!(pair.bob.has_audited("V4") && pair.bob.containers().is_empty());
    // The control: what it has, it gives, and says so.
    pair.alice.deploy_to("bob", &archive, "web", &["--cpu", "0.2", "--runtime", "runc"]);
    let status = pair.alice.json(&["status", "web"]);
    assert_eq!(status["isolation"]["runtime"], "runc", "{status}");
    assert!(pair.alice.ctl(&["status", "web"]).stdout.contains("runtime runc"));
    assert!(pair.bob.ctl(&["status"]).stdout.contains("runtime runc"));
}

#[test]
fn v4_a_runtime_that_the_engine_lacks_lets_nothing_run() {
    let bob = Machine::with("bob", &["--runtime", "runsc-nowhere"]);
    let alice = Machine::without_engine("alice");
    alice.join(&bob, &[]);
    let files = Files::new();
    let archive = files.write(&shell("sleep 600"));
    let refused = alice.try_ctl(&["deploy", &archive, "--peer", "bob", "--name", "web"]);
    assert!(refused.refused("isolation_lacking", 4).contains("'runsc-nowhere'"));
    let findings = bob.try_ctl(&["--json", "doctor"]).json();
    let runtime = findings.as_array().unwrap().iter().find(|finding| finding["check"] == "runtime").unwrap();
    assert_eq!(runtime["level"], "failure", "{runtime}");
}

#[test]
fn v4_a_narrowed_grant_ends_what_it_covers_no_more_at_the_next_start() {
    let pair = Pair::granted(&["--root", "--cap", "chown"]);
    let archive = pair.files.write(&shell("sleep 2"));
    let flags = ["--restart", "always", "--cpu", "0.1", "--user", "root", "--cap", "chown"];
    pair.alice.ctl(&[&["deploy", &archive, "--peer", "bob", "--name", "web"], &flags[..]].concat());
    pair.bob.ctl(&["peers", "allow", "alice", "--allow", "deploy", "--root"]);
    let problem = pair.alice.wait_for_state("web", "failed")["problem"].clone();
    assert_eq!(problem["code"], "not_granted", "{problem}");
    assert!(problem["message"].as_str().unwrap().contains("--root --cap chown"), "{problem}");
    assert!(pair.bob.containers_with(&[]).is_empty() && pair.bob.has_audited("V4"));
    pair.alice.try_ctl(&["start", "web"]).refused("not_granted", 4);
    pair.bob.ctl(&["peers", "allow", "alice", "--allow", "deploy", "--root", "--cap", "chown", "--cap", "setuid"]);
    pair.alice.ctl(&["start", "web"]);
    // The sums count too: of what a narrowed grant has no room for, nothing begins again.
    pair.bob.ctl(&["peers", "allow", "alice", "--allow", "deploy", "--max-memory", "128m", "--root", "--cap", "chown"]);
    assert_eq!(pair.alice.wait_for_state("web", "failed")["problem"]["code"], "over_limit");
}

#[test]
fn v5_writable_paths_have_a_size_and_run_nothing() {
    let pair = Pair::start();
    let script = "echo kept > /data/file && cat /data/file; grep /data /proc/mounts; \
        /bin/busybox dd if=/dev/zero of=/data/fill bs=1024 count=2048 2>&1; \
        /bin/busybox cp /bin/busybox /tmp/program; /tmp/program true || echo not executed; \
        echo no > /var/file || echo read-only";
    let script = script.replace("grep", "/bin/busybox grep");
    let text = said(&pair, "web", &script, &["--writable", "/data=1m", "--writable", "/run=8m"]);
    for expected in ["kept\n", "No space left", "not executed", "read-only"] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    let mount = text.lines().find(|line| line.starts_with("tmpfs /data")).unwrap();
    for option in ["rw", "nosuid", "nodev", "noexec", "size=1024k"] {
        assert!(mount.split([',', ' ']).any(|part| part == option), "{option}: {mount}");
    }
    let shown: Value = pair.alice.json(&["status", "web"]);
    assert_eq!(shown["specification"]["writable"][0]["path"], "/data", "{shown}");
    assert_eq!(shown["specification"]["user"], Value::Null, "{shown}");
}
