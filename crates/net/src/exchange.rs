//! Frames on a stream, each with a size limit and a deadline: a big-endian length, then canonical CBOR.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use minicbor::{Decode, Encode};
use peer_proto::frame::{self, FrameError, LENGTH_BYTES};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// Largest buffer made before the bytes that fill it have arrived.
const FIRST_ALLOCATION: usize = 16 * 1024;

/// Why a frame was not exchanged.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The other side ended the stream where a frame could have begun.
    #[error("the other side ended the stream")]
    Ended,
    /// The stream broke, or ended inside a frame.
    #[error("the stream broke: {0}")]
    Broken(#[from] io::Error),
    /// The deadline passed.
    #[error("no complete message within the time allowed")]
    TimedOut,
    /// The frame is too long, malformed or not canonical.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// A moment after which waiting ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// The moment `duration` from now.
    pub fn after(duration: Duration) -> Self {
        Self(Instant::now() + duration)
    }

    /// Time left; zero once it has passed.
    pub fn remaining(&self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Runs a future until the deadline; `None` when it passes first.
    pub async fn bound<F: Future>(self, future: F) -> Option<F::Output> {
        tokio::time::timeout_at(self.0, future).await.ok()
    }
}

/// Bytes in one unit of a [`Budget`].
const BUDGET_UNIT: usize = 1024;

/// Memory for messages that are being read and looked at: one peer's, within that of all (V5). Messages that fit the first
/// allocation are not counted; streams bound those.
#[derive(Debug, Clone)]
pub struct Budget {
    own: Arc<Semaphore>,
    all: Arc<Semaphore>,
}

/// The part of a [`Budget`] that a message holds until this is dropped.
#[derive(Debug)]
pub struct Reserved {
    _permits: [OwnedSemaphorePermit; 2],
}

impl Budget {
    /// So many bytes for everybody together; [`Budget::share`] makes one peer's.
    pub fn for_all(bytes: usize) -> Self {
        let all = Arc::new(Semaphore::new(bytes / BUDGET_UNIT));
        Self { own: Arc::clone(&all), all }
    }

    /// One peer's part. The largest message must fit it.
    #[must_use]
    pub fn share(&self, bytes: usize) -> Self {
        Self { own: Arc::new(Semaphore::new(bytes / BUDGET_UNIT)), all: Arc::clone(&self.all) }
    }

    /// Waits for room. The peer's own part comes first, so that nobody holds room of all while he waits for his own.
    async fn reserve(&self, bytes: usize) -> Result<Option<Reserved>, ExchangeError> {
        if bytes <= FIRST_ALLOCATION {
            return Ok(None);
        }
        let units = u32::try_from(bytes.div_ceil(BUDGET_UNIT)).unwrap_or(u32::MAX);
        let closed = |_| ExchangeError::TimedOut;
        let own = Arc::clone(&self.own).acquire_many_owned(units).await.map_err(closed)?;
        let all = Arc::clone(&self.all).acquire_many_owned(units).await.map_err(closed)?;
        Ok(Some(Reserved { _permits: [own, all] }))
    }
}

/// As [`read_frame`], within a budget: a message that announces more than is left waits, and the sender with it.
pub async fn read_frame_within<T, S>(
    stream: &mut S,
    limit: usize,
    deadline: Deadline,
    budget: &Budget,
) -> Result<(T, Option<Reserved>), ExchangeError>
where
    T: Encode<()> + for<'b> Decode<'b, ()>,
    S: AsyncRead + Unpin,
{
    let received = deadline.bound(receive(stream, limit, Some(budget))).await;
    let (bytes, reserved) = received.unwrap_or(Err(ExchangeError::TimedOut))?;
    Ok((frame::decode_strict(&bytes, limit)?, reserved))
}

/// Reads one message of at most `limit` bytes.
pub async fn read_frame<T, S>(stream: &mut S, limit: usize, deadline: Deadline) -> Result<T, ExchangeError>
where
    T: Encode<()> + for<'b> Decode<'b, ()>,
    S: AsyncRead + Unpin,
{
    let bytes = read_frame_bytes(stream, limit, deadline).await?;
    Ok(frame::decode_strict(&bytes, limit)?)
}

/// Writes one message and flushes it. A message longer than `limit` is a fault of the caller and is not sent.
pub async fn write_frame<T, S>(
    stream: &mut S,
    message: &T,
    limit: usize,
    deadline: Deadline,
) -> Result<(), ExchangeError>
where
    T: Encode<()>,
    S: AsyncWrite + Unpin,
{
    write_frame_bytes(stream, &frame::encode(message), limit, deadline).await
}

/// Reads the bytes of one frame, without looking into them.
pub async fn read_frame_bytes<S>(stream: &mut S, limit: usize, deadline: Deadline) -> Result<Vec<u8>, ExchangeError>
where
    S: AsyncRead + Unpin,
{
    let received = deadline.bound(receive(stream, limit, None)).await;
    Ok(received.unwrap_or(Err(ExchangeError::TimedOut))?.0)
}

/// Writes the bytes of one frame and flushes them.
pub async fn write_frame_bytes<S>(
    stream: &mut S,
    bytes: &[u8],
    limit: usize,
    deadline: Deadline,
) -> Result<(), ExchangeError>
where
    S: AsyncWrite + Unpin,
{
    let too_long = || FrameError::TooLong { length: bytes.len(), limit };
    if bytes.len() > limit {
        return Err(too_long().into());
    }
    let length = u32::try_from(bytes.len()).map_err(|_| too_long())?;
    let mut framed = Vec::with_capacity(LENGTH_BYTES + bytes.len());
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(bytes);
    let send = async {
        stream.write_all(&framed).await?;
        stream.flush().await
    };
    deadline.bound(send).await.ok_or(ExchangeError::TimedOut)?.map_err(ExchangeError::Broken)
}

async fn receive<S: AsyncRead + Unpin>(
    stream: &mut S,
    limit: usize,
    budget: Option<&Budget>,
) -> Result<(Vec<u8>, Option<Reserved>), ExchangeError> {
    let mut prefix = [0; LENGTH_BYTES];
    let first = stream.read(&mut prefix).await?;
    if first == 0 {
        return Err(ExchangeError::Ended);
    }
    stream.read_exact(&mut prefix[first..]).await?;
    let announced = u32::from_be_bytes(prefix);
    let length = usize::try_from(announced).unwrap_or(usize::MAX);
    if length > limit {
        return Err(FrameError::TooLong { length, limit }.into());
    }
    let reserved = match budget {
        Some(budget) => budget.reserve(length).await?,
        None => None,
    };
    // The buffer grows with what arrives, so that an announced length alone costs nothing.
    let mut bytes = Vec::with_capacity(length.min(FIRST_ALLOCATION));
    let received = stream.take(u64::from(announced)).read_to_end(&mut bytes).await?;
    if received < length {
        return Err(ExchangeError::Broken(io::ErrorKind::UnexpectedEof.into()));
    }
    Ok((bytes, reserved))
}
