//! A hostile guest for the attack tests: it tries what a container must not be able to do, prints one JSON line per
//! attempt (`probe`, `succeeded`, `detail`), and serves all of them as one JSON array on `PORT` (8080).
//!
//! `PROBE_MODE` chooses the attack: `look` (the default, harmless to the host), `forks`, `memory`, `disk`,
//! `files`, `connections`, `cpu`, `flood`, or `knock`, which connects to what the path of each request names
//! (`/host:port,host:port`). `PROBE_TARGETS` names addresses for `look` (`host:port`, comma-separated) to connect to;
//! `PROBE_SECONDS` is how long the attack goes on. Every attack has an upper end, so that a profile that fails does not take the test's machine with it.

mod attempts;
mod hogs;
mod knock;

use std::{
    io::{self, BufRead, BufReader, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use serde_json::{Value, json};

/// What was tried so far, in order.
#[derive(Debug, Default)]
pub(crate) struct Report(Mutex<Vec<Value>>);

impl Report {
    /// Records one attempt; `Ok` means that the guest managed what it must not, or that a fact could be read.
    pub(crate) fn attempt<T: Into<Value>, E: std::fmt::Display>(&self, probe: &str, result: Result<T, E>) {
        match result {
            Ok(detail) => self.record(probe, true, &detail.into()),
            Err(error) => self.record(probe, false, &Value::from(error.to_string())),
        }
    }

    /// Records one attempt whose detail is more than a text.
    pub(crate) fn record(&self, probe: &str, succeeded: bool, detail: &Value) {
        let line = json!({ "probe": probe, "succeeded": succeeded, "detail": detail });
        print(&line.to_string());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }

    fn to_json(&self) -> String {
        Value::from(self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()).to_string()
    }
}

/// Writes one line on standard output; a closed one is no reason to end.
pub(crate) fn print(line: &str) {
    drop(writeln!(io::stdout().lock(), "{line}"));
}

/// A number from the environment, or this one.
pub(crate) fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn main() {
    let mode = std::env::var("PROBE_MODE").unwrap_or_default();
    if mode == hogs::CHILD_MODE {
        thread::sleep(Duration::from_mins(10));
        return;
    }
    let report = Report::default();
    // The attempts come first, alone: some system calls refuse a process with several threads for that reason only.
    if matches!(mode.as_str(), "" | "look") {
        attempts::run(&report);
    }
    thread::scope(|scope| {
        scope.spawn(|| serve(&report));
        match mode.as_str() {
            "" | "look" | "knock" => {}
            "forks" => hogs::forks(&report),
            "memory" => hogs::memory(&report),
            "disk" => hogs::disk(&report),
            "files" => hogs::files(&report),
            "connections" => hogs::connections(&report),
            "cpu" => hogs::cpu(&report),
            "flood" => hogs::flood(&report),
            other => report.attempt("mode", Err::<Value, _>(format!("PROBE_MODE={other:?} is not known"))),
        }
    });
}

/// Answers every request with the report, one connection after the other.
fn serve(report: &Report) {
    let port = u16::try_from(setting("PORT", 8080)).unwrap_or(8080);
    match TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)) {
        Err(error) => report.attempt("serve", Err::<Value, _>(error)),
        Ok(listener) => {
            for stream in listener.incoming() {
                match stream {
                    Ok(stream) => drop(answer(&stream, report)),
                    Err(_) => thread::sleep(Duration::from_millis(50)),
                }
            }
        }
    }
}

fn answer(stream: &TcpStream, report: &Report) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    let mut path = String::new();
    for line in io::Read::take(BufReader::new(stream), 64 * 1024).lines() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        if path.is_empty() {
            line.split(' ').nth(1).unwrap_or_default().trim_start_matches('/').clone_into(&mut path);
        }
    }
    let knocks = std::env::var("PROBE_MODE").is_ok_and(|mode| mode == "knock");
    let body = if knocks { knock::knock(&path).to_json() } else { report.to_json() };
    let length = body.len();
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length";
    (&mut &*stream).write_all(format!("{head}: {length}\r\n\r\n{body}").as_bytes())
}
