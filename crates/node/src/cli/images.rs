//! `push` and `images`.

use clap::Args;
use hyper::Method;
use peer_proto::control::{self, HostedImage, Progress};
use peer_proto::id::Digest;
use peer_proto::text::escape;
use peer_proto::unit::format_bytes;
use serde::Serialize;

use super::client::SILENCE_DEADLINE;
use super::deploy::unexpected;
use super::failure::Failure;
use super::image::{ImageArguments, Source};
use super::moment::{ago, now};
use super::table::table;
use super::transfer::{Follower, Sent};
use super::{Session, parse_reference};

/// Bring an image to a peer without running it
///
/// Only layers that the peer lacks travel. A later `peerctl deploy` of the same image starts at once.
///
/// Example: peerctl push web.tar --peer bob
#[derive(Debug, Args)]
pub(super) struct PushArguments {
    #[command(flatten)]
    image: ImageArguments,
    /// Peer to bring it to: name or id
    #[arg(short, long, value_parser = parse_reference)]
    peer: String,
}

/// List the images that peers brought to this machine
///
/// Example: peerctl images
#[derive(Debug, Args)]
pub(super) struct ImagesArguments {}

/// What `push --json` prints.
#[derive(Debug, Serialize)]
struct Pushed {
    image: Digest,
    #[serde(flatten)]
    sent: Sent,
}

/// Runs `push`.
pub(super) async fn push(session: &Session, arguments: PushArguments) -> Result<(), Failure> {
    let source = Source::open(session, &arguments.image, false).await?;
    let request = control::Push { peer: arguments.peer.clone(), image: source.image() };
    let lines = session.client.stream(Method::POST, "/v1/images", Some(&request)).await?;
    let mut follower = Follower::new(session, lines, source.offer(), SILENCE_DEADLINE);
    let image = loop {
        match follower.next().await? {
            Progress::Pushed { image } => break image,
            Progress::Accepted { .. } | Progress::Changed { .. } => {}
            other => return Err(unexpected(&other)),
        }
    };
    let pushed = Pushed { image, sent: follower.sent() };
    drop(follower);
    session.output.result(&pushed, |pushed| {
        let Sent { layers_sent, bytes_sent } = pushed.sent;
        let (peer, bytes) = (escape(&arguments.peer), format_bytes(bytes_sent));
        format!("{} is on {peer}; {layers_sent} layers travelled, {bytes}\n", pushed.image)
    })
}

/// Runs `images`.
pub(super) async fn list(session: &Session, ImagesArguments {}: &ImagesArguments) -> Result<(), Failure> {
    let images: Vec<HostedImage> = session.client.get("/v1/images").await?;
    session.output.result(&images, |images| {
        let row = |image: &HostedImage| {
            let digest = image.digest.hex()[..12].to_owned();
            let used = format!("{} ago", ago(now(), image.last_used_at));
            [digest, format_bytes(image.size_bytes), image.brought_by.join(", "), image.used_by.to_string(), used]
        };
        table(["IMAGE", "SIZE", "BROUGHT BY", "USED BY", "LAST USED"], &images.iter().map(row).collect::<Vec<_>>())
    })
}
