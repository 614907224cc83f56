//! A host of the test's own: an engine with its firewall rules in one network namespace, and in another one everything
//! that it is connected to: a neighbour on its wire, a metadata service, two machines of the internet, and a resolver.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{Machine, Output, eventually};

/// Where everything that listens for a guest listens.
pub(crate) const PORT: u16 = 9000;
/// The host's address on its wire, and its neighbour's.
pub(crate) const HOST: &str = "198.51.100.1";
pub(crate) const NEIGHBOUR: &str = "198.51.100.2";
/// What may be reached: machines of the internet.
pub(crate) const PUBLIC: [&str; 2] = ["8.8.8.8", "1.1.1.1"];
/// What else the neighbour answers for: nobody's business.
const HIDDEN: [&str; 3] = ["169.254.169.254", "10.77.0.1", "100.64.0.9"];
const HOST_SIX: &str = "2001:db8:5::1";
const NEIGHBOUR_SIX: &str = "2001:db8:5::2";
const PUBLIC_SIX: &str = "2606:4700:4700::1111";

/// Sockets that listen at one place, without answering.
pub(crate) struct Heard {
    datagrams: Vec<UdpSocket>,
    _connections: Vec<TcpListener>,
}

impl Heard {
    fn open(addresses: &[&str]) -> Self {
        let bind = |address: &str| -> SocketAddr { (address.parse::<std::net::IpAddr>().unwrap(), PORT).into() };
        let (mut datagrams, mut connections) = (Vec::new(), Vec::new());
        for address in addresses {
            let socket = UdpSocket::bind(bind(address)).unwrap_or_else(|error| panic!("{address}: {error}"));
            socket.set_nonblocking(true).unwrap();
            datagrams.push(socket);
            connections.push(TcpListener::bind(bind(address)).unwrap());
        }
        Self { datagrams, _connections: connections }
    }

    /// Where datagrams have come from since the last look.
    pub(crate) fn senders(&self) -> Vec<SocketAddr> {
        let mut buffer = [0; 64];
        self.datagrams
            .iter()
            .flat_map(|socket| std::iter::from_fn(move || socket.recv_from(&mut buffer).ok()).collect::<Vec<_>>())
            .map(|(_, from)| from)
            .collect()
    }
}

/// The host. It ends, with everything in it, when it is dropped.
pub(crate) struct Host {
    directory: tempfile::TempDir,
    pub(crate) namespace: String,
    outside: String,
    engine: Option<Child>,
    /// What listens on the host itself.
    pub(crate) own: Heard,
    /// What listens outside, where nobody of the host's guests may come.
    pub(crate) hidden: Heard,
    /// The machines of the internet.
    pub(crate) public: Heard,
    questions: Arc<Mutex<Vec<String>>>,
}

/// Runs something in a network namespace. Sockets that it makes stay there.
fn inside<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> T {
    let file = std::fs::File::open(format!("/run/netns/{namespace}")).unwrap();
    std::thread::scope(|scope| {
        let enter = || {
            use std::os::fd::AsFd;
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            work()
        };
        scope.spawn(enter).join().unwrap()
    })
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

impl Host {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (host, lan) = (format!("peer-host-{}", std::process::id()), format!("peer-lan-{}", std::process::id()));
        for namespace in [&host, &lan] {
            ip(&format!("netns add {namespace}"));
            ip(&format!("-n {namespace} link set lo up"));
        }
        ip(&format!("-n {host} link add wire type veth peer name wire netns {lan}"));
        for (namespace, four, six) in [(&host, HOST, HOST_SIX), (&lan, NEIGHBOUR, NEIGHBOUR_SIX)] {
            ip(&format!("-n {namespace} addr add {four}/24 dev wire"));
            ip(&format!("-n {namespace} addr add {six}/64 dev wire nodad"));
            ip(&format!("-n {namespace} link set wire up"));
        }
        for address in PUBLIC.iter().chain(&HIDDEN) {
            ip(&format!("-n {lan} addr add {address}/32 dev lo"));
        }
        ip(&format!("-n {lan} addr add {PUBLIC_SIX}/128 dev lo nodad"));
        ip(&format!("-n {host} route add default via {NEIGHBOUR}"));
        ip(&format!("-n {host} -6 route add default via {NEIGHBOUR_SIX}"));
        // Outside knows the way back to containers: what comes out without its address being translated is answered too.
        ip(&format!("-n {lan} route add default via {HOST}"));
        ip(&format!("-n {lan} -6 route add default via {HOST_SIX}"));
        let questions = Arc::new(Mutex::new(Vec::new()));
        let resolver = inside(&lan, || UdpSocket::bind((NEIGHBOUR, 53)).unwrap());
        let asked = questions.clone();
        resolver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        std::thread::spawn(move || resolve(&resolver, &asked));
        let mut started = Self {
            own: inside(&host, || Heard::open(&["0.0.0.0", HOST_SIX])),
            hidden: inside(&lan, || Heard::open(&[&[NEIGHBOUR, NEIGHBOUR_SIX, PUBLIC_SIX], &HIDDEN[..]].concat())),
            public: inside(&lan, || Heard::open(&PUBLIC)),
            directory,
            namespace: host,
            outside: lan,
            engine: None,
            questions,
        };
        started.up();
        started
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Where its engine listens.
    pub(crate) fn socket(&self) -> String {
        self.path("engine.sock").to_str().unwrap().to_owned()
    }

    /// A command that runs in the host's network.
    pub(crate) fn command(&self, arguments: &str) -> Output {
        let network = format!("--net=/run/netns/{}", self.namespace);
        Output::of(Command::new("nsenter").arg(network).args(arguments.split(' ')))
    }

    pub(crate) fn docker(&self, arguments: &[&str]) -> String {
        let host = format!("unix://{}", self.socket());
        Output::of(Command::new("docker").args(["--host", &host]).args(arguments)).success().stdout
    }

    /// Starts the engine with its usual rules.
    pub(crate) fn up(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let flag = |name: &str, value: &str| format!("--{name}={}", self.path(value).display());
        // `ip netns exec` would mount a fresh /sys, in which the engine finds no control groups.
        let process = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", self.namespace))
            .args(["dockerd", "--bip=172.30.0.1/24"])
            .arg(format!("--host=unix://{}", self.socket()))
            .args([flag("data-root", "data"), flag("exec-root", "exec"), flag("pidfile", "pid")])
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        self.engine = Some(process);
        let host = format!("unix://{}", self.socket());
        eventually("the host's engine answers", || {
            let info = Output::of(Command::new("docker").args(["--host", &host, "info"]));
            (info.status == 0).then_some(())
        });
    }

    pub(crate) fn down(&mut self) {
        if let Some(mut process) = self.engine.take() {
            let pid = std::fs::read_to_string(self.path("pid")).unwrap_or_default();
            drop(Command::new("kill").args(["-TERM", pid.trim()]).status());
            drop(process.wait());
        }
    }

    /// A machine on this host that runs containers in its engine.
    pub(crate) fn provider(&self, name: &str) -> Machine {
        let machine = self
            .machine(name, &["--engine-socket", &self.socket(), "--egress", "auto", "--egress-resolvers", NEIGHBOUR]);
        eventually("ways out are offered", || {
            machine.json(&["status"])["engine"]["egress_problem"].is_null().then_some(())
        });
        machine
    }

    /// A machine on this host that asks others to run containers.
    pub(crate) fn requester(&self, name: &str) -> Machine {
        self.machine(name, &["--engine", "none"])
    }

    pub(crate) fn machine(&self, name: &str, flags: &[&str]) -> Machine {
        Machine::inside(&self.namespace, name, flags)
    }

    /// Every address of the host at this moment, as a guest would name them.
    pub(crate) fn addresses(&self) -> Vec<String> {
        let shown = self.command("ip -o addr show").success().stdout;
        let addresses = shown.lines().filter_map(|line| {
            let mut words = line.split_whitespace().skip_while(|word| !word.starts_with("inet"));
            let family = words.next()?;
            let address = words.next()?.split('/').next()?;
            Some(if family == "inet6" { format!("[{address}]:{PORT}") } else { format!("{address}:{PORT}") })
        });
        addresses.filter(|address| !address.starts_with("127.") && !address.starts_with("[::1]")).collect()
    }

    /// What a guest must not reach: the host at every address, and everything outside but the internet.
    pub(crate) fn forbidden(&self) -> Vec<String> {
        let outside = [NEIGHBOUR].iter().chain(&HIDDEN).map(|address| format!("{address}:{PORT}"));
        let six = [NEIGHBOUR_SIX, PUBLIC_SIX].iter().map(|address| format!("[{address}]:{PORT}"));
        self.addresses().into_iter().chain(outside).chain(six).collect()
    }

    /// The names that the resolver outside was asked for.
    pub(crate) fn questions(&self) -> Vec<String> {
        self.questions.lock().unwrap().clone()
    }

    /// Fetches a page from a container's own address, as a process of the host.
    pub(crate) fn get(&self, address: &str, path: &str) -> String {
        use std::io::{Read, Write};
        let mut stream = eventually("the container listens", || {
            inside(&self.namespace, || std::net::TcpStream::connect(address)).ok()
        });
        stream.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text.split_once("\r\n\r\n").unwrap().1.to_owned()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let rules = self.command("nft list ruleset");
            let wall: Vec<_> = rules.stdout.lines().filter(|line| !line.trim().is_empty()).take(150).collect();
            eprintln!("---- the host's rules\n{}", wall.join("\n"));
        }
        self.down();
        for namespace in [&self.namespace, &self.outside] {
            drop(Command::new("ip").args(["netns", "delete", namespace]).status());
        }
    }
}

/// Answers for names of `example.org`: `rebind` means the neighbour, `other` the second machine, everything else the first.
fn resolve(socket: &UdpSocket, asked: &Mutex<Vec<String>>) {
    let mut buffer = [0; 512];
    // It ends with the test's process at the latest; a resolver that nobody asks costs nothing.
    loop {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let mut labels = Vec::new();
        let mut at = 12;
        while buffer[at] != 0 && at < length {
            let end = at + 1 + usize::from(buffer[at]);
            labels.push(String::from_utf8_lossy(&buffer[at + 1..end]).into_owned());
            at = end;
        }
        let question = &buffer[12..at + 5];
        let address: [u8; 4] = match labels[0].as_str() {
            "rebind" => [198, 51, 100, 2],
            "other" => [1, 1, 1, 1],
            _ => [8, 8, 8, 8],
        };
        asked.lock().unwrap().push(labels.join("."));
        let head = [&buffer[..2], &[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]].concat();
        let record = [&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4][..], &address].concat();
        drop(socket.send_to(&[&head, question, &record].concat(), from));
    }
}
