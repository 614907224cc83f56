//! Logs and forwarded ports of our deployments.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::Response;
use futures::stream;
use hyper_util::rt::TokioIo;
use peer_net::exchange::{Deadline, read_frame, write_frame};
use peer_net::{Stream, Traffic};
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::control::{FORWARD_UPGRADE, LogEntry};
use peer_proto::frame::CONTROL_FRAME_MAX;
use peer_proto::query::{ForwardHeader, LogFrame, LogsQuery, StreamReply};
use peer_proto::unit::{Port, Timestamp};
use serde::Deserialize;

use super::reference::resolve;
use crate::api::{Failure, ndjson};
use crate::daemon::Daemon;
use crate::protocols;
use crate::requester::{Requester, exchange_problem};

const FRAME_DEADLINE: Duration = Duration::from_secs(20);
/// A followed log may be silent for long; the connection's own pings notice when the peer is gone.
const SILENCE_MAX: Duration = Duration::from_hours(30 * 24);

#[derive(Debug, Deserialize)]
pub(super) struct LogsOptions {
    peer: Option<String>,
    tail: Option<u32>,
    since: Option<u64>,
    #[serde(default)]
    follow: bool,
}

struct Following {
    requester: Requester,
    peer: PeerId,
    stream: Stream,
    entries: VecDeque<LogEntry>,
    over: bool,
}

pub(super) async fn logs(
    State(daemon): State<Arc<Daemon>>,
    Path(text): Path<String>,
    Query(options): Query<LogsOptions>,
) -> Result<Response, Failure> {
    let node = daemon.node().await?;
    let (peer, deployment) = resolve(&daemon, &node, &text, options.peer.as_deref()).await?;
    let requester = node.requester.clone();
    let mut stream = requester.open(peer, protocols::LOGS, Traffic::Bulk).await?;
    let (tail, since, follow) = (options.tail, options.since.map(Timestamp), options.follow);
    let query = LogsQuery { deployment, tail, since, follow };
    let written = write_frame(&mut stream, &query, CONTROL_FRAME_MAX, Deadline::after(FRAME_DEADLINE)).await;
    written.map_err(|error| exchange_problem(&requester.name_of(&peer), &error))?;
    let following = Following { requester, peer, stream, entries: VecDeque::new(), over: false };
    Ok(ndjson(stream::unfold(following, |mut following| async move {
        while following.entries.is_empty() {
            if following.over {
                return None;
            }
            following.read().await;
        }
        following.entries.pop_front().map(|entry| (entry, following))
    })))
}

impl Following {
    async fn read(&mut self) {
        let frame = read_frame(&mut self.stream, CONTROL_FRAME_MAX, Deadline::after(SILENCE_MAX)).await;
        let last = match frame {
            Ok(LogFrame::Lines(lines)) => {
                self.entries.extend(lines.into_iter().map(LogEntry::Line));
                return;
            }
            Ok(LogFrame::End) => LogEntry::End,
            Ok(LogFrame::Problem(problem)) => LogEntry::Problem(self.requester.in_name_of(&self.peer, &problem)),
            Err(error) => LogEntry::Problem(exchange_problem(&self.requester.name_of(&self.peer), &error)),
        };
        self.entries.push_back(last);
        self.over = true;
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct ForwardOptions {
    peer: Option<String>,
    port: Port,
}

/// Carries one connection to a deployment's port: `101 Switching Protocols`, then raw bytes.
pub(super) async fn forward(
    State(daemon): State<Arc<Daemon>>,
    Path(text): Path<String>,
    Query(options): Query<ForwardOptions>,
    request: Request,
) -> Result<Response, Failure> {
    let upgrade = request.headers().get(header::UPGRADE).and_then(|value| value.to_str().ok());
    if upgrade != Some(FORWARD_UPGRADE) {
        return Err(
            Problem::new(Code::InvalidArgument, format!("forwarding needs 'Upgrade: {FORWARD_UPGRADE}'")).into()
        );
    }
    let node = daemon.node().await?;
    let (peer, deployment) = resolve(&daemon, &node, &text, options.peer.as_deref()).await?;
    let requester = &node.requester;
    let lost = |error| exchange_problem(&requester.name_of(&peer), &error);
    let mut stream = requester.open(peer, protocols::FORWARD, Traffic::Bulk).await?;
    let header = ForwardHeader { deployment, port: options.port };
    let deadline = Deadline::after(FRAME_DEADLINE);
    write_frame(&mut stream, &header, CONTROL_FRAME_MAX, deadline).await.map_err(lost)?;
    match read_frame(&mut stream, CONTROL_FRAME_MAX, deadline).await.map_err(lost)? {
        StreamReply::Open => {}
        StreamReply::Refused(problem) => return Err(requester.in_name_of(&peer, &problem).into()),
    }
    let upgraded = hyper::upgrade::on(request);
    node.spawn(async move {
        if let Ok(client) = upgraded.await {
            let (mut client, mut stream) = (TokioIo::new(client), stream.into_tokio());
            // Either side may end at any moment; there is nobody left to tell.
            drop(tokio::io::copy_bidirectional(&mut client, &mut stream).await);
        }
    });
    let response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, FORWARD_UPGRADE)
        .body(Body::empty());
    response.map_err(|error| Problem::new(Code::Internal, error.to_string()).into())
}
