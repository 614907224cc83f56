//! `invite`, its list and its withdrawal, and `join`.

use clap::{Args, Subcommand};
use hyper::Method;
use peer_proto::control::{Invitation, Invite, Join, Joined};
use peer_proto::id::Name;
use peer_proto::text::escape;
use peer_proto::unit::Span;

use super::client::percent_encoded;
use super::failure::Failure;
use super::grants::{GrantArguments, in_words, in_words_with_end, parse_life};
use super::moment::{now, rfc3339};
use super::peers::in_full;
use super::table::table;
use super::{Session, argument_or_stdin, parse_reference};

/// Longest life of an invitation (seconds).
const LIFE_MAX: u64 = 3600;

/// Make a ticket with which one friend can join, once
///
/// The ticket alone is printed on standard output. It is a secret: hand it over on a way that only the friend reads.
///
/// Example: peerctl invite --allow deploy --max-cpu 2 --max-memory 2g
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct InviteArguments {
    #[command(subcommand)]
    command: Option<InviteCommand>,
    #[command(flatten)]
    grants: GrantArguments,
    /// Time until the grant ends, counted from now, such as 24h or 30d [default: never]
    #[arg(long, requires = "allow", value_name = "SPAN", value_parser = parse_life)]
    expires: Option<Span>,
    /// Time until the ticket ends, at most 1h
    #[arg(long, value_name = "SPAN", default_value = "1h", value_parser = parse_ticket_life)]
    ticket_expires: Span,
    /// Name to give the one who joins, instead of the one that it suggests
    #[arg(long)]
    name: Option<Name>,
}

#[derive(Debug, Subcommand)]
pub(super) enum InviteCommand {
    List(ListArguments),
    Revoke(RevokeArguments),
}

/// List the open invitations
///
/// Example: peerctl invite list
#[derive(Debug, Args)]
pub(super) struct ListArguments {}

/// Withdraw an invitation
///
/// Example: peerctl invite revoke 12D3KooWAbc…
#[derive(Debug, Args)]
pub(super) struct RevokeArguments {
    /// Id of the invitation, as in the list
    #[arg(value_parser = parse_reference)]
    id: String,
}

/// Join a friend by the ticket of an invitation
///
/// Both machines trust each other afterwards. What this machine allows the friend is said here; without --allow, nothing.
///
/// Example: peerctl join - < ticket.txt
#[derive(Debug, Args)]
pub(super) struct JoinArguments {
    /// The ticket, or - for standard input
    ticket: String,
    #[command(flatten)]
    grants: GrantArguments,
    /// Time until the grant ends, such as 24h or 30d [default: never]
    #[arg(long, requires = "allow", value_name = "SPAN", value_parser = parse_life)]
    expires: Option<Span>,
    /// Name to give the friend here, instead of the one that he suggests
    #[arg(long)]
    name: Option<Name>,
}

fn parse_ticket_life(text: &str) -> Result<Span, String> {
    match parse_life(text)? {
        span if span.seconds <= LIFE_MAX => Ok(span),
        span => Err(format!("a ticket lives at most 1h, not {span}; the grant's own end is --expires")),
    }
}

/// Runs `invite` and its subcommands.
pub(super) async fn invite(session: &Session, arguments: InviteArguments) -> Result<(), Failure> {
    let InviteArguments { command, grants, expires, ticket_expires, name } = arguments;
    match command {
        Some(InviteCommand::List(ListArguments {})) => list(session).await,
        Some(InviteCommand::Revoke(RevokeArguments { id })) => {
            let path = format!("/v1/invitations/{}", percent_encoded(&id));
            let invitation: Invitation = session.client.delete(&path).await?;
            session.output.result(&invitation, |invitation| format!("{} is withdrawn\n", escape(&invitation.id)))
        }
        None => {
            let grants = grants.grants(expires, now())?;
            let request = Invite { grants, name, expires_seconds: ticket_expires.seconds };
            let invitation: Invitation = session.client.send(Method::POST, "/v1/invitations", &request).await?;
            session.output.result(&invitation, |invitation| {
                format!("{}\n", escape(invitation.ticket.as_deref().unwrap_or_default()))
            })?;
            session.output.note(&format!(
                "On the friend's machine, within {ticket_expires}: peerctl join TICKET\nWho joins with it is allowed here: {}",
                in_words_with_end(&invitation.grants)
            ));
            Ok(())
        }
    }
}

async fn list(session: &Session) -> Result<(), Failure> {
    let invitations: Vec<Invitation> = session.client.get("/v1/invitations").await?;
    session.output.result(&invitations, |invitations| {
        let row = |one: &Invitation| [one.id.clone(), rfc3339(one.expires_at), in_words_with_end(&one.grants)];
        table(["ID", "ENDS", "ALLOWED HERE"], &invitations.iter().map(row).collect::<Vec<_>>())
    })
}

/// Runs `join`.
pub(super) async fn join(session: &Session, arguments: JoinArguments) -> Result<(), Failure> {
    let JoinArguments { ticket, grants, expires, name } = arguments;
    let ticket = argument_or_stdin(ticket, "ticket").await?;
    let request = Join { ticket, name, grants: grants.grants(expires, now())? };
    let joined: Joined = session.client.send(Method::POST, "/v1/join", &request).await?;
    session.output.result(&joined, |joined| {
        format!("{}{}", in_full(&joined.peer), super::table::fields(&[("allowed there", in_words(&joined.granted))]))
    })
}
