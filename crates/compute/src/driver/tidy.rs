//! Removing what a crash or a lost answer left in the engine.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::{RETRY, Trouble};
use crate::deployment::Life;
use crate::engine::Engine;
use crate::profile::deployment_of;
use crate::profile::forwarder::forwarder_of;
use crate::record;
use crate::room::Inner;
use crate::wall::keep;

/// How often leftovers are looked for.
const TIDY: Duration = Duration::from_mins(1);

/// Removes containers of ours that no row knows, and images of ours that nothing uses; at the start and now and then.
pub(crate) async fn tidy_up<E: Engine>(inner: Arc<Inner<E>>) {
    loop {
        let pause = match tidy_once(&inner).await {
            Ok(()) => TIDY,
            Err(Trouble::Engine(error)) if error.is_transient() => RETRY,
            Err(Trouble::Engine(error)) => {
                tracing::warn!(%error, "leftovers could not be removed");
                TIDY
            }
            Err(Trouble::Database(error)) => {
                tracing::error!(%error, "leftovers could not be removed");
                TIDY
            }
            Err(Trouble::Final(problem)) => {
                tracing::warn!(%problem, "leftovers could not be removed");
                TIDY
            }
        };
        if inner.cancel.run_until_cancelled(timeout(pause, inner.untidy.notified())).await.is_none() {
            return;
        }
    }
}

async fn tidy_once<E: Engine>(inner: &Inner<E>) -> Result<(), Trouble> {
    // It may have been set up anew since.
    if let Err(error) = inner.look_at_engine().await {
        tracing::debug!(%error, "the engine does not say what it is");
    }
    // The engine is asked first: a container whose row is made afterwards is not in its list.
    let containers = inner.engine.list(&inner.mark).await?;
    for container in containers {
        let Some(id) = deployment_of(&container.name).or_else(|| forwarder_of(&container.name)) else { continue };
        let record = inner.database.write(move |tx| record::find(tx, id)).await?;
        let needed = match &record {
            None => false,
            // A guest that rests or is paused keeps its container, and needs no forwarder; nor is one of use that has ended.
            Some(record) if forwarder_of(&container.name).is_some() => {
                !container.ended && !matches!(record.life, Life::Stopped | Life::Failed(_) | Life::Paused(..))
            }
            Some(_) => true,
        };
        if !needed {
            tracing::info!(container = container.name, "removing a container that no deployment needs");
            inner.engine.remove(&container.id).await?;
        }
    }
    keep::tidy(inner).await?;
    inner.wake_all_but(&inner.database.write(record::all).await?);
    crate::fetch::clean_images(inner).await?;
    inner.transfers.clean((inner.options.steady_clock)());
    Ok(())
}
