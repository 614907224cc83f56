//! Frames: what one side writes the other reads, within a size and a time.

use std::time::Duration;

use futures::{AsyncReadExt, AsyncWriteExt};
use minicbor::{Decode, Encode};
use peer_net::exchange::{
    Budget, Deadline, ExchangeError, read_frame, read_frame_bytes, read_frame_within, write_frame, write_frame_bytes,
};
use peer_proto::frame::FrameError;
use tokio_util::compat::TokioAsyncReadCompatExt;

const LIMIT: usize = 64;

#[derive(Debug, PartialEq, Encode, Decode)]
#[cbor(map)]
struct Message {
    #[n(0)]
    text: String,
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_mins(1))
}

#[tokio::test]
async fn message_arrives_whole() {
    let (left, right) = tokio::io::duplex(7);
    let (mut left, mut right) = (left.compat(), right.compat());
    let message = Message { text: "hello".into() };
    let (sent, received) = tokio::join!(
        write_frame(&mut left, &message, LIMIT, soon()),
        read_frame::<Message, _>(&mut right, LIMIT, soon())
    );
    sent.unwrap();
    assert_eq!(received.unwrap(), message);
}

#[tokio::test]
async fn frame_longer_than_its_limit_is_neither_sent_nor_read() {
    let (left, right) = tokio::io::duplex(1024);
    let (mut left, mut right) = (left.compat(), right.compat());
    let too_long = |error| matches!(error, ExchangeError::Frame(FrameError::TooLong { length: 65, limit: LIMIT }));
    assert!(too_long(write_frame_bytes(&mut left, &[0; 65], LIMIT, soon()).await.unwrap_err()));
    write_frame_bytes(&mut left, &[0; 65], 65, soon()).await.unwrap();
    assert!(too_long(read_frame_bytes(&mut right, LIMIT, soon()).await.unwrap_err()));
}

#[tokio::test]
async fn announced_length_alone_is_not_believed() {
    let (left, right) = tokio::io::duplex(1024);
    let (mut left, mut right) = (left.compat(), right.compat());
    left.write_all(&[0xff, 0xff, 0xff, 0xff]).await.unwrap();
    assert!(matches!(read_frame_bytes(&mut right, LIMIT, soon()).await, Err(ExchangeError::Frame(_))));
}

#[tokio::test]
async fn end_between_frames_differs_from_an_end_inside_one() {
    for (sent, ended) in [(&[][..], true), (&[0, 0][..], false), (&[0, 0, 0, 9, 1][..], false)] {
        let (left, right) = tokio::io::duplex(1024);
        let (mut left, mut right) = (left.compat(), right.compat());
        left.write_all(sent).await.unwrap();
        left.close().await.unwrap();
        let error = read_frame_bytes(&mut right, LIMIT, soon()).await.unwrap_err();
        assert_eq!(matches!(error, ExchangeError::Ended), ended, "{error:?}");
        assert_eq!(matches!(error, ExchangeError::Broken(_)), !ended, "{error:?}");
    }
}

#[tokio::test]
async fn silent_and_blocked_streams_end_at_the_deadline() {
    let (left, right) = tokio::io::duplex(8);
    let (mut left, mut right) = (left.compat(), right.compat());
    let passed = Deadline::after(Duration::from_millis(1));
    assert!(matches!(read_frame_bytes(&mut right, LIMIT, passed).await, Err(ExchangeError::TimedOut)));
    assert_eq!(passed.remaining(), Duration::ZERO);
    let short = Deadline::after(Duration::from_millis(1));
    assert!(matches!(write_frame_bytes(&mut left, &[1; 64], LIMIT, short).await, Err(ExchangeError::TimedOut)));
}

#[tokio::test]
async fn bytes_after_a_frame_are_left_in_the_stream() {
    let (left, right) = tokio::io::duplex(1024);
    let (mut left, mut right) = (left.compat(), right.compat());
    write_frame_bytes(&mut left, b"frame", LIMIT, soon()).await.unwrap();
    left.write_all(b"raw").await.unwrap();
    left.close().await.unwrap();
    assert_eq!(read_frame_bytes(&mut right, LIMIT, soon()).await.unwrap(), b"frame");
    let mut rest = Vec::new();
    right.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"raw");
}

/// Messages that announce much hold their sender's own part of the memory, and nobody else's.
#[tokio::test]
async fn v5_half_read_messages_are_bounded_for_each_peer_and_wait() {
    const MUCH: usize = 64 * 1024;
    let all = Budget::for_all(4 * MUCH);
    let (greedy, modest) = (all.share(MUCH), all.share(MUCH));
    let message = Message { text: "x".repeat(MUCH - 100) };
    // It announces, and sends no more than that.
    let (mut silent, right) = tokio::io::duplex(1024);
    let mut right = right.compat();
    tokio::io::AsyncWriteExt::write_all(&mut silent, &u32::to_be_bytes(60_000)).await.unwrap();
    let stuck = read_frame_within::<Message, _>(&mut right, MUCH, soon(), &greedy);
    let others = async {
        let pass = async |budget: &Budget, deadline| {
            let (left, right) = tokio::io::duplex(1024);
            let (mut left, mut right) = (left.compat(), right.compat());
            let writing = write_frame(&mut left, &message, MUCH, deadline);
            let reading = read_frame_within::<Message, _>(&mut right, MUCH, deadline, budget);
            tokio::join!(reading, async { drop(writing.await) }).0
        };
        let waiting = pass(&greedy, Deadline::after(Duration::from_millis(200))).await;
        assert!(matches!(waiting, Err(ExchangeError::TimedOut)), "the greedy one's own waits");
        let (received, reserved) = pass(&modest, soon()).await.unwrap();
        assert_eq!(received, message);
        assert!(reserved.is_some(), "as long as it is looked at, it counts");
    };
    tokio::select! {
        _ = stuck => panic!("nothing more was sent"),
        () = others => {}
    }
}
