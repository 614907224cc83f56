//! `peergate` as a process, and a visitor that speaks HTTP/1.1 over TLS byte by byte.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;
use tempfile::TempDir;

use super::machine::{Machine, Output, Running};
use super::{eventually, free_port};

/// Longest wait of a visitor for one byte.
const VISIT_MAX: Duration = Duration::from_secs(30);

/// A visitor's connection.
pub(crate) type Visit = StreamOwned<ClientConnection, TcpStream>;

/// A gateway. It keeps its ports and its key over restarts.
pub(crate) struct Gate {
    directory: PathBuf,
    _temporary: Option<TempDir>,
    pub(crate) https_port: u16,
    pub(crate) port: u16,
    process: Option<Running>,
}

impl Gate {
    pub(crate) fn start() -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let served = Self::served(temporary.path().to_owned(), free_port());
        let mut gate = Self { _temporary: Some(temporary), ..served };
        gate.up();
        gate
    }

    /// A gateway that somebody else starts, with its data here.
    pub(crate) fn served(directory: PathBuf, https_port: u16) -> Self {
        Self { directory, _temporary: None, https_port, port: free_port(), process: None }
    }

    fn command(&self) -> Command {
        let program = Path::new(env!("CARGO_BIN_EXE_peerd")).with_file_name("peergate");
        assert!(program.is_file(), "peergate is not built; run: cargo build --release -p peer-gateway");
        let mut command = Command::new(program);
        command.arg("--data-dir").arg(&self.directory).args(["--domain", "peer.localhost"]);
        command.args(["--https-listen", &format!("127.0.0.1:{}", self.https_port)]);
        command.args(["--listen", &format!("/ip4/127.0.0.1/tcp/{}", self.port)]);
        command
    }

    /// Runs one of its commands.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> Output {
        Output::of(self.command().args(arguments))
    }

    /// What it says of itself.
    pub(crate) fn info(&self) -> Value {
        self.ctl(&["info", "--json"]).success().json()
    }

    pub(crate) fn up(&mut self) {
        self.process = Some(Running::start(self.command().arg("run")));
        eventually("the gateway runs", || {
            let process = self.process.as_mut().unwrap();
            assert!(!process.is_over(), "peergate ended: {}", process.stderr());
            let info = self.ctl(&["info", "--json"]);
            (info.status == 0 && info.json()["running"] == true).then_some(())
        });
    }

    pub(crate) fn kill(&mut self) {
        self.process = None;
    }

    /// The address that providers add.
    pub(crate) fn address(&self) -> String {
        self.info()["addresses"][0].as_str().unwrap().to_owned()
    }

    /// Lets a provider serve here, adds this gateway there, and waits for the tunnel.
    pub(crate) fn admit(&self, provider: &Machine) {
        self.ctl(&["allow", &provider.peer_id]).success();
        provider.ctl(&["gateway", "add", &self.address()]);
        eventually("the tunnel stands", || (provider.json(&["gateway", "list"])[0]["connected"] == true).then_some(()));
    }

    /// Opens a connection for the host of a public address.
    pub(crate) fn visit(&self, url: &str) -> Visit {
        let authority = PathBuf::from(self.info()["ca_certificate"].as_str().unwrap());
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&std::fs::read(authority).unwrap()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(roots).with_no_client_auth();
        let name = ServerName::try_from(host_of(url).split(':').next().unwrap().to_owned()).unwrap();
        let tcp = TcpStream::connect(("127.0.0.1", self.https_port)).unwrap();
        tcp.set_read_timeout(Some(VISIT_MAX)).unwrap();
        tcp.set_write_timeout(Some(VISIT_MAX)).unwrap();
        StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), tcp)
    }

    /// Sends a request's first lines and body on a connection of its own; `Host` and `Connection` are added.
    pub(crate) fn ask(&self, url: &str, line: &str, fields: &[&str], body: &[u8]) -> Answer {
        let mut visit = self.visit(url);
        let fields: String = fields.iter().flat_map(|field| [*field, "\r\n"]).collect();
        let head = format!("{line} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{fields}\r\n", host_of(url));
        visit.write_all(head.as_bytes()).unwrap();
        visit.write_all(body).unwrap();
        visit.flush().unwrap();
        Answer::read(&mut visit)
    }

    pub(crate) fn get(&self, url: &str, path: &str) -> Answer {
        self.ask(url, &format!("GET {path}"), &[], b"")
    }
}

/// `label.domain:port` of a public address.
pub(crate) fn host_of(url: &str) -> &str {
    url.strip_prefix("https://").expect("public addresses are https").trim_end_matches('/')
}

/// One answer of HTTP.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// Reads one answer and its body.
    pub(crate) fn read(stream: &mut impl Read) -> Self {
        let mut answer = Self::read_head(stream);
        if let Some(length) = answer.field("content-length") {
            answer.body.resize(length.parse().unwrap(), 0);
            stream.read_exact(&mut answer.body).unwrap();
        } else if answer.field("transfer-encoding").is_some() {
            while let Some(chunk) = read_chunk(stream) {
                answer.body.extend(chunk);
            }
        }
        answer
    }

    pub(crate) fn read_head(stream: &mut impl Read) -> Self {
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte).unwrap_or_else(|error| panic!("no answer: {error}"));
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Self { status, head, body: Vec::new() }
    }

    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(':'));
        lines.filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).next()
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Whether the page is the gateway's own, and not one of a deployment.
    pub(crate) fn is_gateways(&self) -> bool {
        self.field("x-peergate-error").is_some()
    }
}

fn read_chunk(stream: &mut impl Read) -> Option<Vec<u8>> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while !line.ends_with(b"\r\n") {
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    let length = usize::from_str_radix(String::from_utf8_lossy(&line).trim(), 16).unwrap();
    let mut chunk = vec![0; length + 2];
    stream.read_exact(&mut chunk).unwrap();
    chunk.truncate(length);
    (length > 0).then_some(chunk)
}
