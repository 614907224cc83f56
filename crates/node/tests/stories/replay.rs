//! A request that somebody has captured: changed in any way, or copied at any later time, it never reaches the engine.

use std::collections::BTreeSet;
use std::sync::Barrier;

use peer_proto::code::Code;
use peer_proto::deploy::{DeployRequest, Event, ImageOffer, ImageSource, Request, Specification};
use peer_proto::frame::{CONTROL_FRAME_MAX, decode_strict, encode};
use peer_proto::id::DeploymentId;
use peer_proto::identity::Sealed;
use xtask::image::Image;

use crate::requests::{deploy, names};
use crate::world::{Machine, Pair, Recorder, Wire, hello, key_of, variants};

/// Copies that are sent at one time, and the connections that carry them.
const COPIES: usize = 50;
const CONNECTIONS: usize = 3;

/// Alice without her daemon, who has a running deployment at bob's, and bob's engine under watch.
struct Captured {
    recorder: Recorder,
    pair: Pair,
    wire: Wire,
    /// An image that is there already, so that a deployment needs nothing more.
    image: Image,
    running: DeploymentId,
}

fn captured() -> Captured {
    let recorder = Recorder::start();
    let flags = ["--max-requests-per-peer", "60000", "--engine-socket", &recorder.socket()];
    let mut bob = Machine::prepared("bob", &flags).with_own_clock();
    bob.up();
    bob.init();
    let mut pair = Pair::on(bob, &[]);
    let image = hello();
    let flags = ["--expose", "8080", "--no-publish", "--cpu", "0.1"];
    let running = pair.alice.deploy_to("bob", &pair.files.write(&image), "first", &flags).parse().unwrap();
    pair.alice.kill();
    let wire = Wire::of(&pair.alice, &[&pair.bob]);
    recorder.settle();
    Captured { recorder, pair, wire, image, running }
}

impl Captured {
    fn bob(&self) -> &Machine {
        &self.pair.bob
    }

    /// Speaks to bob anew, after he was down.
    fn reconnect(&mut self) {
        self.wire = Wire::of(&self.pair.alice, &[&self.pair.bob]);
    }

    /// Asserts that copies are refused with these codes and ask nothing of the engine.
    #[track_caller]
    fn assert_dead(&self, when: &str, copies: &[(&[u8], Code)]) {
        self.recorder.settle();
        let before = self.bob().containers();
        for (bytes, code) in copies {
            assert_eq!(self.wire.outcome(self.bob(), bytes), Some(*code), "{when}");
        }
        assert_eq!(self.recorder.settle(), [""; 0], "{when}");
        assert_eq!(self.bob().containers(), before, "{when}");
    }
}

/// A specification of which every field says something, so that each can be changed.
fn full() -> Specification {
    let text = r#"{"name":"other","image_name":"hello:test","entrypoint":["/hello"],"command":["--serve"],
        "environment":[{"name":"A","value":"b"},{"name":"C","value":"d"}],"expose":8080,"publish":true,
        "restart":{"on_failure":3},"stop_timeout_seconds":1,
        "limits":{"cpu":100,"memory":67108864,"pids":100,"files":1024,"scratch":1048576}}"#;
    serde_json::from_str(text).unwrap()
}

fn offer(image: &Image) -> ImageOffer {
    let layer_sizes = image.layers.iter().map(|(_, tar)| tar.len() as u64).collect();
    ImageOffer { configuration: image.config.clone(), layer_sizes }
}

/// One request of every verb, in an order in which all can be carried out.
fn every_verb(running: DeploymentId, image: &Image) -> Vec<Request> {
    let full = DeployRequest { specification: full(), image: ImageSource::Offered(offer(image)) };
    let requests = vec![
        Request::Stop(running),
        Request::Start(running),
        Request::Restart(running),
        Request::Push(offer(image)),
        deploy("another", image),
        Request::Remove(running),
        Request::Deploy(Box::new(full)),
    ];
    let verbs: BTreeSet<_> = requests.iter().map(number_of).collect();
    assert_eq!(verbs.len(), 6, "a verb lacks");
    requests
}

/// A new verb makes this fail, and belongs into the list above.
pub(crate) fn number_of(request: &Request) -> usize {
    match request {
        Request::Deploy(_) => 0,
        Request::Push(_) => 1,
        Request::Stop(_) => 2,
        Request::Start(_) => 3,
        Request::Restart(_) => 4,
        Request::Remove(_) => 5,
    }
}

/// The envelope with one change: in what is signed, in the signature, or around both.
fn mutations(envelope: &[u8]) -> Vec<Vec<u8>> {
    let sealed: Sealed = decode_strict(envelope, CONTROL_FRAME_MAX).unwrap();
    let inner = variants(&sealed.bytes).into_iter().map(|bytes| encode(&Sealed { bytes, ..sealed.clone() }));
    let signatures = (0..64).map(|position| {
        let mut changed = sealed.clone();
        changed.signature[position] ^= 1 << (position % 8);
        encode(&changed)
    });
    variants(envelope).into_iter().chain(inner).chain(signatures).collect()
}

#[test]
fn v2_every_change_of_every_field_of_every_request_is_refused_and_asks_nothing_of_the_engine() {
    let captured = captured();
    let (bob, wire) = (captured.bob(), &captured.wire);
    for request in every_verb(captured.running, &captured.image) {
        let verb = request.verb();
        let sound = wire.seal(bob, request, 0);
        let changed = mutations(&sound.bytes);
        assert!(changed.len() > 200, "{verb}: {}", changed.len());
        for bytes in &changed {
            let outcome = wire.outcome(bob, bytes);
            let known = [
                None,
                Some(Code::InvalidSignature),
                Some(Code::Malformed),
                Some(Code::WrongSigner),
                Some(Code::WrongAudience),
                Some(Code::ClockDrift),
                Some(Code::Expired),
                Some(Code::UnsupportedVersion),
            ];
            assert!(known.contains(&outcome), "{verb}: {outcome:?} for {bytes:02x?}");
        }
        assert_eq!(captured.recorder.settle(), [""; 0], "{verb}: {} changed requests", changed.len());
        // The control: as it was captured it acts.
        let events = wire.send(bob, &sound.bytes);
        assert!(!matches!(events[0], Event::Failed(_)), "{verb}: {events:?}");
        let asked = captured.recorder.settle();
        assert_eq!(asked.is_empty(), verb == "push", "{verb}: what is there is not asked for: {asked:?}");
    }
    assert!(bob.has_audited("V2"));
}

#[test]
fn v3_a_captured_request_is_dead_after_a_kill_a_restart_another_clock_and_a_restored_directory() {
    let mut captured = captured();
    captured.pair.bob.stop().success();
    captured.pair.bob.save_data();
    captured.pair.bob.up();
    captured.reconnect();
    let (bob, wire) = (captured.bob(), &captured.wire);
    let [acted, never_came, late] =
        ["web", "never", "late"].map(|name| wire.seal(bob, deploy(name, &captured.image), 0).bytes);
    let again = wire.seal(bob, Request::Restart(captured.running), 0).bytes;
    assert!(matches!(wire.send(bob, &acted).last(), Some(Event::Done(_))));
    assert!(matches!(wire.send(bob, &again).last(), Some(Event::Done(_))));
    assert!(!captured.recorder.settle().is_empty(), "the control: both have acted");
    let repeated = [(&*acted, Code::DuplicateRequest), (&again, Code::DuplicateRequest)];
    let known = [&repeated[..], &[(&never_came, Code::StaleIncarnation)]].concat();
    captured.assert_dead("at once", &repeated);

    let at_any_time = |code| [&acted, &again, &late].map(|bytes| (&**bytes, code));
    captured.bob().set_clock("+30m");
    captured.assert_dead("half an hour later by the clock", &at_any_time(Code::ClockDrift));
    // Something that is asked at that time makes it the latest that was seen.
    let push = captured.wire.seal(captured.bob(), Request::Push(offer(&captured.image)), 30 * 60_000);
    assert!(matches!(captured.wire.send(captured.bob(), &push.bytes).last(), Some(Event::Pushed(_))));
    captured.bob().set_clock("+4m");
    captured
        .assert_dead("with a clock that went back", &[(&acted, Code::ClockBehind), (&never_came, Code::ClockBehind)]);
    captured.bob().ctl(&["doctor", "--accept-clock"]);
    captured.assert_dead("with that clock accepted", &known);
    captured.bob().set_clock("+0");
    captured.assert_dead("with the right clock", &known);

    captured.pair.bob.kill();
    captured.pair.bob.up();
    captured.reconnect();
    captured.assert_dead("after a kill", &known);
    captured.pair.bob.stop().success();
    captured.pair.bob.up();
    captured.reconnect();
    captured.assert_dead("after a restart", &known);

    // The machine has forgotten what was asked since.
    captured.pair.bob.stop().success();
    captured.pair.bob.restore_data();
    captured.pair.bob.up();
    captured.reconnect();
    assert_eq!(names(&captured.wire, captured.bob()), ["first"]);
    let stale = [&acted, &again, &never_came].map(|bytes| (&**bytes, Code::StaleIncarnation));
    captured.assert_dead("in a restored directory", &stale);
    captured.pair.bob.kill();
    captured.pair.bob.restore_data();
    captured.bob().set_clock("-2m");
    captured.pair.bob.up();
    captured.reconnect();
    captured.assert_dead("in a restored directory, at the time of before", &stale);
    assert!(captured.bob().has_audited("V3"));
    // The control: it can be asked for anew.
    let fresh = captured.wire.seal(captured.bob(), deploy("web", &captured.image), 0).bytes;
    assert!(matches!(captured.wire.send(captured.bob(), &fresh).last(), Some(Event::Done(_))));
    assert_eq!(captured.bob().containers().len(), 2);
}

/// Sends copies at one time over several connections; gives how many were accepted. All others name the first.
fn race(captured: &Captured, wires: &[Wire], bytes: &[u8]) -> usize {
    let bob = captured.bob();
    let streams: Vec<_> =
        (0..COPIES).map(|copy| &wires[copy % wires.len()]).map(|wire| (wire, wire.greet(bob).0)).collect();
    let barrier = Barrier::new(COPIES);
    let last: Vec<Vec<Event>> = std::thread::scope(|scope| {
        let threads = streams.into_iter().map(|(wire, stream)| {
            let barrier = &barrier;
            scope.spawn(move || {
                barrier.wait();
                wire.begin_on(stream, bob, bytes).rest()
            })
        });
        let threads: Vec<_> = threads.collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let is_repetition = |events: &&Vec<Event>| matches!(&events[..], [Event::Failed(refusal)] if refusal.problem.code == Code::DuplicateRequest);
    let accepted = last.iter().filter(|events| matches!(events[0], Event::Accepted(_))).count();
    assert_eq!(last.iter().filter(is_repetition).count(), COPIES - accepted, "{last:?}");
    accepted
}

#[test]
fn v3_fifty_copies_at_one_time_over_several_connections_run_once() {
    let captured = captured();
    let bob = captured.bob();
    let wires: Vec<_> = (0..CONNECTIONS).map(|_| Wire::with(key_of(&captured.pair.alice), &[bob])).collect();
    let count = |changes: &[String], part: &str| changes.iter().filter(|line| line.contains(part)).count();

    let request = wires[0].seal(bob, deploy("web", &captured.image), 0);
    assert_eq!(bob.json(&["status"])["peers_connected"], 1);
    assert_eq!(race(&captured, &wires, &request.bytes), 1);
    let changes = captured.recorder.settle();
    assert_eq!((count(&changes, "/containers/create"), count(&changes, "/start")), (1, 1), "{changes:?}");
    assert_eq!(bob.containers().len(), 2);
    assert_eq!(names(&captured.wire, bob).len(), 2);

    let request = wires[0].seal(bob, Request::Restart(captured.running), 0);
    assert_eq!(race(&captured, &wires, &request.bytes), 1);
    let once = captured.recorder.settle();
    assert_eq!(count(&once, "/start"), 1, "{once:?}");
    // The control: what is signed anew acts anew.
    for _ in 0..2 {
        let request = wires[0].seal(bob, Request::Restart(captured.running), 0);
        assert!(matches!(wires[0].send(bob, &request.bytes).last(), Some(Event::Done(_))));
    }
    assert_eq!(count(&captured.recorder.settle(), "/start"), 2);
}
