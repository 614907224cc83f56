//! What the checks of the supply chain have in common: why one could not be made.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use crate::examples::ExampleError;

/// Why a check could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SupplyError {
    /// Cargo or the compiler failed.
    #[error(transparent)]
    Run(#[from] ExampleError),
    /// A file or directory could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A text is not what it should be.
    #[error("{what} is not understood: {reason}")]
    Malformed {
        /// Which one.
        what: String,
        /// What is wrong.
        reason: String,
    },
}

impl SupplyError {
    /// Names the action and the path of an error of the system.
    pub(crate) fn at<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Self + use<'a> {
        move |source| Self::File { action, path: path.to_owned(), source }
    }

    /// Names the text that is not what it should be.
    pub(crate) fn malformed(what: &dyn fmt::Display, reason: &dyn fmt::Display) -> Self {
        Self::Malformed { what: what.to_string(), reason: reason.to_string() }
    }
}

/// The text in a file.
pub(crate) fn read(path: &Path) -> Result<String, SupplyError> {
    fs::read_to_string(path).map_err(SupplyError::at("read", path))
}
