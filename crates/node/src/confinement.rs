//! What the network process gives up before it hears from anybody (SECURITY M22).
//!
//! Whoever takes it over finds no capability, no file but its own, no other program to start, and no way to make a local
//! socket, so that the engine's cannot even be dialled. The system calls are in [`system_calls`].

mod system_calls;

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

use crate::settings::Settings;

/// The newest rules of the kernel that are used; an older kernel holds those that it knows.
const NEWEST: ABI = ABI::V6;
/// Files that may be read besides the process's own: the system's resolver and its parts, the time zone, what the kernel tells.
const READABLE: [&str; 21] = [
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/usr/share/zoneinfo",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/NetworkManager",
    "/usr/lib",
    "/usr/lib64",
    "/lib",
    "/lib64",
    "/proc",
    "/sys/fs/cgroup",
    "/sys/devices/system/cpu",
    "/sys/module",
    "/sys/kernel/security",
];
/// Devices that may be used.
const DEVICES: [&str; 3] = ["/dev/null", "/dev/urandom", "/dev/random"];

/// What this process has given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Confinement {
    /// How far the kernel holds the rules on files.
    pub files: Files,
    /// Whether the runner may enter containers' network namespaces, which this process cannot.
    pub enters_namespaces: bool,
}

/// How far the kernel holds the rules on files and signals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Files {
    /// All of them.
    All,
    /// Those that it knows.
    Some,
    /// None: it is older than 5.13, or Landlock is switched off.
    None,
}

/// Why the process could not be confined. It does not serve then.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// A right could not be given up.
    #[error("the network process cannot give up {what}: {source}")]
    Right {
        /// Which one.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The rules on files.
    #[error("the network process cannot be kept to its files: {0}")]
    Files(#[from] RulesetError),
    /// The filter of system calls.
    #[error("the network process's system calls cannot be filtered: {0}")]
    SystemCalls(#[from] seccompiler::Error),
}

fn right<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> ConfineError {
    move |source| ConfineError::Right { what, source: source.into() }
}

/// Confines the calling thread, which must be the only one, for good.
pub(crate) fn confine(settings: &Settings, enters_namespaces: bool) -> Result<Confinement, ConfineError> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(right("being looked into"))?;
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).map_err(right("core dumps"))?;
    drop_capabilities()?;
    set_no_new_privs(true).map_err(right("new privileges"))?;
    let files = keep_to_files(settings)?;
    system_calls::filter()?;
    Ok(Confinement { files, enters_namespaces })
}

fn drop_capabilities() -> Result<(), ConfineError> {
    for number in 0..64 {
        let Some(capability) = CapabilitySet::from_bits(1 << number) else { continue };
        // Who has no capability may not lower the bound either, and needs not: there is nothing to gain.
        if capability_is_in_bounding_set(capability).unwrap_or(false) {
            let _ = remove_capability_from_bounding_set(capability);
        }
    }
    clear_ambient_capability_set().map_err(right("ambient capabilities"))?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, sets).map_err(right("capabilities"))
}

fn keep_to_files(settings: &Settings) -> Result<Files, ConfineError> {
    let all = AccessFs::from_all(NEWEST);
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    let mut ruleset = allow(ruleset, &settings.data_dir, all & !AccessFs::Execute)?;
    let named = [Some(settings.guest_program.clone()), settings.passphrase_file.clone()].into_iter().flatten();
    for path in READABLE.iter().map(PathBuf::from).chain(named) {
        ruleset = allow(ruleset, &path, read)?;
    }
    for path in DEVICES {
        ruleset = allow(ruleset, Path::new(path), AccessFs::ReadFile | AccessFs::WriteFile)?;
    }
    Ok(match ruleset.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Files::All,
        RulesetStatus::PartiallyEnforced => Files::Some,
        RulesetStatus::NotEnforced => Files::None,
    })
}

/// A path that is not there cannot be used, and needs no rule.
fn allow(
    ruleset: RulesetCreated,
    path: &Path,
    access: landlock::BitFlags<AccessFs>,
) -> Result<RulesetCreated, ConfineError> {
    let Ok(opened) = PathFd::new(path) else { return Ok(ruleset) };
    let access = if path.is_dir() { access } else { access & AccessFs::from_file(NEWEST) };
    Ok(ruleset.add_rule(PathBeneath::new(opened, access))?)
}
