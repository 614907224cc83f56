//! The allow list: which providers may connect. A small file, edited by `peergate allow` and `peergate deny`, and
//! followed by the running gateway. A damaged list stops the gateway from starting; it never starts open.

use std::collections::HashMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use peer_net::{Admission, PeerId, Policy, Role};
use peer_proto::id::Name;
use peer_proto::text::escape;
use peer_state::durable::{self, FileError};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// Name of the list in the data directory.
const FILE: &str = "providers.toml";
const FILE_MAX: u64 = 1024 * 1024;
/// Most providers on the list: each may hold two connections, of which the network bears 1024.
const PROVIDERS_MAX: usize = 500;
/// Pause between two looks at the file.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// Why the list cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum ProvidersError {
    /// The file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file is not the list that we wrote.
    #[error("{} is damaged ({reason}); restore it, or remove it to begin with an empty list", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The list is full.
    #[error("the list holds {PROVIDERS_MAX} providers, which is the limit; deny one first")]
    Full,
    /// The provider is not on the list.
    #[error("{0} is not on the list; see 'peergate providers'")]
    Unknown(Reference),
    /// The name was given to several.
    #[error("{0} is the name of more than one provider; name it by its PeerId, see 'peergate providers'")]
    Ambiguous(Name),
}

/// How an operator names a provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// By its PeerId.
    Peer(PeerId),
    /// By the name that the operator gave it.
    Name(Name),
}

impl fmt::Display for Reference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peer(peer) => peer.fmt(formatter),
            Self::Name(name) => name.fmt(formatter),
        }
    }
}

/// Reads a PeerId.
pub fn parse_peer(text: &str) -> Result<PeerId, String> {
    text.parse().map_err(|_| {
        let text = escape(text);
        format!("'{text}' is not a PeerId; it begins with 12D3KooW, and 'peerctl whoami' shows it on the provider")
    })
}

/// Reads a PeerId or a name.
pub fn parse_reference(text: &str) -> Result<Reference, String> {
    let name = |_| text.parse().map(Reference::Name);
    parse_peer(text).map(Reference::Peer).or_else(name).map_err(|_| {
        let text = escape(text);
        format!("'{text}' is neither a PeerId, which begins with 12D3KooW, nor a name; see 'peergate providers'")
    })
}

/// One provider on the list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provider {
    /// Its PeerId.
    #[serde(with = "peer_id_text")]
    pub peer_id: PeerId,
    /// What the operator calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
}

/// The list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Providers {
    /// In the order in which they were allowed.
    #[serde(default, rename = "provider")]
    pub entries: Vec<Provider>,
}

mod peer_id_text {
    use peer_net::PeerId;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(peer: &PeerId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(peer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PeerId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Reads the list; an absent file is an empty list.
pub fn load(data_dir: &Path) -> Result<Providers, ProvidersError> {
    let path = data_dir.join(FILE);
    parse(&path, &durable::read(&path, FILE_MAX)?.unwrap_or_default())
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Providers, ProvidersError> {
    let damaged = |reason: String| ProvidersError::Damaged { path: path.to_owned(), reason };
    let text = std::str::from_utf8(bytes).map_err(|error| damaged(error.to_string()))?;
    let providers: Providers = toml::from_str(text).map_err(|error| damaged(error.to_string()))?;
    if providers.entries.len() > PROVIDERS_MAX {
        return Err(damaged(format!("more than {PROVIDERS_MAX} providers")));
    }
    Ok(providers)
}

/// Puts a provider on the list, or renames it; false if nothing had to change.
pub fn allow(data_dir: &Path, peer: PeerId, name: Option<Name>) -> Result<bool, ProvidersError> {
    edit(data_dir, |providers| {
        let full = providers.entries.len() >= PROVIDERS_MAX;
        match providers.entries.iter_mut().find(|provider| provider.peer_id == peer) {
            Some(known) if name.is_none() || known.name == name => return Ok(false),
            Some(known) => known.name = name,
            None if full => return Err(ProvidersError::Full),
            None => providers.entries.push(Provider { peer_id: peer, name }),
        }
        Ok(true)
    })
}

/// Takes a provider off the list and tells which one that was.
pub fn deny(data_dir: &Path, reference: &Reference) -> Result<PeerId, ProvidersError> {
    let mut denied = None;
    edit(data_dir, |providers| {
        let peer = providers.find(reference)?;
        providers.entries.retain(|provider| provider.peer_id != peer);
        denied = Some(peer);
        Ok(true)
    })?;
    denied.ok_or_else(|| ProvidersError::Unknown(reference.clone()))
}

/// Changes the list under a lock, so that two edits at once are both kept.
fn edit(
    data_dir: &Path,
    change: impl FnOnce(&mut Providers) -> Result<bool, ProvidersError>,
) -> Result<bool, ProvidersError> {
    let _lock = lock(&data_dir.join("providers.lock"))?;
    let mut providers = load(data_dir)?;
    let changed = change(&mut providers)?;
    if changed {
        let text = toml::to_string(&providers).expect("a list of texts has a TOML form");
        durable::write(&data_dir.join(FILE), text.as_bytes(), 0o600)?;
    }
    Ok(changed)
}

fn lock(path: &Path) -> Result<File, FileError> {
    let mut options = OpenOptions::new();
    let file = options.create(true).truncate(false).write(true).mode(0o600).open(path);
    let file = file.map_err(FileError::at("cannot open", path))?;
    file.lock().map_err(FileError::at("cannot lock", path))?;
    Ok(file)
}

impl Providers {
    fn find(&self, reference: &Reference) -> Result<PeerId, ProvidersError> {
        let fits = |provider: &&Provider| match reference {
            Reference::Peer(peer) => provider.peer_id == *peer,
            Reference::Name(name) => provider.name.as_ref() == Some(name),
        };
        let mut found = self.entries.iter().filter(fits);
        match (found.next(), found.next(), reference) {
            (Some(provider), None, _) => Ok(provider.peer_id),
            (Some(_), Some(_), Reference::Name(name)) => Err(ProvidersError::Ambiguous(name.clone())),
            _ => Err(ProvidersError::Unknown(reference.clone())),
        }
    }

    /// The connection gate that admits exactly these.
    pub fn policy(&self) -> Policy {
        let provider = || Admission { role: Role::Provider, addresses: Vec::new() };
        let admitted: HashMap<_, _> = self.entries.iter().map(|entry| (entry.peer_id, provider())).collect();
        Policy { admitted }
    }
}

/// Follows the list's file for ever and sends a new policy with each change. A list that cannot be read leaves the last
/// good one in force and is reported once.
pub async fn follow(data_dir: PathBuf, policy: watch::Sender<Arc<Policy>>) {
    let mut complained = false;
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let directory = data_dir.clone();
        let Ok(outcome) = tokio::task::spawn_blocking(move || load(&directory)).await else { continue };
        match outcome {
            Ok(providers) => {
                complained = false;
                let new = providers.policy();
                policy.send_if_modified(|current| {
                    let changed = **current != new;
                    if changed {
                        *current = Arc::new(new);
                    }
                    changed
                });
            }
            Err(error) if !complained => {
                complained = true;
                tracing::error!(%error, "the allow list cannot be read; the last good one stays in force");
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;
    use peer_proto::identity::Identity;

    #[test]
    fn list_is_edited_durably_and_never_read_as_open() {
        let directory = tempfile::tempdir().unwrap();
        let (one, two) = (Identity::generate().peer_id(), Identity::generate().peer_id());
        assert!(allow(directory.path(), one, Some("bob".parse().unwrap())).unwrap());
        assert!(allow(directory.path(), two, None).unwrap());
        assert!(!allow(directory.path(), one, None).unwrap());
        assert_eq!(load(directory.path()).unwrap().entries.len(), 2);
        assert_eq!(load(directory.path()).unwrap().policy().admitted[&one].role, Role::Provider);
        let bob = parse_reference("bob").unwrap();
        allow(directory.path(), two, Some("bob".parse().unwrap())).unwrap();
        assert!(matches!(deny(directory.path(), &bob), Err(ProvidersError::Ambiguous(_))));
        allow(directory.path(), two, Some("carol".parse().unwrap())).unwrap();
        assert_eq!(deny(directory.path(), &bob).unwrap(), one);
        assert!(matches!(deny(directory.path(), &bob), Err(ProvidersError::Unknown(_))));
        assert!(matches!(deny(directory.path(), &Reference::Peer(one)), Err(ProvidersError::Unknown(_))));
        assert!(!load(directory.path()).unwrap().policy().admitted.contains_key(&one));
        for damage in ["[[provider]]\npeer_id = \"x\"", "provider = 1", "[[provider]", "open = true", "\u{0}"] {
            std::fs::write(directory.path().join(FILE), damage).unwrap();
            assert!(matches!(load(directory.path()), Err(ProvidersError::Damaged { .. })), "{damage}");
            assert!(allow(directory.path(), one, None).is_err());
        }
    }
}
