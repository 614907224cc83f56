//! Who can be reached: where this machine listens, its peers and its gateways.

use peer_net::Role;
use peer_proto::control::Finding;

use super::{Examined, failure, note, ok, warning};
use crate::api::gateways::describe_all;
use crate::daemon::Daemon;
use crate::node::Node;

pub(super) fn check(examined: &Examined) -> Vec<Finding> {
    let Ok(node) = &examined.node else { return Vec::new() };
    vec![listening(node), peers(&examined.daemon, node), gateways(&examined.daemon, node)]
}

fn listening(node: &Node) -> Finding {
    let addresses: Vec<_> = node.network.listen_addresses().iter().map(ToString::to_string).collect();
    if addresses.is_empty() {
        let message = "this machine listens nowhere; peers can be reached, but cannot reach it";
        return warning("listening", message, "set `listen` in the configuration if peers should connect to it");
    }
    ok("listening", format!("peers connect to {}", addresses.join(", ")))
}

fn peers(daemon: &Daemon, node: &Node) -> Finding {
    const CHECK: &str = "peers";
    let connections = node.network.connections();
    let is_connected = |peer| connections.iter().any(|one| one.role == Role::Peer && one.peer == peer);
    let list = daemon.trust.snapshot();
    let away: Vec<_> =
        list.peers.values().filter(|peer| !is_connected(peer.peer)).map(|peer| peer.name.as_str()).collect();
    match (list.peers.len(), away.len()) {
        (0, _) => note(CHECK, "no peer is trusted yet", "run: peerctl invite, or peerctl join TICKET"),
        (all, 0) => ok(CHECK, format!("all {all} peers are connected")),
        (all, missing) => {
            let message = format!("{missing} of {all} peers are not connected: {}", away.join(", "));
            warning(CHECK, message, "run: peerctl peers show NAME, which says why")
        }
    }
}

fn gateways(daemon: &Daemon, node: &Node) -> Finding {
    const CHECK: &str = "gateways";
    let all = describe_all(daemon, Some(node));
    let away: Vec<_> = all.iter().filter(|gateway| !gateway.connected).collect();
    match (all.len(), away.first()) {
        (0, _) if node.room.is_none() => ok(CHECK, "this machine runs nobody's containers, so it needs no gateway"),
        (0, _) => {
            let message = "no gateway is set; deployments here get no public address";
            note(CHECK, message, "run: peerctl gateway add ADDRESS (peergate prints its address)")
        }
        (count, None) => ok(CHECK, format!("the tunnels to all {count} gateways stand")),
        (_, Some(first)) => {
            let reason = first.last_error.clone().unwrap_or_else(|| "not tried yet".to_owned());
            let message = format!("the tunnel to {} is down: {reason}", first.address);
            failure(CHECK, message, "look whether peergate runs there and has allowed this machine (peergate allow)")
        }
    }
}
