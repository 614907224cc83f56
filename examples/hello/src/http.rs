//! Just enough of HTTP/1.1 for the example: one request's head, its body as a reader, and the bytes of an answer.

use std::io::{self, BufRead, Error, ErrorKind, Read, Write};

const MAX_HEAD: u64 = 64 * 1024;
const MAX_LINE: u64 = 1024;
const MAX_TRAILERS: usize = 64;

/// One request's head: as received, and taken apart.
#[derive(Debug)]
pub(crate) struct Head {
    /// The bytes from the request line to the empty line.
    pub(crate) raw: Vec<u8>,
    pub(crate) method: String,
    pub(crate) path: String,
    headers: Vec<(String, String)>,
    http10: bool,
}

impl Head {
    /// Reads the next head; `None` when the peer closed the connection between two requests.
    pub(crate) fn read(input: &mut impl BufRead) -> io::Result<Option<Self>> {
        let mut raw = Vec::new();
        let mut bounded = input.take(MAX_HEAD);
        loop {
            let start = raw.len();
            if bounded.read_until(b'\n', &mut raw)? == 0 || raw.last() != Some(&b'\n') {
                return if raw.is_empty() { Ok(None) } else { Err(bad("the head is cut off or too long")) };
            }
            if matches!(&raw[start..], b"\r\n" | b"\n") {
                break;
            }
        }
        Self::parse(raw).map(Some)
    }

    fn parse(raw: Vec<u8>) -> io::Result<Self> {
        let text = str::from_utf8(&raw).map_err(|_| bad("the head is not UTF-8"))?;
        let mut lines = text.lines();
        let mut first = lines.next().unwrap_or_default().split(' ');
        let (Some(method), Some(target), Some(version), None) =
            (first.next(), first.next(), first.next(), first.next())
        else {
            return Err(bad("the request line does not have three words"));
        };
        if !version.starts_with("HTTP/1.") || !target.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(bad("the request line is not HTTP/1"));
        }
        let headers = lines
            .take_while(|line| !line.is_empty())
            .map(|line| line.split_once(':').map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| bad("a header line has no colon"))?;
        let path = target.split('?').next().unwrap_or(target).to_owned();
        let (method, http10) = (method.to_owned(), version == "HTTP/1.0");
        Ok(Self { raw, method, path, headers, http10 })
    }

    /// The first value of a header, by its name in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Whether a comma-separated header holds this word.
    pub(crate) fn has_word(&self, name: &str, word: &str) -> bool {
        let same = |part: &str| part.trim().eq_ignore_ascii_case(word);
        self.headers.iter().any(|(key, value)| key == name && value.split(',').any(same))
    }

    /// Whether the client allows another request on this connection.
    pub(crate) fn keeps_alive(&self) -> bool {
        !self.has_word("connection", "close") && (!self.http10 || self.has_word("connection", "keep-alive"))
    }

    /// How the body's end is told.
    pub(crate) fn framing(&self) -> io::Result<Framing> {
        match (self.header("transfer-encoding"), self.header("content-length")) {
            (Some(coding), None) if coding.eq_ignore_ascii_case("chunked") => {
                Ok(Framing::Chunked { left: 0, first: true })
            }
            (Some(_), _) => Err(bad("the body's transfer coding is not understood")),
            (None, Some(length)) if length.bytes().all(|byte| byte.is_ascii_digit()) => {
                length.parse().map(Framing::Length).map_err(|_| bad("the content length is not a number"))
            }
            (None, Some(_)) => Err(bad("the content length is not a number")),
            (None, None) => Ok(Framing::Length(0)),
        }
    }
}

/// How much of a body is still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// So many bytes.
    Length(u64),
    /// Chunks; `left` bytes of the present one.
    Chunked { left: u64, first: bool },
}

/// A request's body, without its framing.
#[derive(Debug)]
pub(crate) struct Body<'input, R> {
    pub(crate) input: &'input mut R,
    pub(crate) framing: Framing,
}

impl<R: BufRead> Read for Body<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Framing::Chunked { left: 0, first } = self.framing {
            self.framing = next_chunk(self.input, first)?;
        }
        let (Framing::Length(left) | Framing::Chunked { left, .. }) = &mut self.framing;
        let count = self.input.by_ref().take(*left).read(buffer)?;
        if count == 0 && *left > 0 && !buffer.is_empty() {
            return Err(bad("the body is cut off"));
        }
        *left -= count as u64;
        Ok(count)
    }
}

fn next_chunk(input: &mut impl BufRead, first: bool) -> io::Result<Framing> {
    if !first && !line(input)?.is_empty() {
        return Err(bad("a chunk is longer than it says"));
    }
    let text = line(input)?;
    let digits = text.split(';').next().unwrap_or_default().trim();
    if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(bad("a chunk's size is not a number"));
    }
    let left = u64::from_str_radix(digits, 16).map_err(|_| bad("a chunk's size is not a number"))?;
    if left > 0 {
        return Ok(Framing::Chunked { left, first: false });
    }
    for _ in 0..MAX_TRAILERS {
        if line(input)?.is_empty() {
            return Ok(Framing::Length(0));
        }
    }
    Err(bad("too many trailers"))
}

fn line(input: &mut impl BufRead) -> io::Result<String> {
    let mut text = String::new();
    input.take(MAX_LINE).read_line(&mut text)?;
    let ended = text.strip_suffix('\n').ok_or_else(|| bad("a line is cut off or too long"))?;
    Ok(ended.strip_suffix('\r').unwrap_or(ended).to_owned())
}

/// Writes one chunk of a chunked body; an empty one would end the body, so it is left out.
pub(crate) fn write_chunk(output: &mut impl Write, data: &[u8]) -> io::Result<()> {
    if data.is_empty() {
        return Ok(());
    }
    let mut chunk = format!("{:x}\r\n", data.len()).into_bytes();
    chunk.extend_from_slice(data);
    chunk.extend_from_slice(b"\r\n");
    output.write_all(&chunk)
}

fn bad(what: &'static str) -> Error {
    Error::new(ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn read_body(framing: Framing, mut input: &[u8]) -> io::Result<Vec<u8>> {
        let mut data = Vec::new();
        Body { input: &mut input, framing }.read_to_end(&mut data).map(|_| data)
    }

    #[test]
    fn bodies_end_where_their_framing_says() {
        let chunked = Framing::Chunked { left: 0, first: true };
        assert_eq!(read_body(Framing::Length(3), b"abcdef").unwrap(), b"abc");
        assert_eq!(read_body(chunked, b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nT: 1\r\n\r\nrest").unwrap(), b"abcde");
        for cut in [&b"3\r\nab"[..], b"3\r\nabcd\r\n", b"zz\r\n", b"3\r\nabc\r\n", b"0\r\n"] {
            assert!(read_body(chunked, cut).is_err(), "{cut:?}");
        }
        assert!(read_body(Framing::Length(3), b"ab").is_err());
    }

    #[test]
    fn heads_are_parsed_strictly() {
        let mut input = &b"GET /a?b HTTP/1.1\r\nX-A:  1\r\nConnection: Upgrade, close\r\n\r\nbody"[..];
        let head = Head::read(&mut input).unwrap().unwrap();
        assert_eq!((head.method.as_str(), head.path.as_str(), head.header("x-a")), ("GET", "/a", Some("1")));
        assert!(!head.keeps_alive() && head.has_word("connection", "upgrade"));
        assert_eq!(input, b"body");
        for bad in [
            &b"GET /\r\n\r\n"[..],
            b"GET / HTTP/1.1\r\nnope\r\n\r\n",
            b"GET / HTTP/1.1\r\nA: b\r\n",
            b"GET /\x01 HTTP/1.1\r\n\r\n",
        ] {
            assert!(Head::read(&mut &*bad).is_err(), "{bad:?}");
        }
    }
}
