//! The answer to one signed request, event by event. Each is signed by the provider and bound to the request and its place.

use std::time::Duration;

use peer_net::Stream;
use peer_net::exchange::{Deadline, read_frame_bytes};
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::deploy::{Event, Refusal};
use peer_proto::envelope::open_reply;
use peer_proto::frame::CONTROL_FRAME_MAX;
use peer_proto::id::{DeploymentId, RequestHash, RequestId};
use peer_state::database::Database;

use super::{Requester, exchange_problem, memory};

/// How long the provider may be silent: longer than the longest stop, shorter than for ever. Its own patience with a
/// sender that has gone away is far shorter.
const SILENCE_MAX: Duration = Duration::from_mins(30);

/// An answer under way.
#[derive(Debug)]
pub struct Conversation {
    requester: Requester,
    peer: PeerId,
    stream: Stream,
    hash: RequestHash,
    request_id: RequestId,
    sequence: u32,
    over: bool,
}

impl Conversation {
    pub(super) fn new(
        requester: Requester,
        peer: PeerId,
        stream: Stream,
        hash: RequestHash,
        request_id: RequestId,
    ) -> Self {
        Self { requester, peer, stream, hash, request_id, sequence: 0, over: false }
    }

    /// The provider.
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// Names the request in a layer's transfer.
    pub fn hash(&self) -> RequestHash {
        self.hash
    }

    /// The next event; `None` after the final one. What it tells is remembered first.
    pub async fn next(&mut self) -> Option<Result<Event, Problem>> {
        if self.over {
            return None;
        }
        let event = self.read().await;
        self.over = event.as_ref().map_or(true, Event::is_final);
        Some(event)
    }

    async fn read(&mut self) -> Result<Event, Problem> {
        let name = self.requester.name_of(&self.peer);
        let read = read_frame_bytes(&mut self.stream, CONTROL_FRAME_MAX, Deadline::after(SILENCE_MAX)).await;
        let bytes = read.map_err(|error| exchange_problem(&name, &error))?;
        let me = self.requester.identity.peer_id();
        let reply = open_reply(&bytes, &self.peer, &me, self.hash, self.sequence).map_err(|error| {
            Problem::new(Code::InvalidSignature, format!("{name} answered with a line that is not its own: {error}"))
        })?;
        let first = self.sequence == 0;
        self.sequence += 1;
        let intended = DeploymentId::derive(&me, &self.request_id);
        remember(&self.requester.database, self.peer, intended, first, &reply.event).await?;
        match reply.event {
            Event::Failed(refusal) => Err(self.refused(&refusal)),
            event => Ok(event),
        }
    }

    fn refused(&self, refusal: &Refusal) -> Problem {
        let problem = self.requester.in_name_of(&self.peer, &refusal.problem);
        if problem.code != Code::ClockDrift {
            return problem;
        }
        // Only we know which of the two names the person uses.
        let name = self.requester.name_of(&self.peer);
        let (ours, theirs) = (crate::clock::now(), refusal.clock);
        let (direction, difference) =
            if ours > theirs { ("ahead of", ours.since(theirs)) } else { ("behind", theirs.since(ours)) };
        let minutes = difference.div_ceil(60_000);
        let message = format!(
            "{name} refused: this machine's clock is {minutes} min {direction} {name}'s, and at most 5 min are accepted; set the wrong one right"
        );
        Problem::new(Code::ClockDrift, message)
    }
}

/// Writes down what an event tells. `first` says that nothing came before it.
async fn remember(
    database: &Database,
    peer: PeerId,
    intended: DeploymentId,
    first: bool,
    event: &Event,
) -> Result<(), Problem> {
    match event {
        Event::Changed(status) | Event::Done(status) => {
            memory::remember(database, peer, (**status).clone(), crate::clock::now()).await
        }
        Event::Removed(id) => memory::forget(database, *id).await,
        // Refused before it was recorded: the deployment that we had noted will never be.
        Event::Failed(_) if first => memory::forget(database, intended).await,
        Event::Accepted(_) | Event::Want(_) | Event::Pushed(_) | Event::Failed(_) => Ok(()),
    }
}
