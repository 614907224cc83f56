//! The identity's part of the daemon: made, loaded, sealed and opened here, and nowhere else.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Instant;

use peer_compute::room::database_problem;
use peer_proto::code::{Code, Problem, Threat};
use peer_proto::control::{IdentityState, InitReply, InitRequest, Seal, Sealed, Secret, Unlock, Unseal};
use peer_proto::id::Name;
use peer_proto::unit::Timestamp;
use peer_state::audit::{self, Entry, Outcome};
use peer_state::data_dir::DataDir;
use peer_trust::key_file::{self, Created, KeyFileError, Loaded, LockedIdentity, MachineIdentity};
use peer_trust::seal::{PASSPHRASE_MAX, SealError, SealKey};
use zeroize::Zeroizing;

use super::{Daemon, DaemonError, allowed};
use crate::attempts::Attempts;
use crate::clock;
use crate::node::Node;

/// The file that `passphrase_file` names cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the passphrase cannot be read from {}: {source}", path.display())]
pub struct PassphraseFileError {
    path: PathBuf,
    source: io::Error,
}

/// The place of the node.
#[derive(Debug)]
pub(super) enum Slot {
    /// There is no identity.
    Empty,
    /// There is an identity, and what kept the node from starting with it.
    Failed(Problem),
    /// There is an identity whose passphrase has not been given yet.
    Locked(LockedIdentity),
    /// It runs.
    Running(Arc<Node>),
    /// The program ends.
    Closed,
}

impl Slot {
    /// Why there is no node.
    pub(super) fn problem(&self) -> Problem {
        match self {
            Self::Failed(problem) => problem.clone(),
            Self::Locked(_) => {
                let message = "this machine's identity is sealed; give its passphrase with `peerctl identity unlock`";
                Problem::new(Code::Locked, message)
            }
            Self::Empty => {
                Problem::new(Code::NoIdentity, "this machine has no identity yet; make one with `peerctl init`")
            }
            Self::Closed | Self::Running(_) => Problem::new(Code::ShuttingDown, "the daemon is shutting down"),
        }
    }
}

/// Reads the identity, and opens it if it is sealed and `passphrase_file` has its passphrase.
pub(super) fn load(
    data_dir: &DataDir,
    passphrase_file: Option<&Path>,
) -> Result<(Loaded, Option<SealKey>), DaemonError> {
    match (key_file::load(data_dir.path())?, passphrase_file) {
        (Loaded::Locked(_), Some(file)) => {
            let passphrase =
                read_passphrase(file).map_err(|source| PassphraseFileError { path: file.to_owned(), source })?;
            let (identity, seal) =
                key_file::unlock(data_dir.path(), passphrase.lines().next().unwrap_or_default().as_bytes())?;
            Ok((Loaded::Open(identity), Some(seal)))
        }
        (loaded, _) => Ok((loaded, None)),
    }
}

fn read_passphrase(file: &Path) -> io::Result<Zeroizing<String>> {
    // Room enough from the start, so that no copy is left behind when it grows.
    let mut text = Zeroizing::new(String::with_capacity(2 * PASSPHRASE_MAX));
    File::open(file)?.take(PASSPHRASE_MAX as u64 + 2).read_to_string(&mut text)?;
    Ok(text)
}

fn state_of(identity: &MachineIdentity, sealed: bool) -> IdentityState {
    IdentityState {
        peer_id: identity.key.peer_id().to_string(),
        name: identity.name.clone(),
        sealed,
        locked: false,
        epoch: identity.epoch,
        unconfirmed: Vec::new(),
        ended: Vec::new(),
    }
}

/// Work with the key file, which takes its time, off the async threads.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, KeyFileError> + Send + 'static,
) -> Result<T, Problem> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(|error| key_problem(&error)),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(Slot::Closed.problem()),
    }
}

impl Daemon {
    /// The running node.
    pub async fn node(&self) -> Result<Arc<Node>, Problem> {
        match &*self.node.read().await {
            Slot::Running(node) => Ok(node.clone()),
            slot => Err(slot.problem()),
        }
    }

    /// Makes an identity and starts the node with it. With `force` the former identity's node ends first.
    pub async fn init(self: &Arc<Self>, request: InitRequest) -> Result<InitReply, Problem> {
        let mut slot = self.node.write().await;
        if matches!(*slot, Slot::Closed) {
            return Err(Problem::new(Code::ShuttingDown, "the daemon is shutting down"));
        }
        let name = request.name.unwrap_or_else(host_name);
        let now = clock::now();
        let directory = self.data_dir.path();
        let created = key_file::prepare(directory, name, request.force, now).map_err(|error| key_problem(&error))?;
        let peer = created.identity.key.peer_id();
        // Before the key: an identity without a line in the log is one whose database was lost.
        self.audit_identity(&created, now).await?;
        key_file::store(directory, &created.identity, None).map_err(|error| key_problem(&error))?;
        *self.seal() = None;
        if let Slot::Running(former) = &*slot {
            former.shutdown().await;
        }
        let reply = InitReply {
            peer_id: peer.to_string(),
            name: created.identity.name.clone(),
            recovery_phrase: String::clone(&created.recovery_phrase),
            backup: created.backup.map(|path| path.display().to_string()),
        };
        // The phrase is shown once: a node that does not start must not keep it from being shown.
        *slot = self.started(created.identity).await;
        Ok(reply)
    }

    pub(super) async fn started(self: &Arc<Self>, identity: MachineIdentity) -> Slot {
        match Node::start(self, identity).await {
            Ok(node) => Slot::Running(node),
            Err(error) => {
                tracing::error!(%error, "the node does not start");
                let message = format!("the identity is there, but the node does not start: {error}; start peerd again");
                Slot::Failed(Problem::new(Code::Internal, message))
            }
        }
    }

    /// How the identity stands on disk and in this run.
    pub async fn identity_state(&self) -> Result<IdentityState, Problem> {
        let state = match &*self.node.read().await {
            Slot::Running(node) => state_of(&node.identity, self.seal().is_some()),
            Slot::Locked(LockedIdentity { peer, name }) => IdentityState {
                peer_id: peer.to_string(),
                name: name.clone(),
                sealed: true,
                locked: true,
                epoch: 0,
                unconfirmed: Vec::new(),
                ended: Vec::new(),
            },
            slot => return Err(slot.problem()),
        };
        self.keys_of(state).await
    }

    /// Opens a sealed identity and starts the node with it.
    pub async fn unlock(self: &Arc<Self>, request: Unlock) -> Result<IdentityState, Problem> {
        // Held meanwhile, so that passphrases are tried one at a time.
        let mut slot = self.node.write().await;
        match &*slot {
            Slot::Locked(_) => {}
            Slot::Running(_) => return Err(Problem::new(Code::WrongState, "the identity is not locked")),
            slot => return Err(slot.problem()),
        }
        let (identity, seal) = self.open_seal("identity unlocked", request.passphrase).await?;
        self.note("identity unlocked", identity.key.peer_id().to_string()).await?;
        self.take_up_rotation(&identity).await.map_err(crate::introduction::change_problem)?;
        *self.seal() = Some(seal);
        let state = state_of(&identity, true);
        *slot = self.started(identity).await;
        Ok(state)
    }

    /// Puts a passphrase over the key on disk, or another one.
    pub async fn set_seal(&self, request: Seal) -> Result<Sealed, Problem> {
        let slot = self.node.write().await;
        let Slot::Running(node) = &*slot else { return Err(slot.problem()) };
        let sealed = self.seal().is_some();
        let action = match (sealed, request.current) {
            (false, None) => "identity sealed",
            (false, Some(_)) => return Err(key_problem(&KeyFileError::NotSealed)),
            (true, None) => {
                let message = "the identity is sealed already; to change its passphrase give the present one as well";
                return Err(Problem::new(Code::InvalidArgument, message));
            }
            (true, Some(current)) => {
                self.open_seal("passphrase changed", current).await?;
                "passphrase changed"
            }
        };
        let passphrase = request.passphrase;
        let key = blocking(move || SealKey::of(passphrase.expose().as_bytes()).map_err(KeyFileError::from)).await?;
        self.store_sealed(action, &node.identity, Some(key)).await
    }

    /// Takes the passphrase off the key on disk.
    pub async fn unseal(&self, request: Unseal) -> Result<Sealed, Problem> {
        let slot = self.node.write().await;
        let Slot::Running(node) = &*slot else { return Err(slot.problem()) };
        if self.seal().is_none() {
            return Err(key_problem(&KeyFileError::NotSealed));
        }
        self.open_seal("identity unsealed", request.current).await?;
        self.store_sealed("identity unsealed", &node.identity, None).await
    }

    async fn store_sealed(
        &self,
        action: &str,
        identity: &MachineIdentity,
        seal: Option<SealKey>,
    ) -> Result<Sealed, Problem> {
        self.note(action, identity.key.peer_id().to_string()).await?;
        let (directory, identity) = (self.data_dir.path().to_owned(), identity.clone());
        let state = state_of(&identity, seal.is_some());
        let (seal, backups) = blocking(move || {
            key_file::store(&directory, &identity, seal.as_ref())?;
            Ok((seal, key_file::backups(&directory)?))
        })
        .await?;
        *self.seal() = seal;
        let plain_backups = backups.iter().map(|path| path.display().to_string()).collect();
        Ok(Sealed { state, plain_backups })
    }

    /// Tries a passphrase. A wrong one is audited, and after some of them there is a pause.
    async fn open_seal(&self, action: &str, passphrase: Secret) -> Result<(MachineIdentity, SealKey), Problem> {
        let pause = self.attempts().pause(Instant::now());
        if let Some(pause) = pause {
            let message = format!("too many wrong passphrases; try again in {} s", pause.as_secs().max(1));
            return Err(Problem::new(Code::TooManyRequests, message));
        }
        let directory = self.data_dir.path().to_owned();
        let opened = blocking(move || key_file::unlock(&directory, passphrase.expose().as_bytes())).await;
        match &opened {
            Ok(_) => self.attempts().passed(),
            Err(problem) => {
                if problem.code == Code::WrongPassphrase {
                    self.attempts().failed(Instant::now());
                }
                let entry = Entry {
                    outcome: Outcome::Refused(Threat::G3),
                    ..allowed(clock::now(), action, problem.message.clone())
                };
                let written = self.database.write(move |tx| audit::append(tx, &entry)).await;
                written.map_err(|error| database_problem(&error))?;
            }
        }
        opened
    }

    pub(super) async fn note(&self, action: &str, detail: String) -> Result<(), Problem> {
        let entry = allowed(clock::now(), action, detail);
        self.database.write(move |tx| audit::append(tx, &entry)).await.map_err(|error| database_problem(&error))
    }

    pub(super) fn seal(&self) -> MutexGuard<'_, Option<SealKey>> {
        self.seal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attempts(&self) -> MutexGuard<'_, Attempts> {
        self.attempts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn audit_identity(&self, created: &Created, now: Timestamp) -> Result<(), Problem> {
        let peer = created.identity.key.peer_id();
        let entry = match (&created.backup, created.former) {
            (None, _) => allowed(now, "identity made", peer.to_string()),
            (Some(backup), former) => {
                let former = former.map_or_else(|| "unreadable".to_owned(), |former| former.to_string());
                allowed(now, "identity replaced", format!("{former} -> {peer}, backup {}", backup.display()))
            }
        };
        let written = self.database.write(move |tx| audit::append(tx, &entry)).await;
        written.map_err(|error| database_problem(&error))
    }
}

/// The host's name as far as it can be a name of ours.
fn host_name() -> Name {
    let system = rustix::system::uname();
    let host = system.nodename().to_string_lossy().to_ascii_lowercase();
    let allowed = |c: &char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_' | '.');
    let cut: String = host.chars().filter(allowed).take(63).collect();
    let name = cut.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
    name.parse().unwrap_or_else(|_| "peer".parse().expect("a valid name"))
}

fn key_problem(error: &KeyFileError) -> Problem {
    let code = match error {
        KeyFileError::Exists(_) => Code::IdentityExists,
        KeyFileError::Seal(SealError::WrongPassphrase) => Code::WrongPassphrase,
        KeyFileError::Seal(SealError::Length) => Code::InvalidArgument,
        KeyFileError::NotSealed => Code::WrongState,
        KeyFileError::Absent => Code::NoIdentity,
        KeyFileError::File(_)
        | KeyFileError::Damaged(_)
        | KeyFileError::Exposed { .. }
        | KeyFileError::Seal(SealError::Damaged) => Code::FileFailed,
    };
    Problem::new(code, error.to_string())
}
