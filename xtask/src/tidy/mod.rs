//! Checks that neither the compiler nor clippy makes. Each fault is one line: where, and what is wrong.
//!
//! - [`arrows`]: which crate may depend on which, and what must never be linked.
//! - [`source`]: lengths of files and functions, words, names of modules, paths of somebody's machine.
//! - [`documents`]: generated and promised documents agree with the code.
//! - [`threats`]: every threat has an attack and a control, and every test that is named is there.

pub mod arrows;
pub mod documents;
pub mod source;
pub mod threats;

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use crate::examples::{ExampleError, run};

/// Why the checks could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TidyError {
    /// Git or cargo failed.
    #[error(transparent)]
    Run(#[from] ExampleError),
    /// Cargo's description of the workspace was not understood.
    #[error("cargo metadata is not as expected: {0}")]
    Metadata(String),
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Checks the workspace at `root` and returns every fault found.
pub fn check(root: &Path) -> Result<Vec<String>, TidyError> {
    let mut faults = arrows::check(root)?;
    for file in tracked(root)? {
        // What is not text is not judged; a file deleted but still in the index is not there to judge.
        match fs::read_to_string(root.join(&file)) {
            Ok(text) => faults.extend(source::judge(&file, &text)),
            Err(error) if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::NotFound) => {}
            Err(source) => return Err(TidyError::Read { path: root.join(file), source }),
        }
    }
    faults.extend(documents::check(root)?);
    faults.extend(threats::check(root)?);
    faults.sort();
    Ok(faults)
}

/// The files that git knows or would be told of, relative to `root`.
fn tracked(root: &Path) -> Result<Vec<String>, TidyError> {
    let mut git = Command::new("git");
    git.current_dir(root).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    Ok(run(&mut git, "git")?.split('\0').filter(|name| !name.is_empty()).map(str::to_owned).collect())
}
