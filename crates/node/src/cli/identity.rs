//! `init`, `whoami` and `identity …`.

use clap::{Args, Subcommand};
use hyper::Method;
use peer_proto::control::{EndedKey, IdentityState, InitReply, InitRequest, Whoami};
use peer_proto::id::Name;
use peer_proto::text::escape;

use super::Session;
use super::failure::Failure;
use super::moment::rfc3339;
use super::rotation::{self, RevokeArguments, RotateArguments, StatementCommand};
use super::seal::{self, SealArguments, UnlockArguments};
use super::table::{fields, table};

/// Give this machine its identity, once
///
/// The recovery phrase is shown this one time and kept nowhere: write it down.
///
/// Example: peerctl init --name alice
#[derive(Debug, Args)]
pub(super) struct InitArguments {
    /// Name that this machine suggests to others [default: the host's name]
    #[arg(long)]
    name: Option<Name>,
    /// Replace the identity that exists; its key is kept in a backup, but every friend must be joined anew
    #[arg(long)]
    force: bool,
}

/// Show this machine's identity
///
/// Example: peerctl whoami --card | ssh bob.example peerctl peers add -
#[derive(Debug, Args)]
pub(super) struct WhoamiArguments {
    /// Print only the card, which `peerctl peers add` accepts on the other machine
    #[arg(long)]
    card: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum IdentityCommand {
    Status(StatusArguments),
    Seal(SealArguments),
    Unlock(UnlockArguments),
    Rotate(RotateArguments),
    Revoke(RevokeArguments),
    /// Statements about keys, for those who cannot be reached over the network
    #[command(subcommand)]
    Statement(StatementCommand),
}

/// Show how this machine's key is kept
///
/// Example: peerctl identity status
#[derive(Debug, Args)]
pub(super) struct StatusArguments {}

/// Runs `identity`.
pub(super) async fn run(session: &Session, command: IdentityCommand) -> Result<(), Failure> {
    match command {
        IdentityCommand::Status(StatusArguments {}) => {
            let state: IdentityState = session.client.get("/v1/identity/state").await?;
            session.output.result(&state, in_words)
        }
        IdentityCommand::Seal(arguments) => seal::seal(session, arguments).await,
        IdentityCommand::Unlock(arguments) => seal::unlock(session, arguments).await,
        IdentityCommand::Rotate(arguments) => rotation::rotate(session, arguments).await,
        IdentityCommand::Revoke(arguments) => rotation::revoke(session, arguments).await,
        IdentityCommand::Statement(command) => rotation::statement(session, command).await,
    }
}

/// How an identity stands, for people.
pub(super) fn in_words(state: &IdentityState) -> String {
    let seal = match (state.sealed, state.locked) {
        (false, _) => "none; `peerctl identity seal` protects the key by a passphrase",
        (true, false) => "by a passphrase; open since the daemon began",
        (true, true) => "by a passphrase that has not been given yet: run `peerctl identity unlock`",
    };
    let unconfirmed: Vec<_> = state.unconfirmed.iter().map(Name::as_str).collect();
    let text = fields(&[
        ("name", state.name.to_string()),
        ("peer id", state.peer_id.clone()),
        ("seal", seal.to_owned()),
        ("rotated", if state.epoch == 0 { "never".to_owned() } else { format!("{} times", state.epoch) }),
        ("still to be told", unconfirmed.join(", ")),
    ]);
    if state.ended.is_empty() {
        return text;
    }
    let row = |key: &EndedKey| {
        let name = key.name.as_ref().map(ToString::to_string).unwrap_or_default();
        [key.peer_id.clone(), name, key.kind.clone(), rfc3339(key.at), key.successor.clone().unwrap_or_default()]
    };
    let header = ["REFUSED KEY", "WAS", "BY", "SINCE", "SUCCESSOR"];
    format!("{text}\n{}", table(header, &state.ended.iter().map(row).collect::<Vec<_>>()))
}

/// Runs `init`.
pub(super) async fn init(session: &Session, arguments: InitArguments) -> Result<(), Failure> {
    let request = InitRequest { name: arguments.name, force: arguments.force };
    let reply: InitReply = session.client.send(Method::POST, "/v1/identity", &request).await?;
    session.output.result(&reply, |reply| {
        let pairs = [
            ("name", reply.name.to_string()),
            ("peer id", reply.peer_id.clone()),
            ("backup of the old key", reply.backup.clone().unwrap_or_default()),
        ];
        format!("{}\n{}\n", fields(&pairs), escape(&reply.recovery_phrase))
    })?;
    session.output.note(
        "Write these 24 words down: they are shown only now. If the machine is lost, or its key known to others, they end \
         that key at all of your friends (peerctl identity revoke, identity rotate --compromised).",
    );
    Ok(())
}

/// Runs `whoami`.
pub(super) async fn whoami(session: &Session, arguments: &WhoamiArguments) -> Result<(), Failure> {
    let whoami: Whoami = session.client.get("/v1/identity").await?;
    session.output.result(&whoami, |whoami| {
        if arguments.card {
            return format!("{}\n", escape(&whoami.card));
        }
        fields(&[
            ("name", whoami.name.to_string()),
            ("peer id", whoami.peer_id.clone()),
            ("addresses", whoami.addresses.join(", ")),
            ("recovery key", whoami.recovery_key.clone()),
            ("card", whoami.card.clone()),
        ])
    })
}
