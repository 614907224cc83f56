//! A pair of sockets over which connections are sent: one for each call.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::net::UnixStream as BlockingStream,
    time::Duration,
};

use minicbor::{Decode, Encode};
use peer_proto::frame::{LENGTH_BYTES, decode_strict, encode};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketType, recvmsg, sendmsg, sockopt,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest},
    net::UnixStream,
    time::timeout,
};

/// Largest message in either direction (bytes): the engine's list of its images is the longest.
pub(super) const FRAME_MAX: usize = 16 << 20;
/// A side that takes nothing for this long is given up.
const WRITE: Duration = Duration::from_mins(5);

/// One end of the pair.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
}

impl Channel {
    /// The end that is this socket. Belongs to the present runtime.
    pub fn new(stream: BlockingStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream: UnixStream::from_std(stream)? })
    }

    pub(super) fn of(stream: UnixStream) -> Self {
        Self { stream }
    }

    /// Makes a connection and sends its other end.
    pub(super) async fn open(&self) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        send_descriptor(&self.stream, theirs.as_fd()).await?;
        Ok(ours)
    }

    /// The next connection that the other side has made; nothing if the other side is gone.
    pub(super) async fn accept(&self) -> io::Result<Option<UnixStream>> {
        let Some(descriptor) = receive_descriptor(&self.stream).await? else { return Ok(None) };
        let local = sockopt::socket_domain(&descriptor)? == AddressFamily::UNIX
            && sockopt::socket_type(&descriptor)? == SocketType::STREAM;
        if !local {
            return Err(io::Error::other("what was sent is not a connection"));
        }
        let stream = BlockingStream::from(descriptor);
        stream.set_nonblocking(true)?;
        UnixStream::from_std(stream).map(Some)
    }

    /// Says something beside the calls: one byte.
    pub async fn tell(&self, byte: u8) -> io::Result<()> {
        self.stream.async_io(Interest::WRITABLE, || self.stream.try_write(&[byte])).await.map(drop)
    }

    /// Waits for such a byte; nothing if the other side is gone.
    pub async fn told(&self) -> io::Result<Option<u8>> {
        let mut byte = [0];
        loop {
            self.stream.readable().await?;
            match self.stream.try_read(&mut byte) {
                Ok(0) => return Ok(None),
                Ok(_) => return Ok(Some(byte[0])),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}

pub(super) async fn send_descriptor(stream: &UnixStream, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    stream.async_io(Interest::WRITABLE, || send_descriptor_blocking(stream, descriptor)).await
}

pub(super) async fn receive_descriptor(stream: &UnixStream) -> io::Result<Option<OwnedFd>> {
    stream.async_io(Interest::READABLE, || receive_descriptor_blocking(stream)).await
}

/// Sends one byte with a descriptor.
pub fn send_descriptor_blocking(socket: impl AsFd, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor];
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    sendmsg(socket, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Takes one byte with its descriptor; nothing at the end. A byte without one is an error.
pub fn receive_descriptor_blocking(socket: impl AsFd) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptor.map(Some).ok_or_else(|| io::Error::other("a byte without a descriptor"))
}

/// Writes one message.
pub(super) async fn write<T: Encode<()>>(to: &mut (impl AsyncWrite + Unpin), message: &T) -> io::Result<()> {
    let bytes = encode(message);
    if bytes.len() > FRAME_MAX {
        return Err(io::Error::other("a message is too long"));
    }
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    let written = async {
        to.write_all(&length.to_be_bytes()).await?;
        to.write_all(&bytes).await
    };
    timeout(WRITE, written).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Reads one message of at most `limit` bytes. Never reads beyond it: a descriptor may follow.
pub(super) async fn read<T>(from: &mut (impl AsyncRead + Unpin), limit: usize) -> io::Result<T>
where
    T: Encode<()> + for<'b> Decode<'b, ()>,
{
    let mut length = [0; LENGTH_BYTES];
    from.read_exact(&mut length).await?;
    let length = u32::from_be_bytes(length);
    if usize::try_from(length).map_err(io::Error::other)? > limit {
        return Err(io::Error::other("a message is too long"));
    }
    let mut bytes = Vec::new();
    // What was announced allocates nothing: the buffer grows with what comes.
    if from.take(length.into()).read_to_end(&mut bytes).await? as u64 != u64::from(length) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    decode_strict(&bytes, limit).map_err(io::Error::other)
}
