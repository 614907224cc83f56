//! The provider's door: every stream that a peer opens comes through here, and goes to trust before it goes to a room.

mod control;
mod streams;

use std::sync::Arc;

use peer_net::exchange::ExchangeError;
use peer_net::{InboundStream, Incoming, Role};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::daemon::Daemon;
use crate::node::Node;
use crate::{introduction, protocols, withdrawal};

pub(crate) use streams::{CONNECT_DEADLINE, join_streams};

/// Serves inbound streams until the network ends or `cancel` says so. Each stream has a task of its own.
pub async fn serve(
    daemon: Arc<Daemon>,
    node: Arc<Node>,
    mut incoming: Incoming,
    tasks: TaskTracker,
    cancel: CancellationToken,
) {
    while let Some(Some(inbound)) = cancel.run_until_cancelled(incoming.next()).await {
        let (daemon, node) = (daemon.clone(), node.clone());
        tasks.spawn(cancel.clone().run_until_cancelled_owned(async move {
            one(&daemon, &node, inbound).await;
        }));
    }
}

/// Serves one stream. One of a peer that is removed meanwhile ends at once, wherever it waits.
async fn one(daemon: &Arc<Daemon>, node: &Arc<Node>, inbound: InboundStream) {
    let (peer, name, role) = (inbound.peer, inbound.protocol.name(), inbound.role);
    let removed = async {
        match role {
            Role::Peer => withdrawal::until_removed(&daemon.trust, peer).await,
            Role::Joiner | Role::Gateway | Role::Provider => std::future::pending().await,
        }
    };
    let served = tokio::select! {
        served = by_protocol(daemon, node, inbound) => served,
        () = removed => Err(ExchangeError::Ended),
    };
    if let Err(error) = served {
        tracing::debug!(%peer, protocol = name, %error, "stream ended early");
    }
}

async fn by_protocol(daemon: &Arc<Daemon>, node: &Arc<Node>, inbound: InboundStream) -> Result<(), ExchangeError> {
    match inbound.protocol {
        protocols::CONTROL => control::serve(daemon, node, inbound).await,
        protocols::LAYERS => streams::layer(daemon, node, inbound).await,
        protocols::LOGS => streams::logs(daemon, node, inbound).await,
        protocols::FORWARD => streams::forward(daemon, node, inbound).await,
        protocols::TUNNEL => {
            let visit = daemon.metrics.visit();
            let served = node.ingress.visit(inbound).await;
            drop(visit);
            served
        }
        protocols::JOIN => introduction::serve(daemon, node, inbound).await,
        // The gate offers no other.
        _ => Ok(()),
    }
}
