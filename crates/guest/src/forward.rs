//! Streams from the daemon to one port of loopback, all of them inside one pair of pipes.
//!
//! The daemon opens a stream for each connection and writes one byte, [`ASK`]. This side connects to the port and writes
//! one byte, an [`Answer`]; after [`Answer::Connected`] both directions carry the connection's bytes in pieces, and an end
//! of either is passed on as such. A stream that is reset on one side ends the connection on the other.
//!
//! Bounds: [`STREAMS_MAX`] streams, a window of 256 KiB for each, and small buffers of the kernel's for its connection.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    num::NonZeroU16,
    os::fd::AsFd,
    time::Duration,
};

use futures::{
    future::poll_fn,
    io::{AsyncRead, AsyncWrite},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream, unix::pipe},
    task::JoinSet,
    time::timeout,
};
use tokio_util::compat::{FuturesAsyncReadCompatExt as _, TokioAsyncReadCompatExt as _};
use yamux::{Config, Connection, ConnectionError, Mode, Stream};

use crate::carry;

/// Most streams that the daemon holds open at one time.
pub const STREAMS_MAX: usize = 128;
/// What the daemon writes first on each stream; the multiplexer announces a stream with its first bytes alone.
pub const ASK: u8 = 1;

/// Streams that may be known to one side while the other has forgotten them already.
const STREAMS_ENDING: usize = STREAMS_MAX;
/// The multiplexer's window for each stream (bytes), which it does not go below.
const WINDOW: usize = 256 << 10;
/// Largest frame (bytes): as much as the engine copies at a time.
const FRAME: usize = 32 << 10;
/// The kernel's buffer for each direction of a connection (bytes); a slow guest is waited for, not stored for.
const SOCKET_BUFFER: u32 = 64 << 10;
/// How long the port, or the daemon's first byte, is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether the port answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It did: the connection's bytes follow.
    Connected,
    /// Nothing listens there.
    Closed,
    /// It did not answer in time.
    TimedOut,
    /// The system failed.
    Failed,
}

impl Answer {
    /// All of them, each at the place of its byte.
    const ALL: [Self; 4] = [Self::Connected, Self::Closed, Self::TimedOut, Self::Failed];

    /// As it travels.
    pub fn byte(self) -> u8 {
        self as u8
    }

    /// The answer that this byte means, if it means one.
    pub fn of(byte: u8) -> Option<Self> {
        Self::ALL.get(usize::from(byte)).copied()
    }

    fn to(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Closed,
            io::ErrorKind::TimedOut => Self::TimedOut,
            _ => Self::Failed,
        }
    }
}

/// How both sides multiplex: the windows of all streams together are all that is ever stored.
pub fn multiplexing() -> Config {
    let mut config = Config::default();
    config
        .set_max_num_streams(STREAMS_MAX + STREAMS_ENDING)
        .set_max_connection_receive_window(Some((STREAMS_MAX + STREAMS_ENDING) * WINDOW))
        .set_split_send_size(FRAME);
    config
}

/// Why forwarding ended before its time.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// Standard input or output is not a pipe, or the system failed.
    #[error("standard input and output must be pipes: {0}")]
    Pipes(#[from] io::Error),
    /// What came in is not what the daemon says.
    #[error("the daemon's streams ended badly: {0}")]
    Streams(#[from] ConnectionError),
}

/// Forwards between standard input and output and the port until standard input ends.
pub fn run(port: NonZeroU16) -> Result<(), ForwardError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let input = pipe::Receiver::from_owned_fd(io::stdin().as_fd().try_clone_to_owned()?)?;
        let output = pipe::Sender::from_owned_fd(io::stdout().as_fd().try_clone_to_owned()?)?;
        Ok(serve(tokio::io::join(input, output).compat(), port).await?)
    })
}

/// Answers the daemon's streams until it goes.
pub async fn serve<T: AsyncRead + AsyncWrite + Unpin>(daemon: T, port: NonZeroU16) -> Result<(), ConnectionError> {
    let mut connection = Connection::new(daemon, multiplexing(), Mode::Server);
    let mut carried = JoinSet::new();
    loop {
        tokio::select! {
            next = poll_fn(|context| connection.poll_next_inbound(context)) => match next {
                Some(Ok(stream)) => drop(carried.spawn(answer(stream, port))),
                Some(Err(ConnectionError::Closed)) | None => return Ok(()),
                // The daemon was killed in the middle of a frame.
                Some(Err(ConnectionError::Io(error))) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Some(Err(error)) => return Err(error),
            },
            // How a connection ended was told to both of its sides.
            Some(_) = carried.join_next() => {}
        }
    }
}

/// One connection. Whatever fails, dropping the stream resets it.
async fn answer(stream: Stream, port: NonZeroU16) -> io::Result<()> {
    let mut stream = stream.compat();
    if timeout(PATIENCE, stream.read_u8()).await?? != ASK {
        return Err(io::ErrorKind::InvalidData.into());
    }
    match connect(port).await {
        Ok(guest) => {
            stream.write_u8(Answer::Connected.byte()).await?;
            let (reader, writer) = guest.into_split();
            // Of a guest that has closed its end altogether, the next write tells.
            carry::carry(reader, writer, stream, async |_| std::future::pending().await).await
        }
        Err(error) => {
            stream.write_u8(Answer::to(&error).byte()).await?;
            stream.shutdown().await
        }
    }
}

async fn connect(port: NonZeroU16) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_send_buffer_size(SOCKET_BUFFER)?;
    socket.set_recv_buffer_size(SOCKET_BUFFER)?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.get()));
    let stream = timeout(PATIENCE, socket.connect(address)).await??;
    stream.set_nodelay(true)?;
    Ok(stream)
}
