#![expect(clippy::unwrap_used, reason = "tests")]

use peer_proto::identity::Identity;
use peer_state::database::Database;

use super::*;

const NOW: Timestamp = Timestamp(10 * FRESH_MILLISECONDS);

fn digest(n: u8) -> Digest {
    Digest([n; 32])
}

fn with_database(test: impl FnOnce(&Tx<'_>) -> Result<(), DatabaseError>) {
    let directory = tempfile::tempdir().unwrap();
    let database = Database::open(&directory.path().join("peer.db"), &[crate::record::SCHEMA]).unwrap();
    database.write_blocking(test).unwrap();
}

fn of_owner(tx: &Tx<'_>, owner: &PeerId) -> Vec<Digest> {
    images_of(tx, Some(owner), NOW).unwrap().into_iter().map(|image| image.digest).collect()
}

#[test]
fn v5_what_an_owner_does_not_use_is_given_up_oldest_first() {
    with_database(|tx| {
        let [alice, carol] = [(); 2].map(|()| Identity::generate().peer_id());
        for n in 1..=4 {
            brought(tx, Some(&alice), digest(n), 10, Timestamp(n.into()))?;
        }
        brought(tx, Some(&carol), digest(1), 10, Timestamp(1))?;
        brought(tx, Some(&alice), digest(5), 10, NOW)?;
        assert_eq!(in_use(tx, Some(&alice), Some(digest(9)), NOW)?, 10, "what has just come is in use");
        assert_eq!(in_use(tx, Some(&alice), Some(digest(5)), NOW)?, 0);
        assert_eq!(give_up(tx, Some(&alice), 50, NOW)?, 0);
        assert_eq!(give_up(tx, Some(&alice), 25, NOW)?, 3);
        assert_eq!(of_owner(tx, &alice), [digest(4), digest(5)]);
        assert_eq!(of_owner(tx, &carol), [digest(1)], "it is still hers");
        assert_eq!(give_up(tx, Some(&alice), 0, NOW)?, 1);
        assert_eq!(of_owner(tx, &alice), [digest(5)], "what is in use stays");
        let nobodys = images(tx)?.into_iter().filter(|image| image.owners.is_empty()).count();
        assert_eq!(nobodys, 3);
        Ok(())
    });
}

#[test]
fn v5_what_nobody_uses_makes_room_on_the_whole_machine() {
    with_database(|tx| {
        let [alice, carol] = [(); 2].map(|()| Identity::generate().peer_id());
        brought(tx, Some(&alice), digest(1), 10, Timestamp(1))?;
        brought(tx, Some(&carol), digest(2), 10, Timestamp(2))?;
        brought(tx, Some(&carol), digest(3), 10, NOW)?;
        assert_eq!((in_use(tx, None, None, NOW)?, in_use(tx, None, Some(digest(3)), NOW)?), (10, 0));
        assert_eq!((size_of(tx, None, NOW)?, size_of(tx, Some(&carol), NOW)?), (30, 20));
        assert_eq!(give_up(tx, None, 20, NOW)?, 1);
        assert_eq!((of_owner(tx, &alice), of_owner(tx, &carol)), (vec![], vec![digest(2), digest(3)]));
        assert_eq!(give_up(tx, None, 0, NOW)?, 2);
        assert_eq!(of_owner(tx, &carol), [digest(3)], "what is in use stays");
        Ok(())
    });
}

#[test]
fn an_image_that_never_came_is_not_counted() {
    with_database(|tx| {
        let [alice, carol] = [(); 2].map(|()| Identity::generate().peer_id());
        for owner in [&alice, &carol] {
            brought(tx, Some(owner), digest(1), 10, NOW)?;
        }
        take_back(tx, &alice, digest(1))?;
        assert_eq!((of_owner(tx, &alice), of_owner(tx, &carol)), (vec![], vec![digest(1)]));
        take_back(tx, &carol, digest(1))?;
        assert_eq!(images(tx)?, []);
        Ok(())
    });
}

#[test]
fn v5_a_size_that_was_understated_is_corrected() {
    with_database(|tx| {
        let alice = Identity::generate().peer_id();
        brought(tx, Some(&alice), digest(1), 0, NOW)?;
        weighed(tx, &alice, digest(1), 10, true)?;
        weighed(tx, &alice, digest(1), 5, true)?;
        assert_eq!(in_use(tx, Some(&alice), Some(digest(9)), NOW)?, 10);
        weighed(tx, &alice, digest(1), 20, false)?;
        assert!(of_owner(tx, &alice).is_empty() && images(tx)?[0].owners.is_empty());
        Ok(())
    });
}

#[test]
fn a_pull_that_was_cut_short_remembers_what_was_there_before_it() {
    with_database(|tx| {
        let owner = Identity::generate().peer_id();
        let pull = |present: &[u8]| Pull {
            owner,
            reference: "a.example/b@sha256:00".into(),
            present: present.iter().copied().map(digest).collect(),
        };
        assert_eq!(intend(tx, pull(&[1, 2]))?, pull(&[1, 2]));
        assert_eq!(intend(tx, pull(&[1, 2, 3]))?, pull(&[1, 2]));
        assert_eq!(pulls(tx)?, [pull(&[1, 2])]);
        settled(tx, &pull(&[]))?;
        assert_eq!(intend(tx, pull(&[3]))?, pull(&[3]));
        Ok(())
    });
}

#[test]
fn references_go_with_their_image() {
    with_database(|tx| {
        brought(tx, None, digest(1), 10, NOW)?;
        referred(tx, digest(1), "a@sha256:00")?;
        assert_eq!(references_of(tx, digest(1))?, ["a@sha256:00"]);
        removed(tx, digest(1))?;
        assert_eq!(references_of(tx, digest(1))?, Vec::<String>::new());
        Ok(())
    });
}
