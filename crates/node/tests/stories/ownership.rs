//! Two friends on one provider: neither can read, touch, or tell the existence of what the other has (G4, M5).

use std::collections::BTreeSet;

use peer_node::protocols::{FORWARD, LOGS};
use peer_proto::code::Code;
use peer_proto::deploy::{Event, LayerReply, Refusal, Request};
use peer_proto::frame::encode;
use peer_proto::id::{DeploymentId, RequestHash};
use peer_proto::query::{ForwardHeader, LogFrame, LogsQuery, Query, StreamReply};
use peer_proto::unit::{Port, Timestamp};

use crate::replay::number_of;
use crate::requests::deploy;
use crate::world::{Files, Machine, Pair, Wire, eventually, hello, key_of};

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

/// Commands about one deployment, with what else they need.
const COMMANDS: [&[&str]; 11] = [
    &["status"],
    &["inspect"],
    &["logs"],
    &["stats", "--no-stream"],
    &["stop"],
    &["start"],
    &["restart"],
    &["port-forward"],
    &["pause"],
    &["resume"],
    &["rm", "--force"],
];

/// Whether the command is for the owner of the machine that runs the deployment, and not for the deployment's.
fn is_hosts(command: &[&str]) -> bool {
    ["pause", "resume"].contains(&command[0])
}

/// The commands that take a deployment, as the program itself tells them.
fn commands_about_deployments(machine: &Machine) -> BTreeSet<String> {
    let reference = machine.ctl(&["markdown"]).stdout;
    let usages = reference.lines().filter_map(|line| line.strip_prefix("Usage: peerctl "));
    let about = usages.filter(|usage| usage.contains("DEPLOYMENT"));
    about.map(|usage| usage.split([' ', '[', '<']).next().unwrap().to_owned()).collect()
}

#[test]
fn g4_every_command_answers_alike_for_a_foreign_and_an_absent_deployment() {
    let Friends { pair, carol, secret, mine } = friends();
    let known: BTreeSet<_> = COMMANDS.iter().map(|command| command[0].to_owned()).collect();
    assert_eq!(commands_about_deployments(&carol), known, "a command about deployments is not tried below");
    for (friend, other, foreign, name) in
        [(&carol, &pair.alice, &secret, "secret"), (&pair.alice, &carol, &mine, "mine")]
    {
        let absent = absent();
        let references = [(&**foreign, &*absent), (&foreign[..8], &absent[..8]), (name, "nobody")];
        for (command, (foreign, none)) in COMMANDS.iter().flat_map(|command| references.map(|pair| (command, pair))) {
            let answer = |reference: &str| {
                let mut arguments = [command, &[reference][..]].concat();
                if command[0] == "port-forward" {
                    arguments.push("0:8080");
                }
                let output = friend.try_ctl(&arguments);
                let [stdout, stderr] = [output.stdout, output.stderr].map(|text| text.replace(reference, "REFERENCE"));
                (output.status, stdout, stderr)
            };
            let told = answer(foreign);
            assert_eq!(told, answer(none), "{command:?} {foreign}");
            assert!(told.2.contains("no_such_deployment") && told.0 == 3, "{command:?}: {told:?}");
        }
        assert_eq!(other.state(name), "running");
        let listed = friend.ctl(&["ps", "--all", "--json"]).stdout;
        assert!(!listed.contains(&**foreign) && !listed.contains("hush"), "{listed}");
    }
    assert_eq!(pair.alice.forward("secret", 8080).get("/").status, 200);
}

/// The control: what is refused above for others is done for the owner, by id, by its beginning, and by name.
#[test]
fn g4_control_every_command_acts_on_ones_own_deployment() {
    let Friends { pair, carol, secret, mine } = friends();
    for (friend, first) in [(&pair.alice, secret), (&carol, mine)] {
        let flags = ["--expose", "8080", "--no-publish", "--cpu", "0.1"];
        let second = friend.deploy_to("bob", &pair.files.write(&hello()), "second", &flags);
        friend.deploy_to("bob", &pair.files.write(&hello()), "third", &flags);
        for reference in [&*first, &second[..8], "third"] {
            for command in COMMANDS.iter().filter(|command| !is_hosts(command)) {
                if command[0] == "port-forward" {
                    assert_eq!(friend.forward(reference, 8080).get("/").status, 200);
                } else {
                    friend.ctl(&[command, &[reference][..]].concat());
                }
            }
        }
        assert_eq!(friend.json(&["ps", "--all"])["deployments"], serde_json::json!([]));
    }
}

/// Everything that one peer may ask of another about a deployment, and the bytes of each answer.
fn answers(wire: &Wire, bob: &Machine, deployment: DeploymentId) -> Vec<(&'static str, Vec<u8>)> {
    let mut answers = Vec::new();
    for (verb, query) in [("inspect", Query::Inspect(deployment)), ("stats", Query::Stats(deployment))] {
        assert!(is_about_one(&query));
        answers.push((verb, encode(&wire.query(bob, query))));
    }
    let query = LogsQuery { deployment, tail: None, since: None, follow: false };
    answers.push(("logs", encode(&wire.exchange::<_, LogFrame>(bob, LOGS, &query).unwrap())));
    let header = ForwardHeader { deployment, port: Port::new(8080).unwrap() };
    answers.push(("forward", encode(&wire.exchange::<_, StreamReply>(bob, FORWARD, &header).unwrap())));
    let requests =
        [Request::Stop, Request::Start, Request::Restart, Request::Remove].map(|request| request(deployment));
    // The two others are about an image and a name.
    assert_eq!(requests.iter().map(number_of).collect::<BTreeSet<_>>(), (2..6).collect());
    for request in requests {
        let verb = request.verb();
        let event = wire.send(bob, &wire.seal(bob, request, 0).bytes).pop().unwrap();
        let bytes = match event {
            // All of it but the time.
            Event::Failed(refusal) => encode(&Refusal { clock: Timestamp(0), ..refusal }),
            other => encode(&other),
        };
        answers.push((verb, bytes));
    }
    answers
}

/// A new query makes this fail, and belongs into the list above if it is about one deployment.
fn is_about_one(query: &Query) -> bool {
    match query {
        Query::Inspect(_) | Query::Stats(_) => true,
        Query::List | Query::Capacity => false,
    }
}

/// What bob's audit log gains by this, all that is counted included, with every id replaced.
fn audited(bob: &mut Machine, work: impl FnOnce(&Machine)) -> Vec<String> {
    let restart = |bob: &mut Machine| {
        bob.stop().success();
        bob.up();
        bob.audit()
    };
    let before = restart(bob).len();
    work(bob);
    let lines = restart(bob).split_off(before);
    let told = lines.iter().map(|line| {
        let fields = ["actor", "action", "outcome", "threat", "detail"].map(|field| line[field].to_string());
        without_ids(&fields.join(" "))
    });
    // The counts at the end come in no order.
    let mut told: Vec<_> = told.collect();
    told.sort();
    told
}

/// The text with an `X` in the place of every id.
fn without_ids(text: &str) -> String {
    let words = text.split_inclusive(|c: char| !c.is_ascii_hexdigit());
    let is_id = |word: &str| word.len() >= 32 && word.bytes().take(32).all(|byte| byte.is_ascii_hexdigit());
    words.map(|word| if is_id(word) { format!("X{}", &word[word.len() - 1..]) } else { word.to_owned() }).collect()
}

#[test]
fn g4_every_protocol_answers_and_audits_alike_for_a_foreign_and_an_absent_deployment() {
    let Friends { mut pair, mut carol, secret, mine } = friends();
    carol.kill();
    pair.alice.kill();
    let keys = [key_of(&carol), key_of(&pair.alice)];
    let [secret, mine] = [secret, mine].map(|id| id.parse::<DeploymentId>().unwrap());
    let mut asked = |ids: [DeploymentId; 2]| {
        let mut answered = Vec::new();
        let lines = audited(&mut pair.bob, |bob| {
            for (key, id) in keys.iter().zip(ids) {
                answered.push(answers(&Wire::with(key.clone(), &[bob]), bob, id));
            }
        });
        (answered, lines)
    };
    let (foreign, absent) = (asked([secret, mine]), asked([0; 2].map(|_| DeploymentId::random())));
    assert_eq!(foreign, absent);
    assert!(foreign.1.iter().any(|line| line.contains("G4")), "{:?}", foreign.1);

    // The control: to whom they belong they answer otherwise.
    let bob = &pair.bob;
    let wires = keys.map(|key| Wire::with(key, &[bob]));
    for (wire, own) in wires.iter().zip([mine, secret]) {
        for ((verb, own), (_, none)) in answers(wire, bob, own).into_iter().zip(&absent.0[0]) {
            assert_ne!(&own, none, "{verb}");
        }
    }
}

#[test]
fn g4_a_name_and_a_transfer_of_somebody_else_are_as_good_as_none() {
    let Friends { mut pair, mut carol, .. } = friends();
    carol.kill();
    pair.alice.kill();
    let bob = &pair.bob;
    let [alice, carol] = [&pair.alice, &carol].map(|friend| Wire::of(friend, &[bob]));
    let image = hello();
    let begin = |wire: &Wire, name: &str| wire.seal(bob, deploy(name, &image), 0).bytes;
    let request = begin(&alice, "web");
    let mut pending = alice.begin(bob, &request);
    assert!(matches!(pending.next(), Some(Event::Accepted(_))));
    let Some(Event::Want(layers)) = pending.next() else { panic!("nothing is wanted") };
    let begun = |name: &str| carol.begin(bob, &begin(&carol, name)).next();
    for name in ["web", "nobody"] {
        assert!(matches!(begun(name), Some(Event::Accepted(_))), "{name}");
    }
    let own = begun("mine");
    assert!(matches!(&own, Some(Event::Failed(refusal)) if refusal.problem.code == Code::NameTaken), "{own:?}");
    let answer = |request| carol.layer(bob, request, layers[0], &[]);
    let foreign = answer(pending.hash);
    assert!(matches!(foreign, LayerReply::Refused(_)), "{foreign:?}");
    assert_eq!(foreign, answer(RequestHash([7; 32])));
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
