//! A service manager of a test's own: systemd as it keeps a user's services. Root's confines them as the system's are.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;

use super::eventually;
use super::machine::{Output, Running};

/// Gives the manager control groups of its own, and what it expects of a machine that was started by systemd; the programs
/// are where the units look for them. None of this is seen outside of its mount namespace.
const MANAGER: &str = r#"
for hierarchy in /sys/fs/cgroup /sys/fs/cgroup/systemd /sys/fs/cgroup/unified; do
    if [ -e $hierarchy/cgroup.procs ]; then
        mkdir $hierarchy/$NAME
        echo $$ > $hierarchy/$NAME/cgroup.procs
    fi
done
exec unshare --mount --propagation slave sh -euc '
    mount --rbind /run /run
    mkdir -p /run/systemd
    mount -t tmpfs -o mode=755 none /run/systemd
    mkdir -p /run/systemd/system /run/systemd/inaccessible
    cd /run/systemd/inaccessible
    mkdir -m 000 dir; touch reg; chmod 000 reg; mkfifo -m 000 fifo; mknod -m 000 chr c 0 0; mknod -m 000 blk b 0 0
    mount -t tmpfs -o mode=755 none /usr/local/bin
    cp "$PROGRAMS"/peerd "$PROGRAMS"/peerctl "$PROGRAMS"/peergate "$PROGRAMS"/peer-guest /usr/local/bin
    exec /lib/systemd/systemd --user
'
"#;

/// The manager. It ends, with everything that it started, when it is dropped.
pub(crate) struct Services {
    base: TempDir,
    name: String,
    manager: Option<Running>,
}

impl Services {
    pub(crate) fn start() -> Self {
        // Not below /tmp, of which each service has one of its own.
        let base = tempfile::Builder::new().prefix("peer-services.").tempdir_in("/run").unwrap();
        let name = base.path().file_name().unwrap().to_str().unwrap().to_owned();
        for directory in [base.path().to_owned(), base.path().join("run"), base.path().join("state")] {
            fs::create_dir_all(&directory).unwrap();
            fs::set_permissions(directory, Permissions::from_mode(0o711)).unwrap();
        }
        let mut services = Self { base, name, manager: None };
        let mut command = Command::new("sh");
        command.args(["-euc", MANAGER]).env("NAME", &services.name);
        command.env("PROGRAMS", Path::new(env!("CARGO_BIN_EXE_peerd")).parent().unwrap());
        services.manager = Some(Running::start(services.at_home(&mut command)));
        eventually("the service manager answers", || {
            let manager = services.manager.as_mut().unwrap();
            assert!(!manager.is_over(), "systemd ended: {}", manager.stderr());
            (services.try_ctl(&["list-units"]).status == 0).then_some(())
        });
        services
    }

    fn at_home<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("XDG_RUNTIME_DIR", self.base.path().join("run")).env("HOME", self.base.path());
        for variable in ["XDG_CONFIG_HOME", "XDG_STATE_HOME"] {
            command.env(variable, self.base.path().join("state"));
        }
        command.env_remove("DBUS_SESSION_BUS_ADDRESS")
    }

    /// The directory that `StateDirectory=` of this name means.
    pub(crate) fn state(&self, name: &str) -> PathBuf {
        self.base.path().join("state").join(name)
    }

    /// The same for `RuntimeDirectory=`.
    pub(crate) fn runtime(&self, name: &str) -> PathBuf {
        self.base.path().join("run").join(name)
    }

    /// Where a file of ours for systemd lies.
    pub(crate) fn packaged(file: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/systemd").join(file)
    }

    /// Installs a unit as it is shipped, and what is to be different in this test.
    pub(crate) fn install(&self, unit: &str, different: &str) {
        let directory = self.state("systemd/user");
        fs::create_dir_all(&directory).unwrap();
        fs::copy(Self::packaged(unit), directory.join(unit)).unwrap();
        let log = self.log_of(unit);
        self.drop_in(unit, "test.conf", &format!("[Service]\nStandardError=append:{}\n{different}", log.display()));
    }

    /// Adds a file to a unit's directory.
    pub(crate) fn drop_in(&self, unit: &str, name: &str, text: &str) {
        let directory = self.state("systemd/user").join(format!("{unit}.d"));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(name), text).unwrap();
        self.ctl(&["daemon-reload"]);
    }

    fn log_of(&self, unit: &str) -> PathBuf {
        self.base.path().join(format!("{unit}.log"))
    }

    /// What a unit has written to its log.
    pub(crate) fn log(&self, unit: &str) -> String {
        fs::read_to_string(self.log_of(unit)).unwrap_or_default()
    }

    pub(crate) fn try_ctl(&self, arguments: &[&str]) -> Output {
        Output::of(self.at_home(Command::new("systemctl").arg("--user").args(arguments)))
    }

    /// Runs `systemctl`, which must succeed.
    #[track_caller]
    pub(crate) fn ctl(&self, arguments: &[&str]) -> String {
        let output = self.try_ctl(arguments);
        let log = arguments.last().map(|unit| self.log(unit)).unwrap_or_default();
        assert_eq!(output.status, 0, "systemctl {arguments:?}: {output:?}\n{log}");
        output.stdout
    }

    /// A property of a unit.
    pub(crate) fn property(&self, unit: &str, name: &str) -> String {
        self.ctl(&["show", "--value", "--property", name, unit]).trim().to_owned()
    }

    /// What the kernel says of a unit's main process.
    pub(crate) fn process_status(&self, unit: &str) -> String {
        fs::read_to_string(format!("/proc/{}/status", self.property(unit, "MainPID"))).unwrap()
    }
}

impl Services {
    /// Ends the manager and all that it started. Their files stay until this is dropped.
    pub(crate) fn end(&mut self) {
        let Some(manager) = self.manager.take() else { return };
        drop(self.try_ctl(&["stop", "peerd.service", "peergate.service"]));
        manager.signal(Signal::TERM);
        drop(manager.end());
        for hierarchy in ["", "systemd", "unified"] {
            remove_groups(&Path::new("/sys/fs/cgroup").join(hierarchy).join(&self.name));
        }
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for unit in ["peerd.service", "peergate.service"] {
                eprintln!("---- log of {unit}\n{}", self.log(unit));
            }
        }
        self.end();
    }
}

/// Removes control groups from the innermost outwards; their files go with them.
fn remove_groups(group: &Path) {
    for inner in fs::read_dir(group).into_iter().flatten().flatten() {
        if inner.path().is_dir() {
            remove_groups(&inner.path());
        }
    }
    drop(fs::remove_dir(group));
}
