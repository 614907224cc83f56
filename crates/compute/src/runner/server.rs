//! The runner's side: takes calls and carries them out on the engine. Whoever calls is not trusted.
//!
//! A call may concern only containers of ours, by their mark and their name; it cannot say how one is made. Calls are
//! bounded in number and in size, and each ends when its connection does.

use std::{
    collections::HashMap,
    io,
    net::Ipv4Addr,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use minicbor::Encode;
use peer_proto::{id::DeploymentId, unit::Port};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::timeout,
};

use super::{
    channel::{Channel, read, send_descriptor, write},
    guard::Guard,
    message::{Answer, By, CALL_MAX, Call, Connect, Json, Kind, Load, Piece, PlannedMessage, Pulling, Unreachable},
};
use crate::{
    connector::{ConnectError, Connection, Network},
    engine::{ContainerFacts, ContainerId, Engine, EngineError, Target, docker::DockerEngine},
    image::assemble::{Part, parts},
    order::Order,
    profile::{self, forwarder::forwarder_of},
    wall::{self, probe, rules::Tag},
};

/// Calls under way at one time; each running container has two or three.
const CALLS_MAX: usize = 1024;
/// Connections that one network may be making at one time.
const CONNECTS_MAX: usize = 128;
/// Longest wait for the first words of a call.
const FIRST: Duration = Duration::from_secs(10);
/// Longest time that one connection may take to be made.
const CONNECT: Duration = Duration::from_mins(1);
/// Longest grace and longest wait that a caller may ask for.
const PATIENCE: Duration = Duration::from_hours(1);
/// Addresses that the wall's test may try at a time: a host has some dozens of its own.
const TARGETS_MAX: usize = 4096;
/// Containers that are known to be ours; forgotten together when they become too many.
const KNOWN_MAX: usize = 4096;
const CHUNK: u64 = 256 << 10;

struct Server {
    engine: DockerEngine,
    /// What marks containers of ours: the first that was said, for good.
    mark: OnceLock<String>,
    /// Containers that are ours, with the deployment if they are no forwarders.
    known: Mutex<HashMap<ContainerId, Option<DeploymentId>>>,
    guard: Guard,
}

/// Serves until the other side is gone. What runs in the engine goes on.
pub async fn serve(engine: DockerEngine, wall: wall::Options, channel: &Channel) -> io::Result<()> {
    let (mark, known, guard) = (OnceLock::new(), Mutex::default(), Guard::new(wall));
    let server = Arc::new(Server { engine, mark, known, guard });
    let permits = Arc::new(Semaphore::new(CALLS_MAX));
    let mut calls = JoinSet::new();
    while let Some(stream) = channel.accept().await? {
        while calls.try_join_next().is_some() {}
        let Ok(permit) = permits.clone().acquire_owned().await else { break };
        let server = server.clone();
        calls.spawn(async move {
            if let Err(error) = server.take(stream).await {
                tracing::debug!(%error, "a call was not carried out");
            }
            drop(permit);
        });
    }
    Ok(())
}

impl Server {
    async fn take(&self, mut stream: UnixStream) -> io::Result<()> {
        let call = timeout(FIRST, read::<Call>(&mut stream, CALL_MAX)).await;
        let call = call.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        match call {
            Call::Network(id, port) => return self.network(stream, &id, port).await,
            Call::ResolverSockets(address) => return self.resolver_sockets(stream, address).await,
            _ => {}
        }
        let (mut from, mut to) = stream.into_split();
        if let Call::Load(load) = call {
            let loaded = self.load(&load, from).await;
            return write(&mut to, &loaded).await;
        }
        if matches!(call, Call::Filter(_) | Call::CreateNetwork(_)) {
            // Whoever hangs up in the middle must not end the program that holds the wall.
            return self.carry_out(call, &mut to).await;
        }
        let mut nothing = [0];
        tokio::select! {
            done = self.carry_out(call, &mut to) => done,
            // Nothing more comes on this connection: it has been closed.
            _ = from.read(&mut nothing) => Ok(()),
        }
    }

    async fn carry_out(&self, call: Call, to: &mut OwnedWriteHalf) -> io::Result<()> {
        let engine = &self.engine;
        match call {
            Call::Facts => write(to, &engine.facts().await).await,
            Call::Images => write(to, &engine.images().await).await,
            Call::HasImage(image) => write(to, &engine.has_image(image).await).await,
            Call::Export(name) => send(to, engine.export(&name).map_ok(|piece| Piece(piece.to_vec()))).await,
            Call::Resolve(name) => write(to, &engine.resolve(&name).await).await,
            Call::Pull(reference, size_max) => {
                let (progress, steps) = mpsc::channel(16);
                let told = |state| drop(progress.try_send(Ok(Pulling::Progress(state))));
                let pull = async move {
                    let mut told = told;
                    engine.pull(&reference, size_max, &mut told).await.map(Pulling::Done)
                };
                pulled(to, pull, steps).await
            }
            Call::RemoveImage(image) => write(to, &engine.remove_image(image).await).await,
            Call::Mark(mark) => write(to, &self.pin(&mark)).await,
            Call::List(mark) => {
                let listed = async {
                    self.pin(&mark)?;
                    engine.list(&mark).await
                };
                write(to, &listed.await).await
            }
            Call::Networks(mark) => {
                let listed = async {
                    self.pin(&mark)?;
                    engine.networks(&mark).await
                };
                write(to, &listed.await).await
            }
            Call::CompareNetwork(..)
            | Call::CreateNetwork(..)
            | Call::RemoveNetwork(..)
            | Call::StartTest(..)
            | Call::Filter(..)
            | Call::Reach(..) => self.on_network(call, to).await,
            Call::Logs(id, options) => match self.own(&id).await {
                Ok(_) => send(to, engine.logs(&id, &options)).await,
                Err(error) => write(to, &Answer::<()>::Err(error)).await,
            },
            Call::LogGrowth(id) => match self.own(&id).await {
                Ok(_) => send(to, engine.log_growth(&id)).await,
                Err(error) => write(to, &Answer::<()>::Err(error)).await,
            },
            other => self.on_container(other, to).await,
        }
    }

    async fn on_container(&self, call: Call, to: &mut OwnedWriteHalf) -> io::Result<()> {
        let engine = &self.engine;
        let patience = |asked| Duration::from_millis(asked).min(PATIENCE);
        match call {
            Call::Plan(order) => write(to, &self.plan(*order).await).await,
            Call::Create(deployment) => write(to, &engine.create(deployment).await).await,
            Call::Inspect(name) => write(to, &self.inspect(&name).await).await,
            Call::Start(id) => write(to, &self.start(&id).await).await,
            Call::Began(id) => {
                let began = async { json(&engine.began(&id).await?.report) };
                write(to, &self.on(&id, began).await).await
            }
            Call::Stop(id, grace) => write(to, &self.on(&id, engine.stop(&id, patience(grace))).await).await,
            Call::Kill(id) => write(to, &self.on(&id, engine.kill(&id)).await).await,
            Call::Pause(id) => write(to, &self.on(&id, engine.pause(&id)).await).await,
            Call::Unpause(id) => write(to, &self.on(&id, engine.unpause(&id)).await).await,
            Call::Remove(id) => write(to, &self.on(&id, engine.remove(&id)).await).await,
            Call::Wait(id, within) => write(to, &self.on(&id, engine.wait(&id, patience(within))).await).await,
            Call::Usage(id, limits) => write(to, &self.on(&id, engine.usage(&id, &limits)).await).await,
            other => Err(io::Error::other(format!("{other:?} does not belong here"))),
        }
    }

    async fn on_network(&self, call: Call, to: &mut OwnedWriteHalf) -> io::Result<()> {
        let (engine, guard) = (&self.engine, &self.guard);
        let mark = match self.mark() {
            Ok(mark) => mark,
            Err(error) => return write(to, &Answer::<()>::Err(error)).await,
        };
        let tag = Tag::of(mark);
        match call {
            Call::CompareNetwork(plan) => {
                let compared = async {
                    guard.judge_network(mark, &plan)?;
                    engine.compare_network(&plan).await
                };
                write(to, &compared.await).await
            }
            Call::CreateNetwork(plan) => write(to, &guard.create_network(engine, mark, &plan).await).await,
            Call::RemoveNetwork(name) => write(to, &guard.remove_network(engine, tag, &name).await).await,
            Call::StartTest(plan) => write(to, &guard.start_test(engine, mark, &plan).await).await,
            Call::Filter(order) => write(to, &guard.filter(engine, tag, order).await).await,
            Call::Reach(id, targets, within) => write(to, &self.reach(&id, &targets, within).await).await,
            other => Err(io::Error::other(format!("{other:?} does not belong here"))),
        }
    }

    async fn plan(&self, mut order: Order) -> Answer<PlannedMessage> {
        self.mark()?.clone_into(&mut order.node);
        let verified = order.verify().map_err(EngineError::Problem)?;
        self.guard.note(verified.deployment(), verified.specification(), order.attachment).await?;
        let planned = self.engine.plan(&order).await?;
        Ok(PlannedMessage { deployment: planned.deployment, told: json(&planned.told)? })
    }

    /// Starts what was planned, and nothing else: least of all a container in a network without its rules.
    async fn start(&self, id: &ContainerId) -> Answer<()> {
        let deployment = self.own(id).await?.ok_or(EngineError::NotPlanned)?;
        self.guard.may_start(&self.engine, deployment, Tag::of(self.mark()?)).await?;
        self.engine.start(id).await
    }

    /// Only the wall's test is tried from inside.
    async fn reach(&self, id: &ContainerId, targets: &[Target], within: u64) -> Answer<Result<Vec<bool>, Unreachable>> {
        if !self.guard.is_test(id) || targets.len() > TARGETS_MAX {
            return Err(EngineError::Refused { message: "it is not the container of the wall's test".into() });
        }
        let within = Duration::from_millis(within).min(CONNECT);
        Ok(self.engine.reach(id, targets, within).await.map_err(Unreachable::from))
    }

    async fn resolver_sockets(&self, mut stream: UnixStream, address: Ipv4Addr) -> io::Result<()> {
        match self.guard.resolver_sockets(&self.engine, address).await {
            Err(error) => write(&mut stream, &Answer::<()>::Err(error)).await,
            Ok(sockets) => {
                write(&mut stream, &Answer::Ok(())).await?;
                send_descriptor(&stream, sockets.datagrams.as_fd()).await?;
                send_descriptor(&stream, sockets.connections.as_fd()).await
            }
        }
    }

    /// The mark is said once; a caller who says another one is refused. Containers of the wall's test have their own.
    fn pin(&self, mark: &str) -> Result<(), EngineError> {
        if self.mark.get().is_some_and(|ours| probe::mark(ours) == mark) {
            return Ok(());
        }
        if !mark.is_empty() && mark.len() <= 128 && self.mark.get_or_init(|| mark.to_owned()) == mark {
            Ok(())
        } else {
            Err(EngineError::Refused { message: "another mark is in use".into() })
        }
    }

    fn mark(&self) -> Result<&str, EngineError> {
        self.mark.get().map(String::as_str).ok_or_else(|| EngineError::Refused { message: "no mark was said".into() })
    }

    fn is_ours(&self, facts: &ContainerFacts) -> Result<bool, EngineError> {
        let ours = self.mark()?;
        let marked =
            facts.labels.get(profile::NODE_LABEL).is_some_and(|mark| mark == ours || *mark == probe::mark(ours));
        Ok(marked && (profile::deployment_of(&facts.name).is_some() || forwarder_of(&facts.name).is_some()))
    }

    /// Nothing is done to a container that is not ours, which looks like one that does not exist. Gives the deployment
    /// that it is the container of, if it is no forwarder.
    async fn own(&self, id: &ContainerId) -> Result<Option<DeploymentId>, EngineError> {
        if let Some(known) = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(id) {
            return Ok(*known);
        }
        let absent = || EngineError::NoSuchContainer { container: id.to_string() };
        let facts = self.engine.inspect(id.as_str()).await?.ok_or_else(absent)?;
        if facts.id != *id || !self.is_ours(&facts)? {
            return Err(absent());
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= KNOWN_MAX {
            known.clear();
        }
        let deployment = profile::deployment_of(&facts.name);
        known.insert(id.clone(), deployment);
        Ok(deployment)
    }

    async fn on<T>(&self, id: &ContainerId, work: impl Future<Output = Answer<T>>) -> Answer<T> {
        self.own(id).await?;
        work.await
    }

    async fn inspect(&self, name: &str) -> Answer<Option<Json>> {
        let Some(facts) = self.engine.inspect(name).await? else { return Ok(None) };
        if self.is_ours(&facts)? {
            return json(&facts.report).map(Some);
        }
        if (profile::deployment_of(&facts.name).is_some() || forwarder_of(&facts.name).is_some()) && facts.name == name
        {
            let message = format!("a container called {name} is there that is not of this machine; remove it");
            return Err(EngineError::Refused { message });
        }
        Ok(None)
    }

    /// The archive is put together here, so that it can name no tag whatever the caller says.
    async fn load(&self, load: &Load, from: OwnedReadHalf) -> Answer<()> {
        let layers: Vec<_> = load.layers.iter().map(|layer| (layer.digest, layer.size)).collect();
        let invalid = |error: io::Error| EngineError::InvalidImage { message: error.to_string() };
        let (parts, size) = parts(&load.configuration, &layers).map_err(invalid)?;
        let pieces = stream::try_unfold((parts.into_iter(), from, 0), |(mut parts, mut from, mut left)| async move {
            if left == 0 {
                match parts.next() {
                    None => return Ok(None),
                    Some(Part::Bytes(bytes)) => return Ok(Some((bytes, (parts, from, 0)))),
                    Some(Part::Layer { size, .. }) => left = size,
                }
            }
            let mut piece = Vec::new();
            let read = (&mut from).take(left.min(CHUNK)).read_to_end(&mut piece).await? as u64;
            if read == 0 && left > 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(Some((Bytes::from(piece), (parts, from, left - read))))
        });
        self.engine.load_archive(pieces.boxed(), size).await
    }

    async fn open_network(&self, id: &ContainerId, port: Port) -> Answer<Result<Network, ConnectError>> {
        let absent = || EngineError::NoSuchContainer { container: id.to_string() };
        let deployment = self.own(id).await?.ok_or_else(absent)?;
        if !self.guard.may_reach(&deployment, port) {
            return Err(EngineError::Refused { message: format!("port {port} is not the one that was signed") });
        }
        Ok(self.engine.network(id, port).await)
    }

    /// Serves connections to one port of a container, until whoever asked hangs up.
    async fn network(&self, mut stream: UnixStream, id: &ContainerId, port: Port) -> io::Result<()> {
        let network = match self.open_network(id, port).await {
            Ok(Ok(network)) => network,
            Ok(Err(error)) => {
                let unreachable = Err::<By, _>(Unreachable::from(error));
                return write(&mut stream, &Answer::Ok(unreachable)).await;
            }
            Err(error) => return write(&mut stream, &Answer::<Result<By, Unreachable>>::Err(error)).await,
        };
        let by = if network.is_forwarded() { By::Forwarding } else { By::Entering };
        write(&mut stream, &Answer::Ok(Ok::<By, Unreachable>(by))).await?;
        let (channel, permits) = (Channel::of(stream), Arc::new(Semaphore::new(CONNECTS_MAX)));
        let mut connects = JoinSet::new();
        while let Some(stream) = channel.accept().await? {
            while connects.try_join_next().is_some() {}
            let Ok(permit) = permits.clone().acquire_owned().await else { break };
            let network = network.clone();
            connects.spawn(async move {
                drop(connect(stream, &network, port).await);
                drop(permit);
            });
        }
        Ok(())
    }
}

async fn connect(mut stream: UnixStream, network: &Network, only: Port) -> io::Result<()> {
    let asked = timeout(FIRST, read::<Connect>(&mut stream, CALL_MAX)).await;
    let Connect { port, within } = asked.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    if port != only {
        return write(&mut stream, &Err::<Kind, _>(Unreachable::Closed(port))).await;
    }
    match network.connect(port, Duration::from_millis(within).min(CONNECT)).await {
        Ok(connection) => {
            let (kind, descriptor): (_, BorrowedFd<'_>) = match &connection {
                Connection::Tcp(stream) => (Kind::Tcp, stream.as_fd()),
                Connection::Unix(stream) => (Kind::Unix, stream.as_fd()),
            };
            write(&mut stream, &Ok::<Kind, Unreachable>(kind)).await?;
            send_descriptor(&stream, descriptor).await
        }
        Err(error) => write(&mut stream, &Err::<Kind, _>(Unreachable::from(error))).await,
    }
}

fn json(value: &impl serde::Serialize) -> Answer<Json> {
    serde_json::to_vec(value).map(Json).map_err(|error| EngineError::failed(&error.to_string()))
}

/// Sends a stream to its end, or to its first failure.
async fn send<T: Encode<()>>(to: &mut OwnedWriteHalf, items: impl Stream<Item = Answer<T>> + Unpin) -> io::Result<()> {
    let mut items = items;
    loop {
        match items.next().await {
            Some(Ok(item)) => write(to, &Answer::Ok(Some(item))).await?,
            Some(Err(error)) => return write(to, &Answer::<Option<T>>::Err(error)).await,
            None => {
                write(to, &Answer::<Option<T>>::Ok(None)).await?;
                return to.shutdown().await;
            }
        }
    }
}

/// Sends how far a pull is while it goes on, and its end.
async fn pulled(
    to: &mut OwnedWriteHalf,
    pull: impl Future<Output = Answer<Pulling>>,
    mut steps: mpsc::Receiver<Answer<Pulling>>,
) -> io::Result<()> {
    tokio::pin!(pull);
    let end = loop {
        tokio::select! {
            end = &mut pull => break end,
            Some(step) = steps.recv() => write(to, &step.map(Some)).await?,
        }
    };
    write(to, &end.map(Some)).await
}
