//! The daemon's handle on a forwarder: a container of ours that shares the network of one guest and carries streams to its
//! one port. Whoever keeps the container running says here how far it is.

use std::{io, time::Duration};

use peer_guest::{
    dial::{DialError, Dialer},
    forward::Answer,
};
use peer_proto::unit::Port;
use tokio::{net::UnixStream, sync::watch, task::JoinSet, time::timeout};

use super::ConnectError;

/// How far a forwarder is.
#[derive(Debug, Clone)]
pub(crate) enum Progress {
    /// It is being started, for the first time or again.
    Coming,
    /// It answers.
    Ready(Dialer),
}

/// A forwarder to one port. It ends when the last of its handles is dropped.
#[derive(Debug)]
pub struct Forwarder {
    port: Port,
    progress: watch::Receiver<Progress>,
    _keeper: JoinSet<()>,
}

impl Forwarder {
    /// A forwarder that `keeper` keeps running. It gives its end of the progress up when the guest has ended.
    pub(crate) fn start<K>(port: Port, keeper: impl FnOnce(watch::Sender<Progress>) -> K) -> Self
    where
        K: Future<Output = ()> + Send + 'static,
    {
        let (sender, progress) = watch::channel(Progress::Coming);
        let mut tasks = JoinSet::new();
        tasks.spawn(keeper(sender));
        Self { port, progress, _keeper: tasks }
    }

    /// Connects to the port, which must be the one that it was made for.
    pub(super) async fn connect(&self, port: Port, within: Duration) -> Result<UnixStream, ConnectError> {
        if port != self.port {
            return Err(ConnectError::Closed { port });
        }
        timeout(within, self.dial()).await.map_err(|_| ConnectError::TimedOut { port })?
    }

    async fn dial(&self) -> Result<UnixStream, ConnectError> {
        let (mut progress, port) = (self.progress.clone(), self.port);
        loop {
            let Progress::Ready(dialer) = progress.borrow_and_update().clone() else {
                progress.changed().await.map_err(|_| ConnectError::NotRunning)?;
                continue;
            };
            return match dialer.connect().await {
                Ok(stream) => Ok(stream),
                // It has died before it was asked for anything: the next one is asked.
                Err(DialError::Gone) => {
                    progress.changed().await.map_err(|_| ConnectError::NotRunning)?;
                    continue;
                }
                Err(DialError::Unanswered(Answer::Closed)) => Err(ConnectError::Closed { port }),
                Err(DialError::Unanswered(Answer::TimedOut)) => Err(ConnectError::TimedOut { port }),
                Err(error @ DialError::Unanswered(_)) => Err(ConnectError::System(io::Error::other(error))),
                Err(DialError::System(error)) => Err(ConnectError::System(error)),
            };
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    fn port(number: u16) -> Port {
        number.to_string().parse().unwrap()
    }

    #[tokio::test]
    async fn v4n_only_the_recorded_port_is_asked_for() {
        let forwarder = Forwarder::start(port(8080), |progress| async move { progress.closed().await });
        let other = forwarder.connect(port(22), SHORT).await.unwrap_err();
        assert!(matches!(other, ConnectError::Closed { .. }), "{other}");
        // The right one is waited for while the forwarder comes.
        let right = forwarder.connect(port(8080), SHORT).await.unwrap_err();
        assert!(matches!(right, ConnectError::TimedOut { .. }), "{right}");
    }

    #[tokio::test]
    async fn a_forwarder_whose_guest_has_ended_is_no_longer_waited_for() {
        let forwarder = Forwarder::start(port(8080), |progress| async move { drop(progress) });
        let error = forwarder.connect(port(8080), Duration::from_secs(20)).await.unwrap_err();
        assert!(matches!(error, ConnectError::NotRunning), "{error}");
    }
}
