//! Tests of the decision, through a real database.
#![expect(clippy::unwrap_used, reason = "a failing step is a failing test")]

use std::time::Duration;

use peer_proto::card::{Card, SignedCard};
use peer_proto::deploy::{DeployRequest, ImageOffer, ImageSource, Request, Specification};
use peer_proto::envelope;
use peer_proto::grant::Grants;
use peer_proto::id::{DeploymentId, Incarnation, RequestId};
use peer_proto::identity::Identity;
use peer_proto::unit::{ByteSize, Millicores};
use peer_state::database::Database;

use super::*;
use crate::trust::{Repeated, Trust};

const NOW: Timestamp = Timestamp(1_800_000_000_000);
const RUN: Incarnation = Incarnation([5; 16]);

struct World {
    _directory: tempfile::TempDir,
    database: Database,
    trust: Trust,
    alice: Identity,
    bob: Identity,
}

fn grants(expires_at: Option<Timestamp>) -> Grants {
    let (max_cpu, max_memory) = (Millicores::new(2000).unwrap(), ByteSize::mebibytes(512));
    Grants { deploy: Some(DeployGrant { expires_at, ..DeployGrant::new(max_cpu, max_memory, 2) }) }
}

async fn world(grants: Grants) -> World {
    let directory = tempfile::tempdir().unwrap();
    let database = Database::open(&directory.path().join("db"), &[peer_state::audit::SCHEMA, crate::SCHEMA]).unwrap();
    let trust = Trust::open(database.clone()).unwrap();
    let (alice, bob) = (Identity::generate(), Identity::generate());
    let card = SignedCard::sign(&alice, Card::new(&alice, "alice".parse().unwrap(), &[], [0; 32], NOW));
    trust.add(card, None, grants, Repeated::Refused, NOW).await.unwrap();
    World { _directory: directory, database, trust, alice, bob }
}

impl World {
    fn request(&self, body: Request) -> Signed {
        self.request_with(body, RequestId::random(), RUN)
    }

    fn request_with(&self, body: Request, id: RequestId, run: Incarnation) -> Signed {
        let bytes = envelope::seal(&self.alice, self.bob.peer_id(), run, id, NOW, body).bytes;
        envelope::open(&bytes, &self.alice.peer_id(), &self.bob.peer_id(), NOW).unwrap()
    }

    fn decide(&self, request: Signed, held: Held, share: Option<&Share>) -> Result<(), Refusal> {
        self.decide_at(NOW, request, held, share)
    }

    fn decide_at(&self, now: Timestamp, request: Signed, held: Held, share: Option<&Share>) -> Result<(), Refusal> {
        self.database
            .write_blocking(|tx| {
                let moment = Moment { now, incarnation: RUN, elapsed: Duration::ZERO };
                authorise(tx, request, moment, held, share, &Refused::default()).map(|decision| decision.map(|_| ()))
            })
            .unwrap()
    }

    fn last_audit(&self) -> peer_proto::control::AuditLine {
        self.database.write_blocking(|tx| audit::newest(tx, 1)).unwrap().remove(0)
    }
}

fn share() -> Share {
    Share::more(Specification::plain("web".parse().unwrap(), "web:1"))
}

fn start() -> Request {
    Request::Start(DeploymentId([1; 16]))
}

#[tokio::test]
async fn granted_request_is_allowed_and_audited() {
    let world = world(grants(None)).await;
    assert_eq!(world.decide(world.request(start()), Held::default(), Some(&share())), Ok(()));
    assert_eq!((world.last_audit().action.as_str(), world.last_audit().outcome.as_str()), ("start", "allowed"));
}

/// What trust and grant keep out: with both, the very request acts that is refused without one of them.
#[tokio::test]
async fn control_g4_i3_with_trust_and_grant_the_same_request_acts() {
    let without = world(Grants::default()).await;
    let alice = without.alice.peer_id();
    assert_eq!(without.decide(without.request(start()), Held::default(), None).unwrap_err().threat, Threat::G4);
    without.trust.update(alice, None, Some(grants(None)), None, NOW, |_| Ok(((), String::new()))).await.unwrap();
    assert_eq!(without.decide(without.request(start()), Held::default(), None), Ok(()));
}

#[tokio::test]
async fn i3_untrusted_peer_and_g4_missing_grant_are_refused() {
    let without = world(Grants::default()).await;
    let refusal = without.decide(without.request(start()), Held::default(), None).unwrap_err();
    assert_eq!((refusal.problem.code, refusal.threat), (Code::NotGranted, Threat::G4));
    assert_eq!(without.last_audit().threat.as_deref(), Some("G4"));
    // Cleaning up needs trust alone.
    let stop = Request::Stop(DeploymentId([1; 16]));
    assert_eq!(without.decide(without.request(stop.clone()), Held::default(), None), Ok(()));
    without.trust.remove(without.alice.peer_id(), NOW, |_| Ok(((), String::new()))).await.unwrap();
    let refusal = without.decide(without.request(stop), Held::default(), None).unwrap_err();
    assert_eq!((refusal.problem.code, refusal.threat), (Code::UntrustedPeer, Threat::I3));
}

#[tokio::test]
async fn v3_clock_that_went_back_refuses_before_anything_else() {
    let world = world(grants(None)).await;
    let request = world.request(start());
    assert_eq!(world.decide_at(NOW.plus(3_600_000), request, Held::default(), None), Ok(()));
    let id = RequestId::random();
    let refusal = world.decide(world.request_with(start(), id, RUN), Held::default(), None).unwrap_err();
    assert_eq!((refusal.problem.code, refusal.threat), (Code::ClockBehind, Threat::V3));
    assert!(world.last_audit().detail.contains("1 hour"), "{:?}", world.last_audit());
    // It is not held against the request: once the clock is right, it acts.
    world.database.write_blocking(|tx| crate::floor::accept(tx, NOW)).unwrap();
    assert_eq!(world.decide(world.request_with(start(), id, RUN), Held::default(), None), Ok(()));
}

#[tokio::test]
async fn audit_line_names_the_deployment_and_never_its_environment() {
    let world = world(grants(None)).await;
    let specification = Specification {
        environment: vec!["TOKEN=hidden".parse().unwrap()],
        ..Specification::plain("web".parse().unwrap(), "web:1")
    };
    let offer = ImageOffer { configuration: b"{}".to_vec(), layer_sizes: Vec::new() };
    let (digest, request) = (offer.digest(), RequestId::random());
    let deploy = DeployRequest { specification, image: ImageSource::Offered(offer) };
    let signed = world.request_with(Request::Deploy(Box::new(deploy)), request, RUN);
    world.decide(signed, Held::default(), None).unwrap();
    let detail = world.last_audit().detail;
    let derived = DeploymentId::derive(&world.alice.peer_id(), &request);
    for part in [derived.to_string(), digest.to_string(), "'web'".into(), "memory=256 MiB".into()] {
        assert!(detail.contains(&part), "{part}: {detail}");
    }
    assert!(!detail.contains("TOKEN") && !detail.contains("hidden"), "{detail}");
    let id = DeploymentId([7; 16]);
    world.decide(world.request(Request::Stop(id)), Held::default(), None).unwrap();
    assert!(world.last_audit().detail.contains(&id.to_string()), "{:?}", world.last_audit());
}

#[tokio::test]
async fn grant_expires_by_itself() {
    let world = world(grants(Some(NOW.plus(10)))).await;
    assert_eq!(world.decide_at(NOW.plus(9), world.request(start()), Held::default(), None), Ok(()));
    let refusal = world.decide_at(NOW.plus(10), world.request(start()), Held::default(), None).unwrap_err();
    assert_eq!(refusal.problem.code, Code::NotGranted);
}

#[tokio::test]
async fn v5_limits_of_the_grant_hold_for_the_sum() {
    let world = world(grants(None)).await;
    let share = share();
    let cases = [
        (Held { cpu: 1500, memory: 256 << 20, containers: 1 }, None),
        (Held { cpu: 1501, memory: 0, containers: 0 }, Some("cpu")),
        (Held { cpu: 0, memory: (256 << 20) + 1, containers: 0 }, Some("memory")),
        (Held { cpu: 0, memory: 0, containers: 2 }, Some("at most 2")),
        (Held { cpu: u64::MAX, memory: u64::MAX, containers: u32::MAX }, Some("cpu")),
    ];
    for (held, expected) in cases {
        let decision = world.decide(world.request(start()), held, Some(&share));
        match expected {
            None => assert_eq!(decision, Ok(())),
            Some(field) => {
                let refusal = decision.unwrap_err();
                assert_eq!((refusal.problem.code, refusal.threat), (Code::OverLimit, Threat::V5));
                assert!(refusal.problem.message.contains(field), "{refusal}");
            }
        }
    }
}

#[tokio::test]
async fn v3_repetition_is_refused_with_its_outcome_even_after_a_restart() {
    let world = world(grants(None)).await;
    let id = RequestId::random();
    assert_eq!(world.decide(world.request_with(start(), id, RUN), Held::default(), None), Ok(()));
    let signer = world.alice.peer_id();
    world.database.write_blocking(|tx| replay::record_outcome(tx, &signer, &id, "running")).unwrap();
    // The repetition bears another body and an earlier run; its id alone condemns it, and its signer learns what came of it.
    let other_run = Incarnation([6; 16]);
    for run in [RUN, other_run] {
        let again = world.request_with(Request::Stop(DeploymentId([9; 16])), id, run);
        let refusal = world.decide(again, Held::default(), None).unwrap_err();
        assert_eq!((refusal.problem.code, refusal.threat), (Code::DuplicateRequest, Threat::V3));
        assert_eq!(refusal.outcome.as_deref(), Some("running"));
    }
    let stale = world.request_with(start(), RequestId::random(), other_run);
    assert_eq!(world.decide(stale, Held::default(), None).unwrap_err().problem.code, Code::StaleIncarnation);
}

#[tokio::test]
async fn g4_what_ran_goes_on_by_a_live_grant_alone() {
    let expiring = world(grants(Some(NOW.plus(1_000)))).await;
    let alice = expiring.alice.peer_id();
    let specification = Specification::plain("web".parse().unwrap(), "web:1");
    let goes_on = |world: &World, owner: PeerId, now: Timestamp, held: Held| {
        let decide = |tx: &Tx<'_>| may_go_on(tx, &owner, now, held, &specification);
        world.database.write_blocking(decide).unwrap().map_err(|refusal| refusal.threat)
    };
    let none = Held::default();
    assert_eq!(goes_on(&expiring, alice, NOW, none), Ok(()));
    assert_eq!(goes_on(&expiring, alice, NOW.plus(2_000), none), Err(Threat::G4), "the grant has ended");
    let full = Held { containers: 2, ..none };
    assert_eq!(goes_on(&expiring, alice, NOW, full), Err(Threat::V5), "it covers no third");
    let without = world(Grants::default()).await;
    assert_eq!(goes_on(&without, without.alice.peer_id(), NOW, none), Err(Threat::G4), "there is none");
    let stranger = Identity::generate().peer_id();
    assert_eq!(goes_on(&without, stranger, NOW, none), Ok(()), "kept on purpose of one who is no peer any more");
}

/// A request is forgotten ten minutes after its end, not earlier, and then only by both clocks.
#[tokio::test]
async fn v3_a_request_is_remembered_to_the_end_of_its_time() {
    let world = world(grants(None)).await;
    let request = || {
        let bytes = envelope::seal(&world.alice, world.bob.peer_id(), RUN, RequestId([7; 16]), NOW, start()).bytes;
        envelope::open(&bytes, &world.alice.peer_id(), &world.bob.peer_id(), NOW).unwrap()
    };
    let end = request().not_after().plus(2 * 5 * 60_000);
    let moment = |now: Timestamp| Moment { now, incarnation: RUN, elapsed: Duration::from_millis(now.since(NOW)) };
    let held = || world.database.write_blocking(replay::remembered).unwrap();
    world.database.write_blocking(|tx| replay::remember(tx, &request(), moment(NOW), "accepted")).unwrap();
    assert_eq!(held(), 1);
    let another = world.request(start());
    for (now, left) in [(end, 1), (end.plus(1), 0)] {
        world.database.write_blocking(|tx| replay::look_up(tx, &another, moment(now), 10).map(|_| ())).unwrap();
        assert_eq!(held(), left, "{now:?}");
    }
}

/// What the memory of requests keeps out: where it is empty, the same bytes act once more.
#[tokio::test]
async fn control_v3_without_the_memory_a_copy_acts_again() {
    let first = world(grants(None)).await;
    let (alice, bob) = (first.alice.clone(), first.bob.clone());
    let bytes = envelope::seal(&alice, bob.peer_id(), RUN, RequestId::random(), NOW, start()).bytes;
    let copy = || envelope::open(&bytes, &alice.peer_id(), &bob.peer_id(), NOW).unwrap();
    assert_eq!(first.decide(copy(), Held::default(), None), Ok(()));
    assert_eq!(first.decide(copy(), Held::default(), None).unwrap_err().threat, Threat::V3);
    // The same run and the same trust list on a fresh database.
    let directory = tempfile::tempdir().unwrap();
    let database = Database::open(&directory.path().join("db"), &[peer_state::audit::SCHEMA, crate::SCHEMA]).unwrap();
    let trust = Trust::open(database.clone()).unwrap();
    let card = SignedCard::sign(&alice, Card::new(&alice, "alice".parse().unwrap(), &[], [0; 32], NOW));
    trust.add(card, None, grants(None), Repeated::Refused, NOW).await.unwrap();
    let forgetful = World { _directory: directory, database, trust, alice: alice.clone(), bob: bob.clone() };
    assert_eq!(forgetful.decide(copy(), Held::default(), None), Ok(()));
}

#[tokio::test]
async fn v3_refused_request_stays_refused_when_room_appears() {
    let world = world(grants(None)).await;
    let full = Held { cpu: 2000, ..Held::default() };
    let id = RequestId::random();
    let share = share();
    let first = world.decide(world.request_with(start(), id, RUN), full, Some(&share)).unwrap_err();
    assert_eq!(first.problem.code, Code::OverLimit);
    let again = world.decide(world.request_with(start(), id, RUN), Held::default(), Some(&share)).unwrap_err();
    assert_eq!((again.problem.code, again.outcome.as_deref()), (Code::DuplicateRequest, Some("over_limit")));
}

#[tokio::test]
async fn v3_full_memory_of_requests_refuses_and_ended_ones_are_cleared() {
    let world = world(grants(None)).await;
    let look_after = |now, elapsed, limit| {
        let request = world.request(start());
        let moment = Moment { now, incarnation: RUN, elapsed };
        world.database.write_blocking(|tx| replay::look_up(tx, &request, moment, limit)).unwrap()
    };
    let look = |now, limit| look_after(now, Duration::ZERO, limit);
    for _ in 0..3 {
        world.decide(world.request(start()), Held::default(), None).unwrap();
    }
    assert_eq!(look(NOW, 3), Known::Full);
    assert_eq!(look(NOW, 4), Known::New);
    let long_after = NOW.plus(24 * 3_600_000);
    assert_eq!(look(long_after, 3), Known::Full, "the wall clock alone makes nothing forgotten");
    assert_eq!(look_after(NOW, Duration::from_hours(24), 3), Known::Full, "nor does the monotonic clock alone");
    assert_eq!(look_after(long_after, Duration::from_hours(24), 3), Known::New);
    assert_eq!(world.database.write_blocking(replay::remembered).unwrap(), 0);
}

#[tokio::test]
async fn v5_a_flood_of_refused_requests_is_one_line_and_a_count() {
    let world = world(Grants::default()).await;
    let refused = Refused::default();
    let lines = || world.database.write_blocking(|tx| audit::newest(tx, 1000)).unwrap().len();
    let before = lines();
    for _ in 0..50 {
        let request = world.request(start());
        let decided = world.database.write_blocking(|tx| {
            let moment = Moment { now: NOW, incarnation: RUN, elapsed: Duration::ZERO };
            authorise(tx, request, moment, Held::default(), None, &refused).map(|decision| decision.is_err())
        });
        assert!(decided.unwrap());
    }
    assert_eq!(lines() - before, 1, "the first is told at once");
    let rest = refused.rest(NOW);
    assert_eq!((rest.len(), rest[0].outcome), (1, Outcome::Refused(Threat::G4)));
    assert!(rest[0].detail.contains("49 more"), "{}", rest[0].detail);
    assert_eq!(rest[0].actor, world.alice.peer_id().to_string());
}
