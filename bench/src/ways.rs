//! The two ways to a container's port, in one run: a daemon that enters its network, and one that needs a forwarder.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    time::{Duration, Instant},
};

use crate::{
    Failure,
    engine::Engine,
    image,
    measure::{Figure, Plan, deploy, first_page, median, quotient, request_rate},
    say,
    system::resident,
    world::{User, World},
};

/// A user whom nobody else is.
const USER: u32 = 48_124;
const ROUNDS_OF_REQUESTS: usize = 3;
const MIB: u64 = 1 << 20;

/// What one way gave.
struct Way {
    starting: Duration,
    /// Bytes a second.
    download: u64,
    requests: u64,
    /// Bytes that the forwarder has in memory.
    forwarder: Option<u64>,
}

/// Measures both.
pub(crate) fn run(plan: &Plan) -> Result<Vec<Figure>, Failure> {
    say("a daemon that is root");
    let entered = measure(plan, None)?;
    say("a daemon in the group of the engine's socket");
    let group = fs::metadata(&plan.engine)?.gid();
    let forwarded = measure(plan, Some(User { user: USER, group }))?;
    let row =
        |what, ours: String, other: String, ratio: String| Figure { what, ours, other, ratio, target: "", met: None };
    let rate = |bytes: u64| format!("{:.0} MiB/s", quotient(bytes, MIB));
    let (mine, theirs) = (forwarded.starting, entered.starting);
    let in_use = forwarded.forwarder.map_or_else(String::new, |bytes| format!("{:.1} MiB", quotient(bytes, MIB)));
    Ok(vec![
        row(
            "deploy to the first 200, by a forwarder and by entering the namespace; median",
            format!("{} ms", mine.as_millis()),
            format!("{} ms", theirs.as_millis()),
            format!("{} ms on top", mine.saturating_sub(theirs).as_millis()),
        ),
        row(
            "one download through the gateway",
            rate(forwarded.download),
            rate(entered.download),
            format!("{:.2}", quotient(forwarded.download, entered.download)),
        ),
        row(
            "requests per second on 32 kept connections; median",
            forwarded.requests.to_string(),
            entered.requests.to_string(),
            format!("{:.2}", quotient(forwarded.requests, entered.requests)),
        ),
        row("memory of one forwarder after that", in_use, String::new(), String::new()),
    ])
}

fn measure(plan: &Plan, user: Option<User>) -> Result<Way, Failure> {
    let mut world = World::start_as(&plan.programs, &plan.engine, user)?;
    let done = measure_in(plan, &mut world, user.is_some());
    if done.is_err() {
        say(&format!("--- last lines of bob's log\n{}", world.log_tail("bob", 40)));
    }
    done
}

fn measure_in(plan: &Plan, world: &mut World, forwarded: bool) -> Result<Way, Failure> {
    let engine = Engine::new(&plan.engine);
    let archive = image::archive("bench:1", &[])?;
    let path = world.write("bench.tar", &archive.bytes)?;
    let served = deploy(world, &path, "served", &["--cpu", "1.5", "-e", "ACCESS_LOG=no"])?;
    first_page(&world.door, &served.url)?;
    let mut starts = Vec::new();
    for _ in 0..plan.rounds {
        let start = Instant::now();
        let deployed = deploy(world, &path, "started", &[])?;
        first_page(&world.door, &deployed.url)?;
        starts.push(start.elapsed());
        world.peerctl("alice", &["rm", "started", "--force"])?.succeed()?;
    }
    let start = Instant::now();
    let answer = world.door.connect(&served.url)?.drain(&format!("/bytes/{}", plan.download))?;
    if answer.status != 200 || answer.length != plan.download {
        return Err(format!("the download gave {} and {} bytes", answer.status, answer.length).into());
    }
    let download = u64::try_from(u128::from(plan.download) * 1000 / start.elapsed().as_millis().max(1))?;
    let mut rates = Vec::new();
    for _ in 0..ROUNDS_OF_REQUESTS {
        rates.push(request_rate(|| world.door.connect(&served.url))?);
    }
    say(&format!("  starts {starts:.0?}\n  requests {rates:?}"));
    let name = format!("peer-compute-forwarder-{}", served.id);
    let forwarder = if forwarded { Some(resident(engine.process(&name)?)?) } else { None };
    world.peerctl("alice", &["rm", "served", "--force"])?.succeed()?;
    world.stop_all()?;
    engine.remove_image(&archive.id);
    Ok(Way { starting: median(&mut starts), download, requests: median(&mut rates), forwarder })
}
