//! Both ends of forwarding over a pair of pipes in memory, with a real port at the far end.
#![expect(clippy::unwrap_used, reason = "a failing step is a failing test")]

use std::{io, num::NonZeroU16, time::Duration};

use peer_guest::{
    dial::{self, DialError, Dialer},
    forward::{self, Answer, STREAMS_MAX},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    net::{TcpListener, TcpStream, UnixStream},
    task::JoinSet,
    time::timeout,
};
use tokio_util::compat::TokioAsyncReadCompatExt as _;

const LONG: Duration = Duration::from_secs(20);

/// A forwarder to `port`; it runs for as long as the set of tasks.
fn forwarder(port: u16) -> (Dialer, JoinSet<()>) {
    let (near, far): (DuplexStream, DuplexStream) = tokio::io::duplex(64 << 10);
    let (dialer, carrying) = dial::over(near.compat());
    let mut tasks = JoinSet::new();
    tasks.spawn(async { drop(carrying.await) });
    tasks.spawn(async move { drop(forward::serve(far.compat(), NonZeroU16::new(port).unwrap()).await) });
    (dialer, tasks)
}

async fn listening() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

async fn connected(dialer: &Dialer, listener: &TcpListener) -> (UnixStream, TcpStream) {
    let (ours, theirs) = tokio::join!(dialer.connect(), listener.accept());
    (ours.unwrap(), theirs.unwrap().0)
}

#[tokio::test]
async fn bytes_and_half_closes_are_carried_both_ways() {
    let (listener, port) = listening().await;
    let (dialer, _tasks) = forwarder(port);
    let (mut ours, mut theirs) = connected(&dialer, &listener).await;
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    let echo = async {
        let mut all = Vec::new();
        theirs.read_to_end(&mut all).await.unwrap();
        // Our side is closed: theirs still speaks.
        theirs.write_all(&all).await.unwrap();
        theirs.shutdown().await.unwrap();
    };
    let ask = async {
        ours.write_all(&sent).await.unwrap();
        ours.shutdown().await.unwrap();
        let mut all = Vec::new();
        ours.read_to_end(&mut all).await.unwrap();
        all
    };
    let ((), received) = timeout(LONG, async { tokio::join!(echo, ask) }).await.unwrap();
    assert!(received == sent);
}

#[tokio::test]
async fn a_closed_port_is_told_as_such() {
    let (listener, port) = listening().await;
    drop(listener);
    let (dialer, _tasks) = forwarder(port);
    let error = timeout(LONG, dialer.connect()).await.unwrap().unwrap_err();
    assert!(matches!(error, DialError::Unanswered(Answer::Closed)), "{error}");
}

#[tokio::test]
async fn streams_have_a_bound_and_those_that_ended_make_room() {
    let (listener, port) = listening().await;
    let (dialer, _tasks) = forwarder(port);
    let mut open = Vec::new();
    for _ in 0..STREAMS_MAX {
        open.push(connected(&dialer, &listener).await);
    }
    assert!(timeout(Duration::from_millis(200), dialer.connect()).await.is_err(), "one more than the bound");
    // A guest that never ends its side holds nothing once the user has gone.
    let (ours, mut theirs) = open.pop().unwrap();
    drop(ours);
    timeout(LONG, connected(&dialer, &listener)).await.unwrap();
    assert_eq!(theirs.read(&mut [0]).await.unwrap(), 0);
    assert!(timeout(LONG, connection_is_dead(&mut theirs)).await.is_ok());
}

async fn connection_is_dead(stream: &mut TcpStream) -> io::Error {
    loop {
        if let Err(error) = stream.write_all(&[0; 1024]).await {
            return error;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_stalled_stream_delays_no_other() {
    let (listener, port) = listening().await;
    let (dialer, _tasks) = forwarder(port);
    let (mut stalled, _never_read) = connected(&dialer, &listener).await;
    let fill = async {
        loop {
            stalled.write_all(&vec![0; 64 << 10]).await.unwrap();
        }
    };
    assert!(timeout(Duration::from_millis(500), fill).await.is_err(), "nothing stored it all");
    let (mut ours, mut theirs) = timeout(LONG, connected(&dialer, &listener)).await.unwrap();
    ours.write_all(b"x").await.unwrap();
    assert_eq!(timeout(LONG, theirs.read_u8()).await.unwrap().unwrap(), b'x');
}

#[tokio::test]
async fn the_forwarder_ends_with_its_daemon_and_its_connections_with_it() {
    let (listener, port) = listening().await;
    let (near, far) = tokio::io::duplex(64 << 10);
    let (dialer, carrying) = dial::over(near.compat());
    let mut daemon = JoinSet::new();
    daemon.spawn(async { drop(carrying.await) });
    let mut served = JoinSet::new();
    served.spawn(async move { forward::serve(far.compat(), NonZeroU16::new(port).unwrap()).await });
    let (mut ours, mut theirs) = connected(&dialer, &listener).await;
    daemon.shutdown().await;
    timeout(LONG, served.join_next()).await.unwrap().unwrap().unwrap().unwrap();
    drop(served);
    assert!(matches!(theirs.read(&mut [0]).await, Ok(0) | Err(_)));
    assert_eq!(ours.read(&mut [0]).await.unwrap(), 0);
    assert!(matches!(dialer.connect().await, Err(DialError::Gone)));
}
