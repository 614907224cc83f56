//! What a hostile guest finds inside its container (V4, V4n, V5, I1, I2), and what the engine says of it from outside.

use std::net::{TcpListener, UdpSocket};

use serde_json::{Value, json};

use crate::world::{Pair, Trio, docker, eventually, probe, salted, shell};

/// Facts that may be read inside, and what concerns nothing but the guest's own processes.
const HARMLESS: [&str; 8] =
    ["status_", "devices", "block_devices", "interfaces", "mounts", "processes", "root_of_init", "memory_of_parent"];

/// The report of a probe that runs under this name.
pub(crate) fn report(pair: &Pair, name: &str) -> Vec<Value> {
    let forward = pair.alice.forward(name, 8080);
    let answer = eventually("the probe answers", || Some(forward.get("/")).filter(|answer| answer.status == 200));
    serde_json::from_slice(&answer.body).unwrap()
}

fn detail<'a>(report: &'a [Value], probe: &str) -> &'a Value {
    &report.iter().find(|line| line["probe"] == probe).unwrap_or_else(|| panic!("no {probe} in {report:?}"))["detail"]
}

/// Deploys the probe in one of its modes.
fn deploy(pair: &Pair, name: &str, flags: &[&str]) -> String {
    let flags = [&["--expose", "8080", "--no-publish", "--cpu", "0.3"], flags].concat();
    pair.alice.deploy_to("bob", &pair.files.write(&probe()), name, &flags)
}

/// Addresses that a guest must not reach: a service on every address of this machine, the LAN, metadata, the internet.
pub(crate) fn targets(port: u16) -> String {
    let own = UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect("192.0.2.1:9")?;
        socket.local_addr()
    });
    let own = own.map_or_else(|_| "127.0.0.1".to_owned(), |address| address.ip().to_string());
    let bridge = "172.17.0.1";
    [
        own.as_str(),
        bridge,
        "169.254.169.254",
        "10.0.0.1",
        "192.168.0.1",
        "1.1.1.1",
        "8.8.8.8",
        "[fe80::1]",
        "[2001:db8::1]",
    ]
    .map(|host| format!("{host}:{port}"))
    .join(",")
}

/// Nothing succeeded of what the probe tried.
pub(crate) fn assert_nothing_reached(report: &[Value]) {
    for line in report {
        let name = line["probe"].as_str().unwrap();
        // The kernel names its symbols here, without their addresses.
        let expected = HARMLESS.iter().any(|harmless| name.starts_with(harmless)) || name == "read /proc/kallsyms";
        assert!(expected || line["succeeded"] == false, "{line}");
    }
}

#[test]
fn v4_v4n_a_guest_reaches_nothing_outside_its_container() {
    let pair = Pair::start();
    let service = TcpListener::bind("0.0.0.0:0").unwrap();
    service.set_nonblocking(true).unwrap();
    pair.hello("neighbour", &["--expose", "8080", "--no-publish", "--cpu", "0.2"]);
    let targets = format!("PROBE_TARGETS={}", targets(service.local_addr().unwrap().port()));
    deploy(&pair, "probe", &["-e", &targets]);
    let report = report(&pair, "probe");
    assert_nothing_reached(&report);
    for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(detail(&report, &format!("status_{name}")), "0000000000000000");
    }
    assert_eq!(detail(&report, "status_NoNewPrivs"), "1");
    assert_eq!(detail(&report, "status_Seccomp"), "2");
    assert!(!detail(&report, "status_Uid").as_str().unwrap().split_whitespace().any(|uid| uid == "0"));
    assert_eq!(detail(&report, "block_devices"), &json!([]));
    assert_eq!(detail(&report, "interfaces"), &json!(["lo"]));
    let processes = detail(&report, "processes").as_array().unwrap();
    let names: Vec<_> = processes.iter().map(|process| process["name"].as_str().unwrap()).collect();
    assert!(names.iter().all(|name| ["probe", "docker-init", "tini"].contains(name)), "{names:?}");
    let devices = detail(&report, "devices").to_string();
    for device in ["mem", "kmsg", "sda", "vda", "fuse", "kvm", "net"] {
        assert!(!devices.contains(&format!("\"{device}\"")), "{devices}");
    }
    let mounts = detail(&report, "mounts").as_array().unwrap();
    let root = mounts.iter().find(|line| line.as_str().unwrap().split(' ').nth(1) == Some("/")).unwrap();
    assert!(root.as_str().unwrap().split(' ').nth(3).unwrap().split(',').any(|option| option == "ro"), "{root}");
    assert!(service.accept().is_err(), "the host's service was reached");
}

#[test]
fn v4_every_deployment_has_a_user_of_its_own() {
    let pair = Pair::start();
    let mut uids = Vec::new();
    for name in ["one", "two"] {
        deploy(&pair, name, &[]);
        let report = report(&pair, name);
        let ids = ["status_Uid", "status_Gid"].map(|probe| {
            let text = detail(&report, probe).as_str().unwrap();
            text.split_whitespace().next().unwrap().parse::<u32>().unwrap()
        });
        assert!(ids[0] == ids[1] && ids[0] >= 10_000, "{ids:?}");
        uids.push(ids[0]);
    }
    assert_ne!(uids[0], uids[1]);
}

#[test]
fn i1_i2_the_engine_confirms_the_whole_profile() {
    let pair = Pair::start();
    let flags = ["--expose", "8080", "--no-publish", "--memory", "100m", "--cpu", "0.25", "--pids", "50"];
    pair.hello("web", &[&flags[..], &["--files", "300", "--scratch", "8m", "--restart", "always"]].concat());
    let container = pair.bob.containers().pop().unwrap();
    let inspected: Value = serde_json::from_str(&docker(&["inspect", &container])).unwrap();
    let (host, config) = (&inspected[0]["HostConfig"], &inspected[0]["Config"]);
    for (field, value) in [
        ("Privileged", json!(false)),
        ("ReadonlyRootfs", json!(true)),
        ("NetworkMode", json!("none")),
        ("CapDrop", json!(["ALL"])),
        ("Memory", json!(100 << 20)),
        ("MemorySwap", json!(100 << 20)),
        ("NanoCpus", json!(250_000_000)),
        ("PidsLimit", json!(50)),
        ("AutoRemove", json!(false)),
        ("PublishAllPorts", json!(false)),
    ] {
        assert_eq!(host[field], value, "{field}");
    }
    let empty = |value: &Value| value.is_null() || value == &json!([]) || value == &json!({}) || value == "";
    let none = ["CapAdd", "Binds", "Mounts", "Devices", "DeviceRequests", "PortBindings", "VolumesFrom", "PidMode"];
    for field in none.iter().chain(&["UTSMode", "UsernsMode", "GroupAdd", "ExtraHosts", "Links", "Sysctls"]) {
        assert!(empty(&host[field]), "{field}: {}", host[field]);
    }
    assert!(host["SecurityOpt"].to_string().contains("no-new-privileges"));
    assert!(!host["SecurityOpt"].to_string().contains("unconfined"));
    assert_eq!(host["RestartPolicy"]["Name"], "no", "the daemon restarts, not the engine");
    assert!(host["LogConfig"]["Config"]["max-size"].is_string());
    assert!(host["Tmpfs"]["/tmp"].as_str().unwrap().contains("size=8388608"));
    assert!(inspected[0]["Mounts"].as_array().unwrap().is_empty());
    assert!(!host["MaskedPaths"].as_array().unwrap().is_empty());
    let uid = config["User"].as_str().unwrap().split(':').next().unwrap().parse::<u32>().unwrap();
    assert!(uid >= 10_000, "{uid}");
}

#[test]
fn v4_an_image_cannot_widen_anything() {
    let pair = Pair::start();
    let volumes = docker(&["volume", "ls", "--quiet"]);
    let image = salted("probe")
        .volume("/data")
        .volume("/tmp")
        .healthcheck(&["/probe"])
        .user("0:0")
        .label("peer-compute.node", "somebody")
        .label("peer-compute.owner", "somebody")
        .configuration("StopSignal", json!("SIGKILL"));
    let flags = ["--expose", "8080", "--no-publish", "--scratch", "4m"];
    pair.alice.deploy_to("bob", &pair.files.write(&image.build().unwrap()), "sly", &flags);
    let container = pair.bob.containers().pop().expect("it is marked as bob's");
    let inspected: Value = serde_json::from_str(&docker(&["inspect", &container])).unwrap();
    let (host, config) = (&inspected[0]["HostConfig"], &inspected[0]["Config"]);
    assert_ne!(config["User"], "0:0");
    assert_eq!(config["Labels"]["peer-compute.owner"], pair.alice.peer_id.as_str());
    assert_eq!(config["Healthcheck"]["Test"], json!(["NONE"]));
    assert!(inspected[0]["Mounts"].as_array().unwrap().iter().all(|mount| mount["Type"] == "tmpfs"), "{inspected}");
    assert!(host["Tmpfs"]["/data"].as_str().unwrap().contains("size=4194304"));
    assert_eq!(docker(&["volume", "ls", "--quiet"]), volumes);
    let report = report(&pair, "sly");
    assert_eq!(detail(&report, "status_CapEff"), "0000000000000000");

    let image = salted("hello").volume("/proc").build().unwrap();
    let archive = pair.files.write(&image);
    let refused = pair.alice.try_ctl(&["deploy", &archive, "--peer", "bob", "--name", "kernel"]);
    assert!(refused.refused("invalid_image", 2).contains("/proc"));
}

#[test]
fn v5_a_fork_bomb_and_a_cpu_hog_stay_inside_their_limits() {
    let trio = Trio::start();
    let pair = &trio.pair;
    let (_, url) = trio.hello("web", &["--cpu", "0.3", "--memory", "64m"]);
    deploy(pair, "forks", &["-e", "PROBE_MODE=forks", "-e", "PROBE_SECONDS=20", "--pids", "40", "--memory", "128m"]);
    deploy(pair, "cpu", &["-e", "PROBE_MODE=cpu", "-e", "PROBE_SECONDS=20", "--memory", "64m"]);
    let bomb = eventually("the bomb has gone off", || {
        let report = report(pair, "forks");
        report.into_iter().find(|line| line["probe"] == "forks")
    });
    assert_eq!(bomb["succeeded"], false, "{bomb}");
    assert!(bomb["detail"]["started"].as_u64().unwrap() < 40, "{bomb}");
    let usage = pair.alice.json(&["stats", "forks", "--no-stream"]);
    assert!(usage["pids"].as_u64().unwrap() <= 40 && usage["pids_limit"] == 40, "{usage}");
    let usage = pair.alice.json(&["stats", "cpu", "--no-stream"]);
    assert!(usage["cpu_millicores"].as_u64().unwrap() <= 450, "{usage}");
    for _ in 0..10 {
        assert_eq!(trio.gate.get(&url, "/").status, 200);
    }
}

#[test]
fn v5_a_memory_hog_fails_and_says_so() {
    let pair = Pair::start();
    pair.hello("web", &["--expose", "8080", "--no-publish", "--cpu", "0.3"]);
    let archive = pair.files.write(&probe());
    let flags = ["--name", "hog", "-e", "PROBE_MODE=memory", "--memory", "32m", "--detach"];
    pair.alice.try_ctl(&[&["deploy", &archive, "--peer", "bob"], &flags[..]].concat());
    let status = pair.alice.wait_for_state("hog", "failed");
    assert_eq!(status["problem"]["code"], "container_exited");
    let sentence = status["problem"]["message"].as_str().unwrap();
    assert!(sentence.contains("memory") && sentence.contains("32"), "{sentence}");
    assert_eq!(pair.alice.forward("web", 8080).get("/").status, 200);
}

#[test]
fn v5_a_disk_filler_meets_its_end_in_memory_of_its_own() {
    let pair = Pair::start();
    pair.hello("web", &["--expose", "8080", "--no-publish", "--cpu", "0.3"]);
    deploy(&pair, "filler", &["-e", "PROBE_MODE=disk", "--scratch", "8m", "--memory", "200m"]);
    let report = eventually("the disk is full", || {
        let report = report(&pair, "filler");
        report.iter().any(|line| line["probe"] == "disk /var/tmp").then_some(report)
    });
    let places = report.iter().filter(|line| line["probe"].as_str().unwrap().starts_with("disk "));
    for line in places {
        let written = &line["detail"]["bytes"];
        assert!(line["succeeded"] == false || written.as_u64().unwrap() <= 64 << 20, "{line}");
        let writable = ["disk /tmp", "disk /run", "disk /dev/shm", "disk /dev/mqueue"];
        assert!(line["succeeded"] == false || writable.contains(&line["probe"].as_str().unwrap()), "{line}");
    }
    assert!(detail(&report, "disk /tmp")["bytes"].as_u64().unwrap() <= 8 << 20);
    assert_eq!(pair.alice.forward("web", 8080).get("/").status, 200);
}

#[test]
fn v5_a_flood_of_log_lines_ends_the_flooder_alone() {
    let pair = Pair::start();
    pair.hello("web", &["--expose", "8080", "--no-publish", "--cpu", "0.3"]);
    deploy(&pair, "flood", &["-e", "PROBE_MODE=flood", "-e", "PROBE_SECONDS=120"]);
    let status = pair.alice.wait_for_state("flood", "failed");
    assert_eq!(status["problem"]["code"], "log_flood", "{status}");
    assert_eq!(pair.alice.forward("web", 8080).get("/").status, 200);
    assert_eq!(pair.alice.ctl(&["logs", "flood", "--tail", "5"]).stdout.lines().count(), 5);
}

#[test]
fn v5_a_flood_in_short_runs_is_found_too() {
    let pair = Pair::start();
    let archive = pair.files.write(&shell("seq 1 100000000 & sleep 3; exit 1"));
    let flags = ["--peer", "bob", "--name", "flood", "--restart", "always", "--cpu", "0.3", "--detach"];
    pair.alice.ctl(&[&["deploy", &archive], &flags[..]].concat());
    let status = pair.alice.wait_for_state("flood", "failed");
    assert_eq!(status["problem"]["code"], "log_flood", "{status}");
}

macro_rules! calls {
    ($($call:ident)*) => { [$((stringify!($call), libc::$call)),*] };
}

/// Calls that no guest may make, among them each that has opened a way out of containers before.
const FORBIDDEN: [(&str, i64); 72] = calls! {
    SYS_acct SYS_add_key SYS_adjtimex SYS_bpf SYS_chroot SYS_clock_adjtime SYS_clock_settime SYS_clone3 SYS_delete_module
    SYS_fanotify_init SYS_fanotify_mark SYS_finit_module SYS_fsconfig SYS_fsmount SYS_fsopen SYS_fspick SYS_get_mempolicy
    SYS_init_module SYS_io_cancel SYS_io_destroy SYS_io_getevents SYS_io_setup SYS_io_submit SYS_io_uring_enter
    SYS_io_uring_register SYS_io_uring_setup SYS_kcmp SYS_kexec_load SYS_keyctl SYS_mbind SYS_migrate_pages SYS_mount
    SYS_mount_setattr SYS_move_mount SYS_move_pages SYS_name_to_handle_at SYS_nfsservctl SYS_open_by_handle_at
    SYS_open_tree SYS_perf_event_open SYS_personality SYS_pidfd_getfd SYS_pivot_root SYS_process_madvise
    SYS_process_vm_readv SYS_process_vm_writev SYS_ptrace SYS_quotactl SYS_quotactl_fd SYS_reboot SYS_request_key
    SYS_set_mempolicy SYS_setdomainname SYS_sethostname SYS_setns SYS_settimeofday SYS_swapoff SYS_swapon SYS_syslog
    SYS_umount2 SYS_unshare SYS_userfaultfd SYS_vhangup SYS_vmsplice SYS_memfd_secret SYS_process_mrelease
    SYS_set_mempolicy_home_node SYS_socket SYS_socketpair SYS_clone SYS_lookup_dcookie SYS_remap_file_pages
};

#[test]
fn v4_a_guest_makes_no_call_beyond_the_profile() {
    let pair = Pair::start();
    let families: Vec<_> = (0..46).filter(|family| ![1, 2, 10].contains(family)).collect();
    let namespaces = [0x2_0000_u32, 0x200_0000, 0x400_0000, 0x800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000];
    let mut attempts: Vec<String> = FORBIDDEN.iter().map(|(_, number)| number.to_string()).collect();
    attempts.extend(families.iter().map(|family| format!("socket:{family}")));
    attempts.extend(namespaces.iter().map(|flag| format!("clone:{flag}")));
    let arguments: Vec<&str> = attempts.iter().map(String::as_str).collect();
    let image = salted("syscalls").build().unwrap();
    let archive = pair.files.write(&image);
    let said = |name: &str, arguments: &[&str]| {
        pair.alice
            .ctl(&[&["deploy", &archive, "--peer", "bob", "--name", name, "--", "/syscalls"], arguments].concat());
        eventually("it ends", || (pair.alice.json(&["status", name])["state"] == "stopped").then_some(()));
        pair.alice.ctl(&["logs", name]).stdout
    };
    let name_of = |line: &str| {
        let number = line.split(' ').next().and_then(|number| number.parse::<i64>().ok());
        FORBIDDEN.iter().find(|(_, one)| Some(*one) == number).map_or("", |(name, _)| name).to_owned()
    };
    let inside = said("inside", &arguments);
    assert_eq!(inside.lines().count(), attempts.len(), "{inside}");
    for line in inside.lines() {
        let refused = ["errno 1", "errno 38", "errno 97"].iter().any(|end| line.ends_with(end));
        assert!(refused, "{line} {}", name_of(line));
    }
    // What programs need is there; and the 32-bit entry ends whoever takes it.
    let needed = said("needed", &["socket:1", "socket:2", "socket:10", "clone:0", "int80", "socket:2"]);
    let kills = if cfg!(target_arch = "x86_64") { "int80 signal 31" } else { "int80 errno" };
    let expected = ["socket:1 ok", "socket:2 ok", "socket:10 ok", "clone:0 ok", kills, "socket:2 ok"];
    for (line, expected) in needed.lines().zip(expected) {
        assert!(line.starts_with(expected), "{needed}");
    }

    // The same program in a plain container of the same engine, as the same kind of user: most of it reaches the kernel.
    let plain = ["run", "--rm", "--network=none", "--user=200000:200000", "--security-opt=seccomp=unconfined"];
    let id = image.id().to_string();
    let outside = docker(&[&plain[..], &[&id, "/syscalls"], &arguments].concat());
    let reached =
        outside.lines().filter(|line| !["errno 1", "errno 38", "errno 97"].iter().any(|end| line.ends_with(end)));
    assert!(reached.count() >= 20, "{outside}");
}
