//! Environment variables of a deployment: `-e NAME=VALUE` and files in Docker's format.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use peer_proto::deploy::Variable;

use super::failure::Failure;

/// Largest environment file (bytes).
const FILE_MAX: u64 = 1 << 20;

/// The variables of all files in their order, then those of the command line. The last value of a name counts.
pub(super) fn collect(files: &[PathBuf], variables: Vec<Variable>) -> Result<Vec<Variable>, Failure> {
    let mut all = Vec::new();
    for path in files {
        let text = read(path)?;
        let parsed = parse(&text).map_err(|(line, why)| {
            Failure::argument(format!("environment file '{}', line {line}: {why}", path.display()))
        })?;
        all.extend(parsed);
    }
    all.extend(variables);
    Ok(last_of_each_name(all))
}

fn read(path: &Path) -> Result<String, Failure> {
    let failed = |error| Failure::file("read the environment file", path, &error);
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(FILE_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > FILE_MAX {
        return Err(Failure::argument(format!("environment file '{}' is larger than 1 MiB", path.display())));
    }
    Ok(text)
}

/// Docker's format: one `NAME=VALUE` a line, values as they stand, blank lines and lines that begin with `#` skipped.
fn parse(text: &str) -> Result<Vec<Variable>, (usize, String)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut variables = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim_start();
        if !line.is_empty() && !line.starts_with('#') {
            variables.push(line.parse().map_err(|why| (index + 1, why))?);
        }
    }
    Ok(variables)
}

fn last_of_each_name(variables: Vec<Variable>) -> Vec<Variable> {
    let mut places = BTreeMap::new();
    let mut kept: Vec<Variable> = Vec::with_capacity(variables.len());
    for variable in variables {
        if let Some(place) = places.get(&variable.name) {
            kept[*place] = variable;
        } else {
            places.insert(variable.name.clone(), kept.len());
            kept.push(variable);
        }
    }
    kept
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use super::*;

    fn variable(text: &str) -> Variable {
        text.parse().unwrap()
    }

    #[test]
    fn files_are_read_as_docker_reads_them() {
        let text = "\u{feff}# comment\n\n  A=1\nB= spaced \r\nC=\"quoted\" # not a comment\nD=\n";
        let expected = ["A=1", "B= spaced ", "C=\"quoted\" # not a comment", "D="].map(variable);
        assert_eq!(parse(text).unwrap(), expected);
    }

    #[test]
    fn bad_lines_are_named() {
        assert_eq!(parse("A=1\nFOO\n").unwrap_err(), (2, "environment 'FOO' has no '='; write NAME=VALUE".to_owned()));
        assert_eq!(parse("1A=1").unwrap_err().0, 1);
    }

    #[test]
    fn the_last_value_of_a_name_counts() {
        let all = ["A=1", "B=2", "A=3"].map(variable).to_vec();
        assert_eq!(last_of_each_name(all), ["A=3", "B=2"].map(variable));
    }
}
