//! Whom a refused connection is counted for. Anybody can knock, as often as he likes and from many addresses (V1).

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use multiaddr::{Multiaddr, Protocol};
use peer_proto::PeerId;
use peer_proto::code::Threat;
use peer_trust::tally::Tally;

/// Sources that are told apart at one time.
pub const SOURCES_MAX: usize = 256;

/// Whom a refusal is counted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// Connections from an IPv4 address or an IPv6 /64 network (V1).
    Address(IpAddr),
    /// Another key at the address of this peer (V6).
    WrongKey(PeerId),
    /// All that find no place of their own.
    Others,
}

impl Source {
    /// The source of a connection from this address.
    pub fn of(address: &Multiaddr) -> Self {
        for component in address {
            match component {
                Protocol::Ip4(ip) => return Self::Address(IpAddr::V4(ip)),
                Protocol::Ip6(ip) => {
                    let network = Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX));
                    return Self::Address(ip.to_ipv4_mapped().map_or(IpAddr::V6(network), IpAddr::V4));
                }
                _ => {}
            }
        }
        Self::Others
    }

    /// The threat that the refusal answers.
    pub fn threat(&self) -> Threat {
        if matches!(self, Self::WrongKey(_)) { Threat::V6 } else { Threat::V1 }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::WrongKey(peer) => peer.fmt(f),
            Self::Others => f.write_str("other addresses"),
        }
    }
}

/// Counts refused connections by their source.
pub fn refused_connections() -> Tally<Source> {
    Tally::new(SOURCES_MAX, Source::Others)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use std::time::Instant;

    use super::*;

    fn address(text: &str) -> Source {
        Source::of(&text.parse().unwrap())
    }

    #[test]
    fn v1_a_flood_from_one_address_is_one_line_a_minute() {
        let (mut refusals, now) = (refused_connections(), Instant::now());
        let lines = (0..10_000_u32).filter_map(|port| {
            let source = address(&format!("/ip4/192.0.2.1/tcp/{}", port % 60_000 + 1));
            refusals.note(source, 1, String::new(), now)
        });
        assert_eq!(lines.count(), 1);
    }

    #[test]
    fn v1_a_flood_from_many_addresses_keeps_memory_and_lines_bounded() {
        let (mut refusals, now) = (refused_connections(), Instant::now());
        let sources = (0..100_000_u32).map(|number| Source::Address(IpAddr::V4(number.into())));
        let told = sources.filter_map(|source| refusals.note(source, 1, String::new(), now)).count();
        assert!(told <= SOURCES_MAX + 1, "{told}");
        let lines = refusals.rest();
        assert_eq!(lines.len(), 1);
        assert_eq!((lines[0].kind, lines[0].count + told as u64), (Source::Others, 100_000));
    }

    #[test]
    fn v1_one_ipv6_network_is_one_source() {
        assert_eq!(address("/ip6/2001:db8::1/tcp/1"), address("/ip6/2001:db8::ffff:2/tcp/9"));
        assert_ne!(address("/ip6/2001:db8::1/tcp/1"), address("/ip6/2001:db8:0:1::1/tcp/1"));
        assert_eq!(address("/ip6/::ffff:192.0.2.1/tcp/1"), address("/ip4/192.0.2.1/tcp/1"));
    }
}
