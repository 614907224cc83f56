//! Why a command did not do what it was asked for, and with which status `peerctl` then exits.

use std::io;
use std::path::Path;

use peer_proto::code::{Code, ExitStatus, Problem};

/// Exit status after Ctrl-C, as shells have it: 128 and the number of the signal.
pub(super) const INTERRUPTED: u8 = 130;

/// Why a command ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// Something is wrong; people read the sentence, scripts the code.
    #[error(transparent)]
    Problem(#[from] Problem),
    /// The command has printed its result, and the result itself is bad news.
    #[error("the result is not good")]
    Result(ExitStatus),
    /// Whoever read standard output has gone; nobody is left to tell.
    #[error("nobody reads the output any more")]
    OutputClosed,
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

impl Failure {
    /// A failure with its code and sentence.
    pub(super) fn new(code: Code, message: impl Into<String>) -> Self {
        Self::Problem(Problem::new(code, message))
    }

    /// The command line is wrong; the sentence names the field.
    pub(super) fn argument(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    /// `action` on the file at `path` failed.
    pub(super) fn file(action: &str, path: &Path, error: &io::Error) -> Self {
        let code = if error.kind() == io::ErrorKind::StorageFull { Code::DiskFull } else { Code::FileFailed };
        Self::new(code, format!("cannot {action} '{}': {error}", path.display()))
    }

    /// Standard output cannot be written to.
    pub(super) fn output(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::OutputClosed,
            io::ErrorKind::StorageFull => Self::new(Code::DiskFull, "cannot write the output: the disk is full"),
            _ => Self::new(Code::FileFailed, format!("cannot write the output: {error}")),
        }
    }

    /// How the process exits.
    pub(super) fn exit_status(&self) -> u8 {
        match self {
            Self::Problem(problem) => problem.code.exit_status() as u8,
            Self::Result(status) => *status as u8,
            Self::OutputClosed => ExitStatus::Success as u8,
            Self::Interrupted => INTERRUPTED,
        }
    }
}
