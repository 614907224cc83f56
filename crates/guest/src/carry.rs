//! One connection's bytes between a socket and a stream of the multiplexer, which both ends do alike.
//!
//! In each direction of the stream a piece of bytes follows its length (two bytes, big-endian), and the length zero says
//! that nothing follows. The multiplexer's own half-close is not used: whoever drops a stream after it could not reset it
//! any more, so that the other side would wait for ever. So an end that was not said is a failure, and is known as one.

use std::io;

use tokio::{
    io::{
        AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader, copy_buf, split,
    },
    sync::Barrier,
};
use tokio_util::compat::Compat;
use yamux::Stream;

/// Buffer for each direction of a connection (bytes).
const BUFFER: usize = 32 << 10;
/// Length of a piece's length (bytes).
const LENGTH: usize = 2;

/// Carries both directions until both have ended, one of them fails, or the stream is reset. `abandoned` is asked once the
/// socket's reader has ended; it returns when the socket's user has gone altogether, if that can be known.
pub(crate) async fn carry<R, W>(
    mut reader: R,
    mut writer: W,
    stream: Compat<Stream>,
    abandoned: impl AsyncFnOnce(&R),
) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let (from_stream, mut to_stream) = split(stream);
    let mut from_stream = BufReader::with_capacity(BUFFER, from_stream);
    let both = Barrier::new(2);
    let send = async {
        pieces_of(&mut reader, &mut to_stream).await?;
        tokio::select! {
            _ = both.wait() => Ok(()),
            () = abandoned(&reader) => Err(io::Error::from(io::ErrorKind::BrokenPipe)),
        }
    };
    let receive = async {
        pieces_to(&mut from_stream, &mut writer).await?;
        tokio::select! {
            _ = both.wait() => Ok(()),
            // Nothing may follow: whatever comes, or the end, means that the other side has given up.
            _ = from_stream.fill_buf() => Err(io::Error::from(io::ErrorKind::ConnectionReset)),
        }
    };
    tokio::try_join!(send, receive).map(drop)
}

async fn pieces_of(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut piece = vec![0; BUFFER];
    loop {
        let length = from.read(&mut piece[LENGTH..]).await?;
        let announced = u16::try_from(length).map_err(io::Error::other)?;
        piece[..LENGTH].copy_from_slice(&announced.to_be_bytes());
        to.write_all(&piece[..LENGTH + length]).await?;
        if length == 0 {
            return Ok(());
        }
    }
}

async fn pieces_to(from: &mut BufReader<impl AsyncRead + Unpin>, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    loop {
        let length = u64::from(from.read_u16().await?);
        if length == 0 {
            return to.shutdown().await;
        }
        if copy_buf(&mut from.take(length), to).await? < length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}
