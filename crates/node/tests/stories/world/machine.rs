//! One `peerd` with its directories, and `peerctl` that speaks to it.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use peer_compute::wall::rules::{Ruleset, Tag};
use peer_state::rusqlite::Connection;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use super::{Answer, docker, docker_try, eventually, free_port};

/// Longest run of one `peerctl`.
const COMMAND_MAX: Duration = Duration::from_mins(2);

/// How a program ended, and what it printed.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) status: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Output {
    /// Runs a program to its end.
    pub(crate) fn of(command: &mut Command) -> Self {
        Running::start(command).end()
    }

    pub(crate) fn success(self) -> Self {
        assert_eq!(self.status, 0, "it failed: {}{}", self.stdout, self.stderr);
        self
    }

    /// Asserts that it failed with this stable code and exit status, and gives the sentence.
    #[track_caller]
    pub(crate) fn refused(self, code: &str, status: i32) -> String {
        assert!(self.stderr.contains(&format!("code: {code}\n")), "not {code}: {self:?}");
        assert_eq!(self.status, status, "{self:?}");
        self.stderr
    }

    /// The stable code that it failed with; empty if it did not.
    pub(crate) fn code(&self) -> &str {
        self.stderr.lines().find_map(|line| line.strip_prefix("code: ")).unwrap_or_default()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("not JSON ({error}): {self:?}"))
    }

    /// Every line as JSON.
    pub(crate) fn lines(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// A program under way, whose output is collected.
pub(crate) struct Running {
    child: Child,
    outputs: [PathBuf; 2],
    _directory: TempDir,
}

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let outputs = ["stdout", "stderr"].map(|name| directory.path().join(name));
        command.stdin(Stdio::null());
        command.stdout(File::create(&outputs[0]).unwrap()).stderr(File::create(&outputs[1]).unwrap());
        let child = command.spawn().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
        Self { child, outputs, _directory: directory }
    }

    /// What it has printed so far on standard output.
    pub(crate) fn stdout(&self) -> String {
        read(&self.outputs[0])
    }

    pub(crate) fn stderr(&self) -> String {
        read(&self.outputs[1])
    }

    pub(crate) fn is_over(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Waits for its end. One that does not end is a fault.
    pub(crate) fn end(mut self) -> Output {
        let end = Instant::now() + COMMAND_MAX;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > end => panic!("it does not end: {}{}", self.stdout(), self.stderr()),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        Output { status: status.code().unwrap_or(-1), stdout: self.stdout(), stderr: self.stderr() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A port on the loopback interface, for as long as this lives.
pub(crate) struct Forward {
    pub(crate) running: Running,
    pub(crate) address: String,
}

impl Forward {
    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(COMMAND_MAX)).unwrap();
        stream
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        let mut stream = self.connect();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        Answer::read(&mut stream)
    }

    /// Whether a page comes at all: while a provider comes back, connections are cut.
    pub(crate) fn answers(&self, path: &str) -> bool {
        let mut stream = self.connect();
        let mut answer = String::new();
        let asked = write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        asked.and_then(|()| stream.read_to_string(&mut answer)).is_ok() && answer.starts_with("HTTP/1.1 200")
    }
}

/// Removes the networks and the rules of a daemon that offered ways out on the machine that all tests share.
fn remove_ways_out(mark: &str) {
    let tag = Tag::of(mark);
    let networks = docker_try(&["network", "ls", "--format", "{{.Name}}"]).stdout;
    let ours: Vec<_> = networks.lines().filter(|network| tag.number_of(network).is_some()).collect();
    for network in &ours {
        docker_try(&["network", "rm", network]);
    }
    if !ours.is_empty() {
        drop(Command::new("nft").arg(Ruleset::removal(tag)).status());
    }
}

fn read(path: &Path) -> String {
    let mut bytes = Vec::new();
    File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A machine. Its containers and the images that it brought are removed from the shared engine with it.
pub(crate) struct Machine {
    pub(crate) name: String,
    pub(crate) peer_id: String,
    /// Address at which others reach it.
    pub(crate) address: String,
    root: TempDir,
    data: PathBuf,
    socket: PathBuf,
    arguments: Vec<String>,
    /// The network namespace in which the daemon runs, if it has one of its own.
    namespace: Option<String>,
    has_own_clock: bool,
    /// The user and group as which the daemon runs, if not as root.
    user: Option<(u32, u32)>,
    daemon: Option<Running>,
    has_engine: bool,
}

impl Machine {
    /// A machine with an identity and the shared engine.
    pub(crate) fn start(name: &str) -> Self {
        Self::with(name, &[])
    }

    /// A machine with an identity that runs nobody's containers.
    pub(crate) fn without_engine(name: &str) -> Self {
        Self::with(name, &["--engine", "none"])
    }

    /// A machine with an identity; these flags are `peerd`'s.
    pub(crate) fn with(name: &str, flags: &[&str]) -> Self {
        let mut machine = Self::bare(name, flags);
        machine.init();
        machine
    }

    /// A machine whose daemon runs in another network namespace, with an identity and no container engine of the test's.
    pub(crate) fn inside(network: &str, name: &str, flags: &[&str]) -> Self {
        let mut machine = Self::prepared(name, flags);
        (machine.namespace, machine.has_engine) = (Some(network.to_owned()), false);
        machine.up();
        machine.init();
        machine
    }

    /// A machine without an identity.
    pub(crate) fn bare(name: &str, flags: &[&str]) -> Self {
        let mut machine = Self::prepared(name, flags);
        machine.up();
        machine
    }

    /// A machine whose daemon has not been started.
    pub(crate) fn prepared(name: &str, flags: &[&str]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let address = format!("/ip4/127.0.0.1/tcp/{}", free_port());
        let (data, socket) = (root.path().join("data"), root.path().join("run/peerd.sock"));
        let mut arguments = vec!["--listen".into(), address.clone(), "--log".into(), "info".into()];
        arguments.extend(["--data-dir".into(), data.display().to_string()]);
        arguments.extend(["--socket".into(), socket.display().to_string()]);
        // The test of the wall starts a container of its own; who needs it asks for it.
        if !flags.contains(&"--egress") {
            arguments.extend(["--egress".into(), "off".into()]);
        }
        arguments.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let has_engine = !flags.contains(&"none");
        let (name, peer_id) = (name.to_owned(), String::new());
        let (namespace, user, daemon, has_own_clock) = (None, None, None, false);
        Self {
            name,
            peer_id,
            address,
            root,
            data,
            socket,
            arguments,
            namespace,
            has_own_clock,
            user,
            daemon,
            has_engine,
        }
    }

    /// Has the daemon run in this network namespace.
    pub(crate) fn within(mut self, namespace: &str) -> Self {
        self.namespace = Some(namespace.to_owned());
        self
    }

    /// Has somebody else start the daemon, with its data and its socket in these places.
    pub(crate) fn served(mut self, data: PathBuf, socket: PathBuf) -> Self {
        (self.data, self.socket) = (data, socket);
        self
    }

    /// Has the daemon run as a user without any rights but those of the group that the engine's socket belongs to.
    pub(crate) fn run_by(mut self, user: u32) -> Self {
        let group = std::fs::metadata("/var/run/docker.sock").unwrap().gid();
        chown(self.root.path(), Some(user), Some(group)).unwrap();
        self.user = Some((user, group));
        self
    }

    /// Gives the daemon a wall clock of its own from its next start on; it is right until it is set.
    pub(crate) fn with_own_clock(mut self) -> Self {
        self.has_own_clock = true;
        self.set_clock("+0");
        self
    }

    /// Sets the daemon's own clock, under the running daemon as well; `+30m` is half an hour ahead of the right time.
    pub(crate) fn set_clock(&self, shift: &str) {
        // Confined as it is, the daemon reads no place but its own.
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(self.data()).unwrap();
        let (next, file) = (self.data().join("clock.next"), self.clock());
        std::fs::write(&next, format!("{shift}\n")).unwrap();
        std::fs::rename(next, file).unwrap();
    }

    fn clock(&self) -> PathBuf {
        self.data().join("clock")
    }

    /// Copies the data directory, while the daemon is down.
    pub(crate) fn save_data(&self) {
        self.copy_data(&self.data(), &self.root.path().join("saved"));
    }

    /// Puts the copy in the place of the data directory, while the daemon is down. Its clock stays as it is.
    pub(crate) fn restore_data(&self) {
        let clock = std::fs::read(self.clock()).unwrap();
        std::fs::remove_dir_all(self.data()).unwrap();
        self.copy_data(&self.root.path().join("saved"), &self.data());
        std::fs::write(self.clock(), clock).unwrap();
    }

    fn copy_data(&self, from: &Path, to: &Path) {
        assert!(self.daemon.is_none(), "the daemon runs");
        Output::of(Command::new("cp").arg("-a").args([from, to])).success();
    }

    pub(crate) fn init(&mut self) {
        let reply = self.json(&["init", "--name", &self.name.clone()]);
        reply["peer_id"].as_str().unwrap().clone_into(&mut self.peer_id);
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.data.clone()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    /// Gives these flags to the daemon from its next start on.
    pub(crate) fn argue(&mut self, flags: &[&str]) {
        self.arguments.extend(flags.iter().map(|flag| (*flag).to_owned()));
    }

    /// Starts the daemon, without waiting for it.
    pub(crate) fn launch(&self) -> Running {
        let peerd = env!("CARGO_BIN_EXE_peerd");
        let mut command = match &self.namespace {
            // `ip netns exec` would mount a fresh /sys, in which no control groups are found.
            Some(namespace) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/run/netns/{namespace}")).arg(peerd);
                command
            }
            None => Command::new(peerd),
        };
        if let Some((user, group)) = self.user {
            command.uid(user).gid(group);
        }
        if self.has_own_clock {
            let library = format!("/usr/lib/{}-linux-gnu/faketime/libfaketimeMT.so.1", std::env::consts::ARCH);
            assert!(Path::new(&library).exists(), "there is no {library}: install faketime");
            command.env("LD_PRELOAD", library).env("FAKETIME_TIMESTAMP_FILE", self.clock());
            command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1").env("NO_FAKE_STAT", "1");
        }
        Running::start(command.args(&self.arguments))
    }

    /// Starts the daemon and waits until it answers.
    pub(crate) fn up(&mut self) {
        assert!(self.daemon.is_none(), "it runs already");
        self.daemon = Some(self.launch());
        eventually("the daemon answers", || {
            let daemon = self.daemon.as_mut().unwrap();
            assert!(!daemon.is_over(), "peerd ended: {}", daemon.stderr());
            (self.try_ctl(&["status"]).status == 0).then_some(())
        });
    }

    /// Ends the daemon as a power cut would.
    pub(crate) fn kill(&mut self) {
        self.daemon = None;
    }

    /// Asks the daemon to end, and waits until it has.
    pub(crate) fn stop(&mut self) -> Output {
        let daemon = self.daemon.take().expect("it runs");
        daemon.signal(Signal::TERM);
        daemon.end()
    }

    /// Waits for the daemon to end by itself.
    pub(crate) fn ended(&mut self) -> Output {
        self.daemon.take().expect("it runs").end()
    }

    /// Process id of the daemon.
    pub(crate) fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("it runs").child.id()
    }

    /// What the daemon has logged in this run.
    pub(crate) fn log(&self) -> String {
        self.daemon.as_ref().map(Running::stderr).unwrap_or_default()
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_peerctl"));
        command.args(arguments).env("PEER_SOCKET", self.socket()).env_remove("XDG_RUNTIME_DIR");
        command
    }

    /// Runs `peerctl` to its end.
    pub(crate) fn try_ctl(&self, arguments: &[&str]) -> Output {
        Output::of(&mut self.command(arguments))
    }

    /// Runs `peerctl`, which must succeed.
    #[track_caller]
    pub(crate) fn ctl(&self, arguments: &[&str]) -> Output {
        let output = self.try_ctl(arguments);
        assert_eq!(output.status, 0, "peerctl {arguments:?} on {}: {output:?}\n{}", self.name, self.log());
        output
    }

    /// Runs `peerctl --json`, which must succeed.
    #[track_caller]
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        // The flag stands first, because what follows a deployment's command belongs to the container.
        self.ctl(&[&["--json"], arguments].concat()).json()
    }

    /// Starts `peerctl` in the background.
    pub(crate) fn begin(&self, arguments: &[&str]) -> Running {
        Running::start(&mut self.command(arguments))
    }

    /// Makes this machine and `host` trust each other; this one may deploy there within these limits.
    pub(crate) fn join(&self, host: &Machine, limits: &[&str]) {
        let ticket = host.json(&[&["invite", "--allow", "deploy"], limits].concat());
        self.ctl(&["join", ticket["ticket"].as_str().unwrap()]);
    }

    /// Deploys an archive, waits until it runs, and gives its id.
    #[track_caller]
    pub(crate) fn deploy_to(&self, peer: &str, archive: &str, name: &str, flags: &[&str]) -> String {
        let arguments = [&["deploy", archive, "--peer", peer, "--name", name], flags].concat();
        let deployed = self.json(&arguments);
        assert_eq!(deployed["state"], "running", "{deployed}");
        deployed["id"].as_str().unwrap().to_owned()
    }

    /// Forwards a deployment's port to the loopback interface.
    pub(crate) fn forward(&self, name: &str, port: u16) -> Forward {
        let running = self.begin(&["--json", "port-forward", name, &format!("0:{port}")]);
        let line = eventually("port-forward listens", || {
            assert!(!running.stderr().contains("error:"), "{}", running.stderr());
            running.stdout().lines().next().filter(|line| line.ends_with('}')).map(str::to_owned)
        });
        let listening: Value = serde_json::from_str(&line).unwrap();
        Forward { running, address: listening["address"].as_str().unwrap().to_owned() }
    }

    /// The state of a deployment of ours.
    pub(crate) fn state(&self, name: &str) -> String {
        self.json(&["status", name])["state"].as_str().unwrap().to_owned()
    }

    pub(crate) fn wait_for_state(&self, name: &str, state: &str) -> Value {
        eventually(&format!("{name} is {state}"), || {
            let status = self.try_ctl(&["status", name, "--json"]);
            (status.status == 0).then(|| status.json()).filter(|status| status["state"] == state)
        })
    }

    /// The audit log, oldest line first.
    pub(crate) fn audit(&self) -> Vec<Value> {
        self.json(&["audit", "--limit", "1000"]).as_array().unwrap().clone()
    }

    /// Whether the audit log holds a refusal that answers this threat.
    pub(crate) fn has_audited(&self, threat: &str) -> bool {
        self.audit().iter().any(|line| line["outcome"] == "refused" && line["threat"] == threat)
    }

    /// The database, while the daemon is down.
    pub(crate) fn database(&self) -> Connection {
        Connection::open(self.data().join("peer.db")).unwrap()
    }

    /// Names of the containers that it has in the engine, running or not.
    pub(crate) fn containers(&self) -> Vec<String> {
        self.containers_with(&["--all"])
    }

    pub(crate) fn containers_with(&self, flags: &[&str]) -> Vec<String> {
        let filter = format!("label=peer-compute.node={}", self.mark().expect("it has a room of containers"));
        docker(&[&["ps", "--no-trunc", "--format", "{{.ID}}", "--filter", &filter], flags].concat())
            .lines()
            .map(str::to_owned)
            .collect()
    }

    /// What marks its containers in the engine.
    fn mark(&self) -> Option<String> {
        let database = Connection::open(self.data().join("peer.db")).ok()?;
        database.query_row("SELECT mark FROM room_mark", [], |row| row.get(0)).ok()
    }

    fn brought_images(&self) -> Vec<String> {
        let Ok(database) = Connection::open(self.data().join("peer.db")) else { return Vec::new() };
        let Ok(mut statement) = database.prepare("SELECT lower(hex(digest)) FROM image") else { return Vec::new() };
        let rows = statement.query_map([], |row| row.get::<_, String>(0));
        rows.map(|rows| rows.flatten().collect()).unwrap_or_default()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() && self.daemon.is_some() {
            let log = self.log();
            let skipped = log.lines().count().saturating_sub(60);
            let last: Vec<_> = log.lines().skip(skipped).collect();
            eprintln!("---- last lines of {}'s log\n{}", self.name, last.join("\n"));
        }
        self.kill();
        let Some(mark) = self.mark().filter(|_| self.has_engine) else { return };
        for container in self.containers() {
            docker_try(&["rm", "--force", &container]);
        }
        for image in self.brought_images() {
            docker_try(&["rmi", "--force", &format!("sha256:{image}")]);
        }
        remove_ways_out(&mark);
    }
}
