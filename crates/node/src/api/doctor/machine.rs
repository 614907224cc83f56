//! The machine under the daemon: its rights and its disk.

use peer_proto::control::Finding;
use peer_proto::unit::format_bytes;

use super::{Examined, failure, ok, warning};
use crate::daemon::Daemon;

/// Below this the disk is as good as full (bytes).
const DISK_FAILURE: u64 = 256 << 20;
/// Below this there is no room for images (bytes).
const DISK_WARNING: u64 = 4 << 30;

pub(super) fn check(examined: &Examined) -> Vec<Finding> {
    vec![rights(&examined.daemon), disk(&examined.daemon)]
}

/// Entering a container's network namespace takes these two capabilities.
fn rights(daemon: &Daemon) -> Finding {
    const CHECK: &str = "rights";
    const SYS_ADMIN: u64 = 1 << 21;
    const SYS_PTRACE: u64 = 1 << 19;
    if daemon.settings.engine_socket.is_none() {
        return ok(CHECK, "no containers run here, so no rights are needed");
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let held = effective.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok()).unwrap_or(0);
    if held & SYS_ADMIN != 0 && held & SYS_PTRACE != 0 {
        return ok(CHECK, "the daemon may enter containers' network namespaces");
    }
    let message = "the daemon may not enter containers' network namespaces, so that no port can be reached";
    failure(CHECK, message, "run peerd as root, or set `engine = \"none\"`")
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
