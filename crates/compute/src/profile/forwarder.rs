//! The profile of a forwarder: a container of our own program that shares a guest's network and nothing else with it.
//!
//! It is as confined as a guest, and more: it has no writable file at all, and its image holds one program of ours.

use bollard::models::{
    ContainerCreateBody, HealthConfig, HostConfig, HostConfigCgroupnsModeEnum, HostConfigLogConfig, ResourcesUlimits,
    RestartPolicy, RestartPolicyNameEnum,
};
use peer_proto::{
    id::{DeploymentId, Digest},
    unit::Port,
};

use super::{CPU_SHARES, DEPLOYMENT_LABEL, NODE_LABEL, OOM_SCORE, SHARED_MEMORY, UID_BASE, UID_BASE_MAPPED, seccomp};
use crate::engine::{ContainerFacts, ContainerId};

/// Most memory of one forwarder (bytes): windows for as many streams as it carries, and itself.
pub const MEMORY: u64 = 48 << 20;
/// What it is called; the deployment's id follows.
const PREFIX: &str = "peer-compute-forwarder-";
/// It has one thread.
const PROCESSES: i64 = 4;
/// A connection for each stream, and some of its own.
const FILES: i64 = 512;

/// How a forwarder is to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwarderPlan {
    deployment: DeploymentId,
    node: String,
    guest: ContainerId,
    image: Digest,
    port: Port,
    uid: u32,
}

/// The only name that a deployment's forwarder can have.
pub fn forwarder_name(deployment: &DeploymentId) -> String {
    format!("{PREFIX}{deployment}")
}

/// The deployment that a container of this name forwards to, if it is a forwarder of ours.
pub fn forwarder_of(container: &str) -> Option<DeploymentId> {
    container.strip_prefix(PREFIX)?.parse().ok()
}

/// Decides how the forwarder of a guest runs, from the guest's own container. Nothing if that is none of ours. `image` holds
/// the program; `mapped` says whether the engine knows a part of the host's users alone.
pub(crate) fn plan(guest: &ContainerFacts, image: Digest, port: Port, mapped: bool) -> Option<ForwarderPlan> {
    Some(ForwarderPlan {
        deployment: super::deployment_of(&guest.name)?,
        node: guest.labels.get(NODE_LABEL)?.clone(),
        guest: guest.id.clone(),
        image,
        port,
        // Below those of deployments: no guest is of the same user.
        uid: if mapped { UID_BASE_MAPPED } else { UID_BASE } - 1,
    })
}

impl ForwarderPlan {
    /// The container's name: see [`forwarder_name`].
    pub fn name(&self) -> String {
        forwarder_name(&self.deployment)
    }

    /// The image's digest.
    pub fn image(&self) -> Digest {
        self.image
    }
}

/// Builds what the engine is told, as [`super::body`] does for a guest.
pub(crate) fn body(plan: &ForwarderPlan) -> ContainerCreateBody {
    let labels = [(NODE_LABEL, plan.node.clone()), (DEPLOYMENT_LABEL, plan.deployment.to_string())];
    ContainerCreateBody {
        image: Some(plan.image.to_string()),
        user: Some(format!("{0}:{0}", plan.uid)),
        cmd: Some(vec!["forward".into(), plan.port.to_string()]),
        labels: Some(labels.map(|(name, value)| (name.to_owned(), value)).into()),
        healthcheck: Some(HealthConfig { test: Some(vec!["NONE".into()]), ..HealthConfig::default() }),
        stop_signal: Some("SIGTERM".into()),
        tty: Some(false),
        attach_stdin: Some(true),
        attach_stdout: Some(true),
        open_stdin: Some(true),
        // Its input ends with the daemon's connection, and it ends with its input.
        stdin_once: Some(true),
        host_config: Some(host_config(plan)),
        ..ContainerCreateBody::default()
    }
}

fn host_config(plan: &ForwarderPlan) -> HostConfig {
    let memory = i64::try_from(MEMORY).unwrap_or(i64::MAX);
    let ulimit =
        |name: &str, value: i64| ResourcesUlimits { name: Some(name.into()), soft: Some(value), hard: Some(value) };
    HostConfig {
        network_mode: Some(format!("container:{}", plan.guest)),
        privileged: Some(false),
        cap_drop: Some(vec!["ALL".into()]),
        security_opt: Some(vec!["no-new-privileges=true".into(), format!("seccomp={}", seccomp::profile())]),
        readonly_rootfs: Some(true),
        shm_size: Some(SHARED_MEMORY),
        memory: Some(memory),
        memory_swap: Some(memory),
        memory_swappiness: Some(0),
        cpu_shares: Some(CPU_SHARES),
        pids_limit: Some(PROCESSES),
        oom_score_adj: Some(OOM_SCORE),
        ulimits: Some(vec![ulimit("nofile", FILES), ulimit("core", 0), ulimit("memlock", 64 << 10)]),
        ipc_mode: Some("private".into()),
        cgroupns_mode: Some(HostConfigCgroupnsModeEnum::PRIVATE),
        restart_policy: Some(RestartPolicy { name: Some(RestartPolicyNameEnum::NO), maximum_retry_count: None }),
        auto_remove: Some(false),
        // What it writes are the guest's streams.
        log_config: Some(HostConfigLogConfig { typ: Some("none".into()), config: Some([].into()) }),
        ..HostConfig::default()
    }
}

#[cfg(test)]
#[path = "forwarder_tests.rs"]
mod tests;
