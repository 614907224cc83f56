//! The first thing that a user does: join, deploy, open, read the log, stop, start again, remove.

use crate::world::{Trio, docker};

#[test]
fn a_deployment_is_opened_through_the_gateway_and_ends_at_once() {
    let trio = Trio::start();
    let alice = &trio.pair.alice;
    let (id, url) = trio.hello("web", &["-e", "GREETING=Guten Tag"]);
    let answer = trio.gate.get(&url, "/");
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(answer.text().contains("Guten Tag"), "{answer:?}");
    assert!(alice.ctl(&["ps"]).stdout.contains("running"));

    alice.ctl(&["stop", "web"]);
    let answer = trio.gate.get(&url, "/");
    assert!(answer.is_gateways() && [404, 410].contains(&answer.status), "{answer:?}");
    assert!(trio.pair.bob.containers_with(&[]).is_empty());

    alice.ctl(&["start", &id[..8]]);
    assert_eq!(trio.gate.get(&trio.url("web"), "/").status, 200);
    for _ in 0..8 {
        // The end of the old run is not the end of the command.
        assert_eq!(alice.json(&["restart", "web"])["state"], "running");
    }
    assert_eq!(trio.gate.get(&trio.url("web"), "/").status, 200);

    alice.try_ctl(&["rm", "web"]).refused("wrong_state", 4);
    assert_eq!(alice.json(&["rm", "--force", "web"])["removed"], id.as_str());
    assert!(trio.gate.get(&url, "/").is_gateways());
    assert!(trio.pair.bob.containers().is_empty());
    assert!(!docker(&["ps", "--all"]).contains(&id));
    alice.try_ctl(&["status", "web"]).refused("no_such_deployment", 3);
}
