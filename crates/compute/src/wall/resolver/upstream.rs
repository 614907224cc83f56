//! The host's own resolvers, which questions are passed on to.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::message::{ANSWER_MAX, CutShort, Question, Told};

/// Where the host says whom it asks.
const FILE: &str = "/etc/resolv.conf";
/// Largest file that is read (bytes).
const FILE_MAX: u64 = 64 * 1024;
/// Most resolvers and most domains that are taken from it.
const RESOLVERS_MAX: usize = 3;
const DOMAINS_MAX: usize = 32;
/// How long what was read is good.
const FRESH: Duration = Duration::from_secs(10);
/// How long one resolver may take.
const PATIENCE: Duration = Duration::from_millis(2500);

/// Whom to ask, and which names are the host's own business.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Host {
    /// Its resolvers, in order.
    pub(crate) resolvers: Vec<SocketAddr>,
    /// The domains of its own network, in lower case.
    pub(crate) domains: Vec<String>,
}

/// Knows whom to ask.
#[derive(Debug)]
pub(crate) struct Upstream {
    given: Vec<SocketAddr>,
    read: Mutex<Option<(Instant, Host)>>,
}

impl Upstream {
    /// Asks these, or those that the host asks if there are none.
    pub(crate) fn new(given: Vec<SocketAddr>) -> Self {
        Self { given, read: Mutex::default() }
    }

    /// The host's present answer.
    pub(crate) fn host(&self) -> Host {
        let mut slot = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, host)) = &*slot
            && at.elapsed() < FRESH
        {
            return host.clone();
        }
        let mut host = parse(&read(Path::new(FILE)).unwrap_or_default());
        if !self.given.is_empty() {
            host.resolvers.clone_from(&self.given);
        }
        *slot = Some((Instant::now(), host.clone()));
        host
    }

    /// Asks one after the other. Nothing, if none gives a usable answer.
    pub(crate) async fn ask(&self, question: &Question) -> Option<Told> {
        for resolver in self.host().resolvers {
            if let Ok(Ok(told)) = timeout(PATIENCE, ask_one(resolver, question)).await {
                return Some(told);
            }
        }
        None
    }
}

fn read(path: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)?.take(FILE_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// Reads the lines `nameserver`, `search` and `domain`.
fn parse(text: &str) -> Host {
    let mut host = Host::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => {
                let address = words.next().and_then(|word| word.parse().ok());
                host.resolvers.extend(address.map(|address| SocketAddr::new(address, 53)));
            }
            Some("search" | "domain") => {
                let domain = |word: &str| word.trim_matches('.').to_ascii_lowercase();
                host.domains.extend(words.map(domain).filter(|domain| !domain.is_empty()));
            }
            _ => {}
        }
    }
    host.resolvers.truncate(RESOLVERS_MAX);
    host.domains.truncate(DOMAINS_MAX);
    host
}

/// Asks over a datagram with a port and an id of its own, so that neither can be guessed; then, if need be, a connection.
async fn ask_one(resolver: SocketAddr, question: &Question) -> io::Result<Told> {
    let [a, b, ..] = peer_proto::id::RequestId::random().0;
    let id = u16::from_be_bytes([a, b]);
    let text = question.upstream(id).ok_or_else(|| io::Error::other("the question cannot be written"))?;
    let any: SocketAddr = match resolver {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(resolver).await?;
    socket.send(&text).await?;
    let mut buffer = vec![0; ANSWER_MAX];
    loop {
        let length = socket.recv(&mut buffer).await?;
        match question.read_answer(id, &buffer[..length]) {
            Some(Ok(told)) => return Ok(told),
            Some(Err(CutShort)) => return ask_over_connection(resolver, question, id, &text).await,
            // Somebody else's, or none at all: the right one may still come.
            None => {}
        }
    }
}

async fn ask_over_connection(resolver: SocketAddr, question: &Question, id: u16, text: &[u8]) -> io::Result<Told> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let mut stream = TcpStream::connect(resolver).await?;
    let length = u16::try_from(text.len()).map_err(|_| invalid())?;
    stream.write_all(&[&length.to_be_bytes(), text].concat()).await?;
    let length = usize::from(stream.read_u16().await?);
    if length > ANSWER_MAX {
        return Err(invalid());
    }
    let mut buffer = vec![0; length];
    stream.read_exact(&mut buffer).await?;
    question.read_answer(id, &buffer).and_then(Result::ok).ok_or_else(invalid)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_file_is_read_with_bounds() {
        let text = "# comment\nnameserver 192.0.2.53\nnameserver ::1\nnameserver nonsense\nsearch Office.Example.NET. lab.example\n\
            domain home.example\noptions ndots:2\nnameserver 192.0.2.54\nnameserver 192.0.2.55\n";
        let host = parse(text);
        let expected: Vec<SocketAddr> =
            ["192.0.2.53:53", "[::1]:53", "192.0.2.54:53"].iter().map(|text| text.parse().unwrap()).collect();
        assert_eq!(host.resolvers, expected);
        assert_eq!(host.domains, ["office.example.net", "lab.example", "home.example"]);
        assert_eq!(parse(""), Host::default());
    }
}
