//! What can go wrong with the engine, and what to do then.

use std::borrow::Cow;

use minicbor::{Decode, Encode};
use peer_proto::code::{Code, Problem};

use super::quote;

/// Why the engine did not do something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
pub enum EngineError {
    /// It does not answer: try again later.
    #[error("the container engine does not answer ({reason}); start it or wait until it is back")]
    #[n(0)]
    Unavailable {
        /// What the system said.
        #[n(0)]
        reason: String,
    },
    /// It took too long: look whether it was done after all.
    #[error("the container engine did not finish '{operation}' in time; look at its load")]
    #[n(1)]
    TimedOut {
        /// What it should do.
        #[n(0)]
        operation: Cow<'static, str>,
    },
    /// It cannot isolate well enough: nothing runs on it.
    #[error("the container engine is not safe enough to run others' containers: {reason}")]
    #[n(2)]
    BelowFloor {
        /// What is missing.
        #[n(0)]
        reason: String,
    },
    /// There is no such image.
    #[error("the container engine has no image '{image}'; look at the names with its own list of images")]
    #[n(3)]
    NoSuchImage {
        /// Its name or digest.
        #[n(0)]
        image: String,
    },
    /// There is no such container.
    #[error("the container engine has no container '{container}'")]
    #[n(4)]
    NoSuchContainer {
        /// Its id or name.
        #[n(0)]
        container: String,
    },
    /// A container of that name is there: adopt or remove it.
    #[error("the container engine has a container '{container}' already")]
    #[n(5)]
    AlreadyExists {
        /// Its name.
        #[n(0)]
        container: String,
    },
    /// Something else uses it: try again later.
    #[error("the container engine says that it is in use: {message}")]
    #[n(6)]
    InUse {
        /// The engine's words.
        #[n(0)]
        message: String,
    },
    /// The archive refers to a layer that the engine lacks: send all of them.
    #[error("the container engine lacks a layer of the image: {message}")]
    #[n(7)]
    MissingLayer {
        /// The engine's words.
        #[n(0)]
        message: String,
    },
    /// The archive is not what it claims to be: its sender's fault.
    #[error("the container engine refused the image: {message}")]
    #[n(8)]
    InvalidImage {
        /// The engine's words.
        #[n(0)]
        message: String,
    },
    /// The image is larger than allowed.
    #[error("the image is larger than the {size_max} bytes allowed")]
    #[n(9)]
    ImageTooLarge {
        /// What is allowed.
        #[n(0)]
        size_max: u64,
    },
    /// The disk is full.
    #[error("the container engine's disk is full: {message}")]
    #[n(10)]
    DiskFull {
        /// The engine's words.
        #[n(0)]
        message: String,
    },
    /// It does not accept the request: repeating it is of no use.
    #[error("the container engine refused: {message}")]
    #[n(11)]
    Refused {
        /// The engine's words.
        #[n(0)]
        message: String,
    },
    /// What the engine has made is not what it was told, and has been removed.
    #[error("the engine's container differs from the isolation profile ({differences}); it has been destroyed")]
    #[n(12)]
    Violated {
        /// In which ways.
        #[n(0)]
        differences: String,
    },
    /// Nobody has planned the container since this engine's side has been up: plan it, then try again.
    #[error("the container has not been planned since the daemon started; it is tried again")]
    #[n(13)]
    NotPlanned,
    /// Not the engine, but what was asked of it or what it was to look at.
    #[error("{}", .0.message)]
    #[n(14)]
    Problem(#[n(0)] Problem),
    /// It failed.
    #[error("the container engine failed: {message}")]
    #[n(15)]
    Failed {
        /// The engine's words.
        #[n(0)]
        message: String,
    },
}

impl EngineError {
    /// A failure in the engine's words, made safe to show and cut to a bounded length.
    pub fn failed(message: &str) -> Self {
        Self::Failed { message: quote(message) }
    }

    /// The stable code.
    pub fn code(&self) -> Code {
        match self {
            Self::Unavailable { .. } => Code::EngineUnavailable,
            Self::TimedOut { .. } => Code::Timeout,
            Self::NoSuchImage { .. } => Code::NoSuchImage,
            Self::MissingLayer { .. } => Code::MissingLayer,
            Self::InvalidImage { .. } => Code::InvalidImage,
            Self::ImageTooLarge { .. } => Code::ImageTooLarge,
            Self::DiskFull { .. } => Code::DiskFull,
            Self::Problem(problem) => problem.code,
            Self::Violated { .. } => Code::IsolationViolated,
            Self::BelowFloor { .. }
            | Self::NoSuchContainer { .. }
            | Self::AlreadyExists { .. }
            | Self::InUse { .. }
            | Self::NotPlanned
            | Self::Refused { .. }
            | Self::Failed { .. } => Code::EngineFailed,
        }
    }

    /// Whether the same call may succeed later without anything being changed.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::TimedOut { .. } | Self::InUse { .. } | Self::NotPlanned)
    }

    /// Code and sentence.
    pub fn problem(&self) -> Problem {
        if let Self::Problem(problem) = self {
            return problem.clone();
        }
        Problem::new(self.code(), self.to_string())
    }
}
