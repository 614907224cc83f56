//! What a container may reach outside: nothing, the internet, or a list of hosts; and what of this a grant allows.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::id::{text_form, text_id};
use crate::text::escape;
use crate::unit::Port;

/// Most hosts in one list.
pub const HOSTS_MAX: usize = 32;
/// Longest host name (bytes).
const NAME_MAX: usize = 253;

/// How far out: of what a container may reach, or of what a grant allows at most. `T` says which hosts.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, Encode, Decode)]
#[serde(rename_all = "snake_case")]
pub enum Level<T: Ord> {
    /// Nothing.
    #[default]
    #[n(0)]
    None,
    /// Public addresses (IPv4), and nothing of the provider's own networks.
    #[n(1)]
    Internet,
    /// These, as far as they have public addresses (IPv4).
    #[n(2)]
    Hosts(#[n(0)] BTreeSet<T>),
}

/// What a container may reach outside of itself.
pub type Egress = Level<Destination>;
/// What egress a grant allows at most: hosts are those that one of the patterns fits.
pub type EgressGrant = Level<HostPattern>;

impl<T: Ord> Level<T> {
    /// Whether it is [`Level::None`].
    pub fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }
}

impl Egress {
    /// The rules that the type cannot express.
    pub(super) fn check(&self) -> Result<(), String> {
        let Self::Hosts(hosts) = self else { return Ok(()) };
        check_count(hosts.len())
    }
}

impl EgressGrant {
    /// What of `egress` it does not allow, in the words of the command line; nothing if it allows all of it.
    pub fn lacks(&self, egress: &Egress) -> Option<String> {
        match (self, egress) {
            (_, Egress::None) | (Self::Internet, _) => None,
            (Self::None | Self::Hosts(_), Egress::Internet) => Some("internet".to_owned()),
            (Self::None, Egress::Hosts(_)) => Some(egress.to_string()),
            (Self::Hosts(patterns), Egress::Hosts(hosts)) => {
                let covered = |host: &&Destination| !patterns.iter().any(|pattern| pattern.fits(host));
                let lacking: BTreeSet<_> = hosts.iter().filter(covered).cloned().collect();
                (!lacking.is_empty()).then(|| Egress::Hosts(lacking).to_string())
            }
        }
    }
}

impl<T: fmt::Display + Ord> fmt::Display for Level<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts = match self {
            Self::None => return f.write_str("none"),
            Self::Internet => return f.write_str("internet"),
            Self::Hosts(hosts) => hosts,
        };
        for (index, host) in hosts.iter().enumerate() {
            f.write_str(if index == 0 { "" } else { "," })?;
            host.fmt(f)?;
        }
        Ok(())
    }
}

impl<T: FromStr<Err = String> + Ord> FromStr for Level<T> {
    type Err = String;

    /// `none`, `internet`, or hosts separated by commas: of a container `HOST:PORT`; of a grant `HOST`, `HOST:PORT`,
    /// `*.DOMAIN` or `*.DOMAIN:PORT`.
    fn from_str(text: &str) -> Result<Self, String> {
        let hosts: BTreeSet<T> = match text {
            "none" => return Ok(Self::None),
            "internet" => return Ok(Self::Internet),
            hosts => hosts.split(',').map(str::parse).collect::<Result<_, _>>()?,
        };
        check_count(hosts.len())?;
        Ok(Self::Hosts(hosts))
    }
}

fn check_count(count: usize) -> Result<(), String> {
    if (1..=HOSTS_MAX).contains(&count) {
        Ok(())
    } else {
        Err(format!("egress names {count} hosts; between 1 and {HOSTS_MAX} are possible"))
    }
}

/// A host: a name of the public name system in lower case, or an IPv4 address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Host {
    /// An address.
    Address(Ipv4Addr),
    /// A name.
    Name(HostName),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(name) => f.write_str(name.as_str()),
        }
    }
}

impl FromStr for Host {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(address) => Ok(Self::Address(address)),
            Err(_) => text.parse().map(Self::Name),
        }
    }
}

text_id!(
    /// A name with at least two labels of `a-z 0-9 -`, of which the last is no number, without a dot at its end.
    HostName
);

impl FromStr for HostName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(plain)
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        let labels: Vec<_> = text.split('.').collect();
        let is_number = labels.last().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
        if text.len() > NAME_MAX || labels.len() < 2 || is_number || !labels.into_iter().all(label) {
            return Err(format!(
                "'{}' is neither an IPv4 address nor a host name such as api.example.org, in lower case",
                escape(text)
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

/// A host and the port that may be reached there, over TCP and UDP.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Destination {
    /// The host.
    pub host: Host,
    /// The port.
    pub port: Port,
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl FromStr for Destination {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) = text
            .rsplit_once(':')
            .ok_or_else(|| format!("'{}' has no port; write HOST:PORT, or none, or internet", escape(text)))?;
        Ok(Self { host: host.parse()?, port: parse_port(port)? })
    }
}

fn parse_port(text: &str) -> Result<Port, String> {
    let port: Port = text.parse().map_err(|_| format!("'{}' is not a port", escape(text)))?;
    // One spelling only, so that a message equals the encoding of what it decodes to.
    if port.to_string() == text { Ok(port) } else { Err(format!("'{}' is not a port; write {port}", escape(text))) }
}

/// Hosts that a grant allows: one host or every name below a domain, at one port or at any.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostPattern {
    /// The host; with `below`, the domain.
    pub host: Host,
    /// Whether it means every name below the host, and not the host itself.
    pub below: bool,
    /// The port; any, if absent.
    pub port: Option<Port>,
}

impl HostPattern {
    /// Whether the destination is one of those that it means.
    pub fn fits(&self, destination: &Destination) -> bool {
        let host = match (&self.host, &destination.host) {
            (Host::Name(domain), Host::Name(name)) if self.below => {
                name.as_str().strip_suffix(domain.as_str()).is_some_and(|rest| rest.ends_with('.'))
            }
            (host, wanted) => !self.below && host == wanted,
        };
        host && self.port.is_none_or(|port| port == destination.port)
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.below { "*." } else { "" }, self.host)?;
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl FromStr for HostPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) => (host, Some(parse_port(port)?)),
            None => (text, None),
        };
        match host.strip_prefix("*.") {
            Some(domain) => Ok(Self { host: Host::Name(domain.parse()?), below: true, port }),
            None => Ok(Self { host: host.parse()?, below: false, port }),
        }
    }
}

text_form!(Destination);
text_form!(HostPattern);

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::{decode_strict, encode};

    fn egress(text: &str) -> Egress {
        text.parse().unwrap()
    }

    fn grant(text: &str) -> EgressGrant {
        text.parse().unwrap()
    }

    #[test]
    fn texts_round_trip_in_every_form() {
        for text in ["none", "internet", "192.0.2.1:53,api.example.org:443", "a.b:1"] {
            let value = egress(text);
            assert_eq!(value.to_string(), text);
            assert_eq!(decode_strict::<Egress>(&encode(&value), 4096), Ok(value.clone()));
        }
        for text in ["none", "internet", "*.example.org,192.0.2.1:53,api.example.org:443"] {
            let value = grant(text);
            assert_eq!(decode_strict::<EgressGrant>(&encode(&value), 4096), Ok(value.clone()));
            assert_eq!(value.to_string().parse(), Ok(value));
        }
    }

    #[test]
    fn what_is_no_host_or_port_is_refused() {
        for text in [
            "",
            "example.org",
            "localhost:80",
            "Example.org:80",
            "a.b:0",
            "a.b:080",
            "a.b:65536",
            "a.b:+1",
            "*.b.c:1",
            "a..b:1",
            "-a.b:1",
            "a-.b:1",
            "a_b.c:1",
            "1.2.3:80",
            "1.2.3.4.5:80",
            "[::1]:80",
            "::1:80",
            "a.b:1,",
            "a.b:1, c.d:2",
            "internet,a.b:1",
            "a.b:1:2",
            "http://a.b:1",
            "a.b\n:1",
        ] {
            assert!(text.parse::<Egress>().is_err(), "{text}");
        }
        for text in ["*", "*.org", "*.*.example.org", "a.*.b", "*.1.2.3.4", "*example.org", "example.org:*"] {
            assert!(text.parse::<EgressGrant>().is_err(), "{text}");
        }
        let many: Vec<_> = (0..=HOSTS_MAX).map(|n| format!("h{n}.example.org:1")).collect();
        assert!(many.join(",").parse::<Egress>().is_err());
    }

    #[test]
    fn v4n_a_grant_covers_what_it_names_and_nothing_else() {
        let cases = [
            ("none", "none", true),
            ("none", "internet", false),
            ("none", "a.b:1", false),
            ("internet", "internet", true),
            ("internet", "a.b:1", true),
            ("a.b:1", "internet", false),
            ("a.b:1", "a.b:1", true),
            ("a.b:1", "a.b:2", false),
            ("a.b", "a.b:2", true),
            ("a.b", "c.a.b:2", false),
            ("*.a.b", "c.a.b:2", true),
            ("*.a.b", "d.c.a.b:2", true),
            ("*.a.b", "a.b:2", false),
            ("*.a.b", "ca.b:2", false),
            ("*.a.b", "xa.b:2", false),
            ("*.a.b:1", "c.a.b:2", false),
            ("1.2.3.4", "1.2.3.4:2", true),
            ("1.2.3.4", "1.2.3.5:2", false),
        ];
        for (granted, asked, covered) in cases {
            assert_eq!(grant(granted).lacks(&egress(asked)).is_none(), covered, "{granted} {asked}");
        }
        assert_eq!(grant("a.b").lacks(&egress("a.b:1,c.d:2")).as_deref(), Some("c.d:2"));
    }

    proptest! {
        #[test]
        fn any_text_that_parses_is_its_own_form(text in "[a-c*.:0-9-]{0,24}") {
            if let Ok(value) = text.parse::<Destination>() {
                prop_assert_eq!(value.to_string(), text.clone());
            }
            if let Ok(value) = text.parse::<HostPattern>() {
                prop_assert_eq!(value.to_string(), text);
            }
        }
    }
}
