//! `peers add|remove|list|show|rename|addresses|allow`: the trust list, by hand.

use clap::{ArgGroup, Args, Subcommand};
use hyper::Method;
use peer_proto::control::{AddPeer, ChangePeer, Peer, RemovedPeer, Whoami};
use peer_proto::grant::Grants;
use peer_proto::id::Name;
use peer_proto::text::escape;
use peer_proto::unit::Span;

use super::client::percent_encoded;
use super::failure::Failure;
use super::grants::{GrantArguments, in_words, parse_life};
use super::moment::{ago, now, rfc3339};
use super::table::{fields, remarks, table};
use super::{Session, argument_or_stdin, parse_reference};

#[derive(Debug, Subcommand)]
pub(super) enum PeersCommand {
    Add(AddArguments),
    Remove(RemoveArguments),
    #[command(visible_alias = "ls")]
    List(ListArguments),
    Show(ShowArguments),
    Rename(RenameArguments),
    Addresses(AddressesArguments),
    Allow(AllowArguments),
}

/// Trust a machine by its card
///
/// The other side must add this machine's card too. Trust alone allows the peer nothing here: see --allow.
///
/// Example: peerctl peers add peercard1.… --allow deploy --max-memory 2g
#[derive(Debug, Args)]
pub(super) struct AddArguments {
    /// Card of the other machine (`peerctl whoami --card` there), or - for standard input
    card: String,
    /// Name to give it here, instead of the one that it suggests
    #[arg(long)]
    name: Option<Name>,
    #[command(flatten)]
    grants: GrantArguments,
    /// Time until the grant ends, such as 24h or 30d [default: never]
    #[arg(long, requires = "allow", value_name = "SPAN", value_parser = parse_life)]
    expires: Option<Span>,
}

/// Trust a peer no longer; its connections are closed at once
///
/// Its deployments here are ended, unless they are to be kept.
///
/// Example: peerctl peers remove bob
#[derive(Debug, Args)]
pub(super) struct RemoveArguments {
    /// Name or id
    #[arg(value_parser = parse_reference)]
    peer: String,
    /// Leave its deployments here running; `peerctl peers remove PEERID` ends them later
    #[arg(long)]
    keep_deployments: bool,
    /// Remove it even if you have deployments there, which are out of reach then
    #[arg(long)]
    force: bool,
}

/// List the peers
///
/// Example: peerctl peers list --json
#[derive(Debug, Args)]
pub(super) struct ListArguments {}

/// Show one peer
///
/// Example: peerctl peers show bob
#[derive(Debug, Args)]
pub(super) struct ShowArguments {
    /// Name or id
    #[arg(value_parser = parse_reference)]
    peer: String,
}

/// Give a peer another name here
///
/// Example: peerctl peers rename bob robert
#[derive(Debug, Args)]
pub(super) struct RenameArguments {
    /// Name or id
    #[arg(value_parser = parse_reference)]
    peer: String,
    /// New name
    name: Name,
}

/// Set the addresses at which a peer is dialled
///
/// Example: peerctl peers addresses bob /ip4/192.0.2.7/tcp/4100
#[derive(Debug, Args)]
pub(super) struct AddressesArguments {
    /// Name or id
    #[arg(value_parser = parse_reference)]
    peer: String,
    /// Addresses, replacing the old ones
    #[arg(required = true, value_name = "ADDRESS")]
    addresses: Vec<String>,
}

/// Set what a peer may do on this machine; it acts at once
///
/// The new grants replace the old ones. Its limits stay as they are where none is named here: those of `peerctl limits` too.
///
/// Example: peerctl peers allow bob --allow deploy --max-cpu 2 --max-memory 2g --expires 30d
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("what").args(["allow", "nothing"]).required(true))]
pub(super) struct AllowArguments {
    /// Name or id
    #[arg(value_parser = parse_reference)]
    peer: String,
    #[command(flatten)]
    grants: GrantArguments,
    /// Time until the grant ends, such as 24h or 30d [default: never]
    #[arg(long, requires = "allow", value_name = "SPAN", value_parser = parse_life)]
    expires: Option<Span>,
    /// Allow it nothing; what it runs here is stopped, and can be started again when it is allowed anew
    #[arg(long)]
    nothing: bool,
    /// Let what it runs here go on
    #[arg(long, requires = "nothing")]
    keep_deployments: bool,
}

/// Runs one of the `peers` commands.
pub(super) async fn run(session: &Session, command: PeersCommand) -> Result<(), Failure> {
    match command {
        PeersCommand::Add(arguments) => add(session, arguments).await,
        PeersCommand::Remove(arguments) => remove(session, &arguments).await,
        PeersCommand::List(ListArguments {}) => list(session).await,
        PeersCommand::Show(ShowArguments { peer }) => {
            let peer: Peer = session.client.get(&path_of(&peer)).await?;
            session.output.result(&peer, in_full)
        }
        PeersCommand::Rename(RenameArguments { peer, name }) => {
            change(session, &peer, &ChangePeer { name: Some(name), ..ChangePeer::default() }).await
        }
        PeersCommand::Addresses(AddressesArguments { peer, addresses }) => {
            change(session, &peer, &ChangePeer { addresses: Some(addresses), ..ChangePeer::default() }).await
        }
        PeersCommand::Allow(AllowArguments { peer, grants, expires, nothing, keep_deployments }) => {
            let grants = if nothing {
                Grants::default()
            } else {
                let former: Peer = session.client.get(&path_of(&peer)).await?;
                grants.instead_of(&former.grants, expires, now())?
            };
            change(session, &peer, &ChangePeer { grants: Some(grants), keep_deployments, ..ChangePeer::default() })
                .await
        }
    }
}

async fn add(session: &Session, arguments: AddArguments) -> Result<(), Failure> {
    let AddArguments { card, name, grants, expires } = arguments;
    let card = argument_or_stdin(card, "card").await?;
    let request = AddPeer { card, name, grants: grants.grants(expires, now())? };
    let peer: Peer = session.client.send(Method::POST, "/v1/peers", &request).await?;
    // Why there is no connection yet is no news: most often the other side has not added this machine.
    let shown = Peer { last_error: None, ..peer };
    session.output.result(&shown, in_full)?;
    session.output.note("Compare the verification code with the other side; it must be the same on both.");
    if shown.connection.is_none() {
        let own: Whoami = session.client.get("/v1/identity").await?;
        session
            .output
            .note(&format!("Now run there, if that is not done yet: peerctl peers add {}", escape(&own.card)));
    }
    Ok(())
}

async fn remove(session: &Session, arguments: &RemoveArguments) -> Result<(), Failure> {
    let RemoveArguments { peer, keep_deployments, force } = arguments;
    let path = format!("{}?keep_deployments={keep_deployments}&force={force}", path_of(peer));
    let removed: RemovedPeer = session.client.delete(&path).await?;
    session.output.result(&removed, in_words_removed)
}

async fn list(session: &Session) -> Result<(), Failure> {
    let peers: Vec<Peer> = session.client.get("/v1/peers").await?;
    session.output.result(&peers, |peers| {
        let row = |peer: &Peer| [peer.name.to_string(), peer.peer_id.clone(), connection(peer), in_words(&peer.grants)];
        let rows: Vec<_> = peers.iter().map(row).collect();
        let why = peers.iter().filter_map(|peer| Some((peer.name.as_str(), why_not_connected(peer)?)));
        table(["NAME", "PEER ID", "CONNECTION", "ALLOWED HERE"], &rows) + &remarks(why)
    })
}

async fn change(session: &Session, peer: &str, change: &ChangePeer) -> Result<(), Failure> {
    let peer: Peer = session.client.send(Method::PATCH, &path_of(peer), change).await?;
    session.output.result(&peer, in_full)
}

fn in_words_removed(removed: &RemovedPeer) -> String {
    let first = match &removed.name {
        Some(name) => format!("{name} ({}) is trusted no longer\n", removed.peer_id),
        None => format!("{} was trusted no longer already\n", removed.peer_id),
    };
    let line = |what: &str, names: &[Name]| {
        let names: Vec<_> = names.iter().map(Name::as_str).collect();
        if names.is_empty() { String::new() } else { format!("{what}: {}\n", names.join(", ")) }
    };
    let ended = line("its deployments here are being removed", &removed.ended);
    first + &ended + &line("yours there are out of reach", &removed.out_of_reach)
}

fn path_of(peer: &str) -> String {
    format!("/v1/peers/{}", percent_encoded(peer))
}

/// Everything about a peer, for people.
pub(super) fn in_full(peer: &Peer) -> String {
    fields(&[
        ("name", peer.name.to_string()),
        ("peer id", peer.peer_id.clone()),
        ("connection", connection(peer)),
        ("why", why_not_connected(peer).unwrap_or_default().to_owned()),
        ("addresses", peer.addresses.join(", ")),
        ("allowed here", in_words(&peer.grants)),
        ("verification code", peer.verification_code.clone()),
        ("added", rfc3339(peer.added_at)),
    ])
}

fn connection(peer: &Peer) -> String {
    let Some(connection) = &peer.connection else { return "none".to_owned() };
    let trip = connection.round_trip_microseconds.map(|us| format!(", {}.{} ms", us / 1000, us % 1000 / 100));
    format!("{} for {}{}", connection.address, ago(now(), connection.since), trip.unwrap_or_default())
}

fn why_not_connected(peer: &Peer) -> Option<&str> {
    peer.last_error.as_deref().filter(|_| peer.connection.is_none())
}
