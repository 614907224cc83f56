//! Tests of the reasons for which deployments are held, through a real database.
#![expect(clippy::unwrap_used, reason = "a failing step is a failing test")]

use peer_proto::card::{Card, SignedCard};
use peer_proto::grant::{DeployGrant, Grants};
use peer_proto::identity::Identity;
use peer_proto::limits::{Bounds, ChangeLimits};
use peer_proto::unit::{ByteSize, Millicores};
use peer_state::audit;
use peer_state::database::Database;

use super::*;
use crate::peers::PeerRecord;

const NOW: Timestamp = Timestamp(1_800_000_000_000);

fn database(directory: &tempfile::TempDir) -> Database {
    Database::open(&directory.path().join("db"), &[audit::SCHEMA, crate::SCHEMA]).unwrap()
}

fn peer(tx: &Tx<'_>, hours: Option<Hours>) -> PeerId {
    let identity = Identity::generate();
    let card = SignedCard::sign(&identity, Card::new(&identity, "bob".parse().unwrap(), &[], [0; 32], NOW));
    let grant = DeployGrant::new(Millicores::new(1000).unwrap(), ByteSize::mebibytes(64), 1);
    let grants = Grants { deploy: Some(DeployGrant { hours, ..grant }) };
    peers::put_peer(tx, &PeerRecord::new(&card, "bob".parse().unwrap(), grants, NOW)).unwrap();
    identity.peer_id()
}

/// Hours that hold now, and hours that do not.
fn open_and_closed() -> (Hours, Hours) {
    let minute = minute_of_day(NOW);
    let range = |from: u16, length: u16| {
        let [from, to] = [from, from + length].map(|minute| clock_face(minute % peer_proto::hours::MINUTES_OF_DAY));
        format!("{from}-{to}").parse().unwrap()
    };
    (range(minute, 60), range(minute + 60, 60))
}

#[test]
fn each_subject_is_held_by_itself_and_the_strongest_means_counts() {
    let directory = tempfile::tempdir().unwrap();
    database(&directory)
        .write_blocking(|tx| -> Result<(), DatabaseError> {
            let (bob, other) = (peer(tx, None), peer(tx, None));
            let [one, two] = [0; 2].map(|_| DeploymentId::random());
            let means =
                |owner: &PeerId, id: DeploymentId| of_deployment(tx, owner, id, NOW).unwrap().map(|hold| hold.means);
            assert_eq!(means(&bob, one), None);
            set(tx, &Subject::Deployment(one), &Pause { means: Means::Freeze, since: NOW })?;
            assert_eq!([means(&bob, one), means(&bob, two)], [Some(Means::Freeze), None]);
            assert_eq!(of_owner(tx, &bob, NOW)?, None, "a new one may run");
            set(tx, &Subject::Peer(bob), &Pause { means: Means::Stop, since: NOW })?;
            assert_eq!([means(&bob, one), means(&bob, two)], [Some(Means::Stop); 2]);
            assert_eq!((of_owner(tx, &other, NOW)?, means(&other, two)), (None, None));
            set(tx, &Subject::Machine, &Pause { means: Means::Freeze, since: NOW })?;
            assert_eq!(of_owner(tx, &other, NOW)?.unwrap().problem.code, Code::Paused);
            assert_eq!(all(tx)?.len(), 3);
            for subject in [Subject::Machine, Subject::Peer(bob), Subject::Deployment(one)] {
                assert!(clear(tx, &subject)?);
                assert!(!clear(tx, &subject)?);
            }
            assert_eq!(means(&bob, one), None);
            Ok(())
        })
        .unwrap();
}

#[test]
fn outside_of_its_hours_nothing_runs() {
    let directory = tempfile::tempdir().unwrap();
    let (open, closed) = open_and_closed();
    database(&directory)
        .write_blocking(|tx| -> Result<(), DatabaseError> {
            let [always, night, day] = [None, Some(closed.clone()), Some(open.clone())].map(|hours| peer(tx, hours));
            assert_eq!(of_owner(tx, &always, NOW)?, None);
            assert_eq!(of_owner(tx, &day, NOW)?, None);
            let hold = of_owner(tx, &night, NOW)?.unwrap();
            assert_eq!((hold.means, hold.problem.code), (Means::Freeze, Code::Paused));
            assert!(hold.problem.message.contains(&closed.to_string()), "{}", hold.problem);
            let machine =
                ChangeLimits { set: Bounds { hours: Some(closed), ..Bounds::default() }, ..ChangeLimits::default() };
            limits::change(tx, &machine, NOW)?;
            assert!(of_owner(tx, &day, NOW)?.is_some() && of_owner(tx, &always, NOW)?.is_some());
            Ok(())
        })
        .unwrap();
}

#[test]
fn pauses_survive_a_restart_and_are_never_misread() {
    let directory = tempfile::tempdir().unwrap();
    let pause = Pause { means: Means::Kill, since: NOW };
    database(&directory).write_blocking(|tx| set(tx, &Subject::Machine, &pause)).unwrap();
    assert_eq!(database(&directory).write_blocking(|tx| find(tx, &Subject::Machine)).unwrap(), Some(pause));
    let damage = |tx: &Tx<'_>| tx.execute("UPDATE pause SET pause = x'00'", []).map_err(DatabaseError::from);
    database(&directory).write_blocking(damage).unwrap();
    let bob = Identity::generate().peer_id();
    assert!(database(&directory).write_blocking(|tx| of_owner(tx, &bob, NOW)).is_err(), "damage opens nothing");
}
