//! `stats`.

use std::time::Duration;

use clap::Args;
use peer_proto::query::Usage;
use peer_proto::unit::format_bytes;

use super::deployments::path_of;
use super::failure::Failure;
use super::{Session, parse_reference};

/// Pause between two samples.
const INTERVAL: Duration = Duration::from_secs(1);

/// Show what a deployment uses
///
/// Example: peerctl stats web --no-stream
#[derive(Debug, Args)]
pub(super) struct StatsArguments {
    /// Deployment: name or id
    #[arg(value_parser = parse_reference)]
    deployment: String,
    /// One sample instead of one a second until Ctrl-C
    #[arg(long)]
    no_stream: bool,
}

/// Runs `stats`.
pub(super) async fn run(session: &Session, arguments: &StatsArguments) -> Result<(), Failure> {
    let path = format!("{}/stats", path_of(&arguments.deployment));
    let mut header = true;
    loop {
        let usage: Usage = session.client.get(&path).await?;
        session.output.result(&usage, |usage| line(usage, header))?;
        if arguments.no_stream {
            return Ok(());
        }
        header = false;
        tokio::time::sleep(INTERVAL).await;
    }
}

/// A sample in columns of fixed width, so that later lines stand below it.
fn line(usage: &Usage, header: bool) -> String {
    let cpu = format!("{}.{:02}", usage.cpu_millicores / 1000, usage.cpu_millicores % 1000 / 10);
    let memory = format!("{} / {}", format_bytes(usage.memory_bytes), format_bytes(usage.memory_limit_bytes));
    let pids = format!("{} / {}", usage.pids, usage.pids_limit);
    let total = format!("{}.{:02} s", usage.cpu_microseconds / 1_000_000, usage.cpu_microseconds % 1_000_000 / 10_000);
    let header = if header { format!("{:<8}{:<14}{:<26}PIDS\n", "CPUS", "CPU TIME", "MEMORY") } else { String::new() };
    format!("{header}{cpu:<8}{total:<14}{memory:<26}{pids}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_stand_in_columns() {
        let usage = Usage {
            cpu_microseconds: 1_234_567,
            cpu_millicores: 507,
            memory_bytes: 3 << 20,
            memory_limit_bytes: 256 << 20,
            pids: 4,
            pids_limit: 100,
        };
        let expected = "\
CPUS    CPU TIME      MEMORY                    PIDS
0.50    1.23 s        3 MiB / 256 MiB           4 / 100
";
        assert_eq!(line(&usage, true), expected);
    }
}
