//! Follows the stream that answers a request about a deployment or an image, and meanwhile uploads the layers that the
//! peer wants. One task for each layer under way, [`UPLOADS_MAX`] at most; all of them end with the follower.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Bytes, Frame};
use indicatif::{ProgressBar, ProgressStyle};
use peer_proto::code::{Code, Problem};
use peer_proto::control::{Deployment, LayerSent, Progress};
use peer_proto::deploy::State;
use peer_proto::id::{Digest, RequestHash};
use peer_proto::text::escape;
use peer_proto::unit::format_bytes;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Session;
use super::client::{Client, Lines};
use super::failure::Failure;
use super::image::Offer;
use super::output::{Output, stderr_is_terminal};

/// Layers on their way at one time.
const UPLOADS_MAX: usize = 2;
/// Pieces of a layer read ahead of the socket.
const PIECES_AHEAD: usize = 4;
/// Longest wait for the peer's own words when an upload has failed.
const REASON_DEADLINE: Duration = Duration::from_secs(3);

/// What has travelled from this machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Sent {
    /// Layers that the peer wanted and has.
    pub(super) layers_sent: u32,
    /// Bytes that travelled to the peer; what arrived at an earlier try is not in it.
    pub(super) bytes_sent: u64,
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Follower<'session> {
    session: &'session Session,
    lines: Lines<Progress>,
    offer: Option<Arc<Offer>>,
    wanted: VecDeque<(RequestHash, usize)>,
    uploads: JoinSet<Result<LayerSent, UploadFailure>>,
    sent: Sent,
    bar: ProgressBar,
    patience: Duration,
    deadline: Instant,
    latest: Option<Box<Deployment>>,
    tells_states: bool,
}

/// Why a layer was not uploaded.
#[derive(Debug)]
enum UploadFailure {
    /// It cannot be read here.
    Here(Failure),
    /// It was not taken; the stream may know the reason better.
    There(Failure),
}

impl<'session> Follower<'session> {
    /// Follows `lines` for at most `patience`, in which time spent on uploads does not count.
    pub(super) fn new(
        session: &'session Session,
        lines: Lines<Progress>,
        offer: Option<Arc<Offer>>,
        patience: Duration,
    ) -> Self {
        Self {
            session,
            lines,
            offer,
            wanted: VecDeque::new(),
            uploads: JoinSet::new(),
            sent: Sent::default(),
            bar: ProgressBar::hidden(),
            patience,
            deadline: Instant::now() + patience,
            latest: None,
            tells_states: true,
        }
    }

    /// Says nothing of the states on the way.
    pub(super) fn without_states(mut self) -> Self {
        self.tells_states = false;
        self
    }

    /// What has travelled so far.
    pub(super) fn sent(&self) -> Sent {
        self.sent
    }

    /// The next thing that happened, other than a wish for layers. A reported failure, a stream that ends without a final
    /// word and the end of patience are failures.
    pub(super) async fn next(&mut self) -> Result<Progress, Failure> {
        loop {
            self.start_uploads();
            let idle = self.uploads.is_empty();
            tokio::select! {
                line = self.lines.next(None) => match line? {
                    None => return Err(self.lines.unfinished()),
                    Some(Progress::Want { transfer, layers }) => self.want(transfer, &layers)?,
                    Some(Progress::Failed(problem)) => return Err(problem.into()),
                    Some(progress) => {
                        self.remember(&progress);
                        return Ok(progress);
                    }
                },
                Some(upload) = self.uploads.join_next() => match upload {
                    Ok(Ok(layer)) => self.arrived(&layer),
                    Ok(Err(failure)) => return Err(self.reason_for(failure).await),
                    Err(error) => return Err(Failure::new(Code::Internal, format!("an upload broke: {error}"))),
                },
                () = tokio::time::sleep_until(self.deadline), if idle => return Err(self.out_of_patience()),
            }
        }
    }

    fn want(&mut self, transfer: RequestHash, layers: &[Digest]) -> Result<(), Failure> {
        let offered = self.offer.as_ref().map(|offer| offer.layers()).unwrap_or_default();
        let mut bytes = 0;
        for wanted in layers {
            let place = offered.iter().position(|layer| layer.diff_id == *wanted).ok_or_else(|| {
                Failure::new(Code::Malformed, format!("the peer wants layer {wanted}, which this image does not have"))
            })?;
            bytes += offered[place].size;
            self.wanted.push_back((transfer, place));
        }
        let text = format!("sending {} of {} layers, {}", layers.len(), offered.len(), format_bytes(bytes));
        self.bar = progress_bar(self.session.output, bytes);
        if self.bar.is_hidden() {
            self.session.output.note(&text);
        }
        self.bar.set_message(text);
        Ok(())
    }

    fn start_uploads(&mut self) {
        while self.uploads.len() < UPLOADS_MAX
            && let Some(offer) = &self.offer
            && let Some((transfer, place)) = self.wanted.pop_front()
        {
            let (client, offer, bar) = (self.session.client.clone(), Arc::clone(offer), self.bar.clone());
            self.uploads.spawn(upload(client, offer, transfer, place, bar));
        }
    }

    fn arrived(&mut self, layer: &LayerSent) {
        self.sent.layers_sent += 1;
        self.sent.bytes_sent += layer.bytes_sent;
        if self.uploads.is_empty() && self.wanted.is_empty() {
            self.bar.finish_and_clear();
            self.deadline = Instant::now() + self.patience;
            self.session.output.note(&format!("sent {}", format_bytes(self.sent.bytes_sent)));
        }
    }

    /// Tells people what they do not know yet, and keeps it for the sentence of a failure.
    fn remember(&mut self, progress: &Progress) {
        let Progress::Changed { deployment } = progress else { return };
        let status = &deployment.status;
        let before = self.latest.as_ref().map(|latest| (latest.status.state, latest.status.problem.clone()));
        if self.tells_states
            && before != Some((status.state, status.problem.clone()))
            && !matches!(status.state, State::Running)
        {
            let problem = status.problem.as_ref().map(|problem| format!(": {}", escape(&problem.message)));
            let text = format!("{} {}{}", status.specification.name, status.state, problem.unwrap_or_default());
            self.bar.suspend(|| self.session.output.note(&text));
        }
        self.latest = Some(deployment.clone());
    }

    /// A failed upload often has its reason on the peer, who says it on the stream.
    async fn reason_for(&mut self, failure: UploadFailure) -> Failure {
        self.bar.finish_and_clear();
        let failure = match failure {
            UploadFailure::Here(failure) => return failure,
            UploadFailure::There(failure) => failure,
        };
        let lines = &mut self.lines;
        let reason = async {
            loop {
                match lines.next(None).await {
                    Ok(Some(Progress::Failed(problem))) => return Some(problem),
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => return None,
                }
            }
        };
        match tokio::time::timeout(REASON_DEADLINE, reason).await {
            Ok(Some(problem)) => problem.into(),
            Ok(None) | Err(_) => failure,
        }
    }

    fn out_of_patience(&self) -> Failure {
        let seconds = self.patience.as_secs();
        let message = match &self.latest {
            None => format!("no word for {seconds}s; `peerctl ps` shows what has become of it"),
            Some(latest) => {
                let (name, state, peer) =
                    (&latest.status.specification.name, latest.status.state, escape(&latest.peer));
                format!("'{name}' is still {state} on {peer} after {seconds}s; it goes on: see `peerctl status {name}`")
            }
        };
        Problem::new(Code::Timeout, message).into()
    }
}

impl Drop for Follower<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

async fn upload(
    client: Client,
    offer: Arc<Offer>,
    transfer: RequestHash,
    place: usize,
    bar: ProgressBar,
) -> Result<LayerSent, UploadFailure> {
    let layer = offer.layers()[place];
    let (sender, receiver) = mpsc::channel::<Bytes>(PIECES_AHEAD);
    let reader = tokio::task::spawn_blocking(move || {
        offer.read_layer(place, |piece| {
            bar.inc(piece.len() as u64);
            sender.blocking_send(piece).is_ok()
        })
    });
    let pieces = stream::unfold(receiver, |mut receiver| async {
        receiver.recv().await.map(|piece| (Ok::<_, std::io::Error>(Frame::data(piece)), receiver))
    });
    let path = format!("/v1/transfers/{transfer}/layers/{}", layer.diff_id);
    let sent = client.upload(&path, layer.size, StreamBody::new(pieces).boxed_unsync()).await;
    // A layer that cannot be read ends the body early, which the upload reports too, but without the cause.
    match reader.await {
        Ok(Ok(())) => sent.map_err(UploadFailure::There),
        Ok(Err(failure)) => Err(UploadFailure::Here(failure)),
        Err(error) => Err(UploadFailure::Here(Failure::new(Code::Internal, format!("a reader broke: {error}")))),
    }
}

/// A bar over so many bytes; nothing is drawn where standard error is no terminal. It has no colour.
pub(super) fn progress_bar(output: Output, bytes: u64) -> ProgressBar {
    if output.is_quiet() || !stderr_is_terminal() {
        return ProgressBar::hidden();
    }
    let style =
        ProgressStyle::with_template("{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}")
            .expect("the template is sound");
    ProgressBar::new(bytes).with_style(style.progress_chars("=> "))
}
