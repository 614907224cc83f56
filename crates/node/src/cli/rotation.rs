//! `identity rotate`, `identity revoke` and `identity statement …`.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use hyper::Method;
use peer_proto::control::{
    ApplyStatement, EndedKey, FollowedStatement, IdentityState, Revoke, Revoked, Rotate, Rotated,
};
use peer_proto::id::Name;
use peer_proto::text::escape;
use tokio::io::AsyncReadExt;

use super::failure::Failure;
use super::identity::in_words;
use super::passphrase::ask;
use super::table::fields;
use super::{Session, parse_reference};

/// Largest file of statements that is read (bytes).
const STATEMENTS_MAX: u64 = 1024 * 1024;
/// Most statements in one file.
const STATEMENTS_COUNT_MAX: usize = 64;

/// Give this machine a new key, and tell the peers
///
/// Peers keep name, grants and deployments for the new key, and refuse the old one for ever. Who is offline is told as soon
/// as he can be reached, by this machine or by a common friend; the old key is destroyed once all have confirmed. Gateways
/// must allow the new id, and public names of deployments on this machine change, since they are derived from it.
///
/// Example: peerctl identity rotate
#[derive(Debug, Args)]
pub(super) struct RotateArguments {
    /// The present key may be known to others: end it with the recovery phrase, whatever it says itself
    #[arg(long)]
    compromised: bool,
    /// Read the recovery phrase from this file descriptor instead of the terminal: its first line
    #[arg(long, value_name = "N", requires = "compromised")]
    phrase_fd: Option<u32>,
    /// Do not rotate: destroy the former key now, and tell those no more who have not confirmed
    #[arg(long, conflicts_with = "compromised")]
    give_up: bool,
}

/// End the key of a lost machine with its recovery phrase
///
/// Runs on any machine that has friends in common with the lost one. Its key is refused here and wherever the statement
/// comes: by this machine, by friends of friends, or by hand (identity statement). There is no way back.
///
/// Example: peerctl identity revoke --peer server
#[derive(Debug, Args)]
pub(super) struct RevokeArguments {
    /// The lost machine: its name here, or its PeerId [default: the peer that has this recovery phrase]
    #[arg(long, visible_alias = "peer-id", value_name = "PEER", value_parser = parse_reference)]
    peer: Option<String>,
    /// Read the recovery phrase from this file descriptor instead of the terminal: its first line
    #[arg(long, value_name = "N")]
    phrase_fd: Option<u32>,
}

#[derive(Debug, Subcommand)]
pub(super) enum StatementCommand {
    Export(ExportArguments),
    Apply(ApplyArguments),
}

/// Print the statements that have ended keys, one a line
///
/// They prove themselves and hold no secret: anybody may carry them to anybody.
///
/// Example: peerctl identity statement export > statements.txt
#[derive(Debug, Args)]
pub(super) struct ExportArguments {
    /// Only that about this key: its PeerId or the beginning of it, or the name that its machine had here
    #[arg(value_parser = parse_reference)]
    key: Option<String>,
}

/// Carry out statements that somebody has handed over
///
/// Example: peerctl identity statement apply statements.txt
#[derive(Debug, Args)]
pub(super) struct ApplyArguments {
    /// File with one statement a line, or - for standard input
    file: PathBuf,
}

/// Runs `identity rotate`.
pub(super) async fn rotate(session: &Session, arguments: RotateArguments) -> Result<(), Failure> {
    if arguments.give_up {
        let state: IdentityState =
            session.client.send(Method::POST, "/v1/identity/give-up", &serde_json::json!({})).await?;
        return session.output.result(&state, in_words);
    }
    let phrase = if arguments.compromised { Some(ask("recovery phrase", arguments.phrase_fd).await?) } else { None };
    let rotated: Rotated = session.client.send(Method::POST, "/v1/identity/rotate", &Rotate { phrase }).await?;
    session.output.result(&rotated, |rotated| {
        let names = |names: &[Name]| names.iter().map(Name::as_str).collect::<Vec<_>>().join(", ");
        fields(&[
            ("peer id", rotated.peer_id.clone()),
            ("before", rotated.former.clone()),
            ("peers that follow", names(&rotated.confirmed)),
            ("still to be told", names(&rotated.unconfirmed)),
        ])
    })?;
    if !rotated.gateways.is_empty() {
        session.output.note(&format!(
            "Each gateway must allow the new id (peergate allow {}): {}. Public names of deployments here change.",
            escape(&rotated.peer_id),
            escape(&rotated.gateways.join(", "))
        ));
    }
    if !rotated.unconfirmed.is_empty() {
        session.output.note(
            "Those who could not be told are tried until they have been: see `peerctl identity status`. By hand: \
             `peerctl identity statement export` here, `peerctl identity statement apply` there.",
        );
    }
    Ok(())
}

/// Runs `identity revoke`.
pub(super) async fn revoke(session: &Session, arguments: RevokeArguments) -> Result<(), Failure> {
    let phrase = ask("recovery phrase of the lost machine", arguments.phrase_fd).await?;
    let request = Revoke { phrase, peer: arguments.peer };
    let revoked: Revoked = session.client.send(Method::POST, "/v1/identity/revoke", &request).await?;
    session.output.result(&revoked, |revoked| {
        let name = revoked.name.as_ref().map(|name| format!(" ('{name}')")).unwrap_or_default();
        format!("{}{name} is refused from now on\n", escape(&revoked.peer_id))
    })?;
    session.output.note(
        "Connected peers are told now, others when they connect. For those whom none of your friends reaches: \
         `peerctl identity statement export` here, `peerctl identity statement apply` there.",
    );
    Ok(())
}

/// Runs `identity statement`.
pub(super) async fn statement(session: &Session, command: StatementCommand) -> Result<(), Failure> {
    match command {
        StatementCommand::Export(arguments) => export(session, arguments).await,
        StatementCommand::Apply(arguments) => apply(session, &arguments.file).await,
    }
}

async fn export(session: &Session, arguments: ExportArguments) -> Result<(), Failure> {
    let state: IdentityState = session.client.get("/v1/identity/state").await?;
    let is_meant = |key: &EndedKey| {
        arguments.key.as_ref().is_none_or(|text| {
            key.peer_id.starts_with(text) || key.name.as_ref().is_some_and(|name| name.as_str() == text)
        })
    };
    // Oldest first: each may make the receiver know the key that the next is about.
    let ended: Vec<_> = state.ended.into_iter().filter(is_meant).rev().collect();
    session.output.result(&ended, |ended| {
        let lines: Vec<_> = ended.iter().map(|key| escape(&key.statement) + "\n").collect();
        lines.concat()
    })
}

async fn apply(session: &Session, file: &Path) -> Result<(), Failure> {
    let text = read(file).await?;
    let statements: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if statements.is_empty() || statements.len() > STATEMENTS_COUNT_MAX {
        let message = format!("'{}' holds {} statements; 1 to 64 are accepted", file.display(), statements.len());
        return Err(Failure::argument(message));
    }
    let mut followed: Vec<FollowedStatement> = Vec::new();
    let mut failure = None;
    for statement in statements {
        let request = ApplyStatement { statement: statement.to_owned() };
        match session.client.send(Method::POST, "/v1/identity/statements", &request).await {
            Ok(one) => followed.push(one),
            // One may be about nobody here, and the next about a peer.
            Err(problem) => failure = Some(problem),
        }
    }
    if let (Some(failure), false) = (failure, followed.iter().any(|one| one.changed)) {
        return Err(failure);
    }
    session.output.result(&followed, |followed| followed.iter().map(in_a_sentence).collect())
}

fn in_a_sentence(followed: &FollowedStatement) -> String {
    let name = followed.name.as_ref().map_or_else(|| "a key".to_owned(), |name| format!("'{name}'"));
    match (&followed.successor, followed.changed) {
        (_, false) => format!("{}: in force already\n", escape(&followed.kind)),
        (Some(successor), true) => format!("{name} has a new key: {}\n", escape(successor)),
        (None, true) => format!("{name} is refused from now on\n"),
    }
}

async fn read(file: &Path) -> Result<String, Failure> {
    let failed = |error: &std::io::Error| Failure::file("read", file, error);
    let mut text = String::new();
    let read = if file == Path::new("-") {
        tokio::io::stdin().take(STATEMENTS_MAX).read_to_string(&mut text).await
    } else {
        let file = tokio::fs::File::open(file).await.map_err(|error| failed(&error))?;
        file.take(STATEMENTS_MAX).read_to_string(&mut text).await
    };
    read.map_err(|error| failed(&error))?;
    Ok(text)
}
