//! The networks of a container that is about to start.

use std::net::Ipv4Addr;
use std::time::Duration;

use minicbor::{Decode, Encode};
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::deploy::{Egress, Specification};
use tokio::time::timeout;

use super::ranges::{self, Range};
use super::rows::{self, Network, Purpose};
use super::rules::Tag;
use super::{Availability, Wall};
use crate::driver::Trouble;
use crate::engine::{Engine, EngineError, NetworkPlan};
use crate::record::Record;
use crate::room::Inner;

/// Ranges that are tried until the engine takes one.
const TRIES: usize = 16;
/// How long the rules and the resolver may take to stand.
const PATIENCE: Duration = Duration::from_secs(20);
/// The kernel's table of routes.
const ROUTES: &str = "/proc/net/route";

/// The networks of one container, by their numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Attachment {
    /// Its way out, with the address of the resolver there.
    #[n(0)]
    pub outward: Option<(u16, Ipv4Addr)>,
    /// What it shares with others of its owner.
    #[n(1)]
    pub shared: Option<u16>,
}

impl Attachment {
    /// The networks as the engine calls them. Each must have been asked for in what was signed, and what was asked for must
    /// be there.
    pub(crate) fn networks(&self, tag: Tag, specification: &Specification) -> Result<Networks, Problem> {
        let asked = (specification.egress != Egress::None, specification.network.is_some());
        if asked != (self.outward.is_some(), self.shared.is_some()) {
            let message = "the networks are not those that the signed request asks for";
            return Err(Problem::new(Code::IsolationViolated, message));
        }
        let outward = self.outward.map(|(number, _)| tag.network(number));
        let mut names = outward.into_iter().chain(self.shared.map(|number| tag.network(number)));
        Ok(Networks { first: names.next(), second: names.next(), resolver: self.outward.map(|(_, address)| address) })
    }
}

/// The networks of one container, by the engine's names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Networks {
    /// The network that it is made in; none, if absent.
    pub(crate) first: Option<String>,
    /// A second one.
    pub(crate) second: Option<String>,
    /// Where its names are resolved; nowhere, if absent.
    pub(crate) resolver: Option<Ipv4Addr>,
}

/// Makes what the deployment's specification names, and waits until the wall stands around it.
pub(crate) async fn attach<E: Engine>(inner: &Inner<E>, record: &Record) -> Result<Attachment, Trouble> {
    let purposes = rows::purposes(record);
    if purposes.is_empty() {
        return Ok(Attachment::default());
    }
    match inner.wall.availability() {
        Availability::Offered => {}
        Availability::Untested => return Err(waiting("the wall around containers' networks is being tested").into()),
        refused => return Err(refused.problem().map_or_else(|| waiting("").into(), Trouble::Final)),
    }
    let mut networks = Vec::new();
    for purpose in purposes {
        networks.push(ensure(inner, &record.owner, purpose).await?);
    }
    stand(&inner.wall, &networks).await?;
    let mut attachment = Attachment::default();
    for network in networks {
        let plan = plan_of(inner, &network);
        if plan.outward {
            attachment.outward = Some((plan.number, plan.gateway()));
        } else {
            attachment.shared = Some(plan.number);
        }
    }
    Ok(attachment)
}

fn waiting(what: &str) -> EngineError {
    EngineError::InUse { message: what.to_owned() }
}

/// How the engine is asked for a network.
pub(crate) fn plan_of<E>(inner: &Inner<E>, network: &Network) -> NetworkPlan {
    let outward = matches!(network.purpose, Purpose::Outward(_));
    let (tag, node) = (inner.wall.tag, inner.mark.clone());
    NetworkPlan { tag, node, number: network.number, subnet: network.subnet, outward }
}

/// The row first, then the engine. Addresses that the engine does not take are given up for others.
async fn ensure<E: Engine>(inner: &Inner<E>, owner: &PeerId, purpose: Purpose) -> Result<Network, Trouble> {
    let (owner, mut taken) = (*owner, taken_ranges(inner.wall.tag));
    for _ in 0..TRIES {
        let (pools, salt) = (inner.wall.options.subnets.clone(), inner.wall.tag.salt());
        let (wanted, avoided) = (purpose.clone(), taken.clone());
        let claimed = inner.database.write(move |tx| rows::claim(tx, &owner, &wanted, &pools, &avoided, salt)).await?;
        let Some(network) = claimed else { break };
        let plan = plan_of(inner, &network);
        let found = inner.engine.compare_network(&plan).await?;
        match found {
            Some(facts) if facts.differences.is_empty() => return Ok(network),
            // Made by an older version of this program, or changed behind our back.
            Some(_) => inner.engine.remove_network(&plan.name()).await?,
            None => {}
        }
        match inner.engine.create_network(&plan).await {
            Ok(()) => return Ok(network),
            Err(error) if is_overlap(&error) => {
                taken.push(network.subnet);
                inner.database.write(move |tx| rows::forget(tx, network.number)).await?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let message = "no addresses are left for one more network; its owner can name others in egress_subnets";
    Err(Problem::new(Code::NoCapacity, message).into())
}

/// Somebody else on the host has these addresses.
pub(crate) fn is_overlap(error: &EngineError) -> bool {
    matches!(error, EngineError::Refused { message } | EngineError::Failed { message } if message.contains("overlap"))
}

/// Ranges that the host reaches by other ways already.
pub(crate) fn taken_ranges(tag: Tag) -> Vec<Range> {
    let ours = format!("pw{tag}");
    let table = std::fs::read_to_string(ROUTES).unwrap_or_default();
    let attached = ranges::attached(&table).into_iter();
    attached.filter(|(interface, _)| !interface.starts_with(&ours)).map(|(_, range)| range).collect()
}

/// Waits until the rules and resolvers of these stand as the rows want them.
async fn stand(wall: &Wall, networks: &[Network]) -> Result<(), Trouble> {
    let mut standing = wall.standing.subscribe();
    wall.changed.notify_one();
    let all = standing.wait_for(|standing| {
        networks.iter().all(|network| {
            let way = standing.get(&network.number);
            way.is_some_and(|way| {
                way.walled.subnet == network.subnet
                    && way.policy.is_some() == matches!(network.purpose, Purpose::Outward(_))
            })
        })
    });
    match timeout(PATIENCE, all).await {
        Ok(Ok(_)) => Ok(()),
        _ => Err(EngineError::TimedOut { operation: "raise the wall around a network".into() }.into()),
    }
}
