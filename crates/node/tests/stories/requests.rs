//! Forged, copied and late requests, sent with a trusted peer's real key by a client that breaks the rules.

use peer_proto::code::Code;
use peer_proto::deploy::{DeployRequest, Event, ImageOffer, ImageSource, Request, Specification};
use peer_proto::identity::Identity;
use peer_proto::query::{Answer, Query};
use xtask::image::Image;

use crate::world::{Machine, Pair, Wire, eventually, hello};

const MINUTE: i64 = 60_000;

/// A request to deploy this image.
pub(crate) fn deploy(name: &str, image: &Image) -> Request {
    let text = format!(
        r#"{{"name":"{name}","image_name":"hello:test","publish":false,"restart":"no","stop_timeout_seconds":1,
            "limits":{{"cpu":100,"memory":67108864,"pids":100,"files":1024,"scratch":1048576}}}}"#
    );
    let specification: Specification = serde_json::from_str(&text).unwrap();
    let layer_sizes = image.layers.iter().map(|(_, tar)| tar.len() as u64).collect();
    let offer = ImageOffer { configuration: image.config.clone(), layer_sizes };
    Request::Deploy(Box::new(DeployRequest { specification, image: ImageSource::Offered(offer) }))
}

pub(crate) fn names(wire: &Wire, at: &Machine) -> Vec<String> {
    let Answer::List(statuses) = wire.query(at, Query::List) else { panic!("not a list") };
    statuses.iter().map(|status| status.specification.name.to_string()).collect()
}

/// Alice without her daemon: a client with her key, and bob.
fn forger() -> (Pair, Wire) {
    // As many requests as a test sends; what a peer may send else is another test's.
    let mut pair = Pair::on(Machine::with("bob", &["--max-requests-per-peer", "60000"]), &[]);
    pair.alice.kill();
    let wire = Wire::of(&pair.alice, &[&pair.bob]);
    (pair, wire)
}

#[test]
fn v3_a_copy_never_acts_twice() {
    let (mut pair, wire) = forger();
    let image = hello();
    let request = wire.seal(&pair.bob, deploy("web", &image), 0);
    let mut first = wire.begin(&pair.bob, &request.bytes);
    assert!(matches!(first.next(), Some(Event::Accepted(_))));
    let refusal = wire.refused(&pair.bob, &request.bytes);
    assert_eq!(refusal.problem.code, Code::DuplicateRequest);
    assert!(refusal.outcome.is_some(), "its signer learns what became of it");
    assert!(pair.bob.has_audited("V3"));
    assert_eq!(names(&wire, &pair.bob), ["web"]);

    let early = wire.seal(&pair.bob, deploy("early", &image), 0);
    pair.bob.kill();
    pair.bob.up();
    let wire = Wire::of(&pair.alice, &[&pair.bob]);
    assert_eq!(wire.refused(&pair.bob, &request.bytes).problem.code, Code::DuplicateRequest);
    // A request that was made for the earlier run and never arrived there does not act in this one.
    assert_eq!(wire.refused(&pair.bob, &early.bytes).problem.code, Code::StaleIncarnation);
    assert_eq!(names(&wire, &pair.bob), ["web"]);
}

#[test]
fn v3_a_removed_deployment_does_not_come_back_by_a_copy() {
    let (pair, wire) = forger();
    let request = wire.seal(&pair.bob, deploy("web", &hello()), 0);
    let mut first = wire.begin(&pair.bob, &request.bytes);
    let Some(Event::Accepted(id)) = first.next() else { panic!("it was not accepted") };
    let removal = wire.seal(&pair.bob, Request::Remove(id), 0);
    assert_eq!(wire.send(&pair.bob, &removal.bytes).last(), Some(&Event::Removed(id)));
    assert_eq!(wire.outcome(&pair.bob, &request.bytes), Some(Code::DuplicateRequest));
    assert!(names(&wire, &pair.bob).is_empty());
}

#[test]
fn a_deployment_that_was_stopped_before_it_ran_gives_up_its_name() {
    let (pair, wire) = forger();
    let request = wire.seal(&pair.bob, deploy("web", &hello()), 0);
    let mut first = wire.begin(&pair.bob, &request.bytes);
    let Some(Event::Accepted(id)) = first.next() else { panic!("it was not accepted") };
    let again = wire.seal(&pair.bob, deploy("web", &hello()), 0);
    assert_eq!(wire.outcome(&pair.bob, &again.bytes), Some(Code::NameTaken), "its image is still awaited");
    let stop = wire.seal(&pair.bob, Request::Stop(id), 0);
    assert!(matches!(wire.send(&pair.bob, &stop.bytes).last(), Some(Event::Done(_))));
    let again = wire.seal(&pair.bob, deploy("web", &hello()), 0);
    let Some(Event::Accepted(other)) = wire.begin(&pair.bob, &again.bytes).next() else { panic!("the name is taken") };
    assert_ne!(id, other);
    assert_eq!(names(&wire, &pair.bob), ["web"]);
}

#[test]
fn v3_racing_copies_run_once() {
    let (pair, wire) = forger();
    for round in 0..3 {
        let request = wire.seal(&pair.bob, deploy(&format!("web{round}"), &hello()), 0);
        let mut answers: Vec<_> = (0..4).map(|_| wire.begin(&pair.bob, &request.bytes)).collect();
        let first: Vec<_> = answers.iter_mut().map(|answer| answer.next().unwrap()).collect();
        let accepted = first.iter().filter(|event| matches!(event, Event::Accepted(_))).count();
        let repeated = first
            .iter()
            .filter(|event| matches!(event, Event::Failed(refusal) if refusal.problem.code == Code::DuplicateRequest));
        assert_eq!((accepted, repeated.count()), (1, 3), "{first:?}");
    }
    assert_eq!(names(&wire, &pair.bob).len(), 3);
}

#[test]
fn v3_a_request_for_another_machine_is_refused() {
    let (pair, _) = forger();
    let carol = Machine::start("carol");
    let mut pair = pair;
    pair.alice.up();
    pair.alice.join(&carol, &[]);
    pair.alice.kill();
    let wire = Wire::of(&pair.alice, &[&pair.bob, &carol]);
    let request = wire.seal(&pair.bob, deploy("web", &hello()), 0);
    assert_eq!(wire.outcome(&carol, &request.bytes), Some(Code::WrongAudience));
    assert!(carol.has_audited("V3"));
    assert!(names(&wire, &carol).is_empty());
}

#[test]
fn v3_a_wrong_clock_is_refused_and_named() {
    let (pair, wire) = forger();
    for (minutes, direction) in [(6, "ahead of"), (-6, "behind"), (600, "ahead of"), (-600, "behind")] {
        let request = wire.seal(&pair.bob, deploy("web", &hello()), minutes * MINUTE);
        let refusal = wire.refused(&pair.bob, &request.bytes);
        assert_eq!(refusal.problem.code, Code::ClockDrift);
        let sentence = &refusal.problem.message;
        assert!(sentence.contains("the requester's clock") && sentence.contains(direction), "{sentence}");
        assert!(refusal.clock.0 > 0, "the provider tells its own clock");
    }
    assert!(names(&wire, &pair.bob).is_empty());
    for minutes in [4, -4] {
        let request = wire.seal(&pair.bob, deploy(&format!("web{}", minutes + 4), &hello()), minutes * MINUTE);
        let mut answer = wire.begin(&pair.bob, &request.bytes);
        assert!(matches!(answer.next(), Some(Event::Accepted(_))), "{minutes} minutes are allowed");
    }
}

#[test]
fn v2_every_changed_byte_is_refused() {
    let (pair, wire) = forger();
    let request = wire.seal(&pair.bob, deploy("web", &hello()), 0);
    let mut first = wire.begin(&pair.bob, &request.bytes);
    let Some(Event::Accepted(id)) = first.next() else { panic!("it was not accepted") };
    let removal = wire.seal(&pair.bob, Request::Remove(id), 0);
    for position in 0..removal.bytes.len() {
        let mut spoiled = removal.bytes.clone();
        spoiled[position] ^= 1 << (position % 8);
        // Bytes that are no envelope at all are not answered.
        assert_ne!(wire.outcome(&pair.bob, &spoiled), Some(Code::NoSuchDeployment), "byte {position} acted");
    }
    for cut in [0, 1, removal.bytes.len() / 2, removal.bytes.len() - 1] {
        assert_eq!(wire.outcome(&pair.bob, &removal.bytes[..cut]), None);
    }
    let mut longer = removal.bytes.clone();
    longer.push(0);
    assert_eq!(wire.outcome(&pair.bob, &longer), None);
    assert_eq!(names(&wire, &pair.bob), ["web"]);
    assert!(pair.bob.has_audited("V2"));
    // The sound one still acts: none of the spoiled ones counted as its first copy.
    assert_eq!(wire.send(&pair.bob, &removal.bytes).last(), Some(&Event::Removed(id)));
}

#[test]
fn v2_a_request_signed_by_another_is_refused() {
    let (pair, wire) = forger();
    let mut mallory = Machine::without_engine("mallory");
    mallory.join(&pair.bob, &[]);
    mallory.kill();
    let forger = Wire::of(&mallory, &[&pair.bob]);
    let request = wire.seal(&pair.bob, deploy("web", &hello()), 0);
    assert_eq!(forger.outcome(&pair.bob, &request.bytes), Some(Code::WrongSigner));
    assert!(pair.bob.has_audited("V2"));
    assert!(names(&wire, &pair.bob).is_empty() && names(&forger, &pair.bob).is_empty());
}

#[test]
fn v1_i3_an_untrusted_peer_is_refused_before_any_protocol() {
    let bob = Machine::without_engine("bob");
    let stranger = Wire::with(Identity::generate(), &[&bob]);
    for protocol in [peer_node::protocols::CONTROL, peer_node::protocols::JOIN, peer_node::protocols::TUNNEL] {
        assert!(stranger.open(&bob, protocol).is_err());
    }
    let audited = eventually("the refusal is audited", || {
        bob.audit().into_iter().find(|line| line["threat"] == "V1" && line["outcome"] == "refused")
    });
    assert!(audited["detail"].as_str().unwrap().contains(&stranger.identity.peer_id().to_string()), "{audited}");
    assert_eq!(bob.json(&["status"])["peers_connected"], 0);
}

#[test]
fn v1_i3_a_removed_peer_cannot_use_its_envelope() {
    let (pair, wire) = forger();
    let request = wire.seal(&pair.bob, deploy("web", &hello()), 0);
    pair.bob.ctl(&["peers", "remove", "alice"]);
    assert!(wire.open(&pair.bob, peer_node::protocols::CONTROL).is_err());
    // Even in the hands of a friend it is nobody's request.
    let mut carol = Machine::without_engine("carol");
    carol.join(&pair.bob, &[]);
    carol.kill();
    let other = Wire::of(&carol, &[&pair.bob]);
    assert_eq!(other.outcome(&pair.bob, &request.bytes), Some(Code::WrongSigner));
    assert_eq!(pair.bob.json(&["ps", "--hosted", "--all"])["deployments"], serde_json::json!([]));
}
