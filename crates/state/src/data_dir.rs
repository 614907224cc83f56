//! The data directory: private to its owner, and to one process at a time.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::durable::FileError;

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// The operating system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another process holds it.
    #[error("{} is in use by another process; stop it first, or name another directory with --data-dir", .0.display())]
    InUse(PathBuf),
}

/// An opened data directory. The lock is held until it is dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: File,
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
            .open(&lock_path)
            .map_err(FileError::at("cannot open", &lock_path))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| DataDirError::InUse(path.to_owned()))?;
        Ok(Self { path: path.to_owned(), _lock: lock })
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
