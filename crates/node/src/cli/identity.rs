//! `init` and `whoami`.

use clap::Args;
use hyper::Method;
use peer_proto::control::{InitReply, InitRequest, Whoami};
use peer_proto::id::Name;
use peer_proto::text::escape;

use super::Session;
use super::failure::Failure;
use super::table::fields;

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
        "Write these 24 words down: they are shown only now. They can certify a new key for this machine if it is lost; \
         no command uses them yet.",
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
