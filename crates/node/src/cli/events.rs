//! `events`.

use clap::Args;
use hyper::Method;
use peer_proto::control::Notice;
use peer_proto::text::escape;

use super::Session;
use super::client::{Lines, SILENCE_DEADLINE};
use super::failure::Failure;
use super::moment::rfc3339;

/// Show what has happened on this machine
///
/// Example: peerctl events --follow
#[derive(Debug, Args)]
pub(super) struct EventsArguments {
    /// Go on with what happens from now, until Ctrl-C
    #[arg(short, long)]
    follow: bool,
}

/// Runs `events`.
pub(super) async fn run(session: &Session, arguments: &EventsArguments) -> Result<(), Failure> {
    let path = format!("/v1/events?follow={}", arguments.follow);
    let mut lines: Lines<Notice> = session.client.stream(Method::GET, &path, None::<&()>).await?;
    let silence = (!arguments.follow).then_some(SILENCE_DEADLINE);
    while let Some(notice) = lines.next(silence).await? {
        session.output.result(&notice, in_words)?;
    }
    // Who follows wants to go on until he says otherwise.
    if arguments.follow { Err(lines.unfinished()) } else { Ok(()) }
}

fn in_words(notice: &Notice) -> String {
    let peer = notice.peer.as_ref().map(|peer| format!(" peer={}", escape(peer))).unwrap_or_default();
    let deployment = notice.deployment.map(|id| format!(" deployment={}", id.short())).unwrap_or_default();
    format!("{} {}{peer}{deployment} {}\n", rfc3339(notice.at), escape(&notice.kind), escape(&notice.message))
}
