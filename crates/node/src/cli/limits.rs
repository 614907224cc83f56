//! `limits`, `limits set` and `limits unset`: what others may use of this machine.

use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use hyper::Method;
use peer_proto::hours::Hours;
use peer_proto::limits::{Bounds, ChangeLimits, LimitKey, LimitLine, LimitsReport};
use peer_proto::unit::{ByteSize, Millicores, format_bytes};

use super::client::percent_encoded;
use super::failure::Failure;
use super::table::table;
use super::{Session, parse_reference};

/// Show what others may use of this machine, and what they hold
///
/// Example: peerctl limits --peer bob
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct LimitsArguments {
    #[command(subcommand)]
    command: Option<LimitsCommand>,
    /// Only those of this peer: its name or id
    #[arg(long, value_parser = parse_reference)]
    peer: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(super) enum LimitsCommand {
    Set(SetArguments),
    Unset(UnsetArguments),
}

/// Set limits for all peers together, or for one; they act at once and survive a restart
///
/// A limit below what is held ends nothing: nothing more is admitted until enough has gone, and `peerctl limits` shows by how
/// much it is over. To have the machine back at once, use `peerctl pause`.
///
/// Example: peerctl limits set --cpu 2 --memory 4g --hours 22:00-07:00
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("what").args(["cpu", "memory", "containers", "disk", "bandwidth", "hours"]).required(true).multiple(true))]
pub(super) struct SetArguments {
    /// For this peer alone: its name or id [default: for the whole machine]
    #[arg(long, value_parser = parse_reference)]
    peer: Option<String>,
    /// Processors in sum, such as 2, 0.5 or 500m
    #[arg(long, allow_hyphen_values = true, value_name = "CPUS")]
    cpu: Option<Millicores>,
    /// Memory in sum, such as 512m or 2g
    #[arg(long, allow_hyphen_values = true, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// Deployments at one time
    #[arg(long, allow_hyphen_values = true, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    containers: Option<u32>,
    /// Disk for the images that peers bring, such as 10g
    #[arg(long, allow_hyphen_values = true, value_name = "SIZE")]
    disk: Option<ByteSize>,
    /// Bytes per second through the daemon, both ways together, such as 2m
    #[arg(long, allow_hyphen_values = true, value_name = "RATE", value_parser = parse_rate)]
    bandwidth: Option<ByteSize>,
    /// When containers may run, in this machine's local time, such as 22:00-07:00 or 9:00-12:00,13:00-18:00; at other times
    /// they are paused
    #[arg(long, allow_hyphen_values = true, value_name = "HOURS")]
    hours: Option<Hours>,
}

/// Take limits back: for the machine the settings hold again, for a peer what any peer may use
///
/// The processors, memory and deployments of a peer are always limited; `peerctl peers allow` sets them too.
///
/// Example: peerctl limits unset hours bandwidth --peer bob
#[derive(Debug, Args)]
pub(super) struct UnsetArguments {
    /// For this peer alone: its name or id [default: for the whole machine]
    #[arg(long, value_parser = parse_reference)]
    peer: Option<String>,
    /// Which limits
    #[arg(required = true, value_enum, value_name = "LIMIT")]
    limits: Vec<Key>,
}

/// Names a limit on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Key {
    Cpu,
    Memory,
    Containers,
    Disk,
    Bandwidth,
    Hours,
}

impl From<Key> for LimitKey {
    fn from(key: Key) -> Self {
        match key {
            Key::Cpu => Self::Cpu,
            Key::Memory => Self::Memory,
            Key::Containers => Self::Containers,
            Key::Disk => Self::Disk,
            Key::Bandwidth => Self::Bandwidth,
            Key::Hours => Self::Hours,
        }
    }
}

/// Reads a number of bytes per second: a size, with or without `/s`.
pub(super) fn parse_rate(text: &str) -> Result<ByteSize, String> {
    text.strip_suffix("/s").unwrap_or(text).parse::<ByteSize>().map_err(|error| error.to_string())
}

/// Runs `limits` and its subcommands.
pub(super) async fn run(session: &Session, arguments: LimitsArguments) -> Result<(), Failure> {
    let LimitsArguments { command, peer } = arguments;
    let report: LimitsReport = match command {
        None => {
            let query = peer.map(|peer| format!("?peer={}", percent_encoded(&peer))).unwrap_or_default();
            session.client.get(&format!("/v1/limits{query}")).await?
        }
        Some(LimitsCommand::Set(SetArguments { peer, cpu, memory, containers, disk, bandwidth, hours })) => {
            let set = Bounds { cpu, memory, containers, disk, bandwidth, hours };
            change(session, &ChangeLimits { peer, set, unset: Vec::new() }).await?
        }
        Some(LimitsCommand::Unset(UnsetArguments { peer, limits })) => {
            let unset = limits.into_iter().map(LimitKey::from).collect();
            change(session, &ChangeLimits { peer, set: Bounds::default(), unset }).await?
        }
    };
    session.output.result(&report, in_words)
}

async fn change(session: &Session, change: &ChangeLimits) -> Result<LimitsReport, Failure> {
    session.client.send(Method::PATCH, "/v1/limits", change).await
}

fn in_words(report: &LimitsReport) -> String {
    let mut rows: Vec<_> = report.machine.iter().map(|line| row("all peers", line)).collect();
    for peer in &report.peers {
        rows.extend(peer.limits.iter().map(|line| row(&peer.peer, line)));
    }
    table(["FOR", "LIMIT", "MOST", "HELD", "OVER", "FROM"], &rows)
}

fn row(whose: &str, line: &LimitLine) -> [String; 6] {
    let most = match (&line.limit, &line.hours) {
        (Some(limit), _) => amount(line.key, *limit),
        (None, Some(hours)) => hours.to_string(),
        (None, None) => "any".to_owned(),
    };
    let shown = |value: Option<u64>| value.map(|value| amount(line.key, value)).unwrap_or_default();
    let source = if line.limit.is_some() || line.hours.is_some() { line.source.clone() } else { String::new() };
    [whose.to_owned(), line.key.to_string(), most, shown(line.held), shown(line.over), source]
}

/// An amount in the unit of its key.
fn amount(key: LimitKey, value: u64) -> String {
    match key {
        LimitKey::Cpu => u32::try_from(value)
            .ok()
            .and_then(|value| Millicores::new(value).ok())
            .map_or_else(|| format!("{}", value / 1000), |cpu| cpu.to_string()),
        LimitKey::Memory | LimitKey::Disk => format_bytes(value),
        LimitKey::Bandwidth => format!("{}/s", format_bytes(value)),
        LimitKey::Containers | LimitKey::Hours => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_shown_in_their_unit() {
        let texts = LimitKey::ALL.map(|key| amount(key, 2048));
        assert_eq!(texts, ["2.048", "2 KiB", "2048", "2 KiB", "2 KiB/s", "2048"]);
        assert_eq!(amount(LimitKey::Cpu, 0), "0");
        assert_eq!(parse_rate("2m/s"), parse_rate("2m"));
        assert!(parse_rate("2m/h").is_err());
    }
}
