//! Bytes per second through this daemon, of one peer and of all together (V5): layers, logs, forwarded ports and visits.
//!
//! Requests and their answers are not slowed down: only bulk waits, each peer in a line of its own, and the peers one after
//! the other where the whole machine is bounded.

use std::collections::HashMap;
use std::io;
use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use peer_proto::PeerId;
use peer_proto::unit::ByteSize;
use peer_trust::trust::Snapshot;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;

/// Bytes that are counted as one: the limiter counts at most a thousand million a second.
const CELL: u64 = 64;
/// Bytes that may always come at once, and the most that are waited for at one time.
const BURST_MIN: u64 = 128 << 10;
/// Lines that are kept before those in which nobody stands are cleared away.
const LINES_KEPT: usize = 2048;

/// The bandwidth of this machine.
#[derive(Debug)]
pub struct Bandwidth {
    list: watch::Receiver<Arc<Snapshot>>,
    /// Bytes per second of all peers together; zero if they are not bounded.
    machine: AtomicU64,
    all: Line,
    lines: Mutex<HashMap<PeerId, Arc<Line>>>,
}

/// A line in which those stand who wait for the same bandwidth.
#[derive(Debug, Default)]
struct Line {
    /// Held by whoever stands first; the others follow in their order.
    turn: tokio::sync::Mutex<()>,
    limiter: Mutex<Option<(u64, Arc<DefaultDirectRateLimiter>)>>,
}

impl Bandwidth {
    /// Bounds peers by their grants as they are in `list`, and all together by `machine` (bytes per second).
    pub fn new(list: watch::Receiver<Arc<Snapshot>>, machine: Option<ByteSize>) -> Self {
        let machine = AtomicU64::new(machine.map_or(0, ByteSize::get));
        Self { list, machine, all: Line::default(), lines: Mutex::default() }
    }

    /// Bounds all peers together anew (bytes per second).
    pub fn set_machine(&self, rate: Option<ByteSize>) {
        self.machine.store(rate.map_or(0, ByteSize::get), Ordering::Relaxed);
    }

    /// What bounds this peer, and what bounds all; zero where nothing does.
    fn rates(&self, peer: PeerId) -> (u64, u64) {
        let list = self.list.borrow();
        let granted = list.peers.get(&peer).and_then(|peer| peer.grants.deploy.as_ref()?.max_bandwidth);
        (granted.map_or(0, ByteSize::get), self.machine.load(Ordering::Relaxed))
    }

    fn is_bounded(&self, peer: PeerId) -> bool {
        self.rates(peer) != (0, 0)
    }

    /// Waits until so many more bytes of this peer may pass.
    pub async fn pass(&self, peer: PeerId, bytes: usize) {
        let (own, all) = self.rates(peer);
        if (own, all) == (0, 0) {
            return;
        }
        let line = self.line(peer);
        let _turn = line.turn.lock().await;
        line.wait(own, bytes).await;
        if all > 0 {
            // One of each peer stands here, however many streams it has.
            let _turn = self.all.turn.lock().await;
            self.all.wait(all, bytes).await;
        }
    }

    fn line(&self, peer: PeerId) -> Arc<Line> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() >= LINES_KEPT && !lines.contains_key(&peer) {
            lines.retain(|_, line| Arc::strong_count(line) > 1);
        }
        lines.entry(peer).or_default().clone()
    }
}

impl Line {
    async fn wait(&self, rate: u64, bytes: usize) {
        if rate == 0 {
            return;
        }
        let (limiter, burst) = self.limiter(rate);
        let mut cells = u32::try_from((bytes as u64).div_ceil(CELL)).unwrap_or(u32::MAX);
        while let Some(next) = NonZeroU32::new(cells.min(burst)) {
            match limiter.check_n(next) {
                Ok(Ok(())) => cells -= next.get(),
                Ok(Err(later)) => tokio::time::sleep(later.wait_time_from(DefaultClock::default().now())).await,
                // No more than the burst is ever asked for.
                Err(_) => return,
            }
        }
    }

    /// The limiter for this rate, with the most cells that it gives at one time.
    fn limiter(&self, rate: u64) -> (Arc<DefaultDirectRateLimiter>, u32) {
        let cells = |bytes: u64| {
            let cells = u32::try_from(bytes / CELL).unwrap_or(u32::MAX).min(1_000_000_000);
            NonZeroU32::new(cells).unwrap_or(NonZeroU32::MIN)
        };
        let burst = cells((rate / 2).max(BURST_MIN));
        let mut kept = self.limiter.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some((of, limiter)) if *of == rate => (limiter.clone(), burst.get()),
            _ => {
                let limiter = Arc::new(RateLimiter::direct(Quota::per_second(cells(rate)).allow_burst(burst)));
                *kept = Some((rate, limiter.clone()));
                (limiter, burst.get())
            }
        }
    }
}

/// Whose bandwidth a stream takes.
#[derive(Debug, Clone)]
pub(crate) struct Pace {
    bandwidth: Arc<Bandwidth>,
    peer: PeerId,
}

impl Pace {
    /// That of this peer.
    pub(crate) fn of(bandwidth: &Arc<Bandwidth>, peer: PeerId) -> Self {
        Self { bandwidth: bandwidth.clone(), peer }
    }

    /// Waits until so many more bytes may pass.
    pub(crate) async fn pass(&self, bytes: usize) {
        self.bandwidth.pass(self.peer, bytes).await;
    }
}

/// A stream from which no more is read than its peer's bandwidth allows.
pub(crate) struct Paced<S> {
    stream: S,
    pace: Pace,
    /// What was read last has to be paid for first.
    debt: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl<S> Paced<S> {
    pub(crate) fn new(stream: S, pace: Pace) -> Self {
        Self { stream, pace, debt: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Paced<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(debt) = &mut self.debt {
            ready!(debt.as_mut().poll(cx));
            self.debt = None;
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        let read = buffer.filled().len() - before;
        if read > 0 && self.pace.bandwidth.is_bounded(self.pace.peer) {
            let pace = self.pace.clone();
            self.debt = Some(Box::pin(async move { pace.pass(read).await }));
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Paced<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use std::time::{Duration, Instant};

    use peer_proto::identity::Identity;
    use tokio::io::AsyncReadExt as _;

    use super::*;

    fn bandwidth(machine: Option<u64>) -> Arc<Bandwidth> {
        let (_, list) = watch::channel(Arc::default());
        Arc::new(Bandwidth::new(list, machine.map(|rate| ByteSize::new(rate).unwrap())))
    }

    #[tokio::test]
    async fn v5_more_than_the_burst_takes_its_time_and_nothing_else_does() {
        let peer = Identity::generate().peer_id();
        let read = |bandwidth: Arc<Bandwidth>| async move {
            let begun = Instant::now();
            let mut paced = Paced::new(tokio::io::repeat(7).take(512 << 10), Pace::of(&bandwidth, peer));
            let mut all = Vec::new();
            paced.read_to_end(&mut all).await.unwrap();
            assert_eq!(all.len(), 512 << 10);
            begun.elapsed()
        };
        // 512 KiB at 512 KiB a second, of which the half comes at once.
        let bounded = bandwidth(Some(512 << 10));
        assert!(read(bounded.clone()).await > Duration::from_millis(300));
        bounded.set_machine(None);
        assert!(read(bounded).await < Duration::from_millis(300), "the bound is gone at once");
        assert!(read(bandwidth(None)).await < Duration::from_millis(300));
    }

    #[tokio::test]
    async fn v5_one_peers_many_streams_leave_another_its_turn() {
        let (greedy, modest) = (Identity::generate().peer_id(), Identity::generate().peer_id());
        let bandwidth = bandwidth(Some(1 << 20));
        bandwidth.pass(greedy, 512 << 10).await;
        let mut greed = tokio::task::JoinSet::new();
        for _ in 0..64 {
            let bandwidth = bandwidth.clone();
            greed.spawn(async move { bandwidth.pass(greedy, 64 << 10).await });
        }
        tokio::task::yield_now().await;
        // Four mebibytes stand before it in the other's line; in that of all there is one piece at a time.
        let waited = tokio::time::timeout(Duration::from_secs(2), bandwidth.pass(modest, 64 << 10)).await;
        assert!(waited.is_ok());
        assert!(greed.len() == 64 && greed.try_join_next().is_some());
        greed.abort_all();
    }
}
