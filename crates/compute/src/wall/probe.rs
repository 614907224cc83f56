//! The test of the wall from inside: a container of ours, in a network of its own behind the same rules, tries what no
//! guest must manage, and what every guest must.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::Duration;

use super::attach::{is_overlap, taken_ranges};
use super::keep::Keeper;
use super::resolver::message::Policy;
use super::rules::{Reach, Walled};
use super::{Way, rows};
use crate::engine::{ContainerId, Engine, EngineError, NetworkPlan, Target};

/// The test's network has the number that no row can have.
pub(crate) const NUMBER: u16 = 0;
/// How long each attempt may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Ranges that are tried until the engine takes one.
const TRIES: usize = 16;
/// Bits of the test's network.
pub(crate) const LENGTH: u8 = 29;

/// Makes the test and removes everything again. The error says what is wrong, and what to do.
pub(super) async fn probe<E: Engine>(keeper: &mut Keeper<E>) -> Result<(), String> {
    let said = |error: EngineError| error.to_string();
    clean(keeper).await.map_err(said)?;
    let result = attempt(keeper).await;
    keeper.tested = None;
    // The network goes after its rules' last use; what cannot be removed now is removed before the next test.
    if let Err(error) = clean(keeper).await {
        tracing::warn!(%error, "what was left of the test of the wall could not be removed");
    }
    if let Err(trouble) = keeper.round().await {
        return Err(trouble.to_string());
    }
    result
}

/// Containers of the test carry a mark of their own: nobody takes them for deployments.
pub(crate) fn mark(node: &str) -> String {
    format!("{node}-wall")
}

async fn clean<E: Engine>(keeper: &Keeper<E>) -> Result<(), EngineError> {
    let inner = &keeper.inner;
    for container in inner.engine.list(&mark(&inner.mark)).await? {
        inner.engine.remove(&container.id).await?;
    }
    inner.engine.remove_network(&inner.wall.tag.network(NUMBER)).await
}

async fn attempt<E: Engine>(keeper: &mut Keeper<E>) -> Result<(), String> {
    let plan = network(keeper).await?;
    let walled = Walled { number: NUMBER, subnet: plan.subnet, reach: Reach::Public };
    keeper.tested = Some(Way { walled, policy: Some(Policy::Public) });
    keeper.round().await.map_err(|trouble| trouble.to_string())?;
    let listeners = Listeners::open().map_err(|error| format!("the test's listener cannot be opened: {error}"))?;
    let started = keeper.inner.engine.start_test(&plan).await;
    let container = started.map_err(|error| format!("the test's container: {error}"))?;
    judge(keeper, &container, plan.gateway(), &listeners).await
}

async fn network<E: Engine>(keeper: &Keeper<E>) -> Result<NetworkPlan, String> {
    let inner = &keeper.inner;
    let wall = &inner.wall;
    let rows = inner.database.write(rows::all).await.map_err(|error| error.to_string())?;
    let mut taken = taken_ranges(wall.tag);
    taken.extend(rows.iter().map(|network| network.subnet));
    let free = rows::candidates(&wall.options.subnets, LENGTH, wall.tag.salt())
        .filter(|range| !taken.iter().any(|one| one.overlaps(*range)));
    for subnet in free.take(TRIES) {
        let (tag, node) = (wall.tag, mark(&inner.mark));
        let plan = NetworkPlan { tag, node, number: NUMBER, subnet, outward: true };
        match inner.engine.create_network(&plan).await {
            Ok(()) => {}
            Err(error) if is_overlap(&error) => continue,
            Err(error) => return Err(error.to_string()),
        }
        let facts = inner.engine.compare_network(&plan).await.map_err(|error| error.to_string())?;
        return match facts.map(|facts| facts.differences) {
            Some(differences) if differences.is_empty() => Ok(plan),
            Some(differences) => {
                Err(format!("the engine makes other networks than asked for: {}", differences.join("; ")))
            }
            None => Err("the engine does not keep the networks that it makes".to_owned()),
        };
    }
    Err("no addresses are free for a network; name others in egress_subnets".to_owned())
}

/// Listeners at every address of this host.
struct Listeners {
    ports: Vec<SocketAddr>,
    _open: Vec<TcpListener>,
}

impl Listeners {
    fn open() -> std::io::Result<Self> {
        let four = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        let mut ports = vec![four.local_addr()?];
        let mut open = vec![four];
        // A host without IPv6 has nothing to hide there.
        if let Ok(six) = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)) {
            ports.push(six.local_addr()?);
            open.push(six);
        }
        Ok(Self { ports, _open: open })
    }

    /// Each address of the host with the port that listens there.
    fn targets(&self, addresses: &BTreeSet<IpAddr>) -> Vec<SocketAddr> {
        let port = |address: &IpAddr| {
            let same = |listener: &&SocketAddr| listener.is_ipv4() == address.is_ipv4();
            self.ports.iter().find(same).map(|listener| SocketAddr::new(*address, listener.port()))
        };
        addresses.iter().filter_map(port).collect()
    }
}

async fn judge<E: Engine>(
    keeper: &Keeper<E>,
    container: &ContainerId,
    gateway: Ipv4Addr,
    listeners: &Listeners,
) -> Result<(), String> {
    let resolver = SocketAddr::from((gateway, 53));
    let must = [Target::Question(resolver), Target::Connection(resolver)];
    let table = std::fs::read_to_string("/proc/net/fib_trie").unwrap_or_default();
    let mut addresses = host_addresses(&table, &std::fs::read_to_string("/proc/net/if_inet6").unwrap_or_default());
    addresses.insert(gateway.into());
    // A guest's own loopback is not the host's.
    addresses.retain(|address| !address.is_loopback());
    let forbidden = listeners.targets(&addresses);
    let targets: Vec<_> = must.into_iter().chain(forbidden.iter().copied().map(Target::Connection)).collect();
    let reached = keeper.inner.engine.reach(container, &targets, PATIENCE).await.map_err(|error| error.to_string())?;
    let (works, fails) = reached.split_at(must.len());
    if let Some((address, _)) = forbidden.iter().zip(fails).find(|(_, reached)| **reached) {
        return Err(format!("a container of the test reached this machine at {address} although the rules forbid it"));
    }
    if works.contains(&false) || works.is_empty() {
        return Err(format!(
            "a container of the test did not reach the resolver at {resolver}; let UDP and TCP port 53 in from the \
             interfaces pw{}* in this machine's firewall",
            keeper.inner.wall.tag
        ));
    }
    Ok(())
}

/// The addresses of the interfaces, by the kernel's tables of routes (IPv4) and of interfaces (IPv6).
fn host_addresses(four: &str, six: &str) -> BTreeSet<IpAddr> {
    let mut found = BTreeSet::new();
    let mut last: Option<Ipv4Addr> = None;
    for line in four.lines() {
        if let Some(text) = line.trim_start().strip_prefix("|-- ") {
            last = text.parse().ok();
        } else if line.contains("host LOCAL") {
            found.extend(last.map(IpAddr::V4));
        }
    }
    for line in six.lines() {
        let digits = line.split_whitespace().next().filter(|digits| digits.len() == 32);
        let bits = digits.and_then(|digits| u128::from_str_radix(digits, 16).ok());
        found.extend(bits.map(|bits| IpAddr::V6(Ipv6Addr::from_bits(bits))));
    }
    found
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_the_host_come_from_the_kernels_tables() {
        let four = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     |-- 198.51.100.7\n        \
            /32 host LOCAL\n     |-- 198.51.100.255\n        /32 link BROADCAST\n";
        let six = "fe800000000000000000000000000001 02 40 20 80 eth0\nnonsense\n";
        let expected: BTreeSet<IpAddr> = ["198.51.100.7", "fe80::1"].iter().map(|text| text.parse().unwrap()).collect();
        assert_eq!(host_addresses(four, six), expected);
    }
}
