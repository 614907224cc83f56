//! The emergency stop, over the local interface.

use serde::{Deserialize, Serialize};

use crate::code::Problem;

/// Answer to `POST /v1/panic`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PanicReport {
    /// Containers that ran and were ended.
    pub stopped: Vec<String>,
    /// Containers that may still run.
    pub still_running: Vec<String>,
    /// Connections to peers and gateways that were cut.
    pub connections_cut: u32,
    /// The archive of evidence, if it could be written.
    pub evidence: Option<String>,
    /// What could not be done, in the order in which it was tried.
    pub problems: Vec<Problem>,
}
