//! The whole of what the engine is told of a forwarder, word by word.

use serde_json::json;

use super::*;

fn guest(deployment: DeploymentId) -> ContainerFacts {
    ContainerFacts {
        id: "ab".repeat(32).parse().expect("an id"),
        name: crate::profile::container_name(&deployment),
        image: None,
        running: true,
        frozen: false,
        created: false,
        pid: None,
        exit_code: None,
        out_of_memory: false,
        started_at: None,
        finished_at: None,
        error: None,
        log_path: None,
        labels: [(NODE_LABEL.to_owned(), "node".to_owned())].into(),
        report: Box::default(),
    }
}

#[test]
fn i1_i2_v4_v5_what_the_engine_is_told_of_a_forwarder_is_this_and_nothing_else() {
    let (id, image) = (DeploymentId::random(), Digest::of(b"image"));
    let port = "8080".parse().expect("a port");
    let plan = plan(&guest(id), image, port, false).expect("a plan");
    assert_eq!((plan.name(), plan.image()), (format!("peer-compute-forwarder-{id}"), image));
    assert_eq!(forwarder_of(&plan.name()), Some(id));
    let ulimit = |name: &str, value: i64| json!({ "Name": name, "Soft": value, "Hard": value });
    let host = json!({
        "NetworkMode": format!("container:{}", "ab".repeat(32)),
        "Privileged": false,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges=true", format!("seccomp={}", seccomp::profile())],
        "ReadonlyRootfs": true,
        "ShmSize": 1_048_576,
        "Memory": 50_331_648,
        "MemorySwap": 50_331_648,
        "MemorySwappiness": 0,
        "CpuShares": 128,
        "PidsLimit": 4,
        "OomScoreAdj": 500,
        "Ulimits": [ulimit("nofile", 512), ulimit("core", 0), ulimit("memlock", 65_536)],
        "IpcMode": "private",
        "CgroupnsMode": "private",
        "RestartPolicy": { "Name": "no" },
        "AutoRemove": false,
        "LogConfig": { "Type": "none", "Config": {} },
    });
    let expected = json!({
        "Image": image.to_string(),
        "User": "199999:199999",
        "Cmd": ["forward", "8080"],
        "Labels": { "peer-compute.node": "node", "peer-compute.deployment": id.to_string() },
        "Healthcheck": { "Test": ["NONE"] },
        "StopSignal": "SIGTERM",
        "Tty": false,
        "AttachStdin": true,
        "AttachStdout": true,
        "OpenStdin": true,
        "StdinOnce": true,
        "HostConfig": host,
    });
    assert_eq!(serde_json::to_value(body(&plan)).expect("JSON"), expected);
}

#[test]
fn only_a_guest_of_ours_gets_a_forwarder() {
    let id = DeploymentId::random();
    let (image, port) = (Digest::of(b"image"), "1".parse().expect("a port"));
    assert!(plan(&ContainerFacts { labels: [].into(), ..guest(id) }, image, port, false).is_none());
    assert!(plan(&ContainerFacts { name: "web".into(), ..guest(id) }, image, port, false).is_none());
    let mapped = plan(&guest(id), image, port, true).expect("a plan");
    assert_eq!(body(&mapped).user.as_deref(), Some("19999:19999"));
    assert_eq!(forwarder_of("peer-compute-forwarder-x"), None);
}
