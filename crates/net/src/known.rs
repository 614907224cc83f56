//! Where those who are admitted are known to be: for them places are kept that no crowd of strangers can take.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{PoisonError, RwLock, RwLockWriteGuard};

use libp2p::{Multiaddr, PeerId};

use crate::gate::{Policy, counted_address};

/// Addresses, as connections are counted. It is bounded by the policy.
#[derive(Debug, Default)]
pub(crate) struct Known(RwLock<Addresses>);

#[derive(Debug, Default)]
struct Addresses {
    /// Those that the policy names.
    listed: HashSet<IpAddr>,
    /// From where each admitted peer has connected last.
    seen: HashMap<PeerId, IpAddr>,
}

impl Known {
    /// What this policy names.
    pub(crate) fn listed_in(policy: &Policy) -> Self {
        let known = Self::default();
        known.follow(policy);
        known
    }

    fn write(&self) -> RwLockWriteGuard<'_, Addresses> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what belongs to those whom this policy admits.
    pub(crate) fn follow(&self, policy: &Policy) {
        let listed = policy.admitted.values().flat_map(|admission| &admission.addresses).map(counted_address).collect();
        let mut addresses = self.write();
        addresses.listed = listed;
        addresses.seen.retain(|peer, _| policy.role(peer).is_some());
    }

    /// Notes from where an admitted peer has connected.
    pub(crate) fn note(&self, peer: PeerId, address: &Multiaddr) {
        self.write().seen.insert(peer, counted_address(address));
    }

    /// Whether somebody who is admitted is known to be there.
    pub(crate) fn contains(&self, address: &IpAddr) -> bool {
        let addresses = self.0.read().unwrap_or_else(PoisonError::into_inner);
        addresses.listed.contains(address) || addresses.seen.values().any(|seen| seen == address)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;
    use crate::gate::{Admission, Role};

    #[test]
    fn v1_addresses_are_known_for_as_long_as_somebody_there_is_admitted() {
        let peer = PeerId::random();
        let addresses = vec!["/ip4/192.0.2.1/tcp/1".parse().unwrap()];
        let mut policy = Policy::default();
        policy.admitted.insert(peer, Admission { role: Role::Peer, addresses });
        let known = Known::listed_in(&policy);
        let knows = |last: u8| known.contains(&IpAddr::from([192, 0, 2, last]));
        assert!(knows(1) && !knows(2));
        known.note(peer, &"/ip4/192.0.2.2/tcp/4000".parse().unwrap());
        assert!(knows(1) && knows(2));
        known.note(peer, &"/ip4/192.0.2.3/tcp/4000".parse().unwrap());
        assert!(!knows(2) && knows(3), "the last one counts");
        known.follow(&Policy::default());
        assert!(!knows(1) && !knows(3));
    }
}
