//! Grants: what one machine allows one peer, always with limits. The default is nothing.

use std::collections::BTreeSet;

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::deploy::{Capability, EgressGrant};
use crate::hours::Hours;
use crate::limits::Bounds;
use crate::unit::{ByteSize, Millicores, Timestamp};

/// Everything that a peer is allowed here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[serde(deny_unknown_fields)]
#[cbor(map)]
pub struct Grants {
    /// May run containers here.
    #[n(0)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deploy: Option<DeployGrant>,
}

impl Grants {
    /// Whether containers may be run at `now`.
    pub fn may_deploy(&self, now: Timestamp) -> bool {
        self.deploy.as_ref().is_some_and(|grant| grant.is_live(now))
    }
}

/// Permission to run containers, for all deployments of the peer together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[serde(deny_unknown_fields)]
#[cbor(map)]
pub struct DeployGrant {
    /// Processors in sum (millicores).
    #[n(0)]
    pub max_cpu: Millicores,
    /// Memory in sum (bytes).
    #[n(1)]
    pub max_memory: ByteSize,
    /// Deployments that hold resources at one time.
    #[n(2)]
    pub max_containers: u32,
    /// Moment at which the grant ends; never, if absent.
    #[n(3)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// Powers of root that a container may keep.
    #[n(4)]
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    #[cbor(default, skip_if = "BTreeSet::is_empty")]
    pub capabilities: BTreeSet<Capability>,
    /// Whether a container may run as root inside.
    #[n(5)]
    #[serde(default, skip_serializing_if = "is_false")]
    #[cbor(default, skip_if = "is_false")]
    pub root: bool,
    /// How many bytes of disk the writable root of one container may have; none if absent.
    #[n(6)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writable_root: Option<ByteSize>,
    /// What a container may reach outside at most.
    #[n(7)]
    #[serde(default, skip_serializing_if = "EgressGrant::is_none")]
    #[cbor(default, skip_if = "EgressGrant::is_none")]
    pub egress: EgressGrant,
    /// Disk for the images that it brings (bytes); as the machine has it, if absent.
    #[n(8)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_disk: Option<ByteSize>,
    /// Bytes per second through this machine's daemon, in both directions together; not limited, if absent.
    #[n(9)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bandwidth: Option<ByteSize>,
    /// When its containers may run here, in this machine's local time; always, if absent.
    #[n(10)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hours: Option<Hours>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde and minicbor call it so")]
fn is_false(flag: &bool) -> bool {
    !*flag
}

impl DeployGrant {
    /// These limits, without an end, and nothing besides.
    pub fn new(max_cpu: Millicores, max_memory: ByteSize, max_containers: u32) -> Self {
        Self {
            max_cpu,
            max_memory,
            max_containers,
            expires_at: None,
            capabilities: BTreeSet::new(),
            root: false,
            writable_root: None,
            egress: EgressGrant::None,
            max_disk: None,
            max_bandwidth: None,
            hours: None,
        }
    }

    /// What is granted if nobody says how much: one processor, a gibibyte of memory, four deployments.
    pub fn usual() -> Self {
        Self::new(Millicores::new(1000).expect("within range"), ByteSize::mebibytes(1024), 4)
    }

    /// The limits alone, without what is permitted and for how long.
    pub fn bounds(&self) -> Bounds {
        Bounds {
            cpu: Some(self.max_cpu),
            memory: Some(self.max_memory),
            containers: Some(self.max_containers),
            disk: self.max_disk,
            bandwidth: self.max_bandwidth,
            hours: self.hours.clone(),
        }
    }

    /// Replaces the limits. A grant always bounds processors, memory and deployments: what is absent of these stays.
    pub fn set_bounds(&mut self, bounds: Bounds) {
        self.max_cpu = bounds.cpu.unwrap_or(self.max_cpu);
        self.max_memory = bounds.memory.unwrap_or(self.max_memory);
        self.max_containers = bounds.containers.unwrap_or(self.max_containers);
        (self.max_disk, self.max_bandwidth, self.hours) = (bounds.disk, bounds.bandwidth, bounds.hours);
    }

    /// Whether the grant still holds at `now`.
    pub fn is_live(&self, now: Timestamp) -> bool {
        self.expires_at.is_none_or(|end| now < end)
    }
}
