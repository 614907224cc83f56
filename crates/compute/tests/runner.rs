//! The runner against a caller who has been taken over: what he forges is refused, and nothing is done to what is not ours.

#![expect(clippy::unwrap_used, reason = "tests")]

#[expect(dead_code, reason = "other tests use the rest")]
mod fixture;

use std::{
    net::Ipv4Addr,
    os::unix::net::UnixStream,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use fixture::{Fixture, busybox};
use peer_compute::{
    engine::{Engine, EngineError, NetworkPlan, Target},
    order::Order,
    profile,
    runner::{Channel, RunnerEngine, server},
    wall::{
        self,
        attach::Attachment,
        ranges::Range,
        rules::{Admission, FilterOrder, Reach, Ruleset, Tag, Walled},
    },
};
use peer_proto::{
    code::Code,
    deploy::{DeployRequest, ImageOffer, ImageSource, Limits, Request, Specification},
    envelope,
    id::{DeploymentId, Digest, Incarnation, RequestId},
    identity::Identity,
    unit::{Port, Timestamp},
};
use tokio::task::JoinSet;

/// A runner, and the engine as the other process sees it.
fn runner() -> (JoinSet<()>, RunnerEngine) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        let channel = Channel::new(ours).unwrap();
        server::serve(fixture::engine(), walls(), &channel).await.unwrap();
    });
    (serving, RunnerEngine::new(Arc::new(Channel::new(theirs).unwrap())))
}

/// How the owner of the machine has set the wall up.
fn walls() -> wall::Options {
    wall::Options { enabled: true, subnets: vec!["198.18.0.0/15".parse().unwrap()], resolvers: Vec::new() }
}

fn plain() -> Specification {
    Specification::plain("guest".parse().unwrap(), "busybox:1")
}

fn order(owner: &Identity, image: Digest) -> Order {
    order_for(owner, image, b"{}", plain())
}

fn order_for(owner: &Identity, image: Digest, configuration: &[u8], specification: Specification) -> Order {
    let offer = ImageOffer { configuration: configuration.to_vec(), layer_sizes: vec![] };
    let request = DeployRequest { specification, image: ImageSource::Offered(offer) };
    let audience = Identity::generate().peer_id();
    let body = Request::Deploy(Box::new(request));
    let sealed = envelope::seal(owner, audience, Incarnation([1; 16]), RequestId::random(), Timestamp(1), body);
    let (owner, node, attachment) = (owner.peer_id(), String::new(), Attachment::default());
    Order { owner, audience, envelope: sealed.bytes, image, slot: 31_001, node, attachment }
}

#[tokio::test]
async fn v2_v4_forged_orders_make_no_container() {
    let fixture = Fixture::load(busybox()).await;
    let (_serving, engine) = runner();
    let owner = Identity::generate();
    let order = order(&owner, fixture.image);
    let refused = engine.plan(&order).await.unwrap_err();
    assert!(matches!(refused, EngineError::Refused { .. }), "no mark has been said: {refused}");
    engine.mark(&fixture.node).await.unwrap();
    for other in ["", "another"] {
        assert!(matches!(engine.mark(other).await, Err(EngineError::Refused { .. })), "'{other}'");
        assert!(matches!(engine.list(other).await, Err(EngineError::Refused { .. })), "'{other}'");
    }
    // Signed, but for another image than the one that it is to be made from.
    assert_eq!(engine.plan(&order).await.unwrap_err().code(), Code::NoSuchImage);
    let mut changed = order.clone();
    *changed.envelope.last_mut().unwrap() ^= 1;
    assert_eq!(engine.plan(&changed).await.unwrap_err().code(), Code::InvalidSignature);
    let stolen = Order { owner: Identity::generate().peer_id(), ..order };
    assert_eq!(engine.plan(&stolen).await.unwrap_err().code(), Code::WrongSigner);
    assert_eq!(engine.create(DeploymentId::random()).await, Err(EngineError::NotPlanned));
    assert_eq!(engine.list(&fixture.node).await.unwrap(), []);
    fixture.remove().await;
}

#[tokio::test]
async fn i2_v4_containers_of_others_cannot_be_touched_through_the_runner() {
    let fixture = Fixture::load(busybox()).await;
    let others = fixture.create(&["/bin/sleep", "600"], Limits::default()).await;
    others.start().await;
    let (_serving, engine) = runner();
    engine.mark("another machine").await.unwrap();
    let absent = |answer: Result<(), EngineError>| matches!(answer, Err(EngineError::NoSuchContainer { .. }));
    assert!(absent(engine.start(&others.id).await));
    assert!(absent(engine.kill(&others.id).await));
    assert!(absent(engine.stop(&others.id, Duration::ZERO).await));
    assert!(absent(engine.remove(&others.id).await));
    assert!(absent(engine.pause(&others.id).await));
    assert!(engine.network(&others.id, port()).await.is_err());
    assert!(engine.usage(&others.id, &Limits::default()).await.is_err());
    assert_eq!(engine.inspect(others.id.as_str()).await.unwrap(), None);
    assert!(others.facts().await.running);
    // Control: who knows the mark may.
    let (_serving, engine) = runner();
    engine.mark(&fixture.node).await.unwrap();
    let facts = engine.inspect(others.id.as_str()).await.unwrap().unwrap();
    assert_eq!(facts.labels[profile::NODE_LABEL], fixture.node);
    engine.kill(&others.id).await.unwrap();
    others.remove().await;
    fixture.remove().await;
}

fn port() -> Port {
    "8080".parse().unwrap()
}

#[expect(clippy::needless_pass_by_value, reason = "an answer is judged where it comes")]
fn refused<T: std::fmt::Debug>(answer: Result<T, EngineError>) {
    assert!(matches!(answer, Err(EngineError::Refused { .. })), "{answer:?}");
}

/// The rules and networks of one runner, which go with this.
struct Wall {
    tag: Tag,
    node: String,
    subnet: Range,
}

impl Wall {
    fn new(node: &str) -> Self {
        let tag = Tag::of(node);
        let third = tag.salt().to_be_bytes();
        let subnet = Range::around(Ipv4Addr::new(198, 19, third[0], third[1]), 28);
        Self { tag, node: node.to_owned(), subnet: Range::around(subnet.first(), 29) }
    }

    fn plan(&self) -> NetworkPlan {
        NetworkPlan { tag: self.tag, node: self.node.clone(), number: 1, subnet: self.subnet, outward: true }
    }

    /// Rules for network 1 and its neighbour, which get so far.
    fn rules(&self, first: Reach, second: Reach) -> FilterOrder {
        let neighbour = Range::around(self.subnet.nth(8), 29);
        let walled = |number, subnet, reach| Walled { number, subnet, reach };
        let networks = vec![walled(1, self.subnet, first), walled(2, neighbour, second)];
        FilterOrder::Replace(Ruleset { tag: self.tag, networks, closed: vec![], admitted: vec![] })
    }

    fn admit(&self, port: u16) -> FilterOrder {
        let admissions = vec![Admission { network: 2, address: Ipv4Addr::new(1, 1, 1, 1), port }];
        FilterOrder::Admit { tag: self.tag, admissions, seconds: 60 }
    }

    /// What others on the host can do: the guard is not theirs.
    fn flush(&self) {
        let table = self.tag.table();
        let flushed = Command::new("nft").args(["delete", "table", "inet", &table]).stderr(Stdio::null()).status();
        assert!(flushed.is_ok());
    }
}

impl Drop for Wall {
    fn drop(&mut self) {
        self.flush();
        let name = self.tag.network(1);
        drop(Command::new("docker").args(["network", "rm", &name]).output());
    }
}

#[tokio::test]
async fn v4n_whoever_takes_over_the_network_process_makes_no_network_of_others() {
    let (_serving, engine) = runner();
    let node = fixture::salt();
    let wall = Wall::new(&node);
    refused(engine.create_network(&wall.plan()).await);
    engine.mark(&node).await.unwrap();
    let elsewhere = |subnet: &str| NetworkPlan { subnet: subnet.parse().unwrap(), ..wall.plan() };
    for plan in [
        NetworkPlan { tag: Tag::of("another"), ..wall.plan() },
        NetworkPlan { node: "another".into(), ..wall.plan() },
        NetworkPlan { number: 0, ..wall.plan() },
        elsewhere("192.168.77.0/29"),
        elsewhere("198.18.0.0/15"),
    ] {
        refused(engine.create_network(&plan).await);
        refused(engine.compare_network(&plan).await);
        refused(engine.start_test(&plan).await);
    }
    for name in ["bridge", "host", &Tag::of("another").network(1)] {
        refused(engine.remove_network(name).await);
    }
    refused(engine.networks("another").await);
    for address in [Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED, wall.plan().gateway()] {
        refused(engine.resolver_sockets(address).await);
    }
    // Control: what the process does when nobody has taken it over.
    engine.create_network(&wall.plan()).await.unwrap();
    let facts = engine.compare_network(&wall.plan()).await.unwrap().unwrap();
    assert_eq!(facts.differences, Vec::<String>::new());
    assert_eq!(engine.networks(&node).await.unwrap(), [wall.plan().name()]);
    engine.filter(&wall.rules(Reach::Public, Reach::Admitted)).await.unwrap();
    let sockets = engine.resolver_sockets(wall.plan().gateway()).await.unwrap();
    assert_eq!(sockets.datagrams.local_addr().unwrap(), sockets.connections.local_addr().unwrap());
    engine.remove_network(&wall.plan().name()).await.unwrap();
}

#[tokio::test]
async fn v4n_whoever_takes_over_the_network_process_opens_no_wall() {
    let fixture = Fixture::load(busybox()).await;
    let (_serving, engine) = runner();
    let wall = Wall::new(&fixture.node);
    engine.mark(&fixture.node).await.unwrap();
    let order = |egress: &str, number: u32| {
        let command = ["/bin/sleep", "600"].map(str::to_owned).to_vec();
        let specification = Specification { command, egress: egress.parse().unwrap(), expose: Some(port()), ..plain() };
        let order = order_for(&Identity::generate(), fixture.image, &fixture.configuration, specification);
        let subnet = Range::around(wall.subnet.nth((number - 1) * 8), 29);
        let outward = Some((u16::try_from(number).unwrap(), subnet.nth(1)));
        Order { attachment: Attachment { outward, shared: None }, ..order }
    };
    let (internet, listed) = (order("internet", 1), order("example.org:443", 2));

    engine.create_network(&wall.plan()).await.unwrap();
    let early = engine.plan(&internet).await;
    assert!(matches!(early, Err(EngineError::InUse { .. })), "its network has no rules: {early:?}");
    engine.filter(&wall.rules(Reach::Public, Reach::Public)).await.unwrap();
    refused(engine.plan(&listed).await);
    engine.filter(&wall.rules(Reach::Public, Reach::Admitted)).await.unwrap();
    let deployment = engine.plan(&internet).await.unwrap().deployment;
    engine.plan(&listed).await.unwrap();

    refused(engine.filter(&wall.rules(Reach::Public, Reach::Public)).await);
    refused(engine.filter(&wall.rules(Reach::Members, Reach::Admitted)).await);
    refused(engine.filter(&FilterOrder::Report(Tag::of("another"))).await);
    refused(engine.filter(&wall.admit(80)).await);
    engine.filter(&wall.admit(443)).await.unwrap();
    refused(engine.plan(&order("internet", 1)).await);

    let id = engine.create(deployment).await.unwrap();
    refused(engine.reach(&id, &[Target::Connection(([1, 1, 1, 1], 443).into())], Duration::ZERO).await.map_err(
        |error| {
            let peer_compute::connector::ConnectError::Engine(error) = error else { panic!("{error}") };
            error
        },
    ));
    wall.flush();
    let bare = engine.start(&id).await;
    assert!(matches!(bare, Err(EngineError::InUse { .. })), "the rules are not there: {bare:?}");
    // Control: with its rules it starts, and its port is reached; no other port is.
    engine.filter(&wall.rules(Reach::Public, Reach::Admitted)).await.unwrap();
    engine.start(&id).await.unwrap();
    assert!(engine.network(&id, "22".parse().unwrap()).await.is_err());
    let network = engine.network(&id, port()).await.unwrap();
    assert!(network.connect("22".parse().unwrap(), Duration::from_secs(5)).await.is_err());
    let closed = network.connect(port(), Duration::from_secs(5)).await.unwrap_err();
    assert_eq!(closed.code(), Code::PortClosed, "nothing listens there");

    engine.remove(&id).await.unwrap();
    engine.remove_network(&wall.plan().name()).await.unwrap();
    fixture.remove().await;
}
