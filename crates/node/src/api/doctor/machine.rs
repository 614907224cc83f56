//! The machine under the daemon: its rights and its disk.

use peer_compute::guest_program::GuestProgram;
use peer_compute::profile::forwarder;
use peer_compute::room::Room;
use peer_proto::control::Finding;
use peer_proto::unit::format_bytes;

use super::{Examined, failure, note, ok, warning};
use crate::confinement::Files;
use crate::daemon::Daemon;

/// What a forwarder costs, as measured (`bench/README.md`).
const FORWARDER_COST: &str = "which takes some 4 MiB, answers 0.1 s later after a deploy, and carries a third of the bytes and half of the requests per \
     second";

/// Below this the disk is as good as full (bytes).
const DISK_FAILURE: u64 = 256 << 20;
/// Below this there is no room for images (bytes).
const DISK_WARNING: u64 = 4 << 30;

pub(super) fn check(examined: &Examined) -> Vec<Finding> {
    vec![rights(examined), confinement(&examined.daemon), disk(&examined.daemon)]
}

/// By which way containers' ports are reached, and what it costs.
fn rights(examined: &Examined) -> Finding {
    const CHECK: &str = "rights";
    let settings = &examined.daemon.settings;
    if settings.engine_socket.is_none() {
        return ok(CHECK, "no containers run here, so no rights are needed");
    }
    let room = examined.node.as_ref().ok().and_then(|node| node.room.as_ref());
    let open = room.map(Room::endpoints).unwrap_or_default();
    let forwarded = open.iter().filter(|endpoint| endpoint.network.is_forwarded()).count();
    let may_enter = examined.daemon.confinement.is_some_and(|confinement| confinement.enters_namespaces);
    if forwarded == 0 && (!open.is_empty() || may_enter) {
        return ok(CHECK, "the daemon enters containers' network namespaces, which costs next to nothing");
    }
    match GuestProgram::read(&settings.guest_program) {
        Ok(_) => note(
            CHECK,
            format!(
                "the daemon may not enter containers' network namespaces, so that a forwarder carries what comes to a \
                 port: one more container beside each deployment that exposes one ({forwarded} now), {FORWARDER_COST}; \
                 at most {} of memory each",
                format_bytes(forwarder::MEMORY)
            ),
            "run peerd as root to do without forwarders",
        ),
        Err(error) => {
            let message = format!(
                "the daemon may not enter containers' network namespaces, so that no port can be reached, and {error}"
            );
            failure(CHECK, message, "install peer-guest beside peerd, run peerd as root, or set `engine = \"none\"`")
        }
    }
}

/// What the process that hears from other machines has given up.
fn confinement(daemon: &Daemon) -> Finding {
    const CHECK: &str = "confinement";
    let message = "the process that hears from other machines has no capability, no engine and few system calls";
    match daemon.confinement.map(|confinement| confinement.files) {
        Some(Files::All) => ok(CHECK, format!("{message}, and reaches its own files only")),
        Some(Files::Some) => {
            let advice = "use a newer kernel: from Linux 6.12 on it can signal no other process either";
            note(
                CHECK,
                format!("{message}; the kernel keeps it to its own files, and knows no rule on signals"),
                advice,
            )
        }
        Some(Files::None) => {
            let advice = "use Linux 5.13 or newer, with landlock among its security modules (lsm=)";
            warning(CHECK, format!("{message}; but the kernel does not keep it to its own files"), advice)
        }
        None => warning(CHECK, "the daemon serves without being confined", "start it with the program peerd"),
    }
}

fn disk(daemon: &Daemon) -> Finding {
    const CHECK: &str = "disk_space";
    let path = daemon.data_dir.path();
    let Ok(space) = rustix::fs::statvfs(path) else {
        return failure(CHECK, format!("{} cannot be inspected", path.display()), "look at the disk");
    };
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    let message = format!("{} are free below {}", format_bytes(free), path.display());
    match free {
        0..DISK_FAILURE => failure(CHECK, message, "free some space: nothing can be recorded or received"),
        DISK_FAILURE..DISK_WARNING => warning(CHECK, message, "free some space before images are received"),
        _ => ok(CHECK, message),
    }
}
