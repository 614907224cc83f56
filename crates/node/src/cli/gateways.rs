//! `gateway add|list|remove`.

use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use hyper::Method;
use peer_proto::control::{AddGateway, Gateway};
use peer_proto::text::escape;

use super::client::percent_encoded;
use super::failure::Failure;
use super::table::{remarks, table};
use super::{Session, parse_reference};

/// How long `gateway add` waits for the tunnel.
const OUTCOME_TIME: Duration = Duration::from_secs(2);
const OUTCOME_PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug, Subcommand)]
pub(super) enum GatewayCommand {
    Add(AddArguments),
    #[command(visible_alias = "ls")]
    List(ListArguments),
    Remove(RemoveArguments),
}

/// Serve the exposed deployments of this machine through a gateway
///
/// The gateway must admit this machine: `peergate allow PEERID` there, with the id that `peerctl whoami` shows here.
///
/// Example: peerctl gateway add /ip4/192.0.2.1/tcp/4101/p2p/12D3KooWAbc…
#[derive(Debug, Args)]
pub(super) struct AddArguments {
    /// Address with the gateway's PeerId, as `peergate info` prints it
    address: String,
}

/// List the gateways
///
/// Example: peerctl gateway list
#[derive(Debug, Args)]
pub(super) struct ListArguments {}

/// Serve through a gateway no longer; its addresses end at once
///
/// Example: peerctl gateway remove 12D3KooWAbc…
#[derive(Debug, Args)]
pub(super) struct RemoveArguments {
    /// PeerId of the gateway, or a unique beginning
    #[arg(value_parser = parse_reference)]
    gateway: String,
}

/// Runs one of the `gateway` commands.
pub(super) async fn run(session: &Session, command: GatewayCommand) -> Result<(), Failure> {
    match command {
        GatewayCommand::Add(AddArguments { address }) => {
            let gateway: Gateway = session.client.send(Method::POST, "/v1/gateways", &AddGateway { address }).await?;
            let gateway = first_outcome(session, gateway).await?;
            session.output.result(&gateway, |gateway| {
                let why = gateway.last_error.as_ref().map(|error| format!(": {}", escape(error))).unwrap_or_default();
                format!("{}: {}{why}\n", escape(&gateway.address), tunnel(gateway))
            })
        }
        GatewayCommand::List(ListArguments {}) => {
            let gateways: Vec<Gateway> = session.client.get("/v1/gateways").await?;
            session.output.result(&gateways, |gateways| list(gateways))
        }
        GatewayCommand::Remove(RemoveArguments { gateway }) => {
            let path = format!("/v1/gateways/{}", percent_encoded(&gateway));
            let gateway: Gateway = session.client.delete(&path).await?;
            session.output.result(&gateway, |gateway| format!("{} is removed\n", escape(&gateway.address)))
        }
    }
}

/// Waits a little until the tunnel stands or is known not to.
async fn first_outcome(session: &Session, mut gateway: Gateway) -> Result<Gateway, Failure> {
    let deadline = Instant::now() + OUTCOME_TIME;
    while !gateway.connected && gateway.last_error.is_none() && Instant::now() < deadline {
        tokio::time::sleep(OUTCOME_PAUSE).await;
        let all: Vec<Gateway> = session.client.get("/v1/gateways").await?;
        match all.into_iter().find(|one| one.peer_id == gateway.peer_id) {
            Some(now) => gateway = now,
            None => break,
        }
    }
    Ok(gateway)
}

/// Gateways as a table, and below it why some are not connected.
pub(super) fn list(gateways: &[Gateway]) -> String {
    let row = |gateway: &Gateway| [gateway.address.clone(), tunnel(gateway).to_owned(), gateway.leases.to_string()];
    let rows: Vec<_> = gateways.iter().map(row).collect();
    let why = gateways.iter().filter(|gateway| !gateway.connected);
    let why = why.filter_map(|gateway| Some((gateway.address.as_str(), gateway.last_error.as_deref()?)));
    table(["GATEWAY", "TUNNEL", "NAMES"], &rows) + &remarks(why)
}

fn tunnel(gateway: &Gateway) -> &'static str {
    match (&gateway.last_error, gateway.connected) {
        (_, true) => "connected",
        (Some(_), false) => "not connected",
        (None, false) => "not connected yet",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_says_in_a_word_and_below_it_why() {
        let gateway = |address: &str, connected, error: Option<&str>| Gateway {
            peer_id: String::new(),
            address: address.to_owned(),
            connected,
            leases: 0,
            last_error: error.map(str::to_owned),
        };
        let gateways = [gateway("/a", true, None), gateway("/b", false, Some("refused"))];
        let expected = "\
GATEWAY  TUNNEL         NAMES
/a       connected      0
/b       not connected  0

/b: refused
";
        assert_eq!(list(&gateways), expected);
    }
}
