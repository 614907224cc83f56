//! Tests of the daemon's start and of its identity, through a real data directory.
#![expect(clippy::unwrap_used, reason = "a failing step is a failing test")]

use peer_proto::code::Code;
use peer_proto::control::{AuditLine, InitRequest};

use super::*;
use crate::settings;

fn settings(directory: &std::path::Path) -> Settings {
    let flags = [
        ("data_dir", directory.join("data").display().to_string()),
        ("socket", directory.join("run/peerd.sock").display().to_string()),
        ("listen", "/ip4/127.0.0.1/tcp/0".to_owned()),
        ("engine", "none".to_owned()),
    ];
    let flags = flags.into_iter().map(|(key, value)| (key, vec![value])).collect();
    settings::resolve(&flags, &|_| None, None).unwrap()
}

fn init(force: bool) -> InitRequest {
    InitRequest { name: Some("alice".parse().unwrap()), force }
}

async fn last_line(daemon: &Daemon) -> AuditLine {
    daemon.database.write(|tx| audit::newest(tx, 1)).await.unwrap().remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn v1_identity_beside_an_empty_database_starts_only_on_purpose() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::open(settings(directory.path())).await.unwrap();
    daemon.init(init(false)).await.unwrap();
    daemon.shutdown().await;
    drop(daemon);
    for file in ["peer.db", "peer.db-wal", "peer.db-shm"] {
        drop(std::fs::remove_file(directory.path().join("data").join(file)));
    }
    let error = Daemon::open(settings(directory.path())).await.unwrap_err();
    assert!(matches!(error, DaemonError::EmptyDatabase(_)), "{error}");
    assert!(error.to_string().contains("--accept-empty-database"), "{error}");
    let mut accepting = settings(directory.path());
    accepting.accept_empty_database = true;
    for settings in [accepting, settings(directory.path())] {
        let daemon = Daemon::open(settings).await.unwrap();
        assert_eq!(last_line(&daemon).await.action, "empty database accepted");
        daemon.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn making_an_identity_is_audited_before_the_key_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::open(settings(directory.path())).await.unwrap();
    let first = daemon.init(init(false)).await.unwrap();
    assert_eq!(last_line(&daemon).await.detail, first.peer_id);
    let second = daemon.init(init(true)).await.unwrap();
    let line = last_line(&daemon).await;
    assert_eq!(line.action, "identity replaced");
    for part in [first.peer_id, second.peer_id, second.backup.unwrap()] {
        assert!(line.detail.contains(&part), "{line:?}");
    }
    // A crash in between leaves the line alone: the next start finds no identity and goes on.
    std::fs::remove_file(directory.path().join("data/identity.key")).unwrap();
    daemon.shutdown().await;
    drop(daemon);
    let daemon = Daemon::open(settings(directory.path())).await.unwrap();
    assert_eq!(daemon.node().await.unwrap_err().code, Code::NoIdentity);
    daemon.init(init(false)).await.unwrap();
    daemon.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn v3_own_requests_are_not_signed_with_a_clock_that_went_back() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::open(settings(directory.path())).await.unwrap();
    let later = clock::now().plus(24 * 3_600_000);
    assert_eq!(daemon.database.write(move |tx| floor::pass(tx, later)).await.unwrap(), Ok(()));
    daemon.init(init(false)).await.unwrap();
    let problem = daemon.node().await.unwrap().requester.check_clock(clock::now()).await.unwrap_err();
    assert_eq!(problem.code, Code::ClockBehind);
    daemon.shutdown().await;
}
