//! The container of the wall's test: a program of ours that waits in one network, and nothing that anybody asked for.

use peer_proto::deploy::{Limits, Specification};
use peer_proto::id::DeploymentId;
use peer_proto::identity::Identity;
use peer_proto::unit::ByteSize;

use super::DockerEngine;
use crate::engine::{ContainerId, Engine, EngineError, NetworkPlan};
use crate::isolation;
use crate::profile;
use crate::wall::attach::Networks;

impl DockerEngine {
    pub(super) async fn start_wall_test(&self, network: &NetworkPlan) -> Result<ContainerId, EngineError> {
        let image = self.guest_image().await?;
        let specification = Specification {
            command: vec!["wait".to_owned()],
            limits: Limits {
                memory: ByteSize::mebibytes(32),
                scratch: ByteSize::mebibytes(1),
                pids: 8,
                files: 64,
                ..Limits::default()
            },
            ..Specification::plain("wall-test".parse().expect("a name"), "wall-test")
        };
        let facts = self.has_image(image).await?;
        let facts = facts.ok_or_else(|| EngineError::NoSuchImage { image: image.to_string() })?;
        // The last slot, which no deployment gets before all others are taken.
        let engine = self.facts().await?;
        let runtime = isolation::meet(&specification, &engine).map_err(EngineError::Problem)?;
        let uid = profile::uid_for(profile::UID_SLOTS - 1, engine.user_namespace)
            .ok_or_else(|| EngineError::failed("no user id is free"))?;
        // It belongs to nobody: no peer has this key.
        let (id, owner) = (DeploymentId::random(), Identity::generate().peer_id());
        let networks = Networks { first: Some(network.name()), second: None, resolver: Some(network.gateway()) };
        let plan = profile::plan(&specification, &facts, id, owner, &network.node, uid, runtime)
            .map_err(EngineError::Problem)?;
        let container = self.create_planned(&plan.in_networks(networks)).await?;
        self.start(&container).await?;
        Ok(container)
    }
}
