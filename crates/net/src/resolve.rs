//! Host names in addresses: looked up anew for each attempt, by the system's resolver.

use std::net::IpAddr;
use std::time::Duration;

use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol as Component;

/// Longest look-up of one name.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// Addresses of one name that are tried.
const ADDRESSES_PER_NAME: usize = 8;

/// Whether the address begins with a host name.
pub(crate) fn has_name(address: &Multiaddr) -> bool {
    matches!(address.iter().next(), Some(Component::Dns(_) | Component::Dns4(_) | Component::Dns6(_)))
}

/// The addresses with every host name replaced by what it stands for now, and the names that stand for nothing.
pub(crate) async fn resolve(addresses: Vec<Multiaddr>) -> (Vec<Multiaddr>, Vec<String>) {
    let (mut resolved, mut unknown) = (Vec::new(), Vec::new());
    for address in addresses {
        let (name, version_4, version_6) = match address.iter().next() {
            Some(Component::Dns(name)) => (name.into_owned(), true, true),
            Some(Component::Dns4(name)) => (name.into_owned(), true, false),
            Some(Component::Dns6(name)) => (name.into_owned(), false, true),
            _ => {
                resolved.push(address);
                continue;
            }
        };
        let wanted = |ip: &IpAddr| if ip.is_ipv4() { version_4 } else { version_6 };
        let before = resolved.len();
        let found = lookup(&name).await.into_iter().filter(wanted).take(ADDRESSES_PER_NAME);
        resolved.extend(found.filter_map(|ip| address.replace(0, |_| Some(Component::from(ip)))));
        if resolved.len() == before {
            unknown.push(name);
        }
    }
    (resolved, unknown)
}

async fn lookup(name: &str) -> Vec<IpAddr> {
    match tokio::time::timeout(LOOKUP_TIMEOUT, tokio::net::lookup_host((name, 0))).await {
        Ok(Ok(found)) => found.map(|address| address.ip()).collect(),
        Ok(Err(_)) | Err(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[tokio::test]
    async fn names_are_replaced_and_the_rest_of_the_address_is_kept() {
        let literal: Multiaddr = "/ip4/192.0.2.1/tcp/1".parse().unwrap();
        let named: Multiaddr = "/dns4/localhost/tcp/2".parse().unwrap();
        assert!(has_name(&named) && !has_name(&literal));
        let (resolved, unknown) = resolve(vec![literal.clone(), named]).await;
        assert_eq!(resolved, [literal, "/ip4/127.0.0.1/tcp/2".parse().unwrap()]);
        assert!(unknown.is_empty());
    }

    #[tokio::test]
    async fn unknown_name_is_named() {
        let (resolved, unknown) = resolve(vec!["/dns/no-such-host.invalid/tcp/1".parse().unwrap()]).await;
        assert_eq!((resolved, unknown), (Vec::new(), vec!["no-such-host.invalid".to_owned()]));
    }
}
