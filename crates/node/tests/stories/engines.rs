//! Two engines: an image that lives in the requester's engine, and a provider whose engine goes away and comes back.
//!
//! The second engine has a data root of its own and stands in a network namespace of its own, so that it can neither
//! share images with the first nor touch its bridge.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::world::{Files, Machine, docker_try, eventually, salted};

/// An engine of this test's own. It ends, with everything in it, when it is dropped.
pub(crate) struct SecondEngine {
    directory: tempfile::TempDir,
    namespace: String,
    process: Option<Child>,
    flags: Vec<String>,
    data_root: PathBuf,
}

impl SecondEngine {
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// With these flags beside its own.
    pub(crate) fn start_with(flags: &[&str]) -> Self {
        Self::start_on(None, flags)
    }

    /// The same with its data elsewhere.
    pub(crate) fn start_on(data_root: Option<PathBuf>, flags: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // Mapped users pass through it.
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o711)).unwrap();
        let data_root = data_root.unwrap_or_else(|| directory.path().join("data"));
        let namespace = format!("peer-engine-{}", std::process::id());
        run("ip", &["netns", "add", &namespace]);
        run("ip", &["netns", "exec", &namespace, "ip", "link", "set", "lo", "up"]);
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let mut engine = Self { directory, namespace, process: None, flags, data_root };
        engine.up();
        engine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The network namespace in which it stands.
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    pub(crate) fn socket(&self) -> String {
        self.path("engine.sock").to_str().unwrap().to_owned()
    }

    fn up(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let flag = |name: &str, value: &str| format!("--{name}={}", self.path(value).display());
        // `ip netns exec` would mount a fresh /sys, in which the engine finds no control groups.
        let process = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", self.namespace))
            .args(["dockerd", "--bridge=none", "--iptables=false", "--ip6tables=false"])
            .arg(format!("--host=unix://{}", self.socket()))
            .arg(format!("--data-root={}", self.data_root.display()))
            .args([flag("exec-root", "exec"), flag("pidfile", "pid")])
            .args(&self.flags)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        self.process = Some(process);
        eventually("the second engine answers", || self.docker(&["info"]).success().then_some(()));
    }

    fn docker(&self, arguments: &[&str]) -> std::process::ExitStatus {
        let host = format!("unix://{}", self.socket());
        let mut command = Command::new("docker");
        command.args(["--host", &host]).args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().unwrap()
    }

    fn down(&mut self) {
        if let Some(mut process) = self.process.take() {
            let pid = std::fs::read_to_string(self.path("pid")).unwrap_or_default();
            drop(Command::new("kill").args(["-TERM", pid.trim()]).status());
            drop(process.wait());
        }
    }
}

impl Drop for SecondEngine {
    fn drop(&mut self) {
        self.down();
        drop(Command::new("ip").args(["netns", "delete", &self.namespace]).status());
    }
}

pub(crate) fn run(program: &str, arguments: &[&str]) {
    assert!(Command::new(program).args(arguments).status().unwrap().success(), "{program} {arguments:?}");
}

#[test]
fn alone_image_by_name_travels_from_the_requesters_engine_to_the_providers() {
    let engine = SecondEngine::start();
    let files = Files::new();
    let image = salted("hello").build().unwrap();
    let archive = files.write(&image);
    assert!(engine.docker(&["load", "--input", &archive]).success());
    assert_ne!(docker_try(&["image", "inspect", &image.id().to_string()]).status, 0, "nothing is shared");
    let bob = Machine::start("bob");
    let alice = Machine::with("alice", &["--engine-socket", &engine.socket()]);
    alice.join(&bob, &[]);
    let deployed =
        alice.json(&["deploy", "hello:test", "--peer", "bob", "--name", "named", "--expose", "8080", "--no-publish"]);
    assert_eq!(
        (deployed["state"].as_str(), deployed["image"].as_str()),
        (Some("running"), Some(&*image.id().to_string()))
    );
    assert_eq!(alice.forward("named", 8080).get("/healthz").status, 200);
    alice.try_ctl(&["deploy", "no-such-image:9", "--peer", "bob"]).refused("no_such_image", 3);
}

#[test]
fn alone_engine_that_goes_away_and_comes_back_is_brought_to_the_wanted_state() {
    let mut engine = SecondEngine::start();
    let files = Files::new();
    let archive = files.write(&salted("hello").build().unwrap());
    let bob = Machine::with("bob", &["--engine-socket", &engine.socket()]);
    let alice = Machine::without_engine("alice");
    alice.join(&bob, &[]);
    alice.deploy_to("bob", &archive, "kept", &["--expose", "8080", "--no-publish"]);
    let started = alice.json(&["inspect", "kept"])["started_at"].as_u64();
    engine.down();
    let refused = alice.try_ctl(&["deploy", &archive, "--peer", "bob", "--name", "other"]);
    assert!(refused.refused("engine_unavailable", 5).contains("bob"), "the sentence names the machine");
    engine.up();
    eventually("the deployment has been started again", || {
        let now = alice.json(&["inspect", "kept"]);
        (now["state"] == "running" && now["started_at"].as_u64() > started).then_some(())
    });
    assert_eq!(alice.forward("kept", 8080).get("/healthz").status, 200);
    alice.deploy_to("bob", &archive, "other", &[]);
    for name in ["kept", "other"] {
        alice.ctl(&["rm", "--force", name]);
    }
}
