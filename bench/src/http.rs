//! The smallest client that measures honestly: HTTP/1.1 on one connection, bodies of known length read and dropped.

use std::{
    fmt::Write as _,
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::{fd::AsFd, unix::net::UnixStream},
    sync::Arc,
    thread,
    time::Duration,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use serde_json::Value;

use crate::Failure;

const SILENCE: Duration = Duration::from_mins(1);
const HEAD_LINES_MAX: usize = 100;

/// Bytes both ways.
pub(crate) trait Channel: Read + Write + Send {}
impl<T: Read + Write + Send> Channel for T {}

/// One connection that is kept.
pub(crate) struct Client {
    stream: BufReader<Box<dyn Channel>>,
    host: String,
}

/// An answer, its body read to the end.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
    /// Length of the body (bytes), also where it was dropped.
    pub(crate) length: u64,
}

impl Client {
    fn new(stream: Box<dyn Channel>, host: &str) -> Self {
        Self { stream: BufReader::with_capacity(64 * 1024, stream), host: host.to_owned() }
    }

    /// Asks for a page and keeps its body.
    pub(crate) fn get(&mut self, path: &str) -> Result<Answer, Failure> {
        self.send("GET", path, None)?;
        self.answer(true)
    }

    /// Asks for a page and drops its body.
    pub(crate) fn drain(&mut self, path: &str) -> Result<Answer, Failure> {
        self.send("GET", path, None)?;
        self.answer(false)
    }

    /// Sends a request with a body of JSON, if any, and keeps the answer.
    pub(crate) fn send_json(&mut self, method: &str, path: &str, body: Option<&Value>) -> Result<Answer, Failure> {
        self.send(method, path, body)?;
        self.answer(true)
    }

    fn send(&mut self, method: &str, path: &str, body: Option<&Value>) -> Result<(), Failure> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n", self.host);
        if !body.is_empty() {
            write!(request, "Content-Type: application/json\r\nContent-Length: {}\r\n", body.len())?;
        }
        request += "\r\n";
        request += &body;
        let stream = self.stream.get_mut();
        stream.write_all(request.as_bytes())?;
        Ok(stream.flush()?)
    }

    fn answer(&mut self, keep: bool) -> Result<Answer, Failure> {
        let first = self.line()?;
        let status = first.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status: u16 = status.ok_or_else(|| format!("not an HTTP answer: {first:?}"))?;
        let (mut length, mut chunked) = (None, false);
        for _ in 0..HEAD_LINES_MAX {
            let line = self.line()?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            match line.split_once(':').map(|(name, value)| (name, value.trim())) {
                Some(("content-length", value)) => length = Some(value.parse::<u64>()?),
                Some(("transfer-encoding", value)) => chunked = value == "chunked",
                _ => {}
            }
        }
        let mut body = Vec::new();
        let length = match (length, chunked) {
            (Some(length), false) => self.body(length, keep.then_some(&mut body))?,
            (None, true) => self.chunks(keep.then_some(&mut body))?,
            (None, false) if matches!(status, 204 | 304) => 0,
            _ => return Err(format!("an answer {status} without a length").into()),
        };
        Ok(Answer { status, body, length })
    }

    fn line(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        (&mut self.stream).take(64 * 1024).read_line(&mut line)?;
        let line = line.strip_suffix("\r\n").ok_or("the connection ended inside an answer")?;
        Ok(line.to_owned())
    }

    fn body(&mut self, length: u64, kept: Option<&mut Vec<u8>>) -> Result<u64, Failure> {
        let mut body = (&mut self.stream).take(length);
        let read = match kept {
            Some(kept) => body.read_to_end(kept)? as u64,
            None => drop_all(&mut body)?,
        };
        if read == length { Ok(read) } else { Err("the body ended early".into()) }
    }

    fn chunks(&mut self, mut kept: Option<&mut Vec<u8>>) -> Result<u64, Failure> {
        let mut total = 0;
        loop {
            let size = u64::from_str_radix(self.line()?.split(';').next().unwrap_or_default(), 16)?;
            total += self.body(size, kept.as_deref_mut())?;
            if !self.line()?.is_empty() {
                return Err("a chunk without its end".into());
            }
            if size == 0 {
                return Ok(total);
            }
        }
    }
}

/// Reads without the copy into a writer, as any client would.
fn drop_all(reader: &mut impl BufRead) -> Result<u64, Failure> {
    let mut total = 0;
    loop {
        let count = reader.fill_buf()?.len();
        if count == 0 {
            return Ok(total);
        }
        reader.consume(count);
        total += count as u64;
    }
}

/// Where visitors come in, and whom they believe.
#[derive(Clone)]
pub(crate) struct Door {
    address: SocketAddr,
    configuration: Arc<ClientConfig>,
}

impl Door {
    /// The gateway's door on this machine's port, with its authority's certificate (PEM).
    pub(crate) fn new(port: u16, authority: &[u8]) -> Result<Self, Failure> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority)?)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let configuration = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Ok(Self { address, configuration: Arc::new(configuration) })
    }

    /// A new connection for the host of `url` (`https://host:port`).
    pub(crate) fn connect(&self, url: &str) -> Result<Client, Failure> {
        let host = url.strip_prefix("https://").ok_or("the address is not https")?.trim_end_matches('/');
        let name = host.split(':').next().unwrap_or_default().to_owned();
        let tcp = prepared(TcpStream::connect(self.address)?)?;
        let tls = ClientConnection::new(self.configuration.clone(), ServerName::try_from(name)?)?;
        Ok(Client::new(Box::new(StreamOwned::new(tls, tcp)), host))
    }
}

/// A connection to a port of loopback inside the network namespace of `process`.
pub(crate) fn connect_inside(process: u32, port: u16) -> Result<Client, Failure> {
    let namespace = File::open(format!("/proc/{process}/ns/net"))?;
    // Entering changes a thread for good, so this one ends with the connection made.
    let enter = move || -> std::io::Result<TcpStream> {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        TcpStream::connect((Ipv4Addr::LOCALHOST, port))
    };
    let tcp = thread::spawn(enter).join().map_err(|_| "the thread inside the namespace panicked")??;
    Ok(Client::new(Box::new(prepared(tcp)?), "localhost"))
}

/// A connection to a Unix socket.
pub(crate) fn connect_unix(path: &str) -> Result<Client, Failure> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(SILENCE))?;
    Ok(Client::new(Box::new(stream), "localhost"))
}

fn prepared(stream: TcpStream) -> Result<TcpStream, Failure> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    Ok(stream)
}
