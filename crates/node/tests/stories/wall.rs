//! The wall around containers' networks (V4n), on a host of its own with a neighbour, an internet and a resolver.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::world::{Files, Host, Machine, eventually, probe};

const LIMITS: [&str; 6] = ["--max-cpu", "4", "--max-memory", "2g", "--max-containers", "20"];

/// A provider with two owners who may deploy there.
struct Scene {
    host: Host,
    bob: Machine,
    alice: Machine,
    mallory: Machine,
    files: Files,
}

impl Scene {
    fn start(egress: &str) -> Self {
        let host = Host::start();
        let (bob, alice, mallory) = (host.provider("bob"), host.requester("alice"), host.requester("mallory"));
        for owner in [&alice, &mallory] {
            owner.join(&bob, &[&LIMITS[..], &["--egress", egress]].concat());
        }
        Self { host, bob, alice, mallory, files: Files::new() }
    }

    /// Runs the probe, which knocks where it is told.
    fn knocker(&self, owner: &Machine, name: &str, flags: &[&str]) {
        let usual = ["--expose", "8080", "--no-publish", "--cpu", "0.1", "--memory", "32m", "-e", "PROBE_MODE=knock"];
        owner.deploy_to("bob", &self.files.write(&probe()), name, &[&usual[..], flags].concat());
    }

    /// Addresses of a deployment's container in its networks.
    fn addresses(&self, owner: &Machine, name: &str) -> Vec<String> {
        let id = owner.json(&["inspect", name])["id"].as_str().unwrap().to_owned();
        let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}";
        let shown = self.host.docker(&["inspect", "--format", format, &format!("peer-compute-{id}")]);
        shown.split_whitespace().map(|address| format!("{address}:8080")).collect()
    }
}

/// What a knocker reaches of these.
fn reached(owner: &Machine, name: &str, targets: &[String]) -> Vec<String> {
    let forward = owner.forward(name, 8080);
    let path = format!("/{}", targets.join(","));
    let answer = eventually("the knocker answers", || Some(forward.get(&path)).filter(|answer| answer.status == 200));
    reached_of(&String::from_utf8(answer.body).unwrap(), targets)
}

fn reached_of(report: &str, targets: &[String]) -> Vec<String> {
    let lines: Vec<Value> = serde_json::from_str(report).unwrap();
    let results: BTreeMap<_, _> =
        lines.iter().map(|line| (line["probe"].as_str().unwrap().to_owned(), line["succeeded"] == true)).collect();
    assert_eq!(results.len(), targets.iter().collect::<std::collections::BTreeSet<_>>().len(), "{report}");
    results.into_iter().filter(|(_, succeeded)| *succeeded).map(|(target, _)| target).collect()
}

fn texts(targets: &[&str]) -> Vec<String> {
    targets.iter().map(|target| (*target).to_owned()).collect()
}

impl Scene {
    /// Everything that the deployment `out` of alice must not reach, and that it reaches nothing of it.
    fn out_is_walled_in(&self, when: &str) {
        let mut targets = self.host.forbidden();
        targets.extend(self.addresses(&self.alice, "other"));
        targets.extend(self.addresses(&self.mallory, "theirs"));
        targets.push("rebind.example.org:9000".to_owned());
        assert!(targets.len() > 12, "{targets:?}");
        assert_eq!(reached(&self.alice, "out", &targets), Vec::<String>::new(), "{when}");
        let heard = [self.host.own.senders(), self.host.hidden.senders()].concat();
        assert_eq!(heard, Vec::new(), "datagrams were heard {when}");
    }

    /// The way out is there, by address and by name.
    fn out_gets_out(&self, when: &str) {
        let targets = texts(&["8.8.8.8:9000", "public.example.org:9000"]);
        eventually(when, || (reached(&self.alice, "out", &targets) == targets).then_some(()));
        let from: std::collections::BTreeSet<_> =
            self.host.public.senders().iter().map(std::net::SocketAddr::ip).collect();
        assert_eq!(from, [crate::world::HOST.parse().unwrap()].into(), "translated {when}");
    }
}

#[test]
fn alone_v4n_a_guest_with_a_way_out_reaches_the_internet_and_nothing_else() {
    let mut scene = Scene::start("internet");
    let internet = ["--egress", "internet", "--restart", "always"];
    scene.knocker(&scene.alice, "out", &internet);
    scene.knocker(&scene.alice, "other", &internet);
    scene.knocker(&scene.mallory, "theirs", &internet);
    scene.knocker(&scene.alice, "none", &[]);

    // The control: a plain container of the same engine reaches the host and its neighbours.
    let image = scene.alice.json(&["inspect", "out"])["image"].as_str().unwrap().to_owned();
    scene.host.docker(&["run", "--detach", "--name", "plain", "-e", "PROBE_MODE=knock", &image]);
    let address = scene.host.docker(&["inspect", "--format", "{{.NetworkSettings.IPAddress}}", "plain"]);
    let targets = scene.host.forbidden();
    let report = scene.host.get(&format!("{}:8080", address.trim()), &format!("/{}", targets.join(",")));
    let open = reached_of(&report, &targets);
    for needed in ["198.51.100.1:9000", "198.51.100.2:9000", "169.254.169.254:9000"] {
        assert!(open.contains(&needed.to_owned()), "the control does not reach {needed}: {open:?}");
    }
    drop([scene.host.own.senders(), scene.host.hidden.senders()]);

    scene.out_gets_out("at first");
    scene.out_is_walled_in("at first");
    let everything = [scene.host.forbidden(), texts(&["8.8.8.8:9000", "public.example.org:9000"])].concat();
    assert_eq!(reached(&scene.alice, "none", &everything), Vec::<String>::new());

    // Others flush what they find; the guard is not theirs to flush.
    for _ in 0..5 {
        scene.host.command("nft flush ruleset").success();
        scene.out_is_walled_in("after the rules were flushed");
    }
    // A flush may come at any moment of their repair, and ends nothing.
    for _ in 0..300 {
        scene.host.command("nft flush ruleset").success();
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    scene.out_is_walled_in("after a storm of flushes");
    assert_eq!(scene.alice.json(&["inspect", "out"])["restarts"], 0, "it never ended");
    scene.host.command("iptables -F").success();
    scene.out_is_walled_in("after the engine's rules were flushed");

    scene.host.down();
    scene.host.up();
    for (owner, name) in [(&scene.alice, "out"), (&scene.alice, "other"), (&scene.mallory, "theirs")] {
        owner.wait_for_state(name, "running");
    }
    scene.out_gets_out("after the engine was started again");
    scene.out_is_walled_in("after the engine was started again");

    for round in 0..20 {
        let name = format!("short{round}");
        scene.knocker(&scene.alice, &name, &["--egress", "internet"]);
        scene.alice.ctl(&["rm", "--force", &name]);
    }
    scene.out_gets_out("after 20 deploys");
    scene.out_is_walled_in("after 20 deploys");

    for (owner, name) in [(&scene.alice, "out"), (&scene.alice, "other"), (&scene.mallory, "theirs")] {
        owner.ctl(&["rm", "--force", name]);
    }
    eventually("the networks are gone", || {
        let names = scene.host.docker(&["network", "ls", "--format", "{{.Name}}"]);
        (!names.contains("peer-compute")).then_some(())
    });
    assert!(!scene.bob.audit().is_empty());
}

#[test]
fn alone_v4n_listed_hosts_are_reached_and_no_others() {
    let scene = Scene::start("*.example.org:9000,1.1.1.1");
    scene.knocker(&scene.alice, "out", &["--egress", "public.example.org:9000"]);
    let open = texts(&["public.example.org:9000"]);
    let closed =
        texts(&["1.1.1.1:9000", "other.example.org:9000", "public.example.org:9001", "rebind.example.org:9000"]);
    let unknown = texts(&["8.8.8.8:9000"]);
    assert_eq!(reached(&scene.alice, "out", &unknown), Vec::<String>::new(), "nobody has asked for its name yet");
    assert_eq!(reached(&scene.alice, "out", &open), open);
    assert_eq!(reached(&scene.alice, "out", &closed), Vec::<String>::new());
    assert_eq!(reached(&scene.alice, "out", &scene.host.forbidden()), Vec::<String>::new());
    assert!(scene.host.questions().iter().all(|name| name == "public.example.org"), "{:?}", scene.host.questions());
    scene.knocker(&scene.alice, "fixed", &["--egress", "1.1.1.1:9000"]);
    assert_eq!(reached(&scene.alice, "fixed", &texts(&["1.1.1.1:9000", "8.8.8.8:9000"])), ["1.1.1.1:9000"]);

    // The engine's own rules go as well: it makes no more networks until it is started again.
    scene.host.command("nft flush ruleset").success();
    assert_eq!(reached(&scene.alice, "out", &closed), Vec::<String>::new());
    eventually("the rules are back", || (reached(&scene.alice, "out", &open) == open).then_some(()));

    let archive = scene.files.write(&probe());
    for (wanted, code) in
        [("internet", "not_granted"), ("example.org:9000", "not_granted"), ("public.example.org:443", "not_granted")]
    {
        let arguments = ["deploy", &archive, "--peer", "bob", "--name", "more", "--egress", wanted];
        scene.alice.try_ctl(&arguments).refused(code, 4);
    }
    assert!(scene.bob.has_audited("V4n"));
}

#[test]
fn alone_v4n_a_private_network_joins_its_owners_deployments_only() {
    let scene = Scene::start("internet");
    scene.knocker(&scene.alice, "front", &["--network", "back", "--egress", "internet"]);
    scene.knocker(&scene.alice, "store", &["--network", "back"]);
    scene.knocker(&scene.alice, "apart", &["--egress", "internet"]);
    scene.knocker(&scene.mallory, "theirs", &["--network", "back"]);
    let store = scene.addresses(&scene.alice, "store");
    let named = texts(&["store:8080"]);
    assert_eq!(reached(&scene.alice, "front", &store), store);
    assert_eq!(reached(&scene.alice, "front", &named), named, "by its name");
    assert_eq!(reached(&scene.alice, "store", &texts(&["front:8080"])), ["front:8080"]);
    let all = [store, named, scene.addresses(&scene.alice, "front")].concat();
    assert_eq!(reached(&scene.alice, "apart", &all), Vec::<String>::new());
    assert_eq!(reached(&scene.mallory, "theirs", &all), Vec::<String>::new());
    // A network is no way out.
    let outside = [scene.host.forbidden(), texts(&["8.8.8.8:9000", "public.example.org:9000"])].concat();
    assert_eq!(reached(&scene.alice, "store", &outside), Vec::<String>::new());
    let internet = texts(&["8.8.8.8:9000"]);
    assert_eq!(reached(&scene.alice, "front", &internet), internet);
    assert_eq!(reached(&scene.alice, "front", &scene.host.forbidden()), Vec::<String>::new());
}
