//! Tests of what statements about keys do to the list, through a real database.
#![expect(clippy::unwrap_used, reason = "a failing step is a failing test")]

use peer_proto::card::Card;
use peer_proto::grant::{DeployGrant, Grants};
use peer_proto::identity::Identity;
use peer_proto::unit::{ByteSize, Millicores};
use peer_state::database::Database;

use super::*;
use crate::pause::{Means, Pause, Subject};
use crate::trust::{Repeated, Trust};

const NOW: Timestamp = Timestamp(1_800_000_000_000);
const BEARER: Bearer = Bearer::Local;

struct World {
    directory: tempfile::TempDir,
    database: Database,
    trust: Trust,
    recovery: Identity,
    keys: Vec<Identity>,
}

fn database(directory: &std::path::Path) -> Database {
    Database::open(&directory.join("db"), &[peer_state::audit::SCHEMA, crate::SCHEMA]).unwrap()
}

fn open(directory: &std::path::Path) -> Trust {
    Trust::open(database(directory)).unwrap()
}

fn grants() -> Grants {
    Grants { deploy: Some(DeployGrant::new(Millicores::new(1000).unwrap(), ByteSize::mebibytes(64), 1)) }
}

impl World {
    /// A list with the first of many keys of one machine, called alice.
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let database = database(directory.path());
        let trust = Trust::open(database.clone()).unwrap();
        let keys = (1..80).map(|seed| Identity::from_seed(&[seed; 32])).collect();
        let world = Self { directory, database, trust, recovery: Identity::from_seed(&[200; 32]), keys };
        world.trust.add(world.card(0), None, grants(), Repeated::Refused, NOW).await.unwrap();
        world
    }

    fn card(&self, key: usize) -> SignedCard {
        self.card_with(key, self.recovery.public_key())
    }

    fn card_with(&self, key: usize, recovery_key: [u8; 32]) -> SignedCard {
        let identity = &self.keys[key];
        SignedCard::sign(identity, Card::new(identity, "alice".parse().unwrap(), &[], recovery_key, NOW))
    }

    fn rotation(&self, old: usize, new: usize, epoch: u64) -> Statement {
        Statement::rotate(&self.keys[old], &self.keys[new], &self.card(new), epoch, NOW)
    }

    fn replacement(&self, old: &[usize], new: usize, at: u64) -> Statement {
        let old = old.iter().map(|key| self.id(*key)).collect();
        Statement::replace(&self.recovery, &self.keys[new], &self.card(new), old, Timestamp(NOW.0 + at))
    }

    fn revocation(&self, key: usize, at: u64) -> Statement {
        Statement::revoke(&self.recovery, self.id(key), Timestamp(NOW.0 + at))
    }

    fn id(&self, key: usize) -> PeerId {
        self.keys[key].peer_id()
    }

    async fn follow(&self, statement: Statement) -> Result<Followed, Code> {
        let followed = self.trust.follow(statement, BEARER, NOW, |_, _| Ok(((), String::new()))).await;
        match followed {
            Ok((followed, ())) => Ok(followed),
            Err(ChangeError::Refused(problem)) => Err(problem.code),
            Err(error) => panic!("{error}"),
        }
    }

    /// The keys of the list, by their numbers.
    fn trusted(&self) -> Vec<usize> {
        (0..self.keys.len()).filter(|key| self.trust.snapshot().peers.contains_key(&self.id(*key))).collect()
    }
}

#[tokio::test]
async fn rotation_moves_name_and_grants_and_refuses_the_old_key_for_ever() {
    let world = World::new().await;
    let nothing = |_: &Tx<'_>| Ok(((), String::new()));
    world.trust.update(world.id(0), Some("al".parse().unwrap()), None, None, NOW, nothing).await.unwrap();
    let rotation = world.rotation(0, 1, 1);
    assert!(matches!(world.follow(rotation.clone()).await, Ok(Followed::Moved { .. })));
    assert_eq!(world.trusted(), [1]);
    let record = world.trust.snapshot().peers[&world.id(1)].clone();
    assert_eq!((record.name.as_str(), record.grants, record.epoch, record.moves), ("al", grants(), 1, 1));
    // Once more changes nothing, and neither do a restart or the old card.
    assert_eq!(world.follow(rotation.clone()).await, Ok(Followed::Already));
    let again = open(world.directory.path());
    let refused = again.add(world.card(0), None, Grants::default(), Repeated::Refused, NOW).await.unwrap_err();
    assert!(matches!(refused, ChangeError::Refused(problem) if problem.code == Code::RevokedKey));
    assert_eq!(again.snapshot(), world.trust.snapshot());
}

#[tokio::test]
async fn v3_an_earlier_statement_never_undoes_a_later_one() {
    let world = World::new().await;
    let (first, second) = (world.rotation(0, 1, 1), world.rotation(1, 2, 2));
    world.follow(first.clone()).await.unwrap();
    world.follow(second.clone()).await.unwrap();
    assert_eq!(world.follow(first).await, Ok(Followed::Already));
    // Another word of a key that has spoken, or of one that is gone.
    assert_eq!(world.follow(world.rotation(0, 3, 9)).await, Err(Code::RevokedKey));
    assert_eq!(world.follow(world.rotation(2, 3, 2)).await, Err(Code::Expired));
    // Back to a key that was ended.
    assert_eq!(world.follow(world.rotation(2, 0, 3)).await, Err(Code::RevokedKey));
    assert_eq!(world.trusted(), [2]);
    world.follow(world.replacement(&[2], 3, 10)).await.unwrap();
    assert_eq!(world.follow(world.replacement(&[3], 4, 10)).await, Err(Code::Expired));
    assert_eq!(world.follow(world.revocation(3, 9)).await, Err(Code::Expired));
    assert_eq!(world.trusted(), [3]);
}

#[tokio::test]
async fn v2_a_stranger_moves_nothing() {
    let world = World::new().await;
    assert_eq!(world.follow(world.rotation(5, 6, 1)).await, Err(Code::UnknownPeer));
    assert_eq!(world.follow(world.revocation(5, 1)).await, Err(Code::UnknownPeer));
    // A recovery key that is not the one of the card.
    let other = Identity::from_seed(&[201; 32]);
    let forged = Statement::revoke(&other, world.id(0), NOW);
    assert_eq!(world.follow(forged).await, Err(Code::WrongSigner));
    let card = world.card_with(1, other.public_key());
    let forged = Statement::replace(&other, &world.keys[1], &card, vec![world.id(0)], NOW);
    assert_eq!(world.follow(forged).await, Err(Code::WrongSigner));
    // The machine's key alone cannot bring another recovery key in, by rotation or by a card of its own.
    let forged = Statement::rotate(&world.keys[0], &world.keys[1], &card, 1, NOW);
    assert_eq!(world.follow(forged).await, Err(Code::WrongSigner));
    let refused =
        world.trust.add(world.card_with(0, other.public_key()), None, Grants::default(), Repeated::Renewed, NOW).await;
    assert!(matches!(refused, Err(ChangeError::Refused(problem)) if problem.code == Code::WrongSigner));
    let future = world.revocation(0, 2 * DRIFT_MAX_MILLISECONDS);
    assert_eq!(world.follow(future).await, Err(Code::ClockDrift));
    assert_eq!(world.trusted(), [0]);
}

#[tokio::test]
async fn g3_the_recovery_key_stands_above_whoever_took_the_old_key() {
    let world = World::new().await;
    // A thief rotates to a key of his own, and pumps the epoch up.
    world.follow(world.rotation(0, 10, u64::MAX)).await.unwrap();
    assert_eq!(world.trusted(), [10]);
    let replacement = world.replacement(&[0], 1, 1);
    assert!(matches!(world.follow(replacement.clone()).await, Ok(Followed::Moved { .. })));
    assert_eq!(world.trusted(), [1]);
    for key in [0, 10] {
        let card = world.card(key);
        let refused = world.trust.add(card, None, Grants::default(), Repeated::Refused, NOW).await.unwrap_err();
        assert!(matches!(refused, ChangeError::Refused(problem) if problem.code == Code::RevokedKey));
    }
    assert_eq!(world.follow(world.rotation(10, 11, 1)).await, Err(Code::RevokedKey));
    assert_eq!(world.follow(replacement).await, Ok(Followed::Already));
    // The machine itself goes on as ever.
    world.follow(world.rotation(1, 2, 1)).await.unwrap();
    assert_eq!(world.trusted(), [2]);
}

#[tokio::test]
async fn i3_a_revoked_key_and_what_it_became_are_trusted_no_more() {
    let world = World::new().await;
    world.follow(world.rotation(0, 10, 1)).await.unwrap();
    let revocation = world.revocation(0, 1);
    assert!(matches!(world.follow(revocation.clone()).await, Ok(Followed::Ended { .. })));
    assert!(world.trusted().is_empty());
    assert_eq!(world.follow(revocation).await, Ok(Followed::Already));
    for key in [0, 10] {
        assert!(world.trust.add(world.card(key), None, Grants::default(), Repeated::Refused, NOW).await.is_err());
    }
    // A key that the recovery key has replaced already cannot take its successor with it.
    let world = World::new().await;
    world.follow(world.replacement(&[0], 1, 1)).await.unwrap();
    assert_eq!(world.follow(world.revocation(0, 2)).await, Ok(Followed::Already));
    assert_eq!(world.trusted(), [1]);
}

#[tokio::test]
async fn v5_a_chain_of_keys_has_an_end() {
    let world = World::new().await;
    let most = usize::try_from(MOVES_MAX).unwrap();
    for key in 0..most {
        world.follow(world.rotation(key, key + 1, key as u64 + 1)).await.unwrap();
    }
    assert_eq!(world.follow(world.rotation(most, most + 1, 1000)).await, Err(Code::OverLimit));
    assert_eq!(world.trusted(), [most]);
    // The end can still be told.
    world.follow(world.revocation(most, 1)).await.unwrap();
    assert!(world.trusted().is_empty());
}

#[tokio::test]
async fn a_machine_that_was_joined_anew_under_its_new_key_becomes_one_again() {
    let world = World::new().await;
    world
        .trust
        .add(world.card(1), Some("alice-again".parse().unwrap()), Grants::default(), Repeated::Refused, NOW)
        .await
        .unwrap();
    world.follow(world.rotation(0, 1, 1)).await.unwrap();
    assert_eq!(world.trusted(), [1]);
    let record = world.trust.snapshot().peers[&world.id(1)].clone();
    assert_eq!((record.name.as_str(), record.grants), ("alice-again", Grants::default()));
}

#[tokio::test]
async fn i3_a_refused_key_that_vanished_from_the_disk_stops_the_start() {
    let world = World::new().await;
    world.follow(world.rotation(0, 1, 1)).await.unwrap();
    let schemas = [peer_state::audit::SCHEMA, crate::SCHEMA];
    let database = Database::open(&world.directory.path().join("db"), &schemas).unwrap();
    let gone = database.write_blocking(|tx| -> Result<_, peer_state::database::DatabaseError> {
        Ok(tx.execute("DELETE FROM refused_key", [])?)
    });
    assert_eq!(gone.unwrap(), 1);
    assert!(Trust::open(database).is_err());
}

#[tokio::test]
async fn g4_a_paused_peer_is_paused_under_its_new_key_and_forgotten_with_its_last() {
    let world = World::new().await;
    let held = |key: usize| {
        let peer = Subject::Peer(world.id(key));
        world.database.write_blocking(move |tx| pause::find(tx, &peer)).unwrap().map(|pause| pause.means)
    };
    let set = |key: usize, means| {
        let (peer, pause) = (Subject::Peer(world.id(key)), Pause { means, since: NOW });
        world.database.write_blocking(move |tx| pause::set(tx, &peer, &pause)).unwrap();
    };
    set(0, Means::Stop);
    world.follow(world.rotation(0, 1, 1)).await.unwrap();
    assert_eq!((held(0), held(1)), (None, Some(Means::Stop)));
    // Of two pauses that meet the stronger stays.
    set(2, Means::Kill);
    world.follow(world.rotation(1, 2, 2)).await.unwrap();
    assert_eq!((held(1), held(2)), (None, Some(Means::Kill)));
    set(3, Means::Freeze);
    world.follow(world.rotation(2, 3, 3)).await.unwrap();
    assert_eq!(held(3), Some(Means::Kill));
    world.follow(world.revocation(3, 1)).await.unwrap();
    assert_eq!(held(3), None);
}
