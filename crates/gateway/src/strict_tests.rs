//! Tables of message shapes, good and bad, and what any cut of the bytes must not change.

use proptest::prelude::*;

use super::*;

/// Feeds `bytes` in pieces of `step`, and says how many were cleared.
fn feed(bytes: &[u8], step: usize) -> Result<usize, Violation> {
    let mut inspector = Inspector::default();
    let (mut cleared, mut arrived) = (0, 0);
    loop {
        let taken = inspector.advance(&bytes[cleared..arrived])?;
        cleared += taken;
        if taken == 0 {
            if arrived == bytes.len() {
                return Ok(cleared);
            }
            arrived = (arrived + step).min(bytes.len());
        }
    }
}

#[test]
fn plain_requests_are_handed_over_whole() {
    for text in [
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.0\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1A;x=y\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\n\r\n",
        "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\nDigest: abc\r\nX: y\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET http://a/x HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n\r\n\x00\nanything",
        "\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\na\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX_Y: b\r\nsession_id: c\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX-Long: \t v v \r\nEmpty:\r\n\r\n",
    ] {
        for step in [1, 2, 3, 7, text.len()] {
            assert_eq!(feed(text.as_bytes(), step), Ok(text.len()), "{text:?} in steps of {step}");
        }
    }
}

#[test]
fn v7_request_smuggling_shapes_are_refused() {
    for text in [
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3, 3\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x3\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n",
        "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        "GET / HTTP/1.1\nHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\n\n",
        "GET / HTTP/1.1\rHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX : b\r\n\r\n",
        "GET / HTTP/1.1\r\n X: b\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX_Forwarded_For: b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nx_forwarded-user: b\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent_Length: 3\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer_Encoding: chunked\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX-Real_IP: b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nProxy_Connection: b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
        "GET / HTTP/2.0\r\nHost: a\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "GET /\r\nHost: a\r\n\r\n",
        "GET @10.0.0.1/ HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET 10.0.0.1:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /\x7f HTTP/1.1\r\nHost: a\r\n\r\n",
        "CONNECT 10.0.0.1:22 HTTP/1.1\r\nHost: a\r\n\r\n",
        "\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /\u{e4} HTTP/1.1\r\nHost: a\r\n\r\n",
        "\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: close, X-Forwarded-For\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 4\r\n\r\n",
    ] {
        for step in [1, 5, text.len()] {
            assert!(matches!(feed(text.as_bytes(), step), Err(Violation::Malformed(_))), "{text:?} in steps of {step}");
        }
    }
}

#[test]
fn address_is_refused_for_what_is_wrong_with_it() {
    let sentence = |target: &str| {
        let text = format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n");
        feed(text.as_bytes(), text.len()).expect_err("it is refused").to_string()
    };
    for target in ["/\u{e4}", "/a#b", "/\u{7f}"] {
        assert!(sentence(target).contains("percent-encoded"), "{target:?}");
    }
    assert!(sentence("a/b").contains("does not begin with '/'"));
}

#[test]
fn v7_odd_chunks_are_refused() {
    for body in [
        "3\nabc\r\n0\r\n\r\n",
        "3\r\nabcd\r\n0\r\n\r\n",
        "3\r\nabc\n0\r\n\r\n",
        "0x3\r\nabc\r\n",
        " 3\r\nabc\r\n",
        "3 \r\nabc\r\n",
        "-3\r\nabc\r\n",
        "\r\nabc\r\n",
        "fffffffffffffffff\r\nabc\r\n",
        "3;\x01\r\nabc\r\n",
        "0\r\nContent-Length: 3\r\n\r\n",
        "0\r\nX : y\r\n\r\n",
        "0\r\nX: y\n\r\n",
    ] {
        let text = format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
        for step in [1, 4, text.len()] {
            assert!(feed(text.as_bytes(), step).is_err(), "{body:?} in steps of {step}");
        }
    }
    let long = format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;{}", "x".repeat(300));
    assert!(feed(long.as_bytes(), 10).is_err());
}

#[test]
fn v7_large_heads_have_their_own_answers() {
    let fields = "X: y\r\n".repeat(FIELDS_MAX);
    let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
    assert_eq!(feed(many.as_bytes(), 100), Err(Violation::HeadTooLarge));
    let long = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "y".repeat(HEAD_BYTES_MAX));
    assert_eq!(feed(long.as_bytes(), 1000), Err(Violation::HeadTooLarge));
    let target = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "y".repeat(TARGET_BYTES_MAX));
    assert_eq!(feed(target.as_bytes(), 1000), Err(Violation::TargetTooLong));
    let expect = "GET / HTTP/1.1\r\nHost: a\r\nExpect: tea\r\n\r\n";
    assert_eq!(feed(expect.as_bytes(), 1000), Err(Violation::ExpectationUnknown));
}

proptest! {
    /// How the network cuts the bytes never changes what is cleared or refused.
    #[test]
    fn cuts_do_not_matter(
        text in "(\r\n){0,2}(POST|GET) /[a#_ ]{0,2} HTTP/1\\.[01]\r?\n(Host: a\r\n){0,2}(Content-Length: [0-3]\r\n){0,2}(Transfer-Encoding: chunked\r\n){0,1}\r\n([0-3]\r\n[abc]{0,3}\r\n){0,2}",
        step in 1_usize..9,
    ) {
        let whole = feed(text.as_bytes(), text.len().max(1));
        let cut = feed(text.as_bytes(), step);
        prop_assert_eq!(whole.is_ok(), cut.is_ok());
        if let (Ok(whole), Ok(cut)) = (whole, cut) {
            prop_assert_eq!(whole, cut);
        }
    }

    /// No input makes the inspector panic, loop, or clear more than there is.
    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..512), step in 1_usize..64) {
        if let Ok(cleared) = feed(&bytes, step) {
            prop_assert!(cleared <= bytes.len());
        }
    }
}
