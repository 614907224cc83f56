//! The last-moment check of I1, I2 and V4: what the engine reports of a container against its plan.
//!
//! The comparison runs over every option that the engine reports, not over a list of dangerous ones: whatever the plan
//! did not set must be unset.

use std::collections::BTreeSet;

use bollard::models::{ContainerConfig, ContainerCreateBody, ContainerInspectResponse, HostConfig};
use serde_json::{Map, Value};

use crate::{
    engine::quote,
    isolation::RUNTIMES,
    profile::{self, ContainerPlan},
};

/// Paths of the kernel that every engine since 20.10 hides from containers.
const MASKED: [&str; 8] = [
    "/proc/acpi",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
/// Paths of the kernel that must not be writable.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Every way in which the reported container differs from its plan; none if it may run.
pub fn differences(plan: &ContainerPlan, report: &ContainerInspectResponse) -> Vec<String> {
    differences_from(&plan.name(), &profile::body(plan), report)
}

/// The same against what the engine was once told of the container called `name`, which [`profile::body`] made.
pub fn differences_from(name: &str, told: &ContainerCreateBody, report: &ContainerInspectResponse) -> Vec<String> {
    let mut found = Vec::new();
    let no_options = HostConfig::default();
    let host_told = told.host_config.as_ref().unwrap_or(&no_options);
    match &report.host_config {
        Some(host) => host_differences(host_told, host, &mut found),
        None => found.push("the engine reports no options".to_owned()),
    }
    match &report.config {
        Some(config) => config_differences(told, config, &mut found),
        None => found.push("the engine reports no configuration".to_owned()),
    }
    if report.image.is_none() || report.image != told.image {
        found.push(format!("image is {}", quote(report.image.as_deref().unwrap_or("not reported"))));
    }
    if report.name.as_deref().map(|name| name.trim_start_matches('/')) != Some(name) {
        found.push(format!("name is {}", quote(report.name.as_deref().unwrap_or("not reported"))));
    }
    mount_differences(host_told, report, &mut found);
    network_differences(told, report, &mut found);
    found
}

fn host_differences(told: &HostConfig, reported: &HostConfig, found: &mut Vec<String>) {
    for (name, paths, required) in [
        ("MaskedPaths", &reported.masked_paths, &MASKED[..]),
        ("ReadonlyPaths", &reported.readonly_paths, &READ_ONLY[..]),
    ] {
        let paths: BTreeSet<_> = paths.iter().flatten().map(String::as_str).collect();
        for lacking in required.iter().filter(|path| !paths.contains(**path)) {
            found.push(format!("{name} lacks {lacking}"));
        }
    }
    let runtime = reported.runtime.as_deref().unwrap_or_default();
    let expected = match told.runtime.as_deref() {
        Some(told) => runtime == told,
        None => runtime.is_empty() || RUNTIMES.contains(&runtime),
    };
    if !expected {
        found.push(format!("Runtime is {}", quote(runtime)));
    }
    let (mut expected, mut reported) = (settings(told), settings(reported));
    for settings in [&mut expected, &mut reported] {
        // Judged above, or of no effect without a terminal.
        for name in ["MaskedPaths", "ReadonlyPaths", "Runtime", "ConsoleSize"] {
            settings.remove(name);
        }
    }
    // The engine may drop this one where the kernel has it not; with `MemorySwap` equal to `Memory` it changes nothing.
    if reported.get("MemorySwappiness") == Some(&Value::from(-1)) {
        reported.remove("MemorySwappiness");
    }
    // So may this one, which keeps the host's own work in front and no guest in.
    if !reported.contains_key("BlkioWeight") {
        expected.remove("BlkioWeight");
    }
    compare(&expected, &reported, found);
}

/// Options that are set to anything: an empty, zero or false one is the same as none.
fn settings(host: &HostConfig) -> Map<String, Value> {
    let Value::Object(mut map) = serde_json::to_value(host).unwrap_or_default() else { return Map::new() };
    if let Some(Value::Object(policy)) = map.get_mut("RestartPolicy") {
        policy.retain(|_, value| is_set(value));
    }
    map.retain(|_, value| is_set(value));
    map
}

fn is_set(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(flag) => *flag,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

fn compare(expected: &Map<String, Value>, reported: &Map<String, Value>, found: &mut Vec<String>) {
    let names: BTreeSet<_> = expected.keys().chain(reported.keys()).collect();
    for name in names {
        let (expected, reported) = (expected.get(name), reported.get(name));
        if !same(name, expected, reported) {
            let show =
                |value: Option<&Value>| value.map_or_else(|| "unset".to_owned(), |value| quote(&value.to_string()));
            found.push(format!("{name} is {}, not {}", show(reported), show(expected)));
        }
    }
}

/// Lists of limits and of capabilities have no order of their own, and the latter two spellings.
fn same(name: &str, expected: Option<&Value>, reported: Option<&Value>) -> bool {
    if name == "Ulimits"
        && let (Some(Value::Array(expected)), Some(Value::Array(reported))) = (expected, reported)
    {
        return expected.len() == reported.len() && expected.iter().all(|limit| reported.contains(limit));
    }
    if matches!(name, "CapAdd" | "CapDrop") {
        return capabilities(expected) == capabilities(reported);
    }
    expected == reported
}

/// Newer engines report `CAP_CHOWN` for `CHOWN`, and sort.
fn capabilities(list: Option<&Value>) -> Option<BTreeSet<&str>> {
    let Some(list) = list else { return Some(BTreeSet::new()) };
    list.as_array()?.iter().map(|name| name.as_str().map(|name| name.strip_prefix("CAP_").unwrap_or(name))).collect()
}

fn config_differences(expected: &ContainerCreateBody, reported: &ContainerConfig, found: &mut Vec<String>) {
    let mut check = |name: &str, holds: bool, shown: String| {
        if !holds {
            found.push(format!("{name} is {}", quote(&shown)));
        }
    };
    check("User", reported.user == expected.user, format!("{:?}", reported.user));
    // In another container's network it has that one's name.
    let named = expected.hostname.is_none() || reported.hostname == expected.hostname;
    check("Hostname", named, format!("{:?}", reported.hostname));
    check("StopSignal", reported.stop_signal == expected.stop_signal, format!("{:?}", reported.stop_signal));
    check("Image", reported.image == expected.image, format!("{:?}", reported.image));
    let test = reported.healthcheck.as_ref().and_then(|check| check.test.clone()).unwrap_or_default();
    check("Healthcheck", test == ["NONE"], format!("{test:?}"));
    check("Tty", !reported.tty.unwrap_or_default(), "true".into());
    for (name, reported, expected) in [
        ("OpenStdin", reported.open_stdin, expected.open_stdin),
        ("StdinOnce", reported.stdin_once, expected.stdin_once),
    ] {
        check(name, reported.unwrap_or_default() == expected.unwrap_or_default(), format!("{reported:?}"));
    }
    for (name, reported, expected) in
        [("Entrypoint", &reported.entrypoint, &expected.entrypoint), ("Cmd", &reported.cmd, &expected.cmd)]
    {
        let holds = expected.as_ref().is_none_or(|expected| reported.as_ref().unwrap_or(&vec![]) == expected);
        check(name, holds, format!("{reported:?}"));
    }
    let environment = reported.env.as_deref().unwrap_or_default();
    let lacking = expected.env.iter().flatten().any(|variable| !environment.contains(variable));
    // Values are the owner's secrets: they go into no message.
    check("Env", !lacking, "not what was asked for".into());
    let labels = reported.labels.clone().unwrap_or_default();
    for (name, value) in expected.labels.iter().flatten() {
        check(name, labels.get(name) == Some(value), format!("{:?}", labels.get(name)));
    }
}

/// Nothing of the host may be mounted: of the mounts that the engine lists, only the plan's own tmpfs are allowed.
fn mount_differences(told: &HostConfig, report: &ContainerInspectResponse, found: &mut Vec<String>) {
    for mount in report.mounts.iter().flatten() {
        let destination = mount.destination.as_deref().unwrap_or_default();
        if mount.typ.as_deref() != Some("tmpfs")
            || !told.tmpfs.as_ref().is_some_and(|tmpfs| tmpfs.contains_key(destination))
        {
            found.push(format!("something is mounted at {}", quote(destination)));
        }
    }
}

/// The container must be in the networks that it was made for, and in no other.
fn network_differences(told: &ContainerCreateBody, report: &ContainerInspectResponse, found: &mut Vec<String>) {
    let Some(network) = &report.network_settings else { return };
    let ports =
        network.ports.iter().flatten().any(|(_, bindings)| bindings.as_ref().is_some_and(|list| !list.is_empty()));
    if ports {
        found.push("a port is published".to_owned());
    }
    let first = told.host_config.as_ref().and_then(|host| host.network_mode.as_deref());
    // A forwarder is in its guest's network, and in none of its own.
    let first = first.filter(|mode| !mode.starts_with("container:"));
    let second = told.labels.as_ref().and_then(|labels| labels.get(profile::NETWORK_LABEL)).map(String::as_str);
    let planned: BTreeSet<_> = first.into_iter().chain(second).collect();
    let attached: BTreeSet<_> = network.networks.iter().flatten().map(|(name, _)| name.as_str()).collect();
    for name in attached.iter().filter(|name| **name != "none" && !planned.contains(**name)) {
        found.push(format!("it is attached to network {}", quote(name)));
    }
    for name in planned.iter().filter(|name| **name != "none" && !attached.contains(**name)) {
        found.push(format!("it is not attached to network {}", quote(name)));
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use bollard::models::{
        DeviceMapping, EndpointSettings, Mount, MountPoint, NetworkSettings, PortBinding, ResourcesUlimits,
    };
    use peer_proto::deploy::{Capability, Specification, User};
    use peer_proto::id::DeploymentId;
    use peer_proto::identity::Identity;
    use peer_proto::unit::ByteSize;

    use super::*;
    use crate::profile::tests::{image, planned, specification};
    use crate::wall::attach::Networks;

    /// What an engine reports of a container that was made exactly as planned.
    fn good(plan: &ContainerPlan) -> ContainerInspectResponse {
        let body = profile::body(plan);
        let mut host = body.host_config.unwrap();
        host.masked_paths = Some(MASKED.map(str::to_owned).to_vec());
        host.readonly_paths = Some(READ_ONLY.map(str::to_owned).to_vec());
        host.runtime = Some("runc".into());
        host.console_size = Some(vec![0, 0]);
        host.port_bindings = Some([].into());
        host.group_add = Some(vec![]);
        ContainerInspectResponse {
            name: Some(format!("/{}", plan.name())),
            image: body.image.clone(),
            host_config: Some(host),
            config: Some(ContainerConfig {
                image: body.image,
                user: body.user,
                hostname: body.hostname,
                stop_signal: body.stop_signal,
                healthcheck: body.healthcheck,
                labels: body.labels,
                env: body.env,
                cmd: Some(vec!["/app".into()]),
                ..ContainerConfig::default()
            }),
            network_settings: Some(NetworkSettings {
                networks: Some([("none".to_owned(), EndpointSettings::default())].into()),
                ..NetworkSettings::default()
            }),
            ..ContainerInspectResponse::default()
        }
    }

    fn demanding(runtime: &str) -> ContainerPlan {
        let (owner, uid) = (Identity::generate().peer_id(), profile::uid_for(0, false).unwrap());
        let runtime = Some(runtime.parse().unwrap());
        profile::plan(&specification(), &image(), DeploymentId::random(), owner, "node", uid, runtime).unwrap()
    }

    #[test]
    fn a_container_as_planned_has_no_differences() {
        let plan = planned(&specification(), &image()).unwrap();
        assert_eq!(differences(&plan, &good(&plan)), Vec::<String>::new());
    }

    #[test]
    fn weights_that_the_kernel_has_not_are_no_difference() {
        let plan = planned(&specification(), &image()).unwrap();
        let mut report = good(&plan);
        let host = report.host_config.as_mut().unwrap();
        (host.blkio_weight, host.memory_swappiness) = (None, Some(-1));
        assert_eq!(differences(&plan, &report), Vec::<String>::new());
    }

    #[test]
    fn v4_the_runtime_is_the_one_that_was_demanded() {
        let plan = demanding("runsc");
        let mut report = good(&plan);
        assert_eq!(differences(&plan, &report), ["Runtime is runc"]);
        report.host_config.as_mut().unwrap().runtime = Some("runsc".into());
        assert_eq!(differences(&plan, &report), Vec::<String>::new());
    }

    #[test]
    fn the_program_is_the_one_that_was_asked_for() {
        let (entrypoint, command) = (vec!["/asked".to_owned()], vec!["for".to_owned()]);
        let asked = Specification { entrypoint: Some(entrypoint.clone()), command: command.clone(), ..specification() };
        let plan = planned(&asked, &image()).unwrap();
        let mut report = good(&plan);
        let found = differences(&plan, &report);
        assert!(found.len() == 2 && found[0].starts_with("Entrypoint ") && found[1].starts_with("Cmd "), "{found:?}");
        let config = report.config.as_mut().unwrap();
        (config.entrypoint, config.cmd) = (Some(entrypoint), Some(command));
        assert_eq!(differences(&plan, &report), Vec::<String>::new());
    }

    #[test]
    fn i2_only_tmpfs_of_the_plan_may_be_mounted() {
        let plan = planned(&specification(), &image()).unwrap();
        for (kind, destination, allowed) in
            [("tmpfs", "/tmp", true), ("tmpfs", "/etc", false), ("bind", "/tmp", false), ("bind", "/etc", false)]
        {
            let mut report = good(&plan);
            let (typ, destination) = (Some(kind.to_owned()), Some(destination.to_owned()));
            report.mounts = Some(vec![MountPoint { typ, destination, ..MountPoint::default() }]);
            assert_eq!(differences(&plan, &report).is_empty(), allowed, "{kind}");
        }
    }

    #[test]
    fn v4n_a_container_is_in_its_networks_and_in_no_other() {
        let attached = |plan: &ContainerPlan, names: &[&str]| {
            let mut report = good(plan);
            let networks = names.iter().map(|name| ((*name).to_owned(), EndpointSettings::default())).collect();
            report.network_settings.as_mut().unwrap().networks = Some(networks);
            differences(plan, &report)
        };
        let none = planned(&specification(), &image()).unwrap();
        assert_eq!(attached(&none, &[]), Vec::<String>::new());
        let networks = Networks { first: Some("front".into()), second: Some("back".into()), ..Networks::default() };
        let plan = none.in_networks(networks);
        assert_eq!(plan.second_network(), Some(("back", "web_1.x")));
        assert_eq!(attached(&plan, &["front", "back"]), Vec::<String>::new());
        assert_eq!(attached(&plan, &["front"]), ["it is not attached to network back"]);
        assert_eq!(attached(&plan, &["back"]), ["it is not attached to network front"]);
        assert_eq!(attached(&plan, &["front", "back", "bridge"]), ["it is attached to network bridge"]);
    }

    type Spoil = fn(&mut HostConfig);

    #[test]
    fn i1_i2_v4_every_single_change_of_the_options_is_found() {
        let cases: &[(&str, Spoil)] = &[
            ("Privileged", |h| h.privileged = Some(true)),
            ("CapAdd", |h| h.cap_add = Some(vec!["NET_RAW".into()])),
            ("CapAdd", |h| h.cap_add = Some(vec!["CAP_CHOWN".into()])),
            ("CapDrop", |h| h.cap_drop = None),
            ("StorageOpt", |h| h.storage_opt = Some([("size".to_owned(), "1g".to_owned())].into())),
            ("Binds", |h| h.binds = Some(vec!["/:/host".into()])),
            ("Mounts", |h| h.mounts = Some(vec![Mount::default()])),
            ("VolumesFrom", |h| h.volumes_from = Some(vec!["x".into()])),
            ("Devices", |h| h.devices = Some(vec![DeviceMapping::default()])),
            ("DeviceCgroupRules", |h| h.device_cgroup_rules = Some(vec!["a *:* rwm".into()])),
            ("NetworkMode", |h| h.network_mode = Some("host".into())),
            ("NetworkMode", |h| h.network_mode = None),
            ("PidMode", |h| h.pid_mode = Some("host".into())),
            ("UTSMode", |h| h.uts_mode = Some("host".into())),
            ("IpcMode", |h| h.ipc_mode = Some("host".into())),
            ("UsernsMode", |h| h.userns_mode = Some("host".into())),
            ("CgroupnsMode", |h| h.cgroupns_mode = Some(bollard::models::HostConfigCgroupnsModeEnum::HOST)),
            ("CgroupParent", |h| h.cgroup_parent = Some("/".into())),
            ("SecurityOpt", |h| h.security_opt.as_mut().unwrap().push("seccomp=unconfined".into())),
            ("SecurityOpt", |h| h.security_opt = None),
            ("ReadonlyRootfs", |h| h.readonly_rootfs = Some(false)),
            ("Tmpfs", |h| drop(h.tmpfs.as_mut().unwrap().insert("/x".into(), String::new()))),
            ("Memory ", |h| h.memory = Some(0)),
            ("MemorySwap", |h| h.memory_swap = Some(-1)),
            ("MemorySwappiness", |h| h.memory_swappiness = Some(60)),
            ("NanoCpus", |h| h.nano_cpus = Some(2_000_000_000)),
            ("PidsLimit", |h| h.pids_limit = None),
            ("BlkioWeight", |h| h.blkio_weight = Some(1000)),
            ("OomKillDisable", |h| h.oom_kill_disable = Some(true)),
            ("OomScoreAdj", |h| h.oom_score_adj = Some(-500)),
            ("Ulimits", |h| drop(h.ulimits.as_mut().unwrap().pop())),
            ("Ulimits", |h| h.ulimits.as_mut().unwrap().push(ResourcesUlimits::default())),
            ("ShmSize", |h| h.shm_size = Some(64 << 20)),
            ("MaskedPaths", |h| h.masked_paths = Some(vec![])),
            ("ReadonlyPaths", |h| h.readonly_paths = None),
            ("Runtime", |h| h.runtime = Some("nvidia".into())),
            ("LogConfig", |h| h.log_config = None),
            ("RestartPolicy", |h| h.restart_policy.as_mut().unwrap().maximum_retry_count = Some(3)),
            ("AutoRemove", |h| h.auto_remove = Some(true)),
            ("GroupAdd", |h| h.group_add = Some(vec!["docker".into()])),
            ("PortBindings", |h| h.port_bindings = Some([("80/tcp".to_owned(), None)].into())),
            ("PublishAllPorts", |h| h.publish_all_ports = Some(true)),
            ("Sysctls", |h| h.sysctls = Some([("net.x".to_owned(), "1".to_owned())].into())),
            ("ExtraHosts", |h| h.extra_hosts = Some(vec!["a:127.0.0.1".into()])),
            ("Init", |h| h.init = None),
        ];
        let plan = planned(&specification(), &image()).unwrap();
        for (name, spoil) in cases {
            let mut report = good(&plan);
            spoil(report.host_config.as_mut().unwrap());
            let found = differences(&plan, &report);
            assert!(
                found.len() == 1 && format!("{} ", found[0]).contains(name)
                    || found.len() > 1 && found.iter().all(|d| d.contains(name)),
                "{name}: {found:?}"
            );
        }
    }

    #[test]
    fn v4_what_was_granted_is_compared_too() {
        let asked = Specification {
            user: User::Root,
            capabilities: [Capability::Chown, Capability::Kill].into(),
            writable: vec!["/data=16m".parse().unwrap()],
            writable_root: Some(ByteSize::mebibytes(64)),
            ..specification()
        };
        let plan = planned(&asked, &image()).unwrap();
        let mut report = good(&plan);
        report.host_config.as_mut().unwrap().cap_add = Some(vec!["CAP_KILL".into(), "CHOWN".into()]);
        assert_eq!(differences(&plan, &report), Vec::<String>::new());
        let cases: &[(&str, Spoil)] = &[
            ("CapAdd", |h| h.cap_add.as_mut().unwrap().push("SETUID".into())),
            ("CapAdd", |h| h.cap_add = Some(vec!["ALL".into()])),
            ("CapAdd", |h| h.cap_add = None),
            ("StorageOpt", |h| h.storage_opt = None),
            ("StorageOpt", |h| h.storage_opt = Some([("size".to_owned(), "0".to_owned())].into())),
            ("ReadonlyRootfs", |h| h.readonly_rootfs = Some(true)),
            ("Tmpfs", |h| drop(h.tmpfs.as_mut().unwrap().insert("/data".into(), "rw,size=1g".into()))),
        ];
        for (name, spoil) in cases {
            let mut report = good(&plan);
            spoil(report.host_config.as_mut().unwrap());
            let found = differences(&plan, &report);
            assert!(found.len() == 1 && found[0].contains(name), "{name}: {found:?}");
        }
    }

    #[test]
    fn i2_v4n_mounts_ports_networks_user_and_image_are_checked() {
        type SpoilReport = fn(&mut ContainerInspectResponse);
        let cases: &[(&str, SpoilReport)] = &[
            ("mounted at /data", |r| {
                let (typ, destination) = (Some("volume".to_owned()), Some("/data".to_owned()));
                r.mounts = Some(vec![MountPoint { typ, destination, ..MountPoint::default() }]);
            }),
            ("port", |r| {
                let bindings = Some(vec![PortBinding::default()]);
                r.network_settings.as_mut().unwrap().ports = Some([("80/tcp".to_owned(), bindings)].into());
            }),
            ("network bridge", |r| {
                r.network_settings.as_mut().unwrap().networks =
                    Some([("bridge".to_owned(), EndpointSettings::default())].into());
            }),
            ("User", |r| r.config.as_mut().unwrap().user = Some("0".into())),
            ("Healthcheck", |r| r.config.as_mut().unwrap().healthcheck = None),
            ("image", |r| r.image = Some("sha256:00".into())),
            ("name", |r| r.name = None),
            ("options", |r| r.host_config = None),
            ("configuration", |r| r.config = None),
            (profile::OWNER_LABEL, |r| drop(r.config.as_mut().unwrap().labels.take())),
        ];
        let plan = planned(&specification(), &image()).unwrap();
        for (name, spoil) in cases {
            let mut report = good(&plan);
            spoil(&mut report);
            let found = differences(&plan, &report);
            assert!(found.iter().any(|difference| difference.contains(name)), "{name}: {found:?}");
        }
    }
}
