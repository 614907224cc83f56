//! The one port of a deployment that runs: where it is, and for whom.

use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::deploy::State;
use peer_proto::id::DeploymentId;
use peer_proto::unit::Port;
use tokio_util::sync::CancellationToken;

use super::Room;
use crate::connector::Network;
use crate::deployment::Life;
use crate::engine::Engine;

/// Where a running deployment can be reached.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Whose it is.
    pub owner: PeerId,
    /// The one port that may be reached.
    pub port: Port,
    /// Whether it gets a public name.
    pub publish: bool,
    /// Its network.
    pub network: Network,
    /// Ends what visitors have open to it: it is being ended, or runs no more.
    pub closed: CancellationToken,
}

impl<E: Engine> Room<E> {
    /// Where a deployment can be reached, if it runs and exposes a port.
    pub fn endpoint(&self, id: DeploymentId) -> Option<Endpoint> {
        self.inner.live().get(&id)?.endpoint.clone()
    }

    /// Everything that can be reached now.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        self.inner.live().values().filter_map(|live| live.endpoint.clone()).collect()
    }

    /// The deployment's port, for its owner, who must name it right.
    pub async fn owned_endpoint(&self, owner: PeerId, id: DeploymentId, port: Port) -> Result<Endpoint, Problem> {
        let record = self.owned(owner, id).await?;
        match record.specification.expose {
            None => {
                let message = "this deployment exposes no port; deploy it with --expose PORT";
                return Err(Problem::new(Code::PortClosed, message));
            }
            Some(exposed) if exposed != port => {
                let message = format!("this deployment exposes port {exposed}, not {port}");
                return Err(Problem::new(Code::PortClosed, message));
            }
            Some(_) => {}
        }
        if let Life::Paused(problem, _) = record.life {
            return Err(problem);
        }
        self.endpoint(id).ok_or_else(|| {
            if record.life.state() == State::Running {
                let message = "the deployment runs, but its machine cannot reach into its network; `peerctl doctor` there says why";
                return Problem::new(Code::Internal, message);
            }
            let message = format!("the deployment is {}, not running; start it first", record.life.state());
            Problem::new(Code::WrongState, message)
        })
    }
}
