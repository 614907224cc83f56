//! Refused connections as few audit lines: the first of a source at once, then one line a minute with a count.
//!
//! Anybody can knock, as often as he likes and from many addresses. What that costs the audit log, and memory, is bounded
//! here (V1): so many sources are told apart, all others are counted together.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use multiaddr::{Multiaddr, Protocol};
use peer_proto::PeerId;
use peer_proto::code::Threat;
use peer_proto::unit::Timestamp;

/// Sources that are told apart at one time.
pub const SOURCES_MAX: usize = 256;
/// Shortest time between two lines about one source (milliseconds).
pub const PAUSE_MILLISECONDS: u64 = 60_000;

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

/// A line for the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// About whom.
    pub source: Source,
    /// Refusals since the last line.
    pub count: u64,
    /// What the latest of them was.
    pub detail: String,
}

#[derive(Debug)]
struct Counted {
    told_at: Timestamp,
    waiting: u64,
    detail: String,
}

/// Counts refusals by their source.
#[derive(Debug, Default)]
pub struct Refusals {
    sources: HashMap<Source, Counted>,
}

impl Refusals {
    /// Takes `count` refusals; the line to write now, if the source has been quiet.
    pub fn note(&mut self, source: Source, count: u64, detail: String, now: Timestamp) -> Option<Line> {
        let known = self.sources.contains_key(&source);
        let source = if known || self.sources.len() < SOURCES_MAX { source } else { Source::Others };
        if let Some(counted) = self.sources.get_mut(&source) {
            counted.waiting = counted.waiting.saturating_add(count);
            counted.detail = detail;
            return None;
        }
        self.sources.insert(source, Counted { told_at: now, waiting: 0, detail: String::new() });
        Some(Line { source, count, detail })
    }

    /// The lines that are due. Sources that have been quiet since their last line are forgotten.
    pub fn due(&mut self, now: Timestamp) -> Vec<Line> {
        let mut lines = Vec::new();
        self.sources.retain(|source, counted| {
            // A clock that was set back must not silence anybody for ever.
            if now.since(counted.told_at) < PAUSE_MILLISECONDS && now >= counted.told_at {
                return true;
            }
            if counted.waiting == 0 {
                return false;
            }
            lines.push(Line { source: *source, count: counted.waiting, detail: std::mem::take(&mut counted.detail) });
            (counted.told_at, counted.waiting) = (now, 0);
            true
        });
        lines
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;

    fn address(text: &str) -> Source {
        Source::of(&text.parse().unwrap())
    }

    #[test]
    fn v1_a_flood_from_one_address_is_one_line_a_minute() {
        let (mut refusals, start) = (Refusals::default(), Timestamp(1_000_000));
        let source = address("/ip4/192.0.2.1/tcp/5");
        assert_eq!(refusals.note(source, 1, "first".into(), start).unwrap().count, 1);
        for _ in 0..10_000 {
            assert_eq!(refusals.note(source, 1, "again".into(), start.plus(1)), None);
        }
        assert!(refusals.due(start.plus(PAUSE_MILLISECONDS - 1)).is_empty());
        let lines = refusals.due(start.plus(PAUSE_MILLISECONDS));
        assert_eq!(lines, [Line { source, count: 10_000, detail: "again".into() }]);
        assert!(refusals.due(start.plus(2 * PAUSE_MILLISECONDS)).is_empty());
        assert!(refusals.sources.is_empty(), "a quiet source is forgotten");
    }

    #[test]
    fn v1_a_flood_from_many_addresses_keeps_memory_and_lines_bounded() {
        let (mut refusals, now) = (Refusals::default(), Timestamp(1_000_000));
        let told = (0..100_000_u32)
            .filter_map(|number| {
                let source = Source::Address(IpAddr::V4(number.into()));
                refusals.note(source, 1, String::new(), now)
            })
            .count();
        assert!(told <= SOURCES_MAX + 1, "{told}");
        assert!(refusals.sources.len() <= SOURCES_MAX + 1);
        let lines = refusals.due(now.plus(PAUSE_MILLISECONDS));
        assert_eq!(lines.len(), 1);
        assert_eq!((lines[0].source, lines[0].count + told as u64), (Source::Others, 100_000));
    }

    #[test]
    fn v1_one_ipv6_network_is_one_source() {
        assert_eq!(address("/ip6/2001:db8::1/tcp/1"), address("/ip6/2001:db8::ffff:2/tcp/9"));
        assert_ne!(address("/ip6/2001:db8::1/tcp/1"), address("/ip6/2001:db8:0:1::1/tcp/1"));
        assert_eq!(address("/ip6/::ffff:192.0.2.1/tcp/1"), address("/ip4/192.0.2.1/tcp/1"));
    }
}
