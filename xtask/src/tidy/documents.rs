//! Documents that repeat what the code says must say the same.

use std::{fs, io, path::Path, process::Command};

use super::TidyError;
use crate::examples::run;

const CODES: &str = "crates/proto/src/code.rs";
const ERRORS: &str = "docs/errors.md";
const COMMANDS: &str = "docs/cli.md";

/// Checks the documents of the workspace at `root`, those that exist.
pub fn check(root: &Path) -> Result<Vec<String>, TidyError> {
    let mut faults = Vec::new();
    if let (Some(source), Some(document)) = (read(root, CODES)?, read(root, ERRORS)?) {
        faults.extend(undocumented_codes(&source, &document));
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), Into::into);
    let program = target.join("release/peerctl");
    if let (Some(document), true) = (read(root, COMMANDS)?, program.is_file()) {
        let mut command = Command::new(&program);
        // A table drawn as wide as the terminal of whoever runs this would differ.
        command.arg("markdown").env("COLUMNS", "100").env("NO_COLOR", "1");
        if run(&mut command, "peerctl markdown")?.trim_end() != document.trim_end() {
            faults.push(format!(
                "{COMMANDS}: differs from the commands; run: target/release/peerctl markdown > {COMMANDS}"
            ));
        }
    }
    Ok(faults)
}

fn read(root: &Path, name: &str) -> Result<Option<String>, TidyError> {
    let path = root.join(name);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TidyError::Read { path, source }),
    }
}

/// The stable texts of the table in the code (`NUMBER Variant "text" Exit,`) which the document does not name as `text`.
fn undocumented_codes(source: &str, document: &str) -> Vec<String> {
    let codes: Vec<&str> = source.lines().filter_map(code).collect();
    if codes.is_empty() {
        return vec![format!("{CODES}: no code was found in its table")];
    }
    let missing = codes.into_iter().filter(|code| !document.contains(&format!("`{code}`")));
    missing.map(|code| format!("{ERRORS}: the code `{code}` is not documented")).collect()
}

fn code(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace();
    words.next()?.parse::<u32>().ok()?;
    words.next()?;
    words.next()?.strip_prefix('"')?.strip_suffix('"')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_without_a_document_are_named() {
        let source = "codes! {\n    /// Doc.\n    0 One \"one\" Usage,\n    12 Two \"two_words\" Busy,\n}\n";
        assert_eq!(
            undocumented_codes(source, "| `one` | x |\n"),
            ["docs/errors.md: the code `two_words` is not documented"]
        );
        assert_eq!(undocumented_codes(source, "`one` `two_words`"), Vec::<String>::new());
        assert_eq!(undocumented_codes("nothing", "").len(), 1);
    }
}
