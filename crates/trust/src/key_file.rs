//! The machine's identity on disk: one file, mode 0600, replaced whole or not at all. It may be sealed by a passphrase
//! ([`crate::seal`]); nothing else reads or writes it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use libp2p_identity::PeerId;
use minicbor::{Decode, Encode};
use peer_proto::frame::{decode_strict, encode, peer_id};
use peer_proto::id::Name;
use peer_proto::identity::Identity;
use peer_proto::statement::REPLACED_MAX;
use peer_proto::unit::Timestamp;
use peer_state::durable::{self, FileError};
use zeroize::{Zeroize, Zeroizing};

use crate::recovery;
use crate::seal::{self, SealError, SealKey};

/// Former keys that are kept at one time: more rotations wait until somebody has been told.
pub const FORMER_MAX: usize = 4;
/// Keys of before that are remembered.
const HISTORY_MAX: usize = REPLACED_MAX - 1;
const FILE_NAME: &str = "identity.key";
const FILE_MAX: u64 = seal::SEALED_MAX as u64;

/// Why the identity cannot be used or made.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The operating system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is one.
    #[error("this machine has an identity already ({0}); --force replaces it and keeps a backup")]
    Exists(PeerId),
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
    /// The seal does not open, or cannot be made.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// It is not sealed.
    #[error("the identity is not sealed; seal it with: peerctl identity seal")]
    NotSealed,
    /// There is none.
    #[error("this machine has no identity yet; make one with `peerctl init`")]
    Absent,
}

/// What is found on disk.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "read once, at the start")]
pub enum Loaded {
    /// Nothing, before `init`.
    Absent,
    /// An identity that anybody who reads the file can use.
    Open(MachineIdentity),
    /// One that a passphrase opens ([`unlock`]).
    Locked(LockedIdentity),
}

/// Whose identity a sealed file says that it holds; proven only when it is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockedIdentity {
    /// The PeerId.
    pub peer: PeerId,
    /// The name that the machine suggests for itself.
    pub name: Name,
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
    /// How often the key has been rotated.
    pub epoch: u64,
    /// Keys of before, oldest first, as far as they are remembered.
    pub history: Vec<PeerId>,
    /// Former keys that are kept until every peer has been told of their successors.
    pub former: FormerKeys,
}

/// A former key of this machine, with the statement that ends it.
#[derive(Debug, Clone)]
pub struct FormerKey {
    /// The key.
    pub key: Identity,
    /// The statement, encoded.
    pub statement: Vec<u8>,
}

/// Former keys, oldest first; clones share them, so that they are destroyed everywhere at once.
#[derive(Debug, Clone, Default)]
pub struct FormerKeys {
    keys: Arc<Mutex<Vec<FormerKey>>>,
}

impl FormerKeys {
    /// All of them.
    pub fn list(&self) -> Vec<FormerKey> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Destroys them in memory; [`store`] does on disk.
    pub fn clear(&self) {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl MachineIdentity {
    /// This machine under the key `new`. `statement`, which ends the present key, is told with that key.
    #[must_use]
    pub fn succeed(&self, new: Identity, statement: Vec<u8>) -> Self {
        let mut history = self.history.clone();
        history.push(self.key.peer_id());
        history.drain(..history.len().saturating_sub(HISTORY_MAX));
        let mut former = self.former.list();
        former.push(FormerKey { key: self.key.clone(), statement });
        let former = FormerKeys { keys: Arc::new(Mutex::new(former)) };
        let (name, recovery_key, epoch) = (self.name.clone(), self.recovery_key, self.epoch + 1);
        Self { key: new, name, recovery_key, epoch, history, former }
    }
}

/// A new identity with what is shown once. It counts from [`store`] on.
#[derive(Debug)]
pub struct Created {
    /// The identity.
    pub identity: MachineIdentity,
    /// The machine that it takes the place of, if that can still be read.
    pub former: Option<PeerId>,
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
    #[n(3)]
    #[cbor(default, skip_if = "is_zero")]
    epoch: u64,
    #[n(4)]
    #[cbor(default, skip_if = "Vec::is_empty")]
    history: Vec<StoredPeer>,
    #[n(5)]
    #[cbor(default, skip_if = "Vec::is_empty")]
    former: Vec<StoredFormer>,
}

#[derive(Encode, Decode)]
#[cbor(transparent)]
struct StoredPeer(
    #[n(0)]
    #[cbor(with = "peer_id")]
    PeerId,
);

#[derive(Encode, Decode)]
#[cbor(map)]
struct StoredFormer {
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    seed: [u8; 32],
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    statement: Vec<u8>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the encoder calls it so")]
fn is_zero(epoch: &u64) -> bool {
    *epoch == 0
}

impl Drop for StoredFormer {
    fn drop(&mut self) {
        self.seed.zeroize();
    }
}

impl Drop for Stored {
    fn drop(&mut self) {
        self.seed.zeroize();
    }
}

/// Reads the identity.
pub fn load(data_dir: &Path) -> Result<Loaded, KeyFileError> {
    let path = data_dir.join(FILE_NAME);
    let Some(bytes) = read(&path)? else { return Ok(Loaded::Absent) };
    match seal::header(&bytes) {
        Some(header) => {
            let header = header.map_err(|_| KeyFileError::Damaged(path))?;
            Ok(Loaded::Locked(LockedIdentity { peer: header.peer, name: header.name }))
        }
        None => Ok(Loaded::Open(parse(&bytes, &path)?)),
    }
}

/// Opens a sealed identity, and gives the key that seals what is stored next. Whoever wants one that is not sealed gets [`KeyFileError::NotSealed`].
pub fn unlock(data_dir: &Path, passphrase: &[u8]) -> Result<(MachineIdentity, SealKey), KeyFileError> {
    let path = data_dir.join(FILE_NAME);
    let bytes = read(&path)?.ok_or(KeyFileError::Absent)?;
    if seal::header(&bytes).is_none() {
        return Err(KeyFileError::NotSealed);
    }
    let (header, key, content) = match seal::open(&bytes, passphrase) {
        Ok(opened) => opened,
        Err(SealError::Damaged) => return Err(KeyFileError::Damaged(path)),
        Err(error) => return Err(error.into()),
    };
    let identity = parse(&content, &path)?;
    if identity.key.peer_id() != header.peer || identity.name != header.name {
        return Err(KeyFileError::Damaged(path));
    }
    Ok((identity, key))
}

fn read(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, KeyFileError> {
    use std::os::unix::fs::PermissionsExt;

    let Some(bytes) = durable::read(path, FILE_MAX)?.map(Zeroizing::new) else { return Ok(None) };
    let metadata = std::fs::metadata(path).map_err(FileError::at("cannot inspect", path))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Exposed { path: path.to_owned(), mode });
    }
    Ok(Some(bytes))
}

fn parse(bytes: &[u8], path: &Path) -> Result<MachineIdentity, KeyFileError> {
    let stored: Stored = decode_strict(bytes, seal::SEALED_MAX).map_err(|_| KeyFileError::Damaged(path.to_owned()))?;
    let former = stored.former.iter().map(|former| {
        let key = Identity::from_seed(&former.seed);
        FormerKey { key, statement: former.statement.clone() }
    });
    Ok(MachineIdentity {
        key: Identity::from_seed(&stored.seed),
        name: stored.name.clone(),
        recovery_key: stored.recovery_key,
        epoch: stored.epoch,
        history: stored.history.iter().map(|peer| peer.0).collect(),
        former: FormerKeys { keys: Arc::new(Mutex::new(former.collect())) },
    })
}

/// Draws a new identity. One that exists is replaced only if `force` says so; a copy of it is written now.
pub fn prepare(data_dir: &Path, name: Name, force: bool, now: Timestamp) -> Result<Created, KeyFileError> {
    let path = data_dir.join(FILE_NAME);
    let (mut backup, mut replaced) = (None, None);
    if let Some(former) = durable::read(&path, FILE_MAX)?.map(Zeroizing::new) {
        if !force {
            return Err(peer_of(&load(data_dir)?).map_or(KeyFileError::Damaged(path), KeyFileError::Exists));
        }
        let copy = data_dir.join(format!("identity-{}.key.backup", now.0));
        durable::write(&copy, &former, 0o600)?;
        backup = Some(copy);
        replaced = load(data_dir).ok().as_ref().and_then(peer_of);
    }
    let recovery_phrase = recovery::generate();
    let recovery_key = recovery::key_of(&recovery_phrase).expect("a phrase just made is valid").public_key();
    let key = Identity::generate();
    let (epoch, history, former) = (0, Vec::new(), FormerKeys::default());
    let identity = MachineIdentity { key, name, recovery_key, epoch, history, former };
    Ok(Created { identity, former: replaced, recovery_phrase, backup })
}

fn peer_of(loaded: &Loaded) -> Option<PeerId> {
    match loaded {
        Loaded::Absent => None,
        Loaded::Open(identity) => Some(identity.key.peer_id()),
        Loaded::Locked(locked) => Some(locked.peer),
    }
}

/// Makes the identity the one of this machine, under `seal` if there is one. What the file held before is overwritten.
pub fn store(data_dir: &Path, identity: &MachineIdentity, seal: Option<&SealKey>) -> Result<(), KeyFileError> {
    let MachineIdentity { key, name, recovery_key, epoch, history, former } = identity;
    let former = former.list().into_iter();
    let former = former.map(|former| StoredFormer { seed: *former.key.seed(), statement: former.statement });
    let stored = Stored {
        seed: *key.seed(),
        name: name.clone(),
        recovery_key: *recovery_key,
        epoch: *epoch,
        history: history.iter().copied().map(StoredPeer).collect(),
        former: former.collect(),
    };
    let plain = Zeroizing::new(encode(&stored));
    let path = data_dir.join(FILE_NAME);
    match seal {
        Some(seal) => durable::replace_secret(&path, &seal.seal(&plain, key.peer_id(), name.clone()), 0o600)?,
        None => durable::replace_secret(&path, &plain, 0o600)?,
    }
    Ok(())
}

/// Copies of former keys in the directory, which `init --force` made; sealing the present key does nothing for them.
pub fn backups(data_dir: &Path) -> Result<Vec<PathBuf>, KeyFileError> {
    let entries = std::fs::read_dir(data_dir).map_err(FileError::at("cannot list", data_dir))?;
    let is_backup = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("identity-") && name.ends_with(".key.backup")
    };
    let mut found: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(is_backup).collect();
    found.retain(|path| {
        durable::read(path, FILE_MAX).is_ok_and(|bytes| bytes.is_none_or(|bytes| seal::header(&bytes).is_none()))
    });
    found.sort();
    Ok(found)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn create(dir: &Path, name: Name, force: bool, now: Timestamp) -> Result<Created, KeyFileError> {
        let created = prepare(dir, name, force, now)?;
        store(dir, &created.identity, None)?;
        Ok(created)
    }

    #[test]
    fn identity_is_kept_and_never_overwritten_silently() {
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path();
        assert!(matches!(load(dir).unwrap(), Loaded::Absent));
        let name: Name = "alice".parse().unwrap();
        let created = create(dir, name.clone(), false, Timestamp(1)).unwrap();
        let peer = created.identity.key.peer_id();
        assert_eq!(peer_of(&load(dir).unwrap()).unwrap(), peer);
        assert!(matches!(create(dir, name.clone(), false, Timestamp(2)), Err(KeyFileError::Exists(_))));
        assert_eq!(peer_of(&load(dir).unwrap()).unwrap(), peer);
        let replaced = create(dir, name, true, Timestamp(3)).unwrap();
        assert_ne!(replaced.identity.key.peer_id(), peer);
        assert_eq!(replaced.former, Some(peer));
        let backup = replaced.backup.unwrap();
        std::fs::rename(backup, dir.join(FILE_NAME)).unwrap();
        assert_eq!(peer_of(&load(dir).unwrap()).unwrap(), peer);
    }

    #[test]
    fn sealed_identity_is_nowhere_in_plain_and_opens_by_its_passphrase_alone() {
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path();
        let created = create(dir, "alice".parse().unwrap(), false, Timestamp(1)).unwrap();
        let (plain, peer) = (created.identity.key.seed(), created.identity.key.peer_id());
        assert!(matches!(unlock(dir, b"passphrase"), Err(KeyFileError::NotSealed)));
        let seal = SealKey::of(b"passphrase").unwrap();
        store(dir, &created.identity, Some(&seal)).unwrap();
        for entry in std::fs::read_dir(dir).unwrap() {
            let bytes = std::fs::read(entry.unwrap().path()).unwrap();
            assert!(!bytes.windows(32).any(|part| part == &plain[..]));
        }
        let Loaded::Locked(locked) = load(dir).unwrap() else { panic!("it is sealed") };
        assert_eq!((locked.peer, locked.name.as_str()), (peer, "alice"));
        assert!(matches!(unlock(dir, b"passphrases"), Err(KeyFileError::Seal(SealError::WrongPassphrase))));
        let (opened, _) = unlock(dir, b"passphrase").unwrap();
        assert_eq!(opened.key.peer_id(), peer);
        // What init makes of it never loses it.
        assert!(matches!(prepare(dir, "bob".parse().unwrap(), false, Timestamp(2)), Err(KeyFileError::Exists(_))));
        let other = create(dir, "bob".parse().unwrap(), true, Timestamp(3)).unwrap();
        assert_eq!(other.former, Some(peer));
        std::fs::rename(other.backup.unwrap(), dir.join(FILE_NAME)).unwrap();
        assert_eq!(unlock(dir, b"passphrase").unwrap().0.key.peer_id(), peer);
        // And the seal comes off again.
        store(dir, &opened, None).unwrap();
        assert!(matches!(load(dir).unwrap(), Loaded::Open(_)));
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
