//! Keeps the wall as it should be: the one task that tells the packet filter what to do and runs the resolvers.
//!
//! It compares every two seconds what the kernel has with what it was told, because whoever reloads a firewall may flush
//! ours with it. The guard table cannot be flushed by others, so that what lacks meanwhile is the way out, not the wall.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use peer_proto::code::{Code, Problem};
use peer_proto::deploy::{Destination, Egress, Host};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::attach::{plan_of, taken_ranges};
use super::resolver::message::Policy;
use super::resolver::{AdmitRequest, Resolver, Upstream};
use super::rows::{self, Network, Purpose};
use super::rules::{Admission, FilterOrder, Reach, Ruleset, Walled};
use super::{Availability, Way, probe};
use crate::driver::{self, Trouble};
use crate::engine::{Engine, EngineError};
use crate::profile::container_name;
use crate::record::{self, Record};
use crate::room::Inner;

/// How often the rules are compared.
const COMPARE: Duration = Duration::from_secs(2);
/// How long after a failed test the next one is made.
const TEST_AGAIN: Duration = Duration::from_secs(30);
/// How often rules are given before the wall counts as down. The guard stands meanwhile.
const ATTEMPTS: u32 = 5;
/// The pause before rules are given again.
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(100);
/// Requests of resolvers that may wait.
const ADMISSIONS_WAITING: usize = 256;
/// Most addresses that are admitted at a time, over all networks.
const ADMITTED_MAX: usize = 32_768;
/// Beyond the time for which an answer may be kept: its last use must still get through (seconds).
const GRACE: u64 = 60;

/// What the task remembers from one round to the next.
pub(super) struct Keeper<E> {
    pub(super) inner: Arc<Inner<E>>,
    pub(super) upstream: Arc<Upstream>,
    /// A network for the test, beside those of the rows.
    pub(super) tested: Option<Way>,
    /// The rules that were given last, and how the packet filter lists them.
    applied: Option<(Ruleset, String)>,
    admitted: HashMap<Admission, Instant>,
    resolvers: JoinSet<u16>,
    serving: HashMap<u16, (Way, tokio::task::AbortHandle)>,
    requests: mpsc::Receiver<AdmitRequest>,
    sender: mpsc::Sender<AdmitRequest>,
}

/// Runs until the room ends. The rules stay: containers go on running without the daemon.
pub(crate) async fn keep<E: Engine>(inner: Arc<Inner<E>>) {
    let cancel = inner.cancel.clone();
    let (sender, requests) = mpsc::channel(ADMISSIONS_WAITING);
    let upstream = Arc::new(Upstream::new(inner.wall.options.resolvers.clone()));
    let mut keeper = Keeper {
        inner,
        upstream,
        tested: None,
        applied: None,
        admitted: HashMap::new(),
        resolvers: JoinSet::new(),
        serving: HashMap::new(),
        requests,
        sender,
    };
    let _ = cancel.run_until_cancelled(keeper.run()).await;
}

impl<E: Engine> Keeper<E> {
    async fn run(&mut self) {
        let mut tested_at: Option<Instant> = None;
        loop {
            match self.round().await {
                Ok(()) => {}
                Err(Trouble::Database(error)) => tracing::error!(%error, "the wall could not be looked after"),
                Err(trouble) => self.close(&trouble.to_string()).await,
            }
            let again = match self.inner.wall.availability() {
                Availability::Untested => true,
                Availability::Refused(_) => tested_at.is_none_or(|at| at.elapsed() >= TEST_AGAIN),
                Availability::Off | Availability::Offered => false,
            };
            if again {
                self.test().await;
                tested_at = Some(Instant::now());
                continue;
            }
            let inner = self.inner.clone();
            tokio::select! {
                Some(request) = self.requests.recv() => self.admit(request).await,
                Some(ended) = self.resolvers.join_next() => {
                    if let Ok(number) = ended {
                        self.serving.remove(&number);
                    }
                }
                _ = timeout(COMPARE, inner.wall.changed.notified()) => {}
            }
        }
    }

    async fn test(&mut self) {
        let availability = match probe::probe(self).await {
            Ok(()) => Availability::Offered,
            Err(why) => {
                tracing::warn!(why, "ways out of containers are not offered");
                Availability::Refused(why)
            }
        };
        self.inner.wall.availability.send_replace(availability);
    }

    /// Brings rules and resolvers to what the rows want.
    pub(super) async fn round(&mut self) -> Result<(), Trouble> {
        let rows = self.inner.database.write(|tx| Ok::<_, Trouble>((rows::all(tx)?, record::all(tx)?))).await?;
        if self.inner.wall.availability() == Availability::Off && !rows.0.is_empty() {
            return Err(Problem::new(Code::EgressUnavailable, "its owner has turned it off").into());
        }
        let mut ways: BTreeMap<_, _> =
            rows.0.iter().map(|network| (network.number, way_of(network, &rows.1))).collect();
        ways.extend(self.tested.iter().map(|way| (way.walled.number, way.clone())));
        if ways.is_empty() && self.applied.is_none() {
            return Ok(());
        }
        self.assert(&ways).await?;
        self.serve(&ways).await?;
        self.inner.wall.standing.send_if_modified(|standing| {
            let changed = *standing != ways;
            *standing = ways;
            changed
        });
        Ok(())
    }

    /// Gives the packet filter its rules if it has others.
    async fn assert(&mut self, ways: &BTreeMap<u16, Way>) -> Result<(), EngineError> {
        let now = Instant::now();
        self.admitted.retain(|admission, until| *until > now && ways.contains_key(&admission.network));
        let wall = &self.inner.wall;
        let wanted = Ruleset {
            tag: wall.tag,
            networks: ways.values().map(|way| way.walled).collect(),
            closed: wall.options.subnets.iter().copied().chain(taken_ranges(wall.tag)).collect(),
            admitted: ways.values().flat_map(lasting).collect(),
        };
        let report = FilterOrder::Report(wall.tag);
        if let Some((applied, listing)) = &self.applied
            && *applied == wanted
        {
            match self.inner.engine.filter(&report).await {
                Ok(present) if present == *listing => return Ok(()),
                Ok(_) | Err(EngineError::Problem(_)) => {
                    tracing::warn!(
                        "the rules around containers' networks were changed by somebody else; they are put back"
                    );
                }
                Err(error) => return Err(error),
            }
        }
        let for_a_while = self
            .admitted
            .iter()
            .map(|(admission, until)| (*admission, Some(until.saturating_duration_since(now).as_secs().max(1))));
        let mut full = wanted.clone();
        full.admitted.extend(for_a_while);
        let listing = self.replace(full).await?;
        self.applied = Some((wanted, listing));
        Ok(())
    }

    /// Replaces the rules, and gives how the packet filter lists them. Whoever reloads a firewall may take ours away between
    /// the order and the report: that is no reason to end what runs before it was tried again.
    async fn replace(&self, rules: Ruleset) -> Result<String, EngineError> {
        let report = FilterOrder::Report(rules.tag);
        let order = FilterOrder::Replace(rules);
        let mut attempt = 1;
        loop {
            let replaced = match self.inner.engine.filter(&order).await {
                Ok(_) => self.inner.engine.filter(&report).await,
                Err(error) => Err(error),
            };
            match replaced {
                Err(EngineError::Problem(problem)) if attempt < ATTEMPTS => {
                    tracing::warn!(%problem, attempt, "the rules around containers' networks are put back once more");
                    attempt += 1;
                    sleep(BETWEEN_ATTEMPTS).await;
                }
                ended => return ended,
            }
        }
    }

    /// Starts and ends resolvers.
    async fn serve(&mut self, ways: &BTreeMap<u16, Way>) -> Result<(), EngineError> {
        self.serving.retain(|number, (way, task)| {
            let stays = ways.get(number) == Some(way) && !task.is_finished();
            if !stays {
                task.abort();
            }
            stays
        });
        for (number, way) in ways {
            let Some(policy) = &way.policy else { continue };
            if self.serving.contains_key(number) {
                continue;
            }
            let sockets = self.inner.engine.resolver_sockets(way.walled.gateway()).await?;
            let resolver = Resolver {
                network: *number,
                subnet: way.walled.subnet,
                policy: policy.clone(),
                upstream: self.upstream.clone(),
                admissions: self.sender.clone(),
            };
            let number = *number;
            let task = self.resolvers.spawn(async move {
                if let Err(error) = resolver.serve(sockets).await {
                    tracing::warn!(%error, "a resolver ended");
                }
                number
            });
            self.serving.insert(number, (way.clone(), task));
        }
        Ok(())
    }

    /// Lets a network's containers through to addresses that they are about to be told.
    async fn admit(&mut self, request: AdmitRequest) {
        let AdmitRequest { network, addresses, ports, seconds, done } = request;
        let seconds = seconds + GRACE;
        let until = Instant::now() + Duration::from_secs(seconds);
        let admission = |address| ports.iter().map(move |port| Admission { network, address, port: *port });
        let all: Vec<_> = addresses.into_iter().flat_map(admission).collect();
        // What is admitted for most of the time already needs no order.
        let enough = Instant::now() + Duration::from_secs(seconds / 2);
        let lacking: Vec<_> =
            all.iter().filter(|one| self.admitted.get(one).is_none_or(|until| *until < enough)).copied().collect();
        let admitted = if lacking.is_empty() {
            true
        } else if self.admitted.len() + lacking.len() > ADMITTED_MAX || !self.serving.contains_key(&network) {
            false
        } else {
            let tag = self.inner.wall.tag;
            let order = FilterOrder::Admit { tag, admissions: lacking.clone(), seconds };
            match self.inner.engine.filter(&order).await {
                Ok(_) => {
                    self.admitted.extend(lacking.into_iter().map(|one| (one, until)));
                    true
                }
                Err(error) => {
                    tracing::warn!(%error, "addresses of a listed host could not be admitted");
                    false
                }
            }
        };
        // The resolver may have ended meanwhile.
        let _ = done.send(admitted);
    }

    /// The wall does not stand: nothing that needs it may run.
    async fn close(&mut self, why: &str) {
        let was = self.inner.wall.availability();
        if was != Availability::Off {
            let refused = Availability::Refused(why.to_owned());
            if was != refused {
                tracing::error!(why, "the wall around containers' networks does not stand");
            }
            self.inner.wall.availability.send_replace(refused);
        }
        self.applied = None;
        self.inner.wall.standing.send_replace(BTreeMap::new());
        let records = match self.inner.database.write(record::all).await {
            Ok(records) => records,
            Err(error) => return tracing::error!(%error, "deployments with a way out could not be looked up"),
        };
        for record in records.iter().filter(|record| !rows::purposes(record).is_empty()) {
            if let Err(error) = self.end(record).await {
                tracing::error!(deployment = %record.id, %error, "a deployment with a way out could not be ended");
            }
        }
    }

    async fn end(&self, record: &Record) -> Result<(), Trouble> {
        let Some(facts) = self.inner.engine.inspect(&container_name(&record.id)).await? else { return Ok(()) };
        if facts.running {
            self.inner.engine.kill(&facts.id).await?;
            let problem = self.inner.wall.availability().problem();
            let problem = problem.unwrap_or_else(|| Problem::new(Code::EgressUnavailable, "the wall does not stand"));
            driver::fail(&self.inner, record.id, problem).await?;
        }
        Ok(())
    }
}

/// How far the containers of a network get, by the deployment that it is for.
fn way_of(network: &Network, records: &[Record]) -> Way {
    let walled = |reach| Walled { number: network.number, subnet: network.subnet, reach };
    let Purpose::Outward(id) = &network.purpose else {
        return Way { walled: walled(Reach::Members), policy: None };
    };
    let egress = records.iter().find(|record| record.id == *id).map(|record| &record.specification.egress);
    match egress {
        Some(Egress::Internet) => Way { walled: walled(Reach::Public), policy: Some(Policy::Public) },
        Some(Egress::Hosts(hosts)) => {
            Way { walled: walled(Reach::Admitted), policy: Some(Policy::Listed(hosts.clone())) }
        }
        // Forgotten, and not removed yet.
        Some(Egress::None) | None => Way { walled: walled(Reach::Admitted), policy: Some(Policy::Listed([].into())) },
    }
}

/// What is listed by its address is admitted for as long as the rules stand.
fn lasting(way: &Way) -> Vec<(Admission, Option<u64>)> {
    let Some(Policy::Listed(hosts)) = &way.policy else { return Vec::new() };
    let admission = |destination: &Destination| match &destination.host {
        Host::Address(address) => {
            let (network, port) = (way.walled.number, destination.port.get());
            Some((Admission { network, address: *address, port }, None))
        }
        Host::Name(_) => None,
    };
    hosts.iter().filter_map(admission).collect()
}

/// Removes networks that nothing needs any more, from the engine and then from the rows, and those that no row knows.
pub(crate) async fn tidy<E: Engine>(inner: &Inner<E>) -> Result<(), Trouble> {
    // The engine is asked first: a network whose row is made afterwards is not in its list.
    let present = inner.engine.networks(&inner.mark).await?;
    for network in inner.database.write(rows::unneeded).await? {
        inner.engine.remove_network(&plan_of(inner, &network).name()).await?;
        let number = network.number;
        inner.database.write(move |tx| rows::forget(tx, number)).await?;
        inner.wall.changed.notify_one();
    }
    let rows = inner.database.write(rows::all).await?;
    for name in present {
        let number = inner.wall.tag.number_of(&name);
        if number.is_some_and(|number| number > 0 && !rows.iter().any(|network| network.number == number)) {
            tracing::info!(network = name, "removing a network that no deployment knows");
            inner.engine.remove_network(&name).await?;
        }
    }
    Ok(())
}
