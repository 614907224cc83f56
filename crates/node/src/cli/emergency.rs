//! `panic`: everything stops at once.

use clap::Args;
use hyper::Method;
use peer_proto::code::ExitStatus;
use peer_proto::panic::PanicReport;
use peer_proto::text::escape;

use super::Session;
use super::failure::Failure;
use super::output;

/// Stop everything that others run on this machine, at once, and cut all connections
///
/// Their containers are killed and kept, nothing of anybody else's is touched; peers and gateways are cut off, and nothing new
/// is taken until `peerctl resume`. What is known is kept in one archive. It asks nothing, because `peerctl resume --all`
/// starts everything again. Exits with 1 if something could not be stopped or kept.
///
/// Example: peerctl panic
#[derive(Debug, Args)]
pub(super) struct PanicArguments {}

/// Runs `panic`.
pub(super) async fn panic(session: &Session, PanicArguments {}: &PanicArguments) -> Result<(), Failure> {
    let report: PanicReport = session.client.send(Method::POST, "/v1/panic", &serde_json::json!({})).await?;
    session.output.result(&report, in_words)?;
    for problem in &report.problems {
        output::warn(&escape(&problem.message));
    }
    session.output.note(
        "This machine is closed. `peerctl resume` opens it, and leaves what was stopped as it is; `peerctl resume --all` \
         starts that too.",
    );
    let done = report.still_running.is_empty() && report.problems.is_empty();
    if done { Ok(()) } else { Err(Failure::Result(ExitStatus::Failed)) }
}

fn in_words(report: &PanicReport) -> String {
    let names: Vec<_> = report.still_running.iter().map(|name| escape(name)).collect();
    let left = if names.is_empty() { String::new() } else { format!("MAY STILL RUN: {}\n", names.join(", ")) };
    let kept = match &report.evidence {
        Some(path) => format!("evidence: {}", escape(path)),
        None => "no evidence could be kept".to_owned(),
    };
    let (stopped, cut) = (report.stopped.len(), report.connections_cut);
    format!("stopped {stopped} containers and cut {cut} connections\n{left}{kept}\n")
}
