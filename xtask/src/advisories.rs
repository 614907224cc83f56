//! Compares the crates that the workspace builds with a local copy of the RustSec advisory database; no network is used.
//!
//! A vulnerability fails the check, unless `deny.toml` ignores it by its id (with a reason there). What is merely
//! informational (no longer maintained, unsound in some use) is told.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use semver::{Version, VersionReq};
use toml::{Table, Value};

use crate::examples::{ExampleError, run};

/// Why the comparison could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AdvisoryError {
    /// Cargo failed.
    #[error(transparent)]
    Run(#[from] ExampleError),
    /// A file or directory could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{} is not understood: {message}", path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
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

/// Compares the workspace at `root` with the database in the directory `database`. Returns how many crates were compared.
pub fn check(root: &Path, database: &Path) -> Result<(usize, Vec<Finding>), AdvisoryError> {
    let ignored = ignored(&root.join("deny.toml"))?;
    let packages = packages(root)?;
    let mut findings = Vec::new();
    for (name, version) in &packages {
        let directory = database.join("crates").join(name);
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(AdvisoryError::Read { path: directory, source }),
        };
        for entry in entries {
            let path = entry.map_err(|source| AdvisoryError::Read { path: directory.clone(), source })?.path();
            let text = read(&path)?;
            let finding = judge(&text, name, version).map_err(|message| AdvisoryError::Malformed { path, message })?;
            findings.extend(finding.filter(|finding| !ignored.contains(&finding.id)));
        }
    }
    findings.sort();
    Ok((packages.len(), findings))
}

fn read(path: &Path) -> Result<String, AdvisoryError> {
    fs::read_to_string(path).map_err(|source| AdvisoryError::Read { path: path.to_path_buf(), source })
}

/// The ids in `deny.toml` which somebody has judged: texts, or tables with a reason.
fn ignored(path: &Path) -> Result<BTreeSet<String>, AdvisoryError> {
    let table: Table = read(path)?.parse().map_err(|error: toml::de::Error| AdvisoryError::Malformed {
        path: path.to_path_buf(),
        message: error.to_string(),
    })?;
    let list = table.get("advisories").and_then(|section| section.get("ignore")).and_then(Value::as_array);
    let id = |entry: &Value| entry.as_str().or_else(|| entry.get("id")?.as_str()).map(str::to_owned);
    Ok(list.into_iter().flatten().filter_map(id).collect())
}

/// Every crate that is built, for whatever use, with its version.
fn packages(root: &Path) -> Result<BTreeSet<(String, Version)>, AdvisoryError> {
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
    fn a_line_of_the_tree_is_read() {
        assert_eq!(package("syn v2.0.1 (proc-macro) (*)"), Some(("syn".to_owned(), Version::new(2, 0, 1))));
        assert_eq!(package("xtask v0.1.0 (/somewhere/xtask)"), None);
        assert_eq!(package(""), None);
    }
}
