//! Tests of the living list, through a real database.
#![expect(clippy::unwrap_used, reason = "a failing step is a failing test")]

use std::path::Path;

use peer_proto::card::Card;
use peer_proto::grant::DeployGrant;
use peer_proto::identity::Identity;
use peer_proto::unit::{ByteSize, Millicores};

use super::*;

const NOW: Timestamp = Timestamp(1_800_000_000_000);

fn open(directory: &Path) -> Result<(Database, Trust), ListError> {
    let database = Database::open(&directory.join("db"), &[peer_state::audit::SCHEMA, crate::SCHEMA]).unwrap();
    Ok((database.clone(), Trust::open(database)?))
}

fn card(name: &str) -> SignedCard {
    let identity = Identity::generate();
    SignedCard::sign(&identity, Card::new(&identity, name.parse().unwrap(), &[], [0; 32], NOW))
}

#[expect(clippy::unnecessary_wraps, reason = "the form that the list asks for")]
fn nothing_more(_: &Tx<'_>) -> Result<((), String), DatabaseError> {
    Ok(((), String::new()))
}

fn deploy_grant() -> Grants {
    let max_cpu = Millicores::new(1000).unwrap();
    Grants { deploy: Some(DeployGrant::new(max_cpu, ByteSize::mebibytes(64), 1)) }
}

fn invitation(ticket: PeerId, expires_at: Timestamp) -> InvitationRecord {
    InvitationRecord { ticket, grants: deploy_grant(), name: None, expires_at }
}

#[tokio::test]
async fn changes_are_published_at_once_and_survive_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let (database, trust) = open(directory.path()).unwrap();
    let mut watch = trust.watch();
    let bob = trust.add(card("bob"), None, Grants::default(), Repeated::Refused, NOW).await.unwrap();
    assert!(watch.has_changed().unwrap());
    assert!(watch.borrow_and_update().peers.contains_key(&bob.peer));
    assert_eq!(bob.grants, Grants::default(), "adding a friend gives him nothing");
    trust
        .update(bob.peer, Some("robert".parse().unwrap()), Some(deploy_grant()), None, NOW, nothing_more)
        .await
        .unwrap();
    drop((trust, database));
    let (_, trust) = open(directory.path()).unwrap();
    let snapshot = trust.snapshot();
    let found = snapshot.find("robert").unwrap();
    assert_eq!((found.peer, &found.grants), (bob.peer, &deploy_grant()));
    trust.remove(bob.peer, NOW, |_| Ok(((), String::new()))).await.unwrap();
    assert!(trust.snapshot().peers.is_empty());
}

#[tokio::test]
async fn v1_damaged_list_never_opens() {
    for damage in [
        "UPDATE peer SET record = (SELECT record FROM peer ORDER BY id DESC LIMIT 1)",
        "DELETE FROM peer WHERE id = (SELECT max(id) FROM peer)",
        "DELETE FROM trust_seal",
        "UPDATE trust_seal SET digest = zeroblob(32)",
    ] {
        let directory = tempfile::tempdir().unwrap();
        let (database, trust) = open(directory.path()).unwrap();
        trust.add(card("bob"), None, Grants::default(), Repeated::Refused, NOW).await.unwrap();
        trust.add(card("carol"), None, Grants::default(), Repeated::Refused, NOW).await.unwrap();
        database.write_blocking(|tx| tx.execute_batch(damage).map_err(DatabaseError::from)).unwrap();
        drop((trust, database));
        assert!(matches!(open(directory.path()), Err(ListError::Damaged(_))), "{damage}");
    }
}

#[tokio::test]
async fn invitation_is_used_once_and_not_after_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let (_, trust) = open(directory.path()).unwrap();
    let ticket = Identity::generate().peer_id();
    trust.invite(invitation(ticket, NOW.plus(1000)), NOW).await.unwrap();
    let mut racing = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let trust = trust.clone();
        racing.spawn(async move { trust.redeem(ticket, card("alice"), "/ip4/192.0.2.9/tcp/1".into(), NOW).await });
    }
    let mut won = 0;
    for attempt in racing.join_all().await {
        match attempt {
            Ok(record) => {
                won += 1;
                assert_eq!(record.grants, deploy_grant());
            }
            Err(ChangeError::Refused(problem)) => assert_eq!(problem.code, Code::InvalidTicket),
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!((won, trust.snapshot().peers.len(), trust.snapshot().invitations.len()), (1, 1, 0));
    let late = Identity::generate().peer_id();
    trust.invite(invitation(late, NOW.plus(1000)), NOW).await.unwrap();
    assert!(trust.redeem(late, card("carol"), String::new(), NOW.plus(1000)).await.is_err());
    let too_long = invitation(Identity::generate().peer_id(), NOW.plus(INVITATION_LIFE_MAX_MILLISECONDS + 1));
    assert!(trust.invite(too_long, NOW).await.is_err());
}

#[tokio::test]
async fn names_are_unique_and_found_by_name_or_unique_part() {
    let directory = tempfile::tempdir().unwrap();
    let (_, trust) = open(directory.path()).unwrap();
    let first = trust.add(card("bob"), None, Grants::default(), Repeated::Refused, NOW).await.unwrap();
    let second = trust.add(card("bob"), None, Grants::default(), Repeated::Refused, NOW).await.unwrap();
    assert_ne!(first.name, second.name);
    let clash = trust.add(card("x"), Some("bob".parse().unwrap()), Grants::default(), Repeated::Refused, NOW).await;
    assert!(matches!(clash, Err(ChangeError::Refused(problem)) if problem.code == Code::NameTaken));
    let snapshot = trust.snapshot();
    let id = second.peer.to_string();
    assert_eq!(snapshot.find(&id[id.len() - 12..]).unwrap().peer, second.peer);
    assert_eq!(snapshot.find("12D3").unwrap_err().code, Code::Ambiguous);
    assert_eq!(snapshot.find("dave").unwrap_err().code, Code::UnknownPeer);
}

#[tokio::test(flavor = "multi_thread")]
async fn v1_committed_removal_is_published_even_if_its_caller_goes_away() {
    let directory = tempfile::tempdir().unwrap();
    let (_, trust) = open(directory.path()).unwrap();
    let bob = trust.add(card("bob"), None, Grants::default(), Repeated::Refused, NOW).await.unwrap();
    let mut watch = trust.watch();
    watch.mark_unchanged();
    let (begun, has_begun) = tokio::sync::oneshot::channel();
    let (go_on, may_go_on) = std::sync::mpsc::channel::<()>();
    let mut removal = Box::pin(trust.remove(bob.peer, NOW, move |_| {
        begun.send(()).unwrap();
        may_go_on.recv().unwrap();
        Ok(((), String::new()))
    }));
    tokio::select! {
        _ = &mut removal => panic!("the removal waits for us"),
        begun = has_begun => begun.unwrap(),
    }
    // As when the client of a request hangs up: the future is dropped in the middle of the transaction.
    drop(removal);
    go_on.send(()).unwrap();
    tokio::time::timeout(std::time::Duration::from_mins(1), watch.changed()).await.expect("it is published").unwrap();
    assert!(watch.borrow().peers.is_empty());
    // The next change does not find a lock that nobody gives back.
    trust.add(card("carol"), None, Grants::default(), Repeated::Refused, NOW).await.unwrap();
}

#[tokio::test]
async fn removal_and_what_goes_with_it_are_one_transaction() {
    let directory = tempfile::tempdir().unwrap();
    let (_, trust) = open(directory.path()).unwrap();
    let bob = trust.add(card("bob"), None, Grants::default(), Repeated::Refused, NOW).await.unwrap();
    let failed = trust.remove(bob.peer, NOW, |_| Err::<((), String), _>(DatabaseError::DiskFull)).await;
    assert!(matches!(failed, Err(ChangeError::List(_))));
    assert!(trust.snapshot().peers.contains_key(&bob.peer));
}

#[tokio::test]
async fn known_machine_is_renewed_by_an_invitation() {
    let directory = tempfile::tempdir().unwrap();
    let (_, trust) = open(directory.path()).unwrap();
    let identity = Identity::generate();
    let at = |port: u16| {
        let address = format!("/ip4/192.0.2.1/tcp/{port}").parse().unwrap();
        SignedCard::sign(&identity, Card::new(&identity, "alice".parse().unwrap(), &[address], [0; 32], NOW))
    };
    let first = trust.add(at(1), Some("al".parse().unwrap()), Grants::default(), Repeated::Refused, NOW).await.unwrap();
    let ticket = Identity::generate().peer_id();
    trust.invite(invitation(ticket, NOW.plus(1000)), NOW).await.unwrap();
    let redeemed = trust.redeem(ticket, at(2), String::new(), NOW).await.unwrap();
    assert_eq!((redeemed.name.as_str(), &redeemed.grants), ("al", &deploy_grant()));
    assert_ne!(redeemed.addresses(), first.addresses());
    assert!(trust.snapshot().invitations.is_empty(), "the invitation is used up");
    // On the joining side, grants stay unless new ones are given.
    let joined = trust.add(at(3), None, Grants::default(), Repeated::Renewed, NOW).await.unwrap();
    assert_eq!((&joined.grants, joined.added_at), (&deploy_grant(), first.added_at));
    assert_eq!(trust.snapshot().peers.len(), 1);
}

#[tokio::test]
async fn audit_lines_name_who_was_changed_from_what_to_what() {
    let directory = tempfile::tempdir().unwrap();
    let (database, trust) = open(directory.path()).unwrap();
    let last = || database.write_blocking(|tx| audit::newest(tx, 1)).unwrap().remove(0);
    let bob = trust.add(card("bob"), None, Grants::default(), Repeated::Refused, NOW).await.unwrap();
    trust.add(card("carol"), None, Grants::default(), Repeated::Refused, NOW).await.unwrap();
    trust.update(bob.peer, None, Some(deploy_grant()), None, NOW, nothing_more).await.unwrap();
    let detail = last().detail;
    assert!(detail.contains(&bob.peer.to_string()) && detail.contains("nothing -> deploy cpu=1"), "{detail}");
    assert!(!detail.contains("carol"), "{detail}");
    trust.remove(bob.peer, NOW, |_| Ok(((), "its deployments are kept".into()))).await.unwrap();
    assert!(last().detail.contains("-> nothing; its deployments are kept"), "{:?}", last());
    let ticket = Identity::generate().peer_id();
    trust.invite(invitation(ticket, NOW.plus(1000)), NOW).await.unwrap();
    assert!(last().detail.contains(&ticket.to_string()));
    let alice = trust.redeem(ticket, card("alice"), "/ip4/192.0.2.9/tcp/1".into(), NOW).await.unwrap();
    assert_eq!(last().actor, alice.peer.to_string());
    assert!(last().detail.contains("192.0.2.9") && last().detail.contains(&ticket.to_string()), "{:?}", last());
}
