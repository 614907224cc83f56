//! Compares the crates that the workspace builds with a local copy of the RustSec advisory database; no network is used.
//!
//! A vulnerability fails the check, unless `deny.toml` ignores it by its id (with a reason there). What is merely
//! informational (no longer maintained, unsound in some use) is told. Known-bad versions that the database lacks stand in
//! a list of floors here.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use semver::{Version, VersionReq};
use toml::{Table, Value};

use crate::{
    examples::run,
    supply::{SupplyError, read},
};

/// Versions with published faults that the database does not hold: crate, first sound version, what is wrong below.
const FLOORS: [(&str, Version, &str); 3] = [
    ("yamux", Version::new(0, 13, 10), "CVE-2026-31814 and CVE-2026-32314, a peer's frame ends the process"),
    ("libp2p-gossipsub", Version::new(0, 50, 1), "CVE-2026-33040, a peer's message ends the process"),
    ("libp2p-rendezvous", Version::new(0, 17, 1), "a peer takes memory without bound by registering"),
];

/// What the comparison gave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Crates that were compared.
    pub crates: usize,
    /// Day of the newest advisory in the database (`2026-08-19`): the database is at least as new.
    pub newest: String,
    /// Advisories and floors that concern us.
    pub findings: Vec<Finding>,
}

/// One advisory that concerns a crate which we build.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// The advisory's id.
    pub id: String,
    /// The crate and its version.
    pub package: String,
    /// `None` for a vulnerability; otherwise what kind of information it is.
    pub informational: Option<String>,
}

/// Compares the workspace at `root` with the database in the directory `database`.
pub fn check(root: &Path, database: &Path) -> Result<Comparison, SupplyError> {
    let ignored = ignored(&root.join("deny.toml"))?;
    let packages = packages(root)?;
    let mut findings = Vec::new();
    for (name, version) in &packages {
        let directory = database.join("crates").join(name);
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(SupplyError::at("read", &directory)(source)),
        };
        for entry in entries {
            let path = entry.map_err(SupplyError::at("read", &directory))?.path();
            let text = read(&path)?;
            let finding =
                judge(&text, name, version).map_err(|reason| SupplyError::malformed(&path.display(), &reason))?;
            findings.extend(finding.filter(|finding| !ignored.contains(&finding.id)));
        }
    }
    findings.extend(packages.iter().filter_map(|(name, version)| below_floor(name, version)));
    findings.sort();
    Ok(Comparison { crates: packages.len(), newest: newest(&database.join("crates"))?, findings })
}

/// Compares the workspace at `root` with the floors alone, for where there is no database.
pub fn check_floors(root: &Path) -> Result<Comparison, SupplyError> {
    let packages = packages(root)?;
    let findings = packages.iter().filter_map(|(name, version)| below_floor(name, version)).collect();
    Ok(Comparison { crates: packages.len(), newest: String::new(), findings })
}

fn below_floor(name: &str, version: &Version) -> Option<Finding> {
    let (_, floor, what) = FLOORS.into_iter().find(|(known, floor, _)| *known == name && version < floor)?;
    let id = format!("floor {floor} ({what})");
    Some(Finding { id, package: format!("{name} {version}"), informational: None })
}

/// The day of the newest advisory below this directory.
fn newest(directory: &Path) -> Result<String, SupplyError> {
    let list = |path: &Path| -> Result<Vec<PathBuf>, SupplyError> {
        let failed = SupplyError::at("read", path);
        let entries = fs::read_dir(path).map_err(&failed)?;
        entries.map(|entry| entry.map(|entry| entry.path()).map_err(&failed)).collect()
    };
    let mut newest = String::new();
    for package in list(directory)? {
        for path in list(&package)? {
            let text = read(&path)?;
            let date = text.lines().find_map(|line| line.strip_prefix("date = \"")?.strip_suffix('"'));
            newest = newest.max(date.unwrap_or_default().to_owned());
        }
    }
    Ok(newest)
}

/// The ids in `deny.toml` which somebody has judged: texts, or tables with a reason.
fn ignored(path: &Path) -> Result<BTreeSet<String>, SupplyError> {
    let parsed = read(path)?.parse::<Table>();
    let table = parsed.map_err(|error| SupplyError::malformed(&path.display(), &error))?;
    let list = table.get("advisories").and_then(|section| section.get("ignore")).and_then(Value::as_array);
    let id = |entry: &Value| entry.as_str().or_else(|| entry.get("id")?.as_str()).map(str::to_owned);
    Ok(list.into_iter().flatten().filter_map(id).collect())
}

/// Every crate that is built, for whatever use, with its version.
fn packages(root: &Path) -> Result<BTreeSet<(String, Version)>, SupplyError> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let mut command = Command::new(&cargo);
    command.current_dir(root).args(["tree", "--workspace", "--locked", "--prefix", "none", "--format", "{p}"]);
    command.args(["--edges", "normal,build,dev", "--target", "all"]);
    Ok(run(&mut command, &cargo)?.lines().filter_map(package).collect())
}

/// Reads `name v1.2.3 ...`; our own crates, which name a directory, have no advisories.
fn package(line: &str) -> Option<(String, Version)> {
    let mut words = line.split(' ');
    let (name, version) = (words.next()?, words.next()?.strip_prefix('v')?);
    if line.contains("(/") { None } else { Some((name.to_owned(), Version::parse(version).ok()?)) }
}

fn judge(text: &str, name: &str, version: &Version) -> Result<Option<Finding>, String> {
    let front =
        text.strip_prefix("```toml\n").and_then(|rest| rest.split_once("\n```")).ok_or("it has no TOML at its head")?;
    let table: Table = front.0.parse().map_err(|error: toml::de::Error| error.to_string())?;
    let advisory = table.get("advisory").ok_or("it has no section `advisory`")?;
    let text_of = |field: &str| advisory.get(field).and_then(Value::as_str).map(str::to_owned);
    if text_of("withdrawn").is_some() {
        return Ok(None);
    }
    let versions = table.get("versions");
    for field in ["patched", "unaffected"] {
        for text in versions.and_then(|versions| versions.get(field)).and_then(Value::as_array).into_iter().flatten() {
            let text = text.as_str().ok_or("a version is not a text")?;
            if VersionReq::parse(text).map_err(|error| error.to_string())?.matches(version) {
                return Ok(None);
            }
        }
    }
    let id = text_of("id").ok_or("it has no id")?;
    Ok(Some(Finding { id, package: format!("{name} {version}"), informational: text_of("informational") }))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn advisory(more: &str) -> String {
        format!("```toml\n[advisory]\nid = \"RUSTSEC-0000-0001\"\npackage = \"a\"\n{more}\n```\n\n# Title\n")
    }

    fn found(text: &str, version: &str) -> Option<Finding> {
        judge(text, "a", &Version::parse(version).unwrap()).unwrap()
    }

    #[test]
    fn only_versions_without_the_repair_are_found() {
        let text = advisory("[versions]\npatched = [\"^1.2.3\", \">= 2.0.1\"]\nunaffected = [\"< 1.0.0\"]");
        for (version, affected) in
            [("0.9.0", false), ("1.0.0", true), ("1.2.3", false), ("2.0.0", true), ("2.0.1", false)]
        {
            assert_eq!(found(&text, version).is_some(), affected, "{version}");
        }
    }

    #[test]
    fn information_and_withdrawal_are_told_apart() {
        let text = advisory("informational = \"unmaintained\"\n[versions]\npatched = []");
        assert_eq!(found(&text, "1.0.0").unwrap().informational.unwrap(), "unmaintained");
        assert_eq!(found(&advisory("withdrawn = \"2020-01-01\"\n[versions]\npatched = []"), "1.0.0"), None);
        assert!(judge("# Title\n", "a", &Version::new(1, 0, 0)).is_err());
    }

    #[test]
    fn versions_below_a_floor_are_found_and_others_not() {
        for (name, version, bad) in [
            ("yamux", "0.13.9", true),
            ("yamux", "0.13.10", false),
            ("yamux", "0.14.1", false),
            ("libp2p-gossipsub", "0.50.0", true),
            ("libp2p-gossipsub", "0.50.1", false),
            ("libp2p-rendezvous", "0.17.0", true),
            ("serde", "0.0.1", false),
        ] {
            assert_eq!(below_floor(name, &Version::parse(version).unwrap()).is_some(), bad, "{name} {version}");
        }
    }

    #[test]
    fn the_newest_advisory_gives_the_databases_day() {
        let directory = tempfile::tempdir().unwrap();
        for (name, date) in [("a", "2025-01-31"), ("b", "2026-08-19"), ("c", "2026-08-02")] {
            let package = directory.path().join(name);
            fs::create_dir(&package).unwrap();
            fs::write(package.join("x.md"), advisory(&format!("date = \"{date}\""))).unwrap();
        }
        assert_eq!(newest(directory.path()).unwrap(), "2026-08-19");
    }

    #[test]
    fn a_line_of_the_tree_is_read() {
        assert_eq!(package("syn v2.0.1 (proc-macro) (*)"), Some(("syn".to_owned(), Version::new(2, 0, 1))));
        assert_eq!(package("xtask v0.1.0 (/somewhere/xtask)"), None);
        assert_eq!(package(""), None);
    }
}
