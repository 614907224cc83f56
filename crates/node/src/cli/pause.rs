//! `pause` and `resume`: the owner's machine for its owner, and back.

use clap::Args;
use hyper::Method;
use peer_proto::deploy::State;
use peer_proto::pause::{PauseReport, PauseRequest, PauseShown, ResumeRequest};
use peer_proto::text::escape;

use super::failure::Failure;
use super::moment::rfc3339;
use super::table::{remarks, table};
use super::{Session, parse_reference};

/// Keep what others run on this machine from running, until `peerctl resume`
///
/// Containers are frozen: they get no processor, keep their memory, and go on where they were. With --stop they are stopped:
/// their memory is free too, and they are started anew later. Without a peer or a deployment everything is paused, and
/// nothing new is taken. It lasts over restarts. Visitors get a page that says so.
///
/// Example: peerctl pause --peer bob
#[derive(Debug, Args)]
pub(super) struct PauseArguments {
    /// Deployments of peers here: names or ids [default: all]
    #[arg(value_name = "DEPLOYMENT", value_parser = parse_reference)]
    deployments: Vec<String>,
    /// Those of this peer: its name or id
    #[arg(long, value_parser = parse_reference)]
    peer: Option<String>,
    /// Stop the containers, so that their memory is free too
    #[arg(long)]
    stop: bool,
}

/// Let what was paused run again, and open the machine after `peerctl panic`
///
/// Without a peer or a deployment this takes back what was paused for the whole machine; what was paused by itself stays so.
///
/// Example: peerctl resume
#[derive(Debug, Args)]
pub(super) struct ResumeArguments {
    /// Deployments of peers here: names or ids
    #[arg(value_name = "DEPLOYMENT", value_parser = parse_reference)]
    deployments: Vec<String>,
    /// Those of this peer: its name or id
    #[arg(long, value_parser = parse_reference)]
    peer: Option<String>,
    /// Take back every pause there is
    #[arg(long, conflicts_with_all = ["deployments", "peer"])]
    all: bool,
}

/// Runs `pause`.
pub(super) async fn pause(session: &Session, arguments: PauseArguments) -> Result<(), Failure> {
    let PauseArguments { deployments, peer, stop } = arguments;
    let request = PauseRequest { peer, deployments, stop };
    let report: PauseReport = session.client.send(Method::POST, "/v1/pause", &request).await?;
    session.output.result(&report, in_words)?;
    let running = report.deployments.iter().filter(|one| matches!(one.state, State::Starting | State::Running)).count();
    if running > 0 {
        session.output.note(&format!("{running} still run; `peerctl ps --hosted` shows when they are paused."));
    }
    Ok(())
}

/// Runs `resume`.
pub(super) async fn resume(session: &Session, arguments: ResumeArguments) -> Result<(), Failure> {
    let ResumeArguments { deployments, peer, all } = arguments;
    let request = ResumeRequest { peer, deployments, all };
    let report: PauseReport = session.client.send(Method::POST, "/v1/resume", &request).await?;
    session.output.result(&report, in_words)?;
    let paused = report.deployments.iter().filter(|one| one.state == State::Paused).count();
    if paused > 0 {
        session
            .output
            .note(&format!("{paused} stay paused: resume them by name, with --peer, or everything with --all."));
    }
    Ok(())
}

fn in_words(report: &PauseReport) -> String {
    let mut text = String::new();
    if report.pauses.is_empty() {
        text.push_str("nothing is paused\n");
    }
    for pause in &report.pauses {
        text.push_str(&line(pause));
    }
    if !report.deployments.is_empty() {
        let rows: Vec<_> = report
            .deployments
            .iter()
            .map(|one| [one.name.to_string(), one.id.short(), one.owner.clone(), one.state.to_string()])
            .collect();
        text.push('\n');
        text.push_str(&table(["NAME", "ID", "OWNER", "STATE"], &rows));
        let why = report.deployments.iter().filter(|one| one.state == State::Paused);
        text.push_str(&remarks(
            why.filter_map(|one| Some((one.name.as_str(), one.problem.as_ref()?.message.as_str()))),
        ));
    }
    text
}

/// One pause in one line.
pub(super) fn line(pause: &PauseShown) -> String {
    let what = match (pause.subject.as_str(), &pause.name) {
        ("machine", _) => "the whole machine".to_owned(),
        (subject, name) => format!("{} {}", escape(subject), escape(name.as_deref().unwrap_or_default())),
    };
    let how = match pause.means.as_str() {
        "freeze" => "paused",
        "stop" => "paused and stopped",
        _ => "stopped in an emergency",
    };
    format!("{what} is {how} since {}\n", rfc3339(pause.since))
}
