//! The machine's identity on disk: one file, mode 0600, replaced whole or not at all.

use std::path::{Path, PathBuf};

use minicbor::{Decode, Encode};
use peer_proto::frame::{decode_strict, encode};
use peer_proto::id::Name;
use peer_proto::identity::Identity;
use peer_proto::unit::Timestamp;
use peer_state::durable::{self, FileError};
use zeroize::{Zeroize, Zeroizing};

use crate::recovery;

const FILE_NAME: &str = "identity.key";
const FILE_MAX: u64 = 4096;

/// Why the identity cannot be used or made.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The operating system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is one.
    #[error("this machine has an identity already ({0}); --force replaces it and keeps a backup")]
    Exists(libp2p_identity::PeerId),
    /// It cannot be read.
    #[error("the identity in {} is damaged; restore it from a backup, or move it away, start peerd and make a new one with `peerctl init`", .0.display())]
    Damaged(PathBuf),
    /// Others may read it.
    #[error("{} may be read by others (mode {mode:o}); if nobody else has seen it, run: chmod 600 {}", path.display(), path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
}

/// The machine's key with what its card says beside it.
#[derive(Debug, Clone)]
pub struct MachineIdentity {
    /// The signing key.
    pub key: Identity,
    /// The name that the machine suggests for itself.
    pub name: Name,
    /// Public half of the recovery key.
    pub recovery_key: [u8; 32],
}

/// A new identity with what is shown once. It counts from [`store`] on.
#[derive(Debug)]
pub struct Created {
    /// The identity.
    pub identity: MachineIdentity,
    /// The machine that it takes the place of, if that can still be read.
    pub former: Option<libp2p_identity::PeerId>,
    /// The recovery phrase; it is stored nowhere.
    pub recovery_phrase: Zeroizing<String>,
    /// Where the former identity was kept.
    pub backup: Option<PathBuf>,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Stored {
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    seed: [u8; 32],
    #[n(1)]
    name: Name,
    #[n(2)]
    #[cbor(with = "minicbor::bytes")]
    recovery_key: [u8; 32],
}

impl Drop for Stored {
    fn drop(&mut self) {
        self.seed.zeroize();
    }
}

/// Reads the identity; `None` before `init`.
pub fn load(data_dir: &Path) -> Result<Option<MachineIdentity>, KeyFileError> {
    use std::os::unix::fs::PermissionsExt;

    let path = data_dir.join(FILE_NAME);
    let Some(bytes) = durable::read(&path, FILE_MAX)? else { return Ok(None) };
    let bytes = Zeroizing::new(bytes);
    let metadata = std::fs::metadata(&path).map_err(FileError::at("cannot inspect", &path))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Exposed { path, mode });
    }
    let Ok(limit) = usize::try_from(FILE_MAX) else { return Err(KeyFileError::Damaged(path)) };
    let stored: Stored = decode_strict(&bytes, limit).map_err(|_| KeyFileError::Damaged(path))?;
    let key = Identity::from_seed(&stored.seed);
    Ok(Some(MachineIdentity { key, name: stored.name.clone(), recovery_key: stored.recovery_key }))
}

/// Draws a new identity. One that exists is replaced only if `force` says so; a copy of it is written now.
pub fn prepare(data_dir: &Path, name: Name, force: bool, now: Timestamp) -> Result<Created, KeyFileError> {
    let path = data_dir.join(FILE_NAME);
    let (mut backup, mut replaced) = (None, None);
    if let Some(former) = durable::read(&path, FILE_MAX)?.map(Zeroizing::new) {
        if !force {
            return Err(match load(data_dir)? {
                Some(existing) => KeyFileError::Exists(existing.key.peer_id()),
                None => KeyFileError::Damaged(path),
            });
        }
        let copy = data_dir.join(format!("identity-{}.key.backup", now.0));
        durable::write(&copy, &former, 0o600)?;
        backup = Some(copy);
        replaced = load(data_dir).ok().flatten().map(|existing| existing.key.peer_id());
    }
    let recovery_phrase = recovery::generate();
    let recovery_key = recovery::key_of(&recovery_phrase).expect("a phrase just made is valid").public_key();
    let key = Identity::generate();
    let identity = MachineIdentity { key, name, recovery_key };
    Ok(Created { identity, former: replaced, recovery_phrase, backup })
}

/// Makes the identity the one of this machine.
pub fn store(data_dir: &Path, identity: &MachineIdentity) -> Result<(), KeyFileError> {
    let MachineIdentity { key, name, recovery_key } = identity;
    let stored = Stored { seed: *key.seed(), name: name.clone(), recovery_key: *recovery_key };
    durable::write(&data_dir.join(FILE_NAME), &Zeroizing::new(encode(&stored)), 0o600)?;
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn create(dir: &Path, name: Name, force: bool, now: Timestamp) -> Result<Created, KeyFileError> {
        let created = prepare(dir, name, force, now)?;
        store(dir, &created.identity)?;
        Ok(created)
    }

    #[test]
    fn identity_is_kept_and_never_overwritten_silently() {
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path();
        assert!(load(dir).unwrap().is_none());
        let name: Name = "alice".parse().unwrap();
        let created = create(dir, name.clone(), false, Timestamp(1)).unwrap();
        let peer = created.identity.key.peer_id();
        assert_eq!(load(dir).unwrap().unwrap().key.peer_id(), peer);
        assert!(matches!(create(dir, name.clone(), false, Timestamp(2)), Err(KeyFileError::Exists(_))));
        assert_eq!(load(dir).unwrap().unwrap().key.peer_id(), peer);
        let replaced = create(dir, name, true, Timestamp(3)).unwrap();
        assert_ne!(replaced.identity.key.peer_id(), peer);
        assert_eq!(replaced.former, Some(peer));
        let backup = replaced.backup.unwrap();
        std::fs::rename(backup, dir.join(FILE_NAME)).unwrap();
        assert_eq!(load(dir).unwrap().unwrap().key.peer_id(), peer);
    }

    #[test]
    fn exposed_or_damaged_key_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path();
        create(dir, "alice".parse().unwrap(), false, Timestamp(1)).unwrap();
        let path = dir.join(FILE_NAME);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(load(dir), Err(KeyFileError::Exposed { .. })));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, b"garbage").unwrap();
        assert!(matches!(load(dir), Err(KeyFileError::Damaged(_))));
    }
}
