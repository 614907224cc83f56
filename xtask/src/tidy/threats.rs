//! The threat model names its tests: each must be there, and each threat needs an attack and a control.
//!
//! A control is the same attack where the protection is off. It shows that the attack would succeed.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use super::TidyError;

const DOCUMENT: &str = "docs/threat-model.md";
/// The head of the table that names attack and control of each id.
const HEADING: &str = "## Attacks and controls";
/// Every id that needs both.
const IDS: [&str; 18] =
    ["G1", "G2", "G3", "G4", "G5", "G6", "V1", "V2", "V3", "V4", "V4n", "V5", "V6", "I1", "I2", "I3", "I4", "I5"];

/// Checks the document of the workspace at `root`, if there is one.
pub fn check(root: &Path) -> Result<Vec<String>, TidyError> {
    let path = root.join(DOCUMENT);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(judge(&text, &Sources::read(root)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(TidyError::Read { path, source }),
    }
}

/// Source files by their path from the root.
#[derive(Debug, Default)]
struct Sources(BTreeMap<PathBuf, String>);

impl Sources {
    fn read(root: &Path) -> Result<Self, TidyError> {
        let mut sources = Self::default();
        for name in super::tracked(root)?.into_iter().filter(|name| is_source(name)) {
            let path = root.join(&name);
            match fs::read_to_string(&path) {
                Ok(text) => drop(sources.0.insert(name.into(), text)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(TidyError::Read { path, source }),
            }
        }
        Ok(sources)
    }

    /// Whether a test of this name stands where the name says: `stories/FILE::TEST` and `CRATE/FILE::TEST` in a directory of
    /// tests, `CRATE::…::TEST` beside the code.
    fn holds(&self, name: &str) -> bool {
        let Some((place, test)) = name.rsplit_once("::") else { return false };
        let function = format!("fn {test}(");
        self.0.iter().any(|(path, text)| is_at(path, place) && text.contains(&function))
    }
}

fn is_source(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension == "rs")
}

fn is_at(path: &Path, place: &str) -> bool {
    if let Some((room, file)) = place.split_once('/') {
        let directory = match room {
            "stories" => PathBuf::from("crates/node/tests/stories"),
            room => PathBuf::from("crates").join(room).join("tests"),
        };
        return path.starts_with(directory) && path.file_stem().is_some_and(|stem| stem == file);
    }
    let room = place.split("::").next().unwrap_or(place);
    path.starts_with(PathBuf::from("crates").join(room).join("src")) || path.starts_with(Path::new(room).join("src"))
}

/// The names of tests in a text: between backticks, with `::`, and with a place before it.
fn tests_in(text: &str) -> impl Iterator<Item = &str> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter(|name| {
        let is_name = |c: char| c.is_ascii_alphanumeric() || "_:/".contains(c);
        name.contains("::") && name.chars().all(is_name) && !name.ends_with("::NAME") && is_test(name)
    })
}

/// A path of the code, such as `profile::body`, has no long last name.
fn is_test(name: &str) -> bool {
    name.rsplit("::").next().is_some_and(|last| last.matches('_').count() >= 2)
}

fn judge(text: &str, sources: &Sources) -> Vec<String> {
    let mut faults: Vec<String> = tests_in(text)
        .filter(|name| !sources.holds(name))
        .map(|name| format!("{DOCUMENT}: there is no test `{name}`"))
        .collect();
    let table = text.split_once(HEADING).map_or("", |(_, rest)| rest.split("\n## ").next().unwrap_or(rest));
    let rows: BTreeMap<&str, Vec<&str>> = table.lines().filter_map(row).collect();
    for id in IDS {
        let columns = rows.get(id).map(Vec::as_slice).unwrap_or_default();
        for (column, what) in [(0, "attack"), (1, "control")] {
            let names: Vec<&str> = columns.get(column).map(|cell| tests_in(cell).collect()).unwrap_or_default();
            if names.is_empty() {
                faults.push(format!("{DOCUMENT}: {id} has no {what} below \"{HEADING}\""));
            }
            let is_control = |name: &&str| name.contains("::control_");
            if what == "control" && !names.is_empty() && !names.iter().any(is_control) {
                faults.push(format!("{DOCUMENT}: no control of {id} is a test of its own (`control_…`)"));
            }
        }
    }
    faults
}

/// `| ID | attacks | controls |`.
fn row(line: &str) -> Option<(&str, Vec<&str>)> {
    let mut cells = line.strip_prefix('|')?.strip_suffix('|')?.split('|').map(str::trim);
    let id = cells.next()?;
    Some((id, cells.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources() -> Sources {
        let story = "fn v1_a_stranger_knocks() {}\nfn control_v1_nobody_guards() {}\n".to_owned();
        Sources(BTreeMap::from([(PathBuf::from("crates/node/tests/stories/trust.rs"), story)]))
    }

    fn document(attack: &str, control: &str) -> String {
        let rows = IDS.map(|id| format!("| {id} | {attack} | {control} |\n")).concat();
        format!("# Threats\n\n{HEADING}\n\n| id | attack | control |\n|---|---|---|\n{rows}\n## Next\n")
    }

    #[test]
    fn each_id_needs_an_attack_and_a_control_that_exist() {
        let (attack, control) = ("`stories/trust::v1_a_stranger_knocks`", "`stories/trust::control_v1_nobody_guards`");
        assert_eq!(judge(&document(attack, control), &sources()), Vec::<String>::new());
        let lacks = judge(&document(attack, "none"), &sources());
        assert_eq!(lacks.len(), IDS.len());
        assert!(lacks[0].contains("has no control"), "{lacks:?}");
        let gone = judge(&document(attack, "`stories/trust::control_v1_that_was_renamed`"), &sources());
        assert!(gone[0].contains("there is no test"), "{gone:?}");
        assert_eq!(judge("# Threats\n", &sources()).len(), 2 * IDS.len());
    }

    #[test]
    fn a_name_says_where_its_test_stands() {
        let path = Path::new("crates/node/tests/stories/trust.rs");
        assert!(is_at(path, "stories/trust") && !is_at(path, "stories/other") && !is_at(path, "node"));
        assert!(is_at(Path::new("crates/net/tests/network/gate.rs"), "net/gate"));
        assert!(is_at(Path::new("crates/trust/src/replay.rs"), "trust::replay"));
        assert!(is_at(Path::new("xtask/src/tidy/arrows.rs"), "xtask::tidy::arrows"));
        let names: Vec<_> = tests_in("`a::b_c_d`, `profile::body`, a::x_y_z, `--flag`, `CRATE::NAME`").collect();
        assert_eq!(names, ["a::b_c_d"]);
    }
}
