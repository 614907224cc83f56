//! The machine's own identity on the local interface.

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::id::Name;

/// A text that is wiped from memory when it is dropped, and that is never shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Takes the text over.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// `POST /v1/identity`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitRequest {
    /// Name that this machine suggests for itself; the host's name, if absent.
    pub name: Option<Name>,
    /// Replace an identity that exists (its key is kept in a backup).
    #[serde(default)]
    pub force: bool,
}

/// Answer to [`InitRequest`]. The only time that the recovery phrase is ever shown.
#[derive(Clone, Serialize, Deserialize)]
pub struct InitReply {
    /// The new PeerId.
    pub peer_id: String,
    /// Its name.
    pub name: Name,
    /// Twenty-four words that can certify a new key for this machine if it is lost.
    pub recovery_phrase: String,
    /// Where the former key was kept.
    pub backup: Option<String>,
}

impl std::fmt::Debug for InitReply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "InitReply({})", self.peer_id)
    }
}

/// `GET /v1/identity`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whoami {
    /// PeerId.
    pub peer_id: String,
    /// Name.
    pub name: Name,
    /// Addresses at which it listens.
    pub addresses: Vec<String>,
    /// Public half of the recovery key, in hexadecimal.
    pub recovery_key: String,
    /// The signed card to hand to others (`peercard1.…`).
    pub card: String,
}

/// `GET /v1/identity/state`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityState {
    /// PeerId.
    pub peer_id: String,
    /// Name.
    pub name: Name,
    /// Whether a passphrase protects the key on disk.
    pub sealed: bool,
    /// Whether the passphrase has still to be given since the daemon began.
    pub locked: bool,
}

/// `POST /v1/identity/seal`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seal {
    /// The new passphrase.
    pub passphrase: Secret,
    /// The present one, if the identity is sealed already.
    pub current: Option<Secret>,
}

/// `POST /v1/identity/unseal`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unseal {
    /// The present passphrase.
    pub current: Secret,
}

/// Answer to [`Seal`] and [`Unseal`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// How it stands now.
    #[serde(flatten)]
    pub state: IdentityState,
    /// Files beside it that hold former keys in plain text.
    pub plain_backups: Vec<String>,
}

/// `POST /v1/identity/unlock`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unlock {
    /// The passphrase.
    pub passphrase: Secret,
}
