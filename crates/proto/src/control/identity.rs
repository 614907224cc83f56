//! The machine's own identity on the local interface.

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::id::Name;
use crate::unit::Timestamp;

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
    /// How often the key has been rotated.
    pub epoch: u64,
    /// Peers who have not confirmed the newest key yet.
    pub unconfirmed: Vec<Name>,
    /// Keys that are refused here for ever, the latest first.
    pub ended: Vec<EndedKey>,
}

/// A key that is refused for ever.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedKey {
    /// PeerId of the key.
    pub peer_id: String,
    /// What its machine was called here.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub name: Option<Name>,
    /// PeerId of the key in its place.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub successor: Option<String>,
    /// `rotation`, `replacement` or `revocation`.
    pub kind: String,
    /// Since when it is refused here.
    pub at: Timestamp,
    /// The statement that ended it (`peerstatement1.…`), which anybody may carry to others.
    pub statement: String,
}

/// `POST /v1/identity/rotate`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rotate {
    /// The recovery phrase, if the present key may be known to others: the recovery key then ends it.
    pub phrase: Option<Secret>,
}

/// Answer to [`Rotate`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotated {
    /// The new PeerId.
    pub peer_id: String,
    /// The one of before.
    pub former: String,
    /// Peers who follow already.
    pub confirmed: Vec<Name>,
    /// Peers who have still to be told; they are tried until they have.
    pub unconfirmed: Vec<Name>,
    /// Gateways that must allow the new PeerId.
    pub gateways: Vec<String>,
    /// The statement, to be carried by hand to those who cannot be reached.
    pub statement: String,
}

/// `POST /v1/identity/revoke`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revoke {
    /// The recovery phrase of the lost machine.
    pub phrase: Secret,
    /// Its name here, or its PeerId; the only peer with this recovery key, if absent.
    pub peer: Option<String>,
}

/// Answer to [`Revoke`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoked {
    /// The key that is refused from now on.
    pub peer_id: String,
    /// What its machine was called here, if it was a peer.
    pub name: Option<Name>,
    /// The statement, to be carried by hand to those who cannot be reached.
    pub statement: String,
}

/// `POST /v1/identity/statements`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApplyStatement {
    /// The statement (`peerstatement1.…`).
    pub statement: String,
}

/// Answer to [`ApplyStatement`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FollowedStatement {
    /// `rotation`, `replacement` or `revocation`.
    pub kind: String,
    /// The keys that it ends.
    pub ended: Vec<String>,
    /// The key in their place.
    pub successor: Option<String>,
    /// Name of the peer here, if anything has changed.
    pub name: Option<Name>,
    /// Whether anything has changed: a statement that was in force already changes nothing.
    pub changed: bool,
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
