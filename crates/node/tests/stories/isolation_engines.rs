//! Engines that keep guests further away than the usual one: mapped users, other runtimes, roots with a size.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use crate::engines::{SecondEngine, run};
use crate::world::{Files, Machine, docker, eventually, ordinary, shell};

/// An account whose range of users an engine maps containers to. It is gone when this is dropped.
struct Account;

const ACCOUNT: &str = "peer-remap-test";
/// First user of the range; no distribution gives out one so high.
const FIRST: u32 = 1_200_000_000;
const RANGES: [&str; 2] = ["/etc/subuid", "/etc/subgid"];

impl Account {
    fn add() -> Self {
        Self::remove();
        run("useradd", &["--system", "--no-create-home", "--user-group", ACCOUNT]);
        for path in RANGES {
            let others = others(path);
            std::fs::write(path, format!("{others}{ACCOUNT}:{FIRST}:65536\n")).unwrap();
        }
        Self
    }

    fn remove() {
        drop(Command::new("userdel").arg(ACCOUNT).output());
        for path in RANGES {
            drop(std::fs::write(path, others(path)));
        }
    }
}

fn others(path: &str) -> String {
    let lines = std::fs::read_to_string(path).unwrap_or_default();
    lines.split_inclusive('\n').filter(|line| !line.starts_with(ACCOUNT)).collect()
}

impl Drop for Account {
    fn drop(&mut self) {
        Self::remove();
    }
}

/// The only container of a second engine, as that engine reports it.
fn inspected(engine: &SecondEngine) -> Value {
    let host = format!("unix://{}", engine.socket());
    let id = docker(&["--host", &host, "ps", "--quiet", "--latest"]);
    serde_json::from_str::<Value>(&docker(&["--host", &host, "inspect", id.trim()])).unwrap()[0].clone()
}

/// What a deployment has printed once it has said that it is done.
fn said(alice: &Machine, name: &str) -> String {
    eventually("the script is done", || {
        let output = alice.try_ctl(&["logs", name]);
        output.stdout.contains("done\n").then_some(output.stdout)
    })
}

#[test]
fn alone_v4_mapped_users_and_runtimes_are_used_where_the_engine_has_them() {
    let _account = Account::add();
    let files = Files::new();
    // Each begins the engine's usual runtime, and leaves a line behind that it was called.
    let called = files.path("called").display().to_string();
    let [crun, strong] = ["crun", "strong"].map(|name| {
        let path =
            files.bytes(name, format!("#!/bin/sh\necho {name} \"$@\" >> {called}\nexec runc \"$@\"\n").as_bytes());
        std::fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        format!("--add-runtime={name}={path}")
    });
    let engine = SecondEngine::start_with(&[&format!("--userns-remap={ACCOUNT}"), &crun, &strong]);
    let bob = Machine::with("bob", &["--engine-socket", &engine.socket()]);
    let alice = Machine::without_engine("alice");
    alice.join(&bob, &["--root", "--cap", "chown,setuid,setgid"]);
    let script = "cat /proc/self/uid_map; /bin/busybox id; echo x > /tmp/x && echo x > /data/x && echo written; \
        /bin/busybox chown 7:7 /data/x && echo given; echo done; sleep 600";
    let archive = files.write(&shell(script));
    let common = ["--cpu", "0.2", "--writable", "/data=1m", "--require-userns"];
    let root = [&common[..], &["--user", "root", "--cap", "chown", "--runtime", "crun"]].concat();
    alice.deploy_to("bob", &archive, "root", &root);
    let text = said(&alice, "root");
    for part in [&FIRST.to_string(), "uid=0", "written", "given"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let report = inspected(&engine);
    assert_eq!((&report["HostConfig"]["UsernsMode"], &report["HostConfig"]["Runtime"]), (&json!(""), &json!("crun")));
    let status = std::fs::read_to_string(format!("/proc/{}/status", report["State"]["Pid"])).unwrap();
    assert!(status.contains(&format!("Uid:\t{FIRST}\t{FIRST}")), "root of the container is nobody here: {status}");
    assert!(std::fs::read_to_string(&called).unwrap().contains("crun "));
    alice.ctl(&["rm", "--force", "root"]);
    alice.deploy_to("bob", &archive, "private", &common);
    let text = said(&alice, "private");
    assert!(text.contains("written") && !text.contains("given") && text.contains("uid=2"), "{text}");
    let shown = alice.json(&["status", "private"]);
    assert_eq!(shown["isolation"]["user_namespace"], true, "{shown}");
    alice.ctl(&["rm", "--force", "private"]);
    // An ordinary image that becomes its worker runs there as well.
    let remedy = ["--user", "root", "--cap", "chown,setgid,setuid", "--expose", "8080", "--no-publish"];
    alice.deploy_to("bob", &files.write(&ordinary()), "site", &remedy);
    eventually("it serves", || Some(alice.forward("site", 8080).get("/")).filter(|answer| answer.status == 200));
    alice.ctl(&["rm", "--force", "site"]);
    drop(bob);
    // An owner who wants one runtime for all containers gets it, and nobody talks him out of it.
    let carol = Machine::with("carol", &["--engine-socket", &engine.socket(), "--runtime", "strong"]);
    alice.join(&carol, &[]);
    let refused = alice.try_ctl(&["deploy", &archive, "--peer", "carol", "--name", "other", "--runtime", "crun"]);
    assert!(refused.refused("isolation_lacking", 4).contains("'strong'"));
    alice.deploy_to("carol", &archive, "plain", &["--cpu", "0.2"]);
    assert_eq!(inspected(&engine)["HostConfig"]["Runtime"], "strong");
    assert!(std::fs::read_to_string(&called).unwrap().contains("strong "));
    alice.ctl(&["rm", "--force", "plain"]);
}

/// A disk of its own for an engine's data.
struct Disk {
    directory: tempfile::TempDir,
}

impl Disk {
    fn btrfs() -> Self {
        let disk = Self { directory: tempfile::tempdir().unwrap() };
        let file = disk.directory.path().join("disk");
        std::fs::File::create(&file).unwrap().set_len(1 << 30).unwrap();
        std::fs::create_dir(disk.root()).unwrap();
        let (file, root) = (file.display().to_string(), disk.root().display().to_string());
        run("mkfs.btrfs", &["--quiet", &file]);
        run("mount", &["-o", "loop", &file, &root]);
        disk
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg(self.root()).status());
    }
}

#[test]
fn alone_v5_a_writable_root_ends_at_its_size() {
    let disk = Disk::btrfs();
    let engine = SecondEngine::start_on(Some(disk.root().join("data")), &["--storage-driver=btrfs"]);
    let bob = Machine::with("bob", &["--engine-socket", &engine.socket()]);
    let alice = Machine::without_engine("alice");
    alice.join(&bob, &["--root", "--cap", "dac-override", "--writable-root", "40m"]);
    let files = Files::new();
    let script = "echo x > /etc/file && echo written; \
        /bin/busybox dd if=/dev/zero of=/fill bs=1048576 count=200 2>&1; /bin/busybox wc -c /fill; echo done; sleep 600";
    let archive = files.write(&shell(script));
    let deploy = |size: &str| {
        let flags = ["--user", "root", "--cap", "dac-override", "--cpu", "0.5", "--writable-root", size];
        alice.try_ctl(&[&["deploy", &archive, "--peer", "bob", "--name", "filler"], &flags[..]].concat())
    };
    assert!(deploy("41m").refused("over_limit", 4).contains("--writable-root 41m"));
    let deployed = deploy("40m");
    assert_eq!(deployed.status, 0, "{deployed:?}");
    let text = said(&alice, "filler");
    assert!(text.contains("written") && text.contains("quota exceeded"), "{text}");
    let written = text.lines().find_map(|line| line.strip_suffix(" /fill")?.trim().parse::<u64>().ok()).unwrap();
    assert!(written < 40 << 20, "{written}");
    assert_eq!(inspected(&engine)["HostConfig"]["StorageOpt"], json!({ "size": (40_u64 << 20).to_string() }));
    alice.ctl(&["rm", "--force", "filler"]);
    // The control: the same filler in a plain container of the same engine passes that size.
    let host = format!("unix://{}", engine.socket());
    let loaded = docker(&["--host", &host, "load", "--input", &archive]);
    let image = loaded.trim().rsplit(' ').next().unwrap();
    let fill = "/bin/busybox dd if=/dev/zero of=/fill bs=1048576 count=60 2>/dev/null; /bin/busybox wc -c /fill";
    let plain = docker(&["--host", &host, "run", "--rm", "--network", "none", image, "/bin/sh", "-c", fill]);
    assert!(plain.contains(&(60_u64 << 20).to_string()), "{plain}");
}
