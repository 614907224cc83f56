//! What the owner of a machine lets others use of it, set while the daemon runs (`peerctl limits`).

use std::fmt;

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::hours::Hours;
use crate::unit::{ByteSize, Millicores};

/// Slowest bandwidth that can be set (bytes per second): below it, transfers are given up for lost.
pub const BANDWIDTH_MIN: u64 = 16 * 1024;

/// Limits for the whole machine, or changes of one peer's. What is absent is not limited here, or stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[serde(deny_unknown_fields)]
#[cbor(map)]
pub struct Bounds {
    /// Processors in sum (millicores).
    #[n(0)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Millicores>,
    /// Memory in sum (bytes).
    #[n(1)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,
    /// Deployments that hold resources at one time.
    #[n(2)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub containers: Option<u32>,
    /// Disk for images that were brought, and layers on their way (bytes).
    #[n(3)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<ByteSize>,
    /// Bytes per second, in both directions together.
    #[n(4)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<ByteSize>,
    /// When containers may run.
    #[n(5)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hours: Option<Hours>,
}

/// Names one field of [`Bounds`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LimitKey {
    /// Processors.
    Cpu,
    /// Memory.
    Memory,
    /// Deployments.
    Containers,
    /// Disk.
    Disk,
    /// Bandwidth.
    Bandwidth,
    /// Hours.
    Hours,
}

impl LimitKey {
    /// Every key, in the order in which they are shown.
    pub const ALL: [Self; 6] = [Self::Cpu, Self::Memory, Self::Containers, Self::Disk, Self::Bandwidth, Self::Hours];

    /// The stable text.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Containers => "containers",
            Self::Disk => "disk",
            Self::Bandwidth => "bandwidth",
            Self::Hours => "hours",
        }
    }
}

impl fmt::Display for LimitKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Bounds {
    /// Takes over what `other` sets, and clears these keys first.
    pub fn change(&mut self, other: &Self, clear: &[LimitKey]) {
        for key in clear {
            match key {
                LimitKey::Cpu => self.cpu = None,
                LimitKey::Memory => self.memory = None,
                LimitKey::Containers => self.containers = None,
                LimitKey::Disk => self.disk = None,
                LimitKey::Bandwidth => self.bandwidth = None,
                LimitKey::Hours => self.hours = None,
            }
        }
        let Self { cpu, memory, containers, disk, bandwidth, hours } = other.clone();
        self.cpu = cpu.or(self.cpu);
        self.memory = memory.or(self.memory);
        self.containers = containers.or(self.containers);
        self.disk = disk.or(self.disk);
        self.bandwidth = bandwidth.or(self.bandwidth);
        self.hours = hours.or(self.hours.take());
    }

    /// What is set, as text for people and the audit log.
    pub fn in_words(&self) -> String {
        let set = [
            self.cpu.map(|cpu| format!("cpu={cpu}")),
            self.memory.map(|memory| format!("memory={memory}")),
            self.containers.map(|containers| format!("containers={containers}")),
            self.disk.map(|disk| format!("disk={disk}")),
            self.bandwidth.map(|bandwidth| format!("bandwidth={bandwidth}/s")),
            self.hours.as_ref().map(|hours| format!("hours={hours}")),
        ];
        let words: Vec<_> = set.into_iter().flatten().collect();
        if words.is_empty() { "nothing".to_owned() } else { words.join(" ") }
    }
}

/// `PATCH /v1/limits`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeLimits {
    /// Name, PeerId or unique prefix of a peer; the whole machine, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// What to set.
    #[serde(default)]
    pub set: Bounds,
    /// What to take back.
    #[serde(default)]
    pub unset: Vec<LimitKey>,
}

/// `GET /v1/limits`, and the answer to [`ChangeLimits`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitsReport {
    /// Those of the whole machine.
    pub machine: Vec<LimitLine>,
    /// Those of each peer that may deploy here.
    pub peers: Vec<PeerLimits>,
}

/// The limits of one peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerLimits {
    /// Its name here.
    pub peer: String,
    /// Its PeerId.
    pub peer_id: String,
    /// Its limits.
    pub limits: Vec<LimitLine>,
}

/// One limit and how it stands. Amounts are millicores, bytes, deployments or bytes per second, after their key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitLine {
    /// What is limited.
    pub key: LimitKey,
    /// The most that may be used; absent if there is no limit, and for hours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    /// The hours, if they are limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hours: Option<Hours>,
    /// What is held at present; absent for bandwidth and hours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<u64>,
    /// By how much what is held is more than the limit. Nothing is ended for it; nothing new is admitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub over: Option<u64>,
    /// Where the limit comes from: `limits`, `grant`, or where the setting that stands in for it comes from
    /// (`default`, `file`, `environment`, `flag`).
    pub source: String,
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use super::*;

    #[test]
    fn changes_set_what_they_name_and_clear_what_they_name() {
        let mut limits =
            Bounds { cpu: Some("2".parse().unwrap()), disk: Some("1g".parse().unwrap()), ..Bounds::default() };
        let change =
            Bounds { cpu: Some("1".parse().unwrap()), hours: Some("1:00-2:00".parse().unwrap()), ..Bounds::default() };
        limits.change(&change, &[LimitKey::Disk, LimitKey::Cpu]);
        assert_eq!(limits, change);
        limits.change(&Bounds::default(), &LimitKey::ALL);
        assert_eq!((limits.in_words().as_str(), &limits), ("nothing", &Bounds::default()));
        let texts: Vec<_> = LimitKey::ALL.iter().map(|key| serde_json_like(*key)).collect();
        assert_eq!(texts, LimitKey::ALL.map(LimitKey::as_str));
    }

    fn serde_json_like(key: LimitKey) -> String {
        format!("{key:?}").to_lowercase()
    }
}
