//! What a visitor may send: HTTP/1.1 in its plain form only, so that no two parsers can read one message differently.
//!
//! [`Inspector`] looks at the bytes of a visitor's connection before the HTTP library does. It hands over a message's
//! head only when it is whole and beyond doubt, and follows the body to find the next head. It is pure: bytes in,
//! a count of cleared bytes or a [`Violation`] out.

/// Longest head (bytes): request line and all fields.
pub const HEAD_BYTES_MAX: usize = 32 * 1024;
/// Most header fields.
pub const FIELDS_MAX: usize = 100;
/// Longest request target (bytes).
pub const TARGET_BYTES_MAX: usize = 8 * 1024;
/// Longest method (bytes).
const METHOD_BYTES_MAX: usize = 32;
/// Longest line that announces a chunk (bytes): sixteen digits and a small extension.
const CHUNK_LINE_MAX: usize = 256;
/// Longest trailer section (bytes).
const TRAILER_BYTES_MAX: usize = 8 * 1024;

/// Fields that the gateway sets itself. A visitor may send them (they are replaced), but may not have them removed on
/// the way by naming them in `Connection`.
const OURS: &[&str] = &[
    "forwarded",
    "via",
    "x-real-ip",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-forwarded-host",
    "host",
    "content-length",
    "transfer-encoding",
    "content-type",
    "cookie",
    "authorization",
    "origin",
];

/// Further fields that the gateway acts on or sets. With `_` for `-`, programs behind it might take a visitor's field for
/// one of these or of [`OURS`].
const ACTED_ON: &[&str] = &[
    "connection",
    "expect",
    "http2-settings",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "upgrade",
];

/// Why a message is refused; the text is shown to the visitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The message is not HTTP/1.1 as the standard writes it.
    #[error("{0}")]
    Malformed(&'static str),
    /// The request target is longer than [`TARGET_BYTES_MAX`].
    #[error("the address is longer than {TARGET_BYTES_MAX} bytes")]
    TargetTooLong,
    /// The head is longer than [`HEAD_BYTES_MAX`] or has more than [`FIELDS_MAX`] fields.
    #[error("the header fields are more than {FIELDS_MAX} or longer than {HEAD_BYTES_MAX} bytes together")]
    HeadTooLarge,
    /// An expectation other than `100-continue`.
    #[error("the only expectation understood here is 100-continue")]
    ExpectationUnknown,
    /// The head did not arrive in time.
    #[error("the header fields did not arrive in time")]
    HeadTimedOut,
}

impl Violation {
    /// The HTTP status that answers it.
    pub fn status(self) -> http::StatusCode {
        match self {
            Self::Malformed(_) => http::StatusCode::BAD_REQUEST,
            Self::TargetTooLong => http::StatusCode::URI_TOO_LONG,
            Self::HeadTooLarge => http::StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::ExpectationUnknown => http::StatusCode::EXPECTATION_FAILED,
            Self::HeadTimedOut => http::StatusCode::REQUEST_TIMEOUT,
        }
    }
}

/// Where a connection stands between two bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// In front of a request or inside its head; so many bytes are known to hold no end of it.
    Head { scanned: usize },
    /// Inside a body of known length.
    Fixed { left: u64 },
    /// In front of a chunk's announcement.
    ChunkLine,
    /// Inside a chunk, including the line end behind it.
    Chunk { left: u64 },
    /// In the fields behind the last chunk.
    Trailer { scanned: usize },
    /// After a request to switch to WebSocket: bytes are no longer HTTP, or the connection ends after the answer.
    Opaque,
}

/// Follows the requests of one connection.
#[derive(Debug)]
pub struct Inspector {
    stage: Stage,
}

/// How a head says that its body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    Fixed(u64),
    Chunked,
    Upgrade,
}

impl Default for Inspector {
    fn default() -> Self {
        Self { stage: Stage::Head { scanned: 0 } }
    }
}

impl Inspector {
    /// True in front of a request or inside its head.
    pub fn in_head(&self) -> bool {
        matches!(self.stage, Stage::Head { .. })
    }

    /// True once the bytes are no longer HTTP.
    pub fn is_opaque(&self) -> bool {
        self.stage == Stage::Opaque
    }

    /// How many leading bytes of `input` may be handed over; zero asks for more. The next call starts behind them.
    /// Never goes beyond the end of one request.
    pub fn advance(&mut self, input: &[u8]) -> Result<usize, Violation> {
        match self.stage {
            Stage::Head { scanned } => self.head(input, scanned),
            Stage::Fixed { left } => Ok(self.body(input, left)),
            Stage::Chunk { left } => self.chunk(input, left),
            Stage::ChunkLine => self.chunk_line(input),
            Stage::Trailer { scanned } => self.trailer(input, scanned),
            Stage::Opaque => Ok(input.len()),
        }
    }

    fn head(&mut self, input: &[u8], scanned: usize) -> Result<usize, Violation> {
        // Old programs end a body with an empty line that does not belong to it (RFC 9112, 2.2).
        let lead = if input.starts_with(b"\r\n") { 2 } else { 0 };
        let Some(end) = section_end(input, scanned)? else {
            if input.len() >= HEAD_BYTES_MAX {
                return Err(if input[lead..].contains(&b'\n') {
                    Violation::HeadTooLarge
                } else {
                    Violation::TargetTooLong
                });
            }
            self.stage = Stage::Head { scanned: input.len() };
            return Ok(0);
        };
        if end > HEAD_BYTES_MAX {
            return Err(Violation::HeadTooLarge);
        }
        self.stage = match check_head(&input[lead..end])? {
            Framing::Fixed(0) => Stage::Head { scanned: 0 },
            Framing::Fixed(left) => Stage::Fixed { left },
            Framing::Chunked => Stage::ChunkLine,
            Framing::Upgrade => Stage::Opaque,
        };
        Ok(end)
    }

    fn body(&mut self, input: &[u8], left: u64) -> usize {
        let taken = input.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let left = left - taken as u64;
        self.stage = if left == 0 { Stage::Head { scanned: 0 } } else { Stage::Fixed { left } };
        taken
    }

    /// `left` counts the chunk's bytes and the two of the line end.
    fn chunk(&mut self, input: &[u8], left: u64) -> Result<usize, Violation> {
        if left > 2 {
            let taken = input.len().min(usize::try_from(left - 2).unwrap_or(usize::MAX));
            self.stage = Stage::Chunk { left: left - taken as u64 };
            return Ok(taken);
        }
        match input {
            [b'\r', b'\n', ..] => {
                self.stage = Stage::ChunkLine;
                Ok(2)
            }
            [] | [b'\r'] => Ok(0),
            _ => Err(Violation::Malformed("a chunk of the body is longer than it says")),
        }
    }

    fn chunk_line(&mut self, input: &[u8]) -> Result<usize, Violation> {
        let Some(end) = line_end(input, 0)? else {
            return if input.len() >= CHUNK_LINE_MAX {
                Err(Violation::Malformed("the line in front of a chunk is too long"))
            } else {
                Ok(0)
            };
        };
        if end > CHUNK_LINE_MAX {
            return Err(Violation::Malformed("the line in front of a chunk is too long"));
        }
        let size = chunk_size(&input[..end - 2])?;
        self.stage = match size {
            0 => Stage::Trailer { scanned: 0 },
            size => Stage::Chunk { left: size + 2 },
        };
        Ok(end)
    }

    fn trailer(&mut self, input: &[u8], scanned: usize) -> Result<usize, Violation> {
        if input.starts_with(b"\r\n") {
            self.stage = Stage::Head { scanned: 0 };
            return Ok(2);
        }
        let end = section_end(input, scanned)?;
        if end.unwrap_or(input.len()) > TRAILER_BYTES_MAX {
            return Err(Violation::HeadTooLarge);
        }
        let Some(end) = end else {
            self.stage = Stage::Trailer { scanned: input.len() };
            return Ok(0);
        };
        for line in lines(&input[..end - 2]) {
            let (name, _) = field(line)?;
            let framing = ["content-length", "transfer-encoding", "host", "connection", "upgrade", "authorization"];
            if framing.iter().any(|forbidden| name.eq_ignore_ascii_case(forbidden)) {
                return Err(Violation::Malformed("a trailer holds a field that belongs in front of the body"));
            }
        }
        self.stage = Stage::Head { scanned: 0 };
        Ok(end)
    }
}

/// Position behind the first line end at or after `from`; a line feed or carriage return on its own is refused.
fn line_end(input: &[u8], from: usize) -> Result<Option<usize>, Violation> {
    for (position, &byte) in input.iter().enumerate().skip(from) {
        match byte {
            b'\n' if position > 0 && input[position - 1] == b'\r' => return Ok(Some(position + 1)),
            b'\n' => return Err(Violation::Malformed("a line ends with a bare line feed")),
            0 => return Err(Violation::Malformed("the header fields hold a zero byte")),
            _ if position > 0 && input[position - 1] == b'\r' => {
                return Err(Violation::Malformed("a carriage return stands on its own"));
            }
            _ => {}
        }
    }
    Ok(None)
}

/// Position behind the empty line that ends a head; bytes before `scanned` have been looked at.
fn section_end(input: &[u8], scanned: usize) -> Result<Option<usize>, Violation> {
    // The last three bytes seen before may be the beginning of the end.
    let mut from = scanned.saturating_sub(3);
    while let Some(end) = line_end(input, from)? {
        if end >= 4 && input[end - 4..end] == *b"\r\n\r\n" {
            return Ok(Some(end));
        }
        from = end;
    }
    Ok(None)
}

/// The lines of a section that ends with a line end, without their ends.
fn lines(section: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = section;
    std::iter::from_fn(move || {
        let end = rest.windows(2).position(|pair| pair == b"\r\n")?;
        let line = &rest[..end];
        rest = &rest[end + 2..];
        Some(line)
    })
}

fn chunk_size(line: &[u8]) -> Result<u64, Violation> {
    const WRONG: Violation = Violation::Malformed("the size of a chunk is not a plain hexadecimal number");
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (size, extension) = line.split_at(digits);
    if !(1..=15).contains(&digits) || !matches!(extension.first(), None | Some(b';')) {
        return Err(WRONG);
    }
    if !extension.iter().all(|byte| (0x20..0x7f).contains(byte)) {
        return Err(WRONG);
    }
    let size = std::str::from_utf8(size).map_err(|_| WRONG)?;
    u64::from_str_radix(size, 16).map_err(|_| WRONG)
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Splits a header line strictly: no space before the colon, no continuation, no control bytes.
fn field(line: &[u8]) -> Result<(&str, &[u8]), Violation> {
    if line.first().is_some_and(|byte| matches!(byte, b' ' | b'\t')) {
        return Err(Violation::Malformed("a header line continues the one before it, which is obsolete"));
    }
    let colon = line.iter().position(|byte| *byte == b':').ok_or(Violation::Malformed("a header line has no colon"))?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    if name.is_empty() || !name.iter().copied().all(is_token) {
        return Err(Violation::Malformed("the name of a header field holds a byte that is not allowed"));
    }
    if name.contains(&b'_') && reads_as_ours(name) {
        return Err(Violation::Malformed("the name of a header field has '_' where '-' would mean another field"));
    }
    if !value.iter().all(|byte| matches!(byte, b'\t' | 0x20..=0x7e | 0x80..)) {
        return Err(Violation::Malformed("the value of a header field holds a control byte"));
    }
    let name = std::str::from_utf8(name).expect("token bytes are ASCII");
    Ok((name, value.trim_ascii()))
}

/// True for `X_Forwarded_For` and the like.
fn reads_as_ours(name: &[u8]) -> bool {
    let dashed: Vec<u8> =
        name.iter().map(|byte| if *byte == b'_' { b'-' } else { byte.to_ascii_lowercase() }).collect();
    dashed.starts_with(b"x-forwarded-") || OURS.iter().chain(ACTED_ON).any(|ours| ours.as_bytes() == dashed)
}

/// What the fields of a head say, gathered while it is read.
#[derive(Default)]
struct Fields<'a> {
    hosts: usize,
    lengths: usize,
    length: u64,
    encodings: usize,
    upgrade: Option<&'a [u8]>,
    connection_upgrade: bool,
}

fn check_head(head: &[u8]) -> Result<Framing, Violation> {
    let mut lines = lines(&head[..head.len() - 2]);
    let request_line = lines.next().ok_or(Violation::Malformed("the request line is missing"))?;
    let (method, is_http_11) = check_request_line(request_line)?;
    let mut fields = Fields::default();
    for (index, line) in lines.enumerate() {
        if index >= FIELDS_MAX {
            return Err(Violation::HeadTooLarge);
        }
        let (name, value) = field(line)?;
        fields.note(name, value, is_http_11)?;
    }
    fields.framing(method, is_http_11)
}

fn check_request_line(line: &[u8]) -> Result<(&[u8], bool), Violation> {
    let mut parts = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(version), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(Violation::Malformed("the request line is not 'METHOD target HTTP/1.1'"));
    };
    if method.is_empty() || method.len() > METHOD_BYTES_MAX || !method.iter().copied().all(is_token) {
        return Err(Violation::Malformed("the method is not a word of the standard"));
    }
    if method == b"CONNECT" {
        return Err(Violation::Malformed("this gateway is not a proxy"));
    }
    let is_http_11 = match version {
        b"HTTP/1.1" => true,
        b"HTTP/1.0" => false,
        _ => return Err(Violation::Malformed("the version is neither HTTP/1.1 nor HTTP/1.0")),
    };
    if target.len() > TARGET_BYTES_MAX {
        return Err(Violation::TargetTooLong);
    }
    let shape = target.starts_with(b"/")
        || target.starts_with(b"http://")
        || target.starts_with(b"https://")
        || (target == b"*" && method == b"OPTIONS");
    if !shape {
        return Err(Violation::Malformed("the address in the request line does not begin with '/'"));
    }
    if !target.iter().all(|byte| (0x21..0x7f).contains(byte) && *byte != b'#') {
        return Err(Violation::Malformed("the address holds a byte that must be percent-encoded"));
    }
    Ok((method, is_http_11))
}

impl<'a> Fields<'a> {
    fn note(&mut self, name: &str, value: &'a [u8], is_http_11: bool) -> Result<(), Violation> {
        match name.to_ascii_lowercase().as_str() {
            "host" => self.hosts += 1,
            "content-length" => {
                self.lengths += 1;
                self.length = content_length(value)?;
            }
            "transfer-encoding" if !is_http_11 || !value.eq_ignore_ascii_case(b"chunked") => {
                return Err(Violation::Malformed("the only transfer encoding understood here is chunked"));
            }
            "transfer-encoding" => self.encodings += 1,
            "upgrade" => {
                // Two of them are no request for anything in particular.
                let first = self.upgrade.is_none();
                self.upgrade = Some(if first { value } else { b"" });
            }
            "expect" if !value.eq_ignore_ascii_case(b"100-continue") => return Err(Violation::ExpectationUnknown),
            "connection" => {
                for token in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                    if OURS.iter().any(|ours| token.eq_ignore_ascii_case(ours.as_bytes())) {
                        return Err(Violation::Malformed("Connection names a field that may not be removed"));
                    }
                    self.connection_upgrade |= token.eq_ignore_ascii_case(b"upgrade");
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn framing(&self, method: &[u8], is_http_11: bool) -> Result<Framing, Violation> {
        if self.hosts != 1 {
            return Err(Violation::Malformed("there must be exactly one Host"));
        }
        if self.lengths + self.encodings > 1 {
            return Err(Violation::Malformed("the length of the body is given more than once"));
        }
        let body = if self.encodings == 1 { Framing::Chunked } else { Framing::Fixed(self.length) };
        let websocket = self.connection_upgrade
            && is_http_11
            && method == b"GET"
            && self.upgrade.is_some_and(|value| value.eq_ignore_ascii_case(b"websocket"));
        match body {
            Framing::Fixed(0) if websocket => Ok(Framing::Upgrade),
            _ if websocket => Err(Violation::Malformed("a request to switch protocols cannot have a body")),
            body => Ok(body),
        }
    }
}

fn content_length(value: &[u8]) -> Result<u64, Violation> {
    const WRONG: Violation = Violation::Malformed("Content-Length is not one plain decimal number");
    if value.is_empty() || value.len() > 18 || !value.iter().all(u8::is_ascii_digit) {
        return Err(WRONG);
    }
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).ok_or(WRONG)
}

#[cfg(test)]
#[path = "strict_tests.rs"]
mod tests;
