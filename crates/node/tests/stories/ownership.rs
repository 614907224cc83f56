//! Two friends on one provider: neither can read, touch, or tell the existence of what the other has (G4, M5).

use peer_node::protocols::{FORWARD, LOGS};
use peer_proto::deploy::{Event, Request};
use peer_proto::id::DeploymentId;
use peer_proto::query::{Answer, ForwardHeader, LogFrame, LogsQuery, Query, StreamReply};
use peer_proto::unit::Port;

use crate::world::{Files, Machine, Pair, Wire, eventually, hello};

/// Alice's deployment `secret` and carol's deployment `mine`, both on bob.
struct Friends {
    pair: Pair,
    carol: Machine,
    secret: String,
    mine: String,
}

fn friends() -> Friends {
    let pair = Pair::start();
    let carol = Machine::without_engine("carol");
    carol.join(&pair.bob, &[]);
    let secret = pair.hello("secret", &["--expose", "8080", "--no-publish", "--cpu", "0.2", "-e", "GREETING=hush"]);
    let flags = ["--expose", "8080", "--no-publish", "--cpu", "0.2"];
    let mine = carol.deploy_to("bob", &Files::new().write(&hello()), "mine", &flags);
    Friends { pair, carol, secret, mine }
}

/// An id of the same form that nobody has.
fn absent() -> String {
    DeploymentId::random().to_string()
}

#[test]
fn g4_every_verb_answers_alike_for_a_foreign_and_an_absent_deployment() {
    let friends = friends();
    let carol = &friends.carol;
    let verbs: [&[&str]; 9] = [
        &["status"],
        &["inspect"],
        &["logs"],
        &["stats", "--no-stream"],
        &["stop"],
        &["start"],
        &["restart"],
        &["rm", "--force"],
        &["port-forward"],
    ];
    let absent = absent();
    let pairs = [(&*friends.secret, &*absent), (&friends.secret[..8], &absent[..8]), ("secret", "nobody")];
    for verb in verbs {
        for (foreign, none) in pairs {
            let answer = |reference: &str| {
                let mut arguments = [verb, &[reference]].concat();
                if verb == ["port-forward"] {
                    arguments.push("0:8080");
                }
                let output = carol.try_ctl(&arguments);
                (output.status, output.stdout, output.stderr.replace(reference, "REFERENCE"))
            };
            let told = answer(foreign);
            assert_eq!(told, answer(none), "{verb:?} {foreign}");
            assert!(told.2.contains("no_such_deployment") && told.0 == 3, "{verb:?}: {told:?}");
        }
        let own = carol.try_ctl(&[verb, &["mine"]].concat());
        assert!(verb == ["port-forward"] || verb == ["rm", "--force"] || own.status == 0, "{verb:?}: {own:?}");
        if verb == ["stop"] {
            assert_eq!(friends.pair.alice.state("secret"), "running");
        }
    }
    let listed = carol.ctl(&["ps", "--all", "--json"]).stdout;
    assert!(!listed.contains(&friends.secret) && !listed.contains("hush"), "{listed}");
    assert_eq!(friends.pair.alice.state("secret"), "running");
    assert_eq!(friends.pair.alice.forward("secret", 8080).get("/").status, 200);
}

#[test]
fn g4_every_protocol_answers_alike_for_a_foreign_and_an_absent_deployment() {
    let mut friends = friends();
    friends.carol.kill();
    let wire = Wire::of(&friends.carol, &[&friends.pair.bob]);
    let bob = &friends.pair.bob;
    let [foreign, own, none] =
        [&friends.secret, &friends.mine, &absent()].map(|id| id.parse::<DeploymentId>().unwrap());
    for request in [Request::Stop, Request::Start, Request::Restart, Request::Remove] {
        let answer = |id| {
            let sealed = wire.seal(bob, request(id), 0);
            let refusal = wire.refused(bob, &sealed.bytes);
            (refusal.problem, refusal.outcome)
        };
        assert_eq!(answer(foreign), answer(none));
    }
    for query in [Query::Inspect, Query::Stats] {
        let told = wire.query(bob, query(foreign));
        assert!(matches!(told, Answer::Problem(_)));
        assert_eq!(told, wire.query(bob, query(none)));
        assert!(!matches!(wire.query(bob, query(own)), Answer::Problem(_)));
    }
    let logs = |deployment| {
        let query = LogsQuery { deployment, tail: None, since: None, follow: false };
        wire.exchange::<_, LogFrame>(bob, LOGS, &query).unwrap()
    };
    assert!(matches!(logs(foreign), LogFrame::Problem(_)));
    assert_eq!(logs(foreign), logs(none));
    assert!(!matches!(logs(own), LogFrame::Problem(_)));
    let forward = |deployment| {
        let header = ForwardHeader { deployment, port: Port::new(8080).unwrap() };
        wire.exchange::<_, StreamReply>(bob, FORWARD, &header).unwrap()
    };
    assert!(matches!(forward(foreign), StreamReply::Refused(_)));
    assert_eq!(forward(foreign), forward(none));
    assert_eq!(forward(own), StreamReply::Open);

    let stop = wire.seal(bob, Request::Stop(own), 0);
    assert!(matches!(wire.send(bob, &stop.bytes).last(), Some(Event::Done(_))));
    assert!(bob.has_audited("G4"));
    assert_eq!(friends.pair.alice.state("secret"), "running");
}

#[test]
fn names_ids_and_beginnings_lead_to_ones_own_deployment() {
    let friends = friends();
    let carol = &friends.carol;
    for reference in [&*friends.mine, &friends.mine[..6], "mine"] {
        assert_eq!(carol.json(&["inspect", reference])["id"], friends.mine.as_str());
    }
    carol.try_ctl(&["status", &friends.mine[..3]]).refused("no_such_deployment", 3);
    // Two machines may have one of the same name; then the peer tells them apart.
    let dave = Machine::start("dave");
    carol.join(&dave, &[]);
    let other = carol.deploy_to("dave", &Files::new().write(&hello()), "mine", &[]);
    carol.try_ctl(&["status", "mine"]).refused("ambiguous", 2);
    assert_eq!(carol.json(&["status", "mine", "--peer", "dave"])["id"], other.as_str());
    eventually("both are listed", || (carol.json(&["ps"])["deployments"].as_array()?.len() == 2).then_some(()));
}
