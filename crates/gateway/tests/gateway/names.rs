//! Names: whose they are, when they begin, and when they end (V8).

use peer_gateway::providers;
use peer_gateway::settings::Keys;
use peer_net::{OpenError, Traffic};
use peer_proto::id::{DeploymentId, Label};
use peer_proto::identity::Identity;
use peer_proto::tunnel::{LeaseReply, LeaseRequest};
use tokio::io::AsyncReadExt;

use crate::world::{Answer, Origin, Provider, World, eventually, start_gateway, within};

#[tokio::test(flavor = "multi_thread")]
async fn v8_second_provider_can_neither_claim_nor_unregister_a_name() {
    let (world, mine, other) =
        (World::start().await, Origin::echo().await, Origin::fixed("HTTP/1.1 200 OK\r\n\r\n").await);
    let mut owner = world.provider().await;
    let deployment = DeploymentId::random();
    let host = owner.expose(deployment, mine.address).await;
    assert_eq!(host, format!("{}.peer.localhost", Label::derive(&owner.identity.peer_id(), &deployment)));
    let mut thief = world.provider().await;
    assert_ne!(thief.expose(deployment, other.address).await, host);
    thief.release(deployment).await;
    assert!(world.get(&host, "/").await.text().starts_with("GET / "));
    drop(thief);
    assert!(world.get(&host, "/").await.text().starts_with("GET / "));
}

#[tokio::test(flavor = "multi_thread")]
async fn v8_stop_ends_a_name_at_once() {
    let (world, origin) = (World::start().await, Origin::echo().await);
    let mut provider = world.provider().await;
    let deployment = DeploymentId::random();
    let host = provider.expose(deployment, origin.address).await;
    assert_eq!(world.get(&host, "/").await.status, 200);
    provider.release(deployment).await;
    let answer = world.get(&host, "/").await;
    assert_eq!((answer.status, answer.code()), (410, "stopped"));
    assert_eq!(provider.expose(deployment, origin.address).await, host);
    assert_eq!(world.get(&host, "/").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn v8_stop_breaks_off_answers_in_progress() {
    let world = World::start().await;
    let origin = Origin::start(async |mut stream: tokio::net::TcpStream| {
        use tokio::io::AsyncWriteExt;
        crate::world::read_request(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n").await.unwrap();
        std::future::pending::<()>().await;
    })
    .await;
    let mut provider = world.provider().await;
    let deployment = DeploymentId::random();
    let host = provider.expose(deployment, origin.address).await;
    let mut stream = world.visit(&host).await;
    tokio::io::AsyncWriteExt::write_all(&mut stream, format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes())
        .await
        .unwrap();
    within(Answer::read_head(&mut stream)).await;
    provider.release(deployment).await;
    let mut rest = Vec::new();
    drop(within(stream.read_to_end(&mut rest)).await);
    assert!(!rest.ends_with(b"0\r\n\r\n"), "{rest:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn v8_loss_of_the_tunnel_ends_a_name() {
    let (world, origin) = (World::start().await, Origin::echo().await);
    let (provider, host) = world.serve(origin.address).await;
    provider.network.clone().shutdown().await;
    eventually("the name ends with its provider", async || world.gateway.levels().leases == 0).await;
    let answer = world.get(&host, "/").await;
    assert_eq!((answer.status, answer.code()), (503, "provider_offline"));
    assert!(answer.field("retry-after").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn v8_denied_provider_loses_names_and_connection_at_once() {
    let (world, origin) = (World::start().await, Origin::echo().await);
    let (mut provider, host) = world.serve(origin.address).await;
    let denied = providers::Reference::Peer(provider.identity.peer_id());
    providers::deny(world.directory.path(), &denied).unwrap();
    assert!(provider.lost_lease_stream().await);
    eventually("the name ends", async || world.gateway.levels().leases == 0).await;
    assert_eq!(world.get(&host, "/").await.status, 503);
    let gateway = world.gateway.info().peer_id.parse().unwrap();
    let refused = provider.network.open(gateway, peer_gateway::lease_streams::LEASE, Traffic::Control).await;
    assert!(refused.is_err(), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn v1_provider_that_is_not_allowed_is_refused() {
    let world = World::start().await;
    let allowed = world.provider().await;
    let gateway = world.gateway.info().peer_id.parse().unwrap();
    // An allowed provider is offered leases and nothing else.
    let outcome = allowed.network.open(gateway, peer_gateway::pool::TUNNEL, Traffic::Control).await;
    assert!(matches!(outcome, Err(OpenError::NotOffered { .. })), "{outcome:?}");
    let stranger = Identity::generate();
    let starting = tokio::time::timeout(std::time::Duration::from_secs(2), Provider::start(stranger, &world.gateway));
    assert!(starting.await.is_err(), "a stranger got a lease stream");
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_of_one_provider_are_bounded() {
    let world = World::with(Keys { leases_per_provider_max: Some(2), ..Keys::default() }).await;
    let mut provider = world.provider().await;
    for _ in 0..2 {
        let reply = provider.request(LeaseRequest::Register(DeploymentId::random())).await;
        assert!(matches!(reply, LeaseReply::Live(_)));
    }
    let reply = provider.request(LeaseRequest::Register(DeploymentId::random())).await;
    assert!(matches!(reply, LeaseReply::Refused(_)), "{reply:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn gateway_restart_heals() {
    let (world, origin) = (World::start().await, Origin::echo().await);
    let mut provider = world.provider().await;
    let deployment = DeploymentId::random();
    let host = provider.expose(deployment, origin.address).await;
    let before = world.gateway.info().clone();
    let authority = std::fs::read(before.ca_certificate.as_ref().unwrap()).unwrap();
    let World { gateway, directory } = world;
    gateway.shutdown().await;
    let listen = before.addresses[0].split_once("/p2p/").unwrap().0.parse().unwrap();
    let gateway = start_gateway(directory.path(), Keys { listen: Some(listen), ..Keys::default() }).await;
    let world = World { gateway, directory };
    assert_eq!(world.gateway.info().peer_id, before.peer_id);
    assert_eq!(std::fs::read(before.ca_certificate.as_ref().unwrap()).unwrap(), authority);
    assert_eq!(world.get(&host, "/").await.status, 404);
    provider.connect(&world.gateway).await;
    assert_eq!(provider.expose(deployment, origin.address).await, host);
    assert_eq!(world.get(&host, "/").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn v7_shutdown_lets_an_answer_in_progress_end() {
    let world = World::start().await;
    let origin = Origin::start(async |mut stream: tokio::net::TcpStream| {
        use tokio::io::AsyncWriteExt;
        crate::world::read_request(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc").await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        stream.write_all(b"def").await.unwrap();
    })
    .await;
    let (_provider, host) = world.serve(origin.address).await;
    let mut stream = world.visit(&host).await;
    tokio::io::AsyncWriteExt::write_all(&mut stream, format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes())
        .await
        .unwrap();
    within(Answer::read_head(&mut stream)).await;
    let ((), body) = tokio::join!(within(world.gateway.shutdown()), async {
        let mut body = Vec::new();
        drop(within(stream.read_to_end(&mut body)).await);
        body
    });
    assert_eq!(body, b"abcdef");
}
