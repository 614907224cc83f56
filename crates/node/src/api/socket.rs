//! The socket of the local interface: where it stands, whose it is, and who may use it.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, Metadata, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Uid, chmodat, chownat, openat, statat, unlinkat};
use rustix::io::Errno;
use std::os::unix::net::UnixListener;

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
///
/// While it works the directory is the daemon's alone, so that its owner cannot put a link where the socket is to be; it is
/// handed over last.
pub(crate) fn bind(path: &Path, owner: u32) -> Result<UnixListener, SocketError> {
    let directory = path.parent().filter(|directory| directory.parent().is_some());
    let no_directory = || SocketError::NoDirectory(path.to_owned());
    let directory = directory.ok_or_else(no_directory)?;
    let name = path.file_name().ok_or_else(no_directory)?;
    let held = Held::take(directory, path, name, owner)?;
    // Handed over again if there is no socket, too: another daemon may be at work there.
    let listener = held.listen(owner);
    held.give(owner)?;
    listener
}

/// The socket's directory, opened once: whatever its path leads to later, this is the one that was looked at.
struct Held<'a> {
    directory: File,
    path: &'a Path,
    name: &'a OsStr,
}

impl<'a> Held<'a> {
    fn take(directory: &Path, path: &'a Path, name: &'a OsStr, owner: u32) -> Result<Self, SocketError> {
        if let Some(parent) = directory.parent() {
            fs::create_dir_all(parent).map_err(system("create", parent))?;
        }
        let made = match DirBuilder::new().mode(0o700).create(directory) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => false,
            Err(error) => return Err(system("create", directory)(error)),
        };
        let shared = || SocketError::SharedDirectory(directory.to_owned());
        let opened = match openat(CWD, directory, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        {
            Ok(opened) => File::from(opened),
            // A link, or no directory.
            Err(Errno::LOOP | Errno::NOTDIR) => return Err(shared()),
            Err(error) => return Err(system("open", directory)(error.into())),
        };
        let metadata = opened.metadata().map_err(system("inspect", directory))?;
        let held = Self { directory: opened, path, name };
        // Made for us, such as by a service manager, and empty: it may be made private.
        if !made && is_open(&metadata, owner) && !(is_own(&metadata, owner) && held.is_empty()?) {
            return Err(shared());
        }
        let own = rustix::process::geteuid().as_raw();
        if metadata.uid() != own {
            fchown(&held.directory, Some(own), None).map_err(system("change the owner of", directory))?;
        }
        let private = held.directory.set_permissions(Permissions::from_mode(0o700));
        private.map_err(system("restrict", directory))?;
        Ok(held)
    }

    fn is_empty(&self) -> Result<bool, SocketError> {
        let failed = |error: Errno| system("read", self.path)(error.into());
        for entry in Dir::read_from(&self.directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_bytes();
            if ![&b"."[..], b"..", self.name.as_bytes()].contains(&name) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn listen(&self, owner: u32) -> Result<UnixListener, SocketError> {
        self.clear()?;
        let listener = UnixListener::bind(self.path).map_err(system("listen on", self.path))?;
        if self.kind()? != Some(FileType::Socket) {
            return Err(SocketError::Occupied(self.path.to_owned()));
        }
        let restricted = chmodat(&self.directory, self.name, Mode::from_raw_mode(0o600), AtFlags::empty());
        restricted.map_err(|error| system("restrict", self.path)(error.into()))?;
        let (uid, flags) = (Some(Uid::from_raw(owner)), AtFlags::SYMLINK_NOFOLLOW);
        let given = chownat(&self.directory, self.name, uid, None, flags);
        given.map_err(|error| system("change the owner of", self.path)(error.into()))?;
        Ok(listener)
    }

    /// What stands at the socket's place in this directory, if anything.
    fn kind(&self) -> Result<Option<FileType>, SocketError> {
        match statat(&self.directory, self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => Ok(Some(FileType::from_raw_mode(found.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(system("inspect", self.path)(error.into())),
        }
    }

    fn clear(&self) -> Result<(), SocketError> {
        match self.kind()? {
            None => return Ok(()),
            Some(FileType::Socket) => {}
            Some(_) => return Err(SocketError::Occupied(self.path.to_owned())),
        }
        match std::os::unix::net::UnixStream::connect(self.path) {
            Ok(_) => Err(SocketError::InUse(self.path.to_owned())),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                let removed = unlinkat(&self.directory, self.name, AtFlags::empty());
                removed.map_err(|error| system("replace", self.path)(error.into()))
            }
            Err(error) => Err(system("replace", self.path)(error)),
        }
    }

    fn give(&self, owner: u32) -> Result<(), SocketError> {
        fchown(&self.directory, Some(owner), None).map_err(system("change the owner of the directory of", self.path))
    }
}

fn is_own(metadata: &Metadata, owner: u32) -> bool {
    metadata.uid() == owner || metadata.uid() == rustix::process::geteuid().as_raw()
}

fn is_open(metadata: &Metadata, owner: u32) -> bool {
    !is_own(metadata, owner) || metadata.mode() & 0o077 != 0
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

    #[tokio::test]
    async fn directory_is_handed_over_last_and_links_are_not_followed() {
        let parent = tempfile::tempdir().unwrap();
        let (real, link) = (parent.path().join("real"), parent.path().join("link"));
        fs::create_dir(&real).unwrap();
        fs::set_permissions(&real, Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert!(matches!(bind(&link.join("peerd.sock"), own()), Err(SocketError::SharedDirectory(_))));
        let target = parent.path().join("target");
        fs::write(&target, b"text").unwrap();
        fs::set_permissions(&target, Permissions::from_mode(0o644)).unwrap();
        let path = real.join("peerd.sock");
        std::os::unix::fs::symlink(&target, &path).unwrap();
        assert!(matches!(bind(&path, own()), Err(SocketError::Occupied(_))));
        assert_eq!(mode(&target), 0o644);
        fs::remove_file(&path).unwrap();
        let owner = if own() == 0 { 65534 } else { own() };
        let uid = |path: &Path| fs::symlink_metadata(path).unwrap().uid();
        // Twice: the second start takes back what the first one gave away.
        for _ in 0..2 {
            let listener = bind(&path, owner).unwrap();
            assert_eq!((uid(&real), uid(&path), mode(&real), mode(&path)), (owner, owner, 0o700, 0o600));
            assert!(matches!(bind(&path, owner), Err(SocketError::InUse(_))));
            assert_eq!((uid(&real), mode(&real)), (owner, 0o700), "whoever is served there keeps it");
            drop(listener);
        }
        // While the socket is made, the directory is ours.
        let held = Held::take(&real, &path, OsStr::new("peerd.sock"), owner).unwrap();
        assert_eq!(uid(&real), own());
        held.give(owner).unwrap();
    }
}
