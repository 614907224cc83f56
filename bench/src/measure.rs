//! The figures: starting, sending a changed layer, carrying traffic, idle memory.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    Failure,
    engine::{Engine, Recipe},
    http::{self, Client, Door},
    image::{self, PORT},
    say,
    system::{processor_seconds, resident},
    world::{World, wait_for},
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const FIRST_PAGE: Duration = Duration::from_secs(30);
const IDLE: Duration = Duration::from_secs(10);
const CONNECTIONS: usize = 32;
const REQUESTS_FOR: Duration = Duration::from_secs(3);
const REQUESTS_PAUSE: Duration = Duration::from_secs(1);
const REQUEST_ROUNDS: usize = 3;
const UNCHANGED_BYTES: usize = 16 << 20;
const CHANGED_BYTES: usize = 8 << 20;

/// What to do.
pub(crate) struct Plan {
    pub(crate) rounds: usize,
    pub(crate) download: u64,
    pub(crate) engine: String,
    pub(crate) programs: PathBuf,
}

/// One line of the table.
pub(crate) struct Figure {
    pub(crate) what: &'static str,
    pub(crate) ours: String,
    pub(crate) other: String,
    pub(crate) ratio: String,
    pub(crate) target: &'static str,
    pub(crate) met: Option<bool>,
}

/// A deployment that alice has made.
pub(crate) struct Deployed {
    pub(crate) id: String,
    pub(crate) url: String,
    bytes_sent: u64,
}

/// Measures everything.
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
    let archive = image::archive("bench:1", &[])?;
    let path = world.write("bench.tar", &archive.bytes)?;
    // Requests are measured, not the engine's writing of a line for each.
    let served = deploy(world, &path, "served", &["--cpu", "1.5", "-e", "ACCESS_LOG=no"])?;
    first_page(&world.door, &served.url)?;
    let mut all = Vec::new();
    say("idle memory");
    thread::sleep(IDLE);
    all.extend(memory(world)?);
    say("a second deployment with one changed layer");
    all.extend(changed_layer(world, &engine)?);
    say("from deploy to the first 200, beside the engine alone");
    all.push(starting(plan, world, &engine, &path)?);
    let container = format!("peer-compute-{}", served.id);
    let process = engine.process(&container)?;
    say("one download, through the gateway and directly");
    all.extend(download(plan.download, world, &served.url, process)?);
    say("requests per second, through the gateway and directly");
    all.push(requests(&world.door, &served.url, process)?);
    world.peerctl("alice", &["rm", "served", "--force"])?.succeed()?;
    world.stop_all()?;
    engine.remove_image(&archive.id);
    Ok(all)
}

pub(crate) fn deploy(world: &mut World, archive: &str, name: &str, further: &[&str]) -> Result<Deployed, Failure> {
    let port = PORT.to_string();
    let mut arguments = vec!["deploy", archive, "--peer", "bob", "--name", name, "--expose", &port, "--json"];
    arguments.extend(further);
    let said = world.peerctl("alice", &arguments)?.succeed()?;
    let text = |field: &str| said[field].as_str().map(str::to_owned).ok_or_else(|| format!("no {field} in {said}"));
    Ok(Deployed { id: text("id")?, url: text("url")?, bytes_sent: said["bytes_sent"].as_u64().unwrap_or(0) })
}

pub(crate) fn first_page(door: &Door, url: &str) -> Result<(), Failure> {
    wait_for("the first 200 through the gateway", FIRST_PAGE, || {
        Ok(door.connect(url).and_then(|mut client| client.get("/")).is_ok_and(|page| page.status == 200))
    })
}

fn memory(world: &World) -> Result<Vec<Figure>, Failure> {
    let limit = 40 * MIB;
    let programs = [
        ("idle memory of peerd, hosting one deployment", &world.bob),
        ("idle memory of peerd without an engine", &world.alice),
        ("idle memory of peergate", &world.gateway),
    ];
    let figures = programs.map(|(what, daemon)| {
        let bytes = resident(daemon.process())?;
        let (ours, met) = (mebibytes(bytes), Some(bytes <= limit));
        Ok(Figure { what, ours, other: String::new(), ratio: String::new(), target: "at most 40 MiB", met })
    });
    figures.into_iter().collect()
}

fn changed_layer(world: &mut World, engine: &Engine) -> Result<Vec<Figure>, Failure> {
    let unchanged = (1, UNCHANGED_BYTES);
    let first = image::archive("layers:1", &[unchanged, (2, CHANGED_BYTES)])?;
    let second = image::archive("layers:2", &[unchanged, (3, CHANGED_BYTES)])?;
    let paths = [world.write("first.tar", &first.bytes)?, world.write("second.tar", &second.bytes)?];
    deploy(world, &paths[0], "layers", &[])?;
    world.peerctl("alice", &["rm", "layers", "--force"])?.succeed()?;
    let before = world.sent_to_bob();
    let deployed = deploy(world, &paths[1], "layers", &[])?;
    let travelled = world.sent_to_bob() - before;
    world.peerctl("alice", &["rm", "layers", "--force"])?.succeed()?;
    let engine_images = [first.id, second.id];
    let layer = second.layers.last().copied().unwrap_or_default() as u64;
    let figure = |what, bytes: u64| Figure {
        what,
        ours: format!("{bytes} B"),
        other: format!("{layer} B"),
        ratio: format!("{:.4}", quotient(bytes, layer)),
        target: "at most 1.05",
        met: Some(bytes * 100 <= layer * 105),
    };
    let figures = vec![
        figure("second deploy, one layer changed: TCP payload sent, against the layer", travelled),
        figure("the same as peerctl reports it (bytes_sent)", deployed.bytes_sent),
    ];
    for image in &engine_images {
        engine.remove_image(image);
    }
    Ok(figures)
}

fn starting(plan: &Plan, world: &mut World, engine: &Engine, archive: &str) -> Result<Figure, Failure> {
    let (mut ours, mut others) = (Vec::new(), Vec::new());
    for round in 0..plan.rounds {
        let start = Instant::now();
        let deployed = deploy(world, archive, "started", &[])?;
        first_page(&world.door, &deployed.url)?;
        ours.push(start.elapsed());
        let recipe = engine.recipe(&format!("peer-compute-{}", deployed.id))?;
        world.peerctl("alice", &["rm", "started", "--force"])?.succeed()?;
        others.push(start_directly(engine, &recipe, &format!("peer-bench-{}-{round}", std::process::id()))?);
    }
    say(&format!("  ours {ours:.0?}\n  the engine's {others:.0?}"));
    let (ours, other) = (median(&mut ours), median(&mut others));
    let on_top = ours.saturating_sub(other);
    Ok(Figure {
        what: "deploy (image present) to the first 200 through the gateway, against the engine alone; median",
        ours: format!("{} ms", ours.as_millis()),
        other: format!("{} ms", other.as_millis()),
        ratio: format!("{:.2}, {} ms on top", ours.as_secs_f64() / other.as_secs_f64(), on_top.as_millis()),
        target: "at most 100 ms on top",
        met: Some(on_top <= Duration::from_millis(100)),
    })
}

/// Create, start and first 200, by the engine's own interface.
fn start_directly(engine: &Engine, recipe: &Recipe, name: &str) -> Result<Duration, Failure> {
    let start = Instant::now();
    let ran = engine.run(name, recipe).and_then(|()| {
        let process = engine.process(name)?;
        wait_for("the first 200 from the engine's own container", FIRST_PAGE, || {
            let page = http::connect_inside(process, PORT).and_then(|mut client| client.get("/"));
            Ok(page.is_ok_and(|page| page.status == 200))
        })
    });
    let elapsed = start.elapsed();
    engine.remove(name)?;
    ran.map(|()| elapsed)
}

fn download(size: u64, world: &World, url: &str, process: u32) -> Result<Vec<Figure>, Failure> {
    let path = format!("/bytes/{size}");
    let fetch = |mut client: Client| -> Result<f64, Failure> {
        let start = Instant::now();
        let answer = client.drain(&path)?;
        if answer.status != 200 || answer.length != size {
            return Err(format!("the download gave {} and {} bytes", answer.status, answer.length).into());
        }
        Ok(start.elapsed().as_secs_f64())
    };
    let used = |daemon: u32| processor_seconds(daemon);
    let (bob, gateway) = (world.bob.process(), world.gateway.process());
    let before = (used(bob)?, used(gateway)?);
    let ours = fetch(world.door.connect(url)?)?;
    let after = (used(bob)?, used(gateway)?);
    let other = fetch(http::connect_inside(process, PORT)?)?;
    let rate = |seconds: f64| format!("{:.0} MiB/s", quotient(size, MIB) / seconds);
    let per_gibibyte = |seconds: f64| seconds / quotient(size, GIB);
    let processor =
        format!("peerd {:.2} s, peergate {:.2} s", per_gibibyte(after.0 - before.0), per_gibibyte(after.1 - before.1));
    let rated = Figure {
        what: "one download through the gateway (TLS), against the same program reached directly",
        ours: rate(ours),
        other: rate(other),
        ratio: format!("{:.3}", other / ours),
        target: "",
        met: None,
    };
    let what = "processor time per GiB of that download";
    let used = Figure { what, ours: processor, other: String::new(), ratio: String::new(), target: "", met: None };
    Ok(vec![rated, used])
}

fn requests(door: &Door, url: &str, process: u32) -> Result<Figure, Failure> {
    let (mut ours, mut others) = (Vec::new(), Vec::new());
    for _ in 0..REQUEST_ROUNDS {
        ours.push(request_rate(|| door.connect(url))?);
        thread::sleep(REQUESTS_PAUSE);
        others.push(request_rate(|| http::connect_inside(process, PORT))?);
        thread::sleep(REQUESTS_PAUSE);
    }
    say(&format!("  ours {ours:?}\n  directly {others:?}"));
    let (ours, other) = (median(&mut ours), median(&mut others));
    Ok(Figure {
        what: "requests per second on 32 kept connections, through the gateway (TLS) against directly; median",
        ours: ours.to_string(),
        other: other.to_string(),
        ratio: format!("{:.3}", quotient(ours, other)),
        target: "",
        met: None,
    })
}

pub(crate) fn request_rate(connect: impl Fn() -> Result<Client, Failure>) -> Result<u64, Failure> {
    let (done, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let ready = Arc::new(Barrier::new(CONNECTIONS + 1));
    let mut threads = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut client = connect()?;
        if client.drain("/healthz")?.status != 200 {
            return Err("the page did not answer 200".into());
        }
        let (done, over, ready) = (done.clone(), over.clone(), ready.clone());
        threads.push(thread::spawn(move || -> Result<(), Failure> {
            ready.wait();
            while !over.load(Ordering::Relaxed) {
                let status = client.drain("/healthz")?.status;
                if status != 200 {
                    return Err(format!("a request was answered {status}").into());
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        }));
    }
    ready.wait();
    let start = Instant::now();
    thread::sleep(REQUESTS_FOR);
    let (count, elapsed) = (done.load(Ordering::Relaxed), start.elapsed());
    over.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().map_err(|_| "a client panicked")??;
    }
    Ok(count * 1000 / u64::try_from(elapsed.as_millis())?.max(1))
}

/// The middle one, or the lower of the two in the middle.
pub(crate) fn median<T: Ord + Copy>(all: &mut [T]) -> T {
    all.sort_unstable();
    all[(all.len() - 1) / 2]
}

#[expect(clippy::cast_precision_loss, reason = "a quotient for people, of numbers far below 2^52")]
pub(crate) fn quotient(one: u64, other: u64) -> f64 {
    one as f64 / other as f64
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", quotient(bytes, MIB))
}

/// The figures as a table in Markdown.
pub(crate) fn table(figures: &[Figure]) -> String {
    let mut text =
        String::from("| What | Peer Compute | Compared with | Ratio | Target | Met |\n|---|---|---|---|---|---|\n");
    for Figure { what, ours, other, ratio, target, met } in figures {
        let met = met.map_or("", |met| if met { "yes" } else { "**no**" });
        text.extend(["| ", what, " | ", ours, " | ", other, " | ", ratio, " | ", target, " | ", met, " |\n"]);
    }
    text
}

/// Where the programs lie: beside this one.
pub(crate) fn programs() -> Result<PathBuf, Failure> {
    let own = std::env::current_exe()?;
    Ok(own.parent().map(Path::to_path_buf).ok_or("this program lies nowhere")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_the_lower_middle() {
        assert_eq!(median(&mut [3, 1, 2]), 2);
        assert_eq!(median(&mut [4, 1, 3, 2]), 2);
    }

    #[test]
    fn a_missed_target_is_seen_in_the_table() {
        let text = |text: &str| text.to_owned();
        let figure = |met| Figure { what: "w", ours: text("1"), other: text("2"), ratio: text("3"), target: "t", met };
        let table = table(&[figure(Some(true)), figure(Some(false)), figure(None)]);
        let rows: Vec<_> = table.lines().skip(2).collect();
        assert_eq!(rows, ["| w | 1 | 2 | 3 | t | yes |", "| w | 1 | 2 | 3 | t | **no** |", "| w | 1 | 2 | 3 | t |  |"]);
    }
}
