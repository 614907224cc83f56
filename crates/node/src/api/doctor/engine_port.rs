//! Whether the container engine can be reached over TCP: whoever reaches it there has the whole machine.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::path::Path;
use std::time::Duration;

use futures::future::join_all;
use peer_proto::control::Finding;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{failure, ok, warning};

const CHECK: &str = "engine_port";
/// Where engines listen that were opened to the network: in plain, and with TLS.
const ENGINE_PORTS: [u16; 2] = [2375, 2376];
/// Addresses of this machine that are tried.
const ADDRESSES_MAX: usize = 64;
/// How long a listener of this machine may take to accept, and again to answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// Beginning of an answer that is read (bytes).
const ANSWER_MAX: usize = 4096;

/// What stands at one of the ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// An engine that does as anybody says.
    Engine,
    /// Something that accepts connections.
    Listener,
}

pub(super) async fn check() -> Finding {
    let addresses = addresses(Path::new("/proc/net"));
    judge(&probe(&addresses, &ENGINE_PORTS).await)
}

async fn probe(addresses: &[SocketAddr], ports: &[u16]) -> Vec<(SocketAddr, Found)> {
    let places = addresses.iter().flat_map(|address| {
        ports.iter().map(|port| {
            let mut place = *address;
            place.set_port(*port);
            place
        })
    });
    let looks = places.map(|place| async move { Some((place, look(place).await?)) });
    join_all(looks).await.into_iter().flatten().collect()
}

async fn look(place: SocketAddr) -> Option<Found> {
    let mut stream = timeout(PATIENCE, TcpStream::connect(place)).await.ok()?.ok()?;
    let asked = timeout(PATIENCE, ask(&mut stream)).await;
    Some(if asked.is_ok_and(|answer| is_engine(&answer)) { Found::Engine } else { Found::Listener })
}

/// The beginning of what is answered to an engine's own greeting; whatever fails is no answer.
async fn ask(stream: &mut TcpStream) -> Vec<u8> {
    let mut answer = Vec::new();
    if stream.write_all(b"GET /version HTTP/1.0\r\nHost: localhost\r\n\r\n").await.is_ok() {
        let bound = u64::try_from(ANSWER_MAX).unwrap_or(u64::MAX);
        drop(stream.take(bound).read_to_end(&mut answer).await);
    }
    answer
}

fn is_engine(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer);
    text.starts_with("HTTP/1.") && text.split(' ').nth(1) == Some("200") && text.contains("\"ApiVersion\"")
}

fn judge(found: &[(SocketAddr, Found)]) -> Finding {
    let name = |kind: Found| -> Vec<String> {
        found.iter().filter(|(_, one)| *one == kind).map(|(place, _)| place.to_string()).collect()
    };
    let (engines, listeners) = (name(Found::Engine), name(Found::Listener));
    if !engines.is_empty() {
        let message = format!("the container engine does what anybody says at {}", engines.join(", "));
        let advice = "remove tcp:// from its `hosts` (/etc/docker/daemon.json, or -H in its service), restart it, and look \
                      through its containers: whoever reached it was root here";
        return failure(CHECK, message, advice);
    }
    if !listeners.is_empty() {
        let message = format!("something listens at {}, where engines are opened to the network", listeners.join(", "));
        let advice = "if it is the engine: it needs no TCP here, remove tcp:// from its `hosts`";
        return warning(CHECK, message, advice);
    }
    ok(CHECK, "no engine can be reached over TCP on this machine's addresses")
}

/// This machine's addresses, as the kernel lists them, loopback first.
fn addresses(directory: &Path) -> Vec<SocketAddr> {
    let mut all: Vec<SocketAddr> = vec![(Ipv4Addr::LOCALHOST, 0).into(), (Ipv6Addr::LOCALHOST, 0).into()];
    let read = |name: &str| std::fs::read_to_string(directory.join(name)).unwrap_or_default();
    let others = read_fib(&read("fib_trie")).into_iter().chain(read_if_inet6(&read("if_inet6")));
    for address in others {
        if all.len() < ADDRESSES_MAX && !all.contains(&address) {
            all.push(address);
        }
    }
    all
}

/// `fib_trie` names an address in one line and says in the next that it is the machine's own.
fn read_fib(text: &str) -> Vec<SocketAddr> {
    let mut last: Option<Ipv4Addr> = None;
    let mut own = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.parse().ok();
        } else if line.starts_with("/32 host LOCAL") {
            own.extend(last.map(|address| SocketAddr::from((IpAddr::V4(address), 0))));
        }
    }
    own
}

/// `if_inet6`: the address in 32 digits, then the interface's index in hexadecimal.
fn read_if_inet6(text: &str) -> Vec<SocketAddr> {
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let address = Ipv6Addr::from(u128::from_str_radix(words.next()?, 16).ok()?);
        let index = u32::from_str_radix(words.next()?, 16).ok()?;
        let scope = if address.is_unicast_link_local() { index } else { 0 };
        Some(SocketAddr::V6(SocketAddrV6::new(address, 0, 0, scope)))
    };
    text.lines().filter_map(entry).collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use peer_proto::control::Level;
    use tokio::net::TcpListener;
    use tokio::task::JoinSet;

    use super::*;

    /// Answers one connection with this.
    async fn answering(text: &'static [u8]) -> (u16, JoinSet<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 512];
            drop(stream.read(&mut request).await);
            drop(stream.write_all(text).await);
        });
        (port, serving)
    }

    #[tokio::test]
    async fn an_engine_is_told_from_another_listener_and_from_none() {
        let here = [SocketAddr::from((Ipv4Addr::LOCALHOST, 0))];
        let (engine, _serving) = answering(b"HTTP/1.0 200 OK\r\n\r\n{\"Version\":\"1\",\"ApiVersion\":\"1.41\"}").await;
        let (other, _serving_too) = answering(b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request").await;
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let silent_port = silent.local_addr().unwrap().port();
        let found = probe(&here, &[engine, other, silent_port, closed]).await;
        let kinds: Vec<_> = found.iter().map(|(place, kind)| (place.port(), *kind)).collect();
        assert_eq!(kinds, [(engine, Found::Engine), (other, Found::Listener), (silent_port, Found::Listener)]);
        assert_eq!(judge(&found).level, Level::Failure);
        assert!(judge(&found).message.contains(&engine.to_string()));
        assert_eq!(judge(&found[1..]).level, Level::Warning);
        assert_eq!(judge(&[]).level, Level::Ok);
    }

    #[test]
    fn the_kernels_lists_are_read() {
        let fib = "Local:\n  |-- 10.0.0.0\n     /24 link UNICAST\n  |-- 10.0.0.7\n     /32 host LOCAL\n  |-- 10.0.0.255\n     /32 link BROADCAST\n";
        assert_eq!(read_fib(fib), [SocketAddr::from(([10, 0, 0, 7], 0))]);
        let six = "fe80000000000000a8aabbfffe001122 02 40 20 80     eth0\n\
                   20010db8000000000000000000000001 02 40 00 80     eth0\nnonsense\n";
        assert_eq!(
            read_if_inet6(six).iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["[fe80::a8aa:bbff:fe00:1122%2]:0", "[2001:db8::1]:0"]
        );
        assert!(read_fib("").is_empty() && read_if_inet6("").is_empty());
        assert!(addresses(Path::new("/proc/net")).len() <= ADDRESSES_MAX);
    }
}
