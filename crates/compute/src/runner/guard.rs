//! What the runner lets the other process do to networks and to the wall around them: whoever asks may have been taken over.
//!
//! Rules are made in a fixed frame ([`crate::wall::rules`]), so that no order can open the host or a neighbour to a
//! container. What is left to choose is how far a network gets among public addresses. That is held against what owners
//! have signed, as far as their orders have been seen; and nothing starts in a network that has no rules.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::Ipv4Addr,
    sync::{Mutex, MutexGuard, PoisonError},
};

use peer_proto::{
    deploy::{Egress, Host, Specification},
    id::DeploymentId,
    unit::Port,
};
use tokio::sync::Mutex as AsyncMutex;

use crate::{
    engine::{ContainerId, Engine, EngineError, NetworkPlan, ResolverSockets},
    wall::{
        Options,
        attach::{Attachment, taken_ranges},
        probe,
        ranges::Range,
        rows::{OUTWARD_LENGTH, SHARED_LENGTH},
        rules::{Admission, FilterOrder, Reach, Ruleset, Tag, Walled},
    },
};

/// Networks and closed ranges that one order may name.
const NETWORKS_MAX: usize = 4096;
/// Addresses that one order may admit.
const ADMISSIONS_MAX: usize = 1 << 16;
/// Longest time for which an address may be admitted (seconds).
const ADMITTED_MAX: u64 = 2 * 3600;
/// Orders that are remembered; forgotten together when they become too many, and then asked for again.
const SIGNED_MAX: usize = 4096;
/// Containers of the wall's test that are remembered.
const TESTS_MAX: usize = 16;

/// What an owner has signed, as far as it matters here, and which networks were made for it.
#[derive(Debug, Clone)]
struct Signed {
    egress: Egress,
    expose: Option<Port>,
    attachment: Attachment,
}

/// The rules that the kernel was given last, and how it lists them.
#[derive(Debug)]
struct Standing {
    networks: BTreeMap<u16, Walled>,
    listing: String,
}

/// Judges calls about networks, and remembers what it has let through.
#[derive(Debug)]
pub(super) struct Guard {
    options: Options,
    /// Held while the rules change.
    standing: AsyncMutex<Option<Standing>>,
    signed: Mutex<HashMap<DeploymentId, Signed>>,
    tests: Mutex<HashSet<ContainerId>>,
}

fn refused<T>(message: &str) -> Result<T, EngineError> {
    Err(EngineError::Refused { message: message.to_owned() })
}

fn not_standing<T>() -> Result<T, EngineError> {
    Err(EngineError::InUse { message: "the wall around the network does not stand".to_owned() })
}

/// Whether rules that let a network get so far give nobody more than was signed.
fn fits(egress: &Egress, reach: Reach) -> bool {
    matches!((egress, reach), (Egress::Internet, Reach::Public | Reach::Admitted) | (Egress::Hosts(_), Reach::Admitted))
}

/// Whether an address and port may be what was signed: which address a name has, is not known here.
fn lists(egress: &Egress, admission: Admission) -> bool {
    let Egress::Hosts(hosts) = egress else { return false };
    hosts.iter().any(|destination| {
        destination.port.get() == admission.port
            && match &destination.host {
                Host::Name(_) => true,
                Host::Address(address) => *address == admission.address,
            }
    })
}

impl Guard {
    pub(super) fn new(options: Options) -> Self {
        Self { options, standing: AsyncMutex::default(), signed: Mutex::default(), tests: Mutex::default() }
    }

    fn signed(&self) -> MutexGuard<'_, HashMap<DeploymentId, Signed>> {
        self.signed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tests(&self) -> MutexGuard<'_, HashSet<ContainerId>> {
        self.tests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enabled(&self) -> Result<(), EngineError> {
        if self.options.enabled { Ok(()) } else { refused("its owner has turned ways out of containers off") }
    }

    /// Takes note of a verified order. Its networks must have rules that give no more than it asks for, and a way out is
    /// one deployment's alone.
    pub(super) async fn note(
        &self,
        deployment: DeploymentId,
        specification: &Specification,
        attachment: Attachment,
    ) -> Result<(), EngineError> {
        let standing = self.standing.lock().await;
        let walled = |number| standing.as_ref().and_then(|standing| standing.networks.get(&number));
        let mut signed = self.signed();
        if let Some((number, resolver)) = attachment.outward {
            let Some(walled) = walled(number) else { return not_standing() };
            if !fits(&specification.egress, walled.reach) || walled.gateway() != resolver {
                return refused("the rules around its network are not those that the signed request asks for");
            }
            let taken = |(other, one): (&DeploymentId, &Signed)| {
                *other != deployment && one.attachment.outward.is_some_and(|(theirs, _)| theirs == number)
            };
            if signed.iter().any(taken) {
                return refused("the network is another deployment's way out");
            }
        }
        if let Some(number) = attachment.shared {
            match walled(number) {
                None => return not_standing(),
                Some(walled) if walled.reach != Reach::Members => return refused("the network is a way out"),
                Some(_) => {}
            }
        }
        if signed.len() >= SIGNED_MAX {
            signed.clear();
        }
        let (egress, expose) = (specification.egress.clone(), specification.expose);
        signed.insert(deployment, Signed { egress, expose, attachment });
        Ok(())
    }

    /// Whether the deployment's container may start: its order has been seen and, if it is in any network, the kernel has
    /// the rules that it was given.
    pub(super) async fn may_start(
        &self,
        engine: &impl Engine,
        deployment: DeploymentId,
        tag: Tag,
    ) -> Result<(), EngineError> {
        let attachment = self.signed().get(&deployment).map(|signed| signed.attachment);
        match attachment {
            None => Err(EngineError::NotPlanned),
            Some(attachment) if attachment == Attachment::default() => Ok(()),
            Some(_) => self.stands(engine, tag).await.map(drop),
        }
    }

    /// Whether this port is the one that was signed. A deployment whose order has not been seen may be reached at any.
    pub(super) fn may_reach(&self, deployment: &DeploymentId, port: Port) -> bool {
        self.signed().get(deployment).is_none_or(|signed| signed.expose == Some(port))
    }

    /// The networks that stand, if the kernel has the rules that it was given last.
    async fn stands(&self, engine: &impl Engine, tag: Tag) -> Result<BTreeSet<u16>, EngineError> {
        let standing = self.standing.lock().await;
        let Some(standing) = standing.as_ref() else { return not_standing() };
        match engine.filter(&FilterOrder::Report(tag)).await {
            Ok(listing) if listing == standing.listing => Ok(standing.networks.keys().copied().collect()),
            Ok(_) | Err(EngineError::Problem(_)) => not_standing(),
            Err(error) => Err(error),
        }
    }

    /// Carries out an order on the packet filter.
    pub(super) async fn filter(
        &self,
        engine: &impl Engine,
        tag: Tag,
        order: FilterOrder,
    ) -> Result<String, EngineError> {
        self.enabled()?;
        match order {
            FilterOrder::Report(asked) if asked == tag => engine.filter(&FilterOrder::Report(tag)).await,
            FilterOrder::Replace(rules) if rules.tag == tag => {
                let rules = self.judge(rules)?;
                let mut standing = self.standing.lock().await;
                replace(engine, &mut standing, rules).await.map(|()| String::new())
            }
            FilterOrder::Admit { tag: asked, admissions, seconds } if asked == tag => {
                let standing = self.standing.lock().await;
                let admitted = |network| {
                    let walled = standing.as_ref().and_then(|standing| standing.networks.get(network));
                    walled.is_some_and(|walled| walled.reach == Reach::Admitted)
                };
                if seconds > ADMITTED_MAX || !admissions.iter().all(|one| admitted(&one.network)) {
                    return refused("addresses cannot be admitted there, or for so long");
                }
                self.judge_admissions(&admissions)?;
                engine.filter(&FilterOrder::Admit { tag, admissions, seconds }).await
            }
            _ => refused("the rules are another machine's"),
        }
    }

    /// Rules that name networks of ours alone and give no more than was signed. What is closed is decided here.
    fn judge(&self, rules: Ruleset) -> Result<Ruleset, EngineError> {
        let mut numbers = HashSet::new();
        if rules.networks.len().max(rules.closed.len()) > NETWORKS_MAX || rules.admitted.len() > ADMISSIONS_MAX {
            return refused("the rules are too many");
        }
        for walled in &rules.networks {
            let length = if walled.reach == Reach::Members { SHARED_LENGTH } else { OUTWARD_LENGTH };
            if !numbers.insert(walled.number) || !self.is_ours(walled.subnet, length) {
                return refused("the rules name a network that cannot be one of ours");
            }
            if walled.number != probe::NUMBER && !self.is_signed(walled) {
                return refused("the rules give a network more than the signed request asks for");
            }
        }
        let reach: HashMap<_, _> = rules.networks.iter().map(|walled| (walled.number, walled.reach)).collect();
        let admissions: Vec<_> = rules.admitted.iter().map(|(admission, _)| *admission).collect();
        if admissions.iter().any(|admission| reach.get(&admission.network) != Some(&Reach::Admitted)) {
            return refused("the rules admit addresses to a network that has none");
        }
        self.judge_admissions(&admissions)?;
        let mut closed: BTreeSet<_> = rules.closed.iter().copied().collect();
        closed.extend(self.options.subnets.iter().copied().chain(taken_ranges(rules.tag)));
        Ok(Ruleset { closed: closed.into_iter().collect(), ..rules })
    }

    fn is_ours(&self, subnet: Range, length: u8) -> bool {
        let inside = |pool: &Range| pool.length() <= length && pool.contains(subnet.first());
        subnet.length() == length && self.options.subnets.iter().any(inside)
    }

    fn is_signed(&self, walled: &Walled) -> bool {
        self.signed().values().all(|one| {
            let outward = one.attachment.outward.is_some_and(|(number, _)| number == walled.number);
            let shared = one.attachment.shared == Some(walled.number);
            (!outward || fits(&one.egress, walled.reach)) && (!shared || walled.reach == Reach::Members)
        })
    }

    fn judge_admissions(&self, admissions: &[Admission]) -> Result<(), EngineError> {
        if admissions.len() > ADMISSIONS_MAX {
            return refused("the addresses are too many");
        }
        let signed = self.signed();
        let owners: HashMap<_, _> =
            signed.values().filter_map(|one| Some((one.attachment.outward?.0, &one.egress))).collect();
        let listed = |one: &Admission| owners.get(&one.network).is_none_or(|egress| lists(egress, *one));
        if admissions.iter().all(listed) { Ok(()) } else { refused("the signed request does not list these addresses") }
    }

    /// Whether the plan is one of ours: by its tag and its mark, and with addresses that our owner gave to containers.
    pub(super) fn judge_network(&self, mark: &str, plan: &NetworkPlan) -> Result<(), EngineError> {
        let test = plan.number == probe::NUMBER;
        let node = if test { probe::mark(mark) } else { mark.to_owned() };
        let length = if plan.outward { OUTWARD_LENGTH } else { SHARED_LENGTH };
        if plan.tag != Tag::of(mark) || plan.node != node || !self.is_ours(plan.subnet, length) {
            return refused("the network cannot be one of ours");
        }
        Ok(())
    }

    /// Makes a network. No bridge of ours is ever there before the wall is.
    pub(super) async fn create_network(
        &self,
        engine: &impl Engine,
        mark: &str,
        plan: &NetworkPlan,
    ) -> Result<(), EngineError> {
        self.enabled()?;
        self.judge_network(mark, plan)?;
        let mut standing = self.standing.lock().await;
        if standing.is_none() {
            let rules = Ruleset { tag: plan.tag, networks: Vec::new(), closed: Vec::new(), admitted: Vec::new() };
            replace(engine, &mut standing, self.judge(rules)?).await?;
        }
        drop(standing);
        engine.create_network(plan).await
    }

    /// Removes a network, and forgets whose it was.
    pub(super) async fn remove_network(&self, engine: &impl Engine, tag: Tag, name: &str) -> Result<(), EngineError> {
        let Some(number) = tag.number_of(name) else { return refused("the network is not one of ours") };
        engine.remove_network(name).await?;
        self.signed().retain(|_, one| {
            one.attachment.outward.is_none_or(|(theirs, _)| theirs != number) && one.attachment.shared != Some(number)
        });
        Ok(())
    }

    /// Starts the container of the wall's test.
    pub(super) async fn start_test(
        &self,
        engine: &impl Engine,
        mark: &str,
        plan: &NetworkPlan,
    ) -> Result<ContainerId, EngineError> {
        self.enabled()?;
        self.judge_network(mark, plan)?;
        if plan.number != probe::NUMBER || !self.stands(engine, plan.tag).await?.contains(&plan.number) {
            return not_standing();
        }
        let id = engine.start_test(plan).await?;
        let mut tests = self.tests();
        if tests.len() >= TESTS_MAX {
            tests.clear();
        }
        tests.insert(id.clone());
        Ok(id)
    }

    /// Whether it is a container of the wall's test.
    pub(super) fn is_test(&self, id: &ContainerId) -> bool {
        self.tests().contains(id)
    }

    /// The sockets of a resolver, which listens where a network of ours has its bridge and nowhere else.
    pub(super) async fn resolver_sockets(
        &self,
        engine: &impl Engine,
        address: Ipv4Addr,
    ) -> Result<ResolverSockets, EngineError> {
        self.enabled()?;
        let standing = self.standing.lock().await;
        let outward = |walled: &Walled| walled.reach != Reach::Members && walled.gateway() == address;
        if !standing.as_ref().is_some_and(|standing| standing.networks.values().any(outward)) {
            return refused("no network of ours has a resolver there");
        }
        engine.resolver_sockets(address).await
    }
}

/// Gives the kernel its rules, and notes how it lists them.
async fn replace(engine: &impl Engine, standing: &mut Option<Standing>, rules: Ruleset) -> Result<(), EngineError> {
    let report = FilterOrder::Report(rules.tag);
    let networks = rules.networks.iter().map(|walled| (walled.number, *walled)).collect();
    engine.filter(&FilterOrder::Replace(rules)).await?;
    *standing = None;
    let listing = engine.filter(&report).await?;
    *standing = Some(Standing { networks, listing });
    Ok(())
}
