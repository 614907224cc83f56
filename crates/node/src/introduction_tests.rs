#![expect(clippy::unwrap_used, reason = "a failing step is a failing test")]

use std::sync::Arc;

use peer_net::Keypair;
use peer_proto::identity::Context;
use peer_proto::unit::Timestamp;
use tempfile::TempDir;

use super::*;
use crate::settings;

/// A daemon with a node on loopback and no engine.
struct Machine {
    daemon: Arc<Daemon>,
    _directory: TempDir,
}

async fn machine(name: &str) -> Machine {
    let directory = tempfile::tempdir().unwrap();
    let flags = [
        ("data_dir", directory.path().join("data").display().to_string()),
        ("socket", directory.path().join("run/peerd.sock").display().to_string()),
        ("listen", "/ip4/127.0.0.1/tcp/0".to_owned()),
        ("engine", "none".to_owned()),
        ("max_handshakes_per_address", "64".to_owned()),
    ];
    let flags = flags.into_iter().map(|(key, value)| (key, vec![value])).collect();
    let settings = settings::resolve(&flags, &|_| None, None).unwrap();
    let daemon = Daemon::open(settings).await.unwrap();
    let request = peer_proto::control::InitRequest { name: Some(name.parse().unwrap()), force: false };
    daemon.init(request).await.unwrap();
    Machine { daemon, _directory: directory }
}

impl Machine {
    async fn node(&self) -> Arc<Node> {
        self.daemon.node().await.unwrap()
    }

    async fn id(&self) -> PeerId {
        self.node().await.identity.key.peer_id()
    }

    async fn invite(&self, seconds: u64) -> Result<Invitation, Problem> {
        let node = self.node().await;
        let request = Invite { grants: Grants::default(), name: None, expires_seconds: seconds };
        invite(Parts::of(&self.daemon, &node), node.card(&self.daemon), request).await
    }

    async fn join(&self, ticket: &str) -> Result<(PeerRecord, Grants), Problem> {
        let node = self.node().await;
        let request = Join { ticket: ticket.to_owned(), name: None, grants: Grants::default() };
        join(Parts::of(&self.daemon, &node), node.card(&self.daemon), request).await
    }

    fn knows(&self, peer: &PeerId) -> bool {
        self.daemon.trust.snapshot().peers.contains_key(peer)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invitation_makes_trust_mutual_once() {
    let (alice, bob, carol) = (machine("alice").await, machine("bob").await, machine("carol").await);
    let invitation = bob.invite(60).await.unwrap();
    let ticket = invitation.ticket.unwrap();
    let (record, granted) = alice.join(&ticket).await.unwrap();
    assert_eq!((record.name.as_str(), granted), ("bob", Grants::default()));
    assert!(alice.knows(&bob.id().await) && bob.knows(&alice.id().await));
    assert!(bob.daemon.trust.snapshot().invitations.is_empty());
    let again = carol.join(&ticket).await.unwrap_err();
    assert_eq!(again.code, Code::InvalidTicket, "{again}");
    assert!(!bob.knows(&carol.id().await) && !carol.knows(&bob.id().await));
    assert_eq!(alice.join(&ticket).await.unwrap_err().code, Code::InvalidTicket);
    assert_eq!(bob.join(&ticket).await.unwrap_err().code, Code::InvalidTicket);
    let network = alice.node().await.network.clone();
    let peer = bob.id().await;
    let connected = async {
        while !matches!(network.connection_state(peer), ConnectionState::Connected(_)) {
            tokio::time::sleep(GATE_PAUSE).await;
        }
    };
    tokio::time::timeout(Duration::from_mins(1), connected).await.expect("the two machines connect");
    for machine in [alice, bob, carol] {
        machine.daemon.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn trust_that_one_side_ended_is_made_again_by_an_invitation() {
    let (alice, bob) = (machine("alice").await, machine("bob").await);
    let (alices, bobs) = (alice.id().await, bob.id().await);
    alice.join(&bob.invite(60).await.unwrap().ticket.unwrap()).await.unwrap();
    // Whichever side ended it: the one that still knows the other only renews what it knows.
    for (ending, other) in [(&alice, bobs), (&bob, alices)] {
        ending.daemon.trust.remove(other, clock::now(), |_| Ok(((), String::new()))).await.unwrap();
        let ticket = bob.invite(60).await.unwrap().ticket.unwrap();
        alice.join(&ticket).await.unwrap();
        assert!(alice.knows(&bobs) && bob.knows(&alices));
        assert!(bob.daemon.trust.snapshot().invitations.is_empty(), "the invitation is used up");
        assert_eq!(alice.join(&ticket).await.unwrap_err().code, Code::InvalidTicket);
    }
    for machine in [alice, bob] {
        machine.daemon.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_who_answer_one_ticket_at_once_get_one_place() {
    let (alice, bob, carol) = (machine("alice").await, machine("bob").await, machine("carol").await);
    let ticket = bob.invite(60).await.unwrap().ticket.unwrap();
    let (one, other) = tokio::join!(alice.join(&ticket), carol.join(&ticket));
    assert_eq!(usize::from(one.is_ok()) + usize::from(other.is_ok()), 1, "{one:?} {other:?}");
    assert_eq!(bob.daemon.trust.snapshot().peers.len(), 1);
    for machine in [alice, bob, carol] {
        machine.daemon.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_revoked_and_foreign_texts_are_refused_with_their_reason() {
    let (alice, bob) = (machine("alice").await, machine("bob").await);
    let ticket: Ticket = bob.invite(60).await.unwrap().ticket.unwrap().parse().unwrap();
    let expired = Ticket { expires_at: Timestamp(1), ..ticket };
    let problem = alice.join(&expired.to_text()).await.unwrap_err();
    assert_eq!(problem.code, Code::InvalidTicket);
    assert!(problem.message.contains("expired"), "{problem}");
    let withdrawn = bob.invite(60).await.unwrap();
    bob.daemon.trust.revoke(withdrawn.id.parse().unwrap(), clock::now()).await.unwrap();
    until(&bob.node().await.network, withdrawn.id.parse().unwrap(), false).await;
    assert_eq!(alice.join(&withdrawn.ticket.unwrap()).await.unwrap_err().code, Code::InvalidTicket);
    assert_eq!(alice.join("peercard1.AAAA").await.unwrap_err().code, Code::InvalidArgument);
    assert_eq!(bob.invite(3601).await.unwrap_err().code, Code::InvalidArgument);
    assert_eq!(bob.invite(0).await.unwrap_err().code, Code::InvalidArgument);
    assert!(alice.daemon.trust.snapshot().peers.is_empty() && bob.daemon.trust.snapshot().peers.is_empty());
    for machine in [alice, bob] {
        machine.daemon.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn v1_ticket_key_opens_nothing_but_the_join_protocol() {
    let bob = machine("bob").await;
    let ticket: Ticket = bob.invite(60).await.unwrap().ticket.unwrap().parse().unwrap();
    let key = Identity::from_seed(&ticket.seed).to_keypair();
    let addresses = bob.node().await.network.listen_addresses();
    let peer = bob.id().await;
    for protocol in [protocols::CONTROL, protocols::LAYERS, protocols::LOGS, protocols::FORWARD, protocols::TUNNEL] {
        let opened = dial_once(key.clone(), peer, &addresses, protocol, DIAL_TIMEOUT).await;
        assert!(matches!(opened, Err(DialOnceError::Open(OpenError::NotOffered { .. }))), "{protocol}: {opened:?}");
    }
    let stranger = Keypair::generate_ed25519();
    let opened = dial_once(stranger, peer, &addresses, protocols::JOIN, DIAL_TIMEOUT).await;
    assert!(matches!(opened, Err(DialOnceError::Open(OpenError::RefusedByPeer { .. }))), "{opened:?}");
    bob.daemon.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn v2_answer_with_a_foreign_signature_is_refused_and_leaves_the_invitation_open() {
    let (alice, bob) = (machine("alice").await, machine("bob").await);
    let text = bob.invite(60).await.unwrap().ticket.unwrap();
    let ticket: Ticket = text.parse().unwrap();
    let one_time = Identity::from_seed(&ticket.seed);
    let (addresses, peer) = (bob.node().await.network.listen_addresses(), bob.id().await);
    // The card is Alice's; the key that signs the answer is not.
    let card = alice.node().await.card(&alice.daemon);
    let forged = join::seal(&Identity::generate(), &card, one_time.peer_id(), peer);
    let garbage = peer_proto::frame::encode(&one_time.seal(Context::Join, vec![7; 100]));
    for answer in [forged, garbage] {
        let (mut stream, connection) =
            dial_once(one_time.to_keypair(), peer, &addresses, protocols::JOIN, DIAL_TIMEOUT).await.unwrap();
        let deadline = Deadline::after(FRAME_TIMEOUT);
        write_frame_bytes(&mut stream, &answer, INTRODUCTION_FRAME_MAX, deadline).await.unwrap();
        let reply: JoinReply = read_frame(&mut stream, INTRODUCTION_FRAME_MAX, deadline).await.unwrap();
        assert!(matches!(reply, JoinReply::Refused(problem) if problem.code == Code::Malformed));
        connection.close().await;
    }
    let lines = bob.daemon.database.write(|tx| audit::newest(tx, 2)).await.unwrap();
    assert!(lines.iter().all(|line| line.threat.as_deref() == Some("V2")), "{lines:?}");
    assert!(bob.daemon.trust.snapshot().peers.is_empty());
    alice.join(&text).await.unwrap();
    for machine in [alice, bob] {
        machine.daemon.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn v6_another_key_at_the_inviters_address_gets_nothing() {
    let (alice, bob, mallory) = (machine("alice").await, machine("bob").await, machine("mallory").await);
    let ticket: Ticket = bob.invite(60).await.unwrap().ticket.unwrap().parse().unwrap();
    let identity = &bob.node().await.identity;
    let elsewhere = mallory.node().await.network.listen_addresses();
    let card = peer_proto::card::Card::new(&identity.key, identity.name.clone(), &elsewhere, [0; 32], clock::now());
    let inviter = SignedCard::sign(&identity.key, card);
    let problem = alice.join(&Ticket { inviter, ..ticket }.to_text()).await.unwrap_err();
    assert_eq!(problem.code, Code::WrongSigner, "{problem}");
    assert!(alice.daemon.trust.snapshot().peers.is_empty());
    for machine in [alice, bob, mallory] {
        machine.daemon.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn v1_untrusted_peer_is_refused_and_a_flood_of_tries_is_one_audit_line() {
    let bob = machine("bob").await;
    let (peer, network) = (bob.id().await, bob.node().await.network.clone());
    let addresses = network.listen_addresses();
    for _ in 0..5 {
        let stranger = Keypair::generate_ed25519();
        let opened = dial_once(stranger, peer, &addresses, protocols::CONTROL, DIAL_TIMEOUT).await;
        assert!(matches!(opened, Err(DialOnceError::Open(OpenError::RefusedByPeer { .. }))), "{opened:?}");
    }
    let written = async {
        loop {
            let lines = bob.daemon.database.write(|tx| audit::newest(tx, 100)).await.unwrap();
            let refused: Vec<_> = lines.into_iter().filter(|line| line.action == "connect").collect();
            if network.counters().connections_not_admitted >= 5 && !refused.is_empty() {
                return refused;
            }
            tokio::time::sleep(GATE_PAUSE).await;
        }
    };
    let lines = tokio::time::timeout(Duration::from_mins(1), written).await.expect("the refusal is audited");
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!((lines[0].threat.as_deref(), lines[0].actor.as_str()), (Some("V1"), "127.0.0.1"));
    bob.daemon.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn v1_removed_peer_loses_its_connections() {
    let (alice, bob) = (machine("alice").await, machine("bob").await);
    alice.join(&bob.invite(60).await.unwrap().ticket.unwrap()).await.unwrap();
    let (alice_id, bob_id) = (alice.id().await, bob.id().await);
    let (here, there) = (alice.node().await.network.clone(), bob.node().await.network.clone());
    let wait = |network: Network, peer: PeerId, connected: bool| async move {
        let follows = async {
            while matches!(network.connection_state(peer), ConnectionState::Connected(_)) != connected {
                tokio::time::sleep(GATE_PAUSE).await;
            }
        };
        tokio::time::timeout(Duration::from_mins(1), follows).await.expect("the connection follows the trust list");
    };
    wait(there.clone(), alice_id, true).await;
    wait(here.clone(), bob_id, true).await;
    bob.daemon.trust.remove(alice_id, clock::now(), |_| Ok(((), String::new()))).await.unwrap();
    until(&there, alice_id, false).await;
    wait(there, alice_id, false).await;
    wait(here, bob_id, false).await;
    for machine in [alice, bob] {
        machine.daemon.shutdown().await;
    }
}
