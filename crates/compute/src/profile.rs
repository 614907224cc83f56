//! The isolation profile (V4, V5, I1, I2): [`plan`] decides, [`body`] is the only place that builds engine options.
//!
//! A [`ContainerPlan`] has no field for privileges, bind mounts, devices, ports or host namespaces, so that no request,
//! whatever its way here, can ask for one.

pub(crate) mod advice;
pub mod forwarder;
pub mod seccomp;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::Ipv4Addr;

use bollard::models::{
    ContainerCreateBody, EndpointSettings, HealthConfig, HostConfig, HostConfigCgroupnsModeEnum, HostConfigLogConfig,
    NetworkingConfig, ResourcesUlimits, RestartPolicy, RestartPolicyNameEnum,
};
use peer_proto::{
    PeerId,
    code::{Code, Problem},
    deploy::{Capability, Limits, MountPath, RuntimeName, Specification, User, Writable},
    id::{DeploymentId, Digest},
    unit::ByteSize,
};

use crate::engine::{ImageFacts, quote};
use crate::image::configuration::Wishes;
use crate::wall::attach::Networks;

/// Label with the node's own mark: what carries it is ours to look at, never proof that we made it.
pub const NODE_LABEL: &str = "peer-compute.node";
/// Label with the deployment's id.
pub const DEPLOYMENT_LABEL: &str = "peer-compute.deployment";
/// Label with the owner's PeerId.
pub const OWNER_LABEL: &str = "peer-compute.owner";

/// Label with a second network, which the container is connected to after it has been made.
pub const NETWORK_LABEL: &str = "peer-compute.network";

/// Each deployment runs as a user of its own, so that per-user limits of the kernel are not shared.
const UID_BASE: u32 = 200_000;
/// An engine with mapped users knows only 65,536 of them.
const UID_BASE_MAPPED: u32 = 20_000;
/// How many deployments can have one.
pub(crate) const UID_SLOTS: u32 = 40_000;

/// Most volumes that an image may ask for; each becomes a bounded tmpfs.
const VOLUMES_MAX: usize = 32;
const SHARED_MEMORY: i64 = 1 << 20;
const RUN_SIZE: u64 = 4 << 20;
/// Against the 1,024 that the host's own services have.
const CPU_SHARES: i64 = 128;
/// The least that the kernel knows, against the 500 or 100 that the host's own services have. An engine whose kernel or disk
/// scheduler has no such weight drops it when the container is made.
const IO_WEIGHT: u16 = 10;
/// Above the daemon's: when memory is short the guest goes first.
const OOM_SCORE: i64 = 500;
/// The engine's log file of a container, and how many of them (V5).
const LOG_SIZE: &str = "1m";
const LOG_FILES: &str = "2";

/// How one container is to run. Made by [`plan`] alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerPlan {
    deployment: DeploymentId,
    owner: PeerId,
    node: String,
    image: Digest,
    hostname: String,
    /// 0 for root.
    uid: u32,
    entrypoint: Option<Vec<String>>,
    command: Option<Vec<String>>,
    environment: Vec<String>,
    /// What is writable besides `/tmp`, with its size (bytes).
    writable: BTreeMap<MountPath, u64>,
    capabilities: BTreeSet<Capability>,
    writable_root: Option<u64>,
    /// None for the engine's own choice.
    runtime: Option<RuntimeName>,
    limits: Limits,
    stop_timeout_seconds: u32,
    alias: String,
    networks: Networks,
}

impl ContainerPlan {
    /// The same in these networks instead of none.
    pub(crate) fn in_networks(self, networks: Networks) -> Self {
        Self { networks, ..self }
    }

    /// A network that it is connected to after it has been made, and how it is called there.
    pub(crate) fn second_network(&self) -> Option<(&str, &str)> {
        self.networks.second.as_deref().map(|network| (network, self.alias.as_str()))
    }

    /// The container's name: see [`container_name`].
    pub fn name(&self) -> String {
        container_name(&self.deployment)
    }

    /// The image's digest.
    pub fn image(&self) -> Digest {
        self.image
    }

    /// The limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }
}

/// The only name that a deployment's container can have, so that it cannot be made twice.
pub fn container_name(deployment: &DeploymentId) -> String {
    format!("peer-compute-{deployment}")
}

/// The deployment that a container of this name belongs to, if it is one of ours.
pub fn deployment_of(container: &str) -> Option<DeploymentId> {
    container.strip_prefix("peer-compute-")?.parse().ok()
}

/// The user (and group) of the deployment in this slot, or nothing if there is no such slot. Slots are given out by the
/// caller, each to one deployment at a time. `user_namespace` as in [`crate::engine::EngineFacts`].
pub fn uid_for(slot: u32, user_namespace: bool) -> Option<u32> {
    let base = if user_namespace { UID_BASE_MAPPED } else { UID_BASE };
    (slot < UID_SLOTS).then_some(base + slot)
}

/// Decides how a deployment's container runs. `node` marks whose container it is; `uid` comes from [`uid_for`],
/// `runtime` from [`crate::isolation::meet`].
pub fn plan(
    specification: &Specification,
    image: &ImageFacts,
    deployment: DeploymentId,
    owner: PeerId,
    node: &str,
    uid: u32,
    runtime: Option<RuntimeName>,
) -> Result<ContainerPlan, Problem> {
    specification.check()?;
    if ![UID_BASE, UID_BASE_MAPPED].iter().any(|base| (*base..base + UID_SLOTS).contains(&uid)) {
        return Err(Problem::new(Code::Internal, format!("user {uid} is not one of those for deployments")));
    }
    let volumes = check_image(&image.wishes)?;
    check_program(specification, &image.wishes)?;
    let environment = specification.environment.iter().map(|v| format!("{}={}", v.name, v.value)).collect();
    Ok(ContainerPlan {
        deployment,
        owner,
        node: node.to_owned(),
        image: image.digest,
        hostname: specification.name.as_str().replace(['_', '.'], "-"),
        uid: if specification.user == User::Root { 0 } else { uid },
        entrypoint: specification.entrypoint.clone(),
        command: (!specification.command.is_empty()).then(|| specification.command.clone()),
        environment,
        writable: writable(volumes, specification),
        capabilities: specification.capabilities.clone(),
        writable_root: specification.writable_root.map(ByteSize::get),
        runtime,
        limits: specification.limits.clone(),
        stop_timeout_seconds: specification.stop_timeout_seconds,
        alias: specification.name.to_string(),
        networks: Networks::default(),
    })
}

/// Checks what an image asks for, before its first byte is taken and once more before it runs. Gives its volumes.
pub(crate) fn check_image(image: &Wishes) -> Result<BTreeSet<MountPath>, Problem> {
    let invalid = |message| Err(Problem::new(Code::InvalidImage, message));
    if image.system != "linux" {
        return invalid(format!("the image is for '{}', and only linux images run here", quote(&image.system)));
    }
    let directory = &image.working_directory;
    if !directory.is_empty() && !directory.starts_with('/') {
        return invalid(format!("the image's working directory '{}' is not an absolute path", quote(directory)));
    }
    volumes(&image.volumes)
}

/// Checks that the image or the specification names a program.
pub(crate) fn check_program(specification: &Specification, image: &Wishes) -> Result<(), Problem> {
    let entrypoint = specification.entrypoint.as_deref().unwrap_or(&image.entrypoint);
    let command = if specification.command.is_empty() { &image.command } else { &specification.command };
    if entrypoint.is_empty() && command.is_empty() {
        let message = "the image names no program to run; give a command or an entrypoint";
        return Err(Problem::new(Code::InvalidArgument, message));
    }
    Ok(())
}

/// The paths that an image wants as volumes. Left to the engine, each would be host disk without a limit.
fn volumes(paths: &[String]) -> Result<BTreeSet<MountPath>, Problem> {
    if paths.len() > VOLUMES_MAX {
        let message = format!("the image wants {} volumes; at most {VOLUMES_MAX} are possible", paths.len());
        return Err(Problem::new(Code::InvalidImage, message));
    }
    let volume = |path: &String| {
        MountPath::normalised(path).map_err(|why| {
            Problem::new(Code::InvalidImage, format!("the image wants a volume where none can be: {}", quote(&why)))
        })
    };
    paths.iter().map(volume).collect()
}

/// A tmpfs in the place of each volume, and what the specification asks for, which decides where both name a path.
fn writable(volumes: BTreeSet<MountPath>, specification: &Specification) -> BTreeMap<MountPath, u64> {
    let scratch = specification.limits.scratch.get();
    let asked = specification.writable.iter().map(|Writable { path, size }| (path.clone(), size.get()));
    volumes.into_iter().map(|path| (path, scratch)).chain(asked).collect()
}

/// Options of a tmpfs of so many bytes, with as many inodes as pages, within reason. It belongs to the deployment's user,
/// because older runtimes give it the mode that the image's directory has.
fn tmpfs(size: u64, uid: u32) -> String {
    let inodes = (size / 4096).clamp(64, 65_536);
    format!("rw,noexec,nosuid,nodev,size={size},nr_inodes={inodes},mode=1777,uid={uid},gid={uid}")
}

/// Everything writable: `/tmp`, `/run`, volumes and what was asked for. All of it counts as memory.
fn mounts(plan: &ContainerPlan) -> HashMap<String, String> {
    let run = RUN_SIZE.min(plan.limits.memory.get());
    let usual = [("/tmp".to_owned(), plan.limits.scratch.get()), ("/run".to_owned(), run)];
    let more = plan.writable.iter().map(|(path, size)| (path.to_string(), *size));
    // Of two sizes for one path the last one stays. `/tmp` cannot be asked for, and as a volume it has the same size.
    usual.into_iter().chain(more).map(|(path, size)| (path, tmpfs(size, plan.uid))).collect()
}

/// Builds what the engine is told. Every field stands here because the profile wants it; nothing is merged in.
pub fn body(plan: &ContainerPlan) -> ContainerCreateBody {
    let labels = [
        (NODE_LABEL, plan.node.clone()),
        (DEPLOYMENT_LABEL, plan.deployment.to_string()),
        (OWNER_LABEL, plan.owner.to_string()),
    ];
    let second = plan.networks.second.clone().map(|network| (NETWORK_LABEL, network));
    ContainerCreateBody {
        image: Some(plan.image.to_string()),
        hostname: Some(plan.hostname.clone()),
        user: Some(format!("{0}:{0}", plan.uid)),
        entrypoint: plan.entrypoint.clone(),
        cmd: plan.command.clone(),
        env: Some(plan.environment.clone()),
        labels: Some(labels.into_iter().chain(second).map(|(name, value)| (name.to_owned(), value)).collect()),
        healthcheck: Some(HealthConfig { test: Some(vec!["NONE".into()]), ..HealthConfig::default() }),
        stop_signal: Some("SIGTERM".into()),
        stop_timeout: Some(plan.stop_timeout_seconds.into()),
        tty: Some(false),
        open_stdin: Some(false),
        host_config: Some(host_config(plan)),
        networking_config: networking(plan),
        ..ContainerCreateBody::default()
    }
}

/// In a network, the container is known by its deployment's name to whoever shares it.
fn networking(plan: &ContainerPlan) -> Option<NetworkingConfig> {
    let first = plan.networks.first.clone()?;
    let endpoint = EndpointSettings { aliases: Some(vec![plan.alias.clone()]), ..EndpointSettings::default() };
    Some(NetworkingConfig { endpoints_config: Some([(first, endpoint)].into()) })
}

/// Names are resolved by the wall's resolver. Without one they are asked for at the container's own loopback address, where
/// nobody answers: left to itself, the engine would take its host's resolver.
fn resolver(networks: &Networks) -> Option<String> {
    networks.first.as_ref()?;
    Some(networks.resolver.unwrap_or(Ipv4Addr::LOCALHOST).to_string())
}

fn host_config(plan: &ContainerPlan) -> HostConfig {
    let limits = &plan.limits;
    let memory = i64::try_from(limits.memory.get()).unwrap_or(i64::MAX);
    let ulimit =
        |name: &str, value: i64| ResourcesUlimits { name: Some(name.into()), soft: Some(value), hard: Some(value) };
    let capabilities: Vec<_> = plan.capabilities.iter().map(|one| one.kernel_name().to_owned()).collect();
    let log = [("max-size", LOG_SIZE), ("max-file", LOG_FILES)];
    HostConfig {
        network_mode: Some(plan.networks.first.clone().unwrap_or_else(|| "none".into())),
        dns: resolver(&plan.networks).map(|address| vec![address]),
        // The host's own domains are nobody else's business; a dot means none.
        dns_search: plan.networks.first.as_ref().map(|_| vec![".".into()]),
        privileged: Some(false),
        cap_drop: Some(vec!["ALL".into()]),
        security_opt: Some(vec!["no-new-privileges=true".into(), format!("seccomp={}", seccomp::profile())]),
        cap_add: (!capabilities.is_empty()).then_some(capabilities),
        runtime: plan.runtime.as_ref().map(RuntimeName::to_string),
        readonly_rootfs: Some(plan.writable_root.is_none()),
        storage_opt: plan.writable_root.map(|size| [("size".to_owned(), size.to_string())].into()),
        tmpfs: Some(mounts(plan)),
        shm_size: Some(SHARED_MEMORY),
        memory: Some(memory),
        // Equal to `memory`: no swap on top.
        memory_swap: Some(memory),
        memory_swappiness: Some(0),
        nano_cpus: Some(i64::from(limits.cpu.get()) * 1_000_000),
        cpu_shares: Some(CPU_SHARES),
        blkio_weight: Some(IO_WEIGHT),
        pids_limit: Some(limits.pids.into()),
        oom_score_adj: Some(OOM_SCORE),
        ulimits: Some(vec![ulimit("nofile", limits.files.into()), ulimit("core", 0), ulimit("memlock", 64 << 10)]),
        ipc_mode: Some("private".into()),
        cgroupns_mode: Some(HostConfigCgroupnsModeEnum::PRIVATE),
        // The engine's small init passes signals on and reaps children: a guest without a handler ends at once.
        init: Some(true),
        restart_policy: Some(RestartPolicy { name: Some(RestartPolicyNameEnum::NO), maximum_retry_count: None }),
        auto_remove: Some(false),
        log_config: Some(HostConfigLogConfig {
            typ: Some("json-file".into()),
            config: Some(log.map(|(name, value)| (name.to_owned(), value.to_owned())).into()),
        }),
        ..HostConfig::default()
    }
}

#[cfg(test)]
mod body_tests;

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
pub(crate) mod tests {
    use peer_proto::identity::Identity;

    use super::*;

    pub(crate) fn specification() -> Specification {
        Specification {
            environment: vec!["A=b=c".parse().unwrap()],
            ..Specification::plain("web_1.x".parse().unwrap(), "web:1")
        }
    }

    fn wishes() -> Wishes {
        Wishes {
            system: "linux".into(),
            command: vec!["/app".into()],
            working_directory: "/".into(),
            ..Wishes::default()
        }
    }

    fn image_with(wishes: Wishes) -> ImageFacts {
        ImageFacts { wishes, ..image() }
    }

    pub(crate) fn image() -> ImageFacts {
        ImageFacts {
            digest: Digest::of(b"image"),
            layers: vec![Digest::of(b"layer")],
            architecture: "amd64".into(),
            size: 1,
            wishes: wishes(),
            names: vec![],
            references: vec![],
        }
    }

    pub(crate) fn planned(specification: &Specification, image: &ImageFacts) -> Result<ContainerPlan, Problem> {
        let owner = Identity::generate().peer_id();
        plan(specification, image, DeploymentId::random(), owner, "node", uid_for(7, false).unwrap(), None)
    }

    #[test]
    fn v5_every_limit_is_set_and_swap_is_not_given_on_top() {
        let plan = planned(&specification(), &image()).unwrap();
        let limits = peer_proto::deploy::Limits { pids: 77, ..specification().limits };
        let other = planned(&Specification { limits: limits.clone(), ..specification() }, &image()).unwrap();
        assert_eq!(*other.limits(), limits);
        let body = body(&plan);
        let host = body.host_config.unwrap();
        assert_eq!((host.memory, host.memory_swap), (Some(256 << 20), Some(256 << 20)));
        assert_eq!((host.nano_cpus, host.pids_limit), (Some(500_000_000), Some(100)));
        assert_eq!(body.user.as_deref(), Some("200007:200007"));
        assert_eq!(body.hostname.as_deref(), Some("web-1-x"));
        assert_eq!(host.shm_size, Some(1_048_576));
        let tmpfs = host.tmpfs.unwrap();
        assert!(tmpfs["/tmp"].contains("size=67108864,nr_inodes=16384,"), "{tmpfs:?}");
        assert!(tmpfs["/run"].contains("size=4194304,nr_inodes=1024,"), "{tmpfs:?}");
    }

    #[test]
    fn i2_volumes_of_the_image_become_bounded_tmpfs() {
        let volumes = vec!["/data/".into(), "/data//x".into(), "/tmp".into()];
        let image = image_with(Wishes { volumes, ..wishes() });
        let host = body(&planned(&specification(), &image).unwrap()).host_config.unwrap();
        let mut paths: Vec<_> = host.tmpfs.unwrap().into_keys().collect();
        paths.sort();
        assert_eq!(paths, ["/data", "/data/x", "/run", "/tmp"]);
        assert_eq!((host.binds, host.mounts), (None, None));
    }

    #[test]
    fn i2_volumes_over_the_kernels_files_are_refused() {
        for path in ["/", "//", "/proc", "/sys/x", "/dev", "data", "/a/../etc", "/a:/b", "/a,exec", "", "/ä"] {
            let image = image_with(Wishes { volumes: vec![path.into()], ..wishes() });
            assert_eq!(planned(&specification(), &image).unwrap_err().code, Code::InvalidImage, "{path}");
        }
        let many = |count| image_with(Wishes { volumes: (0..count).map(|n| format!("/{n}")).collect(), ..wishes() });
        assert!(planned(&specification(), &many(VOLUMES_MAX)).is_ok());
        assert!(planned(&specification(), &many(VOLUMES_MAX + 1)).is_err());
    }

    #[test]
    fn v4_a_working_directory_that_is_relative_is_refused() {
        let image = |directory: &str| image_with(Wishes { working_directory: directory.into(), ..wishes() });
        assert_eq!(planned(&specification(), &image("a/b")).unwrap_err().code, Code::InvalidImage);
        assert!(planned(&specification(), &image("")).is_ok());
    }

    #[test]
    fn an_image_without_a_program_needs_a_command() {
        let image = image_with(Wishes { command: vec![], ..wishes() });
        assert_eq!(planned(&specification(), &image).unwrap_err().code, Code::InvalidArgument);
        let with = Specification { command: vec!["/x".into()], ..specification() };
        assert!(planned(&with, &image).is_ok());
    }

    #[test]
    fn v4_nobody_runs_as_root_or_as_a_user_of_the_host() {
        let owner = Identity::generate().peer_id();
        for uid in [0, 1000, 65_534, UID_BASE - 1, UID_BASE + UID_SLOTS] {
            assert!(
                plan(&specification(), &image(), DeploymentId::random(), owner, "node", uid, None).is_err(),
                "{uid}"
            );
        }
        assert_eq!(uid_for(UID_SLOTS, false), None);
        assert!(uid_for(UID_SLOTS - 1, true).unwrap() < 65_536);
    }

    #[test]
    fn what_was_granted_is_in_the_body_and_nothing_else() {
        let asked = Specification {
            user: User::Root,
            capabilities: [Capability::Setuid, Capability::Chown].into(),
            writable: vec!["/data=16m".parse().unwrap(), "/run=8m".parse().unwrap()],
            ..specification()
        };
        let volumes = vec!["/data".into(), "/more".into()];
        let body = body(&planned(&asked, &image_with(Wishes { volumes, ..wishes() })).unwrap());
        assert_eq!(body.user.as_deref(), Some("0:0"));
        let host = body.host_config.unwrap();
        assert_eq!(host.cap_add, Some(vec!["CAP_CHOWN".to_owned(), "CAP_SETUID".to_owned()]));
        assert_eq!((host.cap_drop, host.storage_opt), (Some(vec!["ALL".to_owned()]), None));
        let tmpfs = host.tmpfs.unwrap();
        for (path, size) in [("/data", 16 << 20), ("/run", 8 << 20), ("/more", 64 << 20), ("/tmp", 64 << 20)] {
            let options = &tmpfs[path];
            assert!(options.contains(&format!("size={size},")), "{path}: {options}");
            assert!(options.starts_with("rw,noexec,nosuid,nodev,") && options.ends_with(",uid=0,gid=0"), "{options}");
        }
        assert_eq!(tmpfs.len(), 4);
    }

    #[test]
    fn v5_a_writable_root_has_a_size() {
        let asked = Specification { writable_root: Some(ByteSize::mebibytes(64)), ..specification() };
        let host = body(&planned(&asked, &image()).unwrap()).host_config.unwrap();
        assert_eq!(host.readonly_rootfs, Some(false));
        assert_eq!(host.storage_opt, Some([("size".to_owned(), "67108864".to_owned())].into()));
    }

    #[test]
    fn container_names_lead_back_to_their_deployment() {
        let id = DeploymentId::random();
        assert_eq!(deployment_of(&container_name(&id)), Some(id));
        assert_eq!(deployment_of("peer-compute-x"), None);
    }
}
