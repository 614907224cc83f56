//! Small files that are either the old or the new one, whole, whatever happens in between.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

/// A file that could not be written or read, with its path.
#[derive(Debug, thiserror::Error)]
#[error("{action} {}: {source}", path.display())]
pub struct FileError {
    /// What was tried.
    pub action: &'static str,
    /// On which file.
    pub path: PathBuf,
    /// What the operating system said.
    pub source: io::Error,
}

impl FileError {
    /// Names the action and the path of an error of the operating system.
    pub fn at<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self { action, path: path.to_owned(), source }
    }
}

/// Writes a file so that a crash leaves the former or the new content: temporary file, fsync, rename, fsync of the directory.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .permissions(fs::Permissions::from_mode(mode))
        .tempfile_in(directory)
        .map_err(FileError::at("cannot create a temporary file in", directory))?;
    give_to_owner(file.as_file(), directory).map_err(FileError::at("cannot give away", path))?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(FileError::at("cannot write", path))?;
    file.persist(path).map_err(|error| FileError::at("cannot replace", path)(error.error))?;
    sync_directory(directory)
}

/// What root makes in the directory of another user is that user's, whose program could not read it otherwise.
fn give_to_owner(file: &File, directory: &Path) -> io::Result<()> {
    let (made, owner) = (file.metadata()?, fs::metadata(directory)?);
    if made.uid() == 0 && owner.uid() != 0 { fchown(file, Some(owner.uid()), Some(owner.gid())) } else { Ok(()) }
}

/// As [`write()`], for a secret: what the replaced file held is then overwritten where it lies. A file system that never
/// writes in place, a snapshot, or the spare blocks of a flash disk may keep it all the same.
pub fn replace_secret(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    let former = match OpenOptions::new().write(true).open(path) {
        Ok(file) => Some(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(FileError::at("cannot open", path)(error)),
    };
    write(path, bytes, mode)?;
    let Some(mut former) = former else { return Ok(()) };
    let wiped = former.metadata().and_then(|metadata| {
        io::copy(&mut io::Read::take(io::repeat(0), metadata.len()), &mut former)?;
        former.sync_all()
    });
    wiped.map_err(FileError::at("cannot overwrite the former content of", path))
}

/// Makes the names inside a directory durable.
pub fn sync_directory(directory: &Path) -> Result<(), FileError> {
    File::open(directory).and_then(|file| file.sync_all()).map_err(FileError::at("cannot sync", directory))
}

/// Reads a file of at most `limit` bytes; `None` if it does not exist.
pub fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, FileError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > limit => {
            let source = io::Error::new(io::ErrorKind::FileTooLarge, format!("longer than {limit} bytes"));
            Err(FileError { action: "cannot read", path: path.to_owned(), source })
        }
        Ok(_) => fs::read(path).map(Some).map_err(FileError::at("cannot read", path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FileError::at("cannot read", path)(error)),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;

    #[test]
    fn replaced_secret_is_overwritten_where_it_lay() {
        let directory = tempfile::tempdir().unwrap();
        let (path, link) = (directory.path().join("key"), directory.path().join("link"));
        write(&path, b"secret", 0o600).unwrap();
        fs::hard_link(&path, &link).unwrap();
        replace_secret(&path, b"sealed", 0o600).unwrap();
        assert_eq!(read(&path, 10).unwrap().unwrap(), b"sealed");
        assert_eq!(read(&link, 10).unwrap().unwrap(), [0; 6]);
    }

    #[test]
    fn what_root_writes_into_the_directory_of_another_is_that_users() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(directory.path(), Some(48_126), Some(48_127)).unwrap();
        let path = directory.path().join("list");
        write(&path, b"one", 0o600).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (48_126, 48_127));
    }

    #[test]
    fn file_is_replaced_whole_with_its_mode() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        write(&path, b"one", 0o600).unwrap();
        write(&path, b"two", 0o600).unwrap();
        assert_eq!(read(&path, 10).unwrap().unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(read(&path, 2).is_err());
        assert_eq!(read(&directory.path().join("absent"), 2).unwrap(), None);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
