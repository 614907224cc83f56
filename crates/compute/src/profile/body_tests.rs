//! The whole of what the engine is told, word by word: whatever is left out or added by mistake shows here.

use std::net::Ipv4Addr;

use peer_proto::identity::Identity;
use serde_json::json;

use super::tests::{image, specification};
use super::*;

#[test]
fn i1_i2_v4_v5_what_the_engine_is_told_is_this_and_nothing_else() {
    let asked = Specification {
        entrypoint: Some(vec!["/entry".into()]),
        command: vec!["serve".into()],
        stop_timeout_seconds: 7,
        user: User::Root,
        capabilities: [Capability::Chown].into(),
        writable: vec!["/data=16m".parse().expect("a path")],
        writable_root: Some(ByteSize::mebibytes(64)),
        ..specification()
    };
    let (id, owner) = (DeploymentId::random(), Identity::generate().peer_id());
    let runtime = Some("runsc".parse().expect("a runtime"));
    let plan = plan(&asked, &image(), id, owner, "node", UID_BASE, runtime).expect("a plan");
    let networks = Networks {
        first: Some("front".into()),
        second: Some("back".into()),
        resolver: Some(Ipv4Addr::new(198, 18, 0, 1)),
    };
    let told = serde_json::to_value(body(&plan.in_networks(networks))).expect("JSON");
    let tmpfs =
        |size: u64, inodes: u64| format!("rw,noexec,nosuid,nodev,size={size},nr_inodes={inodes},mode=1777,uid=0,gid=0");
    let ulimit = |name: &str, value: i64| json!({ "Name": name, "Soft": value, "Hard": value });
    let host = json!({
        "NetworkMode": "front",
        "Dns": ["198.18.0.1"],
        "DnsSearch": ["."],
        "Privileged": false,
        "CapDrop": ["ALL"],
        "CapAdd": ["CAP_CHOWN"],
        "SecurityOpt": ["no-new-privileges=true", format!("seccomp={}", seccomp::profile())],
        "Runtime": "runsc",
        "ReadonlyRootfs": false,
        "StorageOpt": { "size": "67108864" },
        "Tmpfs": {
            "/tmp": tmpfs(64 << 20, 16_384),
            "/run": tmpfs(4 << 20, 1024),
            "/data": tmpfs(16 << 20, 4096),
        },
        "ShmSize": 1_048_576,
        "Memory": 268_435_456,
        "MemorySwap": 268_435_456,
        "MemorySwappiness": 0,
        "NanoCpus": 500_000_000,
        "CpuShares": 128,
        "BlkioWeight": 10,
        "PidsLimit": 100,
        "OomScoreAdj": 500,
        "Ulimits": [ulimit("nofile", 1024), ulimit("core", 0), ulimit("memlock", 65_536)],
        "IpcMode": "private",
        "CgroupnsMode": "private",
        "Init": true,
        "RestartPolicy": { "Name": "no" },
        "AutoRemove": false,
        "LogConfig": { "Type": "json-file", "Config": { "max-size": "1m", "max-file": "2" } },
    });
    let expected = json!({
        "Image": image().digest.to_string(),
        "Hostname": "web-1-x",
        "User": "0:0",
        "Entrypoint": ["/entry"],
        "Cmd": ["serve"],
        "Env": ["A=b=c"],
        "Labels": {
            "peer-compute.node": "node",
            "peer-compute.deployment": id.to_string(),
            "peer-compute.owner": owner.to_string(),
            "peer-compute.network": "back",
        },
        "Healthcheck": { "Test": ["NONE"] },
        "StopSignal": "SIGTERM",
        "StopTimeout": 7,
        "Tty": false,
        "OpenStdin": false,
        "NetworkingConfig": { "EndpointsConfig": { "front": { "Aliases": ["web_1.x"] } } },
        "HostConfig": host,
    });
    assert_eq!(told, expected);
}
