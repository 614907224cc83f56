//! `gateway add|list|remove`.

use clap::{Args, Subcommand};
use hyper::Method;
use peer_proto::control::{AddGateway, Gateway};
use peer_proto::text::escape;

use super::client::percent_encoded;
use super::failure::Failure;
use super::table::table;
use super::{Session, parse_reference};

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
/// Example: peerctl gateway add /ip4/192.0.2.1/tcp/4002/p2p/12D3KooWAbc…
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
            session.output.result(&gateway, |gateway| format!("{}: {}\n", escape(&gateway.address), tunnel(gateway)))
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

/// Gateways as a table.
pub(super) fn list(gateways: &[Gateway]) -> String {
    let row = |gateway: &Gateway| [gateway.address.clone(), tunnel(gateway), gateway.leases.to_string()];
    table(["GATEWAY", "TUNNEL", "NAMES"], &gateways.iter().map(row).collect::<Vec<_>>())
}

fn tunnel(gateway: &Gateway) -> String {
    match (&gateway.last_error, gateway.connected) {
        (_, true) => "connected".to_owned(),
        (Some(error), false) => format!("not connected: {}", escape(error)),
        (None, false) => "not connected yet".to_owned(),
    }
}
