//! The one decision (STYLE: "authorise"). Default deny, before any work, in the transaction that records it.

use std::marker::PhantomData;

use libp2p_identity::PeerId;
use peer_proto::code::{Code, Threat};
use peer_proto::deploy::{Limits, Request, Specification};
use peer_proto::envelope::Signed;
use peer_proto::grant::DeployGrant;
use peer_proto::unit::Timestamp;
use peer_state::audit::{self, Entry, Outcome};
use peer_state::database::{DatabaseError, Tx};

use crate::peers;
use crate::refusal::Refusal;
use crate::refused::Refused;
use crate::replay::{self, Known};
use crate::run::Moment;
use crate::{allowed, detail, floor, kept, pause};

/// What a peer's deployments hold at the moment of the decision; counted by the room that runs them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// Processors (millicores).
    pub cpu: u64,
    /// Memory (bytes).
    pub memory: u64,
    /// Deployments.
    pub containers: u32,
}

/// What a request would have running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// How it would run: that of the request, or that of the row which the request is about.
    pub specification: Specification,
    /// Whether it adds to what its owner holds. What runs already is counted there.
    pub adds: bool,
}

impl Share {
    /// What is not held yet.
    pub fn more(specification: Specification) -> Self {
        Self { specification, adds: true }
    }
}

/// A request that may be carried out. Made by [`authorise`] alone, and bound to the transaction that recorded it.
#[derive(Debug)]
pub struct Authorised<'tx> {
    signed: Signed,
    transaction: PhantomData<&'tx ()>,
}

impl Authorised<'_> {
    /// Who asks.
    pub fn owner(&self) -> PeerId {
        self.signed.signer()
    }

    /// The request.
    pub fn request(&self) -> &Signed {
        &self.signed
    }
}

/// Decides on a request from the peer whose signature it bears. Whatever the decision, the caller commits the
/// transaction: it holds the audit line, and the mark that the request has been seen.
///
/// `share` is what the request would have running, if it is granted. `refused` says which refusals get a line of the audit
/// log of their own: the first of a kind does, those that follow are counted.
pub fn authorise<'tx>(
    tx: &'tx Tx<'_>,
    request: Signed,
    moment: Moment,
    held: Held,
    share: Option<&Share>,
    refused: &Refused,
) -> Result<Result<Authorised<'tx>, Refusal>, DatabaseError> {
    let decision = decide(tx, &request, moment, held, share)?;
    let (outcome, detail) = match &decision {
        Ok(()) => (Outcome::Allowed, detail::request(&request)),
        Err(refusal) => {
            (Outcome::Refused(refusal.threat), format!("{}: {}", detail::request(&request), refusal.problem.message))
        }
    };
    let is_told = match &decision {
        Ok(()) => true,
        Err(refusal) => refused.is_first(request.signer(), refusal.problem.code, refusal.threat, &detail),
    };
    if is_told {
        let (at, actor, action) = (moment.now, request.signer().to_string(), request.body().verb().to_owned());
        audit::append(tx, &Entry { at, actor, action, outcome, detail })?;
    }
    match decision {
        Ok(()) => {
            replay::remember(tx, &request, moment, "accepted")?;
            Ok(Ok(Authorised { signed: request, transaction: PhantomData }))
        }
        Err(refusal) => {
            // A refused request stays refused: the same bytes never act later, when there is more room.
            if !matches!(
                refusal.problem.code,
                Code::DuplicateRequest
                    | Code::StaleIncarnation
                    | Code::TooManyRequests
                    | Code::UntrustedPeer
                    | Code::ClockBehind
            ) {
                replay::remember(tx, &request, moment, refusal.problem.code.as_str())?;
            }
            Ok(Err(refusal))
        }
    }
}

fn decide(
    tx: &Tx<'_>,
    request: &Signed,
    moment: Moment,
    held: Held,
    share: Option<&Share>,
) -> Result<Result<(), Refusal>, DatabaseError> {
    let Some(peer) = peers::find_peer(tx, &request.signer())? else {
        return Ok(Err(Refusal::new(Code::UntrustedPeer, Threat::I3, "this machine has not added you as a peer")));
    };
    // Before the replay window is looked at: what lies before the floor may have been forgotten there.
    if let Err(problem) = floor::pass(tx, moment.now)? {
        return Ok(Err(Refusal { problem, threat: Threat::V3, outcome: None }));
    }
    match replay::look_up(tx, request, moment, replay::REQUESTS_MAX)? {
        Known::New => {}
        Known::Repeated(outcome) => {
            let message = format!("this request has been made before; it led to: {outcome}");
            let refusal = Refusal::new(Code::DuplicateRequest, Threat::V3, message);
            return Ok(Err(Refusal { outcome: Some(outcome), ..refusal }));
        }
        Known::Full => {
            let message = "too many requests are remembered for you; wait some minutes and try again";
            return Ok(Err(Refusal::new(Code::TooManyRequests, Threat::V3, message)));
        }
    }
    if request.incarnation() != moment.incarnation {
        let message = "the request was made for an earlier run of the provider's daemon; make it again";
        return Ok(Err(Refusal::new(Code::StaleIncarnation, Threat::V3, message)));
    }
    // Ending what one owns needs no grant: whoever loses it must still be able to clean up.
    if matches!(request.body(), Request::Stop(_) | Request::Remove(_)) {
        return Ok(Ok(()));
    }
    // Whoever may do nothing here learns nothing of the machine either.
    if let Err(refusal) = within_grant(peer.grants.deploy.as_ref(), moment.now, held, share) {
        return Ok(Err(refusal));
    }
    let hold = pause::of_owner(tx, &request.signer(), moment.now)?;
    Ok(hold.map_or(Ok(()), |hold| Err(Refusal { problem: hold.problem, threat: Threat::G6, outcome: None })))
}

/// Whether a deployment of this owner may be started again without being asked for: a peer needs a live grant for it, that
/// still covers it beside what he `held` before it, unless it was kept on purpose. Of an owner who is no peer any more, only
/// that is left.
pub fn may_go_on(
    tx: &Tx<'_>,
    owner: &PeerId,
    now: Timestamp,
    held: Held,
    specification: &Specification,
) -> Result<Result<(), Refusal>, DatabaseError> {
    let Some(peer) = peers::find_peer(tx, owner)? else { return Ok(Ok(())) };
    if !peer.grants.may_deploy(now) && kept::is_kept(tx, owner)? {
        return Ok(Ok(()));
    }
    let share = Share::more(specification.clone());
    Ok(within_grant(peer.grants.deploy.as_ref(), now, held, Some(&share)))
}

fn within_grant(grant: Option<&DeployGrant>, now: Timestamp, held: Held, share: Option<&Share>) -> Result<(), Refusal> {
    let Some(grant) = grant else {
        let message =
            "this machine does not let you deploy; ask its owner to run: peerctl peers allow YOU --allow deploy";
        return Err(Refusal::new(Code::NotGranted, Threat::G4, message));
    };
    if !grant.is_live(now) {
        let message = "your permission to deploy on this machine has expired; ask its owner to renew it";
        return Err(Refusal::new(Code::NotGranted, Threat::G4, message));
    }
    let Some(Share { specification, adds }) = share else { return Ok(()) };
    allowed::check(specification, grant)?;
    if *adds { within_sums(grant, held, &specification.limits) } else { Ok(()) }
}

/// What all deployments of the peer may hold together.
fn within_sums(grant: &DeployGrant, held: Held, share: &Limits) -> Result<(), Refusal> {
    let over = |what: &str, asked: String, left: String| {
        let message = format!("{what} {asked} is more than your grant leaves on this machine ({left})");
        Err(Refusal::new(Code::OverLimit, Threat::V5, message))
    };
    let cpu_left = u64::from(grant.max_cpu.get()).saturating_sub(held.cpu);
    if u64::from(share.cpu.get()) > cpu_left {
        return over("cpu", share.cpu.to_string(), format!("{}.{:03} processors", cpu_left / 1000, cpu_left % 1000));
    }
    let memory_left = grant.max_memory.get().saturating_sub(held.memory);
    if share.memory.get() > memory_left {
        return over("memory", share.memory.to_string(), peer_proto::unit::format_bytes(memory_left));
    }
    if held.containers >= grant.max_containers {
        return over("one more deployment", String::new(), format!("at most {} at a time", grant.max_containers));
    }
    Ok(())
}

#[cfg(test)]
#[path = "authorise_tests.rs"]
mod tests;
