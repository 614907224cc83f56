//! Pausing and resuming what others run on this machine, over the local interface.

use serde::{Deserialize, Serialize};

use crate::code::Problem;
use crate::deploy::State;
use crate::id::{DeploymentId, Name};
use crate::unit::Timestamp;

/// `POST /v1/pause`: keep what others run here from running. Without a peer or a deployment, everything.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PauseRequest {
    /// Name, PeerId or unique prefix of the peer whose deployments are meant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// Deployments of others on this machine: names, ids or unique prefixes.
    #[serde(default)]
    pub deployments: Vec<String>,
    /// Stop the containers instead of freezing them.
    #[serde(default)]
    pub stop: bool,
}

/// `POST /v1/resume`: let it run again. Without a peer or a deployment, what was paused for the whole machine.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResumeRequest {
    /// As in [`PauseRequest`]; the peer's single deployments too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// As in [`PauseRequest`].
    #[serde(default)]
    pub deployments: Vec<String>,
    /// Take back every pause there is.
    #[serde(default)]
    pub all: bool,
}

/// Answer to [`PauseRequest`] and [`ResumeRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseReport {
    /// Every pause in force now.
    pub pauses: Vec<PauseShown>,
    /// The deployments that the request was about, as they are now.
    pub deployments: Vec<Affected>,
}

/// A pause in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseShown {
    /// `machine`, `peer` or `deployment`.
    pub subject: String,
    /// Which peer or deployment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `freeze`, `stop` or `panic`.
    pub means: String,
    /// Since when.
    pub since: Timestamp,
}

/// A deployment of another on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Affected {
    /// Its id.
    pub id: DeploymentId,
    /// Its name.
    pub name: Name,
    /// Whose it is: the name that the peer has here, or its PeerId.
    pub owner: String,
    /// Its state.
    pub state: State,
    /// Why it is paused or failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
}
