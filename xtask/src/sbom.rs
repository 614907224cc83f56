//! Judges a bill of materials (CycloneDX 1.3 to 1.6 as JSON) against what the workspace really builds.
//!
//! The published schema's required fields must be there, and every crate that a program links, with its version.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use crate::examples::{ExampleError, run};

/// Why a bill of materials could not be judged.
#[derive(Debug, thiserror::Error)]
pub enum SbomError {
    /// Cargo failed.
    #[error(transparent)]
    Run(#[from] ExampleError),
    /// The file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not JSON.
    #[error("{} is not JSON: {source}", path.display())]
    Json {
        /// Which one.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
}

/// Judges the bill in `path` of the workspace's crate `package`. Gives how many components it names, and every fault.
pub fn check(root: &Path, package: &str, path: &Path) -> Result<(usize, Vec<String>), SbomError> {
    let text = fs::read(path).map_err(|source| SbomError::Read { path: path.to_path_buf(), source })?;
    let bill: Value =
        serde_json::from_slice(&text).map_err(|source| SbomError::Json { path: path.to_path_buf(), source })?;
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let mut command = Command::new(&cargo);
    command.current_dir(root).args(["tree", "--package", package, "--locked", "--prefix", "none", "--format", "{p}"]);
    command.args(["--edges", "normal"]);
    let linked: BTreeSet<(String, String)> = run(&mut command, &cargo)?.lines().filter_map(linked).collect();
    Ok((list(&bill["components"]).len(), judge(&bill, package, &linked)))
}

/// `name v1.2.3 (…)`.
fn linked(line: &str) -> Option<(String, String)> {
    let mut words = line.split(' ');
    Some((words.next()?.to_owned(), words.next()?.strip_prefix('v')?.to_owned()))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn judge(bill: &Value, package: &str, linked: &BTreeSet<(String, String)>) -> Vec<String> {
    let mut faults = Vec::new();
    if bill["bomFormat"] != "CycloneDX" {
        faults.push("bomFormat is not CycloneDX".to_owned());
    }
    if !["1.3", "1.4", "1.5", "1.6"].iter().any(|version| bill["specVersion"] == *version) {
        faults.push(format!("specVersion is {}", bill["specVersion"]));
    }
    if bill["version"].as_u64().is_none_or(|version| version == 0) {
        faults.push("version is not a number from 1".to_owned());
    }
    if bill["metadata"]["component"]["name"] != package {
        faults.push(format!("metadata.component is not {package}"));
    }
    let mut named = BTreeSet::new();
    for component in list(&bill["components"]) {
        let text = |field: &str| component[field].as_str().unwrap_or_default();
        let (name, version) = (text("name"), text("version"));
        for field in ["type", "name", "version"].into_iter().filter(|field| text(field).is_empty()) {
            faults.push(format!("a component ({name}) has no {field}"));
        }
        let is_foreign = text("purl").starts_with("pkg:cargo/") && !text("purl").contains("download_url=file");
        if is_foreign && list(&component["licenses"]).is_empty() {
            faults.push(format!("{name} {version} has no licence"));
        }
        named.insert((name.to_owned(), version.to_owned()));
    }
    let missing = linked.iter().filter(|(name, _)| name != package).filter(|one| !named.contains(*one));
    faults.extend(missing.map(|(name, version)| format!("{name} {version} is linked and not named")));
    let mut references = BTreeSet::new();
    for component in list(&bill["components"]) {
        let reference = component["bom-ref"].as_str().unwrap_or_default();
        if !references.insert(reference) {
            faults.push(format!("the reference {reference:?} is not unique"));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn bill() -> Value {
        let component = json!({
            "type": "library", "bom-ref": "a", "name": "serde", "version": "1.0.0", "purl": "pkg:cargo/serde@1.0.0",
            "licenses": [{ "expression": "MIT" }],
        });
        let metadata = json!({ "component": { "type": "application", "name": "peer-node" } });
        json!({
            "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "metadata": metadata, "components": [component],
        })
    }

    #[test]
    fn what_lacks_is_named() {
        let linked = BTreeSet::from([("serde".to_owned(), "1.0.0".to_owned())]);
        assert_eq!(judge(&bill(), "peer-node", &linked), Vec::<String>::new());
        let more = BTreeSet::from([("serde".to_owned(), "1.0.1".to_owned())]);
        assert_eq!(judge(&bill(), "peer-node", &more), ["serde 1.0.1 is linked and not named"]);
        for (pointer, value, fault) in [
            ("/bomFormat", json!("SPDX"), "bomFormat is not CycloneDX"),
            ("/version", json!(0), "version is not a number from 1"),
            ("/metadata/component/name", json!("xtask"), "metadata.component is not peer-node"),
            ("/components/0/licenses", json!([]), "serde 1.0.0 has no licence"),
            ("/components/0/type", json!(""), "a component (serde) has no type"),
        ] {
            let mut changed = bill();
            *changed.pointer_mut(pointer).unwrap_or(&mut Value::Null) = value;
            assert_eq!(judge(&changed, "peer-node", &linked), [fault]);
        }
    }

    #[test]
    fn a_line_of_the_tree_is_read() {
        let read = linked("peer-proto v0.1.0 (/somewhere)");
        assert_eq!(read, Some(("peer-proto".to_owned(), "0.1.0".to_owned())));
        assert_eq!(linked(""), None);
    }
}
