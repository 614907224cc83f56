//! The end of a permission: felt at once by everything that is live, and never forgotten by a restart.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use peer_node::protocols::{LAYERS, LOGS};
use peer_proto::deploy::{Event, ImageOffer, LayerHeader, LayerReply, Request};
use peer_proto::id::DeploymentId;
use peer_proto::query::LogsQuery;

use crate::world::{Pair, Trio, Wire, eventually, hello, host_of, noise, salted, shell};

/// What is promised, with slack for a machine that does other things as well.
pub(crate) const SOON: Duration = Duration::from_secs(4);

/// Reads a never-ending answer through the gateway; gives the moment at which it broke off.
fn endless_visit(trio: &Trio, url: &str) -> std::thread::JoinHandle<Instant> {
    let mut visit = trio.gate.visit(url);
    write!(visit, "GET /bytes/900000000000 HTTP/1.1\r\nHost: {}\r\n\r\n", host_of(url)).unwrap();
    let mut first = [0; 1];
    visit.read_exact(&mut first).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while visit.read(&mut buffer).is_ok_and(|count| count > 0) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Instant::now()
    })
}

#[test]
fn v1_removal_is_felt_at_once_by_logs_uploads_and_visitors_and_after_a_restart() {
    let mut trio = Trio::start();
    let (id, url) = trio.hello("web", &[]);
    let id: DeploymentId = id.parse().unwrap();
    trio.pair.alice.kill();
    let wire = Wire::of(&trio.pair.alice, &[&trio.pair.bob]);
    let bob = &trio.pair.bob;

    // She follows a log, and pushes an image byte by byte.
    let mut logs = wire.open(bob, LOGS).unwrap();
    let query = LogsQuery { deployment: id, tail: None, since: None, follow: true };
    wire.write(&mut logs, &query);
    let image = salted("hello").binary("/noise", &noise(4 << 20)).build().unwrap();
    let layer_sizes = image.layers.iter().map(|(_, tar)| tar.len() as u64).collect();
    let offer = ImageOffer { configuration: image.config.clone(), layer_sizes };
    let mut pushing = wire.begin(bob, &wire.seal(bob, Request::Push(offer), 0).bytes);
    let Some(Event::Want(layers)) = pushing.next() else { panic!("nothing is wanted") };
    // The layer of noise lies uppermost, and is surely not there yet.
    let largest = *layers.last().unwrap();
    let mut layer = wire.open(bob, LAYERS).unwrap();
    let header = LayerHeader { request: pushing.hash, layer: largest };
    assert!(matches!(wire.exchange_on(&mut layer, &header), Ok(LayerReply::From(0))));
    let live = [wire.until_dead(logs, false), wire.until_dead(layer, true)];
    let visit = endless_visit(&trio, &url);
    std::thread::sleep(Duration::from_millis(500));
    assert!(live.iter().all(|task| !task.is_finished()) && !visit.is_finished(), "all of it is live");

    bob.ctl(&["peers", "remove", "alice"]);
    let removed = Instant::now();
    for (what, died) in [
        ("the visit", visit.join().unwrap()),
        ("the push", {
            while pushing.next().is_some() {}
            Instant::now()
        }),
    ] {
        assert!(died.saturating_duration_since(removed) < SOON, "{what}: {:?}", died - removed);
    }
    for task in live {
        let died = wire.died(task);
        assert!(died.saturating_duration_since(removed) < SOON, "a stream: {:?}", died - removed);
    }
    assert!(wire.open(bob, LOGS).is_err());
    eventually("its deployment is gone", || trio.pair.bob.containers().is_empty().then_some(()));

    trio.pair.bob.stop().success();
    trio.pair.bob.up();
    assert!(wire.open(&trio.pair.bob, LOGS).is_err());
    assert!(trio.gate.get(&url, "/").is_gateways());
    assert!(trio.pair.bob.containers().is_empty());
}

/// The control: what is stopped by nobody goes on.
#[test]
fn v1_control_a_visit_goes_on_while_its_owner_is_trusted() {
    let trio = Trio::start();
    let (_, url) = trio.hello("web", &[]);
    let visit = endless_visit(&trio, &url);
    let carol = crate::world::Machine::without_engine("carol");
    carol.join(&trio.pair.bob, &[]);
    trio.pair.bob.ctl(&["peers", "remove", "carol"]);
    std::thread::sleep(SOON);
    assert!(!visit.is_finished());
    trio.pair.alice.ctl(&["stop", "web"]);
    visit.join().unwrap();
}

fn runs(pair: &Pair) -> bool {
    !pair.bob.containers_with(&[]).is_empty()
}

#[test]
fn g4_a_grant_that_ends_stops_what_runs_and_a_renewed_one_brings_it_back() {
    let mut pair = Pair::start();
    pair.hello("web", &["--cpu", "0.1"]);
    let allow = ["peers", "allow", "alice", "--allow", "deploy"];
    pair.bob.ctl(&[&allow[..], &["--expires", "2s"]].concat());
    assert!(pair.bob.ctl(&["peers", "list"]).stdout.contains("until "));
    let status = pair.alice.wait_for_state("web", "stopped");
    assert_eq!(status["problem"]["code"], "not_granted", "{status}");
    assert!(!runs(&pair) && pair.bob.containers().len() == 1, "it is kept");
    assert!(pair.bob.audit().iter().any(|line| line["action"] == "grant ended"));
    pair.alice.try_ctl(&["start", "web"]).refused("not_granted", 4);
    pair.bob.ctl(&allow);
    assert_eq!(pair.alice.json(&["start", "web"])["state"], "running");

    // One that ends while the daemon is off is over when it is on again.
    pair.bob.ctl(&[&allow[..], &["--expires", "3s"]].concat());
    pair.bob.kill();
    assert!(runs(&pair));
    std::thread::sleep(Duration::from_secs(3));
    pair.bob.up();
    eventually("it is stopped", || (!runs(&pair)).then_some(()));
    let lines = || pair.bob.audit().iter().filter(|line| line["action"] == "grant ended").count();
    eventually("it is told", || (lines() == 2).then_some(()));
}

#[test]
fn g4_a_grant_that_is_taken_back_stops_what_runs_unless_it_is_kept() {
    let mut pair = Pair::start();
    pair.hello("web", &["--cpu", "0.1"]);
    pair.bob.ctl(&["peers", "allow", "alice", "--nothing", "--keep-deployments"]);
    pair.bob.stop().success();
    pair.bob.up();
    std::thread::sleep(Duration::from_secs(1));
    assert!(runs(&pair), "it goes on, over a restart as well");
    pair.bob.ctl(&["peers", "allow", "alice", "--allow", "deploy"]);
    // A program that does not end when it is asked to is given a second, whatever its owner wished.
    let archive = pair.files.write(&shell("trap '' TERM; while true; do sleep 1; done"));
    pair.alice.deploy_to("bob", &archive, "stubborn", &["--cpu", "0.1", "--stop-timeout", "60s"]);
    pair.bob.ctl(&["peers", "allow", "alice", "--nothing"]);
    let taken = Instant::now();
    eventually("nothing runs", || (!runs(&pair)).then_some(()));
    assert!(taken.elapsed() < Duration::from_secs(20), "{:?}", taken.elapsed());
    for name in ["web", "stubborn"] {
        assert_eq!(pair.alice.wait_for_state(name, "stopped")["problem"]["code"], "not_granted");
    }
    let archive = pair.files.write(&hello());
    pair.alice.try_ctl(&["push", &archive, "--peer", "bob"]).refused("not_granted", 4);
}
