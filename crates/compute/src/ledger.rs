//! The ledger of shares: what is held, what is free. Recomputed from the rows each time, so that it cannot drift.

use peer_proto::PeerId;
use peer_proto::code::{Code, Threat};
use peer_proto::deploy::Limits;
use peer_proto::grant::DeployGrant;
use peer_proto::query::Capacity;
use peer_proto::unit::{ByteSize, Millicores};
use peer_state::database::{DatabaseError, Tx};
use peer_trust::authorise::Held;
use peer_trust::limits;
use peer_trust::refusal::Refusal;

use crate::record::Record;

/// What this machine offers to all peers together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// Processors (millicores).
    pub cpu: u64,
    /// Memory (bytes).
    pub memory: u64,
    /// Deployments that hold a share at one time.
    pub containers: u32,
}

/// What this machine offers now: what its owner has set, and else what its settings say.
pub fn offer(tx: &Tx<'_>, settings: Offer) -> Result<Offer, DatabaseError> {
    let set = limits::load(tx)?;
    Ok(Offer {
        cpu: set.cpu.map_or(settings.cpu, |cpu| cpu.get().into()),
        memory: set.memory.map_or(settings.memory, ByteSize::get),
        containers: set.containers.unwrap_or(settings.containers),
    })
}

/// Most deployments that a peer with this grant may have here, running or not.
pub fn rows_max(granted: Option<&DeployGrant>) -> usize {
    let containers = granted.map_or(0, |grant| grant.max_containers);
    usize::try_from(containers.saturating_mul(4).max(8)).unwrap_or(usize::MAX)
}

/// What all the given deployments hold; of one owner, or of all.
pub fn held(records: &[Record], owner: Option<&PeerId>) -> Held {
    records
        .iter()
        .filter(|record| record.life.state().holds_share() && owner.is_none_or(|owner| record.owner == *owner))
        .fold(Held::default(), |sum, record| Held {
            cpu: sum.cpu.saturating_add(record.specification.limits.cpu.get().into()),
            memory: sum.memory.saturating_add(record.specification.limits.memory.get()),
            containers: sum.containers.saturating_add(1),
        })
}

/// What this deployment's owner held before it: of two that a narrowed grant has no room for, the older goes on.
pub fn held_before(records: &[Record], one: &Record) -> Held {
    let age = |record: &Record| (record.created_at, record.id);
    let older: Vec<_> = records.iter().filter(|record| age(record) < age(one)).cloned().collect();
    held(&older, Some(&one.owner))
}

/// Checks that a share is free beside what is held.
pub fn reserve(offer: &Offer, held: &Held, share: &Limits) -> Result<(), Refusal> {
    let lacking = if held.cpu.saturating_add(share.cpu.get().into()) > offer.cpu {
        "processors"
    } else if held.memory.saturating_add(share.memory.get()) > offer.memory {
        "memory"
    } else if held.containers >= offer.containers {
        "room for one more deployment"
    } else {
        return Ok(());
    };
    let message =
        format!("this machine has not enough {lacking} free at present; stop something, ask for less, or try later");
    Err(Refusal::new(Code::NoCapacity, Threat::V5, message))
}

/// What a peer with this grant could still get.
pub fn free(granted: Option<DeployGrant>, offer: Offer, mine: Held, all: Held, architecture: &str) -> Capacity {
    let least = |offered: u64, held: u64, limit: Option<u64>, used: u64| {
        let left = offered.saturating_sub(held);
        limit.map_or(left, |limit| left.min(limit.saturating_sub(used)))
    };
    let grant = granted.as_ref();
    let cpu = least(offer.cpu, all.cpu, grant.map(|g| g.max_cpu.get().into()), mine.cpu);
    let memory = least(offer.memory, all.memory, grant.map(|g| g.max_memory.get()), mine.memory);
    let containers = least(
        offer.containers.into(),
        all.containers.into(),
        grant.map(|g| g.max_containers.into()),
        mine.containers.into(),
    );
    Capacity {
        free_cpu: u32::try_from(cpu).ok().and_then(|cpu| Millicores::new(cpu).ok()),
        free_memory: ByteSize::new(memory).ok(),
        free_containers: u32::try_from(containers).unwrap_or(u32::MAX),
        architecture: architecture.to_owned(),
        isolation: None,
        granted,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn v5_deployments_at_rest_are_bounded_by_the_grant() {
        let grant =
            |containers| DeployGrant::new(Millicores::new(1).expect("in range"), ByteSize::mebibytes(1), containers);
        let bounds = [0, 1, 8, u32::MAX].map(|containers| rows_max(Some(&grant(containers))));
        assert_eq!(bounds, [8, 8, 32, u32::MAX as usize]);
        assert_eq!(rows_max(None), 8);
    }

    proptest! {
        #[test]
        fn v5_what_is_reserved_never_exceeds_the_offer(
            cpu in 1_u32..4000, memory in 1_u64..(1 << 31), held_cpu in any::<u64>(), held_memory in any::<u64>(),
            containers in any::<u32>(),
        ) {
            let offer = Offer { cpu: 4000, memory: 2 << 30, containers: 8 };
            let held = Held { cpu: held_cpu, memory: held_memory, containers };
            let share = Limits {
                cpu: Millicores::new(cpu).expect("in range"),
                memory: ByteSize::new(memory).expect("in range"),
                ..Limits::default()
            };
            if reserve(&offer, &held, &share).is_ok() {
                prop_assert!(held_cpu + u64::from(cpu) <= offer.cpu);
                prop_assert!(held_memory + memory <= offer.memory);
                prop_assert!(containers < offer.containers);
            }
        }
    }
}
