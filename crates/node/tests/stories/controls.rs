//! The attacks of the other files where the protection is off: the same engine without our profile and without our checks.
//! They succeed, so that the attack tests attack something. What they take has an upper end.

use std::net::TcpListener;

use serde_json::Value;
use xtask::image::Layer;

use crate::world::{Files, Loaded, docker, docker_try, eventually, hello, probe, salt, salted, shell};

/// A container of the engine's own making, removed at the end.
struct Plain(String);

impl Plain {
    /// Runs an image with these flags of `docker run`.
    fn run(image: &Loaded, flags: &[&str]) -> Self {
        let name = format!("peer-plain-{}", salt());
        docker(&[&["run", "--detach", "--name", &name], flags, &[&image.name]].concat());
        Self(name)
    }

    /// The lines that the probe in it has printed.
    fn report(&self) -> Vec<Value> {
        let logs = docker_try(&["logs", &self.0]);
        logs.stdout.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// What the probe in it says of one attempt.
    fn attempt(&self, probe: &str) -> Value {
        eventually(probe, || self.report().into_iter().find(|line| line["probe"] == probe))
    }

    fn address(&self) -> String {
        let format = "{{.NetworkSettings.IPAddress}}";
        docker(&["inspect", "--format", format, &self.0]).trim().to_owned()
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        docker_try(&["rm", "--force", "--volumes", &self.0]);
    }
}

/// Beside `stories/images::v2_a_layer_cannot_be_claimed_by_its_digest`: whoever may load images into the engine needs to know
/// no more of a layer than its digest.
#[test]
fn control_g1_the_engine_alone_gives_a_layer_to_whoever_names_its_digest() {
    let files = Files::new();
    let secret = salt();
    let builder = salted("hello").layer(Layer::new().file("/secret", secret.as_bytes(), 0o644));
    let private = builder.build().unwrap();
    let _private = Loaded::load(&private, &files);
    // The configuration and the names of the layers, and none of their bytes.
    let stranger = files.path("stranger.tar");
    let name = format!("peer-stranger-{}:1", salt());
    let mut archive = tar::Builder::new(Vec::new());
    let layers: Vec<String> = private.layers.iter().map(|(digest, _)| format!("{}/layer.tar", digest.hex())).collect();
    let mut configuration: Value = serde_json::from_slice(&private.config).unwrap();
    configuration["config"]["Labels"] = serde_json::json!({ "of": "a stranger" });
    let configuration = serde_json::to_vec(&configuration).unwrap();
    let manifest = serde_json::json!([{ "Config": "config.json", "RepoTags": [name], "Layers": layers }]);
    for (path, bytes) in [("config.json", configuration), ("manifest.json", serde_json::to_vec(&manifest).unwrap())] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        archive.append_data(&mut header, path, bytes.as_slice()).unwrap();
    }
    std::fs::write(&stranger, archive.into_inner().unwrap()).unwrap();
    docker(&["load", "--input", stranger.to_str().unwrap()]);
    let container = docker(&["create", &name]).trim().to_owned();
    let copied = files.path("copied");
    docker(&["cp", &format!("{container}:/secret"), copied.to_str().unwrap()]);
    docker(&["rm", &container]);
    docker(&["rmi", "--force", &name]);
    assert_eq!(std::fs::read_to_string(copied).unwrap(), secret);
}

/// Beside `compute::image::spool::g2_layer_with_wrong_digest_is_deleted`: bytes that nobody compares with a digest are run as
/// they arrive.
#[test]
fn control_g2_the_engine_alone_runs_bytes_that_were_changed_on_the_way() {
    let files = Files::new();
    let image = shell("cat /message");
    let (_, sound) = image.layers.first().unwrap();
    let mut layer = tar::Builder::new(sound.clone());
    let end = layer.get_mut().len() - 1024;
    layer.get_mut().truncate(end);
    let message = b"the sender's words";
    let mut header = tar::Header::new_gnu();
    header.set_size(message.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    layer.append_data(&mut header, "message", message.as_slice()).unwrap();
    let mut bytes = layer.into_inner().unwrap();
    let place = bytes.windows(message.len()).position(|window| window == message).unwrap();
    bytes[place..place + message.len()].copy_from_slice(b"the attacker's wor");
    let archive = files.bytes("changed.tar", &bytes);
    let name = format!("peer-changed-{}:1", salt());
    docker(&["import", &archive, &name]);
    let said = docker(&["run", "--rm", "--network=none", &name, "/bin/cat", "/message"]);
    docker(&["rmi", "--force", &name]);
    assert_eq!(said, "the attacker's wor");
}

/// Beside `stories/isolation::v4_v4n_a_guest_reaches_nothing_outside_its_container`: the same probe, the same targets.
#[test]
fn control_g5_v4_v4n_a_plain_container_reaches_its_neighbour_and_the_host() {
    let files = Files::new();
    let service = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = service.local_addr().unwrap().port();
    let neighbour_image = Loaded::load(&hello(), &files);
    let neighbour = Plain::run(&neighbour_image, &[]);
    let gateway = docker(&["network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}"]);
    let targets = [format!("{}:8080", neighbour.address()), format!("{}:{port}", gateway.trim())];
    let image = Loaded::load(&probe(), &files);
    let variable = format!("PROBE_TARGETS={}", targets.join(","));
    let plain = Plain::run(&image, &["--env", &variable]);
    for target in &targets {
        assert_eq!(plain.attempt(&format!("connect {target}"))["succeeded"], true, "{target}");
    }
    for attempt in ["write /probe-write", "socket_raw", "become_root", "mknod_character", "chroot"] {
        assert_eq!(plain.attempt(attempt)["succeeded"], true, "{attempt}");
    }
    assert_ne!(plain.attempt("status_CapEff")["detail"], "0000000000000000");
    assert_eq!(plain.attempt("status_NoNewPrivs")["detail"], "0");
}

/// Beside `stories/isolation::i1_i2_the_engine_confirms_the_whole_profile`: the engine gives what it is asked for. These are the
/// parts of `--privileged`, which an engine that lacks a capability itself cannot give whole.
#[test]
fn control_i1_i2_a_container_with_the_hosts_rights_and_files_has_the_host() {
    let files = Files::new();
    let secret = salt();
    let path = files.bytes("secret", secret.as_bytes());
    let bind = format!("{}:/host", std::path::Path::new(&path).parent().unwrap().display());
    let image = Loaded::load(&shell("cat /host/secret; echo x > /host/written"), &files);
    let said = docker(&["run", "--rm", "--network=none", "--volume", &bind, &image.name]);
    assert_eq!(said, secret);
    assert!(files.path("written").exists(), "it wrote to the host");

    let image = Loaded::load(&probe(), &files);
    let rights = ["--cap-add=SYS_ADMIN", "--cap-add=SYS_PTRACE", "--pid=host", "--network=host"];
    let unfiltered = ["--security-opt=seccomp=unconfined", "--security-opt=apparmor=unconfined", "--env=PORT=0"];
    let plain = Plain::run(&image, &[&rights[..], &unfiltered].concat());
    for attempt in ["mount_tmpfs", "unshare_mount", "unshare_network", "socket_raw"] {
        assert_eq!(plain.attempt(attempt)["succeeded"], true, "{attempt}");
    }
    let processes = plain.attempt("processes")["detail"].to_string();
    assert!(processes.contains("dockerd") || processes.contains("containerd"), "it sees the host's: {processes}");
}

/// Beside the `v5_` tests of `stories/isolation`: without limits each of the floods passes the bound that holds there.
#[test]
fn control_v5_a_plain_container_passes_every_bound() {
    let files = Files::new();
    let image = Loaded::load(&probe(), &files);
    let mode = |mode: &str, flags: &[&str]| {
        let variable = format!("PROBE_MODE={mode}");
        Plain::run(&image, &[&["--env", &variable, "--env", "PROBE_SECONDS=3", "--network=none"], flags].concat())
    };
    // The engine's own bound, far above ours, keeps the machine that runs this usable.
    let forks = mode("forks", &["--pids-limit", "400"]);
    assert!(forks.attempt("forks")["detail"]["started"].as_u64().unwrap() > 300);
    drop(forks);
    let disk = mode("disk", &[]);
    let filled = disk.attempt("disk /");
    assert!(filled["succeeded"] == true && filled["detail"]["bytes"].as_u64().unwrap() > 64 << 20, "{filled}");
    let size = docker(&["inspect", "--size", "--format", "{{.SizeRw}}", &disk.0]);
    assert!(size.trim().parse::<u64>().unwrap() > 64 << 20, "it is on the host's disk: {size}");
    drop(disk);
    let memory = mode("memory", &["--memory", "512m"]);
    let took = eventually("it has taken memory", || {
        let lines = memory.report();
        lines.iter().filter_map(|line| line["mebibytes"].as_u64()).max().filter(|taken| *taken > 128)
    });
    assert!(took > 128);
    drop(memory);
    let flood = mode("flood", &[]);
    let log = docker(&["inspect", "--format", "{{.LogPath}}", &flood.0]);
    eventually("the log has grown beyond two files of a mebibyte", || {
        let length = std::fs::metadata(log.trim()).map_or(0, |metadata| metadata.len());
        (length > 4 << 20).then_some(())
    });
}
