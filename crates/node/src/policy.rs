//! The gate's policy: who may connect now, worked out anew from trust list, gateways and open invitations.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use peer_net::{Admission, Policy, Role};
use peer_proto::PeerId;
use peer_proto::unit::Timestamp;
use peer_trust::trust::{Snapshot, Trust};
use tokio::sync::watch;

use crate::clock;
use crate::gateways::{GatewayRecord, Gateways};
use crate::introduction::Answered;

/// Longest time between two looks at the clock, which may be set while we wait.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// Who may connect at `now`. `answered` are the one-time keys of invitations that are just being answered: they have
/// been used up, and their connection must last until the answer has arrived.
pub(crate) fn policy(
    list: &Snapshot,
    gateways: &[GatewayRecord],
    answered: &Answered,
    me: PeerId,
    now: Timestamp,
) -> Policy {
    let mut admitted = HashMap::new();
    let joiner = || Admission { role: Role::Joiner, addresses: Vec::new() };
    let open = list.invitations.values().filter(|open| now < open.expires_at).map(|open| open.ticket);
    admitted.extend(open.chain(answered.keys().copied()).map(|ticket| (ticket, joiner())));
    for gateway in gateways {
        let admission = Admission { role: Role::Gateway, addresses: vec![gateway.address.clone()] };
        admitted.insert(gateway.peer, admission);
    }
    for peer in list.peers.values() {
        admitted.insert(peer.peer, Admission { role: Role::Peer, addresses: peer.addresses() });
    }
    admitted.remove(&me);
    Policy { admitted }
}

/// How long the policy stays as it is if nothing is changed: until the next invitation ends.
fn valid_for(list: &Snapshot, now: Timestamp) -> Duration {
    let ends = list.invitations.values().map(|open| open.expires_at).filter(|end| *end > now);
    ends.min().map_or(LOOK_AGAIN, |end| Duration::from_millis(end.since(now)).min(LOOK_AGAIN))
}

/// What the policy is made of.
#[derive(Debug)]
pub struct Inputs {
    /// Peers and invitations.
    pub trust: Trust,
    /// Gateways.
    pub gateways: Gateways,
    /// One-time keys of invitations that are being answered.
    pub answered: watch::Receiver<Answered>,
    /// Whether the machine was closed in an emergency.
    pub closed: watch::Receiver<bool>,
    /// Ourselves.
    pub me: PeerId,
}

impl Inputs {
    /// The policy now.
    pub fn policy(&self) -> Policy {
        if *self.closed.borrow() {
            return Policy { admitted: HashMap::new() };
        }
        let answered = self.answered.borrow();
        policy(&self.trust.snapshot(), &self.gateways.list(), &answered, self.me, clock::now())
    }

    /// Publishes a new policy whenever it changes, until nobody follows it any more.
    pub async fn follow(mut self, sender: watch::Sender<Arc<Policy>>) {
        let (mut peers, mut gateways) = (self.trust.watch(), self.gateways.watch());
        loop {
            // Marked as seen before they are read, so that no change in between is missed.
            peers.mark_unchanged();
            gateways.mark_unchanged();
            self.answered.mark_unchanged();
            self.closed.mark_unchanged();
            let policy = self.policy();
            sender.send_if_modified(|present| {
                let changed = **present != policy;
                if changed {
                    *present = Arc::new(policy);
                }
                changed
            });
            let wait = valid_for(&self.trust.snapshot(), clock::now());
            tokio::select! {
                () = sender.closed() => return,
                changed = peers.changed() => if changed.is_err() { return },
                changed = gateways.changed() => if changed.is_err() { return },
                changed = self.answered.changed() => if changed.is_err() { return },
                changed = self.closed.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(wait) => {}
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use peer_proto::card::{Card, SignedCard};
    use peer_proto::grant::Grants;
    use peer_proto::identity::Identity;
    use peer_trust::peers::{InvitationRecord, PeerRecord};

    use super::*;

    fn peer(identity: &Identity) -> PeerRecord {
        let addresses = ["/ip4/192.0.2.1/tcp/4100".parse().unwrap()];
        let card = Card::new(identity, "bob".parse().unwrap(), &addresses, [0; 32], Timestamp(1));
        let card = SignedCard::sign(identity, card);
        PeerRecord::new(&card, "bob".parse().unwrap(), Grants::default(), Timestamp(1))
    }

    fn invitation(ticket: PeerId, end: u64) -> InvitationRecord {
        InvitationRecord { ticket, grants: Grants::default(), name: None, expires_at: Timestamp(end) }
    }

    fn role(policy: &Policy, peer: &PeerId) -> Option<Role> {
        policy.admitted.get(peer).map(|admission| admission.role)
    }

    #[test]
    fn v1_policy_admits_exactly_peers_gateways_and_open_invitations() {
        let identities: Vec<_> = (0..5).map(|_| Identity::generate()).collect();
        let [bob, gateway, open, ended, me] = identities.iter().map(Identity::peer_id).collect::<Vec<_>>()[..] else {
            unreachable!("five identities were made")
        };
        let mut list = Snapshot::default();
        list.peers.insert(bob, peer(&identities[0]));
        list.peers.insert(me, peer(&identities[4]));
        list.invitations.insert(open, invitation(open, 100));
        list.invitations.insert(ended, invitation(ended, 50));
        let address: multiaddr::Multiaddr = "/ip4/192.0.2.2/tcp/4101".parse().unwrap();
        let gateways = [GatewayRecord { peer: gateway, address: address.clone(), added_at: Timestamp(1) }];
        let made = policy(&list, &gateways, &Answered::new(), me, Timestamp(50));
        assert_eq!(made.admitted.len(), 3);
        assert_eq!(role(&made, &bob), Some(Role::Peer));
        assert_eq!(made.admitted[&bob].addresses.len(), 1);
        assert_eq!(role(&made, &gateway), Some(Role::Gateway));
        assert_eq!(made.admitted[&gateway].addresses, [address]);
        assert_eq!(role(&made, &open), Some(Role::Joiner));
        assert!(made.admitted[&open].addresses.is_empty(), "a joiner is never dialled");
        assert_eq!(valid_for(&list, Timestamp(50)), Duration::from_millis(50));
    }

    #[test]
    fn used_invitation_is_admitted_only_while_it_is_answered() {
        let (ticket, me) = (Identity::generate().peer_id(), Identity::generate().peer_id());
        let answered = Answered::from([(ticket, 1)]);
        let during = policy(&Snapshot::default(), &[], &answered, me, Timestamp(1));
        assert_eq!(role(&during, &ticket), Some(Role::Joiner));
        let after = policy(&Snapshot::default(), &[], &Answered::new(), me, Timestamp(1));
        assert!(after.admitted.is_empty());
        assert_eq!(valid_for(&Snapshot::default(), Timestamp(1)), LOOK_AGAIN);
    }

    #[test]
    fn trust_goes_before_other_roles() {
        let identity = Identity::generate();
        let (both, me) = (identity.peer_id(), Identity::generate().peer_id());
        let mut list = Snapshot::default();
        list.peers.insert(both, peer(&identity));
        let address = "/ip4/192.0.2.2/tcp/4101".parse().unwrap();
        let gateways = [GatewayRecord { peer: both, address, added_at: Timestamp(1) }];
        let made = policy(&list, &gateways, &Answered::from([(both, 1)]), me, Timestamp(1));
        assert_eq!(role(&made, &both), Some(Role::Peer));
    }
}
