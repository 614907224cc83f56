//! The wall (V4n): how containers with a way out reach public addresses, and nothing of the host or its neighbours.
//!
//! - Each deployment with egress has a bridge of its own; deployments that share a network have a bridge for that.
//!   [`rows`] holds which, [`attach`] makes them when a container is to start.
//! - [`rules`] are one text made of all of them, [`keep`] sees to it that the kernel has exactly that text, and admits the
//!   addresses that [`resolver`] is about to tell.
//! - [`probe`] tries all of it from inside a container of ours before anybody is offered it.

pub mod attach;
pub(crate) mod keep;
pub(crate) mod nft;
pub(crate) mod probe;
pub mod ranges;
pub mod resolver;
pub(crate) mod rows;
pub mod rules;
pub(crate) mod sockets;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use peer_proto::code::{Code, Problem};
use tokio::sync::{Notify, watch};

use self::ranges::Range;
use self::resolver::message::Policy;
use self::rules::{Tag, Walled};

/// How the wall is set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Whether ways out and shared networks are offered at all.
    pub enabled: bool,
    /// Addresses to take networks from.
    pub subnets: Vec<Range>,
    /// Resolvers to ask; the host's own, if empty.
    pub resolvers: Vec<SocketAddr>,
}

/// Whether ways out and shared networks are offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Availability {
    /// The owner does not want them.
    Off,
    /// The test from inside is still to be made.
    Untested,
    /// The test failed, or cannot be made.
    Refused(String),
    /// The test has passed in this run of the daemon.
    Offered,
}

impl Availability {
    /// Why nothing of the kind is offered now, unless it is.
    pub fn problem(&self) -> Option<Problem> {
        let why = match self {
            Self::Offered => return None,
            Self::Off => "its owner has turned it off".to_owned(),
            Self::Untested => "it is still being tested; try again in some seconds".to_owned(),
            Self::Refused(why) => why.clone(),
        };
        let message = format!("this machine offers neither --egress nor --network: {why}");
        Some(Problem::new(Code::EgressUnavailable, message))
    }
}

/// A network with its rules and, if it has a way out, its resolver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Way {
    pub(crate) walled: Walled,
    /// Which names may be asked for; no resolver, if absent.
    pub(crate) policy: Option<Policy>,
}

/// What the room knows of its wall.
#[derive(Debug)]
pub(crate) struct Wall {
    pub(crate) tag: Tag,
    pub(crate) options: Options,
    pub(crate) availability: watch::Sender<Availability>,
    /// What stands, by the networks' numbers: their rules are in the kernel and their resolvers listen.
    pub(crate) standing: watch::Sender<BTreeMap<u16, Way>>,
    /// Asks for a look at the rows.
    pub(crate) changed: Notify,
}

impl Wall {
    pub(crate) fn new(mark: &str, options: Options) -> Self {
        let first = if options.enabled { Availability::Untested } else { Availability::Off };
        Self {
            tag: Tag::of(mark),
            options,
            availability: watch::Sender::new(first),
            standing: watch::Sender::default(),
            changed: Notify::new(),
        }
    }

    pub(crate) fn availability(&self) -> Availability {
        self.availability.borrow().clone()
    }
}
