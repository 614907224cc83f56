//! The attacks that take too much: processes, memory, disk, processor time, log lines.

use std::{
    collections::BTreeSet,
    fs::{self, OpenOptions},
    hint,
    io::Write,
    net::{Ipv4Addr, TcpListener, TcpStream},
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{Report, print, setting};

/// The mode of the processes that `forks` starts: they only stay.
pub(crate) const CHILD_MODE: &str = "child";

const MAX_FORKS: usize = 2_000;
const MAX_MEMORY_BLOCKS: usize = 8 * 1024;
const MAX_DISK_BYTES: u64 = 256 << 20;
const MAX_DISK_FILES: u64 = 20_000;
const MAX_OPEN: usize = 20_000;
const BLOCK: usize = 1 << 20;

/// Starts processes until the system refuses, then keeps what it has and goes on trying for a while.
pub(crate) fn forks(report: &Report) {
    let mut children: Vec<Child> = Vec::new();
    let (mut refused, mut last) = (0_u32, String::new());
    while children.len() < MAX_FORKS && refused < 1_000 {
        match Command::new("/proc/self/exe").env("PROBE_MODE", CHILD_MODE).spawn() {
            Ok(child) => children.push(child),
            Err(error) => {
                refused += 1;
                last = error.to_string();
            }
        }
    }
    let detail = json!({ "started": children.len(), "refused": refused, "error": last });
    report.record("forks", refused == 0, &detail);
    let hold = Duration::from_secs(setting("PROBE_SECONDS", 60));
    thread::sleep(hold);
    for mut child in children {
        drop(child.kill());
        drop(child.wait());
    }
}

/// Takes memory and touches it until it is killed or has 8 GiB.
pub(crate) fn memory(report: &Report) {
    let mut held: Vec<Vec<u8>> = Vec::new();
    while held.len() < MAX_MEMORY_BLOCKS {
        let mut block = Vec::new();
        if let Err(error) = block.try_reserve_exact(BLOCK) {
            return report.attempt("memory", Err::<Value, _>(format!("refused after {} MiB: {error}", held.len())));
        }
        block.resize(BLOCK, 0xA5);
        held.push(hint::black_box(block));
        if held.len().is_multiple_of(16) {
            print(&json!({ "probe": "memory", "mebibytes": held.len() }).to_string());
        }
    }
    report.attempt("memory", Ok::<_, String>(held.len()));
}

/// Writes into every directory that lets it, until the system refuses or 256 MiB; then makes empty files. Goes on with
/// `/tmp` alone until `PROBE_SECONDS` (0) are over.
pub(crate) fn disk(report: &Report) {
    let end = Instant::now() + Duration::from_secs(setting("PROBE_SECONDS", 0));
    fill_everything(report);
    while Instant::now() < end {
        drop(fill("/tmp"));
    }
}

/// Opens files and makes names in `/tmp` until the system refuses, over and over for `PROBE_SECONDS`.
pub(crate) fn files(report: &Report) {
    let end = Instant::now() + Duration::from_secs(setting("PROBE_SECONDS", 60));
    let mut told = false;
    while !told || Instant::now() < end {
        let mut open = Vec::new();
        let refused = loop {
            match fs::File::open("/proc/self/exe") {
                Ok(file) if open.len() < MAX_OPEN => open.push(file),
                Ok(_) => break "the probe's own end".to_owned(),
                Err(error) => break error.to_string(),
            }
        };
        let opened = open.len();
        drop(open);
        let made = make_files("/tmp");
        (0..made).for_each(|number| drop(fs::remove_file(format!("/tmp/probe-file-{number}"))));
        if !told {
            report.record("files", opened >= MAX_OPEN, &json!({ "open": opened, "names": made, "end": refused }));
            told = true;
        }
    }
}

/// Connects to a listener of its own until the system refuses, lets go and does it again for `PROBE_SECONDS`; what is in
/// `PROBE_TARGETS` is connected to as well.
pub(crate) fn connections(report: &Report) {
    let end = Instant::now() + Duration::from_secs(setting("PROBE_SECONDS", 60));
    let targets = std::env::var("PROBE_TARGETS").unwrap_or_default();
    let listener = match TcpListener::bind((Ipv4Addr::LOCALHOST, 0)) {
        Ok(listener) => listener,
        Err(error) => return report.attempt("connections", Err::<Value, _>(error)),
    };
    let mut told = false;
    while !told || Instant::now() < end {
        let mut held = Vec::new();
        let refused = loop {
            let pair =
                listener.local_addr().and_then(TcpStream::connect).and_then(|near| Ok((near, listener.accept()?.0)));
            match pair {
                Ok(pair) if held.len() < MAX_OPEN => held.push(pair),
                Ok(_) => break "the probe's own end".to_owned(),
                Err(error) => break error.to_string(),
            }
        };
        for target in targets.split(',').filter(|target| !target.is_empty()) {
            if let Some(address) = target.parse().ok().filter(|_| held.len() < MAX_OPEN) {
                drop(TcpStream::connect_timeout(&address, Duration::from_millis(10)));
            }
        }
        if !told {
            report.record("connections", held.len() >= MAX_OPEN, &json!({ "held": held.len(), "end": refused }));
            told = true;
        }
    }
}

fn fill_everything(report: &Report) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut places: BTreeSet<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(1)).collect();
    places.extend(["/", "/tmp", "/var/tmp", "/run", "/dev/shm", "/data", "/etc", "/home"]);
    for place in places.into_iter().filter(|place| !place.starts_with("/proc") && !place.starts_with("/sys")) {
        match fill(place) {
            Ok((bytes, end)) => {
                let files = make_files(place);
                report.attempt(
                    &format!("disk {place}"),
                    Ok::<_, String>(json!({ "bytes": bytes, "end": end, "files": files })),
                );
            }
            Err(error) => report.attempt(&format!("disk {place}"), Err::<Value, _>(error)),
        }
    }
}

fn fill(place: &str) -> std::io::Result<(u64, String)> {
    let path = format!("{}/probe-fill", place.trim_end_matches('/'));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    let block = vec![0xA5; 64 * 1024];
    let mut written = 0;
    while written < MAX_DISK_BYTES {
        match file.write(&block) {
            Ok(count) => written += count as u64,
            Err(error) => return Ok((written, error.to_string())),
        }
    }
    Ok((written, "the probe's own end".to_owned()))
}

fn make_files(place: &str) -> u64 {
    let mut made = 0;
    while made < MAX_DISK_FILES {
        let path = format!("{}/probe-file-{made}", place.trim_end_matches('/'));
        if OpenOptions::new().write(true).create(true).truncate(true).open(path).is_err() {
            break;
        }
        made += 1;
    }
    made
}

/// Keeps four threads busy for `PROBE_SECONDS`.
pub(crate) fn cpu(report: &Report) {
    let end = Instant::now() + Duration::from_secs(setting("PROBE_SECONDS", 60));
    report.attempt("cpu", Ok::<_, String>("spinning"));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut count = 0_u64;
                while Instant::now() < end {
                    count = hint::black_box(count.wrapping_add(1));
                }
            });
        }
    });
}

/// Writes log lines without a pause for `PROBE_SECONDS`.
pub(crate) fn flood(report: &Report) {
    let end = Instant::now() + Duration::from_secs(setting("PROBE_SECONDS", 60));
    report.attempt("flood", Ok::<_, String>("started"));
    let line = "y".repeat(200);
    while Instant::now() < end {
        for _ in 0..1_000 {
            print(&line);
        }
    }
}
