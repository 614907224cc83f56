//! Deployments that are kept from running, as others see them.

use peer_proto::code::Problem;
use peer_proto::id::DeploymentId;

use super::{Inner, Live, Room};
use crate::engine::Engine;
use crate::record::Record;

impl<E: Engine> Room<E> {
    /// Every deployment that is to have a public name now: those that run, and those that are paused and keep theirs.
    pub fn published(&self) -> Vec<DeploymentId> {
        let publishes = |live: &Live| {
            let runs = live.endpoint.as_ref().is_some_and(|endpoint| endpoint.publish);
            runs || live.paused.as_ref().is_some_and(|paused| paused.publish)
        };
        self.inner.live().iter().filter(|(_, live)| publishes(live)).map(|(id, _)| *id).collect()
    }

    /// Why a deployment is paused, if it is.
    pub fn paused(&self, id: DeploymentId) -> Option<Problem> {
        self.inner.live().get(&id)?.paused.as_ref().map(|paused| paused.problem.clone())
    }

    /// Has every deployment looked at anew, because what its owner or this machine's owner allows has changed.
    pub fn wake_all(&self) {
        self.inner.live().values().for_each(|live| live.wake.notify_one());
    }
}

impl<E> Inner<E> {
    /// Whether it has been announced that this deployment is paused, and why it is now.
    pub(crate) fn is_told_paused(&self, record: &Record) -> bool {
        self.live().get(&record.id).is_none_or(|live| live.paused.is_some())
    }
}
