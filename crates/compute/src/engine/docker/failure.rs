//! What the engine's answers mean.

use bollard::errors::Error;

use crate::engine::{EngineError, quote};

/// The meaning of a failed call. A 404 and a 409 depend on what was asked for: the caller looks at [`status`] first.
pub(super) fn translate(operation: &'static str, error: Error) -> EngineError {
    match error {
        Error::RequestTimeoutError => EngineError::TimedOut { operation: operation.into() },
        Error::DockerResponseServerError { status_code, message } => from_status(status_code, &message),
        Error::DockerStreamError { error } => from_message(&error),
        Error::SocketNotFoundError(_) | Error::HyperResponseError { .. } | Error::HyperLegacyError { .. } => {
            EngineError::Unavailable { reason: quote(&chain(&error)) }
        }
        Error::IOError { err } => EngineError::Unavailable { reason: quote(&err.to_string()) },
        other => EngineError::failed(&other.to_string()),
    }
}

/// The HTTP status of a refusal.
pub(super) fn status(error: &Error) -> Option<u16> {
    match error {
        Error::DockerResponseServerError { status_code, .. } => Some(*status_code),
        _ => None,
    }
}

/// The meaning of a failure that the engine reports in words only.
pub(super) fn from_message(message: &str) -> EngineError {
    from_status(500, message)
}

fn from_status(status: u16, message: &str) -> EngineError {
    if message.contains("no space left on device") {
        return EngineError::DiskFull { message: quote(message) };
    }
    match status {
        409 => EngineError::InUse { message: quote(message) },
        400..=499 => EngineError::Refused { message: quote(message) },
        _ => EngineError::failed(message),
    }
}

/// An error with its causes: the outermost of the HTTP client's says nothing of use.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_recognised_whatever_the_status() {
        let error = from_message("write /var/lib/docker/tmp/x: no space left on device");
        assert!(matches!(error, EngineError::DiskFull { .. }));
    }

    #[test]
    fn the_engines_words_are_made_safe() {
        let EngineError::Failed { message } = from_message(&format!("a\u{1b}[2J{}", "x".repeat(2000))) else {
            panic!("a failure")
        };
        assert!(message.len() < 600 && !message.contains('\u{1b}'));
    }
}
