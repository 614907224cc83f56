//! The program itself: its commands, its JSON, its exit statuses, and its end on a signal.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use peer_proto::identity::Identity;
use serde_json::Value;

fn peergate(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_peergate"));
    command.arg("--data-dir").arg(directory).args([
        "--https-listen",
        "127.0.0.1:0",
        "--listen",
        "/ip4/127.0.0.1/tcp/0",
    ]);
    command.args(arguments);
    command
}

fn run(directory: &Path, arguments: &[&str]) -> Output {
    peergate(directory, arguments).output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Already gone where the test has waited for it.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn allow_list_is_edited_and_shown() {
    let directory = tempfile::tempdir().unwrap();
    let peer = Identity::generate().peer_id().to_string();
    let allowed = run(directory.path(), &["allow", &peer, "--name", "bob", "--json"]);
    assert!(allowed.status.success());
    assert_eq!(json(&allowed)["changed"], true);
    let listed = json(&run(directory.path(), &["providers", "--json"]));
    assert_eq!((&listed[0]["peer_id"], &listed[0]["name"]), (&Value::from(peer.clone()), &Value::from("bob")));
    let denied = run(directory.path(), &["deny", "bob"]);
    assert_eq!(String::from_utf8_lossy(&denied.stdout), format!("denied {peer}\n"), "no gateway runs");
    assert_eq!(run(directory.path(), &["deny", &peer]).status.code(), Some(3));
    let refused = run(directory.path(), &["allow", "nobody", "--json"]);
    assert_eq!((refused.status.code(), &json(&refused)["error"]["code"]), (Some(2), &"invalid_argument".into()));
    assert!(json(&refused)["error"]["message"].as_str().unwrap().contains("begins with 12D3KooW"), "{refused:?}");
    let refused = run(directory.path(), &["deny", "Nobody"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).ends_with("code: invalid_argument\n"), "{refused:?}");
    assert_eq!(run(directory.path(), &["allow", &peer, "--name", "A b"]).status.code(), Some(2));
    std::fs::write(directory.path().join("providers.toml"), "damaged").unwrap();
    let refused = run(directory.path(), &["run"]);
    assert_eq!(refused.status.code(), Some(1), "a damaged list never starts open");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("providers.toml"));
}

#[test]
fn settings_are_explained() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("peergate.toml"), "connections_max = 7\n").unwrap();
    let checked = json(&run(directory.path(), &["config", "check", "--json"]));
    let settings = checked["settings"].as_array().unwrap();
    let of = |key: &str| settings.iter().find(|setting| setting["key"] == key).unwrap();
    assert_eq!((&of("connections_max")["value"], &of("connections_max")["origin"]), (&"7".into(), &"file".into()));
    assert_eq!(of("listen")["origin"], "flag_or_environment");
    assert_eq!(of("domain")["origin"], "default");
    let by_variable =
        peergate(directory.path(), &["config", "check", "--json"]).env("PEERGATE_DOMAIN", "a.b").output().unwrap();
    assert!(json(&by_variable)["settings"].to_string().contains("a.b"));
    std::fs::write(directory.path().join("peergate.toml"), "colour = 7\n").unwrap();
    let refused = run(directory.path(), &["config", "check", "--json"]);
    assert_eq!(refused.status.code(), Some(2));
    let error = json(&refused);
    assert_eq!(error["error"]["code"], "invalid_argument");
    assert!(String::from_utf8_lossy(&refused.stderr).ends_with("code: invalid_argument\n"), "{refused:?}");
    assert!(error["error"]["message"].as_str().unwrap().contains("colour"));
}

#[test]
fn version_and_completion_are_real() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(json(&run(directory.path(), &["version", "--json"]))["version"], env!("CARGO_PKG_VERSION"));
    let completion = run(directory.path(), &["completion", "bash"]);
    assert!(String::from_utf8_lossy(&completion.stdout).contains("providers"));
}

#[test]
fn gateway_starts_shows_itself_and_ends_on_a_signal() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(run(directory.path(), &["info"]).status.code(), Some(7));
    let mut command = peergate(directory.path(), &["--json"]);
    let mut running = Running(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let mut line = String::new();
    let mut output = BufReader::new(running.0.stdout.take().unwrap());
    output.read_line(&mut line).unwrap();
    let started: Value = serde_json::from_str(&line).unwrap();
    let info = json(&run(directory.path(), &["info", "--json"]));
    assert_eq!(started, info);
    let peer = info["peer_id"].as_str().unwrap();
    assert!(info["addresses"][0].as_str().unwrap().ends_with(&format!("/p2p/{peer}")));
    assert!(info["url_suffix"].as_str().unwrap().starts_with(".peer.localhost:"));
    assert!(Path::new(info["ca_certificate"].as_str().unwrap()).exists());
    let provider = Identity::generate().peer_id().to_string();
    run(directory.path(), &["allow", &provider, "--name", "bob"]);
    let denied = run(directory.path(), &["deny", "bob"]);
    assert_eq!(String::from_utf8_lossy(&denied.stdout), format!("denied {provider}; its names have ended\n"));
    let second = run(directory.path(), &["run"]);
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("in use"));
    let process = rustix::process::Pid::from_child(&running.0);
    rustix::process::kill_process(process, rustix::process::Signal::TERM).unwrap();
    assert!(running.0.wait().unwrap().success());
    let after = json(&run(directory.path(), &["info", "--json"]));
    assert_eq!((&after["running"], &after["peer_id"]), (&false.into(), &info["peer_id"]));
}
