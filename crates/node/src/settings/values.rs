//! From texts to typed values, with a record of what was chosen and of everything that is wrong.

use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use multiaddr::Protocol;
use peer_compute::ledger::Offer;
use peer_compute::wall::{self, ranges::Range};
use peer_net::{Limits, Multiaddr};
use peer_proto::control::Setting;
use peer_proto::deploy::RuntimeName;
use peer_proto::text::escape;
use peer_proto::unit::{ByteSize, Millicores, Span};

use crate::quota::Rates;

use super::{Account, Given, LogFormat, Resolved, SettingError, Settings, Source, keys};

/// Most addresses in one list.
const ADDRESSES_MAX: usize = 16;
/// Upper end of the numbers that bound connections and deployments.
const NUMBER_MAX: usize = 100_000;

/// Takes the file's keys. Numbers may be written bare; lists are arrays of texts.
pub(super) fn read_file(name: &str, content: &str, given: &mut Given, errors: &mut Vec<SettingError>) {
    let table: toml::Table = match content.parse() {
        Ok(table) => table,
        Err(error) => {
            let error: toml::de::Error = error;
            errors.push(SettingError::Syntax(name.to_owned(), error.to_string().trim_end().to_owned()));
            return;
        }
    };
    for (name_in_file, value) in table {
        let Some(key) = keys::find(&name_in_file) else {
            errors.push(SettingError::UnknownKey(escape(&name_in_file), name.to_owned()));
            continue;
        };
        let texts = match (value, key.list) {
            (toml::Value::Array(items), true) => items.into_iter().map(scalar).collect::<Option<Vec<_>>>(),
            (value, _) => scalar(value).map(|text| vec![text]),
        };
        if let Some(texts) = texts {
            given.insert(key.name, (texts, Source::File));
        } else {
            let reason = if key.list { "must be a list of texts" } else { "must be a text or a number" };
            errors.push(SettingError::Value { key: key.name, from: Source::File, reason: reason.to_owned() });
        }
    }
}

fn scalar(value: toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        _ => None,
    }
}

/// Reads key after key.
pub(super) struct Reader<'a> {
    given: Given,
    environment: &'a dyn Fn(&str) -> Option<String>,
    explained: Vec<Setting>,
    resolved: Vec<Resolved>,
    errors: Vec<SettingError>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(
        given: Given,
        environment: &'a dyn Fn(&str) -> Option<String>,
        errors: Vec<SettingError>,
    ) -> Self {
        Self { given, environment, explained: Vec::new(), resolved: Vec::new(), errors }
    }

    pub(super) fn finish(self) -> (Vec<Setting>, Vec<Resolved>, Vec<SettingError>) {
        (self.explained, self.resolved, self.errors)
    }

    /// All keys, in the order of the table. Every one is read even if an earlier one is wrong.
    pub(super) fn settings(&mut self) -> Option<Settings> {
        let data_dir = self.one("data_dir", || "/var/lib/peer-compute".into(), absolute_path);
        let socket = self.one("socket", || "/run/peer-compute/peerd.sock".into(), absolute_path);
        let owner = (self.environment)("SUDO_UID");
        let own = || owner.unwrap_or_else(|| rustix::process::geteuid().as_raw().to_string());
        let socket_owner = self.one("socket_owner", own, |text| uid(text, Path::new("/etc/passwd")));
        let user = self.one("user", String::new, |text| account(text, Path::new("/etc/passwd")));
        let listen = self.many("listen", default_listen, listen_address);
        let announce = self.many("announce", Vec::new, announced_address);
        let engine = self.one("engine", || "docker".into(), engine);
        let engine_socket = self.one("engine_socket", || "/var/run/docker.sock".into(), absolute_path);
        let runtime = self.one("runtime", String::new, optional_runtime);
        let guest_program = self.one("guest_program", default_guest_program, absolute_path);
        let offer_cpu = self.one("offer_cpu", default_cpu, str::parse::<Millicores>);
        let offer_memory = self.one("offer_memory", default_memory, str::parse::<ByteSize>);
        let offer_containers = self.one("offer_containers", || "32".into(), number);
        let image_size_max = self.one("image_size_max", || "4g".into(), str::parse::<ByteSize>);
        let image_keep = self.one("image_keep", || "24h".into(), str::parse::<Span>);
        let transfer_patience = self.one("transfer_patience", || "2m".into(), str::parse::<Span>);
        let egress = self.one("egress", || "auto".into(), egress);
        let egress_subnets = self.many("egress_subnets", || vec!["198.18.0.0/15".into()], egress_subnet);
        let egress_resolvers = self.many("egress_resolvers", Vec::new, resolver);
        let metrics_listen = self.one("metrics_listen", String::new, loopback);
        let log = self.one("log", || "info,libp2p_swarm=warn".into(), filter);
        let log_format = self.one("log_format", || "text".into(), log_format);
        let passphrase_file = self.one("passphrase_file", String::new, optional_path);
        let limits = self.limits();
        let rates = self.rates();
        Some(Settings {
            data_dir: data_dir?,
            socket: socket?,
            socket_owner: socket_owner?,
            user: user?,
            listen: listen?,
            announce: announce?,
            engine_socket: engine_socket.filter(|_| engine == Some(true)),
            runtime: runtime?,
            guest_program: guest_program?,
            offer: Offer {
                cpu: offer_cpu?.get().into(),
                memory: offer_memory?.get(),
                containers: u32::try_from(offer_containers?).ok()?,
            },
            image_size_max: image_size_max?,
            image_keep: image_keep?,
            transfer_patience: transfer_patience?,
            wall: wall::Options { enabled: egress?, subnets: egress_subnets?, resolvers: egress_resolvers? },
            metrics_listen: metrics_listen?,
            log: log?,
            log_format: log_format?,
            passphrase_file: passphrase_file?,
            limits: limits?,
            rates: rates?,
            accept_empty_database: false,
            file: None,
            explained: Vec::new(),
            resolved: Vec::new(),
        })
    }

    fn limits(&mut self) -> Option<Limits> {
        let standard = Limits::default();
        let established = self.one("max_connections", || standard.established.to_string(), number);
        let per_peer = self.one("max_connections_per_peer", || standard.established_per_peer.to_string(), number);
        let from_address = || standard.established_per_address.to_string();
        let from_address = self.one("max_connections_per_address", from_address, number);
        let streams = self.one("max_streams_per_peer", || "64".into(), number);
        let handshakes = self.one("max_handshakes", || standard.pending_handshakes.to_string(), number);
        let per_address = || standard.pending_handshakes_per_address.to_string();
        let per_address = self.one("max_handshakes_per_address", per_address, number);
        Some(Limits {
            established: u32::try_from(established?).ok()?,
            established_per_address: from_address?,
            established_per_peer: u32::try_from(per_peer?).ok()?,
            // Ours to a peer travel on two connections; theirs are counted a little later than they are over.
            outbound_streams_to_peer: streams?.div_ceil(2),
            inbound_streams_per_peer: streams? + streams?.div_ceil(4),
            pending_handshakes: handshakes?,
            pending_handshakes_per_address: per_address?,
            ..standard
        })
    }

    fn rates(&mut self) -> Option<Rates> {
        let queries = self.one("max_queries_per_peer", || "50".into(), number);
        let requests = self.one("max_requests_per_peer", || "300".into(), number);
        let rate = |number: usize| NonZeroU32::new(u32::try_from(number).ok()?);
        Some(Rates { queries_per_second: rate(queries?)?, requests_per_minute: rate(requests?)? })
    }

    fn one<T, E: Display>(
        &mut self,
        key: &'static str,
        default: impl FnOnce() -> String,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let (texts, source) = self.given.remove(key).unwrap_or_else(|| (vec![default()], Source::Default));
        let text = texts.last().cloned().unwrap_or_default();
        self.resolved.push(Resolved { key: key.to_owned(), texts: vec![text.clone()], source });
        self.record(key, &text, source);
        self.parsed(key, source, parse(&text))
    }

    fn many<T, E: Display>(
        &mut self,
        key: &'static str,
        default: impl FnOnce() -> Vec<String>,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<Vec<T>> {
        let (texts, source) = self.given.remove(key).unwrap_or_else(|| (default(), Source::Default));
        self.resolved.push(Resolved { key: key.to_owned(), texts: texts.clone(), source });
        self.record(key, &texts.join(","), source);
        if texts.len() > ADDRESSES_MAX {
            let reason = format!("names {} addresses; at most {ADDRESSES_MAX} are accepted", texts.len());
            return self.parsed(key, source, Err(reason));
        }
        let values: Vec<_> = texts.iter().map(|text| self.parsed(key, source, parse(text))).collect();
        values.into_iter().collect()
    }

    fn record(&mut self, key: &str, value: &str, source: Source) {
        let (key, value, source) = (key.to_owned(), escape(value), source.to_string());
        self.explained.push(Setting { key, value, source });
    }

    fn parsed<T, E: Display>(&mut self, key: &'static str, from: Source, value: Result<T, E>) -> Option<T> {
        value.map_err(|error| self.errors.push(SettingError::Value { key, from, reason: error.to_string() })).ok()
    }
}

fn absolute_path(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err(format!("'{}' is not an absolute path", escape(text))) }
}

fn optional_path(text: &str) -> Result<Option<PathBuf>, String> {
    if text.is_empty() { Ok(None) } else { absolute_path(text).map(Some) }
}

fn optional_runtime(text: &str) -> Result<Option<RuntimeName>, String> {
    if text.is_empty() { Ok(None) } else { text.parse().map(Some) }
}

/// A uid, or the uid of a name in the file of users.
fn uid(text: &str, users: &Path) -> Result<u32, String> {
    if let Ok(uid) = text.parse() {
        return Ok(uid);
    }
    let unknown = || format!("there is no user '{}' in {}; give the numeric uid", escape(text), users.display());
    accounts(users).into_iter().find(|(name, _)| name == text).map(|(_, account)| account.uid).ok_or_else(unknown)
}

/// The account of this name or uid in the file of users; none, if the text is empty.
fn account(text: &str, users: &Path) -> Result<Option<Account>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let (number, unknown) = (text.parse(), || format!("there is no user '{}' in {}", escape(text), users.display()));
    let mut known = accounts(users).into_iter();
    let found = known.find(|(name, account)| name == text || number == Ok(account.uid)).ok_or_else(unknown)?;
    if found.1.uid == 0 { Err("is root, which is what it is when nothing is set".into()) } else { Ok(Some(found.1)) }
}

fn accounts(users: &Path) -> Vec<(String, Account)> {
    let content = std::fs::read_to_string(users).unwrap_or_default();
    let account = |line: &str| {
        let mut fields = line.split(':');
        let (name, _, uid, gid) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        Some((name.to_owned(), Account { uid: uid.parse().ok()?, gid: gid.parse().ok()? }))
    };
    content.lines().filter_map(account).collect()
}

fn default_listen() -> Vec<String> {
    let mut addresses = vec!["/ip4/0.0.0.0/tcp/4100".to_owned()];
    // Where the kernel has no IPv6, listening on it would keep the daemon from starting.
    if std::fs::read("/proc/net/if_inet6").is_ok_and(|interfaces| !interfaces.is_empty()) {
        addresses.push("/ip6/::/tcp/4100".to_owned());
    }
    addresses
}

fn listen_address(text: &str) -> Result<Multiaddr, String> {
    let address: Multiaddr = text.parse().map_err(|_| not_an_address(text))?;
    match address.iter().collect::<Vec<_>>()[..] {
        [Protocol::Ip4(_) | Protocol::Ip6(_), Protocol::Tcp(_)] => Ok(address),
        _ => Err(not_an_address(text)),
    }
}

fn announced_address(text: &str) -> Result<Multiaddr, String> {
    peer_address(text).ok_or_else(|| not_an_address(text))
}

/// An address at which a peer may be dialled: a host and a TCP port, without a PeerId.
pub(crate) fn peer_address(text: &str) -> Option<Multiaddr> {
    let address: Multiaddr = text.parse().ok()?;
    match address.iter().collect::<Vec<_>>()[..] {
        [
            Protocol::Ip4(_) | Protocol::Ip6(_) | Protocol::Dns(_) | Protocol::Dns4(_) | Protocol::Dns6(_),
            Protocol::Tcp(1..),
        ] => Some(address),
        _ => None,
    }
}

fn not_an_address(text: &str) -> String {
    format!("'{}' is not an address of the form /ip4/192.0.2.1/tcp/4100", escape(text))
}

fn engine(text: &str) -> Result<bool, String> {
    match text {
        "docker" => Ok(true),
        "none" => Ok(false),
        _ => Err(format!("'{}' is not an engine; choose docker or none", escape(text))),
    }
}

/// Beside the daemon's own program.
fn default_guest_program() -> String {
    let own = std::env::current_exe().unwrap_or_else(|_| "/usr/local/bin/peerd".into());
    own.with_file_name("peer-guest").display().to_string()
}

fn egress(text: &str) -> Result<bool, String> {
    match text {
        "auto" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("'{}' is not possible; choose auto or off", escape(text))),
    }
}

/// A range with room for at least one network.
fn egress_subnet(text: &str) -> Result<Range, String> {
    let range: Range = text.parse()?;
    if (8..=26).contains(&range.length()) {
        Ok(range)
    } else {
        Err(format!("{range} is too large or too small; between /8 and /26 are possible"))
    }
}

fn resolver(text: &str) -> Result<SocketAddr, String> {
    let plain = text.parse::<IpAddr>().map(|address| SocketAddr::new(address, 53));
    plain
        .or_else(|_| text.parse())
        .map_err(|_| format!("'{}' is not the address of a resolver, such as 192.0.2.53", escape(text)))
}

fn default_cpu() -> String {
    std::thread::available_parallelism().map_or(1, usize::from).to_string()
}

fn default_memory() -> String {
    let system = rustix::system::sysinfo();
    #[expect(clippy::useless_conversion, reason = "the width of these fields differs by architecture")]
    let total = u64::from(system.totalram).saturating_mul(u64::from(system.mem_unit));
    (total / 2).max(1).to_string()
}

fn number(text: &str) -> Result<usize, String> {
    let valid = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse()
        .ok()
        .filter(|number| valid && (1..=NUMBER_MAX).contains(number))
        .ok_or_else(|| format!("'{}' is not a number between 1 and {NUMBER_MAX}", escape(text)))
}

fn loopback(text: &str) -> Result<Option<SocketAddr>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let invalid = || format!("'{}' is not an address of the form 127.0.0.1:9100", escape(text));
    // `localhost` is the only name that may stand here; others could change what they mean.
    let address = match text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => text.to_owned(),
    };
    let address: SocketAddr = address.parse().map_err(|_| invalid())?;
    if address.ip().is_loopback() {
        Ok(Some(address))
    } else {
        Err(format!("{address} is not on the loopback interface; metrics are served there only"))
    }
}

fn filter(text: &str) -> Result<String, String> {
    match tracing_subscriber::EnvFilter::try_new(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!("'{}' is not a log filter: {error}", escape(text))),
    }
}

fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err(format!("'{}' is not a log format; choose text or json", escape(text))),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name_or_number() {
        let directory = tempfile::tempdir().unwrap();
        let users = directory.path().join("passwd");
        std::fs::write(&users, "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n").unwrap();
        assert_eq!(uid("alice", &users), Ok(1000));
        assert_eq!(uid("4711", &users), Ok(4711));
        for text in ["", "bob", "-1", "alice:x", "99999999999"] {
            assert!(uid(text, &users).is_err(), "{text}");
        }
    }
}
