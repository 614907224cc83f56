//! What bad input gets: a sentence that names the field, a stable code, an exit status, and nothing changed.

use std::os::unix::net::UnixListener;
use std::process::Command;

use xtask::image::{Image, Layer};

use crate::world::{Machine, Output, Pair, docker_try, eventually, hello, noise, salted, shell};

/// Asserts that bob has nothing of anybody's.
fn assert_nothing_there(bob: &Machine) {
    assert_eq!(bob.json(&["ps", "--hosted", "--all"])["deployments"], serde_json::json!([]));
    assert!(bob.containers().is_empty());
}

#[test]
fn bad_flags_name_the_field_and_change_nothing() {
    let pair = Pair::start();
    let archive = pair.files.write(&hello());
    let before = pair.bob.audit().len();
    for (flags, field) in [
        (&["--expose", "0"][..], "--expose"),
        (&["--expose", "70000"], "--expose"),
        (&["--expose", "-1"], "--expose"),
        (&["--expose", "80a"], "--expose"),
        (&["--cpu", "0"], "--cpu"),
        (&["--cpu", "-1"], "--cpu"),
        (&["--cpu", "1e9"], "--cpu"),
        (&["--cpu", "99999"], "--cpu"),
        (&["--cpu", "NaN"], "--cpu"),
        (&["--memory", "0"], "--memory"),
        (&["--memory", "-1g"], "--memory"),
        (&["--memory", "99999999999999999999g"], "--memory"),
        (&["--memory", "1m"], "memory"),
        (&["--pids", "0"], "pids"),
        (&["--pids", "-5"], "--pids"),
        (&["--files", "4294967296"], "--files"),
        (&["--scratch", "10g"], "scratch"),
        (&["-e", "NOVALUE"], "environment"),
        (&["-e", "=x"], "environment"),
        (&["-e", "1A=x"], "environment"),
        (&["--env-file", "/nonexistent"], "/nonexistent"),
        (&["--name", "Web!"], "--name"),
        (&["--name", ""], "--name"),
        (&["--restart", "sometimes"], "--restart"),
        (&["--restart", "on-failure:-1"], "--restart"),
        (&["--timeout", "0"], "--timeout"),
        (&["--stop-timeout", "301s"], "stop timeout"),
        (&["--health-path", "/"], "--expose"),
        (&["--no-publish"], "--expose"),
        (&["--expose", "80", "--health-path", "x"], "health check path"),
    ] {
        let output = pair.alice.try_ctl(&[&["deploy", &archive, "--peer", "bob"], flags].concat());
        assert!(output.stderr.contains(field), "{flags:?}: {output:?}");
        let expected = if flags[0] == "--env-file" { ("file_failed", 1) } else { ("invalid_argument", 2) };
        assert_eq!((output.code(), output.status), expected, "{flags:?}: {output:?}");
    }
    assert_nothing_there(&pair.bob);
    assert_eq!(pair.bob.audit().len(), before, "none of it left alice's machine");
}

#[test]
fn unknown_peers_deployments_and_images_are_named() {
    let pair = Pair::start();
    let archive = pair.files.write(&hello());
    let try_ctl = |arguments: &[&str]| pair.alice.try_ctl(arguments);
    assert!(try_ctl(&["deploy", &archive, "--peer", "nobody"]).refused("unknown_peer", 3).contains("nobody"));
    assert!(try_ctl(&["stop", "nothing"]).refused("no_such_deployment", 3).contains("nothing"));
    let missing = try_ctl(&["deploy", "/nonexistent.tar", "--peer", "bob"]);
    assert!(missing.status != 0 && missing.stderr.contains("/nonexistent.tar"), "{missing:?}");
    let text = pair.files.bytes("text.tar", b"this is no archive");
    let sentence = try_ctl(&["deploy", &text, "--peer", "bob"]).refused("invalid_image", 2);
    assert!(sentence.contains("text.tar") && sentence.contains("it is not a tar file"), "{sentence}");
    let empty = pair.files.bytes("empty.tar", &[0; 1024]);
    assert!(try_ctl(&["deploy", &empty, "--peer", "bob"]).refused("invalid_image", 2).contains("it is empty"));
    try_ctl(&["deploy", "Not An Image", "--peer", "bob"]).refused("invalid_argument", 2);
    // Alice has no engine that could know the name.
    let output = try_ctl(&["deploy", "hello:1", "--peer", "bob"]);
    assert!(output.status != 0 && !output.code().is_empty(), "{output:?}");
    let error = try_ctl(&["--json", "deploy", &text, "--peer", "bob"]);
    assert_eq!(error.json()["error"]["code"], "invalid_image");
    assert_nothing_there(&pair.bob);
}

/// A tar with one entry, whose header can be anything.
fn entry(path: &str, kind: tar::EntryType, link: &str) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
    header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o666);
    header.set_size(0);
    header.set_device_major(8).unwrap();
    header.set_device_minor(0).unwrap();
    header.set_cksum();
    let mut tar = header.as_bytes().to_vec();
    tar.resize(tar.len() + 1024, 0);
    tar
}

#[test]
fn v4_hostile_layers_are_refused() {
    let pair = Pair::start();
    let mut truncated = entry("file", tar::EntryType::Regular, "");
    truncated[124..135].copy_from_slice(b"77777777777");
    let hostile = [
        ("device", entry("dev/sda", tar::EntryType::Block, "")),
        ("character", entry("dev/mem", tar::EntryType::Char, "")),
        ("parent", entry("../../etc/cron.d/x", tar::EntryType::Regular, "")),
        ("inside", entry("a/../../x", tar::EntryType::Regular, "")),
        ("hardlink", entry("link", tar::EntryType::Link, "../../../etc/shadow")),
        ("truncated", truncated),
        ("garbage", noise(4096)),
    ];
    for (name, tar) in hostile {
        let image = salted("hello").layer(Layer::raw(tar)).build().unwrap();
        let archive = pair.files.write(&image);
        let output = pair.alice.try_ctl(&["deploy", &archive, "--peer", "bob", "--name", name]);
        assert_eq!((output.code(), output.status), ("invalid_image", 2), "{name}: {output:?}");
        assert!(docker_try(&["image", "inspect", &image.id().to_string()]).status != 0, "{name} is in the engine");
    }
    eventually("nothing of it runs", || pair.bob.containers().is_empty().then_some(()));
}

#[test]
fn v4_a_layer_that_the_engine_cannot_unpack_leaves_nothing() {
    let pair = Pair::start();
    let image = salted("hello").layer(Layer::raw(entry("link", tar::EntryType::Link, "nothing"))).build().unwrap();
    let archive = pair.files.write(&image);
    // Each try is the same: it is neither taken for a lost layer, nor kept, nor counted as an image.
    for name in ["one", "two"] {
        pair.alice.try_ctl(&["deploy", &archive, "--peer", "bob", "--name", name]).refused("invalid_image", 2);
        let spool = walk(&pair.bob.data().join("spool"));
        assert_eq!(spool, Vec::<std::path::PathBuf>::new());
        assert_eq!(pair.bob.json(&["images"]), serde_json::json!([]));
    }
    pair.alice.deploy_to("bob", &pair.files.write(&hello()), "good", &[]);
}

/// The files under a directory.
fn walk(path: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(path).unwrap().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[test]
fn v5_deployments_at_rest_are_bounded() {
    let pair = Pair::granted(&["--max-containers", "1"]);
    let archive = pair.files.write(&shell("exit 0"));
    let deploy = |name: &str| pair.alice.try_ctl(&["deploy", &archive, "--peer", "bob", "--name", name]);
    for n in 0..8 {
        let name = format!("web{n}");
        deploy(&name).success();
        pair.alice.wait_for_state(&name, "stopped");
    }
    let sentence = deploy("more").refused("over_limit", 4);
    assert!(sentence.contains("peerctl rm"), "{sentence}");
    assert!(pair.bob.has_audited("V5"));
    pair.alice.ctl(&["rm", "web0"]);
    deploy("more").success();
}

#[test]
fn v2_wrong_and_missing_layers_are_refused() {
    let pair = Pair::start();
    let deploy = |image: &Image, name: &str| {
        pair.alice.try_ctl(&["deploy", &pair.files.write(image), "--peer", "bob", "--name", name])
    };
    let mut wrong = hello();
    wrong.layers.last_mut().unwrap().1 = Layer::new().file("/other", b"other", 0o644).into_bytes();
    let output = deploy(&wrong, "wrong");
    assert!(["digest_mismatch", "invalid_image"].contains(&output.code()) && output.status != 0, "{output:?}");
    let mut missing = hello();
    missing.layers.pop();
    let output = deploy(&missing, "missing");
    assert!(["missing_layer", "invalid_image"].contains(&output.code()) && output.status != 0, "{output:?}");
    let mut foreign = hello();
    foreign.config = String::from_utf8(foreign.config).unwrap().replace("\"amd64\"", "\"s390x\"").into_bytes();
    assert!(deploy(&foreign, "foreign").refused("invalid_image", 2).contains("s390x"));
    eventually("nothing holds a share", || {
        pair.alice.json(&["ps"]).to_string().contains("fetching").then_some(()).xor(Some(()))
    });
    assert!(pair.bob.containers().is_empty());
}

/// The layer's tar, as the builder makes it.
trait IntoBytes {
    fn into_bytes(self) -> Vec<u8>;
}

impl IntoBytes for Layer {
    fn into_bytes(self) -> Vec<u8> {
        xtask::image::Builder::new("x").layer(self).build().unwrap().layers.remove(0).1
    }
}

#[test]
fn v5_two_deployments_racing_for_the_last_place_do_not_both_get_it() {
    let pair = Pair::granted(&["--max-cpu", "1", "--max-memory", "1g", "--max-containers", "1"]);
    for round in 0..3 {
        let archives = [0, 1].map(|_| pair.files.write(&hello()));
        let names = ["one", "two"].map(|name| format!("{name}{round}"));
        let racing = [0, 1].map(|i| {
            let arguments = ["deploy", &archives[i], "--peer", "bob", "--name", &names[i], "--cpu", "0.2"];
            pair.alice.begin(&arguments)
        });
        let outputs = racing.map(crate::world::Running::end);
        let mut codes = outputs.each_ref().map(Output::code);
        codes.sort_unstable();
        assert_eq!(codes, ["", "over_limit"], "{outputs:?}");
        assert_eq!(pair.bob.containers_with(&[]).len(), 1);
        for name in &names {
            pair.alice.try_ctl(&["rm", "--force", name]);
        }
    }
}

#[test]
fn v5_what_the_machine_offers_is_shared_by_all_peers() {
    let alice = Machine::without_engine("alice");
    let bob = Machine::with("bob", &["--offer-memory", "300m", "--offer-cpu", "1"]);
    alice.join(&bob, &["--max-memory", "4g", "--max-cpu", "4"]);
    let carol = Machine::without_engine("carol");
    carol.join(&bob, &["--max-memory", "4g", "--max-cpu", "4"]);
    let files = crate::world::Files::new();
    let flags = ["--cpu", "0.2", "--memory", "200m"];
    alice.deploy_to("bob", &files.write(&hello()), "first", &flags);
    let archive = files.write(&hello());
    let output = carol.try_ctl(&[&["deploy", &archive, "--peer", "bob", "--name", "second"], &flags[..]].concat());
    let sentence = output.refused("no_capacity", 6);
    assert!(sentence.contains("memory"), "{sentence}");
    assert_eq!(bob.json(&["ps", "--hosted"])["deployments"].as_array().unwrap().len(), 1);
}

#[test]
fn an_engine_that_is_down_is_named() {
    let alice = Machine::without_engine("alice");
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("docker.sock");
    let bob = Machine::with("bob", &["--engine-socket", socket.to_str().unwrap()]);
    alice.join(&bob, &[]);
    let doctor = bob.try_ctl(&["doctor", "--json"]);
    assert_eq!(doctor.status, 1, "{doctor:?}");
    assert!(doctor.json().to_string().contains(socket.to_str().unwrap()), "{doctor:?}");
    assert_eq!(bob.json(&["status"])["engine"]["available"], false);
    let archive = crate::world::Files::new();
    let path = archive.write(&hello());
    let output = alice.try_ctl(&["deploy", &path, "--peer", "bob", "--timeout", "3s"]);
    assert!(["engine_unavailable", "timeout"].contains(&output.code()) && output.status == 5, "{output:?}");
    assert!(output.stderr.contains("engine"), "{output:?}");
    // One that accepts connections and never answers is no better.
    let silent = UnixListener::bind(&socket).unwrap();
    let output = alice.try_ctl(&["deploy", &path, "--peer", "bob", "--name", "other", "--timeout", "3s"]);
    assert!(output.status == 5, "{output:?}");
    drop(silent);
    assert_eq!(bob.json(&["status"])["engine"]["available"], false);
}

/// A small disk, for as long as this lives.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(path: std::path::PathBuf) -> Self {
        std::fs::create_dir_all(&path).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=6m,mode=0700", "tmpfs"]).arg(&path);
        Output::of(&mut mount).success();
        Self(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("--lazy").arg(&self.0).status());
    }
}

#[test]
fn a_full_disk_is_told_and_harms_nobody() {
    let alice = Machine::without_engine("alice");
    let mut bob = Machine::prepared("bob", &[]);
    let _disk = SmallDisk::mount(bob.data().join("spool"));
    Command::new("chmod").arg("700").arg(bob.data()).status().unwrap();
    bob.up();
    bob.init();
    alice.join(&bob, &[]);
    let files = crate::world::Files::new();
    let image = salted("hello").layer(Layer::new().file("/large", &noise(16 << 20), 0o644)).build().unwrap();
    let output = alice.try_ctl(&["deploy", &files.write(&image), "--peer", "bob", "--name", "large"]);
    assert!(output.refused("disk_full", 1).contains("bob"));
    alice.try_ctl(&["rm", "--force", "large"]);
    assert_nothing_there(&bob);
    assert!(bob.json(&["audit", "verify"])["fault"].is_null());
    alice.deploy_to("bob", &files.write(&hello()), "small", &[]);
}

#[test]
fn bad_daemon_settings_are_told_all_at_once() {
    let flags = ["--offer-cpu=-1", "--max-connections", "0", "--engine", "podman", "--announce", "nowhere"];
    let output = Machine::prepared("bob", &flags).launch().end();
    assert_eq!(output.status, 2, "{output:?}");
    for key in ["offer_cpu", "max_connections", "engine", "announce"] {
        assert!(output.stderr.contains(key), "{key}: {output:?}");
    }
}
