//! Two peers and a gateway on this machine, run from the real programs: alice deploys, bob hosts, a visitor comes.

use std::{
    ffi::OsString,
    fs::{self, File},
    net::{Ipv4Addr, TcpListener},
    os::unix::{
        fs::{PermissionsExt, chown},
        net::UnixStream,
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    Failure,
    counter::{self, Counter},
    http::Door,
};

const START: Duration = Duration::from_secs(30);
const COMMAND: Duration = Duration::from_mins(2);
const END: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(1);

/// A program that stays.
pub(crate) struct Daemon {
    program: PathBuf,
    arguments: Vec<OsString>,
    log: PathBuf,
    user: Option<User>,
    child: Child,
}

/// A user who is not root.
#[derive(Debug, Clone, Copy)]
pub(crate) struct User {
    pub(crate) user: u32,
    pub(crate) group: u32,
}

impl Daemon {
    fn start(program: PathBuf, arguments: Vec<OsString>, log: PathBuf, user: Option<User>) -> Result<Self, Failure> {
        let child = spawn(&program, &arguments, &log, user)?;
        Ok(Self { program, arguments, log, user, child })
    }

    /// Its process id.
    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Kills it as a power failure would (SIGKILL).
    pub(crate) fn kill(&mut self) -> Result<(), Failure> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Asks it to end (SIGTERM) and waits for that.
    pub(crate) fn stop(&mut self) -> Result<(), Failure> {
        let process = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(process, rustix::process::Signal::TERM)?;
        let end = Instant::now() + END;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > end {
                self.kill()?;
                return Err(format!("{} did not end by itself", self.program.display()).into());
            }
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Starts it again with the same arguments.
    fn start_again(&mut self) -> Result<(), Failure> {
        self.child = spawn(&self.program, &self.arguments, &self.log, self.user)?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Ended already on the good way.
        drop((self.child.kill(), self.child.wait()));
    }
}

fn spawn(program: &Path, arguments: &[OsString], log: &Path, user: Option<User>) -> Result<Child, Failure> {
    let log = File::options().create(true).append(true).open(log)?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    if let Some(User { user, group }) = user {
        command.uid(user).gid(group);
    }
    command.spawn().map_err(|error| format!("cannot start {}: {error}; build it first", program.display()).into())
}

/// What a command said.
pub(crate) struct Said {
    pub(crate) success: bool,
    pub(crate) output: String,
    pub(crate) complaint: String,
}

/// A command that runs.
pub(crate) struct Running {
    child: Child,
    output: PathBuf,
    complaint: PathBuf,
    text: String,
}

impl Running {
    /// Waits for its end.
    pub(crate) fn wait(mut self) -> Result<Said, Failure> {
        let end = Instant::now() + COMMAND;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > end {
                self.child.kill()?;
                self.child.wait()?;
                return Err(format!("'{}' did not end within {} s", self.text, COMMAND.as_secs()).into());
            }
            thread::sleep(PAUSE);
        };
        let (output, complaint) = (fs::read_to_string(&self.output)?, fs::read_to_string(&self.complaint)?);
        Ok(Said { success: status.success(), output, complaint })
    }

    /// Waits for its end, which must be a good one.
    pub(crate) fn succeed(self) -> Result<Value, Failure> {
        let text = self.text.clone();
        let said = self.wait()?;
        if !said.success {
            return Err(format!("'{text}' failed: {}", said.complaint.trim()).into());
        }
        let last = said.output.lines().last().unwrap_or_default();
        Ok(serde_json::from_str(last).unwrap_or_else(|_| said.output.trim().into()))
    }
}

/// Everybody.
pub(crate) struct World {
    directory: TempDir,
    programs: PathBuf,
    pub(crate) alice: Daemon,
    pub(crate) bob: Daemon,
    pub(crate) gateway: Daemon,
    /// In front of alice's and bob's listening ports.
    counters: [Counter; 2],
    /// Bob's PeerId, which labels his containers.
    pub(crate) bob_id: String,
    pub(crate) door: Door,
    commands: u64,
}

impl World {
    /// Starts everybody and introduces them to each other.
    pub(crate) fn start(programs: &Path, engine: &str) -> Result<Self, Failure> {
        Self::start_as(programs, engine, None)
    }

    /// The same, with bob's daemon as another user than this program's.
    pub(crate) fn start_as(programs: &Path, engine: &str, user: Option<User>) -> Result<Self, Failure> {
        let directory = tempfile::Builder::new().prefix("peer-bench.").tempdir()?;
        // Bob's own directory is below it.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o711))?;
        let (alice, of_alice) = peer(programs, directory.path(), "alice", &["--engine", "none"], None)?;
        let (bob, of_bob) = peer(programs, directory.path(), "bob", &["--engine-socket", engine], user)?;
        let (gateway, door) = gateway(programs, directory.path())?;
        let counters = [of_alice, of_bob];
        let programs = programs.to_owned();
        let bob_id = String::new();
        let mut world = Self { directory, programs, alice, bob, gateway, counters, bob_id, door, commands: 0 };
        for name in ["alice", "bob"] {
            world.answers(name)?;
            world.peerctl(name, &["init", "--name", name])?.succeed()?;
        }
        let whoami = world.peerctl("bob", &["whoami", "--json"])?.succeed()?;
        whoami["peer_id"].as_str().ok_or("whoami names no PeerId")?.clone_into(&mut world.bob_id);
        world.introduce()?;
        Ok(world)
    }

    fn introduce(&mut self) -> Result<(), Failure> {
        let grant = ["invite", "--allow", "deploy", "--max-cpu", "2", "--max-memory", "1g", "--max-containers", "4"];
        let ticket = self.peerctl("bob", &grant)?.succeed()?;
        let ticket = ticket.as_str().ok_or("the invitation is no text")?.to_owned();
        self.peerctl("alice", &["join", &ticket])?.succeed()?;
        let home = self.directory.path().join("gateway").display().to_string();
        let information = gateway_information(&self.programs, &home)?;
        let address = information["addresses"][0].as_str().ok_or("the gateway has no address")?.to_owned();
        let bob = self.bob_id.clone();
        self.run("peergate", &["allow", &bob, "--data-dir", &home], None)?.succeed()?;
        self.peerctl("bob", &["gateway", "add", &address])?.succeed().map(drop)
    }

    /// Makes a friend of bob's whose daemon is down, and gives the directory that holds his key.
    pub(crate) fn turned_friend(&mut self, name: &str) -> Result<PathBuf, Failure> {
        let (mut daemon, _counter) = peer(&self.programs, self.directory.path(), name, &["--engine", "none"], None)?;
        self.answers(name)?;
        self.peerctl(name, &["init", "--name", name])?.succeed()?;
        let ticket = self.peerctl("bob", &["invite", "--allow", "deploy"])?.succeed()?;
        let ticket = ticket.as_str().ok_or("the invitation is no text")?.to_owned();
        self.peerctl(name, &["join", &ticket])?.succeed()?;
        daemon.stop()?;
        Ok(self.path(name))
    }

    /// Where bob's daemon listens, with nothing in front of it.
    pub(crate) fn bob_address(&self) -> Result<String, Failure> {
        let arguments = &self.bob.arguments;
        let flag = arguments.iter().position(|argument| argument == "--listen").ok_or("bob listens nowhere")?;
        Ok(arguments[flag + 1].to_string_lossy().into_owned())
    }

    /// Starts `peerctl` as somebody.
    pub(crate) fn peerctl(&mut self, who: &str, arguments: &[&str]) -> Result<Running, Failure> {
        let socket = self.socket(who);
        self.run("peerctl", arguments, Some(socket))
    }

    fn run(&mut self, program: &str, arguments: &[&str], socket: Option<PathBuf>) -> Result<Running, Failure> {
        self.commands += 1;
        let file = |kind: &str| self.directory.path().join(format!("{}.{kind}", self.commands % 8));
        let (output, complaint) = (file("out"), file("err"));
        let mut command = Command::new(self.programs.join(program));
        command.args(arguments).stdin(Stdio::null()).envs(socket.map(|socket| ("PEER_SOCKET", socket)));
        let child = command.stdout(File::create(&output)?).stderr(File::create(&complaint)?).spawn()?;
        Ok(Running { child, output, complaint, text: format!("{program} {}", arguments.join(" ")) })
    }

    fn socket(&self, who: &str) -> PathBuf {
        self.path(who).join("run/peerd.sock")
    }

    /// Somebody's data directory.
    pub(crate) fn path(&self, who: &str) -> PathBuf {
        self.directory.path().join(who)
    }

    /// A file of the run's own.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<String, Failure> {
        let path = self.directory.path().join(name);
        fs::write(&path, bytes)?;
        Ok(path.display().to_string())
    }

    /// Waits until somebody's daemon answers on its socket.
    fn answers(&self, who: &str) -> Result<(), Failure> {
        let socket = self.socket(who);
        wait_for(&format!("{who}'s daemon"), START, || Ok(UnixStream::connect(&socket).is_ok()))
    }

    /// Kills bob's daemon and starts it again, as a supervisor would.
    pub(crate) fn crash_bob(&mut self) -> Result<(), Failure> {
        self.bob.kill()?;
        self.bob.start_again()?;
        self.answers("bob")
    }

    /// Ends bob's daemon properly and starts it again.
    pub(crate) fn restart_bob(&mut self) -> Result<(), Failure> {
        self.bob.stop()?;
        self.bob.start_again()?;
        self.answers("bob")
    }

    /// Bytes that alice has sent to bob, whoever dialled.
    pub(crate) fn sent_to_bob(&self) -> u64 {
        let [alice, bob] = &self.counters;
        bob.towards() + alice.back()
    }

    /// The last lines of somebody's log.
    pub(crate) fn log_tail(&self, who: &str, count: usize) -> String {
        let text = fs::read_to_string(self.directory.path().join(format!("{who}.log"))).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }

    /// Ends everybody properly and keeps what they wrote.
    pub(crate) fn stop_all(&mut self) -> Result<(), Failure> {
        self.gateway.stop()?;
        self.alice.stop()?;
        self.bob.stop()
    }
}

/// Waits until the condition holds.
pub(crate) fn wait_for(
    what: &str,
    within: Duration,
    mut condition: impl FnMut() -> Result<bool, Failure>,
) -> Result<(), Failure> {
    let end = Instant::now() + within;
    while !condition()? {
        if Instant::now() > end {
            return Err(format!("waited {} s in vain for {what}", within.as_secs()).into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A port of loopback that nobody uses at present.
fn free_port() -> Result<u16, Failure> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

fn peer(
    programs: &Path,
    directory: &Path,
    name: &str,
    further: &[&str],
    user: Option<User>,
) -> Result<(Daemon, Counter), Failure> {
    let home = directory.join(name);
    fs::create_dir_all(&home)?;
    if let Some(User { user, group }) = user {
        chown(&home, Some(user), Some(group))?;
    }
    let port = free_port()?;
    let (counted, counter) = counter::start(port)?;
    let mut arguments: Vec<OsString> = vec!["--data-dir".into(), home.clone().into()];
    arguments.extend(["--socket".into(), home.join("run/peerd.sock").into()]);
    arguments.extend(["--listen".into(), format!("/ip4/127.0.0.1/tcp/{port}").into()]);
    arguments.extend(["--announce".into(), format!("/ip4/127.0.0.1/tcp/{counted}").into()]);
    arguments.extend(further.iter().map(OsString::from));
    let daemon = Daemon::start(programs.join("peerd"), arguments, directory.join(format!("{name}.log")), user)?;
    Ok((daemon, counter))
}

fn gateway(programs: &Path, directory: &Path) -> Result<(Daemon, Door), Failure> {
    let home = directory.join("gateway").display().to_string();
    let port = free_port()?;
    // The limits are for strangers; here they would be what is measured.
    let arguments = [
        ["--domain", "peer.localhost"],
        ["--data-dir", &home],
        ["--https-listen", &format!("127.0.0.1:{port}")],
        ["--listen", "/ip4/127.0.0.1/tcp/0"],
        ["--requests-per-second-per-address", "1000000"],
        ["--requests-per-second-per-name", "1000000"],
    ];
    let arguments = arguments.concat().iter().map(OsString::from).collect();
    let daemon = Daemon::start(programs.join("peergate"), arguments, directory.join("gateway.log"), None)?;
    let mut authority = None;
    wait_for("the gateway", START, || {
        let information = gateway_information(programs, &home).unwrap_or_default();
        let path = information["ca_certificate"].as_str().filter(|_| information["addresses"][0].is_string());
        authority = path.and_then(|path| fs::read(path).ok());
        Ok(authority.is_some())
    })?;
    Ok((daemon, Door::new(port, &authority.unwrap_or_default())?))
}

fn gateway_information(programs: &Path, home: &str) -> Result<Value, Failure> {
    let output = Command::new(programs.join("peergate")).args(["info", "--json", "--data-dir", home]).output()?;
    Ok(serde_json::from_slice(&output.stdout)?)
}
