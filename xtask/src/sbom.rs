//! A bill of materials of what a crate of ours links (CycloneDX 1.5 as JSON), from `cargo metadata` and the lock file.
//!
//! The same sources give the same bytes: there is no time in it, and its serial number is derived from its content. What was
//! written is judged against the published schema's required fields and against `cargo tree`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

use serde_json::{Value, json};
use toml::Table;

use crate::{
    examples::run,
    image::Digest,
    supply::{self, SupplyError},
};

fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}

/// The bill of the workspace's crate `package` for the machine's own platform.
pub fn bill(root: &Path, package: &str) -> Result<Value, SupplyError> {
    let rustc = run(Command::new("rustc").arg("-vV"), "rustc")?;
    let host = rustc.lines().find_map(|line| line.strip_prefix("host: ")).unwrap_or_default();
    let mut command = Command::new(cargo());
    command.current_dir(root).args(["metadata", "--format-version", "1", "--locked", "--filter-platform", host]);
    let metadata: Value = serde_json::from_str(&run(&mut command, "cargo metadata")?)
        .map_err(|error| SupplyError::malformed(&"cargo metadata", &error))?;
    let lock = supply::read(&root.join("Cargo.lock"))?;
    compose(&metadata, &checksums(&lock)?, package)
}

/// Writes the bill to `path`, and judges it. Gives how many components it names, and every fault.
pub fn write(root: &Path, package: &str, path: &Path) -> Result<(usize, Vec<String>), SupplyError> {
    let text = format!("{:#}\n", bill(root, package)?);
    fs::write(path, text).map_err(SupplyError::at("write", path))?;
    check(root, package, path)
}

/// SHA-256 of each package in the lock file, by name and version.
fn checksums(lock: &str) -> Result<BTreeMap<(String, String), String>, SupplyError> {
    let table: Table = lock.parse().map_err(|error: toml::de::Error| SupplyError::malformed(&"Cargo.lock", &error))?;
    let packages = table.get("package").and_then(toml::Value::as_array).into_iter().flatten();
    let text = |package: &toml::Value, field: &str| Some(package.get(field)?.as_str()?.to_owned());
    let entry =
        |package: &toml::Value| Some(((text(package, "name")?, text(package, "version")?), text(package, "checksum")?));
    Ok(packages.filter_map(entry).collect())
}

fn compose(
    metadata: &Value,
    checksums: &BTreeMap<(String, String), String>,
    package: &str,
) -> Result<Value, SupplyError> {
    let packages: BTreeMap<&str, &Value> =
        list(&metadata["packages"]).iter().filter_map(|one| Some((one["id"].as_str()?, one))).collect();
    let links: BTreeMap<&str, Vec<&str>> = list(&metadata["resolve"]["nodes"])
        .iter()
        .filter_map(|node| Some((node["id"].as_str()?, links(node))))
        .collect();
    let top = packages.iter().find(|(_, one)| one["name"] == package).map(|(id, _)| *id);
    let top = top.ok_or_else(|| SupplyError::malformed(&"cargo metadata", &format!("there is no crate {package}")))?;
    let (mut seen, mut open) = (BTreeSet::from([top]), vec![top]);
    while let Some(id) = open.pop() {
        let more = links.get(id).into_iter().flatten().copied();
        open.extend(more.filter(|other| seen.insert(other)).collect::<Vec<_>>());
    }
    let described = |id: &&str| packages.get(*id).map(|one| component(one, checksums));
    let components: Vec<Value> = seen.iter().filter(|id| **id != top).filter_map(described).collect();
    let reference = |id: &str| packages.get(id).map_or_else(String::new, |one| purl(one));
    let dependencies: Vec<Value> = seen
        .iter()
        .map(|id| {
            let others: BTreeSet<String> = links.get(id).into_iter().flatten().map(|other| reference(other)).collect();
            json!({ "ref": reference(id), "dependsOn": others })
        })
        .collect();
    let mut application = component(packages[top], checksums);
    application["type"] = json!("application");
    let content = json!([application, components, dependencies]).to_string();
    Ok(json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": serial_number(&content),
        "version": 1,
        "metadata": { "component": application },
        "components": components,
        "dependencies": dependencies,
    }))
}

/// Ordinary dependencies of a node: what is linked, and neither tests nor build scripts.
fn links(node: &Value) -> Vec<&str> {
    let is_linked = |one: &&Value| list(&one["dep_kinds"]).iter().any(|kind| kind["kind"].is_null());
    list(&node["deps"]).iter().filter(is_linked).filter_map(|one| one["pkg"].as_str()).collect()
}

fn purl(package: &Value) -> String {
    format!("pkg:cargo/{}@{}", text_of(package, "name"), text_of(package, "version"))
}

fn text_of<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

fn component(package: &Value, checksums: &BTreeMap<(String, String), String>) -> Value {
    let (name, version) = (text_of(package, "name"), text_of(package, "version"));
    let mut component = json!({
        "type": "library",
        "bom-ref": purl(package),
        "name": name,
        "version": version,
        "purl": purl(package),
        // An older notation separates alternatives by a slash.
        "licenses": [{ "expression": text_of(package, "license").replace('/', " OR ") }],
    });
    if let Some(checksum) = checksums.get(&(name.to_owned(), version.to_owned())) {
        component["hashes"] = json!([{ "alg": "SHA-256", "content": checksum }]);
    }
    component
}

/// A UUID made of the content's digest (version 8: of the maker's own making).
fn serial_number(content: &str) -> String {
    let digits = Digest::of(content.as_bytes()).hex();
    format!(
        "urn:uuid:{}-{}-8{}-8{}-{}",
        &digits[..8],
        &digits[8..12],
        &digits[13..16],
        &digits[17..20],
        &digits[20..32]
    )
}

/// Judges the bill in `path` of the workspace's crate `package`. Gives how many components it names, and every fault.
fn check(root: &Path, package: &str, path: &Path) -> Result<(usize, Vec<String>), SupplyError> {
    let text = supply::read(path)?;
    let bill: Value = serde_json::from_str(&text).map_err(|error| SupplyError::malformed(&path.display(), &error))?;
    let cargo = cargo();
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
        let is_licensed = |one: &Value| one["expression"].as_str().is_some_and(|text| !text.is_empty());
        if !list(&component["licenses"]).iter().any(is_licensed) {
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
    #![expect(clippy::unwrap_used, reason = "tests")]
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
    fn what_is_linked_is_named_with_its_checksum_and_tests_are_not() {
        let package = |name: &str| json!({ "id": name, "name": name, "version": "1.0.0", "license": "MIT/Apache-2.0" });
        let dep = |name: &str, kind: Value| json!({ "pkg": name, "dep_kinds": [{ "kind": kind }] });
        let metadata = json!({
            "packages": [package("top"), package("linked"), package("below"), package("tests")],
            "resolve": { "nodes": [
                { "id": "top", "deps": [dep("linked", Value::Null), dep("tests", json!("dev"))] },
                { "id": "linked", "deps": [dep("below", Value::Null)] },
                { "id": "below", "deps": [] },
            ] },
        });
        let lock = "[[package]]\nname = \"below\"\nversion = \"1.0.0\"\nchecksum = \"abc\"\n";
        let bill = compose(&metadata, &checksums(lock).unwrap(), "top").unwrap();
        let names: Vec<_> = list(&bill["components"]).iter().map(|one| text_of(one, "name")).collect();
        assert_eq!(names, ["below", "linked"]);
        assert_eq!(bill["components"][0]["hashes"][0]["content"], "abc");
        assert_eq!(bill["components"][0]["licenses"][0]["expression"], "MIT OR Apache-2.0");
        let linked = ["below", "linked"].map(|name| (name.to_owned(), "1.0.0".to_owned())).into();
        assert_eq!(judge(&bill, "top", &linked), Vec::<String>::new());
        assert_eq!(bill, compose(&metadata, &checksums(lock).unwrap(), "top").unwrap());
        let serial = text_of(&bill, "serialNumber").strip_prefix("urn:uuid:").unwrap().split('-').map(str::len);
        assert_eq!(serial.collect::<Vec<_>>(), [8, 4, 4, 4, 12]);
        assert!(compose(&metadata, &BTreeMap::new(), "absent").is_err());
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
