#![expect(clippy::unwrap_used, reason = "a failing step is a failing test")]

use std::os::unix::fs::PermissionsExt;

use axum::http::{Method, Request as HttpRequest};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use peer_proto::control::{AuditLine, AuditVerdict, Finding, InitReply, Level, Notice, Peer, Setting, Whoami};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinSet;

use super::*;
use crate::settings;

/// A served daemon without an engine, and a connection to it.
struct Served {
    daemon: Arc<Daemon>,
    api: Api,
    sender: SendRequest<Full<Bytes>>,
    _connection: JoinSet<()>,
    directory: TempDir,
}

async fn served() -> Served {
    let directory = tempfile::tempdir().unwrap();
    let flags = [
        ("data_dir", directory.path().join("data").display().to_string()),
        ("socket", directory.path().join("run/peerd.sock").display().to_string()),
        ("listen", "/ip4/127.0.0.1/tcp/0".to_owned()),
        ("engine", "none".to_owned()),
    ];
    let flags = flags.into_iter().map(|(key, value)| (key, vec![value])).collect();
    let settings = settings::resolve(&flags, &|_| None, None).unwrap();
    let daemon = Daemon::open(settings).await.unwrap();
    let api = serve(&daemon).await.unwrap();
    let (sender, connection) = connect(&daemon).await;
    Served { daemon, api, sender, _connection: connection, directory }
}

async fn connect(daemon: &Daemon) -> (SendRequest<Full<Bytes>>, JoinSet<()>) {
    let stream = UnixStream::connect(&daemon.settings.socket).await.unwrap();
    let (sender, connection) = handshake(TokioIo::new(stream)).await.unwrap();
    let mut driving = JoinSet::new();
    driving.spawn(async move { drop(connection.await) });
    (sender, driving)
}

fn request(method: &Method, path: &str, body: Option<&Value>) -> HttpRequest<Full<Bytes>> {
    let bytes = body.map(|body| serde_json::to_vec(body).unwrap()).unwrap_or_default();
    HttpRequest::builder()
        .method(method)
        .uri(path)
        .header("host", "peerd")
        .header(REQUIRED_HEADER, "1")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(bytes)))
        .unwrap()
}

impl Served {
    async fn send(&mut self, request: HttpRequest<Full<Bytes>>) -> (StatusCode, Bytes) {
        self.sender.ready().await.unwrap();
        let response = self.sender.send_request(request).await.unwrap();
        let status = response.status();
        (status, response.into_body().collect().await.unwrap().to_bytes())
    }

    async fn call(&mut self, method: Method, path: &str, body: Option<Value>) -> (StatusCode, Bytes) {
        self.send(request(&method, path, body.as_ref())).await
    }

    async fn get<T: DeserializeOwned>(&mut self, path: &str) -> T {
        let (status, body) = self.call(Method::GET, path, None).await;
        assert_eq!(status, StatusCode::OK, "{path}: {body:?}");
        serde_json::from_slice(&body).unwrap()
    }

    async fn problem(&mut self, method: Method, path: &str, body: Option<Value>) -> (StatusCode, Problem) {
        let (status, body) = self.call(method, path, body).await;
        (status, serde_json::from_slice(&body).unwrap_or_else(|_| panic!("{path}: {body:?}")))
    }

    async fn init(&mut self) -> InitReply {
        let (status, body) = self.call(Method::POST, "/v1/identity", Some(json!({"name": "alice"}))).await;
        assert_eq!(status, StatusCode::OK, "{body:?}");
        serde_json::from_slice(&body).unwrap()
    }

    async fn end(self) {
        self.api.shutdown().await;
        self.daemon.shutdown().await;
    }
}

fn card(name: &str) -> String {
    let identity = peer_proto::identity::Identity::generate();
    let address = "/ip4/127.0.0.1/tcp/9".parse().unwrap();
    let card = peer_proto::card::Card::new(&identity, name.parse().unwrap(), &[address], [0; 32], crate::clock::now());
    peer_proto::card::SignedCard::sign(&identity, card).to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn socket_is_private_and_gone_at_the_end() {
    let served = served().await;
    let socket = served.daemon.settings.socket.clone();
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&socket), mode(socket.parent().unwrap())), (0o600, 0o700));
    let directory = served.directory.path().to_owned();
    served.end().await;
    assert!(!directory.join("run/peerd.sock").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn request_without_our_header_or_with_another_media_type_is_refused() {
    let mut served = served().await;
    let mut bare = request(&Method::GET, "/v1/version", None);
    bare.headers_mut().remove(REQUIRED_HEADER);
    assert_eq!(served.send(bare).await.0, StatusCode::BAD_REQUEST);
    let mut form = request(&Method::POST, "/v1/identity", Some(&json!({})));
    form.headers_mut().insert("content-type", "text/plain".parse().unwrap());
    assert_eq!(served.send(form).await.0, StatusCode::BAD_REQUEST);
    assert!(served.daemon.node().await.is_err(), "nothing was made");
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn v1_work_of_a_request_goes_on_when_its_client_goes_away() {
    let served = served().await;
    let (go_on, may_go_on) = tokio::sync::oneshot::channel::<()>();
    let (done, is_done) = tokio::sync::oneshot::channel();
    let work = async move {
        may_go_on.await.unwrap();
        done.send(()).unwrap();
        Ok(())
    };
    let mut request = Box::pin(to_the_end(&served.daemon, work));
    assert!(futures::poll!(&mut request).is_pending());
    drop(request);
    go_on.send(()).unwrap();
    tokio::time::timeout(Duration::from_mins(1), is_done).await.expect("it goes on").unwrap();
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clock_that_stood_in_the_future_is_shown_and_accepted() {
    let mut served = served().await;
    let later = crate::clock::now().plus(24 * 3_600_000);
    let raise = move |tx: &peer_state::database::Tx<'_>| peer_trust::floor::pass(tx, later);
    assert_eq!(served.daemon.database.write(raise).await.unwrap(), Ok(()));
    let clock = |findings: Vec<Finding>| findings.into_iter().find(|finding| finding.check == "clock").unwrap();
    let finding = clock(served.get("/v1/doctor").await);
    assert!(finding.advice.unwrap().contains("--accept-clock"));
    let (status, body) = served.call(Method::POST, "/v1/doctor/accept-clock", Some(json!({}))).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(clock(serde_json::from_slice(&body).unwrap()).advice, None);
    let lines: Vec<AuditLine> = served.get("/v1/audit?limit=1").await;
    assert_eq!(lines[0].action, "clock accepted");
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn daemon_without_identity_says_what_to_do_and_makes_one_once() {
    let mut served = served().await;
    for path in ["/v1/identity", "/v1/peers"] {
        let (status, problem) = served.problem(Method::GET, path, None).await;
        assert_eq!((status, problem.code), (StatusCode::CONFLICT, Code::NoIdentity), "{path}");
    }
    let made = served.init().await;
    assert_eq!(made.recovery_phrase.split(' ').count(), 24);
    let whoami: Whoami = served.get("/v1/identity").await;
    assert_eq!((whoami.peer_id, whoami.addresses.len()), (made.peer_id.clone(), 1));
    let (status, problem) = served.problem(Method::POST, "/v1/identity", Some(json!({}))).await;
    assert_eq!((status, problem.code), (StatusCode::CONFLICT, Code::IdentityExists));
    let (_, body) = served.call(Method::POST, "/v1/identity", Some(json!({"force": true}))).await;
    let replaced: InitReply = serde_json::from_slice(&body).unwrap();
    assert_ne!(replaced.peer_id, made.peer_id);
    assert!(std::path::Path::new(&replaced.backup.unwrap()).exists());
    let whoami: Whoami = served.get("/v1/identity").await;
    assert_eq!(whoami.peer_id, replaced.peer_id);
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_are_added_changed_and_removed() {
    let mut served = served().await;
    served.init().await;
    let (status, body) = served.call(Method::POST, "/v1/peers", Some(json!({"card": card("bob")}))).await;
    assert_eq!(status, StatusCode::OK, "{body:?}");
    let added: Peer = serde_json::from_slice(&body).unwrap();
    assert_eq!(added.grants, peer_proto::grant::Grants::default(), "nothing is allowed unless it is said");
    let (status, _) = served.call(Method::POST, "/v1/peers", Some(json!({"card": added.peer_id}))).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    let wrong = json!({"grants": {"deploy": {"max_cpu": 0, "max_memory": 1, "max_containers": 1}}});
    let (status, problem) = served.problem(Method::PATCH, "/v1/peers/bob", Some(wrong)).await;
    assert_eq!((status, problem.code), (StatusCode::BAD_REQUEST, Code::InvalidArgument));
    let none = json!({"grants": {"deploy": {"max_cpu": 1, "max_memory": 1, "max_containers": 0}}});
    assert_eq!(served.call(Method::PATCH, "/v1/peers/bob", Some(none)).await.0, StatusCode::BAD_REQUEST);
    let change = json!({"name": "robert", "addresses": ["/dns/bob.example.org/tcp/4100"]});
    assert_eq!(served.call(Method::PATCH, "/v1/peers/bob", Some(change)).await.0, StatusCode::OK);
    let peers: Vec<Peer> = served.get("/v1/peers").await;
    assert_eq!((peers[0].name.as_str(), peers[0].addresses[0].as_str()), ("robert", "/dns/bob.example.org/tcp/4100"));
    assert_eq!(
        served.call(Method::DELETE, "/v1/peers/robert?keep_deployments=maybe", None).await.0,
        StatusCode::BAD_REQUEST
    );
    assert_eq!(served.call(Method::DELETE, "/v1/peers/robert", None).await.0, StatusCode::OK);
    let (status, problem) = served.problem(Method::GET, "/v1/peers/robert", None).await;
    assert_eq!((status, problem.code), (StatusCode::NOT_FOUND, Code::UnknownPeer));
    let verdict: AuditVerdict = served.get("/v1/audit/verify").await;
    assert_eq!(verdict.fault, None);
    assert!(verdict.lines >= 4, "{verdict:?}");
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gateways_need_a_pinned_key_that_is_no_peers() {
    let mut served = served().await;
    let me = served.init().await.peer_id;
    let peer = json!({"card": card("bob")});
    let (_, body) = served.call(Method::POST, "/v1/peers", Some(peer)).await;
    let bob: Peer = serde_json::from_slice(&body).unwrap();
    for id in [me, bob.peer_id] {
        let body = json!({"address": format!("/ip4/127.0.0.1/tcp/9/p2p/{id}")});
        assert_eq!(served.call(Method::POST, "/v1/gateways", Some(body)).await.0, StatusCode::BAD_REQUEST);
    }
    let id = peer_proto::identity::Identity::generate().peer_id();
    let body = json!({"address": format!("/ip4/127.0.0.1/tcp/9/p2p/{id}")});
    assert_eq!(served.call(Method::POST, "/v1/gateways", Some(body)).await.0, StatusCode::OK);
    let listed: Vec<Value> = served.get("/v1/gateways").await;
    assert_eq!((listed.len(), listed[0]["connected"].as_bool()), (1, Some(false)));
    assert_eq!(served.call(Method::DELETE, &format!("/v1/gateways/{id}"), None).await.0, StatusCode::OK);
    let (status, problem) = served.problem(Method::DELETE, &format!("/v1/gateways/{id}"), None).await;
    assert_eq!((status, problem.code), (StatusCode::NOT_FOUND, Code::UnknownGateway));
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn followed_events_come_at_once_and_end_with_the_daemon() {
    let mut served = served().await;
    served.init().await;
    let (mut sender, _connection) = connect(&served.daemon).await;
    let response = sender.send_request(request(&Method::GET, "/v1/events?follow=true", None)).await.unwrap();
    let mut body = response.into_body();
    served.call(Method::POST, "/v1/peers", Some(json!({"card": card("bob")}))).await;
    let frame = body.frame().await.unwrap().unwrap().into_data().unwrap();
    let notice: Notice = serde_json::from_slice(&frame).unwrap();
    assert_eq!(notice.kind, "peer_added");
    let (_, recent) = served.call(Method::GET, "/v1/events", None).await;
    assert!(recent.ends_with(b"\n") && recent.split(|byte| *byte == b'\n').count() >= 2);
    served.api.shutdown().await;
    while let Some(frame) = body.frame().await {
        frame.expect("the stream ends in order");
    }
    served.daemon.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn status_doctor_configuration_and_metrics_answer() {
    let mut served = served().await;
    let before: Value = served.get("/v1/status").await;
    assert!(before["identity"].is_null());
    served.init().await;
    let status: Value = served.get("/v1/status").await;
    assert!(status["identity"].is_object() && status["engine"].is_null());
    let findings: Vec<Finding> = served.get("/v1/doctor").await;
    for check in ["rights", "data_directory", "key_file", "clock", "listening", "disk_space", "engine_port"] {
        assert!(findings.iter().any(|finding| finding.check == check), "{check}");
    }
    let operations = include_str!("../../../../docs/operations.md");
    for Finding { check, level, advice, .. } in findings {
        assert!(operations.contains(&format!("`{check}`")), "docs/operations.md explains {check}");
        assert_eq!(advice.is_none(), level == Level::Ok, "{check}");
    }
    let configuration: Vec<Setting> = served.get("/v1/configuration").await;
    assert!(configuration.iter().any(|setting| setting.key == "engine" && setting.source == "flag"));
    let (_, text) = served.call(Method::GET, "/metrics", None).await;
    assert!(String::from_utf8(text.to_vec()).unwrap().contains("peer_audit_lines 1"));
    let (status, problem) = served.problem(Method::GET, "/v1/nothing", None).await;
    assert_eq!((status, problem.code), (StatusCode::NOT_FOUND, Code::UnsupportedVersion));
    served.end().await;
}

#[test]
fn every_code_has_a_status_that_says_whose_fault_it_is() {
    for code in Code::ALL {
        let status = status_of(*code);
        assert!(status.is_client_error() || status.is_server_error(), "{code}");
    }
    assert_eq!(status_of(Code::NotGranted), StatusCode::FORBIDDEN);
    assert_eq!(status_of(Code::EngineUnavailable), StatusCode::BAD_GATEWAY);
}
