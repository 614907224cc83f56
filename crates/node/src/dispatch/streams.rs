//! Layers, logs and forwarded ports, provider's side.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use peer_compute::connector::Connection;
use peer_compute::engine::{LogOptions, LogStream};
use peer_compute::room::Room;
use peer_compute::runner::RunnerEngine;
use peer_net::exchange::{Deadline, ExchangeError, read_frame, write_frame};
use peer_net::{InboundStream, Stream};
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::deploy::{LayerHeader, LayerReply};
use peer_proto::frame::{CONTROL_FRAME_MAX, TUNNEL_FRAME_MAX};
use peer_proto::query::{ForwardHeader, LogFrame, LogLine, LogsQuery, StreamReply};

use crate::bandwidth::{Pace, Paced};
use crate::daemon::Daemon;
use crate::node::Node;
use crate::withdrawal;

/// How long one frame may take.
const FRAME_DEADLINE: Duration = Duration::from_secs(20);
/// How long a layer's sender may pause.
const LAYER_PATIENCE: Duration = Duration::from_mins(1);
/// How long connecting to a container's port may take.
pub(crate) const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Bytes of a layer that are read at one time.
const LAYER_CHUNK: usize = 128 * 1024;
/// Most lines, and most bytes of text, in one frame of a log.
const LOG_LINES: usize = 256;
const LOG_BYTES: usize = 64 * 1024;

fn room<'a>(daemon: &Daemon, node: &'a Node, peer: PeerId) -> Result<&'a Room<RunnerEngine>, Problem> {
    if !daemon.trust.snapshot().peers.contains_key(&peer) {
        return Err(Problem::new(Code::UntrustedPeer, "this machine has not added you as a peer"));
    }
    node.room.as_ref().ok_or_else(|| Problem::new(Code::NotGranted, "this machine runs no containers"))
}

/// What is told when a permission ends while it is used.
pub(super) fn withdrawn() -> Problem {
    let message = "your permission to deploy on this machine has ended; ask its owner to run: peerctl peers allow YOU --allow deploy";
    Problem::new(Code::NotGranted, message)
}

pub(super) async fn layer(daemon: &Arc<Daemon>, node: &Arc<Node>, inbound: InboundStream) -> Result<(), ExchangeError> {
    let (peer, mut stream) = (inbound.peer, inbound.stream);
    let header: LayerHeader = read_frame(&mut stream, TUNNEL_FRAME_MAX, Deadline::after(FRAME_DEADLINE)).await?;
    let received = tokio::select! {
        received = receive(daemon, node, peer, &header, &mut stream) => received,
        () = withdrawal::until_withdrawn(&daemon.trust, peer) => Err(withdrawn()),
    };
    let verdict = match received {
        Ok(()) => LayerReply::Stored,
        Err(problem) => {
            tracing::info!(%peer, layer = %header.layer, %problem, "layer refused");
            LayerReply::Refused(problem)
        }
    };
    write_frame(&mut stream, &verdict, CONTROL_FRAME_MAX, Deadline::after(FRAME_DEADLINE)).await?;
    stream.close().await.map_err(ExchangeError::Broken)
}

async fn receive(
    daemon: &Daemon,
    node: &Node,
    peer: PeerId,
    header: &LayerHeader,
    stream: &mut Stream,
) -> Result<(), Problem> {
    let share = daemon.quotas.of(peer);
    let _place = share.layer()?;
    let room = room(daemon, node, peer)?;
    let mut incoming = room.receive(peer, header.request, header.layer).await?;
    let lost = || Problem::new(Code::MissingLayer, "the layer stopped coming; deploy again and the rest will be sent");
    let reply = LayerReply::From(incoming.offset());
    write_frame(stream, &reply, CONTROL_FRAME_MAX, Deadline::after(FRAME_DEADLINE)).await.map_err(|_| lost())?;
    let mut buffer = vec![0; LAYER_CHUNK];
    while incoming.rest() > 0 {
        let wanted = usize::try_from(incoming.rest()).unwrap_or(LAYER_CHUNK).min(LAYER_CHUNK);
        let read = tokio::time::timeout(LAYER_PATIENCE, stream.read(&mut buffer[..wanted])).await;
        match read {
            Ok(Ok(length)) if length > 0 => {
                incoming.append(Bytes::copy_from_slice(&buffer[..length])).await?;
                daemon.metrics.layer_bytes_received(length as u64);
                daemon.bandwidth.pass(peer, length).await;
            }
            _ => return Err(lost()),
        }
    }
    incoming.finish().await
}

pub(super) async fn logs(daemon: &Arc<Daemon>, node: &Arc<Node>, inbound: InboundStream) -> Result<(), ExchangeError> {
    let (peer, mut stream) = (inbound.peer, inbound.stream);
    let query: LogsQuery = read_frame(&mut stream, TUNNEL_FRAME_MAX, Deadline::after(FRAME_DEADLINE)).await?;
    let options = LogOptions { tail: query.tail, since: query.since, follow: query.follow };
    let share = daemon.quotas.of(peer);
    let lines = async {
        let place = share.log()?;
        let _turn = share.work().await;
        Ok((room(daemon, node, peer)?.logs(peer, query.deployment, &options).await?, place))
    };
    let end = match lines.await {
        Ok((lines, _place)) => send_lines(lines, &mut stream, &Pace::of(&daemon.bandwidth, peer)).await?,
        Err(problem) => LogFrame::Problem(problem),
    };
    write_frame(&mut stream, &end, CONTROL_FRAME_MAX, Deadline::after(FRAME_DEADLINE)).await?;
    stream.close().await.map_err(ExchangeError::Broken)
}

/// Sends lines as they come, as many in a frame as are there already. Returns the last frame.
async fn send_lines(lines: LogStream, stream: &mut Stream, pace: &Pace) -> Result<LogFrame, ExchangeError> {
    let mut lines = lines.ready_chunks(LOG_LINES);
    let mut gone = [0];
    loop {
        let chunk = tokio::select! {
            chunk = lines.next() => chunk,
            // The asker says nothing more; whatever arrives, or the end, means that it has gone.
            _ = stream.read(&mut gone) => return Err(ExchangeError::Ended),
        };
        let Some(chunk) = chunk else { return Ok(LogFrame::End) };
        let mut batch: Vec<LogLine> = Vec::new();
        let mut bytes = 0;
        for line in chunk {
            let line = match line {
                Ok(line) => line,
                Err(error) => return Ok(LogFrame::Problem(error.problem())),
            };
            bytes += line.text.len();
            batch.push(line);
            if bytes >= LOG_BYTES {
                send_batch(std::mem::take(&mut batch), stream, pace).await?;
                bytes = 0;
            }
        }
        send_batch(batch, stream, pace).await?;
    }
}

async fn send_batch(batch: Vec<LogLine>, stream: &mut Stream, pace: &Pace) -> Result<(), ExchangeError> {
    if batch.is_empty() {
        return Ok(());
    }
    pace.pass(batch.iter().map(|line| line.text.len()).sum()).await;
    let frame = LogFrame::Lines(batch);
    write_frame(stream, &frame, CONTROL_FRAME_MAX, Deadline::after(FRAME_DEADLINE)).await
}

pub(super) async fn forward(
    daemon: &Arc<Daemon>,
    node: &Arc<Node>,
    inbound: InboundStream,
) -> Result<(), ExchangeError> {
    let (peer, mut stream) = (inbound.peer, inbound.stream);
    let header: ForwardHeader = read_frame(&mut stream, TUNNEL_FRAME_MAX, Deadline::after(FRAME_DEADLINE)).await?;
    let share = daemon.quotas.of(peer);
    let connected = async {
        let endpoint = {
            let _turn = share.work().await;
            room(daemon, node, peer)?.owned_endpoint(peer, header.deployment, header.port).await?
        };
        let _turn = share.connect().await;
        endpoint.network.connect(endpoint.port, CONNECT_DEADLINE).await.map_err(|error| error.problem())
    };
    join_streams(stream, connected.await, &Pace::of(&daemon.bandwidth, peer)).await
}

/// Tells the other side whether the container's port is open, and then carries bytes both ways, at this pace.
pub(crate) async fn join_streams(
    mut stream: Stream,
    connected: Result<Connection, Problem>,
    pace: &Pace,
) -> Result<(), ExchangeError> {
    let deadline = Deadline::after(FRAME_DEADLINE);
    match connected {
        Err(problem) => {
            write_frame(&mut stream, &StreamReply::Refused(problem), CONTROL_FRAME_MAX, deadline).await?;
            stream.close().await.map_err(ExchangeError::Broken)
        }
        Ok(container) => {
            write_frame(&mut stream, &StreamReply::Open, CONTROL_FRAME_MAX, deadline).await?;
            let mut stream = Paced::new(stream.into_tokio(), pace.clone());
            let mut container = Paced::new(container, pace.clone());
            let copied =
                tokio::io::copy_bidirectional_with_sizes(&mut stream, &mut container, 32 << 10, 32 << 10).await;
            copied.map(drop).map_err(ExchangeError::Broken)
        }
    }
}
