#![expect(clippy::unwrap_used, reason = "a failing step is a failing test")]

use peer_proto::code::{Code, Problem};

use super::*;

fn deployment(state: &str) -> Deployment {
    let json = serde_json::json!({
        "peer_id": "12D3KooWBob", "peer": "bob", "as_of": 1000, "reachable": true,
        "id": "000102030405060708090a0b0c0d0e0f", "state": state, "created_at": 0, "restarts": 0,
        "url": "https://abc.peer.localhost/",
        "specification": {
            "name": "web", "image_name": "web:1\u{1b}[2J", "publish": true, "expose": 8080, "restart": "no",
            "stop_timeout_seconds": 10,
            "limits": { "cpu": 500, "memory": 268_435_456, "pids": 100, "files": 1024, "scratch": 67_108_864 },
        },
    });
    serde_json::from_value(json).unwrap()
}

#[test]
fn states_say_what_qualifies_them() {
    assert_eq!(state(&deployment("running")), "running");
    let mut ended = deployment("failed");
    ended.status.exit_code = Some(137);
    assert_eq!(state(&ended), "failed (exit code 137)");
    let mut sick = deployment("running");
    sick.status.health = Some(Health::Unhealthy);
    assert_eq!(state(&sick), "running (unhealthy)");
    sick.reachable = false;
    assert!(state(&sick).ends_with("peer offline)"));
}

#[test]
fn one_deployment_in_full() {
    let mut one = deployment("running");
    one.status.problem = Some(Problem::new(Code::NoGateway, "no gateway is set"));
    let expected = "\
name:     web
id:       000102030405060708090a0b0c0d0e0f
peer:     bob (12D3KooWBob)
state:    running
problem:  no gateway is set
url:      https://abc.peer.localhost/
image:    web:1\\u{1b}[2J
port:     8080
limits:   0.5 CPU, 256 MiB
egress:   none
restart:  no, 0 restarts
created:  1970-01-01T00:00:00.000Z
";
    assert_eq!(in_full(&one), expected);
}
