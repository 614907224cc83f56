//! What the container engine offers to keep a guest inside.

use std::path::Path;

use peer_compute::engine::{EngineError, EngineFacts};
use peer_compute::wall::Availability;
use peer_proto::control::Finding;

use super::{Examined, failure, note, ok, warning};

/// Whether the kernel has AppArmor in use.
const APPARMOR_SWITCH: &str = "/sys/module/apparmor/parameters/enabled";

pub(super) fn check(examined: &Examined) -> Vec<Finding> {
    match &examined.engine {
        None if examined.node.is_err() => Vec::new(),
        None => vec![ok("engine", "this machine runs nobody's containers, as configured")],
        Some(Ok(facts)) => {
            let mut findings = isolation(facts, kernel_has_apparmor(Path::new(APPARMOR_SWITCH)));
            findings.extend(examined.wall.as_ref().map(egress));
            findings
        }
        Some(Err(error)) => vec![without(error)],
    }
}

/// Whether ways out can be given.
fn egress(wall: &Availability) -> Finding {
    const CHECK: &str = "egress";
    let advice = "repair what the sentence names, and start peerd again; containers without --egress are not concerned";
    match wall {
        Availability::Offered => ok(CHECK, "the wall around containers' networks held when it was tried from inside"),
        Availability::Off => ok(CHECK, "containers get no ways out, as configured"),
        Availability::Untested => {
            note(CHECK, "the wall around containers' networks is still being tested", "ask again in some seconds")
        }
        Availability::Refused(why) => {
            warning(CHECK, format!("neither --egress nor --network is offered to peers: {why}"), advice)
        }
    }
}

fn without(error: &EngineError) -> Finding {
    let advice = match error {
        EngineError::BelowFloor { .. } => "no container is started here until this is repaired",
        _ => "start the container engine, or set `engine_socket` to where it listens",
    };
    failure("engine", error.to_string(), advice)
}

fn kernel_has_apparmor(switch: &Path) -> bool {
    std::fs::read_to_string(switch).is_ok_and(|text| text.trim() == "Y")
}

fn isolation(facts: &EngineFacts, kernel_has_apparmor: bool) -> Vec<Finding> {
    let found = format!("{} with {} on {}", facts.version, facts.runtime, facts.storage_driver);
    vec![
        ok("engine", format!("the container engine answers: {found}")),
        seccomp(facts),
        cgroup(facts),
        apparmor(facts, kernel_has_apparmor),
        user_namespace(facts),
        runtime(facts),
        writable_root(facts),
        live_restore(facts),
    ]
}

fn seccomp(facts: &EngineFacts) -> Finding {
    if facts.seccomp {
        return ok("seccomp", "system calls of containers are filtered");
    }
    failure("seccomp", "system calls of containers are not filtered", "use a kernel and an engine with seccomp")
}

fn cgroup(facts: &EngineFacts) -> Finding {
    if facts.cgroup_version >= 2 {
        return ok("cgroup", format!("control groups version 2, by {}", facts.cgroup_driver));
    }
    let message =
        "control groups are of version 1: memory of a dead guest lingers, and writes to disk are not held to a rate";
    let advice = "boot with systemd.unified_cgroup_hierarchy=1, or with a system of this decade, for version 2";
    warning("cgroup", message, advice)
}

fn apparmor(facts: &EngineFacts, kernel_has_apparmor: bool) -> Finding {
    const CHECK: &str = "apparmor";
    let has = |name: &str| facts.security_options.iter().any(|option| option.split(',').any(|part| part == name));
    if facts.apparmor {
        return ok(CHECK, "AppArmor confines containers");
    }
    if has("name=selinux") {
        return ok(CHECK, "SELinux confines containers");
    }
    if kernel_has_apparmor {
        let message = "the kernel has AppArmor, and the engine does not use it";
        return warning(
            CHECK,
            message,
            "install the package apparmor (its program apparmor_parser), restart the engine",
        );
    }
    let message = "neither AppArmor nor SELinux confines containers";
    warning(CHECK, message, "boot with `lsm=landlock,lockdown,yama,integrity,apparmor` if the kernel has AppArmor")
}

fn user_namespace(facts: &EngineFacts) -> Finding {
    const CHECK: &str = "user_namespace";
    if facts.user_namespace || facts.rootless {
        return ok(CHECK, "users of containers are mapped to other users of the host");
    }
    let message = "root of a container, where a grant allows one to run as root, is root of the host";
    // Measured traps: the engine begins anew, and some values map nothing.
    let advice = "set \"userns-remap\": \"default\" in /etc/docker/daemon.json and restart the engine; it makes the user \
                  dockremap and begins with an empty store of its own, so that your own images must be loaded again; \
                  \"root\" as the value maps nothing";
    warning(CHECK, message, advice)
}

/// The runtime that containers of peers get, and whether the engine has it.
fn runtime(facts: &EngineFacts) -> Finding {
    const CHECK: &str = "runtime";
    match &facts.owner_runtime {
        Some(name) if facts.runtimes.iter().any(|runtime| runtime == name.as_str()) => {
            ok(CHECK, format!("every container of a peer is run by {name}, as configured"))
        }
        Some(name) => failure(
            CHECK,
            format!("the configuration wants every container run by {name}, and the engine does not have that runtime"),
            "install it and add it under \"runtimes\" in /etc/docker/daemon.json, or change `runtime` in the configuration; \
             until then no container is started here",
        ),
        None => {
            let message =
                format!("containers are run by {}; the engine has {}", facts.runtime, facts.runtimes.join(", "));
            let advice = "a kernel of their own or gVisor keeps guests further away: install Kata or gVisor, add it to the \
                          engine, and set `runtime` in the configuration of peerd";
            note(CHECK, message, advice)
        }
    }
}

fn writable_root(facts: &EngineFacts) -> Finding {
    const CHECK: &str = "writable_root";
    if facts.sized_root {
        return ok(CHECK, format!("the engine ({}) holds a writable root to its size", facts.storage_driver));
    }
    let message = format!("writable roots are not given here: {} does not hold them to a size", facts.storage_driver);
    note(CHECK, message, "put the engine's data on btrfs, zfs, or xfs mounted with pquota if peers are to have them")
}

fn live_restore(facts: &EngineFacts) -> Finding {
    if facts.live_restore {
        return ok("live_restore", "containers go on while the engine restarts");
    }
    let advice = "set \"live-restore\": true in /etc/docker/daemon.json";
    note("live_restore", "containers end when the engine restarts", advice)
}

#[cfg(test)]
mod tests {
    use peer_proto::control::Level;

    use super::super::versions::tests::facts;
    use super::*;

    fn level_of(findings: &[Finding], check: &str) -> Option<Level> {
        findings.iter().find(|finding| finding.check == check).map(|finding| finding.level)
    }

    #[test]
    fn every_wall_that_lacks_is_named() {
        let bare = EngineFacts { seccomp: false, cgroup_version: 1, live_restore: false, ..facts() };
        let bare = EngineFacts { apparmor: false, user_namespace: false, rootless: false, ..bare };
        let findings = isolation(&bare, false);
        assert_eq!(level_of(&findings, "seccomp"), Some(Level::Failure));
        for check in ["cgroup", "apparmor", "user_namespace"] {
            assert_eq!(level_of(&findings, check), Some(Level::Warning), "{check}");
        }
        assert_eq!(level_of(&findings, "live_restore"), Some(Level::Note));
        assert!(findings.iter().all(|finding| finding.level == Level::Ok || finding.advice.is_some()));
        let walled =
            EngineFacts { cgroup_version: 2, apparmor: true, user_namespace: true, live_restore: true, ..facts() };
        let walled = EngineFacts { owner_runtime: "runc".parse().ok(), sized_root: true, ..walled };
        assert!(isolation(&walled, true).iter().all(|finding| finding.level == Level::Ok));
    }

    #[test]
    fn apparmor_that_the_engine_does_not_use_is_told_from_none() {
        let bare = EngineFacts { apparmor: false, security_options: Vec::new(), ..facts() };
        assert_ne!(apparmor(&bare, true).message, apparmor(&bare, false).message);
        let selinux = EngineFacts { security_options: vec!["name=selinux".to_owned()], ..bare };
        assert_eq!(apparmor(&selinux, false).level, Level::Ok);
    }

    #[test]
    fn an_engine_below_the_floor_says_what_lacks() {
        let finding = without(&EngineError::BelowFloor { reason: "it does not filter system calls".to_owned() });
        assert_eq!(finding.level, Level::Failure);
        assert!(finding.message.contains("does not filter system calls"));
    }
}
