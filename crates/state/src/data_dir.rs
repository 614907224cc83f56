//! The data directory: private to its owner, and to one process at a time.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags, flock};

use crate::durable::FileError;

/// Pause before a lock is tried again.
const RETRY: Duration = Duration::from_millis(20);

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// The operating system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another process holds it.
    #[error("{} is in use by another process; stop it first, or name another directory with --data-dir", .0.display())]
    InUse(PathBuf),
    /// It holds files of somebody else than the user whom it is given to.
    #[error("{0} holds files of another user than {owner}; run `chown -R {owner} {0}`, then start again", .path.display())]
    Owner {
        /// The directory.
        path: PathBuf,
        /// The user who is to have it.
        owner: u32,
    },
}

/// An opened data directory. The lock is held until it is dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    lock: File,
}

impl DataDir {
    /// Creates the directory with mode 0700 if it is absent, and takes its lock.
    pub fn open(path: &Path) -> Result<Self, DataDirError> {
        create_private(path)?;
        let lock_path = path.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(&lock_path)
            .map_err(FileError::at("cannot open", &lock_path))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| DataDirError::InUse(path.to_owned()))?;
        Ok(Self { path: path.to_owned(), lock })
    }

    /// As [`DataDir::open`], waiting so long for another process to let go.
    pub fn open_within(path: &Path, patience: Duration) -> Result<Self, DataDirError> {
        let end = Instant::now() + patience;
        loop {
            match Self::open(path) {
                Err(DataDirError::InUse(_)) if Instant::now() < end => std::thread::sleep(RETRY),
                opened => return opened,
            }
        }
    }

    /// The directory whose lock another process has taken and handed over.
    pub fn with_lock(path: &Path, lock: OwnedFd) -> Self {
        Self { path: path.to_owned(), lock: lock.into() }
    }

    /// Has the directory belong to another user. One that holds anything already must be that user's.
    pub fn give(&self, owner: u32) -> Result<(), DataDirError> {
        let failed = FileError::at("cannot give away", &self.path);
        let flags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).bits().cast_signed();
        let given = || -> std::io::Result<bool> {
            let directory = OpenOptions::new().read(true).custom_flags(flags).open(&self.path)?;
            if directory.metadata()?.uid() == owner {
                return Ok(true);
            }
            if fs::read_dir(&self.path)?.count() > 1 {
                return Ok(false);
            }
            fchown(&directory, Some(owner), None).map(|()| true)
        };
        if given().map_err(failed)? { Ok(()) } else { Err(DataDirError::Owner { path: self.path.clone(), owner }) }
    }

    /// The lock: whoever holds a copy keeps others out.
    pub fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of something inside.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

/// Creates a directory (and its parents) that only its owner may enter, or makes an existing one so.
pub fn create_private(path: &Path) -> Result<(), FileError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o700)))
        .map_err(FileError::at("cannot create", path))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;

    #[test]
    fn directory_is_private_and_exclusive() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("a/b");
        let held = DataDir::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(matches!(DataDir::open(&path), Err(DataDirError::InUse(_))));
        drop(held);
        assert!(DataDir::open(&path).is_ok());
    }
}
