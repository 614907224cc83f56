//! Secrets as people give them: typed at the terminal without an echo, or from a file descriptor; never an argument, and
//! never the environment.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};

use peer_proto::code::Code;
use peer_proto::control::Secret;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

use super::failure::Failure;

/// Longest secret that is read (bytes): a recovery phrase, or a passphrase with room to be found too long.
const LENGTH_MAX: usize = 2048;

/// Asks for a secret, or takes the first line from a file descriptor.
pub(super) async fn ask(what: &'static str, descriptor: Option<u32>) -> Result<Secret, Failure> {
    match descriptor {
        Some(number) => in_thread(move || from_descriptor(what, number)).await,
        None => at_terminal(what, format!("{what}: ")).await,
    }
}

/// As [`ask`]; what is typed must be typed twice alike.
pub(super) async fn ask_twice(what: &'static str, descriptor: Option<u32>) -> Result<Secret, Failure> {
    let first = ask(what, descriptor).await?;
    if descriptor.is_none() && at_terminal(what, format!("{what}, again: ")).await? != first {
        return Err(Failure::argument(format!("the two times the {what} was not the same; nothing was changed")));
    }
    Ok(first)
}

fn from_descriptor(what: &str, number: u32) -> Result<Secret, Failure> {
    let failed = |error: &io::Error| {
        Failure::new(Code::FileFailed, format!("cannot read the {what} from file descriptor {number}: {error}"))
    };
    let mut file = File::open(format!("/dev/fd/{number}")).map_err(|error| failed(&error))?;
    let secret = line_of(&mut file).map_err(|error| failed(&error))?;
    if secret.is_empty() {
        return Err(Failure::argument(format!("file descriptor {number} holds no {what}")));
    }
    Ok(Secret::new(String::clone(&secret)))
}

/// The first line, without its end.
fn line_of(from: &mut impl Read) -> io::Result<Zeroizing<String>> {
    // Room enough from the start, so that no copy is left behind when it grows.
    let mut bytes = Zeroizing::new(Vec::with_capacity(LENGTH_MAX));
    let mut byte = Zeroizing::new([0]);
    while bytes.len() < LENGTH_MAX && from.read(&mut byte[..])? == 1 && byte[0] != b'\n' {
        bytes.push(byte[0]);
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| io::Error::other("it is not UTF-8"))?;
    Ok(Zeroizing::new(text.trim_end_matches('\r').to_owned()))
}

/// Switches the echo off for as long as it lives.
struct Silent {
    terminal: File,
    before: Termios,
}

impl Silent {
    fn new(terminal: File) -> io::Result<Self> {
        let before = tcgetattr(&terminal)?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        silent.local_modes.insert(LocalModes::ECHONL | LocalModes::ICANON | LocalModes::ISIG);
        tcsetattr(&terminal, OptionalActions::Flush, &silent)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        // The terminal may be gone; then there is nothing to restore.
        tcsetattr(&self.terminal, OptionalActions::Flush, &self.before).unwrap_or_default();
    }
}

async fn at_terminal(what: &'static str, prompt: String) -> Result<Secret, Failure> {
    let no_terminal = move |error: io::Error| {
        Failure::argument(format!("there is no terminal to ask for the {what} ({error}); name a file descriptor"))
    };
    let open = || OpenOptions::new().read(true).write(true).open("/dev/tty");
    let mut terminal = open().map_err(no_terminal)?;
    // Held here and not by the thread that reads: Ctrl-C leaves that thread behind, and the echo must come back.
    let _silent = Silent::new(open().map_err(no_terminal)?).map_err(no_terminal)?;
    let secret = in_thread(move || {
        terminal.write_all(prompt.as_bytes()).and_then(|()| line_of(&mut terminal)).map_err(no_terminal)
    });
    let secret = secret.await?;
    if secret.is_empty() {
        return Err(Failure::argument(format!("no {what} was given; nothing was changed")));
    }
    Ok(Secret::new(String::clone(&secret)))
}

async fn in_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Failure::new(Code::Internal, error.to_string()))?
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_line_is_the_secret() {
        let read = |text: &[u8]| line_of(&mut &text[..]).map(|line| String::clone(&line));
        assert_eq!(read(b"pass phrase\r\nmore").unwrap(), "pass phrase");
        assert_eq!(read(b"pass").unwrap(), "pass");
        assert_eq!(read(b"").unwrap(), "");
        assert_eq!(read(&[b'a'; 4096]).unwrap().len(), LENGTH_MAX);
        assert!(read(b"\xff\n").is_err());
    }
}
