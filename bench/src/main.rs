//! Drives the real programs and a real engine: prints the figures that are promised, and the endurance run.
//!
//! [`world`] runs two peers and a gateway, [`counter`] counts what travels between them, [`engine`] is the comparison,
//! [`http`] the visitor, [`system`] the kernel's view; [`measure`] makes the table, [`ways`] and [`floods`]
//! smaller ones (the latter with the help of [`rogue`]), [`cycles`] the endurance run.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool speaks on its standard streams")]

mod chance;
mod counter;
mod cycles;
mod engine;
mod floods;
mod http;
mod image;
mod measure;
mod rogue;
mod system;
mod ways;
mod world;

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use clap::{Args, Parser};

/// What went wrong, for people; nothing here is handled by its kind.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Figures and endurance of Peer Compute on this machine; needs root and Docker Engine.
#[derive(Debug, Parser)]
#[command(name = "peer-bench")]
enum Task {
    /// Prints the table: starting, sending a changed layer, traffic, idle memory.
    Measure {
        #[command(flatten)]
        place: Place,
        /// Deployments to start; the median counts.
        #[arg(long, default_value_t = 10)]
        rounds: usize,
        /// Size of the download (MiB).
        #[arg(long, default_value_t = 1024)]
        download: u64,
    },
    /// Compares a daemon that enters containers' networks with one that is not root and needs forwarders.
    Ways {
        #[command(flatten)]
        place: Place,
        /// Deployments to start by each way; the median counts.
        #[arg(long, default_value_t = 10)]
        rounds: usize,
        /// Size of the download (MiB).
        #[arg(long, default_value_t = 512)]
        download: u64,
    },
    /// Compares one friend's deploys in quiet with those beside another friend at full rate.
    Floods {
        #[command(flatten)]
        place: Place,
        /// Deployments to start in each part of the run; the median counts.
        #[arg(long, default_value_t = 10)]
        rounds: usize,
    },
    /// Deploys and removes while the daemon is killed at random moments, then looks for anything left behind.
    Cycles {
        #[command(flatten)]
        place: Place,
        /// How many.
        #[arg(long, default_value_t = 100)]
        count: u32,
        /// Seed of the kills' moments; drawn from the clock when left out.
        #[arg(long)]
        seed: Option<u64>,
    },
}

#[derive(Debug, Args)]
struct Place {
    /// Unix socket of the container engine.
    #[arg(long, env = "ENGINE_SOCKET", default_value = "/var/run/docker.sock")]
    engine_socket: String,
    /// Directory of peerd, peerctl and peergate [default: where this program lies].
    #[arg(long)]
    programs: Option<PathBuf>,
}

impl Place {
    fn programs(&self) -> Result<PathBuf, Failure> {
        self.programs.clone().map_or_else(measure::programs, Ok)
    }
}

/// Progress, on standard error.
pub(crate) fn say(text: &str) {
    eprintln!("{text}");
}

fn main() -> ExitCode {
    let done = match Task::parse() {
        Task::Measure { place, rounds, download } => run_measure(&place, rounds, download, measure::run),
        Task::Ways { place, rounds, download } => run_measure(&place, rounds, download, ways::run),
        Task::Floods { place, rounds } => run_floods(&place, rounds),
        Task::Cycles { place, count, seed } => run_cycles(&place, count, seed),
    };
    match done {
        Ok(status) => status,
        Err(error) => {
            say(&format!("error: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn run_measure(
    place: &Place,
    rounds: usize,
    mebibytes: u64,
    run: fn(&measure::Plan) -> Result<Vec<measure::Figure>, Failure>,
) -> Result<ExitCode, Failure> {
    if rounds == 0 || mebibytes == 0 {
        return Err("--rounds and --download must be at least 1".into());
    }
    let download = mebibytes.checked_mul(1 << 20).ok_or("--download is too large")?;
    let plan = measure::Plan { rounds, download, engine: place.engine_socket.clone(), programs: place.programs()? };
    print!("{}", measure::table(&run(&plan)?));
    Ok(ExitCode::SUCCESS)
}

fn run_floods(place: &Place, rounds: usize) -> Result<ExitCode, Failure> {
    if rounds == 0 {
        return Err("--rounds must be at least 1".into());
    }
    let plan = floods::Plan { rounds, engine: place.engine_socket.clone(), programs: place.programs()? };
    print!("{}", measure::table(&floods::run(&plan)?));
    Ok(ExitCode::SUCCESS)
}

fn run_cycles(place: &Place, cycles: u32, seed: Option<u64>) -> Result<ExitCode, Failure> {
    let seed = match seed {
        Some(seed) => seed,
        None => SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
    };
    let plan = cycles::Plan { cycles, seed, engine: place.engine_socket.clone(), programs: place.programs()? };
    let faults = cycles::run(&plan)?;
    if faults.is_empty() {
        println!("nothing is left behind (seed {seed})");
        return Ok(ExitCode::SUCCESS);
    }
    for fault in &faults {
        println!("left behind: {fault}");
    }
    println!("again with: peer-bench cycles --count {cycles} --seed {seed}");
    Ok(ExitCode::FAILURE)
}
