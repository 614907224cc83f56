//! How much one visitor, one name and everybody together may take: connections, and requests per second (V7).

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use peer_proto::id::Label;

/// Entries of a rate table after which it is swept at once, not only at the next turn.
const RATE_ENTRIES_MAX: usize = 65_536;

/// What counts as one visitor: an IPv4 address, or an IPv6 /64 network, which one host can fill at will.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VisitorKey(IpAddr);

impl VisitorKey {
    /// The visitor behind an address.
    pub fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self(IpAddr::V4(address)),
            IpAddr::V6(address) => Self(IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)))),
        }
    }
}

#[derive(Debug, Default)]
struct Open {
    by_visitor: HashMap<VisitorKey, usize>,
    total: usize,
}

/// Counts open connections, in total and by visitor.
#[derive(Debug)]
pub struct Connections {
    open: Mutex<Open>,
    per_visitor: usize,
    total: usize,
}

/// A connection's place in the count; given back when dropped.
#[derive(Debug)]
pub struct ConnectionSlot {
    connections: Arc<Connections>,
    visitor: VisitorKey,
}

impl Connections {
    /// Nothing open yet.
    pub fn new(per_visitor: usize, total: usize) -> Arc<Self> {
        Arc::new(Self { open: Mutex::default(), per_visitor, total })
    }

    /// A place for one more connection, if there is one.
    pub fn admit(self: &Arc<Self>, address: IpAddr) -> Option<ConnectionSlot> {
        let visitor = VisitorKey::of(address);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let held = open.by_visitor.get(&visitor).copied().unwrap_or(0);
        if held >= self.per_visitor || open.total >= self.total {
            return None;
        }
        open.by_visitor.insert(visitor, held + 1);
        open.total += 1;
        Some(ConnectionSlot { connections: Arc::clone(self), visitor })
    }

    /// Connections open now.
    pub fn len(&self) -> usize {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).total
    }

    /// True while no connection is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        let mut open = self.connections.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.total -= 1;
        if let Some(held) = open.by_visitor.get_mut(&self.visitor) {
            *held -= 1;
            if *held == 0 {
                open.by_visitor.remove(&self.visitor);
            }
        }
    }
}

/// Requests per second, by visitor and by name.
#[derive(Debug)]
pub struct Rates {
    visitors: DefaultKeyedRateLimiter<VisitorKey>,
    names: DefaultKeyedRateLimiter<Label>,
    clock: DefaultClock,
}

/// Too many requests; the time after which one more is accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooFast(pub Duration);

impl Rates {
    /// Token buckets that refill `*_per_second` and hold twice as much.
    pub fn new(visitor_per_second: NonZeroU32, name_per_second: NonZeroU32) -> Self {
        let quota = |per_second: NonZeroU32| Quota::per_second(per_second).allow_burst(per_second.saturating_mul(TWO));
        Self {
            visitors: RateLimiter::keyed(quota(visitor_per_second)),
            names: RateLimiter::keyed(quota(name_per_second)),
            clock: DefaultClock::default(),
        }
    }

    /// Counts one request of a visitor.
    pub fn visitor(&self, address: IpAddr) -> Result<(), TooFast> {
        if self.visitors.len() > RATE_ENTRIES_MAX {
            self.sweep();
        }
        let verdict = self.visitors.check_key(&VisitorKey::of(address));
        verdict.map_err(|until| TooFast(until.wait_time_from(self.clock.now())))
    }

    /// Counts one request for a live name.
    pub fn name(&self, label: Label) -> Result<(), TooFast> {
        self.names.check_key(&label).map_err(|until| TooFast(until.wait_time_from(self.clock.now())))
    }

    /// Forgets buckets that are full again, which is what a new one would be.
    pub fn sweep(&self) {
        self.visitors.retain_recent();
        self.names.retain_recent();
    }

    /// Buckets held.
    pub fn entries(&self) -> usize {
        self.visitors.len() + self.names.len()
    }
}

const TWO: NonZeroU32 = NonZeroU32::new(2).expect("two is not zero");

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn v7_connections_are_counted_by_address_and_in_total() {
        let connections = Connections::new(2, 3);
        let first = connections.admit(address("192.0.2.1")).unwrap();
        let _second = connections.admit(address("::ffff:192.0.2.1")).unwrap();
        assert!(connections.admit(address("192.0.2.1")).is_none());
        let _third = connections.admit(address("2001:db8::1")).unwrap();
        assert!(connections.admit(address("192.0.2.9")).is_none());
        drop(first);
        assert!(connections.admit(address("2001:db8::2:3")).is_some());
        assert_eq!(connections.len(), 2);
    }

    #[test]
    fn v7_requests_are_counted_by_address_or_network() {
        let rates = Rates::new(NonZeroU32::MIN, NonZeroU32::MIN);
        assert!(rates.visitor(address("2001:db8::1")).is_ok());
        assert!(rates.visitor(address("2001:db8::2")).is_ok());
        assert!(rates.visitor(address("2001:db8::3")).is_err());
        assert!(rates.visitor(address("2001:db8:0:1::1")).is_ok());
        assert_eq!(rates.entries(), 2);
    }
}
