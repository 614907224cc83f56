//! `logs`.

use clap::Args;
use hyper::Method;
use peer_proto::control::LogEntry;
use peer_proto::query::{LogLine, Output};
use peer_proto::text::escape;
use peer_proto::unit::Timestamp;

use super::client::{Lines, SILENCE_DEADLINE};
use super::deployments::path_of;
use super::failure::Failure;
use super::moment::{now, parse_since, rfc3339};
use super::output::{self, json_line, stderr_is_terminal, stdout_is_terminal};
use super::{Session, parse_reference};

/// Show what a deployment has written
///
/// Its standard output goes to standard output, its standard error to standard error, in their order. On a terminal,
/// control characters are made visible; into a file or a pipe the text goes as it is.
///
/// Example: peerctl logs web -f --tail 20 -t
#[derive(Debug, Args)]
pub(super) struct LogsArguments {
    /// Deployment: name or id
    #[arg(value_parser = parse_reference)]
    deployment: String,
    /// Go on with new lines until it ends or Ctrl-C
    #[arg(short, long)]
    follow: bool,
    /// Only so many last lines
    #[arg(short = 'n', long, value_name = "N", allow_hyphen_values = true)]
    tail: Option<u32>,
    /// Only lines from then on: 10m (ago) or 2026-11-23T08:30:00Z
    #[arg(long, value_name = "WHEN", allow_hyphen_values = true, value_parser = |text: &str| parse_since(text, now()))]
    since: Option<Timestamp>,
    /// Begin every line with the moment at which it was written (UTC)
    #[arg(short, long)]
    timestamps: bool,
}

/// Runs `logs`.
pub(super) async fn run(session: &Session, arguments: &LogsArguments) -> Result<(), Failure> {
    let mut query = vec![format!("follow={}", arguments.follow)];
    query.extend(arguments.tail.map(|tail| format!("tail={tail}")));
    query.extend(arguments.since.map(|since| format!("since={}", since.0)));
    let path = format!("{}/logs?{}", path_of(&arguments.deployment), query.join("&"));
    let mut lines: Lines<LogEntry> = session.client.stream(Method::GET, &path, None::<&()>).await?;
    let silence = (!arguments.follow).then_some(SILENCE_DEADLINE);
    let mut printer = Printer::new(arguments.timestamps);
    loop {
        match lines.next(silence).await? {
            Some(LogEntry::Line(line)) if session.output.is_json() => {
                output::text(&format!("{}\n", json_line(&line)?))?;
            }
            Some(LogEntry::Line(line)) => {
                output::container_output(line.output == Output::Stderr, &printer.text(&line))?;
            }
            Some(LogEntry::End) => return Ok(()),
            Some(LogEntry::Problem(problem)) => return Err(problem.into()),
            None => return Err(lines.unfinished()),
        }
    }
}

/// Makes text of log lines, which may come in parts.
#[derive(Debug)]
struct Printer {
    timestamps: bool,
    /// Whether each output is a terminal, and whether its last piece ended its line: standard output, standard error.
    terminal: [bool; 2],
    at_start: [bool; 2],
}

impl Printer {
    fn new(timestamps: bool) -> Self {
        Self { timestamps, terminal: [stdout_is_terminal(), stderr_is_terminal()], at_start: [true; 2] }
    }

    fn text(&mut self, line: &LogLine) -> String {
        let output = usize::from(line.output == Output::Stderr);
        let prefix = if self.timestamps && self.at_start[output] { rfc3339(line.at) + " " } else { String::new() };
        self.at_start[output] = line.text.ends_with('\n');
        if !self.terminal[output] {
            return prefix + &line.text;
        }
        let (body, end) = match line.text.strip_suffix('\n') {
            Some(body) => (body.strip_suffix('\r').unwrap_or(body), "\n"),
            None => (&*line.text, ""),
        };
        let body = body.split('\t').map(escape).collect::<Vec<_>>().join("\t");
        format!("{prefix}{body}{end}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(output: Output, text: &str) -> LogLine {
        LogLine { at: Timestamp(1_795_422_600_125), output, text: text.to_owned() }
    }

    #[test]
    fn hostile_lines_are_harmless_on_a_terminal_and_exact_elsewhere() {
        let mut printer = Printer { timestamps: false, terminal: [true, false], at_start: [true; 2] };
        let text = "a\tb\u{1b}[2J\r\n";
        assert_eq!(printer.text(&line(Output::Stdout, text)), "a\tb\\u{1b}[2J\n");
        assert_eq!(printer.text(&line(Output::Stderr, text)), text);
    }

    #[test]
    fn parts_of_a_line_have_one_timestamp() {
        let mut printer = Printer { timestamps: true, terminal: [false; 2], at_start: [true; 2] };
        assert_eq!(printer.text(&line(Output::Stdout, "a")), "2026-11-23T08:30:00.125Z a");
        assert_eq!(printer.text(&line(Output::Stderr, "x\n")), "2026-11-23T08:30:00.125Z x\n");
        assert_eq!(printer.text(&line(Output::Stdout, "b\n")), "b\n");
    }
}
