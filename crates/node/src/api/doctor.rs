//! `doctor`: looks at everything that must be right for this machine to work, and says what to do where it is not.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use peer_compute::engine::EngineFacts;
use peer_net::Role;
use peer_proto::control::{Finding, Level};
use peer_proto::envelope::DRIFT_MAX_MILLISECONDS;
use peer_proto::unit::{Timestamp, format_bytes, in_words};
use peer_state::audit::{self, Entry, Outcome};
use peer_state::database::{DatabaseError, Tx};
use peer_trust::floor;

use super::Failure;
use crate::clock;
use crate::daemon::Daemon;
use crate::node::Node;

/// The clock cannot be right if it stands before the year in which this program was written.
const CLOCK_FLOOR: Timestamp = Timestamp(1_767_225_600_000);
/// Below this the disk is as good as full (bytes).
const DISK_FAILURE: u64 = 256 << 20;
/// Below this there is no room for images (bytes).
const DISK_WARNING: u64 = 4 << 30;
/// Where a container engine listens that was opened to the network without protection.
const ENGINE_TCP_PORT: u16 = 2375;
/// How long a listener on this machine may take to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new().route("/v1/doctor", get(examine)).route("/v1/doctor/accept-clock", post(accept_clock))
}

async fn examine(State(daemon): State<Arc<Daemon>>) -> Result<Json<Vec<Finding>>, Failure> {
    let mut findings = vec![rights(&daemon), data_directory(&daemon), disk(&daemon), clock_sane(&daemon).await?];
    match daemon.node().await {
        Ok(node) => {
            findings.push(ok("identity", format!("this machine is {}", node.identity.key.peer_id())));
            findings.push(key_file(&daemon));
            findings.push(listening(&node));
            findings.push(peers(&daemon, &node));
            findings.push(gateways(&daemon, &node));
            findings.extend(engine(&node).await);
        }
        Err(problem) => findings.push(failure("identity", problem.message, "run: peerctl init")),
    }
    findings.push(engine_port().await);
    Ok(Json(findings))
}

fn ok(check: &str, message: impl Into<String>) -> Finding {
    Finding { check: check.to_owned(), level: Level::Ok, message: message.into(), advice: None }
}

fn warning(check: &str, message: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { level: Level::Warning, advice: Some(advice.into()), ..ok(check, message) }
}

fn failure(check: &str, message: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { level: Level::Failure, ..warning(check, message, advice) }
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

fn mode_of(path: &Path) -> Option<u32> {
    Some(std::fs::metadata(path).ok()?.permissions().mode() & 0o777)
}

fn data_directory(daemon: &Daemon) -> Finding {
    private("data_directory", daemon.data_dir.path(), 0o700)
}

fn key_file(daemon: &Daemon) -> Finding {
    private("key_file", &daemon.data_dir.join("identity.key"), 0o600)
}

fn private(check: &str, path: &Path, wanted: u32) -> Finding {
    match mode_of(path) {
        Some(mode) if mode & 0o077 != 0 => {
            let message = format!("others may read {} (mode {mode:o})", path.display());
            failure(check, message, format!("run: chmod {wanted:o} {}", path.display()))
        }
        Some(mode) => ok(check, format!("{} is private (mode {mode:o})", path.display())),
        None => failure(check, format!("{} cannot be inspected", path.display()), "look at the disk and its rights"),
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

/// Requests bear the time; a clock that went back, or never was set, makes every peer refuse them.
async fn clock_sane(daemon: &Daemon) -> Result<Finding, Failure> {
    const CHECK: &str = "clock";
    let now = clock::now();
    let latest = daemon.database.write(floor::latest).await?;
    Ok(if now < CLOCK_FLOOR {
        failure(CHECK, "the clock was never set", "set it (timedatectl set-ntp true); peers refuse requests until then")
    } else if now.plus(DRIFT_MAX_MILLISECONDS) < latest {
        let message = format!("the clock stands {} before what it has shown already", in_words(latest.since(now)));
        let advice = "set it (timedatectl set-ntp true), or, if it is right now, run: peerctl doctor --accept-clock; \
                      requests are refused until then";
        failure(CHECK, message, advice)
    } else {
        ok(CHECK, "the clock has not gone back")
    })
}

/// Takes the present time for right: the way out when the clock once stood in the future.
async fn accept_clock(State(daemon): State<Arc<Daemon>>) -> Result<Json<Vec<Finding>>, Failure> {
    let run = daemon.run.clone();
    let accept = move |tx: &Tx<'_>| -> Result<(), DatabaseError> {
        let now = clock::now();
        let former = run.accept_clock(tx, now)?;
        let (actor, action, outcome) = ("local".to_owned(), "clock accepted".to_owned(), Outcome::Allowed);
        let detail = format!("latest time seen: {} ms -> {} ms", former.0, now.0);
        audit::append(tx, &Entry { at: now, actor, action, outcome, detail })
    };
    daemon.database.write(accept).await?;
    examine(State(daemon)).await
}

fn listening(node: &Node) -> Finding {
    let addresses: Vec<_> = node.network.listen_addresses().iter().map(ToString::to_string).collect();
    if addresses.is_empty() {
        let message = "this machine listens nowhere; peers can be reached, but cannot reach it";
        return warning("listening", message, "set `listen` in the configuration if peers should connect to it");
    }
    ok("listening", format!("peers connect to {}", addresses.join(", ")))
}

fn peers(daemon: &Daemon, node: &Node) -> Finding {
    const CHECK: &str = "peers";
    let connections = node.network.connections();
    let is_connected = |peer| connections.iter().any(|one| one.role == Role::Peer && one.peer == peer);
    let list = daemon.trust.snapshot();
    let away: Vec<_> =
        list.peers.values().filter(|peer| !is_connected(peer.peer)).map(|peer| peer.name.as_str()).collect();
    match (list.peers.len(), away.len()) {
        (0, _) => warning(CHECK, "no peer is trusted yet", "run: peerctl invite, or peerctl join TICKET"),
        (all, 0) => ok(CHECK, format!("all {all} peers are connected")),
        (all, missing) => {
            let message = format!("{missing} of {all} peers are not connected: {}", away.join(", "));
            warning(CHECK, message, "run: peerctl peers show NAME, which says why")
        }
    }
}

fn gateways(daemon: &Daemon, node: &Node) -> Finding {
    const CHECK: &str = "gateways";
    let all = super::gateways::describe_all(daemon, Some(node));
    let away: Vec<_> = all.iter().filter(|gateway| !gateway.connected).collect();
    match (all.len(), away.first()) {
        (0, _) if node.room.is_none() => ok(CHECK, "this machine runs nobody's containers, so it needs no gateway"),
        (0, _) => {
            let message = "no gateway is set; deployments here get no public address";
            warning(CHECK, message, "run: peerctl gateway add ADDRESS (peergate prints its address)")
        }
        (count, None) => ok(CHECK, format!("the tunnels to all {count} gateways stand")),
        (_, Some(first)) => {
            let reason = first.last_error.clone().unwrap_or_else(|| "not tried yet".to_owned());
            let message = format!("the tunnel to {} is down: {reason}", first.address);
            failure(CHECK, message, "look whether peergate runs there and has allowed this machine (peergate allow)")
        }
    }
}

async fn engine(node: &Node) -> Vec<Finding> {
    let Some(room) = &node.room else {
        return vec![ok("engine", "this machine runs nobody's containers, as configured")];
    };
    match room.engine_facts().await {
        Ok(facts) => isolation(&facts),
        Err(error) => {
            let advice = "start the container engine, or set `engine_socket` to where it listens";
            vec![failure("engine", error.to_string(), advice)]
        }
    }
}

fn isolation(facts: &EngineFacts) -> Vec<Finding> {
    let found = format!("{} with {} on {}", facts.version, facts.runtime, facts.storage_driver);
    let mut findings = vec![ok("engine", format!("the container engine answers: {found}"))];
    findings.push(if facts.seccomp {
        ok("seccomp", "system calls of containers are filtered")
    } else {
        failure("seccomp", "system calls of containers are not filtered", "use a kernel and an engine with seccomp")
    });
    findings.push(if facts.cgroup_version >= 2 {
        ok("cgroup", format!("control groups version 2, by {}", facts.cgroup_driver))
    } else {
        warning("cgroup", "control groups are of version 1", "boot with the unified hierarchy (version 2)")
    });
    findings.push(if facts.apparmor {
        ok("apparmor", "AppArmor confines containers")
    } else {
        warning("apparmor", "AppArmor does not confine containers", "enable it if the system offers it")
    });
    findings.push(if facts.user_namespace || facts.rootless {
        ok("user_namespace", "users of containers are mapped to other users of the host")
    } else {
        let message = "root of a container would be root of the host; no container of ours runs as root";
        warning("user_namespace", message, "set userns-remap in the engine's configuration for one more wall")
    });
    findings.push(if facts.live_restore {
        ok("live_restore", "containers go on while the engine restarts")
    } else {
        warning("live_restore", "containers end when the engine restarts", "set live-restore in its configuration")
    });
    findings
}

/// An engine that listens without protection gives the whole machine to whoever connects.
async fn engine_port() -> Finding {
    const CHECK: &str = "engine_port";
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, ENGINE_TCP_PORT));
    match tokio::time::timeout(CONNECT_TIMEOUT, tokio::net::TcpStream::connect(address)).await {
        Ok(Ok(_)) => {
            let message =
                format!("something listens on port {ENGINE_TCP_PORT}, where an engine opens the whole machine");
            failure(CHECK, message, "remove tcp://…:2375 from the engine's hosts")
        }
        Ok(Err(_)) | Err(_) => ok(CHECK, "no engine listens on an unprotected port"),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;

    #[test]
    fn exposed_files_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("key");
        std::fs::write(&file, b"").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
        let finding = private("key_file", &file, 0o600);
        assert_eq!(finding.level, Level::Failure);
        assert!(finding.advice.unwrap().starts_with("run: chmod 600"));
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(private("key_file", &file, 0o600).level, Level::Ok);
        assert_eq!(private("key_file", &directory.path().join("absent"), 0o600).level, Level::Failure);
    }
}
