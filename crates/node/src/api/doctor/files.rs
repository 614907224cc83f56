//! Whose files are whose, and who may read or write them.

use std::fs::Metadata;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use peer_proto::control::Finding;

use super::{Examined, failure, note, ok};

/// What of a file is judged.
struct File<'a> {
    check: &'static str,
    path: &'a Path,
    /// Users who may own it.
    owners: &'a [u32],
    /// Permission bits that it must not have.
    forbidden: u32,
    /// Mode to give it.
    wanted: u32,
    /// What the forbidden bits let others do.
    harm: &'static str,
}

/// Nothing for group and others.
const PRIVATE: u32 = 0o077;
/// No writing by group and others.
const UNWRITABLE: u32 = 0o022;

/// A file or directory of the daemon's alone.
fn private<'a>(check: &'static str, path: &'a Path, owners: &'a [u32], wanted: u32) -> File<'a> {
    File { check, path, owners, forbidden: PRIVATE, wanted, harm: "others may read" }
}

pub(super) fn check(examined: &Examined) -> Vec<Finding> {
    let (daemon, settings) = (&examined.daemon, &examined.daemon.settings);
    let own = rustix::process::geteuid().as_raw();
    let (mine, local) = ([own], [settings.socket_owner]);
    let mut findings = vec![judge(&private("data_directory", daemon.data_dir.path(), &mine, 0o700))];
    if examined.node.is_ok() {
        findings.push(judge(&private("key_file", &daemon.data_dir.join("identity.key"), &mine, 0o600)));
    }
    findings.push(first_fault(
        ["peer.db", "peer.db-wal", "peer.db-shm"].iter().map(|name| daemon.data_dir.join(name)),
        |path| judge(&private("database", path, &mine, 0o600)),
    ));
    if let Some(directory) = settings.socket.parent() {
        findings.push(first_fault([directory.to_owned(), settings.socket.clone()].into_iter(), |path| {
            let wanted = if path == directory { 0o700 } else { 0o600 };
            let harm = "others may use the local interface through";
            judge(&File { check: "socket", path, owners: &local, forbidden: PRIVATE, wanted, harm })
        }));
    }
    if let Some(path) = &settings.file {
        let (owners, harm) = ([0, own], "others may change");
        findings.push(judge(&File {
            check: "configuration_file",
            path,
            owners: &owners,
            forbidden: UNWRITABLE,
            wanted: 0o644,
            harm,
        }));
    }
    findings.extend(settings.engine_socket.as_deref().map(engine_socket));
    findings
}

/// The first of these files with which something is wrong, or else the first. Those that are not there are passed over.
fn first_fault(paths: impl Iterator<Item = PathBuf>, judge: impl Fn(&Path) -> Finding) -> Finding {
    let mut findings: Vec<_> =
        paths.enumerate().filter(|(n, path)| *n == 0 || path.exists()).map(|(_, path)| judge(&path)).collect();
    let bad = findings.iter().position(|finding| finding.advice.is_some()).unwrap_or(0);
    findings.swap_remove(bad)
}

fn judge(file: &File<'_>) -> Finding {
    match std::fs::metadata(file.path) {
        Ok(metadata) => judge_mode(file, &metadata),
        // Closed by a directory above it; that one's owner and root may enter, and root's rights were given up.
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            ok(file.check, format!("{} is closed to the process that hears from other machines", file.path.display()))
        }
        Err(error) => {
            let message = format!("{} cannot be inspected: {error}", file.path.display());
            failure(file.check, message, "look at the disk, and at the rights of the directories above")
        }
    }
}

fn judge_mode(file: &File<'_>, metadata: &Metadata) -> Finding {
    let (path, mode, owner) = (file.path.display(), metadata.permissions().mode() & 0o777, metadata.uid());
    if !file.owners.contains(&owner) {
        let message = format!("{path} belongs to user {owner}, who may change it as he likes");
        return failure(file.check, message, format!("run: chown {} {path}", file.owners[0]));
    }
    if mode & file.forbidden != 0 {
        let message = format!("{} {path} (mode {mode:o})", file.harm);
        return failure(file.check, message, format!("run: chmod {:o} {path}", file.wanted));
    }
    ok(file.check, format!("{path} is as it should be (mode {mode:o})"))
}

/// Whoever may write to the engine's socket has the whole machine.
fn engine_socket(path: &Path) -> Finding {
    const CHECK: &str = "engine_socket";
    const OTHERS: u32 = 0o007;
    const GROUP: u32 = 0o020;
    let Ok(metadata) = std::fs::metadata(path) else {
        // That the engine does not answer is told elsewhere.
        return note(CHECK, format!("{} is not there", path.display()), "start the container engine");
    };
    let (mode, group) = (metadata.permissions().mode() & 0o777, metadata.gid());
    if mode & OTHERS != 0 {
        let message =
            format!("every user may give orders to the engine, and so is root (mode {mode:o} of {})", path.display());
        return failure(CHECK, message, format!("run: chmod 660 {}", path.display()));
    }
    if mode & GROUP != 0 && group != 0 {
        let message = format!("members of group {group} may give orders to the engine, and so are root");
        return note(CHECK, message, format!("see who they are: getent group {group}"));
    }
    ok(CHECK, format!("only root gives orders to the engine through {}", path.display()))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use std::fs::Permissions;

    use peer_proto::control::Level;

    use super::*;

    fn with_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn exposed_absent_and_foreign_files_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        let own = [rustix::process::geteuid().as_raw()];
        let file = File {
            check: "key_file",
            path: &path,
            owners: &own,
            forbidden: PRIVATE,
            wanted: 0o600,
            harm: "others may read",
        };
        assert_eq!(judge(&file).level, Level::Failure, "it is not there");
        std::fs::write(&path, b"").unwrap();
        with_mode(&path, 0o640);
        let finding = judge(&file);
        assert_eq!(finding.level, Level::Failure);
        assert!(finding.advice.unwrap().starts_with("run: chmod 600"));
        with_mode(&path, 0o600);
        assert_eq!(judge(&file).level, Level::Ok);
        let finding = judge(&File { owners: &[own[0] + 1], ..file });
        assert_eq!(finding.level, Level::Failure);
        assert!(finding.advice.unwrap().starts_with("run: chown"));
    }

    #[test]
    fn one_exposed_file_among_several_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let paths = ["a", "b", "absent"].map(|name| directory.path().join(name));
        for path in &paths[..2] {
            std::fs::write(path, b"").unwrap();
            with_mode(path, 0o600);
        }
        let own = [rustix::process::geteuid().as_raw()];
        let look = |path: &Path| {
            judge(&File {
                check: "database",
                path,
                owners: &own,
                forbidden: PRIVATE,
                wanted: 0o600,
                harm: "others may read",
            })
        };
        assert_eq!(first_fault(paths.iter().cloned(), look).level, Level::Ok);
        with_mode(&paths[1], 0o604);
        assert!(first_fault(paths.iter().cloned(), look).message.contains(paths[1].to_str().unwrap()));
    }

    #[test]
    fn an_engine_socket_for_everybody_is_a_failure() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("docker.sock");
        assert_eq!(engine_socket(&path).level, Level::Note);
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        with_mode(&path, 0o666);
        assert_eq!(engine_socket(&path).level, Level::Failure);
        with_mode(&path, 0o600);
        assert_eq!(engine_socket(&path).level, Level::Ok);
    }
}
