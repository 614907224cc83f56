//! `port-forward`: a deployment's port on this machine's loopback. One task for each connection, all owned here; they end
//! with the command.

use std::net::Ipv4Addr;
use std::str::FromStr;
use std::sync::Arc;

use clap::Args;
use peer_proto::code::Code;
use peer_proto::id::Name;
use peer_proto::text::escape;
use peer_proto::unit::Port;
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::client::Client;
use super::deployments::{get, path_of};
use super::failure::Failure;
use super::{Session, output, parse_reference};

/// Connections at one time; more wait in the listener's queue.
const CONNECTIONS_MAX: usize = 128;

/// Reach a deployment's port on this machine's loopback, without a gateway
///
/// Listens on 127.0.0.1 only, until Ctrl-C.
///
/// Example: peerctl port-forward web 9000:8080
#[derive(Debug, Args)]
pub(super) struct PortForwardArguments {
    /// Deployment: name or id
    #[arg(value_parser = parse_reference)]
    deployment: String,
    /// The port that the deployment exposes, after the local one if it is to be another (0: any free one)
    #[arg(value_name = "[LOCAL:]PORT", allow_hyphen_values = true)]
    ports: Ports,
}

/// `LOCAL:PORT` or `PORT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ports {
    local: u16,
    remote: Port,
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| text.parse::<Port>().map_err(|error| error.to_string());
        match text.split_once(':') {
            None => port(text).map(|remote| Self { local: remote.get(), remote }),
            Some(("0", remote)) => Ok(Self { local: 0, remote: port(remote)? }),
            Some((local, remote)) => Ok(Self { local: port(local)?.get(), remote: port(remote)? }),
        }
    }
}

/// What `port-forward --json` prints once it listens.
#[derive(Debug, Serialize)]
struct Listening {
    address: String,
    deployment: peer_proto::id::DeploymentId,
    port: Port,
}

/// Runs `port-forward`.
pub(super) async fn run(session: &Session, arguments: &PortForwardArguments) -> Result<(), Failure> {
    let Ports { local, remote } = arguments.ports;
    let status = get(session, &arguments.deployment, None).await?.status;
    let name = &status.specification.name;
    if status.specification.expose != Some(remote) {
        let exposed = status.specification.expose.map_or_else(|| "no port".to_owned(), |port| format!("port {port}"));
        return Err(Failure::new(Code::PortClosed, format!("'{name}' exposes {exposed}, not port {remote}")));
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, local)).await;
    let cannot = |error: std::io::Error| Failure::argument(format!("cannot listen on 127.0.0.1:{local}: {error}"));
    let listener = listener.map_err(cannot)?;
    let address = listener.local_addr().map_err(cannot)?.to_string();
    let listening = Listening { address, deployment: status.id, port: remote };
    session.output.result(&listening, |listening| format!("{}\n", listening.address))?;
    session.output.note(&format!("forwards to port {remote} of '{name}' until Ctrl-C"));
    // The id stays the same even if another deployment takes the name.
    let path = format!("{}/forward?port={remote}", path_of(&status.id.to_string()));
    Err(serve(session, &listener, &path, name).await)
}

/// Serves connections until that can bear no fruit any more.
async fn serve(session: &Session, listener: &TcpListener, path: &str, name: &Name) -> Failure {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let place = Arc::clone(&places).acquire_owned().await.expect("the semaphore is never closed");
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let (client, path) = (session.client.clone(), path.to_owned());
                    connections.spawn(async move {
                        let outcome = forward(&client, &path, stream).await;
                        drop(place);
                        outcome
                    });
                }
                Err(error) => return Failure::new(Code::FileFailed, format!("cannot accept connections: {error}")),
            },
            Some(ended) = connections.join_next() => match ended {
                Ok(Err(Failure::Problem(problem))) if problem.code == Code::NoSuchDeployment => return gone(name),
                Ok(Err(failure)) => output::warn(&escape(&failure.to_string())),
                Ok(Ok(())) | Err(_) => {}
            }
        }
    }
}

/// The peer has said that there is nothing left to forward to.
fn gone(name: &Name) -> Failure {
    Failure::new(Code::NoSuchDeployment, format!("'{name}' has been removed; `peerctl ps -a` shows what you have"))
}

async fn forward(client: &Client, path: &str, mut stream: TcpStream) -> Result<(), Failure> {
    let (mut upgraded, _connection) = client.upgrade(path).await?;
    // How the two ends part is their own affair; bytes that were taken have been passed on.
    drop(tokio::io::copy_bidirectional(&mut stream, &mut upgraded).await);
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_strictly() {
        let remote = Port::new(8080).unwrap();
        for (text, local) in [("8080", 8080), ("9000:8080", 9000), ("0:8080", 0)] {
            assert_eq!(text.parse::<Ports>().unwrap(), Ports { local, remote }, "{text}");
        }
        for text in ["", "0", "70000", "8080:0", ":8080", "8080:", "1:2:3", "-1", "127.0.0.1:8080"] {
            assert!(text.parse::<Ports>().unwrap_err().contains("port"), "{text}");
        }
    }
}
