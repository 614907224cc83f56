//! Refusals: what the asker is told, and which threat the audit log names.

use peer_proto::code::{Code, Problem, Threat};

/// Why a request is not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{problem}")]
pub struct Refusal {
    /// For the asker.
    pub problem: Problem,
    /// For the audit log.
    pub threat: Threat,
    /// The recorded outcome, where the request is a repetition by its own signer.
    pub outcome: Option<String>,
}

impl Refusal {
    /// A refusal without a recorded outcome.
    pub fn new(code: Code, threat: Threat, message: impl Into<String>) -> Self {
        Self { problem: Problem::new(code, message), threat, outcome: None }
    }
}
