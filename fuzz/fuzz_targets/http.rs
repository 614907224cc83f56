//! What a visitor sends to the gateway. The strict inspector clears bytes for the HTTP library behind it: both must see
//! the same requests begin at the same places, however the bytes are cut on their way.
#![no_main]

// The one file, without the gateway around it, which would make this the longest build by far.
#[path = "../../crates/gateway/src/strict.rs"]
#[allow(dead_code, unreachable_pub, reason = "the gateway uses the rest")]
mod strict;

use std::{
    cell::RefCell,
    convert::Infallible,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use futures_executor::block_on;
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
    rt::{Read, ReadBufCursor, Write},
    server::conn::http1,
    service::service_fn,
};
use libfuzzer_sys::fuzz_target;
use strict::{FIELDS_MAX, HEAD_BYTES_MAX, Inspector};

/// What the inspector makes of a connection.
#[derive(Debug, PartialEq, Eq)]
struct Cleared {
    bytes: Vec<u8>,
    /// Where each request begins.
    heads: Vec<usize>,
    /// Whether the last request is complete.
    whole: bool,
    refused: bool,
}

fuzz_target!(|data: &[u8]| {
    let cleared = inspect(data, usize::MAX);
    assert!(data.starts_with(&cleared.bytes));
    assert_eq!(inspect(data, 1), cleared, "the cut of the bytes matters");
    let seen = serve(&cleared.bytes);
    for (index, (line, body_is_whole)) in seen.requests.iter().enumerate() {
        let start = *cleared.heads.get(index).expect("the library sees a request that was not cleared");
        let head = &cleared.bytes[start..];
        // One empty line in front of a request is let through, and the library skips it.
        let head = head.strip_prefix(b"\r\n").unwrap_or(head);
        assert!(head.starts_with(line.as_bytes()), "request {index} begins elsewhere: {line:?}");
        let complete = index + 1 < cleared.heads.len() || cleared.whole;
        assert!(*body_is_whole || !complete, "request {index}: the library finds its body cut or wrong");
    }
    let left = &cleared.heads[seen.requests.len()..];
    if let Some(start) = left.first() {
        assert!(seen.closed || !has_plain_target(&cleared.bytes[*start..]), "a cleared request is not accepted");
    }
});

fn inspect(data: &[u8], step: usize) -> Cleared {
    let mut inspector = Inspector::default();
    let mut cleared = Cleared { bytes: Vec::new(), heads: Vec::new(), whole: true, refused: false };
    let mut visible = step.min(data.len());
    loop {
        let at_head = inspector.in_head();
        match inspector.advance(&data[cleared.bytes.len()..visible]) {
            Ok(0) if visible == data.len() => break,
            Ok(0) => visible = visible.saturating_add(step).min(data.len()),
            Ok(count) => {
                if at_head {
                    cleared.heads.push(cleared.bytes.len());
                }
                cleared.bytes.extend_from_slice(&data[cleared.bytes.len()..][..count]);
            }
            Err(_) => {
                cleared.refused = true;
                break;
            }
        }
        if inspector.is_opaque() {
            break;
        }
    }
    cleared.whole = inspector.in_head();
    cleared
}

/// What the library makes of the same bytes.
struct Seen {
    /// Beginning of the request line, and whether the body arrived whole.
    requests: Vec<(String, bool)>,
    /// A request has said that the connection ends behind it.
    closed: bool,
}

fn serve(bytes: &[u8]) -> Seen {
    let seen = RefCell::new(Seen { requests: Vec::new(), closed: false });
    let service = service_fn(|request: Request<Incoming>| {
        let seen = &seen;
        async move {
            let version = request.version();
            let words = |name: &str| {
                let values = request.headers().get_all(name).into_iter();
                values.map(|value| value.as_bytes().to_ascii_lowercase()).collect::<Vec<_>>()
            };
            let connection = words("connection").concat();
            let closes = ["close", "upgrade"]
                .iter()
                .any(|word| connection.windows(word.len()).any(|window| window == word.as_bytes()));
            let line = request.method().to_string() + " ";
            let body_is_whole = request.into_body().collect().await.is_ok();
            let mut seen = seen.borrow_mut();
            seen.closed |= closes || version != http::Version::HTTP_11 || !body_is_whole;
            seen.requests.push((line, body_is_whole));
            Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
        }
    });
    let mut builder = http1::Builder::new();
    builder.half_close(true).max_headers(2 * FIELDS_MAX).max_buf_size(2 * HEAD_BYTES_MAX);
    // Whether it ends well is told by what was seen.
    drop(block_on(builder.serve_connection(Visitor { bytes: bytes.to_vec(), at: 0 }, service)));
    seen.into_inner()
}

/// The library refuses some bytes in a target that the inspector lets through; it then answers 400 and closes.
fn has_plain_target(head: &[u8]) -> bool {
    let target = head.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
    http::Uri::try_from(target).is_ok()
}

/// A connection whose visitor has sent everything, and reads nothing.
struct Visitor {
    bytes: Vec<u8>,
    at: usize,
}

impl Read for Visitor {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, mut buffer: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let rest = &this.bytes[this.at..];
        let count = rest.len().min(buffer.remaining());
        buffer.put_slice(&rest[..count]);
        this.at += count;
        Poll::Ready(Ok(()))
    }
}

impl Write for Visitor {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
