//! Tells peers of statements about keys: what we hold is offered, and sent where it is wanted.

use std::time::Duration;

use peer_net::exchange::{Deadline, read_frame, write_frame};
use peer_net::{DialOnceError, OpenError, Stream, dial_once};
use peer_proto::PeerId;
use peer_proto::code::Problem;
use peer_proto::frame::CONTROL_FRAME_MAX;
use peer_proto::identity::Identity;
use peer_proto::query::{Answer, Call, Hello, Offered};
use peer_trust::refused_keys::RefusedKey;

use super::{READ_DEADLINE, Requester, exchange_problem, open_problem};
use crate::protocols;

/// Longest time for reaching a peer under a former key.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// How a peer took a statement that was told under a former key.
#[derive(Debug)]
pub enum Told {
    /// It follows.
    Followed,
    /// It does not know the former key, or not any more.
    Refused,
    /// It cannot be reached, or does not follow.
    Failed(Problem),
}

impl Requester {
    /// Offers what is held to a peer, and gives the positions of what it wants.
    pub async fn offer(&self, peer: PeerId, held: &[RefusedKey]) -> Result<Vec<usize>, Problem> {
        let (mut stream, hello) = self.greet(peer).await?;
        let offers = held.iter().map(|key| Offered::new(&key.peer, &hello.incarnation, key.by_recovery)).collect();
        match self.call(peer, &mut stream, &Call::Offer(offers)).await? {
            Answer::Wanted(wanted) => {
                let positions = wanted.into_iter().filter_map(|position| usize::try_from(position).ok());
                Ok(positions.filter(|position| *position < held.len()).take(held.len()).collect())
            }
            _ => Err(self.unexpected(&peer)),
        }
    }

    /// Tells a peer of a statement.
    pub async fn tell(&self, peer: PeerId, statement: &[u8]) -> Result<(), Problem> {
        let (mut stream, _) = self.greet(peer).await?;
        self.tell_on(peer, &mut stream, statement).await
    }

    async fn tell_on(&self, peer: PeerId, stream: &mut Stream, statement: &[u8]) -> Result<(), Problem> {
        match self.call(peer, stream, &Call::Statement(statement.to_vec())).await? {
            Answer::Followed => Ok(()),
            _ => Err(self.unexpected(&peer)),
        }
    }

    async fn call(&self, peer: PeerId, stream: &mut Stream, call: &Call) -> Result<Answer, Problem> {
        let deadline = Deadline::after(READ_DEADLINE);
        let exchange = async {
            write_frame(stream, call, CONTROL_FRAME_MAX, deadline).await?;
            read_frame(stream, CONTROL_FRAME_MAX, deadline).await
        };
        match exchange.await.map_err(|error| exchange_problem(&self.name_of(&peer), &error))? {
            Answer::Problem(problem) => Err(self.in_name_of(&peer, &problem)),
            answer => Ok(answer),
        }
    }

    /// Tells a peer of a statement over a connection that a former key of ours makes: it does not know the new one yet.
    pub async fn tell_as(&self, former: &Identity, peer: PeerId, statement: &[u8]) -> Told {
        let snapshot = self.trust.snapshot();
        let Some(record) = snapshot.peers.get(&peer) else { return Told::Refused };
        let addresses = record.addresses();
        let dialled = dial_once(former.to_keypair(), peer, &addresses, protocols::CONTROL, DIAL_TIMEOUT).await;
        let (mut stream, connection) = match dialled {
            Ok(dialled) => dialled,
            Err(DialOnceError::Open(OpenError::RefusedByPeer { .. } | OpenError::NotOffered { .. })) => {
                return Told::Refused;
            }
            Err(DialOnceError::Open(error)) => return Told::Failed(open_problem(record.name.as_str(), &error)),
            Err(DialOnceError::Start(error)) => {
                return Told::Failed(Problem::new(peer_proto::code::Code::Internal, error.to_string()));
            }
        };
        let told = async {
            let hello = read_frame::<Hello, _>(&mut stream, CONTROL_FRAME_MAX, Deadline::after(READ_DEADLINE)).await;
            hello.map_err(|error| exchange_problem(record.name.as_str(), &error))?;
            self.tell_on(peer, &mut stream, statement).await
        };
        let told = told.await;
        drop(stream);
        connection.close().await;
        told.map_or_else(Told::Failed, |()| Told::Followed)
    }
}
