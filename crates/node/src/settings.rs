//! The daemon's configuration: one TOML file, every key of which a flag or an environment variable may override.
//!
//! A flag goes before the environment, that before the file, and that before the default. All that is wrong is reported
//! at once, each with its key and its source, and nothing is started then.

mod command_line;
mod keys;
mod values;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use peer_compute::ledger::Offer;
use peer_compute::wall;
use peer_net::{Limits, Multiaddr};
use peer_proto::control::Setting;
use peer_proto::deploy::RuntimeName;
use peer_proto::unit::{ByteSize, Span};
use serde::{Deserialize, Serialize};

use crate::quota::Rates;

pub use command_line::{Invocation, Task, UsageError, parse};
pub(crate) use values::peer_address;

/// Where the file is if nobody says otherwise.
pub const DEFAULT_FILE: &str = "/etc/peer-compute/peerd.toml";
/// Largest configuration file that is read (bytes).
const FILE_MAX: u64 = 256 * 1024;

/// Where a value comes from, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Source {
    /// Nobody set it.
    Default,
    /// The configuration file.
    File,
    /// An environment variable.
    Environment,
    /// A flag on the command line.
    Flag,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Default => "default",
            Self::File => "file",
            Self::Environment => "environment",
            Self::Flag => "flag",
        })
    }
}

/// One thing that is wrong with the configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// The file cannot be read.
    #[error("the configuration file {0} cannot be read: {1}")]
    File(String, String),
    /// The file is not TOML.
    #[error("the configuration file {0} is not valid TOML: {1}")]
    Syntax(String, String),
    /// There is no such key.
    #[error("unknown key '{0}' in {1}; `peerd config check` lists the keys that there are")]
    UnknownKey(String, String),
    /// A value is not what it should be.
    #[error("{key} ({from}): {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// Where its value comes from.
        from: Source,
        /// What is wrong.
        reason: String,
    },
}

/// How the daemon writes its log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The resolved configuration.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where everything durable is.
    pub data_dir: PathBuf,
    /// Socket of the local interface.
    pub socket: PathBuf,
    /// The user (uid) who may use it beside root.
    pub socket_owner: u32,
    /// What the network process runs as; as the daemon itself, if absent.
    pub user: Option<Account>,
    /// Where peers connect to.
    pub listen: Vec<Multiaddr>,
    /// Addresses to name on the card instead of those that are listened on.
    pub announce: Vec<Multiaddr>,
    /// Socket of the container engine; absent if this machine runs nobody's containers.
    pub engine_socket: Option<PathBuf>,
    /// Runtime that every container of a peer must have; the engine's own choice, if absent.
    pub runtime: Option<RuntimeName>,
    /// The program that is run inside containers' networks.
    pub guest_program: PathBuf,
    /// What all peers together may use of this machine.
    pub offer: Offer,
    /// Largest image accepted (bytes, unpacked).
    pub image_size_max: ByteSize,
    /// How long an image that peers brought is kept when nothing uses it.
    pub image_keep: Span,
    /// How long a deployment waits for its image when nothing arrives.
    pub transfer_patience: Span,
    /// The wall around the networks of containers with a way out.
    pub wall: wall::Options,
    /// Loopback address at which metrics are served beside the local interface.
    pub metrics_listen: Option<SocketAddr>,
    /// What is logged, as a filter of `tracing`.
    pub log: String,
    /// How it is logged.
    pub log_format: LogFormat,
    /// File whose first line is the passphrase of a sealed identity.
    pub passphrase_file: Option<PathBuf>,
    /// Bounds on connections and handshakes.
    pub limits: Limits,
    /// How fast one peer may ask.
    pub rates: Rates,
    /// Whether an identity may start beside an empty database. Of the command line alone.
    pub accept_empty_database: bool,
    /// The configuration file that was read, if there was one.
    pub file: Option<PathBuf>,
    explained: Vec<Setting>,
    resolved: Vec<Resolved>,
}

/// A user of this machine, and the group that is his own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    /// The user's number.
    pub uid: u32,
    /// The group's number.
    pub gid: u32,
}

/// One key with its texts before they were parsed, for another process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    key: String,
    texts: Vec<String>,
    source: Source,
}

impl Settings {
    /// What [`restore`] makes the same configuration of.
    pub fn resolved(&self) -> &[Resolved] {
        &self.resolved
    }

    /// Every key with its value and where that comes from.
    pub fn explain(&self) -> &[Setting] {
        &self.explained
    }
}

/// What was set, by key, before it is parsed.
pub(crate) type Given = BTreeMap<&'static str, (Vec<String>, Source)>;

/// Resolves the configuration. `flags` holds what the command line says, `environment` looks up a variable, and `file`
/// is the file's name and content, if there is one.
pub fn resolve(
    flags: &BTreeMap<&'static str, Vec<String>>,
    environment: &dyn Fn(&str) -> Option<String>,
    file: Option<(&str, &str)>,
) -> Result<Settings, Vec<SettingError>> {
    let mut errors = Vec::new();
    let mut given = Given::new();
    if let Some((name, content)) = file {
        values::read_file(name, content, &mut given, &mut errors);
    }
    for key in keys::KEYS {
        if let Some(value) = environment(&key.variable()) {
            given.insert(key.name, (key.split(&value), Source::Environment));
        }
        if let Some(texts) = flags.get(key.name) {
            let texts = texts.iter().flat_map(|text| key.split(text)).collect();
            given.insert(key.name, (texts, Source::Flag));
        }
    }
    let settings = read_all(values::Reader::new(given, environment, errors))?;
    Ok(Settings { file: file.map(|(name, _)| PathBuf::from(name)), ..settings })
}

/// Makes the configuration that another process has resolved, with nothing else looked at.
pub fn restore(
    resolved: Vec<Resolved>,
    file: Option<PathBuf>,
    accept_empty_database: bool,
) -> Result<Settings, Vec<SettingError>> {
    let known = |each: Resolved| keys::find(&each.key).map(|key| (key.name, (each.texts, each.source)));
    let given = resolved.into_iter().filter_map(known).collect();
    let settings = read_all(values::Reader::new(given, &|_| None, Vec::new()))?;
    Ok(Settings { accept_empty_database, file, ..settings })
}

fn read_all(mut reader: values::Reader<'_>) -> Result<Settings, Vec<SettingError>> {
    let settings = reader.settings();
    let (explained, resolved, errors) = reader.finish();
    match settings {
        Some(settings) if errors.is_empty() => Ok(Settings { explained, resolved, ..settings }),
        _ => Err(errors),
    }
}

#[cfg(test)]
#[path = "settings_tests.rs"]
mod tests;
