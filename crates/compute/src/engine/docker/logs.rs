//! A container's log: both outputs in order, each line with its time.

use std::time::Duration;

use bollard::{Docker, container::LogOutput, query_parameters::LogsOptionsBuilder};
use futures::{StreamExt, stream, stream::BoxStream};
use peer_proto::{
    query::{LogLine, Output},
    unit::Timestamp,
};
use tokio::time::timeout;

use super::{DockerEngine, failure};
use crate::engine::{ContainerId, EngineError, LogOptions, LogStream};

/// A log that is not followed is on the engine's disk: silence means that the engine hangs.
const IDLE: Duration = Duration::from_mins(1);

impl DockerEngine {
    pub(super) fn read_logs(&self, id: &ContainerId, options: LogOptions) -> LogStream {
        let client = match self.client() {
            Ok(client) => client.clone(),
            Err(error) => return stream::once(async { Err(error) }).boxed(),
        };
        let reader = Reader { client, id: id.clone(), options, pieces: None, last: None, caught_up: !options.follow };
        stream::unfold(Some(reader), |reader| async move {
            let mut reader = reader?;
            let next = reader.next().await?;
            let rest = next.is_ok().then_some(reader);
            Some((next, rest))
        })
        .boxed()
    }
}

type Pieces = BoxStream<'static, Result<LogOutput, bollard::errors::Error>>;

/// Reads one log. A followed one is read a second time from its last line on when it ends: the engine (20.10) closes
/// it without what was written in the container's last moment.
struct Reader {
    client: Docker,
    id: ContainerId,
    options: LogOptions,
    pieces: Option<Pieces>,
    /// Nanosecond of the last line, and how many lines had it.
    last: Option<(u64, usize)>,
    caught_up: bool,
}

impl Reader {
    async fn next(&mut self) -> Option<Result<LogLine, EngineError>> {
        loop {
            if self.pieces.is_none() {
                self.pieces = Some(self.open(self.options.follow && !self.caught_up));
            }
            let pieces = self.pieces.as_mut()?;
            let next = if self.caught_up { timeout(IDLE, pieces.next()).await } else { Ok(pieces.next().await) };
            match next {
                Err(_) => return Some(Err(EngineError::TimedOut { operation: "read log".into() })),
                Ok(None) if self.caught_up => return None,
                Ok(None) => {
                    self.caught_up = true;
                    self.pieces = Some(self.rest());
                }
                Ok(Some(Ok(output))) => match parse(output) {
                    Ok((nanosecond, line)) if self.is_new(nanosecond) => return Some(Ok(line)),
                    Ok(_) => {}
                    Err(error) => return Some(Err(error)),
                },
                Ok(Some(Err(error))) if failure::status(&error) == Some(404) => {
                    return Some(Err(EngineError::NoSuchContainer { container: self.id.to_string() }));
                }
                Ok(Some(Err(error))) => return Some(Err(failure::translate("read log", error))),
            }
        }
    }

    /// Times are always asked for. The engine's interface takes whole seconds; the rest is sorted out in `is_new`.
    fn open(&self, follow: bool) -> Pieces {
        let tail = self.options.tail.map_or_else(|| "all".to_owned(), |lines| lines.to_string());
        self.read(follow, self.options.since.map_or(0, |since| since.0 / 1000), &tail)
    }

    /// The log after the last line, without that line and those of the same moment.
    fn rest(&self) -> Pieces {
        let Some((last, count)) = self.last else { return self.open(false) };
        let mut same = 0;
        let later = move |piece: &Result<LogOutput, bollard::errors::Error>| {
            let nanosecond = piece.as_ref().ok().and_then(|output| nanosecond_of(output.as_ref()));
            same += usize::from(nanosecond == Some(last));
            std::future::ready(nanosecond.is_none_or(|now| now > last || now == last && same > count))
        };
        self.read(false, last / 1_000_000_000, "all").filter(later).boxed()
    }

    fn read(&self, follow: bool, since: u64, tail: &str) -> Pieces {
        let since = i32::try_from(since).unwrap_or(i32::MAX);
        let query = LogsOptionsBuilder::default().stdout(true).stderr(true).timestamps(true);
        self.client.logs(self.id.as_str(), Some(query.follow(follow).since(since).tail(tail).build())).boxed()
    }

    fn is_new(&mut self, nanosecond: u64) -> bool {
        self.last = match self.last {
            Some((last, count)) if last == nanosecond => Some((last, count + 1)),
            _ => Some((nanosecond, 1)),
        };
        self.options.since.is_none_or(|since| nanosecond / 1_000_000 >= since.0)
    }
}

/// Splits a piece of the log into its time and its text.
fn parse(output: LogOutput) -> Result<(u64, LogLine), EngineError> {
    let kind = if matches!(output, LogOutput::StdErr { .. }) { Output::Stderr } else { Output::Stdout };
    let bytes = output.into_bytes();
    let (Some(nanosecond), Some(space)) = (nanosecond_of(&bytes), bytes.iter().position(|byte| *byte == b' ')) else {
        return Err(EngineError::failed("a line of the log has no time"));
    };
    let text = String::from_utf8_lossy(&bytes[space + 1..]).into_owned();
    Ok((nanosecond, LogLine { at: Timestamp(nanosecond / 1_000_000), output: kind, text }))
}

/// The time at the beginning of a piece.
fn nanosecond_of(bytes: &[u8]) -> Option<u64> {
    let space = bytes.iter().take(64).position(|byte| *byte == b' ')?;
    parse_nanosecond(std::str::from_utf8(&bytes[..space]).ok()?)
}

/// Reads a moment such as `2026-11-23T08:31:00.123456789Z`; the year 1 means "never".
pub(super) fn parse_time(text: &str) -> Option<Timestamp> {
    parse_nanosecond(text).map(|nanosecond| Timestamp(nanosecond / 1_000_000))
}

fn parse_nanosecond(text: &str) -> Option<u64> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let mut date = date.splitn(3, '-').map(digits);
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let (time, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let mut time = time.splitn(3, ':').map(digits);
    let (hour, minute, second) = (time.next()??, time.next()??, time.next()??);
    // Nanoseconds since 1970 fit until the year 2554.
    let valid = (1970..2500).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second <= 60;
    if !valid || fraction.len() > 9 {
        return None;
    }
    let seconds = ((days_since_1970(year, month, day) * 24 + hour) * 60 + minute) * 60 + second;
    Some(seconds * 1_000_000_000 + digits(&format!("{fraction:0<9}"))?)
}

fn digits(text: &str) -> Option<u64> {
    (1..=9).contains(&text.len()).then_some(())?;
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Days of the Gregorian calendar, with years beginning in March so that a leap day comes last.
fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let before_year = 365 * year + year / 4 - year / 100 + year / 400;
    let before_month = (153 * month + 2) / 5;
    before_year + before_month + day - 1 - 719_468
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn times_parse_to_the_millisecond() {
        for (text, milliseconds) in [
            ("1970-01-01T00:00:00Z", 0),
            ("1970-03-01T00:00:00.5Z", 59 * 86_400_000 + 500),
            ("2000-02-29T12:00:00.000000001Z", 951_825_600_000),
            ("2026-11-23T08:31:00.123456789Z", 1_795_422_660_123),
        ] {
            assert_eq!(parse_time(text), Some(Timestamp(milliseconds)), "{text}");
        }
        for text in ["", "0001-01-01T00:00:00Z", "2026-13-01T00:00:00Z", "2026-11-23T08:31:00", "2026-1é-01T00:00:00Z"]
        {
            assert_eq!(parse_time(text), None, "{text}");
        }
    }

    #[test]
    fn lines_keep_their_output_and_their_bytes() {
        let message = b"2026-11-23T08:31:00.123456789Z a b\xff\n".as_slice().into();
        let line = parse(LogOutput::StdErr { message }).unwrap();
        assert_eq!((line.1.output, line.1.text.as_str()), (Output::Stderr, "a b\u{fffd}\n"));
        assert!(parse(LogOutput::StdOut { message: "no time here\n".into() }).is_err());
    }
}
