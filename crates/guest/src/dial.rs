//! The daemon's end: gives out connections to the port that [`crate::forward`] at the other end leads to.
//!
//! Each connection is one end of a pair of Unix sockets, which is used, half closed and handed on like any other socket.

use std::{io, sync::Arc, time::Duration};

use futures::{
    future::poll_fn,
    io::{AsyncRead, AsyncWrite},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest, Ready},
    net::{UnixStream, unix::OwnedReadHalf},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    task::JoinSet,
    time::sleep,
};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt as _};
use yamux::{Connection, ConnectionError, Mode, Stream};

use crate::forward::{ASK, Answer, STREAMS_MAX, multiplexing};

/// Questions that wait for the multiplexer.
const QUESTIONS: usize = 16;
/// How often a connection whose user sends nothing more is looked at: has he gone altogether?
const LOOK: Duration = Duration::from_secs(2);

/// Asks the other end for connections. Clones ask the same end.
#[derive(Debug, Clone)]
pub struct Dialer {
    questions: mpsc::Sender<Question>,
    permits: Arc<Semaphore>,
}

#[derive(Debug)]
struct Question {
    reply: oneshot::Sender<Result<UnixStream, DialError>>,
    permit: OwnedSemaphorePermit,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The other end has gone.
    #[error("the forwarder has gone")]
    Gone,
    /// The other end reached nothing.
    #[error("the port did not answer")]
    Unanswered(Answer),
    /// The system failed.
    #[error(transparent)]
    System(#[from] io::Error),
}

impl Dialer {
    /// Connects to the port. It waits while as many connections are open as are possible: the caller sets the limit.
    pub async fn connect(&self) -> Result<UnixStream, DialError> {
        let permit = self.permits.clone().acquire_owned().await.map_err(|_| DialError::Gone)?;
        let (reply, answered) = oneshot::channel();
        self.questions.send(Question { reply, permit }).await.map_err(|_| DialError::Gone)?;
        answered.await.map_err(|_| DialError::Gone)?
    }
}

/// A dialler over `forwarder`, and what carries its connections: they live for as long as that runs.
pub fn over<T: AsyncRead + AsyncWrite + Unpin>(
    forwarder: T,
) -> (Dialer, impl Future<Output = Result<(), ConnectionError>>) {
    let (questions, asked) = mpsc::channel(QUESTIONS);
    let dialer = Dialer { questions, permits: Arc::new(Semaphore::new(STREAMS_MAX)) };
    (dialer, carry_all(forwarder, asked))
}

async fn carry_all<T: AsyncRead + AsyncWrite + Unpin>(
    forwarder: T,
    mut asked: mpsc::Receiver<Question>,
) -> Result<(), ConnectionError> {
    let mut connection = Connection::new(forwarder, multiplexing(), Mode::Client);
    let mut carried = JoinSet::new();
    loop {
        tokio::select! {
            question = asked.recv() => match question {
                Some(question) => {
                    let stream = poll_fn(|context| connection.poll_new_outbound(context)).await?;
                    carried.spawn(carry(stream, question));
                }
                None => return Ok(()),
            },
            next = poll_fn(|context| connection.poll_next_inbound(context)) => match next {
                // The other end opens nothing; what it opens nevertheless is reset.
                Some(Ok(stream)) => drop(stream),
                Some(Err(error)) => return Err(error),
                None => return Ok(()),
            },
            Some(_) = carried.join_next() => {}
        }
    }
}

/// One connection, from the question to its end. Whatever fails, dropping the stream resets it.
async fn carry(stream: Stream, Question { mut reply, permit }: Question) {
    let asked = tokio::select! {
        asked = ask(stream) => asked,
        // Nobody waits for it any more.
        () = reply.closed() => return,
    };
    match asked {
        Ok((user, ours, stream)) => {
            if reply.send(Ok(user)).is_ok() {
                let (reader, writer) = ours.into_split();
                // How it ended shows at its ends.
                drop(crate::carry::carry(reader, writer, stream, gone).await);
            }
        }
        Err(error) => drop(reply.send(Err(error))),
    }
    drop(permit);
}

async fn ask(stream: Stream) -> Result<(UnixStream, UnixStream, Compat<Stream>), DialError> {
    let mut stream = stream.compat();
    stream.write_u8(ASK).await?;
    match Answer::of(stream.read_u8().await?) {
        Some(Answer::Connected) => {
            let (user, ours) = UnixStream::pair()?;
            Ok((user, ours, stream))
        }
        Some(answer) => Err(DialError::Unanswered(answer)),
        None => Err(DialError::System(io::ErrorKind::InvalidData.into())),
    }
}

/// Waits until the user has closed his end altogether. A guest that never ends its side would hold the stream otherwise.
async fn gone(user: &OwnedReadHalf) {
    while !user.ready(Interest::WRITABLE).await.is_ok_and(Ready::is_write_closed) {
        sleep(LOOK).await;
    }
}
