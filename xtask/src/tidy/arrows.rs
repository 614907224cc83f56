//! The arrows between crates, read from `cargo metadata` and compared with the one table that allows them.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Command,
};

use serde_json::Value;

use super::TidyError;
use crate::examples::run;

/// What each crate of ours may link, and for tests besides. Everything else is refused.
const ALLOWED: [(&str, &[&str], &[&str]); 12] = [
    ("peer-proto", &[], &[]),
    ("peer-state", &["peer-proto"], &[]),
    ("peer-trust", &["peer-proto", "peer-state"], &[]),
    ("peer-net", &["peer-proto"], &[]),
    // The program that runs inside of containers' networks: small, and ignorant of all the rest.
    ("peer-guest", &[], &[]),
    ("peer-compute", &["peer-proto", "peer-state", "peer-trust", "peer-guest"], &["xtask"]),
    ("peer-gateway", &["peer-proto", "peer-state", "peer-net"], &["xtask"]),
    // Its tests run the gateway's own program, and cargo builds it only for a dependency.
    ("peer-node", &["peer-proto", "peer-state", "peer-trust", "peer-net", "peer-compute"], &["peer-gateway", "xtask"]),
    ("peer-example-hello", &[], &[]),
    ("peer-example-probe", &[], &[]),
    ("xtask", &[], &[]),
    // It drives the programs from outside; what it links of them speaks as no program of ours would (a friend who turned).
    ("peer-bench", &["peer-proto", "peer-trust", "peer-net", "peer-node", "xtask"], &[]),
];

/// What must not be linked into a crate by any way, and why.
const FORBIDDEN: [(&str, &[&str], &str); 4] = [
    ("peer-gateway", &["bollard", "peer-compute", "peer-trust"], "the gateway holds no container engine (I5)"),
    ("peer-net", &["bollard", "rusqlite", "axum"], "the network room knows bytes, not deployments"),
    ("peer-proto", &["tokio", "libp2p", "bollard", "rusqlite"], "the vocabulary does nothing by itself"),
    ("peer-trust", &["bollard", "libp2p"], "the one decision neither dials nor runs"),
];

/// Checks the workspace at `root`.
pub fn check(root: &Path) -> Result<Vec<String>, TidyError> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let mut command = Command::new(&cargo);
    command.current_dir(root).args(["metadata", "--format-version", "1", "--locked"]);
    let text = run(&mut command, &cargo)?;
    let metadata = serde_json::from_str(&text).map_err(|error| TidyError::Metadata(error.to_string()))?;
    judge(&metadata)
}

/// One package's resolved dependencies: those that are linked, and those of tests alone.
#[derive(Debug, Default)]
struct Links {
    linked: BTreeSet<String>,
    tests: BTreeSet<String>,
}

fn judge(metadata: &Value) -> Result<Vec<String>, TidyError> {
    let names = names(metadata)?;
    let links = links(metadata)?;
    let members: BTreeSet<&str> = list(metadata, "workspace_members")?.iter().filter_map(Value::as_str).collect();
    let ours: BTreeSet<&str> = members.iter().filter_map(|id| names.get(*id).copied()).collect();
    let mut faults = Vec::new();
    for id in members {
        let name = names.get(id).copied().unwrap_or(id);
        let Some((_, allowed, for_tests)) = ALLOWED.iter().find(|(known, ..)| *known == name) else {
            faults.push(format!("{name}: this crate is not in tidy's table of arrows"));
            continue;
        };
        let links = links.get(id).ok_or_else(|| TidyError::Metadata(format!("{name} is not resolved")))?;
        let named = |id: &String| names.get(id.as_str()).copied().filter(|name| ours.contains(name));
        for other in links.linked.iter().filter_map(named).filter(|other| !allowed.contains(other)) {
            faults.push(format!("{name}: may not depend on {other}"));
        }
        let for_tests = |other: &&str| allowed.contains(other) || for_tests.contains(other);
        for other in links.tests.iter().filter_map(named).filter(|other| !for_tests(other)) {
            faults.push(format!("{name}: its tests may not depend on {other}"));
        }
    }
    for (name, forbidden, why) in FORBIDDEN {
        let tree = names.iter().find(|(_, known)| **known == name).map(|(id, _)| tree(id, &links));
        for id in tree.into_iter().flatten() {
            if let Some(found) = names.get(id.as_str()).filter(|found| forbidden.contains(*found)) {
                faults.push(format!("{name}: links {found}, but {why}"));
            }
        }
    }
    Ok(faults)
}

/// Everything that a package links, by whatever way.
fn tree(id: &str, links: &BTreeMap<String, Links>) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    let mut open = vec![id.to_owned()];
    while let Some(id) = open.pop() {
        for other in links.get(&id).into_iter().flat_map(|links| &links.linked) {
            if seen.insert(other.clone()) {
                open.push(other.clone());
            }
        }
    }
    seen
}

fn list<'value>(value: &'value Value, field: &str) -> Result<&'value Vec<Value>, TidyError> {
    value[field].as_array().ok_or_else(|| TidyError::Metadata(format!("no list {field:?}")))
}

fn names(metadata: &Value) -> Result<BTreeMap<&str, &str>, TidyError> {
    let packages = list(metadata, "packages")?.iter();
    Ok(packages.filter_map(|package| Some((package["id"].as_str()?, package["name"].as_str()?))).collect())
}

fn links(metadata: &Value) -> Result<BTreeMap<String, Links>, TidyError> {
    let mut all = BTreeMap::new();
    for node in list(&metadata["resolve"], "nodes")? {
        let mut links = Links::default();
        for dependency in list(node, "deps")? {
            let id = dependency["pkg"].as_str().unwrap_or_default().to_owned();
            // A kind of null is an ordinary dependency; what a build script uses is not linked, but ours are judged alike.
            for kind in list(dependency, "dep_kinds")? {
                let tests = kind["kind"].as_str() == Some("dev");
                if tests { &mut links.tests } else { &mut links.linked }.insert(id.clone());
            }
        }
        all.insert(node["id"].as_str().unwrap_or_default().to_owned(), links);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use serde_json::json;

    use super::*;

    fn metadata(links: &[(&str, &str, Option<&str>)]) -> Value {
        let all = ["peer-gateway", "peer-proto", "peer-net", "bollard", "peer-compute", "middle"];
        let node = |name: &&str| {
            let own = links.iter().filter(|(from, ..)| from == name);
            let deps: Value = own.map(|(_, to, kind)| json!({ "pkg": to, "dep_kinds": [{ "kind": kind }] })).collect();
            json!({ "id": name, "deps": deps })
        };
        json!({
            "packages": all.iter().map(|name| json!({ "id": name, "name": name })).collect::<Value>(),
            "workspace_members": ["peer-gateway", "peer-proto", "peer-net"],
            "resolve": { "nodes": all.iter().map(node).collect::<Value>() },
        })
    }

    #[test]
    fn allowed_arrows_are_silent() {
        let links = [("peer-gateway", "peer-net", None), ("peer-net", "peer-proto", Some("dev"))];
        assert_eq!(judge(&metadata(&links)).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn arrows_against_the_table_are_named() {
        let links = [("peer-proto", "peer-net", None), ("peer-net", "peer-gateway", Some("dev"))];
        let faults = judge(&metadata(&links)).unwrap();
        assert_eq!(
            faults,
            ["peer-net: its tests may not depend on peer-gateway", "peer-proto: may not depend on peer-net"]
        );
    }

    #[test]
    fn i5_the_gateway_links_no_engine_by_any_way() {
        let links = [("peer-gateway", "middle", None), ("middle", "bollard", None)];
        let faults = judge(&metadata(&links)).unwrap();
        assert!(faults.iter().any(|fault| fault.starts_with("peer-gateway: links bollard")), "{faults:?}");
        let for_tests = [("peer-gateway", "middle", Some("dev")), ("middle", "bollard", None)];
        assert_eq!(judge(&metadata(&for_tests)).unwrap(), Vec::<String>::new());
    }

    /// What the table keeps out: cargo by itself links whatever a manifest names.
    #[test]
    fn control_i5_cargo_alone_lets_the_gateway_link_an_engine() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let package = |name: &str| format!("[package]\nname = \"{name}\"\nversion = \"1.0.0\"\nedition = \"2024\"\n");
        write("Cargo.toml", "[workspace]\nresolver = \"3\"\nmembers = [\"gateway\"]\nexclude = [\"bollard\"]\n");
        let gateway = package("peer-gateway") + "[dependencies]\nbollard = { path = \"../bollard\" }\n";
        write("gateway/Cargo.toml", &gateway);
        write("gateway/src/main.rs", "fn main() { bollard::start_anything(); }\n");
        write("bollard/Cargo.toml", &package("bollard"));
        write("bollard/src/lib.rs", "pub fn start_anything() {}\n");
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
        let built = Command::new(&cargo)
            .current_dir(root.path())
            .env("CARGO_TARGET_DIR", root.path().join("target"))
            .args(["check", "--offline", "--quiet"])
            .status()
            .unwrap();
        assert!(built.success(), "cargo has nothing against it");
        let faults = check(root.path()).unwrap();
        assert!(faults.iter().any(|fault| fault.starts_with("peer-gateway: links bollard")), "{faults:?}");
    }
}
