//! A world in a struct: one gateway, providers, origins behind them, and visitors.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use peer_gateway::gateway::Gateway;
use peer_gateway::lease_streams::LEASE;
use peer_gateway::pool::TUNNEL;
use peer_gateway::providers;
use peer_gateway::settings::{self, Keys};
use peer_net::exchange::{Deadline, read_frame, write_frame};
use peer_net::{Admission, InboundStream, Incoming, Network, Options, Policy, Protocols, Role, Stream, Traffic};
use peer_proto::code::{Code, Problem};
use peer_proto::frame::TUNNEL_FRAME_MAX;
use peer_proto::id::DeploymentId;
use peer_proto::identity::Identity;
use peer_proto::query::StreamReply;
use peer_proto::tunnel::{LeaseReply, LeaseRequest, VisitHeader};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Longest wait for anything in a test.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A step that must end.
pub(crate) async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future).await.expect("the step ends in time")
}

/// Waits until something holds.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{what}"));
}

pub(crate) struct World {
    pub(crate) gateway: Gateway,
    pub(crate) directory: tempfile::TempDir,
}

impl World {
    pub(crate) async fn start() -> Self {
        Self::with(Keys::default()).await
    }

    pub(crate) async fn with(keys: Keys) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let gateway = start_gateway(directory.path(), keys).await;
        Self { gateway, directory }
    }

    /// A provider that is allowed and connected.
    pub(crate) async fn provider(&self) -> Provider {
        let identity = Identity::generate();
        providers::allow(self.directory.path(), identity.peer_id(), None).unwrap();
        Provider::start(identity, &self.gateway).await
    }

    /// A provider with one live deployment in front of an origin, and its host name.
    pub(crate) async fn serve(&self, origin: SocketAddr) -> (Provider, String) {
        let mut provider = self.provider().await;
        let host = provider.expose(DeploymentId::random(), origin).await;
        (provider, host)
    }

    pub(crate) async fn visit(&self, host: &str) -> TlsStream<TcpStream> {
        self.try_visit(host).await.unwrap()
    }

    pub(crate) async fn try_visit(&self, host: &str) -> io::Result<TlsStream<TcpStream>> {
        let mut roots = rustls::RootCertStore::empty();
        let authority = std::fs::read(self.gateway.info().ca_certificate.as_ref().unwrap()).unwrap();
        roots.add(CertificateDer::from_pem_slice(&authority).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let tcp = TcpStream::connect(self.gateway.https_address()).await?;
        let name = ServerName::try_from(host.to_owned()).unwrap();
        within(TlsConnector::from(Arc::new(config)).connect(name, tcp)).await
    }

    /// Sends one request on a connection of its own, and reads the answer to its end.
    pub(crate) async fn ask(&self, host: &str, request: &str) -> Answer {
        let mut stream = self.visit(host).await;
        stream.write_all(request.as_bytes()).await.unwrap();
        within(Answer::read(&mut stream)).await
    }

    /// The plainest request.
    pub(crate) async fn get(&self, host: &str, path: &str) -> Answer {
        self.ask(host, &format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")).await
    }
}

pub(crate) async fn start_gateway(directory: &Path, keys: Keys) -> Gateway {
    let keys = Keys {
        data_dir: Some(directory.to_owned()),
        https_listen: keys.https_listen.or(Some("127.0.0.1:0".parse().unwrap())),
        listen: keys.listen.clone().or(Some("/ip4/127.0.0.1/tcp/0".parse().unwrap())),
        ..keys
    };
    let resolved = settings::resolve(None, keys).unwrap();
    Gateway::start(&resolved.settings).await.unwrap()
}

/// One answer, read by a parser that knows only what it needs.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// Reads one answer: its head, then as much body as it announces, or all until the end.
    pub(crate) async fn read(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Self {
        let mut answer = Self::read_head(stream).await;
        let length = answer.field("content-length").map(|text| text.parse::<usize>().unwrap());
        if let Some(length) = length {
            answer.body.resize(length, 0);
            stream.read_exact(&mut answer.body).await.unwrap();
        } else if answer.field("transfer-encoding").is_some() {
            while !answer.body.ends_with(b"\r\n\r\n") {
                answer.body.push(stream.read_u8().await.unwrap());
            }
        } else if answer.status != 101 && answer.status != 204 && answer.status != 304 {
            // An end without a farewell of TLS is an end.
            drop(stream.read_to_end(&mut answer.body).await);
        }
        answer
    }

    pub(crate) async fn read_head(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Self {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(
                stream
                    .read_u8()
                    .await
                    .unwrap_or_else(|error| panic!("no answer: {error}, after {:?}", String::from_utf8_lossy(&head))),
            );
        }
        let head = String::from_utf8(head).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Self { status, head, body: Vec::new() }
    }

    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.fields(name).first().copied()
    }

    pub(crate) fn fields(&self, name: &str) -> Vec<&str> {
        fields(&self.head, name)
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    /// The gateway's own code, if the page is the gateway's.
    pub(crate) fn code(&self) -> &str {
        self.field("x-peergate-error").unwrap_or("")
    }
}

/// Values of a field in a head, in order.
pub(crate) fn fields<'a>(head: &'a str, name: &str) -> Vec<&'a str> {
    let lines = head.lines().filter_map(|line| line.split_once(':'));
    lines.filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).collect()
}

type Origins = Arc<Mutex<HashMap<DeploymentId, SocketAddr>>>;

/// A provider's end of the tunnel: real network, real lease stream, visits joined to origins on loopback.
pub(crate) struct Provider {
    pub(crate) identity: Identity,
    pub(crate) network: Network,
    origins: Origins,
    leases: Option<Stream>,
    _tasks: JoinSet<()>,
    _policy: watch::Sender<Arc<Policy>>,
}

impl Provider {
    pub(crate) async fn start(identity: Identity, gateway: &Gateway) -> Self {
        let (address, peer) = gateway.info().addresses[0].split_once("/p2p/").unwrap();
        let admission = Admission { role: Role::Gateway, addresses: vec![address.parse().unwrap()] };
        let policy = Policy { admitted: [(peer.parse().unwrap(), admission)].into() };
        let policy = watch::Sender::new(Arc::new(policy));
        let options = Options { backoff_initial: Duration::from_millis(50), ..Options::default() };
        let protocols = Protocols::none().allow(Role::Gateway, &[TUNNEL]);
        let (network, incoming) =
            Network::start(identity.to_keypair(), options, policy.subscribe(), protocols).await.unwrap();
        let origins = Origins::default();
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_visits(incoming, Arc::clone(&origins)));
        let mut provider = Self { identity, network, origins, leases: None, _tasks: tasks, _policy: policy };
        provider.connect(gateway).await;
        provider
    }

    /// Opens the lease stream; the gateway may need a moment to read its allow list.
    pub(crate) async fn connect(&mut self, gateway: &Gateway) {
        let peer = gateway.info().peer_id.parse().unwrap();
        let opening = async {
            loop {
                match self.network.open(peer, LEASE, Traffic::Control).await {
                    Ok(stream) => return stream,
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        };
        self.leases = Some(within(opening).await);
    }

    pub(crate) async fn request(&mut self, request: LeaseRequest) -> LeaseReply {
        let stream = self.leases.as_mut().unwrap();
        let deadline = Deadline::after(PATIENCE);
        write_frame(stream, &request, TUNNEL_FRAME_MAX, deadline).await.unwrap();
        read_frame(stream, TUNNEL_FRAME_MAX, deadline).await.unwrap()
    }

    /// Makes a deployment live; its host name without the port.
    pub(crate) async fn expose(&mut self, deployment: DeploymentId, origin: SocketAddr) -> String {
        self.origins.lock().unwrap().insert(deployment, origin);
        match self.request(LeaseRequest::Register(deployment)).await {
            LeaseReply::Live(url) => url.strip_prefix("https://").unwrap().rsplit_once(':').unwrap().0.to_owned(),
            other => panic!("not live: {other:?}"),
        }
    }

    pub(crate) async fn release(&mut self, deployment: DeploymentId) {
        assert_eq!(self.request(LeaseRequest::Release(deployment)).await, LeaseReply::Released);
    }

    /// True once the gateway has ended the lease stream.
    pub(crate) async fn lost_lease_stream(&mut self) -> bool {
        let stream = self.leases.as_mut().unwrap();
        read_frame::<LeaseReply, _>(stream, TUNNEL_FRAME_MAX, Deadline::after(PATIENCE)).await.is_err()
    }
}

async fn serve_visits(mut incoming: Incoming, origins: Origins) {
    let mut visits = JoinSet::new();
    while let Some(visit) = incoming.next().await {
        visits.spawn(serve_visit(visit, Arc::clone(&origins)));
        while visits.try_join_next().is_some() {}
    }
}

async fn serve_visit(visit: InboundStream, origins: Origins) {
    let (mut stream, deadline) = (visit.stream, Deadline::after(PATIENCE));
    let Ok(header) = read_frame::<VisitHeader, _>(&mut stream, TUNNEL_FRAME_MAX, deadline).await else { return };
    let origin = origins.lock().unwrap().get(&header.deployment).copied();
    let connected = match origin {
        Some(address) => TcpStream::connect(address).await.map_err(|_| Code::PortClosed),
        None => Err(Code::NoSuchDeployment),
    };
    let reply = match &connected {
        Ok(_) => StreamReply::Open,
        Err(code) => StreamReply::Refused(Problem::new(*code, "not there")),
    };
    write_frame(&mut stream, &reply, TUNNEL_FRAME_MAX, deadline).await.unwrap();
    if let Ok(mut origin) = connected {
        drop(tokio::io::copy_bidirectional(&mut stream.into_tokio(), &mut origin).await);
    }
}

/// A program behind the gateway: hands each connection to `serve`. It stops when dropped.
pub(crate) struct Origin {
    pub(crate) address: SocketAddr,
    _task: JoinSet<()>,
}

impl Origin {
    pub(crate) async fn start<F, S>(serve: S) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
        S: Fn(TcpStream) -> F + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream));
            }
        });
        Self { address, _task: task }
    }

    /// Answers every request with what it got: the head as it came, and the decoded body.
    pub(crate) async fn echo() -> Self {
        Self::start(async |mut stream: TcpStream| {
            while let Some((head, body)) = read_request(&mut stream).await {
                let length = head.len() + body.len();
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{head}");
                stream.write_all(answer.as_bytes()).await.unwrap();
                stream.write_all(&body).await.unwrap();
            }
        })
        .await
    }

    /// Answers every request with these bytes.
    pub(crate) async fn fixed(answer: &'static str) -> Self {
        Self::start(move |mut stream: TcpStream| async move {
            while read_request(&mut stream).await.is_some() {
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        })
        .await
    }
}

/// Reads one request: its head as text, and its body, decoded where it is chunked (trailers are kept at its end).
pub(crate) async fn read_request(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).unwrap();
    let mut body = Vec::new();
    if let Some(length) = fields(&head, "content-length").first() {
        body.resize(length.parse().unwrap(), 0);
        stream.read_exact(&mut body).await.ok()?;
    } else if !fields(&head, "transfer-encoding").is_empty() {
        loop {
            let line = read_line(stream).await?;
            let size = usize::from_str_radix(line.trim(), 16).unwrap();
            let mut chunk = vec![0; size];
            stream.read_exact(&mut chunk).await.ok()?;
            body.extend_from_slice(&chunk);
            if size == 0 {
                break;
            }
            read_line(stream).await?;
        }
        loop {
            match read_line(stream).await?.as_str() {
                "\r\n" => break,
                trailer => body.extend_from_slice(trailer.as_bytes()),
            }
        }
    }
    Some((head, body))
}

async fn read_line(stream: &mut TcpStream) -> Option<String> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        line.push(stream.read_u8().await.ok()?);
    }
    Some(String::from_utf8(line).unwrap())
}
