//! What the operator decides: one file, each key of which a flag or an environment variable overrides. Resolving has no
//! side effects.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use peer_net::Multiaddr;
use peer_state::durable;
use serde::{Deserialize, Serialize};

use crate::names::Domain;

/// Largest settings file (bytes).
const FILE_MAX: u64 = 64 * 1024;
/// Where everything is kept if nothing else is said.
const DATA_DIR: &str = "/var/lib/peergate";

macro_rules! keys {
    ($($(#[doc = $doc:literal])+ $name:ident: $kind:ty, $environment:literal;)*) => {
        /// The keys of the settings file, and at once the flags and environment variables that override them.
        #[derive(Debug, Clone, Default, Serialize, Deserialize, clap::Args)]
        #[serde(deny_unknown_fields)]
        pub struct Keys {
            $($(#[doc = $doc])+
            #[arg(long, env = $environment, global = true)]
            pub $name: Option<$kind>,)*
        }

        impl Keys {
            /// These keys, and `file`'s where they say nothing.
            fn over(self, file: Self) -> Self {
                Self { $($name: self.$name.or(file.$name),)* }
            }

            /// For each key: its name, its flag, its variable, and whether it is set here.
            fn given(&self) -> Vec<(&'static str, bool)> {
                vec![$((stringify!($name), self.$name.is_some()),)*]
            }
        }
    };
}

keys! {
    /// Directory of the identity, the allow list and the development certificate [default: /var/lib/peergate]
    data_dir: PathBuf, "PEERGATE_DATA_DIR";
    /// Domain below which deployments have their names [default: peer.localhost]
    domain: String, "PEERGATE_DOMAIN";
    /// Address for visitors (HTTPS) [default: 0.0.0.0:8443]
    https_listen: SocketAddr, "PEERGATE_HTTPS_LISTEN";
    /// Port in the addresses that providers are told, if it differs from the one listened on
    public_port: u16, "PEERGATE_PUBLIC_PORT";
    /// Address for providers [default: /ip4/0.0.0.0/tcp/4101]
    listen: Multiaddr, "PEERGATE_LISTEN";
    /// File with the certificate chain (PEM); a development certificate is made if absent
    tls_certificate: PathBuf, "PEERGATE_TLS_CERTIFICATE";
    /// File with the certificate's private key (PEM)
    tls_key: PathBuf, "PEERGATE_TLS_KEY";
    /// Loopback address for metrics (Prometheus); none if absent
    metrics_listen: SocketAddr, "PEERGATE_METRICS_LISTEN";
    /// Connections of visitors at once [default: 10000]
    connections_max: u32, "PEERGATE_CONNECTIONS_MAX";
    /// Connections at once from one address or IPv6 /64 [default: 100]
    connections_per_address_max: u32, "PEERGATE_CONNECTIONS_PER_ADDRESS_MAX";
    /// Requests per second from one address, with bursts of twice as many [default: 200]
    requests_per_second_per_address: NonZeroU32, "PEERGATE_REQUESTS_PER_SECOND_PER_ADDRESS";
    /// Requests per second for one name, with bursts of twice as many [default: 2000]
    requests_per_second_per_name: NonZeroU32, "PEERGATE_REQUESTS_PER_SECOND_PER_NAME";
    /// Visits that one provider serves at once [default: 512]
    visits_per_provider_max: u32, "PEERGATE_VISITS_PER_PROVIDER_MAX";
    /// Names that one provider may have at once, at most 256 [default: 256]
    leases_per_provider_max: u32, "PEERGATE_LEASES_PER_PROVIDER_MAX";
    /// Seconds that a request's header fields may take [default: 10]
    header_seconds: NonZeroU32, "PEERGATE_HEADER_SECONDS";
    /// Seconds without a byte after which a request, an answer or a connection is given up [default: 60]
    idle_seconds: NonZeroU32, "PEERGATE_IDLE_SECONDS";
    /// The same for WebSocket connections [default: 3600]
    websocket_idle_seconds: NonZeroU32, "PEERGATE_WEBSOCKET_IDLE_SECONDS";
    /// Seconds that answers in progress may take when the gateway stops [default: 10]
    drain_seconds: NonZeroU32, "PEERGATE_DRAIN_SECONDS";
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] durable::FileError),
    /// The file that was asked for does not exist.
    #[error("there is no settings file {}; create it, or leave --config out", .0.display())]
    Missing(PathBuf),
    /// The file is not TOML, or has an unknown or wrong key.
    #[error("{}: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        reason: String,
    },
    /// A key's value cannot be used.
    #[error("{key}: {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong, and what would do.
        reason: String,
    },
}

/// Where the certificate comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Certificate {
    /// Files of the operator.
    Files {
        /// Certificate chain (PEM).
        certificate: PathBuf,
        /// Private key (PEM).
        key: PathBuf,
    },
    /// Made by a certificate authority of our own in the data directory.
    Development,
}

/// Everything decided.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Directory of everything that survives a restart.
    pub data_dir: PathBuf,
    /// The domain of all names.
    pub domain: Domain,
    /// Where visitors arrive.
    pub https_listen: SocketAddr,
    /// Port in public addresses; the one listened on if absent.
    pub public_port: Option<u16>,
    /// Where providers arrive.
    pub listen: Multiaddr,
    /// Where the certificate comes from.
    pub certificate: Certificate,
    /// Where metrics are served.
    pub metrics_listen: Option<SocketAddr>,
    /// Bounds on visitors and providers.
    pub bounds: Bounds,
}

/// Bounds on visitors and providers.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// Connections of visitors at once.
    pub connections: usize,
    /// Connections from one address or IPv6 /64 at once.
    pub connections_per_address: usize,
    /// Requests per second from one address.
    pub requests_per_address: NonZeroU32,
    /// Requests per second for one name.
    pub requests_per_name: NonZeroU32,
    /// Visits that one provider serves at once.
    pub visits_per_provider: usize,
    /// Names of one provider.
    pub leases_per_provider: usize,
    /// Longest time for a request's head.
    pub head: Duration,
    /// Longest time without a byte.
    pub idle: Duration,
    /// The same after a switch to WebSocket.
    pub websocket_idle: Duration,
    /// Longest time for answers in progress when stopping.
    pub drain: Duration,
}

/// Where a key's value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The command line or the environment.
    FlagOrEnvironment,
    /// The settings file.
    File,
    /// Built in.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::FlagOrEnvironment => "flag or environment",
            Self::File => "file",
            Self::Default => "default",
        })
    }
}

/// A key with its value and where it comes from, for `peergate config check`.
#[derive(Debug, Clone, Serialize)]
pub struct Explained {
    /// The key.
    pub key: &'static str,
    /// The value in use.
    pub value: Option<String>,
    /// Where it comes from.
    pub origin: Origin,
}

/// Settings, with the origin of each.
#[derive(Debug)]
pub struct Resolved {
    /// What is decided.
    pub settings: Settings,
    /// The file that was read, if there is one.
    pub file: Option<PathBuf>,
    /// Each key.
    pub explained: Vec<Explained>,
}

/// Reads the file and puts `flags` over it. Without `config` the file is DATA_DIR/peergate.toml, if it exists.
pub fn resolve(config: Option<&Path>, flags: Keys) -> Result<Resolved, SettingsError> {
    let default = || flags.data_dir.clone().unwrap_or_else(|| DATA_DIR.into()).join("peergate.toml");
    let path = config.map_or_else(default, Path::to_owned);
    let (file, keys) = match durable::read(&path, FILE_MAX)? {
        Some(bytes) => (Some(path.clone()), parse(&path, &bytes)?),
        None if config.is_some() => return Err(SettingsError::Missing(path)),
        None => (None, Keys::default()),
    };
    let origins: Vec<_> = flags
        .given()
        .into_iter()
        .zip(keys.given())
        .map(|((key, by_flag), (_, by_file))| match (by_flag, by_file) {
            (true, _) => (key, Origin::FlagOrEnvironment),
            (false, true) => (key, Origin::File),
            (false, false) => (key, Origin::Default),
        })
        .collect();
    let settings = Settings::from_keys(flags.over(keys))?;
    let values = settings.values();
    let explained = origins
        .into_iter()
        .map(|(key, origin)| {
            let value = values.iter().find(|(name, _)| *name == key).and_then(|(_, value)| value.clone());
            Explained { key, value, origin }
        })
        .collect();
    Ok(Resolved { settings, file, explained })
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Keys, SettingsError> {
    let syntax = |reason: String| SettingsError::Syntax { path: path.to_owned(), reason };
    let text = std::str::from_utf8(bytes).map_err(|error| syntax(error.to_string()))?;
    toml::from_str(text).map_err(|error| syntax(error.to_string()))
}

impl Settings {
    fn from_keys(keys: Keys) -> Result<Self, SettingsError> {
        let wrong = |key, reason: &dyn fmt::Display| SettingsError::Value { key, reason: reason.to_string() };
        let domain: Domain =
            keys.domain.as_deref().unwrap_or("peer.localhost").parse().map_err(|error| wrong("domain", &error))?;
        let listen = keys.listen.clone().unwrap_or_else(|| "/ip4/0.0.0.0/tcp/4101".parse().expect("a valid address"));
        let certificate = match (&keys.tls_certificate, &keys.tls_key) {
            (Some(certificate), Some(key)) => Certificate::Files { certificate: certificate.clone(), key: key.clone() },
            (None, None) => Certificate::Development,
            (Some(_), None) => {
                return Err(wrong("tls_key", &"missing, though tls_certificate is set; set both or none"));
            }
            (None, Some(_)) => {
                return Err(wrong("tls_certificate", &"missing, though tls_key is set; set both or none"));
            }
        };
        if keys.metrics_listen.is_some_and(|address| !address.ip().is_loopback()) {
            return Err(wrong("metrics_listen", &"metrics are served on loopback only, such as 127.0.0.1:9101"));
        }
        if keys.public_port == Some(0) {
            return Err(wrong("public_port", &"a port is 1 to 65535"));
        }
        Ok(Self {
            bounds: Bounds::from_keys(&keys)?,
            data_dir: keys.data_dir.unwrap_or_else(|| DATA_DIR.into()),
            domain,
            https_listen: keys.https_listen.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 8443))),
            public_port: keys.public_port,
            listen,
            certificate,
            metrics_listen: keys.metrics_listen,
        })
    }

    fn values(&self) -> Vec<(&'static str, Option<String>)> {
        let (certificate, key) = match &self.certificate {
            Certificate::Files { certificate, key } => (Some(certificate), Some(key)),
            Certificate::Development => (None, None),
        };
        let bounds = &self.bounds;
        let text = |value: &dyn fmt::Display| Some(value.to_string());
        let seconds = |duration: Duration| Some(duration.as_secs().to_string());
        vec![
            ("data_dir", text(&self.data_dir.display())),
            ("domain", text(&self.domain)),
            ("https_listen", text(&self.https_listen)),
            ("public_port", text(&self.public_port.unwrap_or(self.https_listen.port()))),
            ("listen", text(&self.listen)),
            ("tls_certificate", certificate.map(|path| path.display().to_string())),
            ("tls_key", key.map(|path| path.display().to_string())),
            ("metrics_listen", self.metrics_listen.map(|address| address.to_string())),
            ("connections_max", text(&bounds.connections)),
            ("connections_per_address_max", text(&bounds.connections_per_address)),
            ("requests_per_second_per_address", text(&bounds.requests_per_address)),
            ("requests_per_second_per_name", text(&bounds.requests_per_name)),
            ("visits_per_provider_max", text(&bounds.visits_per_provider)),
            ("leases_per_provider_max", text(&bounds.leases_per_provider)),
            ("header_seconds", seconds(bounds.head)),
            ("idle_seconds", seconds(bounds.idle)),
            ("websocket_idle_seconds", seconds(bounds.websocket_idle)),
            ("drain_seconds", seconds(bounds.drain)),
        ]
    }
}

impl Bounds {
    fn from_keys(keys: &Keys) -> Result<Self, SettingsError> {
        let number = |key, given: Option<u32>, default: u32, largest: u32| match given.unwrap_or(default) {
            value if (1..=largest).contains(&value) => Ok(value as usize),
            value => Err(SettingsError::Value { key, reason: format!("{value} is not between 1 and {largest}") }),
        };
        let rate =
            |given: Option<NonZeroU32>, default| given.or(NonZeroU32::new(default)).expect("defaults are not zero");
        let seconds = |given: Option<NonZeroU32>, default| Duration::from_secs(rate(given, default).get().into());
        Ok(Self {
            connections: number("connections_max", keys.connections_max, 10_000, 1_000_000)?,
            connections_per_address: number(
                "connections_per_address_max",
                keys.connections_per_address_max,
                100,
                1_000_000,
            )?,
            requests_per_address: rate(keys.requests_per_second_per_address, 200),
            requests_per_name: rate(keys.requests_per_second_per_name, 2000),
            visits_per_provider: number("visits_per_provider_max", keys.visits_per_provider_max, 512, 900)?,
            leases_per_provider: number("leases_per_provider_max", keys.leases_per_provider_max, 256, 256)?,
            head: seconds(keys.header_seconds, 10),
            idle: seconds(keys.idle_seconds, 60),
            websocket_idle: seconds(keys.websocket_idle_seconds, 3600),
            drain: seconds(keys.drain_seconds, 10),
        })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;

    fn in_file(text: &str) -> Result<Resolved, SettingsError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("settings.toml");
        std::fs::write(&path, text).unwrap();
        resolve(Some(&path), Keys { domain: Some("flag.example.org".into()), ..Keys::default() })
    }

    #[test]
    fn flags_stand_over_the_file_and_the_file_over_defaults() {
        let resolved = in_file("domain = \"file.example.org\"\nconnections_max = 5\n").unwrap();
        assert_eq!(resolved.settings.domain.as_str(), "flag.example.org");
        assert_eq!(resolved.settings.bounds.connections, 5);
        let origin = |key| resolved.explained.iter().find(|explained| explained.key == key).unwrap().origin;
        assert_eq!(origin("domain"), Origin::FlagOrEnvironment);
        assert_eq!(origin("connections_max"), Origin::File);
        assert_eq!(origin("listen"), Origin::Default);
        let valued = resolved.explained.iter().filter(|explained| explained.value.is_some()).count();
        assert_eq!(valued, resolved.explained.len() - 3);
    }

    #[test]
    fn wrong_values_are_named() {
        for (text, named) in [
            ("colour = 1", "colour"),
            ("connections_max = 0", "connections_max"),
            ("connections_max = -1", "connections_max"),
            ("header_seconds = 0", "header_seconds"),
            ("tls_key = \"k.pem\"", "tls_certificate"),
            ("metrics_listen = \"0.0.0.0:9101\"", "metrics_listen"),
            ("public_port = 0", "public_port"),
            ("public_port = 70000", "public_port"),
            ("listen = \"10.0.0.1\"", "listen"),
        ] {
            let error = in_file(text).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
        assert!(matches!(
            resolve(Some(Path::new("/nonexistent.toml")), Keys::default()),
            Err(SettingsError::Missing(_))
        ));
    }
}
