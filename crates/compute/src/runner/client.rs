//! The side of the process that speaks with other machines: an engine whose every call goes to the runner.

use std::{
    io,
    net::{Ipv4Addr, TcpStream as BlockingTcpStream},
    os::{fd::OwnedFd, unix::net::UnixStream as BlockingUnixStream},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, TryStreamExt, stream};
use minicbor::{Decode, Encode};
use peer_proto::{
    deploy::{Limits, RegistryReference},
    id::{DeploymentId, Digest},
    query::{LogLine, Usage},
    unit::Port,
};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpStream, UnixStream},
    time::timeout,
};

use super::{
    channel::{Channel, FRAME_MAX, read, receive_descriptor, write},
    message::{Answer, By, Call, Connect, Json, Kind, Layer, Load, Piece, PlannedMessage, Pulling, Unreachable},
};
use crate::{
    connector::{ConnectError, Connection, Network},
    engine::{
        ContainerFacts, ContainerId, ContainerSummary, Engine, EngineError, EngineFacts, ExportStream, GrowthStream,
        ImageChain, ImageFacts, LogOptions, LogStream, NetworkFacts, NetworkPlan, Planned, PullProgress,
        ResolverSockets, Target, docker::facts_of,
    },
    image::assemble::LayerSource,
    logflood::LogFile,
    order::Order,
    wall::rules::FilterOrder,
};

/// Longest wait for an answer. The runner gives each call a shorter deadline of its own.
const ANSWER: Duration = Duration::from_mins(10);
/// The same of what moves images.
const IMAGE: Duration = Duration::from_hours(6);

/// The engine that the runner holds.
#[derive(Debug, Clone)]
pub struct RunnerEngine {
    channel: Arc<Channel>,
}

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn lost(error: io::Error) -> EngineError {
    EngineError::Unavailable { reason: format!("the runner process: {error}") }
}

impl RunnerEngine {
    /// Speaks over this end of the pair.
    pub fn new(channel: Arc<Channel>) -> Self {
        Self { channel }
    }

    async fn begin(&self, call: &Call) -> Result<UnixStream, EngineError> {
        let mut stream = self.channel.open().await.map_err(lost)?;
        write(&mut stream, call).await.map_err(lost)?;
        Ok(stream)
    }

    async fn call<T>(&self, call: Call) -> Result<T, EngineError>
    where
        T: Encode<()> + for<'b> Decode<'b, ()>,
    {
        let mut stream = self.begin(&call).await?;
        answer(&mut stream, ANSWER).await
    }

    /// A call whose answer is a stream.
    fn stream<T>(&self, call: Call) -> stream::BoxStream<'static, Result<T, EngineError>>
    where
        T: Encode<()> + for<'b> Decode<'b, ()> + Send + 'static,
    {
        let engine = self.clone();
        let begun = async move { engine.begin(&call).await };
        stream::once(begun)
            .flat_map(|begun| match begun {
                Ok(stream) => stream::unfold(Some(stream), |stream| async move {
                    let mut stream = stream?;
                    match read::<Answer<Option<T>>>(&mut stream, FRAME_MAX).await {
                        Ok(Ok(Some(item))) => Some((Ok(item), Some(stream))),
                        Ok(Ok(None)) => None,
                        Ok(Err(error)) => Some((Err(error), None)),
                        Err(error) => Some((Err(lost(error)), None)),
                    }
                })
                .boxed(),
                Err(error) => stream::once(async { Err(error) }).boxed(),
            })
            .boxed()
    }

    async fn send_image(&self, stream: &mut UnixStream, layers: &[LayerSource]) -> io::Result<()> {
        let mut sent = std::collections::HashSet::new();
        for layer in layers.iter().filter(|layer| layer.file.is_some()) {
            if sent.insert(layer.layer) {
                let mut pieces = layer.read();
                while let Some(piece) = pieces.try_next().await? {
                    stream.write_all(&piece).await?;
                }
            }
        }
        Ok(())
    }
}

async fn answer<T>(stream: &mut UnixStream, within: Duration) -> Result<T, EngineError>
where
    T: Encode<()> + for<'b> Decode<'b, ()>,
{
    let answer = timeout(within, read::<Answer<T>>(stream, FRAME_MAX)).await;
    answer.map_err(|_| EngineError::TimedOut { operation: "answer of the runner".into() })?.map_err(lost)?
}

fn parsed<T: serde::de::DeserializeOwned>(json: &Json) -> Result<T, EngineError> {
    serde_json::from_slice(&json.0).map_err(|error| EngineError::failed(&error.to_string()))
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Engine for RunnerEngine {
    async fn facts(&self) -> Result<EngineFacts, EngineError> {
        self.call(Call::Facts).await
    }

    async fn images(&self) -> Result<Vec<ImageChain>, EngineError> {
        self.call(Call::Images).await
    }

    async fn has_image(&self, image: Digest) -> Result<Option<ImageFacts>, EngineError> {
        self.call(Call::HasImage(image)).await
    }

    async fn load(&self, configuration: &[u8], layers: &[LayerSource]) -> Result<(), EngineError> {
        let known = layers.iter().map(LayerSource::size).map(|(digest, size)| Layer { digest, size }).collect();
        let call = Call::Load(Load { configuration: configuration.to_vec(), layers: known });
        let mut stream = self.begin(&call).await?;
        let sent = timeout(IMAGE, self.send_image(&mut stream, layers)).await;
        let sent = sent.map_err(|_| EngineError::TimedOut { operation: "load image".into() })?;
        // Whoever refuses it does not wait for all of it: why, stands in his answer.
        match (answer(&mut stream, IMAGE).await, sent) {
            (Err(EngineError::Unavailable { .. }), Err(error)) => Err(lost(error)),
            (answer, _) => answer,
        }
    }

    fn export(&self, name: &str) -> ExportStream {
        self.stream::<Piece>(Call::Export(name.to_owned())).map_ok(|piece| piece.0.into()).boxed()
    }

    async fn resolve(&self, name: &str) -> Result<Digest, EngineError> {
        self.call(Call::Resolve(name.to_owned())).await
    }

    async fn pull(
        &self,
        reference: &RegistryReference,
        size_max: u64,
        progress: &mut (dyn FnMut(PullProgress) + Send),
    ) -> Result<Digest, EngineError> {
        let mut steps = self.stream(Call::Pull(reference.clone(), size_max));
        while let Some(step) = steps.try_next().await? {
            match step {
                Pulling::Progress(state) => progress(state),
                Pulling::Done(digest) => return Ok(digest),
            }
        }
        Err(EngineError::failed("the pull ended without an image"))
    }

    async fn remove_image(&self, image: Digest) -> Result<(), EngineError> {
        self.call(Call::RemoveImage(image)).await
    }

    async fn mark(&self, mark: &str) -> Result<(), EngineError> {
        self.call(Call::Mark(mark.to_owned())).await
    }

    async fn plan(&self, order: &Order) -> Result<Planned, EngineError> {
        let planned: PlannedMessage = self.call(Call::Plan(Box::new(order.clone()))).await?;
        Ok(Planned { deployment: planned.deployment, told: parsed(&planned.told)? })
    }

    async fn create(&self, deployment: DeploymentId) -> Result<ContainerId, EngineError> {
        self.call(Call::Create(deployment)).await
    }

    async fn inspect(&self, name: &str) -> Result<Option<ContainerFacts>, EngineError> {
        let report: Option<Json> = self.call(Call::Inspect(name.to_owned())).await?;
        report.map(|report| facts_of(parsed(&report)?)).transpose()
    }

    async fn start(&self, id: &ContainerId) -> Result<(), EngineError> {
        self.call(Call::Start(id.clone())).await
    }

    async fn began(&self, id: &ContainerId) -> Result<ContainerFacts, EngineError> {
        let report: Json = self.call(Call::Began(id.clone())).await?;
        facts_of(parsed(&report)?)
    }

    async fn stop(&self, id: &ContainerId, grace: Duration) -> Result<(), EngineError> {
        let mut stream = self.begin(&Call::Stop(id.clone(), milliseconds(grace))).await?;
        answer(&mut stream, ANSWER + grace).await
    }

    async fn kill(&self, id: &ContainerId) -> Result<(), EngineError> {
        self.call(Call::Kill(id.clone())).await
    }

    async fn pause(&self, id: &ContainerId) -> Result<(), EngineError> {
        self.call(Call::Pause(id.clone())).await
    }

    async fn unpause(&self, id: &ContainerId) -> Result<(), EngineError> {
        self.call(Call::Unpause(id.clone())).await
    }

    async fn remove(&self, id: &ContainerId) -> Result<(), EngineError> {
        self.call(Call::Remove(id.clone())).await
    }

    async fn wait(&self, id: &ContainerId, within: Duration) -> Result<Option<i64>, EngineError> {
        let mut stream = self.begin(&Call::Wait(id.clone(), milliseconds(within))).await?;
        answer(&mut stream, ANSWER + within).await
    }

    async fn list(&self, node: &str) -> Result<Vec<ContainerSummary>, EngineError> {
        self.call(Call::List(node.to_owned())).await
    }

    async fn networks(&self, node: &str) -> Result<Vec<String>, EngineError> {
        self.call(Call::Networks(node.to_owned())).await
    }

    async fn compare_network(&self, plan: &NetworkPlan) -> Result<Option<NetworkFacts>, EngineError> {
        self.call(Call::CompareNetwork(plan.clone())).await
    }

    async fn create_network(&self, plan: &NetworkPlan) -> Result<(), EngineError> {
        self.call(Call::CreateNetwork(plan.clone())).await
    }

    async fn remove_network(&self, name: &str) -> Result<(), EngineError> {
        self.call(Call::RemoveNetwork(name.to_owned())).await
    }

    async fn start_test(&self, network: &NetworkPlan) -> Result<ContainerId, EngineError> {
        self.call(Call::StartTest(network.clone())).await
    }

    async fn filter(&self, order: &FilterOrder) -> Result<String, EngineError> {
        self.call(Call::Filter(order.clone())).await
    }

    async fn resolver_sockets(&self, address: Ipv4Addr) -> Result<ResolverSockets, EngineError> {
        let mut stream = self.begin(&Call::ResolverSockets(address)).await?;
        answer::<()>(&mut stream, ANSWER).await?;
        let received = async {
            let datagrams = receive_descriptor(&stream).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
            let connections = receive_descriptor(&stream).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
            Ok(ResolverSockets { datagrams: datagrams.into(), connections: connections.into() })
        };
        received.await.map_err(lost)
    }

    async fn reach(&self, id: &ContainerId, targets: &[Target], within: Duration) -> Result<Vec<bool>, ConnectError> {
        let mut stream = self.begin(&Call::Reach(id.clone(), targets.to_vec(), milliseconds(within))).await?;
        Ok(answer::<Result<Vec<bool>, Unreachable>>(&mut stream, ANSWER).await??)
    }

    fn logs(&self, id: &ContainerId, options: &LogOptions) -> LogStream {
        self.stream::<LogLine>(Call::Logs(id.clone(), *options))
    }

    fn log_growth(&self, id: &ContainerId) -> GrowthStream {
        self.stream::<LogFile>(Call::LogGrowth(id.clone()))
    }

    async fn usage(&self, id: &ContainerId, limits: &Limits) -> Result<Usage, EngineError> {
        self.call(Call::Usage(id.clone(), limits.clone())).await
    }

    async fn network(&self, id: &ContainerId, port: Port) -> Result<Network, ConnectError> {
        let mut stream = self.begin(&Call::Network(id.clone(), port)).await?;
        let by = answer::<Result<By, Unreachable>>(&mut stream, ANSWER).await??;
        Ok(Network::Beyond(Remote { channel: Arc::new(Channel::of(stream)), by }))
    }
}

/// A container's network that the runner keeps open as long as this lives.
#[derive(Debug, Clone)]
pub struct Remote {
    channel: Arc<Channel>,
    by: By,
}

impl Remote {
    pub(crate) fn is_forwarded(&self) -> bool {
        self.by == By::Forwarding
    }

    /// Has the runner connect to the port, and takes over the connection.
    pub(crate) async fn connect(&self, port: Port, within: Duration) -> Result<Connection, ConnectError> {
        let connected = async {
            let mut stream = self.channel.open().await.map_err(ConnectError::System)?;
            let connect = Connect { port, within: milliseconds(within) };
            write(&mut stream, &connect).await.map_err(ConnectError::System)?;
            let kind =
                read::<Result<Kind, Unreachable>>(&mut stream, FRAME_MAX).await.map_err(ConnectError::System)??;
            let descriptor = receive_descriptor(&stream).await.map_err(ConnectError::System)?;
            let descriptor = descriptor.ok_or_else(|| ConnectError::System(io::ErrorKind::UnexpectedEof.into()))?;
            connection(kind, descriptor).map_err(ConnectError::System)
        };
        let late = Duration::from_secs(2);
        timeout(within + late, connected).await.map_err(|_| ConnectError::TimedOut { port })?
    }
}

/// What was sent is not blocking, as every socket of the runner.
fn connection(kind: Kind, descriptor: OwnedFd) -> io::Result<Connection> {
    Ok(match kind {
        Kind::Tcp => Connection::Tcp(TcpStream::from_std(BlockingTcpStream::from(descriptor))?),
        Kind::Unix => Connection::Unix(UnixStream::from_std(BlockingUnixStream::from(descriptor))?),
    })
}
