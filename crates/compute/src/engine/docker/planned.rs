//! Containers are made from plans of ours, and compared with them before they run and once more when they do (I1, I2).

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use peer_proto::id::DeploymentId;

use super::DockerEngine;
use crate::{
    engine::{ContainerFacts, ContainerId, Engine, EngineError, Planned},
    inspect,
    order::Order,
    profile::{self, ContainerPlan},
};

/// Plans that are remembered. Whoever finds none asks for it again.
const PLANS_MAX: usize = 4096;

/// The plan made last for each deployment.
pub(super) type Plans = Mutex<HashMap<DeploymentId, ContainerPlan>>;

impl DockerEngine {
    pub(super) async fn plan_container(&self, order: &Order) -> Result<Planned, EngineError> {
        let verified = order.verify().map_err(EngineError::Problem)?;
        let image = self.has_image(order.image).await?;
        let image = image.ok_or_else(|| EngineError::NoSuchImage { image: order.image.to_string() })?;
        let plan = verified.plan(&image, &self.facts().await?).map_err(EngineError::Problem)?;
        let planned = Planned { deployment: verified.deployment(), told: Box::new(profile::body(&plan)) };
        self.remember(planned.deployment, plan);
        Ok(planned)
    }

    fn remember(&self, deployment: DeploymentId, plan: ContainerPlan) {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if plans.len() >= PLANS_MAX {
            plans.clear();
        }
        plans.insert(deployment, plan);
    }

    pub(super) fn planned(&self, deployment: &DeploymentId) -> Result<ContainerPlan, EngineError> {
        let plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        plans.get(deployment).cloned().ok_or(EngineError::NotPlanned)
    }

    /// Makes the container of a plan, and judges it.
    pub async fn create_planned(&self, plan: &ContainerPlan) -> Result<ContainerId, EngineError> {
        if let Some(deployment) = profile::deployment_of(&plan.name()) {
            self.remember(deployment, plan.clone());
        }
        let id = self.create_container(plan).await?;
        if let Some((network, alias)) = plan.second_network() {
            self.connect_container(&id, network, alias).await?;
        }
        self.judge(&self.present(&id).await?).await?;
        Ok(id)
    }

    pub(super) async fn start_judged(&self, id: &ContainerId) -> Result<(), EngineError> {
        self.judge(&self.present(id).await?).await?;
        self.start_container(id).await
    }

    /// A container that differs from its plan is removed.
    pub(super) async fn judge(&self, facts: &ContainerFacts) -> Result<(), EngineError> {
        let plan = profile::deployment_of(&facts.name).ok_or(EngineError::NotPlanned);
        let plan = plan.and_then(|deployment| self.planned(&deployment))?;
        let differences = inspect::differences(&plan, &facts.report);
        if differences.is_empty() {
            return Ok(());
        }
        self.remove_container(&facts.id).await?;
        Err(EngineError::Violated { differences: differences.join("; ") })
    }
}
