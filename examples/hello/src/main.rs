//! An own small web program to deploy: it greets, and it offers what the tests and the benchmark ask of a deployment
//! (streams both ways, WebSocket, exit codes, log floods). One thread per connection, so many and no more.

#![expect(clippy::print_stderr, reason = "a container's program speaks on its standard streams")]

mod http;

use std::{
    io::{self, BufReader, Error, ErrorKind, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    process::ExitCode,
    sync::{Arc, Condvar, LazyLock, Mutex, PoisonError},
    thread,
    time::Duration,
};

use http::{Body, Framing, Head};
use tungstenite::{Message, WebSocket, handshake::derive_accept_key, protocol::Role, protocol::WebSocketConfig};

const MAX_CONNECTIONS: usize = 48;
const IDLE: Duration = Duration::from_mins(1);
const BLOCK: usize = 64 * 1024;
const MAX_UNREAD_BODY: u64 = 1 << 20;
const MAX_MESSAGE: usize = 1 << 20;

fn main() -> ExitCode {
    let port = std::env::var("PORT").unwrap_or_else(|_| "8080".to_owned());
    let listener = match port
        .parse::<u16>()
        .map_err(Error::other)
        .and_then(|port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
    {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("hello cannot listen on port {port:?}: {error}");
            return ExitCode::FAILURE;
        }
    };
    eprintln!("hello listens on port {port}");
    let slots = Arc::new((Mutex::new(0_usize), Condvar::new()));
    loop {
        let slot = Slot::take(&slots);
        let Ok((stream, _)) = listener.accept() else {
            // Out of descriptors, most likely: give running connections time to end.
            thread::sleep(Duration::from_millis(50));
            continue;
        };
        let serve = move || {
            let _slot = slot;
            if let Err(error) = serve_connection(&stream) {
                log(&format!("connection ended: {error}"));
            }
        };
        if let Err(error) = thread::Builder::new().stack_size(256 * 1024).spawn(serve) {
            eprintln!("hello cannot start a thread: {error}");
        }
    }
}

/// One of the connections that may be served at a time.
struct Slot(Arc<(Mutex<usize>, Condvar)>);

impl Slot {
    fn take(slots: &Arc<(Mutex<usize>, Condvar)>) -> Self {
        let (taken, freed) = &**slots;
        let guard = taken.lock().unwrap_or_else(PoisonError::into_inner);
        *freed.wait_while(guard, |taken| *taken >= MAX_CONNECTIONS).unwrap_or_else(PoisonError::into_inner) += 1;
        Self(Arc::clone(slots))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.1.notify_one();
    }
}

/// Whether the connection may carry another request.
enum After {
    Keep,
    Close,
}

fn serve_connection(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))?;
    let mut input = BufReader::with_capacity(BLOCK, stream);
    let mut output = stream;
    loop {
        let (head, framing) = match Head::read(&mut input)
            .and_then(|head| head.map(|head| Ok((head.framing()?, head))).transpose())
        {
            Ok(Some((framing, head))) => (head, framing),
            Ok(None) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                return answer(output, 400, "Bad Request", &format!("{error}\n"));
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionReset) => return Ok(()),
            Err(error) => return Err(error),
        };
        if head.path == "/ws" {
            return serve_websocket(&head, &input);
        }
        if head.has_word("expect", "100-continue") && head.path == "/echo" {
            output.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let mut body = Body { input: &mut input, framing };
        let after = serve_request(&head, &mut body, output)?;
        // What the handler left of the body stands before the next request; too much of it ends the connection.
        let unread = io::copy(&mut body.by_ref().take(MAX_UNREAD_BODY), &mut io::sink())?;
        if matches!(after, After::Close) || unread == MAX_UNREAD_BODY || !head.keeps_alive() {
            return Ok(());
        }
    }
}

fn serve_request(head: &Head, body: &mut Body<'_, BufReader<&TcpStream>>, output: &TcpStream) -> io::Result<After> {
    let mut words = head.path.trim_start_matches('/').splitn(2, '/');
    let (route, argument) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    if !matches!(head.method.as_str(), "GET" | "HEAD" | "POST" | "PUT") {
        log(&format!("{} {} 405", head.method, head.path));
        return answer(output, 405, "Method Not Allowed", "").map(|()| After::Keep);
    }
    let status = if matches!(route, "" | "headers" | "echo" | "bytes" | "stream" | "exit" | "flood" | "healthz") {
        200
    } else {
        404
    };
    if logs_requests() {
        log(&format!("{} {} {status}", head.method, head.path));
    }
    let wants_body = head.method != "HEAD";
    let answer = |status, reason, text: &str| answer_head_or_whole(output, status, reason, text, wants_body);
    match (route, argument.parse::<u64>()) {
        ("", _) => answer(200, "OK", &greeting())?,
        ("headers", _) => answer(200, "OK", &String::from_utf8_lossy(&head.raw))?,
        ("healthz", _) => answer(200, "OK", "ok\n")?,
        ("echo", _) => echo(body, output, wants_body)?,
        ("bytes", Ok(count)) => bytes(count, output, wants_body)?,
        ("stream", _) => stream_lines(output, wants_body)?,
        ("flood", _) => {
            answer(200, "OK", "the log fills until this program is killed\n")?;
            if wants_body {
                flood();
            }
        }
        ("exit", Ok(code)) if code < 256 => {
            answer(200, "OK", "bye\n")?;
            if wants_body {
                leave(code);
            }
        }
        ("bytes" | "exit", _) => answer(400, "Bad Request", "the path must end in a number\n")?,
        _ => answer(404, "Not Found", "no such page\n")?,
    }
    // HTTP/1.0 knows no chunks: the end of the connection ends those answers.
    Ok(if matches!(route, "stream" | "echo") && !head.keeps_alive() { After::Close } else { After::Keep })
}

fn greeting() -> String {
    let greeting = std::env::var("GREETING").unwrap_or_else(|_| "Hello".to_owned());
    let safe = greeting.replace('&', "&amp;").replace('<', "&lt;");
    format!(
        "<!doctype html><title>Peer Compute</title><h1>{safe}</h1><p>This page comes from a friend's machine.</p>\n"
    )
}

fn answer(output: &TcpStream, status: u16, reason: &str, text: &str) -> io::Result<()> {
    answer_head_or_whole(output, status, reason, text, true)
}

/// Answers with a text, or to a request for the head alone without it.
fn answer_head_or_whole(
    mut output: &TcpStream,
    status: u16,
    reason: &str,
    text: &str,
    wants_body: bool,
) -> io::Result<()> {
    let kind = if text.starts_with('<') { "text/html" } else { "text/plain" };
    let length = text.len();
    let head = format!(
        "HTTP/1.1 {status} {reason}\r\nContent-Type: {kind}; charset=utf-8\r\nContent-Length: {length}\r\n\r\n"
    );
    let body = if wants_body { text } else { "" };
    output.write_all((head + body).as_bytes())
}

/// Sends the body back as it comes in, with the framing that it came with.
fn echo(body: &mut Body<'_, BufReader<&TcpStream>>, mut output: &TcpStream, wants_body: bool) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    if let Framing::Length(length) = body.framing {
        write!(
            output,
            "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: {length}\r\n\r\n"
        )?;
        return if wants_body { io::copy(body, &mut output).map(|_| ()) } else { Ok(()) };
    }
    output.write_all(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
    )?;
    if !wants_body {
        return Ok(());
    }
    loop {
        let count = body.read(&mut block)?;
        if count == 0 {
            return output.write_all(b"0\r\n\r\n");
        }
        http::write_chunk(&mut output, &block[..count])?;
    }
}

fn bytes(mut count: u64, mut output: &TcpStream, wants_body: bool) -> io::Result<()> {
    write!(output, "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: {count}\r\n\r\n")?;
    let block = vec![b'x'; BLOCK];
    while wants_body && count > 0 {
        let now = usize::try_from(count).unwrap_or(BLOCK).min(BLOCK);
        output.write_all(&block[..now])?;
        count -= now as u64;
    }
    Ok(())
}

fn stream_lines(mut output: &TcpStream, wants_body: bool) -> io::Result<()> {
    output.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n")?;
    if !wants_body {
        return Ok(());
    }
    for number in 1..=20 {
        http::write_chunk(&mut output, format!("line {number}\n").as_bytes())?;
        thread::sleep(Duration::from_millis(100));
    }
    output.write_all(b"0\r\n\r\n")
}

/// Echoes WebSocket messages until the client closes.
fn serve_websocket(head: &Head, input: &BufReader<&TcpStream>) -> io::Result<()> {
    let mut output: &TcpStream = input.get_ref();
    let Some(key) = head.header("sec-websocket-key").filter(|_| head.has_word("upgrade", "websocket")) else {
        log(&format!("{} /ws 426", head.method));
        return answer(output, 426, "Upgrade Required", "this page speaks WebSocket\n");
    };
    log(&format!("{} /ws 101", head.method));
    let accept = derive_accept_key(key.as_bytes());
    write!(
        output,
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
    )?;
    let settings = WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE));
    let mut socket = WebSocket::from_partially_read(output, input.buffer().to_vec(), Role::Server, Some(settings));
    loop {
        match socket.read() {
            Ok(message @ (Message::Text(_) | Message::Binary(_))) => socket.send(message).map_err(Error::other)?,
            Ok(_) => {}
            Err(tungstenite::Error::ConnectionClosed) => return Ok(()),
            Err(error) => return Err(Error::other(error)),
        }
    }
}

/// Writes lines until the program is killed.
fn flood() -> ! {
    loop {
        log("flood flood flood flood flood flood flood flood");
    }
}

#[expect(clippy::exit, reason = "ending with a chosen code is what this page is for")]
fn leave(code: u64) -> ! {
    std::process::exit(i32::try_from(code).unwrap_or(1))
}

/// Whether each request is a line of the log; `ACCESS_LOG=no` leaves that out.
fn logs_requests() -> bool {
    static LOGS: LazyLock<bool> = LazyLock::new(|| std::env::var_os("ACCESS_LOG").is_none_or(|value| value != "no"));
    *LOGS
}

/// One line on standard output; a reader that is gone is no reason to stop serving.
fn log(line: &str) {
    drop(writeln!(io::stdout().lock(), "{line}"));
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn head_is_answered_like_get_without_its_body() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut ask = |requests: &str| {
            client.write_all(requests.as_bytes()).unwrap();
        };
        for path in ["/", "/bytes/7", "/stream", "/exit/3"] {
            ask(&format!("HEAD {path} HTTP/1.1\r\nHost: a\r\n\r\n"));
        }
        ask("GET /bytes/7 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        serve_connection(&listener.accept().unwrap().0).unwrap();
        let mut answers = String::new();
        client.read_to_string(&mut answers).unwrap();
        let heads: Vec<&str> = answers.split("\r\n\r\n").collect();
        assert_eq!(heads.len(), 6, "{answers}");
        assert!(heads[..5].iter().all(|head| head.starts_with("HTTP/1.1 200 OK\r\n")), "{answers}");
        assert!(heads[1].ends_with("Content-Length: 7") && heads[5] == "xxxxxxx", "{answers}");
    }
}
