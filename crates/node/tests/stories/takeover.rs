//! Somebody has taken over the process that hears from other machines: a debugger makes calls in its name.

use std::process::{Child, Command, Stdio};

use crate::world::{Machine, Output, eventually};

const ENGINE: &str = "/var/run/docker.sock";

/// What is tried, each a C expression that gives a negative number when it is refused. `$engine` is the engine's address.
fn attempts(runner: u32) -> Vec<String> {
    vec![
        "((int (*)(int, void *, int))connect)((int)socket(1, 1, 0), $engine, 110)".into(),
        "(int)socket(1, 1, 0)".into(),
        "(int)socket(1, 2, 0)".into(),
        "(int)socketpair(1, 2, 0, (int*)malloc(8))".into(),
        "(int)open(\"/etc/shadow\", 0)".into(),
        "(int)open(\"/run\", 0x10000)".into(),
        "(int)creat(\"/tmp/taken-over\", 0600)".into(),
        "(int)fork()".into(),
        format!("(int)kill({runner}, 0)"),
        format!("(long)ptrace(0x4206, {runner}, 0, 0)"),
    ]
}

/// Has the process evaluate each expression, and gives what came of it.
fn evaluate(process: u32, expressions: &[String]) -> Vec<i64> {
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch", "-p", &process.to_string(), "-ex", "set debuginfod enabled off"]);
    for signal in ["SIGCHLD", "SIGTERM"] {
        gdb.args(["-ex", &format!("handle {signal} nostop noprint pass")]);
    }
    gdb.args(["-ex", "set $engine = (char *)calloc(1, 110)", "-ex", "set *(short *)$engine = 1"]);
    for (place, byte) in ENGINE.bytes().enumerate() {
        gdb.args(["-ex", &format!("set *(char *)($engine + {}) = {byte}", place + 2)]);
    }
    for expression in expressions {
        gdb.args(["-ex", &format!("print {expression}")]);
    }
    let output = Output::of(&mut gdb);
    let results: Vec<_> = output
        .stdout
        .lines()
        .filter_map(|line| line.strip_prefix('$')?.split_once(" = ")?.1.trim().parse().ok())
        .collect();
    assert_eq!(results.len(), expressions.len(), "{output:?}");
    results
}

/// The descriptors of a process that are sockets.
fn sockets(process: u32) -> Vec<u32> {
    let entries = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().map(|entry| entry.unwrap());
    let is_socket = |entry: &std::fs::DirEntry| {
        std::fs::read_link(entry.path()).is_ok_and(|target| target.to_string_lossy().starts_with("socket:"))
    };
    entries.filter(is_socket).map(|entry| entry.file_name().to_str().unwrap().parse().unwrap()).collect()
}

/// The network process of this machine.
fn network_process(machine: &Machine) -> u32 {
    let runner = machine.pid();
    let children = std::fs::read_to_string(format!("/proc/{runner}/task/{runner}/children")).unwrap();
    let is_ours =
        |child: &u32| std::fs::read(format!("/proc/{child}/cmdline")).unwrap().ends_with(b"\0network-process\0");
    children.split_whitespace().map(|child| child.parse().unwrap()).find(is_ours).unwrap()
}

struct Plain(Child);

impl Drop for Plain {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn i2_v4_whoever_takes_over_the_network_process_finds_no_engine() {
    let machine = Machine::start("machine");
    let network = network_process(&machine);
    let attempts = attempts(machine.pid());

    let plain = Plain(Command::new("sleep").arg("600").stdout(Stdio::null()).spawn().unwrap());
    for (attempt, result) in attempts.iter().zip(evaluate(plain.0.id(), &attempts)) {
        assert!(result >= 0, "a plain process of the same user can: {attempt} gave {result}");
    }
    drop(plain);
    drop(std::fs::remove_file("/tmp/taken-over"));

    let mut attempts = attempts;
    attempts.push("(int)execve(\"/bin/true\", 0, 0)".into());
    let sockets = sockets(network);
    assert!(sockets.len() > 2, "{sockets:?}");
    attempts
        .extend(sockets.iter().map(|socket| format!("((int (*)(int, void *, int))connect)({socket}, $engine, 110)")));
    for (attempt, result) in attempts.iter().zip(evaluate(network, &attempts)) {
        assert!(result < 0, "{attempt} gave {result}");
    }
    let status = std::fs::read_to_string(format!("/proc/{network}/status")).unwrap();
    for line in ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line}: {status}");
    }
    assert_eq!(machine.json(&["status"])["engine"]["problem"], serde_json::Value::Null);
}

#[test]
fn neither_process_goes_on_without_the_other() {
    let mut machine = Machine::without_engine("machine");
    let network = network_process(&machine);
    machine.kill();
    eventually("the network process is gone", || {
        (!std::path::Path::new(&format!("/proc/{network}")).exists()).then_some(())
    });
    machine.up();
    // A fault, which leaves no copy of its memory behind.
    let network = network_process(&machine);
    let limits = std::fs::read_to_string(format!("/proc/{network}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{core}");
    let network = rustix::process::Pid::from_raw(network.try_into().unwrap()).unwrap();
    rustix::process::kill_process(network, rustix::process::Signal::ABORT).unwrap();
    let ended = machine.ended();
    assert_eq!(ended.status, 1, "{ended:?}");
    assert!(ended.stderr.contains("ended by signal 6"), "{ended:?}");
}

#[test]
fn i2_v4_the_network_process_may_be_a_user_without_rights() {
    let mut machine = Machine::prepared("machine", &["--user", "nobody"]);
    // Whoever runs the tests keeps others out of his files.
    let above = machine.data().parent().unwrap().to_owned();
    std::fs::set_permissions(above, std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    machine.up();
    machine.init();
    let status = std::fs::read_to_string(format!("/proc/{}/status", network_process(&machine))).unwrap();
    let nobody = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(machine.data()).unwrap());
    assert!(nobody != 0 && status.contains(&format!("Uid:\t{nobody}\t{nobody}\t{nobody}\t{nobody}\n")), "{status}");
    assert!(status.contains("Groups:\t \n") || status.contains("Groups:\t\n"), "{status}");
    assert_eq!(machine.json(&["status"])["engine"]["problem"], serde_json::Value::Null);
    let doctor = machine.try_ctl(&["doctor", "--json"]);
    assert!(!doctor.stdout.contains("\"failure\""), "{doctor:?}");
    machine.stop();
    machine.up();

    // What an earlier daemon has left as root's own is not taken over by itself.
    let mut former = Machine::without_engine("former");
    former.stop();
    former.argue(&["--user", "nobody"]);
    let ended = former.launch().end();
    assert_eq!(ended.status, 1, "{ended:?}");
    assert!(ended.stderr.contains("chown -R"), "{ended:?}");
}
