//! The socket of the local interface: where it stands, whose it is, and who may use it.

use std::fs::{self, DirBuilder, Metadata, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

/// Why the socket cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another program answers there.
    #[error("{} is in use by another daemon; stop it first, or name another socket with --socket", .0.display())]
    InUse(PathBuf),
    /// Something else stands there.
    #[error("{} is not a socket; remove it, or name another socket with --socket", .0.display())]
    Occupied(PathBuf),
    /// The directory is used by others.
    #[error(
        "{} is open to other users or holds other files; the socket needs a directory of its own (mode 0700): name \
         another with --socket",
        .0.display()
    )]
    SharedDirectory(PathBuf),
    /// The path has no directory.
    #[error("{} is not a path of a file in a directory", .0.display())]
    NoDirectory(PathBuf),
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn system<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> SocketError + use<'a> {
    move |source| SocketError::System { action, path: path.to_owned(), source }
}

/// Whether a user may use the local interface: its owner, the daemon's own user, or root.
pub(super) fn may_connect(uid: u32, owner: u32, own: u32) -> bool {
    uid == owner || uid == own || uid == 0
}

/// Makes the directory (0700) and the socket (0600) for `owner`. A socket that nobody answers any more is replaced.
pub(super) fn bind(path: &Path, owner: u32) -> Result<UnixListener, SocketError> {
    let directory = path.parent().filter(|directory| directory.parent().is_some());
    let directory = directory.ok_or_else(|| SocketError::NoDirectory(path.to_owned()))?;
    prepare(directory, path, owner)?;
    clear(path)?;
    // Nobody else can come this far: the directory is its owner's alone.
    let listener = UnixListener::bind(path).map_err(system("listen on", path))?;
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(system("restrict", path))?;
    give(path, owner)?;
    Ok(listener)
}

fn prepare(directory: &Path, path: &Path, owner: u32) -> Result<(), SocketError> {
    match fs::symlink_metadata(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            if let Some(parent) = directory.parent() {
                fs::create_dir_all(parent).map_err(system("create", parent))?;
            }
            DirBuilder::new().mode(0o700).create(directory).map_err(system("create", directory))?;
        }
        Err(error) => return Err(system("inspect", directory)(error)),
        Ok(metadata) if !is_own(&metadata, owner) || !is_empty_but_for(directory, path)? => {
            if is_open(&metadata, owner) {
                return Err(SocketError::SharedDirectory(directory.to_owned()));
            }
        }
        // Made for us, such as by a service manager, and empty: it may be made private.
        Ok(_) => {}
    }
    fs::set_permissions(directory, Permissions::from_mode(0o700)).map_err(system("restrict", directory))?;
    give(directory, owner)
}

fn is_own(metadata: &Metadata, owner: u32) -> bool {
    metadata.is_dir() && (metadata.uid() == owner || metadata.uid() == rustix::process::geteuid().as_raw())
}

fn is_open(metadata: &Metadata, owner: u32) -> bool {
    !is_own(metadata, owner) || metadata.mode() & 0o077 != 0
}

fn is_empty_but_for(directory: &Path, socket: &Path) -> Result<bool, SocketError> {
    let entries = fs::read_dir(directory).map_err(system("read", directory))?;
    Ok(entries.take(2).all(|entry| entry.is_ok_and(|entry| entry.path() == socket)))
}

fn clear(path: &Path) -> Result<(), SocketError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(system("inspect", path)(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(SocketError::Occupied(path.to_owned())),
        Ok(_) => {}
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(SocketError::InUse(path.to_owned())),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(system("replace", path))
        }
        Err(error) => Err(system("replace", path)(error)),
    }
}

fn give(path: &Path, owner: u32) -> Result<(), SocketError> {
    let metadata = fs::symlink_metadata(path).map_err(system("inspect", path))?;
    if metadata.uid() == owner {
        return Ok(());
    }
    chown(path, Some(owner), None).map_err(system("change the owner of", path))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;

    fn own() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn only_owner_daemon_and_root_may_connect() {
        for (uid, allowed) in [(1000, true), (0, true), (107, true), (1001, false), (65534, false)] {
            assert_eq!(may_connect(uid, 1000, 107), allowed, "{uid}");
        }
    }

    #[tokio::test]
    async fn socket_and_directory_are_private_and_stale_sockets_are_replaced() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("a/run/peerd.sock");
        let listener = bind(&path, own()).unwrap();
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert!(matches!(bind(&path, own()), Err(SocketError::InUse(_))));
        drop(listener);
        drop(bind(&path, own()).unwrap());
    }

    #[tokio::test]
    async fn other_files_and_shared_directories_are_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        let shared = parent.path().join("shared");
        fs::create_dir(&shared).unwrap();
        fs::set_permissions(&shared, Permissions::from_mode(0o755)).unwrap();
        fs::write(shared.join("other"), b"").unwrap();
        assert!(matches!(bind(&shared.join("peerd.sock"), own()), Err(SocketError::SharedDirectory(_))));
        assert_eq!(mode(&shared), 0o755);
        let occupied = parent.path().join("run/peerd.sock");
        fs::create_dir(occupied.parent().unwrap()).unwrap();
        fs::write(&occupied, b"text").unwrap();
        assert!(matches!(bind(&occupied, own()), Err(SocketError::Occupied(_))));
        assert_eq!(fs::read(&occupied).unwrap(), b"text");
        assert!(matches!(bind(Path::new("/peerd.sock"), own()), Err(SocketError::NoDirectory(_))));
    }
}
