//! What the audit log says of a change: about whom it was, and what it was before and after.

use std::fmt::Write;

use libp2p_identity::PeerId;
use peer_proto::deploy::{ImageSource, Request, Specification, User, list_capabilities};
use peer_proto::envelope::Signed;
use peer_proto::grant::Grants;
use peer_proto::id::DeploymentId;
use peer_proto::statement::Statement;

use crate::follow::Followed;
use crate::peers::{InvitationRecord, PeerRecord};

/// Grants in one phrase.
fn grants(grants: &Grants) -> String {
    let Some(deploy) = &grants.deploy else { return "nothing".to_owned() };
    let ends = deploy.expires_at.map(|end| format!(" until {} ms", end.0)).unwrap_or_default();
    let root = if deploy.root { " root" } else { "" };
    let capabilities = match list_capabilities(&deploy.capabilities) {
        none if none.is_empty() => none,
        some => format!(" cap={some}"),
    };
    let writable_root = deploy.writable_root.map(|size| format!(" writable-root={size}")).unwrap_or_default();
    format!("deploy {}{root}{capabilities}{writable_root}{ends}", deploy.bounds().in_words())
}

/// A peer that was added or changed.
pub(crate) fn met(former: Option<&PeerRecord>, record: &PeerRecord) -> String {
    let before = former.map_or_else(|| "nothing".to_owned(), |former| grants(&former.grants));
    let mut text = format!("{} '{}'; allowed: {before} -> {}", record.peer, record.name, grants(&record.grants));
    if let Some(former) = former {
        if former.name != record.name {
            let _ = write!(text, "; was called '{}'", former.name);
        }
        if former.addresses() != record.addresses() {
            let addresses: Vec<_> = record.addresses().iter().map(ToString::to_string).collect();
            let _ = write!(text, "; addresses: {}", addresses.join(" "));
        }
    }
    text
}

/// A peer that was removed, with what went with it.
pub(crate) fn gone(record: &PeerRecord, more: &str) -> String {
    let separator = if more.is_empty() { "" } else { "; " };
    format!("{} '{}'; allowed: {} -> nothing{separator}{more}", record.peer, record.name, grants(&record.grants))
}

/// What a statement about a key has changed.
pub(crate) fn followed(followed: &Followed, statement: &Statement, more: &str) -> String {
    let kind = statement.kind();
    match followed {
        Followed::Already => format!("{kind}: in force already"),
        Followed::Moved { former, record } => {
            format!("{kind}: '{}' {} -> {}; {more}", record.name, former.peer, record.peer)
        }
        Followed::Ended { former } => format!("{kind}: {}", gone(former, more)),
        Followed::Refused { peer } => format!("{kind}: {peer} is refused; it was no peer"),
    }
}

/// An invitation. Its id is public; its secret is in the ticket alone.
pub(crate) fn invitation(record: &InvitationRecord) -> String {
    let name = record.name.as_ref().map(|name| format!(" for '{name}'")).unwrap_or_default();
    format!(
        "invitation {}{name}; allows: {}; ends at {} ms",
        record.ticket,
        grants(&record.grants),
        record.expires_at.0
    )
}

/// A request of a peer: what it is about, and never its environment.
pub(crate) fn request(signed: &Signed) -> String {
    let about = match signed.body() {
        Request::Deploy(deploy) => deployment(&signed.signer(), signed, deploy),
        Request::Push(offer) => format!("image {}", offer.digest()),
        Request::Stop(id) | Request::Start(id) | Request::Restart(id) | Request::Remove(id) => {
            format!("deployment {id}")
        }
    };
    format!("request {}; {about}", signed.request_id())
}

fn deployment(owner: &PeerId, signed: &Signed, deploy: &peer_proto::deploy::DeployRequest) -> String {
    let id = DeploymentId::derive(owner, &signed.request_id());
    let image = match &deploy.image {
        ImageSource::Offered(offer) => offer.digest().to_string(),
        ImageSource::Registry(reference) => reference.to_string(),
    };
    let specification = &deploy.specification;
    let limits = &specification.limits;
    let expose = specification.expose.map(|port| format!(", port {port}")).unwrap_or_default();
    format!(
        "deployment {id} '{}', image {image}, cpu={} memory={} pids={} files={} scratch={}{expose}{}",
        specification.name,
        limits.cpu,
        limits.memory,
        limits.pids,
        limits.files,
        limits.scratch,
        asked(specification)
    )
}

/// What has to be asked for, and is more than every deployment has.
fn asked(specification: &Specification) -> String {
    let mut text = String::new();
    if specification.user == User::Root {
        text.push_str(", as root");
    }
    if !specification.capabilities.is_empty() {
        let _ = write!(text, ", cap={}", list_capabilities(&specification.capabilities));
    }
    for writable in &specification.writable {
        let _ = write!(text, ", writable {writable}");
    }
    if let Some(size) = specification.writable_root {
        let _ = write!(text, ", writable-root={size}");
    }
    if specification.demands.user_namespace {
        text.push_str(", users mapped");
    }
    if let Some(runtime) = &specification.demands.runtime {
        let _ = write!(text, ", runtime {runtime}");
    }
    text
}
