//! What the container engine offers to keep a guest inside.

use std::path::Path;

use peer_compute::engine::{EngineError, EngineFacts};
use peer_proto::control::Finding;

use super::{Examined, failure, note, ok, warning};

/// Whether the kernel has AppArmor in use.
const APPARMOR_SWITCH: &str = "/sys/module/apparmor/parameters/enabled";

pub(super) fn check(examined: &Examined) -> Vec<Finding> {
    match &examined.engine {
        None if examined.node.is_err() => Vec::new(),
        None => vec![ok("engine", "this machine runs nobody's containers, as configured")],
        Some(Ok(facts)) => isolation(facts, kernel_has_apparmor(Path::new(APPARMOR_SWITCH))),
        Some(Err(error)) => vec![without(error)],
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
    let message = "root of a container would be root of the host; no container of ours runs as root";
    warning(CHECK, message, "set \"userns-remap\": \"default\" in /etc/docker/daemon.json for one more wall")
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
