//! A rogue friend at full rate, and strangers who only hold sockets open: memory stays, and others are served (G6, V5).

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use peer_proto::frame::CONTROL_FRAME_MAX;
use peer_proto::query::{Answer, Query};
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::world::{Machine, Wire};

/// By how much the daemon may grow under all of it (bytes).
const GROWTH_MAX: u64 = 64 << 20;
/// Sockets of strangers that are held at one time.
const SOCKETS: usize = 2000;
/// Streams that one friend asks for, while he holds as many as he may.
const STREAMS: usize = 10_000;
const HELD: usize = 80;

/// A process and those that it started.
fn family(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children = children.split_whitespace().filter_map(|child| child.parse().ok()).flat_map(family);
    std::iter::once(pid).chain(children).collect()
}

/// A line of a process's status that counts memory (bytes).
fn memory(pid: u32, line: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = status.lines().find_map(|found| found.strip_prefix(line)).unwrap();
    value.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Resident memory of the daemon now, from which on its peak is counted anew by the kernel.
fn resident(daemon: &Machine) -> u64 {
    let of_one = |pid: u32| {
        fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
        memory(pid, "VmRSS")
    };
    family(daemon.pid()).into_iter().map(of_one).sum()
}

/// The most that the daemon has had resident since [`resident`].
fn peak(daemon: &Machine) -> u64 {
    family(daemon.pid()).into_iter().map(|pid| memory(pid, "VmHWM")).sum()
}

/// A friend of bob's, whose daemon is down.
fn friend(bob: &Machine, name: &str) -> Machine {
    let mut friend = Machine::without_engine(name);
    friend.join(bob, &[]);
    friend.kill();
    friend
}

#[test]
fn alone_v1_v5_g6_silent_sockets_and_streams_of_a_rogue_friend_cost_little_and_keep_nobody_out() {
    let mut files = getrlimit(Resource::Nofile);
    files.current = files.maximum;
    setrlimit(Resource::Nofile, files).unwrap();
    let bob = Machine::without_engine("bob");
    let (mallory, carol) = (friend(&bob, "mallory"), friend(&bob, "carol"));
    // Two programs with one key, each with two connections, hold what may be held, and two more ask for more.
    let rogue = [(); 4].map(|()| Wire::unbounded(&mallory, &[&bob]));
    let longest = u32::try_from(CONTROL_FRAME_MAX).unwrap();
    let before = resident(&bob);
    let over = AtomicBool::new(false);
    let holding = [&rogue[0], &rogue[1]].map(|wire| wire.open_many(&bob, HELD / 2, HELD / 2, longest));
    let held: usize = holding.iter().map(|(opened, _)| opened).sum();
    let (opened, sockets, mut waits) = std::thread::scope(|scope| {
        let strangers = scope.spawn(|| Wire::hold_sockets(&bob, SOCKETS, &over));
        let (rogue, bob) = (&rogue, &bob);
        let flood = [(2, longest), (3, u32::MAX)]
            .map(|(wire, announced)| scope.spawn(move || rogue[wire].open_many(bob, STREAMS / 2, 512, announced).0));
        let mut waits = Vec::new();
        while !flood.iter().all(std::thread::ScopedJoinHandle::is_finished) || waits.len() < 5 {
            let begun = Instant::now();
            let wire = Wire::of(&carol, &[bob]);
            assert!(matches!(wire.query(bob, Query::List), Answer::List(_)));
            waits.push(begun.elapsed());
            std::thread::sleep(Duration::from_millis(300));
        }
        over.store(true, Ordering::Relaxed);
        let opened: usize = flood.map(|one| one.join().unwrap()).into_iter().sum();
        (opened, strangers.join().unwrap(), waits)
    });
    let grown = peak(&bob).saturating_sub(before);
    drop(holding);
    waits.sort();
    let (median, longest) = (waits[waits.len() / 2], waits[waits.len() - 1]);
    eprintln!(
        "{sockets} sockets, {held} streams held and {opened} of {STREAMS} more: {} KiB, and at most {} KiB on top; a friend \
         was connected and answered in {median:.0?}, the longest of {} times was {longest:.0?}",
        before >> 10,
        grown >> 10,
        waits.len()
    );
    assert!(sockets >= SOCKETS && held > HELD / 2, "{sockets} sockets and {held} streams are no flood");
    assert!(grown <= GROWTH_MAX, "grown by {} MiB", grown >> 20);
    // What is promised is a second; this program and its floods have the same processors as the daemon.
    assert!(median < Duration::from_secs(1) && longest < Duration::from_secs(5), "{waits:?}");
}
