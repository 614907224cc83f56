//! The provider's store of layers on their way into the engine: `<root>/<peer>/<digest>.partial`, and `.layer` once
//! complete, verified and checked.
//!
//! A partial file is nothing but the first bytes of a layer: after a crash it is hashed again and continued. Peers never
//! see each other's files: who knows only a digest must not learn that the bytes are here. The caller drops what the
//! engine has taken ([`Spool::remove`]) and what was left behind ([`Spool::clean`]).

use std::{
    collections::HashMap,
    fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use peer_proto::{
    PeerId,
    code::{Code, Problem},
    deploy::LAYER_SIZE_MAX,
    id::Digest,
};
use sha2::{Digest as _, Sha256};
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::task::spawn_blocking;

use crate::image::{layer, tar::TarError};

/// Layers on their way, with a quota for each peer.
#[derive(Debug, Clone)]
pub struct Spool {
    root: Arc<PathBuf>,
    quota: u64,
    /// Sizes of the layers being received now.
    active: Arc<Mutex<HashMap<(PeerId, Digest), u64>>>,
    /// Told whenever a receipt ends.
    released: Arc<Notify>,
}

/// Where the receipt of a layer begins.
#[derive(Debug)]
pub enum Receipt {
    /// It is here already, verified.
    Complete(PathBuf),
    /// It must come, from [`Transfer::offset`] on.
    Partial(Transfer),
}

/// A layer being received. Dropping it keeps what has come.
#[derive(Debug)]
pub struct Transfer {
    digest: Digest,
    size: u64,
    offset: u64,
    /// With a blocking thread while that writes; lost if the waiting for it was cancelled.
    receiver: Option<Box<Receiver>>,
}

/// What writes a layer. It carries the claim, so that nobody else opens the file while a write is under way.
#[derive(Debug)]
struct Receiver {
    claim: Claim,
    file: fs::File,
    hasher: Sha256,
}

/// How much may lie in the spool when one more layer is in it (bytes).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Of the peer who sends it.
    pub own: u64,
    /// Of all peers together.
    pub all: u64,
}

impl Room {
    /// As much as the spool itself allows.
    pub const PLENTY: Self = Self { own: u64::MAX, all: u64::MAX };
}

/// What [`Spool::clean`] removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cleaned {
    /// Files.
    pub files: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Why a layer was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// It is larger than any layer may be.
    #[error("layer {digest} has {size} bytes; at most {LAYER_SIZE_MAX} are allowed")]
    TooLarge {
        /// Which layer.
        digest: Digest,
        /// Its size.
        size: u64,
    },
    /// More came than was promised.
    #[error("more than the promised {size} bytes came for layer {digest}")]
    TooLong {
        /// Which layer.
        digest: Digest,
        /// What was promised.
        size: u64,
    },
    /// Less came than was promised; what came is kept.
    #[error("only {offset} of {size} bytes came for layer {digest}; send the rest")]
    Incomplete {
        /// Which layer.
        digest: Digest,
        /// What came.
        offset: u64,
        /// What was promised.
        size: u64,
    },
    /// The peer has too much here that is not in use yet.
    #[error("layer {digest} does not fit into this peer's {quota} bytes for layers on their way")]
    OverQuota {
        /// Which layer.
        digest: Digest,
        /// The quota.
        quota: u64,
    },
    /// The machine's owner lets no more disk be used.
    #[error("layer {digest} does not fit into the disk that this machine lends at present; try again later")]
    Full {
        /// Which layer.
        digest: Digest,
    },
    /// The same layer of the same peer is being received now.
    #[error("layer {digest} is being received already; wait until that transfer ends")]
    Busy {
        /// Which layer.
        digest: Digest,
    },
    /// The bytes are not the layer that was promised. They are deleted.
    #[error("the bytes that came for layer {digest} have the digest {actual}")]
    DigestMismatch {
        /// What was promised.
        digest: Digest,
        /// What came.
        actual: Digest,
    },
    /// The layer holds what no image needs. It is deleted.
    #[error("layer {digest} is refused: {reason}")]
    Hostile {
        /// Which layer.
        digest: Digest,
        /// What it holds.
        reason: String,
    },
    /// The disk is full.
    #[error("the disk is full: layer {digest} cannot be stored")]
    DiskFull {
        /// Which layer.
        digest: Digest,
    },
    /// The file system failed.
    #[error("layers cannot be stored: {0}")]
    File(#[source] io::Error),
}

impl SpoolError {
    /// The stable code.
    pub fn code(&self) -> Code {
        match self {
            Self::TooLarge { .. } | Self::TooLong { .. } => Code::ImageTooLarge,
            Self::Incomplete { .. } => Code::MissingLayer,
            Self::OverQuota { .. } => Code::OverLimit,
            Self::Full { .. } => Code::NoCapacity,
            Self::Busy { .. } => Code::WrongState,
            Self::DigestMismatch { .. } => Code::DigestMismatch,
            Self::Hostile { .. } => Code::InvalidImage,
            Self::DiskFull { .. } => Code::DiskFull,
            Self::File(_) => Code::FileFailed,
        }
    }

    /// Code and sentence.
    pub fn problem(&self) -> Problem {
        Problem::new(self.code(), self.to_string())
    }

    fn from_io(digest: Digest, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { digest },
            _ => Self::File(error),
        }
    }
}

impl Spool {
    /// The spool in this directory, which is made if it is not there. `quota` bounds each peer's files (bytes).
    pub fn open(root: impl Into<PathBuf>, quota: u64) -> Result<Self, SpoolError> {
        let root = root.into();
        fs::create_dir_all(&root).map_err(SpoolError::File)?;
        Ok(Self { root: Arc::new(root), quota, active: Arc::default(), released: Arc::default() })
    }

    /// The complete layer of this peer, if it is here.
    pub fn path(&self, peer: &PeerId, digest: &Digest) -> Option<PathBuf> {
        Some(self.file(peer, digest, "layer")).filter(|path| path.is_file())
    }

    /// Begins or continues to receive a layer of `size` bytes, if there is room for it.
    pub async fn receive(&self, peer: PeerId, digest: Digest, size: u64, room: Room) -> Result<Receipt, SpoolError> {
        if let Some(path) = self.path(&peer, &digest) {
            return Ok(Receipt::Complete(path));
        }
        if size > LAYER_SIZE_MAX {
            return Err(SpoolError::TooLarge { digest, size });
        }
        let claim = self.claim(peer, digest, size, room)?;
        let path = self.file(&peer, &digest, "partial");
        let opened = spawn_blocking(move || {
            let (file, hasher, offset) = open_partial(&path, size)?;
            Ok((Box::new(Receiver { claim, file, hasher }), offset))
        });
        let opened = opened.await.map_err(io::Error::other).and_then(|opened| opened);
        let (receiver, offset) = opened.map_err(|error| SpoolError::from_io(digest, error))?;
        Ok(Receipt::Partial(Transfer { digest, size, offset, receiver: Some(receiver) }))
    }

    /// Completes once a receipt that goes on now, of any layer, has ended.
    pub fn released(&self) -> Notified<'_> {
        self.released.notified()
    }

    /// How much of a layer that is being received has arrived (bytes).
    pub fn arrived(&self, peer: &PeerId, digest: &Digest) -> u64 {
        fs::metadata(self.file(peer, digest, "partial")).map_or(0, |metadata| metadata.len())
    }

    /// Removes a layer of this peer, complete or not. One that is not here, or is being received, is left alone.
    pub fn remove(&self, peer: &PeerId, digest: &Digest) -> Result<(), SpoolError> {
        if self.active().contains_key(&(*peer, *digest)) {
            return Ok(());
        }
        for kind in ["partial", "layer"] {
            remove_file(&self.file(peer, digest, kind)).map_err(SpoolError::File)?;
        }
        Ok(())
    }

    /// Removes every file that nobody wrote to for `age` and that is not being received.
    pub fn clean(&self, age: Duration, now: SystemTime) -> Result<Cleaned, SpoolError> {
        let mut cleaned = Cleaned::default();
        let active: Vec<_> = self.active().keys().map(|(peer, digest)| self.file(peer, digest, "partial")).collect();
        for directory in fs::read_dir(self.root.as_path()).map_err(SpoolError::File)?.flatten() {
            for file in fs::read_dir(directory.path()).into_iter().flatten().flatten() {
                let Ok(metadata) = file.metadata() else { continue };
                let old = metadata.modified().ok().and_then(|time| now.duration_since(time).ok());
                if old.is_none_or(|old| old < age) || active.contains(&file.path()) {
                    continue;
                }
                remove_file(&file.path()).map_err(SpoolError::File)?;
                cleaned.files += 1;
                cleaned.bytes = cleaned.bytes.saturating_add(metadata.len());
            }
        }
        Ok(cleaned)
    }

    fn file(&self, peer: &PeerId, digest: &Digest, kind: &str) -> PathBuf {
        self.root.join(peer.to_string()).join(format!("{}.{kind}", digest.hex()))
    }

    fn active(&self) -> MutexGuard<'_, HashMap<(PeerId, Digest), u64>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What lies here of one peer or of all, with what is still to come of the layers being received (bytes).
    pub fn used(&self, peer: Option<&PeerId>) -> u64 {
        self.held(&self.active(), peer, None)
    }

    fn held(&self, active: &HashMap<(PeerId, Digest), u64>, peer: Option<&PeerId>, except: Option<Digest>) -> u64 {
        let promised = active.iter().filter(|((owner, _), _)| peer.is_none_or(|peer| peer == owner));
        let mut sum = promised.fold(0_u64, |sum, (_, size)| sum.saturating_add(*size));
        for directory in fs::read_dir(self.root.as_path()).into_iter().flatten().flatten() {
            let Some(owner) = directory.file_name().to_str().and_then(|name| name.parse::<PeerId>().ok()) else {
                continue;
            };
            if peer.is_some_and(|peer| *peer != owner) {
                continue;
            }
            for entry in fs::read_dir(directory.path()).into_iter().flatten().flatten() {
                let name = entry.file_name();
                let hex = name.to_str().and_then(|name| name.strip_suffix(".partial"));
                let of = hex.and_then(|hex| format!("sha256:{hex}").parse::<Digest>().ok());
                let counted = of.is_some_and(|of| Some(of) == except || active.contains_key(&(owner, of)));
                let length = entry.metadata().map_or(0, |metadata| metadata.len());
                sum = sum.saturating_add(if counted { 0 } else { length });
            }
        }
        sum
    }

    /// Reserves the layer's whole size within the room that there is.
    fn claim(&self, peer: PeerId, digest: Digest, size: u64, room: Room) -> Result<Claim, SpoolError> {
        let directory = self.root.join(peer.to_string());
        fs::create_dir_all(&directory).map_err(|error| SpoolError::from_io(digest, error))?;
        let mut active = self.active();
        if active.contains_key(&(peer, digest)) {
            return Err(SpoolError::Busy { digest });
        }
        let quota = self.quota.min(room.own);
        if self.held(&active, Some(&peer), Some(digest)).saturating_add(size) > quota {
            return Err(SpoolError::OverQuota { digest, quota });
        }
        if self.held(&active, None, Some(digest)).saturating_add(size) > room.all {
            return Err(SpoolError::Full { digest });
        }
        active.insert((peer, digest), size);
        Ok(Claim { spool: self.clone(), peer, digest })
    }
}

/// The right to receive a layer; given back when dropped.
#[derive(Debug)]
struct Claim {
    spool: Spool,
    peer: PeerId,
    digest: Digest,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.spool.active().remove(&(self.peer, self.digest));
        self.spool.released.notify_waiters();
    }
}

/// Opens a partial file and hashes what it holds. One that is longer than the layer is begun anew.
fn open_partial(path: &Path, size: u64) -> io::Result<(fs::File, Sha256, u64)> {
    let mut file = fs::OpenOptions::new().read(true).append(true).create(true).open(path)?;
    if file.metadata()?.len() > size {
        file.set_len(0)?;
    }
    let (mut hasher, mut offset, mut block) = (Sha256::new(), 0, vec![0; 256 << 10]);
    loop {
        match file.read(&mut block)? {
            0 => return Ok((file, hasher, offset)),
            count => {
                hasher.update(&block[..count]);
                offset += count as u64;
            }
        }
    }
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl Transfer {
    /// How many bytes are here (bytes).
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// How many bytes the layer has in all.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Adds the next bytes.
    pub async fn append(&mut self, bytes: Bytes) -> Result<(), SpoolError> {
        let digest = self.digest;
        let end = self.offset.checked_add(bytes.len() as u64).filter(|end| *end <= self.size);
        let end = end.ok_or(SpoolError::TooLong { digest, size: self.size })?;
        let mut receiver = self.receiver.take().ok_or_else(cancelled)?;
        let write = spawn_blocking(move || {
            receiver.file.write_all(&bytes)?;
            receiver.hasher.update(&bytes);
            Ok(receiver)
        });
        let written = write.await.map_err(io::Error::other).and_then(|written| written);
        self.receiver = Some(written.map_err(|error| SpoolError::from_io(digest, error))?);
        self.offset = end;
        Ok(())
    }

    /// Verifies and checks the layer, and makes it durable. Bytes that are not the layer, or hold what no image needs,
    /// are deleted.
    pub async fn finish(mut self) -> Result<PathBuf, SpoolError> {
        let (digest, size, offset) = (self.digest, self.size, self.offset);
        if offset < size {
            return Err(SpoolError::Incomplete { digest, offset, size });
        }
        let receiver = self.receiver.take().ok_or_else(cancelled)?;
        let store = spawn_blocking(move || receiver.store());
        store.await.map_err(|error| SpoolError::File(io::Error::other(error)))?
    }
}

fn cancelled() -> SpoolError {
    SpoolError::File(io::Error::other("an earlier write of this transfer was cancelled; begin it again"))
}

impl Receiver {
    fn store(self) -> Result<PathBuf, SpoolError> {
        let Claim { spool, peer, digest } = &self.claim;
        let (partial, complete) = (spool.file(peer, digest, "partial"), spool.file(peer, digest, "layer"));
        let actual = Digest(self.hasher.finalize().into());
        let stored = verify_and_store(*digest, actual, &partial, &complete);
        if matches!(stored, Err(SpoolError::DigestMismatch { .. } | SpoolError::Hostile { .. })) {
            remove_file(&partial).map_err(SpoolError::File)?;
        }
        stored.map(|()| complete)
    }
}

fn verify_and_store(digest: Digest, actual: Digest, partial: &Path, complete: &Path) -> Result<(), SpoolError> {
    if actual != digest {
        return Err(SpoolError::DigestMismatch { digest, actual });
    }
    let io = |error| SpoolError::from_io(digest, error);
    let file = fs::File::open(partial).map_err(io)?;
    layer::check(&file).map_err(|error| match error {
        TarError::Refused(reason) => SpoolError::Hostile { digest, reason },
        TarError::Read(error) => io(error),
    })?;
    file.sync_all().map_err(io)?;
    fs::rename(partial, complete).map_err(io)?;
    let directory = complete.parent().map_or_else(|| Err(io::ErrorKind::NotFound.into()), fs::File::open);
    directory.and_then(|directory| directory.sync_all()).map_err(io)
}

#[cfg(test)]
#[path = "spool_tests.rs"]
mod tests;
