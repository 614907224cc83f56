//! Power cuts of the provider's daemon at any moment: rows and containers stay the same set, and nothing is left behind.

use std::collections::BTreeSet;
use std::time::Duration;

use peer_proto::id::DeploymentId;

use crate::world::{Machine, Pair, docker_try, eventually, hello};

/// Up to so many milliseconds.
fn random(most: u64) -> Duration {
    let random = DeploymentId::random().0;
    Duration::from_millis(u64::from(u16::from_be_bytes([random[0], random[1]])) % most)
}

/// Deployments that bob knows, and those of which the engine has a container.
fn both(bob: &Machine) -> (BTreeSet<String>, BTreeSet<String>) {
    let listed = bob.json(&["ps", "--hosted", "--all"]);
    let rows = listed["deployments"].as_array().unwrap().iter();
    let rows = rows.map(|row| row["id"].as_str().unwrap().to_owned()).collect();
    let names = bob.containers().into_iter().filter_map(|container| {
        let name = docker_try(&["inspect", "--format", "{{.Name}}", &container]).stdout;
        name.trim().strip_prefix("/peer-compute-").map(str::to_owned)
    });
    (rows, names.collect())
}

fn network_namespaces() -> usize {
    let namespaces = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
        entry.file_name().to_str()?.parse::<u32>().ok()?;
        std::fs::read_link(entry.path().join("ns/net")).ok()
    });
    namespaces.collect::<BTreeSet<_>>().len()
}

fn descriptors(machine: &Machine) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", machine.pid())).unwrap().count()
}

#[test]
fn alone_kills_at_random_moments_leave_nothing_behind() {
    let mut pair = Pair::start();
    let archive = pair.files.write(&hello());
    let namespaces = network_namespaces();
    for round in 0..10 {
        let name = format!("web{round}");
        let arguments = ["deploy", &archive, "--peer", "bob", "--name", &name, "--expose", "8080", "--cpu", "0.2"];
        let deploying = pair.alice.begin(&arguments);
        std::thread::sleep(random(900));
        let stopping = (round % 3 == 0).then(|| pair.alice.begin(&["stop", &name]));
        std::thread::sleep(random(300));
        pair.bob.kill();
        pair.bob.up();
        deploying.end();
        drop(stopping.map(crate::world::Running::end));
        eventually("no container without a row", || {
            let (rows, containers) = both(&pair.bob);
            containers.is_subset(&rows).then_some(())
        });
        eventually("it is settled and removed", || {
            pair.alice.try_ctl(&["rm", "--force", &name]);
            both(&pair.bob).0.is_empty().then_some(())
        });
    }
    let (rows, containers) = both(&pair.bob);
    assert_eq!((rows.len(), containers.len()), (0, 0));
    eventually("no network is left", || (network_namespaces() <= namespaces).then_some(()));
    // A quiet daemon holds as much as one that has just been started.
    let after = descriptors(&pair.bob);
    pair.bob.stop().success();
    pair.bob.up();
    eventually("alice is connected", || (pair.bob.json(&["status"])["peers_connected"] == 1).then_some(()));
    assert!(after <= descriptors(&pair.bob) + 8, "{after} descriptors are open");
    assert!(pair.bob.json(&["audit", "verify"])["fault"].is_null());
}

#[test]
fn a_deployment_that_was_accepted_goes_on_after_a_crash() {
    let mut pair = Pair::start();
    let archive = pair.files.write(&hello());
    pair.alice.ctl(&["push", &archive, "--peer", "bob"]);
    let deploying = pair.alice.begin(&["deploy", &archive, "--peer", "bob", "--name", "web", "--expose", "8080"]);
    eventually("it is accepted", || {
        let listed = pair.bob.json(&["ps", "--hosted", "--all"]);
        (!listed["deployments"].as_array()?.is_empty()).then_some(())
    });
    pair.bob.kill();
    deploying.end();
    pair.bob.up();
    pair.alice.wait_for_state("web", "running");
    assert_eq!(pair.alice.forward("web", 8080).get("/").status, 200);
    assert_eq!(pair.bob.containers().len(), 1);
}

#[test]
fn containers_that_no_row_knows_are_removed() {
    let mut pair = Pair::start();
    pair.hello("web", &[]);
    pair.bob.kill();
    pair.bob.database().execute("DELETE FROM deployment", []).unwrap();
    pair.bob.up();
    eventually("the stray container is gone", || pair.bob.containers().is_empty().then_some(()));
    // And the other way round: a container that somebody took away is no longer called running.
    pair.hello("lost", &[]);
    docker_try(&["rm", "--force", &pair.bob.containers()[0]]).success();
    let status = pair.alice.wait_for_state("lost", "failed");
    assert_eq!(status["problem"]["code"], "container_exited", "{status}");
}

#[test]
fn a_second_daemon_on_the_same_directory_is_refused() {
    let bob = Machine::without_engine("bob");
    let second = bob.launch().end();
    assert_eq!(second.status, 1, "{second:?}");
    assert!(second.stderr.contains(bob.data().to_str().unwrap()), "{second:?}");
    assert_eq!(bob.json(&["whoami"])["peer_id"], bob.peer_id.as_str());
}
