//! The `nft` program, which speaks to the kernel's packet filter: the one program that the daemon starts.
//!
//! It is kept running and told what to do line by line, because the guard table lives as long as it does and nobody else
//! can change that table meanwhile. What it is told is made of typed values alone (see [`super::rules`]); it gets no shell,
//! no environment and no argument from outside. There is no library of a fitting licence that speaks this part of netlink.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::pipe::Receiver;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::Mutex;
use tokio::time::timeout;

/// Where the program is looked for; nowhere else.
const PLACES: [&str; 4] = ["/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft", "/usr/local/sbin/nft"];
/// Longest wait for one answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest answer that is read (bytes).
const ANSWER_MAX: usize = 4 << 20;
/// Asks for one line that is always the same, whatever came before.
const MARK: &str = "describe tcp sport";
/// What that line holds.
const MARKED: &str = "datatype inet_service";

/// Why the packet filter did not do something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NftError {
    /// The program is not there.
    #[error("the program nft is not installed; install the package nftables")]
    Absent,
    /// It could not be started, or ended.
    #[error("the program nft does not run: {0}")]
    Broken(String),
    /// It took too long.
    #[error("the program nft did not answer in time")]
    TimedOut,
    /// The kernel or the program refused.
    #[error("the packet filter refused: {0}")]
    Refused(String),
}

/// The program, started when it is first needed and again after it has failed.
#[derive(Debug, Default)]
pub(crate) struct Nft {
    session: Mutex<Option<Session>>,
}

#[derive(Debug)]
struct Session {
    _child: Child,
    input: ChildStdin,
    /// Both of its outputs, in the order in which they were written.
    output: BufReader<Receiver>,
}

impl Nft {
    /// Carries out lines of commands, each as one transaction, and gives what they print.
    pub(crate) async fn run(&self, line: &str) -> Result<String, NftError> {
        let mut slot = self.session.lock().await;
        let mut session = match slot.take() {
            Some(session) => session,
            None => Session::start()?,
        };
        let answer = timeout(PATIENCE, session.ask(line)).await.map_err(|_| NftError::TimedOut)?;
        let answer = answer.map_err(|error| NftError::Broken(error.to_string()))?;
        // Only a session that is in step is used again: after any other end the process is dropped, and with it killed.
        *slot = Some(session);
        match answer.lines().find(|line| line.contains("Error:")) {
            Some(error) => Err(NftError::Refused(crate::engine::quote(error))),
            None => Ok(answer),
        }
    }
}

impl Session {
    fn start() -> Result<Self, NftError> {
        let program = PLACES.iter().find(|place| Path::new(place).exists()).ok_or(NftError::Absent)?;
        Self::spawn(program).map_err(|error| NftError::Broken(error.to_string()))
    }

    fn spawn(program: &str) -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        let mut child = Command::new(program)
            .args(["--interactive", "--stateless", "--terse", "--numeric"])
            .env_clear()
            // Where it would keep a history of commands, nothing can be written.
            .env("HOME", "/dev/null")
            .env("TERM", "dumb")
            .stdin(Stdio::piped())
            .stdout(writer.try_clone()?)
            .stderr(writer)
            // A key that interrupts the daemon at a terminal is not meant for it.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let input = child.stdin.take().ok_or_else(|| io::Error::other("no standard input"))?;
        let output = BufReader::new(Receiver::from_owned_fd(OwnedFd::from(reader))?);
        Ok(Self { _child: child, input, output })
    }

    async fn ask(&mut self, line: &str) -> io::Result<String> {
        let text = format!("{line}\n{MARK}\n");
        let (input, output) = (&mut self.input, &mut self.output);
        let write = async {
            input.write_all(text.as_bytes()).await?;
            input.flush().await
        };
        let read = async {
            let mut answer = String::new();
            loop {
                let before = answer.len();
                let room = ANSWER_MAX.saturating_sub(before) as u64;
                if (&mut *output).take(room).read_line(&mut answer).await? == 0 {
                    return Err(io::Error::other("it ended"));
                }
                if answer[before..].contains(MARKED) {
                    answer.truncate(before);
                    return Ok(answer);
                }
            }
        };
        // A long line and a long answer would wait for each other: both are moved on at once.
        Ok(tokio::try_join!(write, read)?.1)
    }
}
