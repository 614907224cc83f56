//! Forwarders: made beside a guest whose network the daemon may not enter, judged, attached to, and kept running for as
//! long as the guest runs and somebody holds its network.

use std::{sync::Arc, time::Duration};

use peer_guest::dial;
use peer_proto::unit::{Port, Timestamp};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tokio_util::compat::TokioAsyncReadCompatExt;

use super::{DockerEngine, attach::Attached};
use crate::{
    connector::{ConnectError, Forwarder, Network, Progress},
    engine::{ContainerFacts, ContainerId, Engine, EngineError},
    inspect,
    profile::forwarder::{self, ForwarderPlan},
};

/// First and longest pause before a forwarder that died is started again.
const PAUSE_FIRST: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// One that ran for so long has not died of its start.
const STEADY: Duration = Duration::from_mins(1);
/// How often the image may turn out to have been removed just before it is used.
const ATTEMPTS: u32 = 3;

/// A guest and the run of it that a forwarder belongs to.
#[derive(Debug)]
struct Served {
    guest: ContainerId,
    run: Option<Timestamp>,
    port: Port,
}

impl DockerEngine {
    /// Has a forwarder made beside a running guest. It is judged before this returns, and started after.
    pub(super) async fn forwarded(&self, guest: &ContainerId, port: Port) -> Result<Network, ConnectError> {
        let facts = self.running(guest).await?.ok_or(ConnectError::NotRunning)?;
        let served = Served { guest: guest.clone(), run: facts.started_at, port };
        let made = self.make_forwarder(&facts, port).await?;
        // An engine of its own: it outlives this call, and connections are opened anew for each question anyway.
        let engine = self.another();
        let keeper = |progress| async move { engine.keep_forwarding(&served, made, &progress).await };
        Ok(Network::Forwarded(Arc::new(Forwarder::start(port, keeper))))
    }

    async fn running(&self, guest: &ContainerId) -> Result<Option<ContainerFacts>, EngineError> {
        Ok(self.inspect_container(guest.as_str()).await?.filter(|facts| facts.running))
    }

    /// Keeps a forwarder running until the guest's run is over.
    async fn keep_forwarding(&self, served: &Served, first: ContainerId, progress: &watch::Sender<Progress>) {
        let (mut made, mut pause) = (Some(first), PAUSE_FIRST);
        loop {
            let since = Instant::now();
            let ended = self.forward(served, made.take(), progress).await;
            progress.send_replace(Progress::Coming);
            match ended {
                Ok(false) => return,
                Ok(true) => tracing::info!(guest = %served.guest, "a forwarder has ended and is started again"),
                Err(error @ EngineError::Violated { .. }) => {
                    tracing::error!(guest = %served.guest, %error, "the guest is not reachable any more");
                    return;
                }
                Err(error) => tracing::warn!(guest = %served.guest, %error, "a forwarder is started again"),
            }
            if since.elapsed() >= STEADY {
                pause = PAUSE_FIRST;
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// One forwarder from its start to its end; says whether the guest still runs.
    async fn forward(
        &self,
        served: &Served,
        made: Option<ContainerId>,
        progress: &watch::Sender<Progress>,
    ) -> Result<bool, EngineError> {
        let still = |facts: &ContainerFacts| facts.started_at == served.run;
        let id = match made {
            Some(id) => id,
            None => match self.running(&served.guest).await?.filter(still) {
                Some(facts) => self.make_forwarder(&facts, served.port).await?,
                None => return Ok(false),
            },
        };
        let attached = self.attach(&id).await?;
        self.start_container(&id).await?;
        carry(attached, progress).await;
        self.remove_container(&id).await?;
        Ok(self.running(&served.guest).await?.as_ref().is_some_and(still))
    }

    /// Makes a forwarder in the place of any other, and removes it again if the engine reports something else.
    async fn make_forwarder(&self, guest: &ContainerFacts, port: Port) -> Result<ContainerId, EngineError> {
        let facts = self.facts().await?;
        let mut attempt = 1;
        loop {
            let image = self.guest_image().await?;
            let plan = forwarder::plan(guest, image, port, facts.user_namespace || facts.rootless)
                .ok_or_else(|| EngineError::failed("it names a guest that is none of ours"))?;
            if let Some(former) = self.inspect_container(&plan.name()).await? {
                self.remove_container(&former.id).await?;
            }
            match self.create_body(&plan.name(), &image, forwarder::body(&plan)).await {
                Err(EngineError::NoSuchImage { .. } | EngineError::AlreadyExists { .. }) if attempt < ATTEMPTS => {
                    attempt += 1;
                }
                made => {
                    let id = made?;
                    return self.judge_forwarder(&plan, &id).await.map(|()| id);
                }
            }
        }
    }

    async fn judge_forwarder(&self, plan: &ForwarderPlan, id: &ContainerId) -> Result<(), EngineError> {
        let facts = self.inspect_container(id.as_str()).await?;
        let facts = facts.ok_or_else(|| EngineError::NoSuchContainer { container: id.to_string() })?;
        let differences = inspect::differences_from(&plan.name(), &forwarder::body(plan), &facts.report);
        if differences.is_empty() {
            return Ok(());
        }
        self.remove_container(id).await?;
        Err(EngineError::Violated { differences: differences.join("; ") })
    }
}

/// Carries connections until the forwarder ends.
async fn carry(attached: Attached, progress: &watch::Sender<Progress>) {
    let (dialer, carrying) = dial::over(attached.compat());
    progress.send_replace(Progress::Ready(dialer));
    if let Err(error) = carrying.await {
        tracing::debug!(%error, "a forwarder's streams ended");
    }
}
