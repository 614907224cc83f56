//! `doctor`, `audit`, `config` and `version`: about the daemon itself.

use clap::{Args, Subcommand};
use hyper::Method;
use peer_proto::code::{Code, ExitStatus};
use peer_proto::control::{AuditLine, AuditVerdict, Finding, Level, Setting, Version};
use peer_proto::text::escape;
use serde::Serialize;

use super::Session;
use super::client::percent_encoded;
use super::failure::Failure;
use super::moment::rfc3339;
use super::table::table;

/// Look for what keeps this machine from working as it should
///
/// Each line is ok, a note, a warning (it works, and less holds than could) or a FAILURE, with what to do about it. Exits
/// with 1 if there is a failure. docs/operations.md explains every check.
///
/// Example: peerctl doctor
#[derive(Debug, Args)]
pub(super) struct DoctorArguments {
    /// Take this machine's clock for right, though it has shown a later time before
    #[arg(long)]
    accept_clock: bool,
}

/// Show the audit log: who asked for what, and what was refused
///
/// Example: peerctl audit --limit 20
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct AuditArguments {
    #[command(subcommand)]
    command: Option<AuditCommand>,
    /// Only so many last lines
    #[arg(short = 'n', long, value_name = "N", default_value_t = 100)]
    limit: u32,
}

#[derive(Debug, Subcommand)]
pub(super) enum AuditCommand {
    Verify(VerifyArguments),
}

/// Check that no line of the audit log was changed or removed
///
/// Exits with 1 if one was. Lines cut off at the end show only against a head noted elsewhere: see --head.
///
/// Example: peerctl audit verify
#[derive(Debug, Args)]
pub(super) struct VerifyArguments {
    /// Head that was printed earlier; it must still be in the log
    #[arg(long, value_name = "HASH")]
    head: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    Show(ShowArguments),
}

/// Show every setting with where its value comes from
///
/// Example: peerctl config show
#[derive(Debug, Args)]
pub(super) struct ShowArguments {}

/// Show the versions of peerctl and of the daemon
///
/// Example: peerctl version --json
#[derive(Debug, Args)]
pub(super) struct VersionArguments {}

/// What `version --json` prints.
#[derive(Debug, Serialize)]
struct Versions {
    peerctl: &'static str,
    /// Absent if the daemon does not answer.
    peerd: Option<Version>,
}

/// Runs `doctor`.
pub(super) async fn doctor(session: &Session, arguments: &DoctorArguments) -> Result<(), Failure> {
    let findings: Vec<Finding> = if arguments.accept_clock {
        session.client.send(Method::POST, "/v1/doctor/accept-clock", &serde_json::json!({})).await?
    } else {
        session.client.get("/v1/doctor").await?
    };
    session.output.result(&findings, |findings| findings.iter().map(finding).collect())?;
    let failed = findings.iter().any(|finding| finding.level == Level::Failure);
    if failed { Err(Failure::Result(ExitStatus::Failed)) } else { Ok(()) }
}

fn finding(finding: &Finding) -> String {
    let level = match finding.level {
        Level::Ok => "ok",
        Level::Note => "note",
        Level::Warning => "warning",
        Level::Failure => "FAILURE",
    };
    let advice = finding.advice.as_ref().map(|advice| format!("         {}\n", escape(advice))).unwrap_or_default();
    format!("{level:<8} {}: {}\n{advice}", escape(&finding.check), escape(&finding.message))
}

/// Runs `audit` and `audit verify`.
pub(super) async fn audit(session: &Session, arguments: &AuditArguments) -> Result<(), Failure> {
    if let Some(AuditCommand::Verify(VerifyArguments { head })) = &arguments.command {
        return verify(session, head.as_deref()).await;
    }
    let lines: Vec<AuditLine> = session.client.get(&format!("/v1/audit?limit={}", arguments.limit)).await?;
    session.output.result(&lines, |lines| {
        let row = |line: &AuditLine| {
            let AuditLine { sequence, at, actor, action, outcome, threat, detail, .. } = line;
            let threat = threat.clone().unwrap_or_default();
            [sequence.to_string(), rfc3339(*at), outcome.clone(), threat, action.clone(), actor.clone(), detail.clone()]
        };
        let header = ["LINE", "TIME", "OUTCOME", "THREAT", "ACTION", "ACTOR", "DETAIL"];
        table(header, &lines.iter().map(row).collect::<Vec<_>>())
    })
}

async fn verify(session: &Session, head: Option<&str>) -> Result<(), Failure> {
    let query = head.map(|head| format!("?head={}", percent_encoded(head))).unwrap_or_default();
    let verdict: AuditVerdict = session.client.get(&format!("/v1/audit/verify{query}")).await?;
    match &verdict.fault {
        Some(fault) if !session.output.is_json() => {
            let message =
                format!("the audit log does not verify: {fault}; keep a copy of it and find out who changed it");
            Err(Failure::new(Code::AuditBroken, message))
        }
        Some(_) => {
            session.output.result(&verdict, |_| String::new())?;
            Err(Failure::Result(Code::AuditBroken.exit_status()))
        }
        None => session.output.result(&verdict, |verdict| {
            let AuditVerdict { lines, head, .. } = verdict;
            format!(
                "{lines} lines verified; the head is {}\nNote it on another machine: that the newest lines were cut off \
                 shows only with `peerctl audit verify --head HASH`.\n",
                escape(head)
            )
        }),
    }
}

/// Runs `config show`.
pub(super) async fn config(session: &Session, command: &ConfigCommand) -> Result<(), Failure> {
    let ConfigCommand::Show(ShowArguments {}) = command;
    let settings: Vec<Setting> = session.client.get("/v1/configuration").await?;
    session.output.result(&settings, |settings| {
        let row = |setting: &Setting| [setting.key.clone(), setting.value.clone(), setting.source.clone()];
        table(["KEY", "VALUE", "FROM"], &settings.iter().map(row).collect::<Vec<_>>())
    })
}

/// Runs `version`. A daemon that does not answer is no failure here.
pub(super) async fn version(session: &Session, VersionArguments {}: &VersionArguments) -> Result<(), Failure> {
    let (peerd, reason) = match session.client.get::<Version>("/v1/version").await {
        Ok(version) => (Some(version), None),
        Err(Failure::Problem(problem)) => (None, Some(problem.message)),
        Err(failure) => return Err(failure),
    };
    session.output.result(&Versions { peerctl: env!("CARGO_PKG_VERSION"), peerd }, |versions| {
        let peerd = versions
            .peerd
            .as_ref()
            .map(|peerd| format!("peerd {} (interface {})\n", escape(&peerd.version), peerd.api));
        format!("peerctl {}\n{}", versions.peerctl, peerd.unwrap_or_default())
    })?;
    if let Some(reason) = reason {
        session.output.note(&escape(&reason));
    }
    Ok(())
}
