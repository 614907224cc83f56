//! Frames on a stream, each with a size limit and a deadline: a big-endian length, then canonical CBOR.

use std::io;
use std::time::Duration;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use minicbor::{Decode, Encode};
use peer_proto::frame::{self, FrameError, LENGTH_BYTES};
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
    deadline.bound(receive(stream, limit)).await.unwrap_or(Err(ExchangeError::TimedOut))
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

async fn receive<S: AsyncRead + Unpin>(stream: &mut S, limit: usize) -> Result<Vec<u8>, ExchangeError> {
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
    // The buffer grows with what arrives, so that an announced length alone costs nothing.
    let mut bytes = Vec::with_capacity(length.min(FIRST_ALLOCATION));
    let received = stream.take(u64::from(announced)).read_to_end(&mut bytes).await?;
    if received < length {
        return Err(ExchangeError::Broken(io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(bytes)
}
