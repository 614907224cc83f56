//! The card of this machine: who it is and where it can be reached.

use std::net::IpAddr;

use multiaddr::{Multiaddr, Protocol};
use peer_net::Network;
use peer_proto::card::{Card, SignedCard};
use peer_proto::unit::Timestamp;
use peer_trust::key_file::MachineIdentity;

use crate::settings::Settings;

/// Signs a card with the addresses that are announced or, if none are, those that are listened on.
pub fn sign(identity: &MachineIdentity, settings: &Settings, network: &Network, now: Timestamp) -> SignedCard {
    let addresses = addresses(&settings.announce, network.listen_addresses());
    let card = Card::new(&identity.key, identity.name.clone(), &addresses, identity.recovery_key, now);
    SignedCard::sign(&identity.key, card)
}

/// The addresses for others. Those that mean something on this machine alone are named only if there is nothing else.
pub fn addresses(announced: &[Multiaddr], listening: Vec<Multiaddr>) -> Vec<Multiaddr> {
    if !announced.is_empty() {
        return announced.to_vec();
    }
    let mut listening: Vec<_> = listening.into_iter().filter(|address| reach(address) != Reach::Nobody).collect();
    if listening.iter().any(|address| reach(address) == Reach::Others) {
        listening.retain(|address| reach(address) == Reach::Others);
    }
    listening.dedup();
    listening
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    Nobody,
    ThisMachine,
    Others,
}

fn reach(address: &Multiaddr) -> Reach {
    let ip: IpAddr = match address.iter().next() {
        Some(Protocol::Ip4(ip)) => ip.into(),
        Some(Protocol::Ip6(ip)) => ip.into(),
        _ => return Reach::Others,
    };
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    if ip.is_unspecified() || link_local {
        Reach::Nobody
    } else if ip.is_loopback() {
        Reach::ThisMachine
    } else {
        Reach::Others
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;

    fn parse(texts: &[&str]) -> Vec<Multiaddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn card_names_what_others_can_reach() {
        let all = parse(&[
            "/ip4/0.0.0.0/tcp/1",
            "/ip4/127.0.0.1/tcp/1",
            "/ip4/192.168.1.5/tcp/1",
            "/ip6/::1/tcp/1",
            "/ip6/fe80::1/tcp/1",
            "/ip6/2001:db8::1/tcp/1",
        ]);
        assert_eq!(addresses(&[], all.clone()), parse(&["/ip4/192.168.1.5/tcp/1", "/ip6/2001:db8::1/tcp/1"]));
        assert_eq!(addresses(&[], all[..2].to_vec()), parse(&["/ip4/127.0.0.1/tcp/1"]));
        let announced = parse(&["/dns/home.example.org/tcp/4100"]);
        assert_eq!(addresses(&announced, all), announced);
    }
}
