//! What an examination of the machine finds.

use serde::{Deserialize, Serialize};

/// One finding of `GET /v1/doctor`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at, in stable snake_case.
    pub check: String,
    /// Result.
    pub level: Level,
    /// What was found.
    pub message: String,
    /// What to do, if something is to be done.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub advice: Option<String>,
}

/// How a [`Finding`] is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Good to know; nothing is wrong.
    Note,
    /// Works, but less holds than could.
    Warning,
    /// Does not work, or does not hold.
    Failure,
}
