//! One friend at full rate beside another who deploys, in one run.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::{
    Failure,
    engine::Engine,
    image,
    measure::{Figure, deploy, median},
    rogue::Rogue,
    say,
    world::World,
};

/// For how long the flood lasts before anything is measured: bursts that are granted at once are used up.
const FLOODED_BEFORE: Duration = Duration::from_secs(5);

/// What to do.
pub(crate) struct Plan {
    pub(crate) rounds: usize,
    pub(crate) engine: String,
    pub(crate) programs: PathBuf,
}

/// Measures deploys in quiet, under the flood, and in quiet again.
pub(crate) fn run(plan: &Plan) -> Result<Vec<Figure>, Failure> {
    let mut world = World::start(&plan.programs, &plan.engine)?;
    let done = figures(plan, &mut world);
    if done.is_err() {
        say(&format!("--- last lines of bob's log\n{}", world.log_tail("bob", 40)));
    }
    done
}

fn figures(plan: &Plan, world: &mut World) -> Result<Vec<Figure>, Failure> {
    let engine = Engine::new(&plan.engine);
    let archive = image::archive("floods:1", &[])?;
    let path = world.write("floods.tar", &archive.bytes)?;
    let key = world.turned_friend("mallory")?;
    let rogue = Rogue::new(&key, &world.bob_id, &world.bob_address()?)?;
    say("one deploy that is not counted, and deploys in quiet");
    deploys(world, &path, 1)?;
    let mut quiet = deploys(world, &path, plan.rounds)?;
    say("deploys beside a friend at full rate");
    let over = AtomicBool::new(false);
    let (flooded, calls, lasted) = thread::scope(|scope| {
        let begun = Instant::now();
        let flood = scope.spawn(|| rogue.flood(&over));
        thread::sleep(FLOODED_BEFORE);
        let flooded = deploys(world, &path, plan.rounds);
        over.store(true, Ordering::Relaxed);
        (flooded, flood.join(), begun.elapsed())
    });
    let (mut flooded, calls) = (flooded?, calls.map_err(|_| "the flood panicked")?);
    drop(rogue);
    say("deploys in quiet again");
    quiet.extend(deploys(world, &path, plan.rounds)?);
    say(&format!("  quiet {quiet:.0?}\n  flooded {flooded:.0?}"));
    world.stop_all()?;
    engine.remove_image(&archive.id);
    let (with, without) = (median(&mut flooded), median(&mut quiet));
    let milliseconds = |time: Duration| format!("{} ms", time.as_millis());
    let rate = u128::from(calls) * 1000 / lasted.as_millis().max(1);
    Ok(vec![
        Figure {
            what: "deploy (image present) beside another friend at full rate, against quiet; median",
            ours: milliseconds(with),
            other: milliseconds(without),
            ratio: format!("{:.2}", with.as_secs_f64() / without.as_secs_f64()),
            target: "below 2",
            met: Some(with < 2 * without),
        },
        Figure {
            what: "exchanges that the other friend got in that time",
            ours: format!("{calls}, {rate} a second"),
            other: String::new(),
            ratio: String::new(),
            target: "",
            met: None,
        },
    ])
}

fn deploys(world: &mut World, archive: &str, rounds: usize) -> Result<Vec<Duration>, Failure> {
    let mut times = Vec::new();
    for _ in 0..rounds {
        let start = Instant::now();
        deploy(world, archive, "another", &["--cpu", "0.2"])?;
        times.push(start.elapsed());
        world.peerctl("alice", &["rm", "another", "--force"])?.succeed()?;
    }
    Ok(times)
}
