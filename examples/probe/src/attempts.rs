//! The attempts of a guest that looks for a way out. Each is one system call or one look at a file.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read},
    net::{TcpStream, ToSocketAddrs, UdpSocket},
    os::unix::{fs::FileTypeExt, net::UnixStream},
    path::Path,
    time::Duration,
};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        ptrace,
        socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket},
        stat::{Mode, SFlag, makedev, mknod},
    },
    unistd::{Uid, chroot, getppid, sethostname, setuid},
};
use serde_json::{Value, json};

use crate::Report;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const WRITES: [&str; 9] = [
    "/probe-write",
    "/etc/probe-write",
    "/usr/probe-write",
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/net/ipv4/ip_forward",
    "/proc/sysrq-trigger",
    "/sys/kernel/uevent_helper",
    "/sys/fs/cgroup/probe-write",
    "/dev/probe-write",
];
const READS: [&str; 7] = [
    "/proc/keys",
    "/proc/kcore",
    "/proc/kallsyms",
    "/proc/timer_list",
    "/proc/sched_debug",
    "/sys/firmware",
    "/sys/kernel/security",
];
const ENGINE_SOCKETS: [&str; 4] = [
    "/var/run/docker.sock",
    "/run/docker.sock",
    "/run/containerd/containerd.sock",
    "/run/docker/containerd/containerd.sock",
];

/// Runs all of them.
pub(crate) fn run(report: &Report) {
    facts(report);
    files(report);
    processes(report);
    networks(report);
    privileges(report);
}

/// What this process is; these always succeed, the test judges the values.
fn facts(report: &Report) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    for name in ["Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp"] {
        let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        report.attempt(&format!("status_{name}"), value.map(str::trim).ok_or("not in /proc/self/status"));
    }
    report.attempt("devices", list("/dev"));
    report.attempt("block_devices", list_block_devices());
    let interfaces = fs::read_to_string("/proc/net/dev").map(|text| {
        let names = text.lines().filter_map(|line| Some(line.split_once(':')?.0.trim()));
        names.collect::<Value>()
    });
    report.attempt("interfaces", interfaces);
    report.attempt("mounts", fs::read_to_string("/proc/self/mounts").map(|text| text.lines().collect::<Value>()));
}

fn files(report: &Report) {
    for path in WRITES {
        let written = if path.ends_with("probe-write") {
            OpenOptions::new().write(true).create_new(true).open(path).inspect(|_| drop(fs::remove_file(path)))
        } else {
            OpenOptions::new().write(true).open(path)
        };
        report.attempt(&format!("write {path}"), written.map(|_| "opened"));
    }
    for path in READS {
        report.attempt(&format!("read {path}"), read_some(Path::new(path)));
    }
    for path in ENGINE_SOCKETS {
        report.attempt(&format!("connect {path}"), UnixStream::connect(path).map(|_| "connected"));
    }
}

fn processes(report: &Report) {
    let names = list("/proc").map(|names| {
        let numbers = names.into_iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
        let named = numbers.map(|id| {
            let name = fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
            json!({ "id": id, "name": name.trim() })
        });
        named.collect::<Value>()
    });
    report.attempt("processes", names);
    report.attempt("root_of_init", fs::read_dir("/proc/1/root/").map(|_| "opened"));
    report.attempt("memory_of_parent", fs::File::open(format!("/proc/{}/mem", getppid())).map(|_| "opened"));
}

fn networks(report: &Report) {
    let sockets = [
        ("socket_raw", AddressFamily::Inet, SockType::Raw, Some(SockProtocol::Icmp)),
        ("socket_packet", AddressFamily::Packet, SockType::Raw, Some(SockProtocol::EthAll)),
        ("socket_vsock", AddressFamily::Vsock, SockType::Stream, None),
        ("socket_netfilter", AddressFamily::Netlink, SockType::Raw, Some(SockProtocol::NetlinkNetFilter)),
    ];
    for (name, family, kind, protocol) in sockets {
        report.attempt(name, socket(family, kind, SockFlag::empty(), protocol).map(|_| "opened"));
    }
    let targets = std::env::var("PROBE_TARGETS").unwrap_or_default();
    for target in targets.split(',').map(str::trim).filter(|target| !target.is_empty()) {
        report.attempt(&format!("connect {target}"), connect(target));
        report.attempt(&format!("send {target}"), send(target));
    }
}

fn privileges(report: &Report) {
    let none = None::<&str>;
    report.attempt("mount_tmpfs", done(mount(Some("tmpfs"), "/tmp", Some("tmpfs"), MsFlags::empty(), none)));
    report.attempt("mount_proc", done(mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)));
    report.attempt("remount_root", done(mount(none, "/", none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND, none)));
    for (name, kind, major, minor) in [("mknod_block", SFlag::S_IFBLK, 8, 0), ("mknod_character", SFlag::S_IFCHR, 1, 1)]
    {
        let path = format!("/tmp/probe-{name}");
        let made = mknod(path.as_str(), kind, Mode::S_IRUSR | Mode::S_IWUSR, makedev(major, minor));
        report.attempt(name, done(made.inspect(|()| drop(fs::remove_file(&path)))));
    }
    report.attempt("sethostname", done(sethostname("probe")));
    let root =
        setuid(Uid::from_raw(0)).and_then(|()| if Uid::current().is_root() { Ok(()) } else { Err(Errno::EPERM) });
    report.attempt("become_root", done(root));
    // Seizing does not stop the traced process, so that a success harms nothing.
    report.attempt("ptrace_parent", done(ptrace::seize(getppid(), ptrace::Options::empty())));
    report.attempt("unshare_mount", done(unshare(CloneFlags::CLONE_NEWNS)));
    report.attempt("unshare_network", done(unshare(CloneFlags::CLONE_NEWNET)));
    report.attempt("unshare_user", done(unshare(CloneFlags::CLONE_NEWUSER)));
    report.attempt("chroot", done(chroot("/proc")));
}

fn done(result: Result<(), Errno>) -> Result<&'static str, Errno> {
    result.map(|()| "done")
}

fn list(path: &str) -> io::Result<Vec<String>> {
    let mut names: Vec<String> =
        fs::read_dir(path)?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

fn list_block_devices() -> io::Result<Vec<String>> {
    let entries = fs::read_dir("/dev")?.flatten();
    let blocks = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_block_device()));
    Ok(blocks.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

/// Reading is a success only when bytes or names come: a masked path is an empty device or an empty directory.
fn read_some(path: &Path) -> io::Result<String> {
    if path.is_dir() {
        return match fs::read_dir(path)?.next() {
            Some(_) => Ok("has entries".to_owned()),
            None => Err(io::Error::other("empty directory")),
        };
    }
    let mut block = [0; 256];
    match fs::File::open(path)?.read(&mut block)? {
        0 => Err(io::Error::other("empty file")),
        count => Ok(format!("{count} bytes")),
    }
}

fn connect(target: &str) -> io::Result<&'static str> {
    let address = target.to_socket_addrs()?.next().ok_or_else(|| io::Error::other("no address"))?;
    TcpStream::connect_timeout(&address, CONNECT_TIMEOUT).map(|_| "connected")
}

fn send(target: &str) -> io::Result<&'static str> {
    UdpSocket::bind("0.0.0.0:0")?.send_to(b"probe", target).map(|_| "sent")
}
