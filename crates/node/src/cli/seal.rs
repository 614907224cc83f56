//! `identity seal` and `identity unlock`.

use clap::Args;
use hyper::Method;
use peer_proto::control::{IdentityState, Seal, Sealed, Unlock, Unseal};
use peer_proto::text::escape;

use super::Session;
use super::failure::Failure;
use super::identity::in_words;
use super::passphrase::{ask, ask_twice};

/// Protect this machine's key by a passphrase, or change or remove the passphrase
///
/// Each time that peerd starts, it then waits for `peerctl identity unlock`: containers go on meanwhile, but nobody is
/// served. Nobody can give a forgotten passphrase back. The recovery phrase of `init` is something else.
///
/// Example: peerctl identity seal
#[derive(Debug, Args)]
pub(super) struct SealArguments {
    /// Take the passphrase off again
    #[arg(long)]
    remove: bool,
    /// Read the new passphrase from this file descriptor instead of the terminal: its first line
    #[arg(long, value_name = "N", conflicts_with = "remove")]
    passphrase_fd: Option<u32>,
    /// The same for the present passphrase, if there is one
    #[arg(long, value_name = "N")]
    current_fd: Option<u32>,
}

/// Give the passphrase, so that the daemon can begin
///
/// Example: peerctl identity unlock
#[derive(Debug, Args)]
pub(super) struct UnlockArguments {
    /// Read the passphrase from this file descriptor instead of the terminal: its first line
    #[arg(long, value_name = "N")]
    passphrase_fd: Option<u32>,
}

/// Runs `identity seal`.
pub(super) async fn seal(session: &Session, arguments: SealArguments) -> Result<(), Failure> {
    let SealArguments { remove, passphrase_fd, current_fd } = arguments;
    let state: IdentityState = session.client.get("/v1/identity/state").await?;
    let asked = state.sealed || current_fd.is_some();
    let current = if asked { Some(ask("present passphrase", current_fd).await?) } else { None };
    let sealed: Sealed = match (remove, current) {
        (true, Some(current)) => session.client.send(Method::POST, "/v1/identity/unseal", &Unseal { current }).await?,
        (true, None) => return Err(Failure::argument("the identity is not sealed; there is no passphrase to remove")),
        (false, current) => {
            let passphrase = ask_twice("new passphrase", passphrase_fd).await?;
            session.client.send(Method::POST, "/v1/identity/seal", &Seal { passphrase, current }).await?
        }
    };
    session.output.result(&sealed, |sealed| in_words(&sealed.state))?;
    if sealed.state.sealed {
        session.output.note(
            "The former file was overwritten where it lay. Backups, snapshots and the spare blocks of a flash disk may \
             still hold the key in plain text: if that matters, rotate the key as well.",
        );
    }
    for backup in &sealed.plain_backups {
        session
            .output
            .note(&format!("A former key lies in plain text in {}: delete it if nobody needs it.", escape(backup)));
    }
    Ok(())
}

/// Runs `identity unlock`.
pub(super) async fn unlock(session: &Session, arguments: UnlockArguments) -> Result<(), Failure> {
    let passphrase = ask("passphrase", arguments.passphrase_fd).await?;
    let state: IdentityState = session.client.send(Method::POST, "/v1/identity/unlock", &Unlock { passphrase }).await?;
    session.output.result(&state, in_words)
}
