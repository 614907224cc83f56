//! A socket in front of the engine's that remembers what is asked of it.

use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::{PATIENCE, docker};

/// What ends the first line of every request.
const LINE_END: &[u8] = b" HTTP/1.1\r\n";
/// Longest first line that is looked for.
const LINE_MAX: usize = 8192;
/// The engine is quiet when nothing has been asked of it for so long.
const QUIET: Duration = Duration::from_millis(700);

/// The socket. What it has taken goes on until the other side ends.
pub(crate) struct Recorder {
    directory: TempDir,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Recorder {
    /// Stands before the engine that the tests share.
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let socket = directory.path().join("engine.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        std::fs::set_permissions(&socket, Permissions::from_mode(0o660)).unwrap();
        let engine = engine_socket();
        let heard = asked.clone();
        // It ends with the test's process.
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (client, engine) = (client.unwrap(), UnixStream::connect(&engine).unwrap());
                let back = (engine.try_clone().unwrap(), client.try_clone().unwrap());
                let heard = heard.clone();
                std::thread::spawn(move || carry(client, engine, Some(&heard)));
                std::thread::spawn(move || carry(back.0, back.1, None));
            }
        });
        Self { directory, asked }
    }

    /// Where it listens.
    pub(crate) fn socket(&self) -> String {
        self.directory.path().join("engine.sock").to_str().unwrap().to_owned()
    }

    /// Method and path of whatever was to change something in the engine since the last look.
    pub(crate) fn changes(&self) -> Vec<String> {
        let mut asked = std::mem::take(&mut *self.asked.lock().unwrap());
        let reads = |line: &String| line.starts_with("GET ") || line.starts_with("HEAD ");
        // Waiting for a container's end is a POST, and changes nothing.
        asked.retain(|line| !reads(line) && !line.contains("/wait?"));
        asked
    }

    /// Waits until nothing is changed in the engine any more, and gives what was changed before.
    pub(crate) fn settle(&self) -> Vec<String> {
        let (end, mut changes) = (Instant::now() + PATIENCE, self.changes());
        loop {
            std::thread::sleep(QUIET);
            let more = self.changes();
            if more.is_empty() {
                return changes;
            }
            assert!(Instant::now() < end, "the engine gets no rest: {more:?}");
            changes.extend(more);
        }
    }
}

fn engine_socket() -> PathBuf {
    let host = docker(&["context", "inspect", "--format", "{{.Endpoints.docker.Host}}"]);
    PathBuf::from(host.trim().strip_prefix("unix://").expect("an engine behind a socket of this machine"))
}

/// Carries bytes until their end, and notes the first lines of requests among them.
fn carry(mut from: UnixStream, mut to: UnixStream, heard: Option<&Mutex<Vec<String>>>) {
    let (mut buffer, mut held) = (vec![0; 65_536], Vec::new());
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if let Some(heard) = heard {
            held.extend_from_slice(&buffer[..count]);
            // Noted before it goes on: what the engine does has been asked for.
            heard.lock().unwrap().extend(first_lines(&mut held));
        }
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    drop(to.shutdown(Shutdown::Write));
}

/// Takes the first lines of requests out of what has come. The body of the request before may end on the same line.
fn first_lines(held: &mut Vec<u8>) -> Vec<String> {
    let mut lines = Vec::new();
    while let Some(end) = held.windows(LINE_END.len()).position(|window| window == LINE_END) {
        let line = String::from_utf8_lossy(&held[..end]).into_owned();
        held.drain(..end + LINE_END.len());
        let methods = ["GET /", "HEAD /", "POST /", "PUT /", "PATCH /", "DELETE /"];
        let begin = methods.iter().filter_map(|method| line.rfind(method)).max();
        lines.push(line[begin.expect("a request of a known method")..].to_owned());
    }
    held.drain(..held.len().saturating_sub(LINE_MAX));
    lines
}
