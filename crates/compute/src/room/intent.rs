//! What owners want: recorded in the transaction that authorised it, and driven on from there.

use peer_proto::PeerId;
use peer_proto::code::{Code, Problem, Threat};
use peer_proto::deploy::{
    Demands, DeployRequest, Destination, Egress, Host, ImageSource, Request, Specification, State,
};
use peer_proto::id::DeploymentId;
use peer_state::database::{DatabaseError, Tx};
use peer_trust::authorise::Authorised;
use peer_trust::peers;
use peer_trust::refusal::Refusal;

use super::{Room, no_such_deployment};
use crate::deployment::{Life, Step, Wanted};
use crate::engine::Engine;
use crate::isolation;
use crate::ledger;
use crate::profile;
use crate::record::{self, Record};
use crate::wall::ranges::is_public;

impl<E: Engine> Room<E> {
    /// Records a deployment and reserves its share, in the transaction that authorised it.
    pub fn record(
        &self,
        tx: &Tx<'_>,
        authorised: &Authorised<'_>,
        request: &DeployRequest,
    ) -> Result<Result<Record, Refusal>, DatabaseError> {
        let owner = authorised.owner();
        if let Err(refusal) = self.check_deploy(request) {
            return Ok(Err(refusal));
        }
        let holder = record::find_by_name(tx, &owner, request.specification.name.as_str())?;
        if holder.as_ref().is_some_and(|holder| !is_replaceable(holder)) {
            let message = format!(
                "you have a deployment called '{}' on this machine already; remove it, or choose another name with --name",
                request.specification.name
            );
            return Ok(Err(Refusal::new(Code::NameTaken, Threat::G4, message)));
        }
        let replaced = holder.map(|holder| holder.id);
        if let Err(refusal) = self.check_bounds(tx, &owner, request, replaced)? {
            return Ok(Err(refusal));
        }
        let held = ledger::held(&record::all(tx)?, None);
        if let Err(refusal) =
            ledger::reserve(&ledger::offer(tx, self.inner.options.offer)?, &held, &request.specification.limits)
        {
            return Ok(Err(refusal));
        }
        // After the last refusal, which would be committed with it.
        if let Some(id) = replaced {
            record::delete(tx, id)?;
        }
        let signed = authorised.request();
        let record = Record {
            id: DeploymentId::derive(&owner, &signed.request_id()),
            owner,
            specification: request.specification.clone(),
            source: request.image.clone(),
            image: None,
            request: signed.request_id(),
            request_hash: signed.hash(),
            slot: record::free_slot(tx)?,
            wanted: Wanted::Running,
            life: Life::Pending,
            restarts: 0,
            restarts_in_row: 0,
            exit_code: None,
            created_at: (self.inner.options.clock)(),
            started_at: None,
            reason: None,
        };
        record::insert(tx, &record)?;
        record::keep(tx, record.id, signed)?;
        Ok(Ok(record))
    }

    fn check_deploy(&self, request: &DeployRequest) -> Result<(), Refusal> {
        let refuse = |problem: Problem| Refusal { problem, threat: Threat::V4, outcome: None };
        request.specification.check().map_err(refuse)?;
        self.check_isolation(&request.specification).map_err(refuse)?;
        self.check_ways(&request.specification)?;
        match &request.image {
            ImageSource::Offered(offer) => {
                let image = crate::fetch::check_offer(offer, &self.inner.options).map_err(refuse)?;
                profile::check_program(&request.specification, &image.wishes).map_err(refuse)
            }
            ImageSource::Registry(_) => Ok(()),
        }
    }

    /// What the machine cannot meet is refused before any image travels; and once more where the container is planned.
    fn check_isolation(&self, specification: &Specification) -> Result<(), Problem> {
        match self.inner.known_engine() {
            Some(engine) => isolation::meet(specification, &engine).map(drop),
            None if specification.demands == Demands::default() && specification.writable_root.is_none() => Ok(()),
            None => Err(Problem::new(
                Code::EngineUnavailable,
                "the container engine has not answered yet, so that nothing can be demanded of it; try again in a moment",
            )),
        }
    }

    /// What needs the wall is refused where the wall does not stand, before anything travels.
    fn check_ways(&self, specification: &Specification) -> Result<(), Refusal> {
        let refuse = |problem: Problem| Refusal { problem, threat: Threat::V4n, outcome: None };
        if specification.egress == Egress::None && specification.network.is_none() {
            return Ok(());
        }
        if let Egress::Hosts(hosts) = &specification.egress {
            let hidden =
                |destination: &&Destination| matches!(destination.host, Host::Address(address) if !is_public(address));
            if let Some(destination) = hosts.iter().find(hidden) {
                let message = format!("{} is no public address; nothing else can be reached", destination.host);
                return Err(refuse(Problem::new(Code::InvalidArgument, message)));
            }
        }
        self.wall().problem().map_or(Ok(()), |problem| Err(refuse(problem)))
    }

    /// Deployments at rest keep a container, a log and an image: they are bounded too, and so are images (V5).
    fn check_bounds(
        &self,
        tx: &Tx<'_>,
        owner: &PeerId,
        request: &DeployRequest,
        replaced: Option<DeploymentId>,
    ) -> Result<Result<(), Refusal>, DatabaseError> {
        let granted = peers::find_peer(tx, owner)?.and_then(|peer| peer.grants.deploy);
        let max = ledger::rows_max(granted.as_ref());
        if record::of_owner(tx, owner)?.iter().filter(|record| Some(record.id) != replaced).count() >= max {
            let message = format!(
                "you have {max} deployments on this machine, also counting those that do not run, and no more are \
                 allowed; remove some with `peerctl rm`"
            );
            return Ok(Err(Refusal::new(Code::OverLimit, Threat::V5, message)));
        }
        let ImageSource::Offered(offer) = &request.image else { return Ok(Ok(())) };
        let room = crate::fetch::check_room(tx, &self.inner.options, owner, offer)?;
        Ok(room.map_err(|problem| Refusal { problem, threat: Threat::V5, outcome: None }))
    }

    /// Changes what the owner wants of a deployment, in the transaction that authorised it.
    pub fn want(
        &self,
        tx: &Tx<'_>,
        authorised: &Authorised<'_>,
        id: DeploymentId,
        request: &Request,
    ) -> Result<Result<Record, Refusal>, DatabaseError> {
        let Some(mut record) = record::find_owned(tx, &authorised.owner(), id)? else {
            return Ok(Err(Refusal { problem: no_such_deployment(), threat: Threat::G4, outcome: None }));
        };
        if let (Request::Start(_) | Request::Restart(_), Life::Paused(problem, _)) = (request, &record.life) {
            return Ok(Err(Refusal { problem: problem.clone(), threat: Threat::G6, outcome: None }));
        }
        let changed = match request {
            Request::Stop(_) => want_stopped(&mut record),
            Request::Start(_) => want_running(&mut record),
            Request::Restart(_) => want_restarted(&mut record),
            Request::Remove(_) => want_removed(&mut record),
            Request::Deploy(_) | Request::Push(_) => Ok(()),
        };
        if let Err(problem) = changed {
            return Ok(Err(Refusal { problem, threat: Threat::G4, outcome: None }));
        }
        if matches!(request, Request::Start(_) | Request::Restart(_))
            && let Err(problem) = self.check_isolation(&record.specification)
        {
            return Ok(Err(Refusal { problem, threat: Threat::V4, outcome: None }));
        }
        if matches!(request, Request::Start(_) | Request::Restart(_)) && record.life.state() == State::Pending {
            let others: Vec<_> = record::all(tx)?.into_iter().filter(|other| other.id != id).collect();
            let held = ledger::held(&others, None);
            let offer = ledger::offer(tx, self.inner.options.offer)?;
            if let Err(refusal) = ledger::reserve(&offer, &held, &record.specification.limits) {
                return Ok(Err(refusal));
            }
        }
        record::update(tx, &record)?;
        Ok(Ok(record))
    }
}

/// A deployment that never ran and will not by itself has nothing to lose: a new try under its name takes its place.
fn is_replaceable(holder: &Record) -> bool {
    holder.started_at.is_none() && !holder.life.state().holds_share() && holder.wanted != Wanted::Restarted
}

pub(super) fn want_stopped(record: &mut Record) -> Result<(), Problem> {
    record.wanted = Wanted::Stopped;
    if record.life.state().holds_share() && record.life != Life::Stopping { record.step(Step::Stop) } else { Ok(()) }
}

fn want_running(record: &mut Record) -> Result<(), Problem> {
    if record.wanted == Wanted::Removed {
        return Err(no_such_deployment());
    }
    if record.life.state().holds_share() {
        let message = format!("the deployment is {} already", record.life.state());
        return Err(Problem::new(Code::WrongState, message));
    }
    (record.wanted, record.restarts, record.restarts_in_row) = (Wanted::Running, 0, 0);
    record.reason = None;
    record.step(Step::Start)
}

fn want_restarted(record: &mut Record) -> Result<(), Problem> {
    if record.life.state().holds_share() {
        want_stopped(record)?;
        record.wanted = Wanted::Restarted;
        Ok(())
    } else {
        want_running(record)
    }
}

pub(super) fn want_removed(record: &mut Record) -> Result<(), Problem> {
    want_stopped(record)?;
    record.wanted = Wanted::Removed;
    Ok(())
}
