//! Which IPv4 addresses are no part of the public internet.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use minicbor::encode::Write;
use minicbor::{Decode, Decoder, Encode, Encoder, decode, encode};
use peer_proto::frame::as_text;

/// A range of IPv4 addresses: those that share their first bits with its own address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Range {
    first: u32,
    length: u8,
}

impl<C> Encode<C> for Range {
    fn encode<W: Write>(&self, encoder: &mut Encoder<W>, context: &mut C) -> Result<(), encode::Error<W::Error>> {
        as_text::encode(self, encoder, context)
    }
}

impl<'b, C> Decode<'b, C> for Range {
    fn decode(decoder: &mut Decoder<'b>, context: &mut C) -> Result<Self, decode::Error> {
        as_text::decode(decoder, context)
    }
}

impl Range {
    /// The range of this length that `address` lies in. A length is at most 32.
    pub const fn around(address: Ipv4Addr, length: u8) -> Self {
        assert!(length <= 32, "an IPv4 prefix has at most 32 bits");
        Self { first: address.to_bits() & mask(length), length }
    }

    /// The first address.
    pub fn first(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.first)
    }

    /// How many leading bits its addresses share.
    pub fn length(self) -> u8 {
        self.length
    }

    /// The address so far behind the first one.
    pub fn nth(self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.first.wrapping_add(offset))
    }

    /// Whether it holds the address.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & mask(self.length) == self.first
    }

    /// Whether the two have an address in common.
    pub fn overlaps(self, other: Self) -> bool {
        let common = mask(self.length.min(other.length));
        self.first & common == other.first & common
    }
}

const fn mask(length: u8) -> u32 {
    if length == 0 { 0 } else { u32::MAX << (32 - length) }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first(), self.length)
    }
}

impl FromStr for Range {
    type Err = String;

    /// Parses `198.18.0.0/15`; the address must be the first one.
    fn from_str(text: &str) -> Result<Self, String> {
        let invalid = || format!("'{}' is not a range such as 198.18.0.0/15", peer_proto::text::escape(text));
        let (address, length) = text.split_once('/').ok_or_else(invalid)?;
        let address: Ipv4Addr = address.parse().map_err(|_| invalid())?;
        let length = length.parse().ok().filter(|length| *length <= 32).ok_or_else(invalid)?;
        let range = Self::around(address, length);
        if range.to_string() == text { Ok(range) } else { Err(invalid()) }
    }
}

const fn special(a: u8, b: u8, c: u8, d: u8, length: u8) -> Range {
    Range::around(Ipv4Addr::new(a, b, c, d), length)
}

/// Everything that the IANA registry of special-purpose addresses (RFC 6890 and later entries) does not call globally
/// reachable, with multicast and the old relays and anycast services of RFC 7526 and RFC 7535 besides.
pub const SPECIAL: [Range; 20] = [
    special(0, 0, 0, 0, 8),          // this network
    special(10, 0, 0, 0, 8),         // private
    special(100, 64, 0, 0, 10),      // carrier-grade translation
    special(127, 0, 0, 0, 8),        // loopback
    special(169, 254, 0, 0, 16),     // link-local, with the metadata services of clouds
    special(172, 16, 0, 0, 12),      // private
    special(192, 0, 0, 0, 24),       // protocol assignments
    special(192, 0, 2, 0, 24),       // documentation
    special(192, 31, 196, 0, 24),    // AS112
    special(192, 52, 193, 0, 24),    // AMT
    special(192, 88, 99, 0, 24),     // 6to4 relays
    special(192, 168, 0, 0, 16),     // private
    special(192, 175, 48, 0, 24),    // AS112
    special(198, 18, 0, 0, 15),      // measurements; our own networks by default
    special(198, 51, 100, 0, 24),    // documentation
    special(203, 0, 113, 0, 24),     // documentation
    special(224, 0, 0, 0, 4),        // multicast
    special(240, 0, 0, 0, 4),        // reserved, and broadcast
    special(168, 63, 129, 16, 32),   // the metadata service of one cloud, at a public address
    special(100, 100, 100, 200, 32), // the same of another; a part of the carrier-grade range
];

/// Whether the address belongs to the public internet.
pub fn is_public(address: Ipv4Addr) -> bool {
    !SPECIAL.iter().any(|range| range.contains(address))
}

/// The networks to which this host is attached itself, by its kernel's table of routes (`/proc/net/route`): what is on the
/// same wire is its neighbour, whatever its addresses. Routes that cover much of the internet, as those of a tunnel, are
/// none of that kind.
pub fn attached(routes: &str) -> Vec<(String, Range)> {
    const SHORTEST: u8 = 8;
    let mut found = Vec::new();
    for line in routes.lines().skip(1).take(4096) {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [interface, destination, gateway, _, _, _, _, mask, ..] = fields[..] else { continue };
        // The kernel writes the words of the wire as numbers of this host.
        let word = |text: &str| u32::from_str_radix(text, 16).ok().map(u32::from_be);
        let (Some(destination), Some(gateway), Some(mask)) = (word(destination), word(gateway), word(mask)) else {
            continue;
        };
        let length = u8::try_from(mask.leading_ones()).unwrap_or(32);
        if gateway == 0 && length >= SHORTEST {
            found.push((interface.to_owned(), Range::around(Ipv4Addr::from_bits(destination), length)));
        }
    }
    found
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn v4n_what_is_not_public_is_known() {
        for address in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.255.255",
            "198.18.0.1",
            "198.19.255.255",
            "224.0.0.251",
            "255.255.255.255",
            "240.0.0.1",
            "203.0.113.9",
            "192.0.0.192",
            "168.63.129.16",
            "100.100.100.200",
        ] {
            assert!(!is_public(address.parse().unwrap()), "{address}");
        }
        for address in ["1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.0", "172.15.0.1", "172.32.0.1", "198.20.0.1"]
        {
            assert!(is_public(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    fn neighbours_come_from_the_table_of_routes() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
            eth0\t00000000\t016433C6\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
            eth0\t006433C6\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
            ppp0\t00000000\t00000000\t0001\t0\t0\t0\t00000000\t0\t0\t0\n\
            wg0\t00000080\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n\
            bad line\n";
        let expected = [("eth0".to_owned(), "198.51.100.0/24".parse().unwrap())];
        if cfg!(target_endian = "little") {
            assert_eq!(attached(table), expected);
        }
    }

    #[test]
    fn ranges_have_one_spelling() {
        for text in ["198.18.0.0", "198.18.0.1/15", "198.18.0.0/33", "198.18.0.0/+15", "x/8", "::/0"] {
            assert!(text.parse::<Range>().is_err(), "{text}");
        }
        assert_eq!("0.0.0.0/0".parse::<Range>().unwrap(), special(1, 2, 3, 4, 0));
    }

    proptest! {
        #[test]
        fn ranges_overlap_when_one_holds_the_others_first(a: u32, b: u32, long in 0_u8..=32, short in 0_u8..=32) {
            let (a, b) = (Range::around(Ipv4Addr::from_bits(a), long), Range::around(Ipv4Addr::from_bits(b), short));
            prop_assert_eq!(a.overlaps(b), a.contains(b.first()) || b.contains(a.first()));
            prop_assert_eq!(a.to_string().parse::<Range>(), Ok(a));
        }
    }
}
