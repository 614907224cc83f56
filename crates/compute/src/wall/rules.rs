//! The rules of the wall as text for `nft`, made of numbers and addresses alone: no text from outside can get into it.
//!
//! There are two tables with the same decisions. The first stays when the daemon ends, and holds the translation of
//! addresses, without which nothing that leaves finds its way back. The second, the guard, belongs to the `nft` process
//! that the daemon keeps: nobody else can change or flush it, and it goes with that process.

use std::fmt::{self, Write};
use std::net::Ipv4Addr;

use minicbor::{Decode, Encode};

use super::ranges::{Range, SPECIAL};

/// Before the rules of others, so that nothing which they accept is seen by us too late.
const PRIORITY: &str = "-190";
/// Connections that one guest may have at a time.
const CONNECTIONS_MAX: u32 = 512;
/// Connections that one guest may begin in a second, and how many at once.
const STARTS: (u32, u32) = (50, 200);

/// What marks one machine's tables and bridges on a host: eight hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(transparent)]
pub struct Tag(#[n(0)] u32);

impl Tag {
    /// The tag of the machine whose containers carry `mark` in the engine.
    pub fn of(mark: &str) -> Self {
        let digest = blake3::hash(mark.as_bytes());
        let [a, b, c, d, ..] = *digest.as_bytes();
        Self(u32::from_be_bytes([a, b, c, d]))
    }

    /// A number that differs between machines.
    pub fn salt(self) -> u32 {
        self.0
    }

    /// The bridge of the network with this number: at most 15 bytes, as the kernel wants it.
    pub fn bridge(self, number: u16) -> String {
        format!("pw{self}{number:04x}")
    }

    /// The engine's name of the network with this number.
    pub fn network(self, number: u16) -> String {
        format!("peer-compute-{self}-{number:04x}")
    }

    /// The number of the network that the engine calls so, if it is one of ours.
    pub fn number_of(self, network: &str) -> Option<u16> {
        let digits = network.strip_prefix(&format!("peer-compute-{self}-"))?;
        let number = u16::from_str_radix(digits, 16).ok()?;
        (self.network(number) == network).then_some(number)
    }

    /// The table that stays.
    pub fn table(self) -> String {
        format!("peer_wall_{self}")
    }

    /// The table that the daemon's `nft` process owns.
    pub fn guard(self) -> String {
        format!("peer_guard_{self}")
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// How far the containers of one network get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum Reach {
    /// To each other.
    #[n(0)]
    Members,
    /// To public addresses.
    #[n(1)]
    Public,
    /// To the public addresses and ports that have been admitted.
    #[n(2)]
    Admitted,
}

/// A network behind the wall.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(map)]
pub struct Walled {
    /// Its number, from which its names are made.
    #[n(0)]
    pub number: u16,
    /// Its addresses. The first one after the network's own is the bridge's.
    #[n(1)]
    pub subnet: Range,
    /// How far its containers get.
    #[n(2)]
    pub reach: Reach,
}

impl Walled {
    /// The bridge's address, at which the resolver answers.
    pub fn gateway(&self) -> Ipv4Addr {
        self.subnet.nth(1)
    }
}

/// An address and port that the containers of one network may reach for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(map)]
pub struct Admission {
    /// The network's number.
    #[n(0)]
    pub network: u16,
    /// The address.
    #[n(1)]
    pub address: Ipv4Addr,
    /// The port, over TCP and UDP.
    #[n(2)]
    pub port: u16,
}

/// What the packet filter is told. All of it is numbers and addresses, and nothing of it takes the wall down.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum FilterOrder {
    /// Replace the rules by these.
    #[n(0)]
    Replace(#[n(0)] Ruleset),
    /// Let one network's containers reach these for so many seconds.
    #[n(1)]
    Admit {
        /// Whose rules.
        #[n(0)]
        tag: Tag,
        /// What.
        #[n(1)]
        admissions: Vec<Admission>,
        /// For how long (seconds).
        #[n(2)]
        seconds: u64,
    },
    /// Report both tables.
    #[n(2)]
    Report(#[n(0)] Tag),
}

impl FilterOrder {
    /// The order as lines of commands. What changes anything is one line, which is one transaction; two tables are listed by
    /// two lines, because the program finds but one of them else.
    pub fn line(&self) -> String {
        match self {
            Self::Replace(ruleset) => ruleset.replacement(),
            Self::Admit { tag, admissions, seconds } => tag.admit(admissions, *seconds),
            Self::Report(tag) => format!("list table inet {}\nlist table inet {}", tag.table(), tag.guard()),
        }
    }
}

/// Everything that decides what the rules are.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Ruleset {
    /// Whose.
    #[n(0)]
    pub tag: Tag,
    /// The networks.
    #[n(1)]
    pub networks: Vec<Walled>,
    /// Ranges that are closed beside those of [`SPECIAL`].
    #[n(2)]
    pub closed: Vec<Range>,
    /// What may be reached now, with the seconds that are left; without, as long as the rules stand.
    #[n(3)]
    pub admitted: Vec<(Admission, Option<u64>)>,
}

impl Ruleset {
    /// One line that replaces both tables as one.
    pub fn replacement(&self) -> String {
        let (table, guard) = (self.tag.table(), self.tag.guard());
        let mut line = format!("add table inet {table}; delete table inet {table}; ");
        write!(line, "add table inet {guard} {{ flags owner; }}; delete table inet {guard}; ").expect("text takes it");
        line + &self.body(&table, false) + "; " + &self.body(&guard, true)
    }

    /// One line that removes both tables: for whoever clears up after a machine that is no more. No order holds it.
    pub fn removal(tag: Tag) -> String {
        let (table, guard) = (tag.table(), tag.guard());
        format!(
            "add table inet {table}; delete table inet {table}; add table inet {guard} {{ flags owner; }}; \
             delete table inet {guard}"
        )
    }

    fn body(&self, table: &str, guard: bool) -> String {
        let parts = [
            self.sets(guard),
            self.arriving(),
            self.passing(guard),
            if guard { String::new() } else { self.leaving() },
        ];
        let owner = if guard { "flags owner; " } else { "" };
        format!("table inet {table} {{ {owner}{} }}", parts.concat())
    }

    fn sets(&self, guard: bool) -> String {
        let closed = SPECIAL.iter().chain(&self.closed).map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let admitted: Vec<_> =
            self.admitted.iter().map(|(admission, left)| self.tag.element(*admission, *left)).collect();
        let admitted =
            if admitted.is_empty() { String::new() } else { format!("elements = {{ {} }}; ", admitted.join(", ")) };
        let counted = if guard {
            ""
        } else {
            "set open { type ipv4_addr; size 65535; flags dynamic; }; \
             set begun { type ipv4_addr; size 65535; flags dynamic, timeout; timeout 1m; }; "
        };
        format!(
            "set closed {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {closed} }}; }}; \
             set admitted {{ type ifname . ipv4_addr . inet_service; size 65535; flags timeout; {admitted}}}; {counted}"
        )
    }

    /// What comes to the host itself: the resolver and nothing else.
    fn arriving(&self) -> String {
        let ours = self.tag.bridge_pattern();
        let mut rules = String::new();
        for network in self.networks.iter().filter(|network| network.reach != Reach::Members) {
            let (bridge, gateway) = (self.tag.bridge(network.number), network.gateway());
            write!(
                rules,
                "iifname \"{bridge}\" ip saddr {} ip daddr {gateway} ct status dnat drop; \
                 iifname \"{bridge}\" ip saddr {} ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 accept; ",
                network.subnet, network.subnet
            )
            .expect("text takes it");
        }
        format!(
            "chain to_host {{ {rules}drop; }}; \
             chain arriving {{ type filter hook input priority {PRIORITY}; policy accept; iifname {ours} jump to_host; }}; "
        )
    }

    /// What passes through the host.
    fn passing(&self, guard: bool) -> String {
        let ours = self.tag.bridge_pattern();
        let mut members = String::new();
        let mut outward = String::new();
        for network in &self.networks {
            let (bridge, subnet) = (self.tag.bridge(network.number), network.subnet);
            match network.reach {
                Reach::Members => write!(members, "iifname \"{bridge}\" oifname \"{bridge}\" accept; "),
                Reach::Public => write!(outward, "iifname \"{bridge}\" ip saddr {subnet} accept; "),
                Reach::Admitted => write!(
                    outward,
                    "iifname \"{bridge}\" ip saddr {subnet} ct state established,related accept; \
                     iifname \"{bridge}\" ip saddr {subnet} meta l4proto {{ tcp, udp }} iifname . ip daddr . th dport \
                     @admitted accept; "
                ),
            }
            .expect("text takes it");
        }
        let (rate, burst) = STARTS;
        let bounds = if guard {
            String::new()
        } else {
            format!(
                "ct state new add @open {{ ip saddr ct count over {CONNECTIONS_MAX} }} drop; \
                 ct state new update @begun {{ ip saddr limit rate over {rate}/second burst {burst} packets }} drop; "
            )
        };
        format!(
            "chain from_guest {{ {members}meta nfproto != ipv4 drop; ct state invalid drop; ct status dnat drop; \
             ip daddr @closed drop; fib daddr type != unicast drop; oifname {ours} drop; \
             meta l4proto != {{ tcp, udp, icmp }} drop; {bounds}{outward}drop; }}; \
             chain to_guest {{ ct state established,related accept; drop; }}; \
             chain passing {{ type filter hook forward priority {PRIORITY}; policy accept; iifname {ours} jump from_guest; \
             oifname {ours} jump to_guest; }}; "
        )
    }

    /// Translation to the host's own address. Without this table, answers find no way back.
    fn leaving(&self) -> String {
        let subnets: Vec<_> = self
            .networks
            .iter()
            .filter(|network| network.reach != Reach::Members)
            .map(|network| network.subnet.to_string())
            .collect();
        let rule = if subnets.is_empty() {
            String::new()
        } else {
            let ours = self.tag.bridge_pattern();
            format!("ip saddr {{ {} }} oifname != {ours} masquerade; ", subnets.join(", "))
        };
        format!("chain leaving {{ type nat hook postrouting priority 100; policy accept; {rule}}}; ")
    }
}

impl Tag {
    fn bridge_pattern(self) -> String {
        format!("\"pw{self}*\"")
    }

    fn element(self, admission: Admission, left: Option<u64>) -> String {
        let Admission { network, address, port } = admission;
        let timeout = left.map(|seconds| format!(" timeout {seconds}s")).unwrap_or_default();
        format!("\"{}\" . {address} . {port}{timeout}", self.bridge(network))
    }

    /// One line that admits these for so many seconds, in both tables as one. What is there already gets the new time.
    pub fn admit(self, admissions: &[Admission], seconds: u64) -> String {
        let elements = |left| {
            let texts: Vec<_> = admissions.iter().map(|admission| self.element(*admission, left)).collect();
            texts.join(", ")
        };
        let (with, without) = (elements(Some(seconds)), elements(None));
        let one = |table: String| {
            format!(
                "add element inet {table} admitted {{ {without} }}; delete element inet {table} admitted {{ {without} }}; \
                 add element inet {table} admitted {{ {with} }}"
            )
        };
        one(self.table()) + "; " + &one(self.guard())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn walled(number: u16, reach: Reach) -> Walled {
        let subnet = Range::around(Ipv4Addr::new(198, 18, 0, 0), 15).nth(u32::from(number) * 8);
        Walled { number, subnet: Range::around(subnet, 29), reach }
    }

    fn ruleset(networks: Vec<Walled>) -> Ruleset {
        Ruleset { tag: Tag::of("mark"), networks, closed: vec!["192.0.2.0/24".parse().unwrap()], admitted: vec![] }
    }

    #[test]
    fn names_fit_the_kernel_and_are_read_back() {
        let tag = Tag::of("mark");
        assert_eq!(tag.bridge(u16::MAX).len(), 14);
        assert_eq!(tag.number_of(&tag.network(0xab)), Some(0xab));
        for other in ["bridge", "peer-compute-00000000-00ab", &format!("peer-compute-{tag}-ab"), &tag.network(1)[1..]] {
            assert_eq!(tag.number_of(other), None, "{other}");
        }
        assert_ne!(Tag::of("mark"), Tag::of("other"));
    }

    #[test]
    fn v4n_a_private_network_has_no_way_to_the_resolver_and_none_out() {
        let line = ruleset(vec![walled(1, Reach::Members), walled(2, Reach::Public)]).replacement();
        let (inner, outer) = (Tag::of("mark").bridge(1), Tag::of("mark").bridge(2));
        let rules: Vec<_> = line.split("; ").filter(|rule| rule.contains(&inner)).collect();
        assert!(rules.iter().all(|rule| rule.contains(&format!("oifname \"{inner}\" accept"))), "{rules:?}");
        assert!(line.contains(&format!("iifname \"{outer}\" ip saddr 198.18.0.16/29 accept")));
        assert!(line.contains("ip saddr { 198.18.0.16/29 } oifname"), "only what goes out is translated");
    }

    #[test]
    fn v4n_every_chain_ends_with_a_drop_and_every_range_is_closed() {
        let line = ruleset(vec![walled(1, Reach::Admitted)]).replacement();
        for chain in ["to_host", "from_guest", "to_guest"] {
            let parts: Vec<_> = line.split(&format!("chain {chain} {{")).skip(1).collect();
            assert_eq!(parts.len(), 2, "in the table and in its guard");
            for part in parts {
                assert!(part.split_once('}').is_some());
                let rules = part.split_once("; };").unwrap().0;
                assert!(rules.ends_with("drop"), "{chain}: {rules}");
            }
        }
        for range in SPECIAL {
            assert!(line.matches(&range.to_string()).count() >= 2, "{range}");
        }
        let closed = line.find("@closed drop").unwrap();
        assert!(
            line.find("established,related accept").unwrap() > closed,
            "what is closed is closed to old connections"
        );
    }

    fn any_ruleset() -> impl Strategy<Value = Ruleset> {
        let reach = prop_oneof![Just(Reach::Members), Just(Reach::Public), Just(Reach::Admitted)];
        let network = (any::<u16>(), reach).prop_map(|(number, reach)| walled(number, reach));
        let admission = (any::<u16>(), any::<u32>(), any::<u16>(), any::<Option<u64>>()).prop_map(
            |(network, address, port, left)| (Admission { network, address: Ipv4Addr::from_bits(address), port }, left),
        );
        let lists = (proptest::collection::vec(network, 0..8), proptest::collection::vec(admission, 0..8));
        lists.prop_map(|(networks, admitted)| Ruleset { admitted, ..ruleset(networks) })
    }

    proptest! {
        #[test]
        fn the_text_is_one_line_with_as_many_braces_open_as_closed(rules in any_ruleset()) {
            let line = rules.replacement();
            prop_assert!(!line.contains('\n'));
            prop_assert_eq!(line.matches('{').count(), line.matches('}').count());
            let allowed = |b: u8| b.is_ascii_alphanumeric() || b" _{};.,:/@\"!=*-".contains(&b);
            prop_assert!(line.bytes().all(allowed), "{}", line);
        }
    }
}
