//! One guest floods whatever it can; another guest, the daemon and the host's disk do not feel it (V5, G6).

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::world::{Answer, Forward, Pair, docker_try, eventually, probe};

/// Requests of one measurement; the 99th percentile is the third slowest.
const REQUESTS: usize = 250;
/// A quiet 99th percentile below this is taken as this: shorter times are those of the machine's scheduler.
const QUIET_FLOOR: Duration = Duration::from_millis(20);
/// Longest answer of the daemon's local interface.
const DAEMON_MAX: Duration = Duration::from_millis(500);
/// Measurements of one flood; others use the machine as well, and a flood that harms does so each time.
const TRIES: u32 = 6;
/// What the host's disk may gain by one guest: two log files of 1 MiB, one being turned over, and the engine's own notes.
const DISK_MAX: u64 = 4 << 20;

/// The 99th percentile of the neighbour's answers.
fn neighbour(forward: &Forward) -> Duration {
    let mut times: Vec<Duration> = (0..REQUESTS)
        .map(|_| {
            let start = Instant::now();
            assert_eq!(forward.get("/healthz").status, 200);
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[REQUESTS * 99 / 100]
}

/// The slowest of some answers of the local interface, each of which reads the database and the running node.
fn daemon(socket: &Path) -> Duration {
    let ask = |path: &str| {
        let start = Instant::now();
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
        let head = format!(
            "GET {path} HTTP/1.1\r\nHost: peerd\r\n{}: 1\r\nConnection: close\r\n\r\n",
            peer_proto::control::REQUIRED_HEADER
        );
        stream.write_all(head.as_bytes()).unwrap();
        let answer = Answer::read_head(&mut stream);
        drop(stream.read_to_end(&mut Vec::new()));
        assert_eq!(answer.status, 200, "{path}");
        start.elapsed()
    };
    let paths = ["/v1/peers", "/v1/audit?limit=50", "/v1/status", "/v1/deployments?hosted=true"];
    (0..5).flat_map(|_| paths).map(ask).max().unwrap()
}

/// What a container has on the host's disk: its writable layer, its log, and the engine's notes of it (bytes).
fn on_disk(container: &str) -> u64 {
    let inspected = docker_try(&["inspect", container]);
    // One that was ended and removed has nothing.
    let Ok(inspected) = serde_json::from_str::<Value>(&inspected.stdout) else { return 0 };
    if inspected[0]["LogPath"].as_str().is_none_or(str::is_empty) {
        return 0;
    }
    let directory = Path::new(inspected[0]["LogPath"].as_str().unwrap()).parent().unwrap().to_owned();
    let upper = inspected[0]["GraphDriver"]["Data"]["UpperDir"].as_str().unwrap_or_default().to_owned();
    size_of(&directory) + size_of(Path::new(&upper))
}

fn size_of(path: &Path) -> u64 {
    let Ok(metadata) = path.symlink_metadata() else { return 0 };
    // The engine's own mounts in there are memory.
    if path.ends_with("mounts") {
        return 0;
    }
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    let below: u64 = if metadata.is_dir() { entries.map(|entry| size_of(&entry.path())).sum() } else { 0 };
    below + std::os::unix::fs::MetadataExt::blocks(&metadata) * 512
}

#[test]
fn alone_v5_g6_no_flood_of_one_guest_harms_another_or_the_host() {
    let pair = Pair::granted(&["--max-cpu", "2", "--max-memory", "1g", "--max-containers", "4"]);
    pair.hello("neighbour", &["--expose", "8080", "--no-publish", "--cpu", "0.5", "--memory", "64m"]);
    let forward = pair.alice.forward("neighbour", 8080);
    let neighbours = pair.bob.containers();
    let archive = pair.files.write(&probe());
    for flood in ["forks", "memory", "cpu", "files", "disk", "flood", "connections"] {
        let before = size_of(&pair.bob.data());
        let mode = format!("PROBE_MODE={flood}");
        let limits = ["--cpu", "0.5", "--memory", "96m", "--pids", "64", "--scratch", "16m", "--restart", "always"];
        let flags = ["--peer", "bob", "--name", flood, "-e", &mode, "-e", "PROBE_SECONDS=600", "--detach"];
        let mut measured = Vec::new();
        let held = (0..TRIES).any(|_| {
            let quiet = neighbour(&forward).max(QUIET_FLOOR);
            pair.alice.ctl(&[&["deploy", &archive], &flags[..], &limits].concat());
            let container = eventually("the flood has begun", || {
                let found = pair.bob.containers().into_iter().find(|one| !neighbours.contains(one))?;
                let logs = docker_try(&["logs", "--tail", "200", &found]).stdout;
                (logs.contains("\"probe\"") || logs.contains("yyyy")).then_some(found)
            });
            let (flooded, answered) = (neighbour(&forward), daemon(&pair.bob.socket()));
            let disk = on_disk(&container);
            assert!(disk <= DISK_MAX, "{flood}: {disk} bytes on the host's disk");
            pair.alice.ctl(&["rm", "--force", flood]);
            eventually("it is gone", || (pair.bob.containers() == neighbours).then_some(()));
            measured.push((quiet, flooded, answered));
            flooded < 2 * quiet && answered < DAEMON_MAX
        });
        eprintln!("{flood}: (quiet p99, flooded p99, slowest answer of the daemon) {measured:?}");
        assert!(held, "{flood}: (quiet p99, flooded p99, slowest answer of the daemon) {measured:?}");
        let grown = size_of(&pair.bob.data()).saturating_sub(before);
        assert!(grown <= DISK_MAX, "{flood}: the data directory grew by {grown} bytes");
    }
    assert_eq!(forward.get("/healthz").status, 200);
    assert!(pair.bob.containers() == neighbours, "nothing is left of the flooders");
}
