//! How a deployment runs: everything that its owner can ask for, with the rules that the types alone cannot express.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use super::demands::Demands;
use super::egress::Egress;
use super::image::IMAGE_NAME_MAX;
use super::privilege::{self, Capability, User};
use super::writable::{self, Writable};
use crate::code::{Code, Problem};
use crate::id::Name;
use crate::unit::{ByteSize, Millicores, Port};

/// Most environment variables, and most arguments of a command.
pub const LIST_MAX: usize = 512;
/// Longest single environment value or argument (bytes).
pub const TEXT_MAX: usize = 32 * 1024;
/// Longest path of a health check (bytes).
pub const PATH_MAX: usize = 1024;
/// What a container may use. Every field is a hard limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[serde(deny_unknown_fields)]
#[cbor(map)]
pub struct Limits {
    /// Processors (millicores).
    #[n(0)]
    pub cpu: Millicores,
    /// Memory (bytes); swap is not given on top.
    #[n(1)]
    pub memory: ByteSize,
    /// Processes and threads.
    #[n(2)]
    pub pids: u32,
    /// Open files per process.
    #[n(3)]
    pub files: u32,
    /// Writable space on `/tmp` (bytes); it counts as memory.
    #[n(4)]
    pub scratch: ByteSize,
}

impl Default for Limits {
    /// Half a processor, 256 MiB, 100 processes, 1,024 files, 64 MiB of scratch (SECURITY, starting budgets).
    fn default() -> Self {
        Self {
            cpu: Millicores::new(500).expect("within range"),
            memory: ByteSize::mebibytes(256),
            pids: 100,
            files: 1024,
            scratch: ByteSize::mebibytes(64),
        }
    }
}

/// What happens when the container ends by itself. Docker's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, Encode, Decode)]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    /// It stays ended.
    #[default]
    #[n(0)]
    No,
    /// It is started again after a failure, at most so many times in a row (no limit if absent).
    #[n(1)]
    OnFailure(#[n(0)] Option<u32>),
    /// It is started again whatever its exit code, until it is stopped.
    #[n(2)]
    Always,
}

impl fmt::Display for RestartPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::No => f.write_str("no"),
            Self::OnFailure(None) => f.write_str("on-failure"),
            Self::OnFailure(Some(limit)) => write!(f, "on-failure:{limit}"),
            Self::Always => f.write_str("always"),
        }
    }
}

impl FromStr for RestartPolicy {
    type Err = String;

    /// Docker's spellings: `no`, `on-failure`, `on-failure:3`, `always`, `unless-stopped`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "no" => Ok(Self::No),
            "on-failure" => Ok(Self::OnFailure(None)),
            // A stop by its owner always lasts here, so that the two are one.
            "always" | "unless-stopped" => Ok(Self::Always),
            _ => text
                .strip_prefix("on-failure:")
                .and_then(|limit| limit.parse().ok().filter(|limit| *limit > 0))
                .map(|limit| Self::OnFailure(Some(limit)))
                .ok_or_else(|| format!("'{text}' is not a restart policy; use no, on-failure[:N] or always")),
        }
    }
}

/// A health check over HTTP at the exposed port, made by the provider's daemon from outside the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[serde(deny_unknown_fields)]
#[cbor(map)]
pub struct HealthCheck {
    /// Path to request; any status from 200 to 399 is healthy.
    #[n(0)]
    pub path: String,
    /// Time between checks (seconds).
    #[n(1)]
    pub interval_seconds: u32,
    /// Failures in a row that make it unhealthy.
    #[n(2)]
    pub retries: u32,
}

/// Everything that determines how a deployment runs. All of it is signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[serde(deny_unknown_fields)]
#[cbor(map)]
pub struct Specification {
    /// Its name, unique among the owner's deployments on this provider.
    #[n(0)]
    pub name: Name,
    /// What the owner called the image; for display only.
    #[n(1)]
    pub image_name: String,
    /// Replaces the image's entrypoint.
    #[n(2)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command, if not empty.
    #[n(3)]
    #[serde(default)]
    pub command: Vec<String>,
    /// Environment variables on top of the image's own.
    #[n(4)]
    #[serde(default)]
    pub environment: Vec<Variable>,
    /// The one port that may be reached from outside.
    #[n(5)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expose: Option<Port>,
    /// Whether the exposed port gets a public name at the provider's gateway.
    #[n(6)]
    pub publish: bool,
    /// Hard limits.
    #[n(7)]
    pub limits: Limits,
    /// What happens when it ends by itself.
    #[n(8)]
    pub restart: RestartPolicy,
    /// Optional health check.
    #[n(9)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthCheck>,
    /// Time between the request to end and the kill (seconds).
    #[n(10)]
    pub stop_timeout_seconds: u32,
    /// Powers of root that it keeps; of use to root alone, and only by grant.
    #[n(11)]
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    #[cbor(default, skip_if = "BTreeSet::is_empty")]
    pub capabilities: BTreeSet<Capability>,
    /// Who it runs as; root only by grant.
    #[n(12)]
    #[serde(default, skip_serializing_if = "User::is_private")]
    #[cbor(default, skip_if = "User::is_private")]
    pub user: User,
    /// Paths that are writable besides `/tmp` and `/run`.
    #[n(13)]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cbor(default, skip_if = "Vec::is_empty")]
    pub writable: Vec<Writable>,
    /// Makes the whole image writable, up to so many bytes of the host's disk; only by grant, and only where the engine
    /// keeps to a size.
    #[n(14)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writable_root: Option<ByteSize>,
    /// What it may reach outside; more than nothing only by grant.
    #[n(15)]
    #[serde(default, skip_serializing_if = "Egress::is_none")]
    #[cbor(default, skip_if = "Egress::is_none")]
    pub egress: Egress,
    /// The private network that it shares with its owner's other deployments of the same provider that name it.
    #[n(16)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Name>,
    /// What the machine must have, or refuse.
    #[n(17)]
    #[serde(default, skip_serializing_if = "Demands::is_none")]
    #[cbor(default, skip_if = "Demands::is_none")]
    pub demands: Demands,
}

/// One environment variable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[serde(deny_unknown_fields)]
#[cbor(map)]
pub struct Variable {
    /// Name: a letter or `_`, then letters, digits or `_`.
    #[n(0)]
    pub name: String,
    /// Value; any text without NUL.
    #[n(1)]
    pub value: String,
}

impl FromStr for Variable {
    type Err = String;

    /// Parses `NAME=VALUE`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text
            .split_once('=')
            .ok_or_else(|| format!("environment '{}' has no '='; write NAME=VALUE", crate::text::escape(text)))?;
        let variable = Self { name: name.to_owned(), value: value.to_owned() };
        variable.check()?;
        Ok(variable)
    }
}

impl Variable {
    fn check(&self) -> Result<(), String> {
        let name = self.name.as_bytes();
        let valid_name = !name.is_empty()
            && name.len() <= 256
            && !name[0].is_ascii_digit()
            && name.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'_');
        if !valid_name {
            return Err(format!("environment name '{}' is not valid", crate::text::escape(&self.name)));
        }
        check_text(&self.value).map_err(|why| format!("environment '{}' {why}", self.name))
    }
}

fn check_text(text: &str) -> Result<(), String> {
    if text.len() > TEXT_MAX {
        return Err(format!("is longer than {TEXT_MAX} bytes"));
    }
    if text.contains('\0') { Err("contains a NUL character".into()) } else { Ok(()) }
}

impl Specification {
    /// The image's own program with the usual limits, and nothing that would have to be asked for.
    pub fn plain(name: Name, image_name: impl Into<String>) -> Self {
        Self {
            name,
            image_name: image_name.into(),
            entrypoint: None,
            command: Vec::new(),
            environment: Vec::new(),
            expose: None,
            publish: false,
            limits: Limits::default(),
            restart: RestartPolicy::No,
            health: None,
            stop_timeout_seconds: 10,
            capabilities: BTreeSet::new(),
            user: User::Private,
            writable: Vec::new(),
            writable_root: None,
            demands: Demands::default(),
            egress: Egress::None,
            network: None,
        }
    }

    /// Checks every rule that the types alone cannot express. The sentence names the field.
    pub fn check(&self) -> Result<(), Problem> {
        let check = || -> Result<(), String> {
            if self.image_name.len() > IMAGE_NAME_MAX || self.image_name.chars().any(char::is_control) {
                return Err(format!("image name is longer than {IMAGE_NAME_MAX} bytes or has control characters"));
            }
            for (field, list) in [("entrypoint", self.entrypoint.as_ref()), ("command", Some(&self.command))] {
                let list = list.map_or(&[][..], Vec::as_slice);
                if list.len() > LIST_MAX {
                    return Err(format!("{field} has more than {LIST_MAX} arguments"));
                }
                list.iter().try_for_each(|text| check_text(text).map_err(|why| format!("{field} argument {why}")))?;
            }
            if self.environment.len() > LIST_MAX {
                return Err(format!("environment has more than {LIST_MAX} variables"));
            }
            self.environment.iter().try_for_each(Variable::check)?;
            if self.publish && self.expose.is_none() {
                return Err("publish needs a port: add --expose PORT".into());
            }
            self.check_limits()?;
            self.check_health()?;
            privilege::check(self.user, &self.capabilities)?;
            writable::check(&self.writable, &self.limits)?;
            if let Some(size) = self.writable_root.filter(|size| size.get() < 1 << 20) {
                return Err(format!("writable root must have at least 1 MiB, not {size}"));
            }
            self.egress.check()?;
            match self.stop_timeout_seconds {
                0..=300 => Ok(()),
                other => Err(format!("stop timeout must be at most 300 seconds, not {other}")),
            }
        };
        check().map_err(|message| Problem::new(Code::InvalidArgument, message))
    }

    fn check_limits(&self) -> Result<(), String> {
        let limits = &self.limits;
        if limits.cpu.get() < 10 {
            return Err(format!("cpu must be at least 0.01, not {}", limits.cpu));
        }
        // Docker refuses less than 6 MiB; below that not even the init process starts.
        if limits.memory.get() < 6 << 20 {
            return Err(format!("memory must be at least 6 MiB, not {}", limits.memory));
        }
        if !(3..=4096).contains(&limits.pids) {
            return Err(format!("pids must be between 3 and 4096, not {}", limits.pids));
        }
        if !(64..=1_048_576).contains(&limits.files) {
            return Err(format!("files must be between 64 and 1048576, not {}", limits.files));
        }
        if limits.scratch.get() < 4096 || limits.scratch > limits.memory {
            return Err(format!("scratch must be between 4 KiB and the memory limit, not {}", limits.scratch));
        }
        Ok(())
    }

    fn check_health(&self) -> Result<(), String> {
        let Some(health) = &self.health else { return Ok(()) };
        let path = health.path.as_bytes();
        if self.expose.is_none() {
            return Err("health check needs a port: add --expose PORT".into());
        }
        if path.first() != Some(&b'/') || path.len() > PATH_MAX || !path.iter().all(u8::is_ascii_graphic) {
            return Err(format!("health check path '{}' is not an absolute path", crate::text::escape(&health.path)));
        }
        if !(1..=3600).contains(&health.interval_seconds) || !(1..=100).contains(&health.retries) {
            return Err("health check interval must be 1 to 3600 seconds and retries 1 to 100".into());
        }
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use super::*;

    fn specification() -> Specification {
        Specification {
            environment: vec!["A=b=c".parse().unwrap()],
            expose: Some(Port::new(8080).unwrap()),
            publish: true,
            ..Specification::plain("web".parse().unwrap(), "web:1")
        }
    }

    #[test]
    fn good_specification_is_accepted() {
        assert_eq!(specification().check(), Ok(()));
        assert_eq!(specification().environment[0].value, "b=c");
    }

    #[test]
    fn every_bad_field_is_named() {
        type Spoil = fn(&mut Specification);
        let cases: [(&str, Spoil); 9] = [
            ("cpu", |s| s.limits.cpu = Millicores::new(1).unwrap()),
            ("memory", |s| s.limits.memory = ByteSize::mebibytes(5)),
            ("pids", |s| s.limits.pids = 0),
            ("files", |s| s.limits.files = u32::MAX),
            ("scratch", |s| s.limits.scratch = ByteSize::mebibytes(257)),
            ("environment", |s| s.environment[0].name = "A B".into()),
            ("command", |s| s.command = vec!["a\0".into()]),
            ("publish", |s| s.expose = None),
            ("stop timeout", |s| s.stop_timeout_seconds = 301),
        ];
        for (field, spoil) in cases {
            let mut bad = specification();
            spoil(&mut bad);
            let problem = bad.check().unwrap_err();
            assert!(problem.message.contains(field), "{field}: {problem}");
        }
    }

    #[test]
    fn restart_policies_parse_as_dockers() {
        assert_eq!("on-failure:3".parse(), Ok(RestartPolicy::OnFailure(Some(3))));
        assert_eq!("unless-stopped".parse(), Ok(RestartPolicy::Always));
        assert!("on-failure:0".parse::<RestartPolicy>().is_err());
        assert!("sometimes".parse::<RestartPolicy>().is_err());
    }
}
