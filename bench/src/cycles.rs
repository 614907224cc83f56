//! Deployments that come and go while bob's daemon is killed at random moments, and what must be left of it all: nothing.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rusqlite::{Connection, OpenFlags};

use crate::{
    Failure,
    chance::Chance,
    engine::Engine,
    image::{self, PORT},
    say,
    system::{descriptors, network_namespaces},
    world::{World, wait_for},
};

const NODE_LABEL: &str = "peer-compute.node";
/// Longest time that cleaning up after one cycle may take.
const CLEAN: Duration = Duration::from_secs(90);
/// Longest time until everything has settled at the end.
const SETTLE: Duration = Duration::from_mins(1);
/// Cycles at the end without a kill, in one life of the daemon: a descriptor lost in each would show.
const CALM: u32 = 10;
/// Descriptors that may come and go with connections.
const TOLERANCE: usize = 3;
/// Different images, so that transfers are interrupted too.
const IMAGES: u64 = 12;
const LAYER_BYTES: usize = 4 << 20;

/// What to do.
pub(crate) struct Plan {
    pub(crate) cycles: u32,
    pub(crate) seed: u64,
    pub(crate) engine: String,
    pub(crate) programs: PathBuf,
}

/// When bob's daemon dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    Never,
    BeforeDeploy,
    DuringDeploy,
    WhileRunning,
    DuringStop,
    DuringRemove,
}

/// How much there was at the beginning.
struct Baseline {
    namespaces: usize,
    foreign: usize,
    bob: Vec<String>,
    alice: Vec<String>,
    gateway: Vec<String>,
}

struct Run {
    world: World,
    engine: Engine,
    chance: Chance,
    archives: Vec<String>,
    images: Vec<String>,
    kills: BTreeMap<Moment, u32>,
    failed_deploys: u32,
}

/// Runs the cycles. Gives what was found to be left behind; nothing is what it should be.
pub(crate) fn run(plan: &Plan) -> Result<Vec<String>, Failure> {
    say(&format!("{} cycles, seed {}", plan.cycles, plan.seed));
    let engine = Engine::new(&plan.engine);
    let namespaces = network_namespaces()?.len();
    let world = World::start(&plan.programs, &plan.engine)?;
    let foreign = engine.running_without(NODE_LABEL, &world.bob_id)?;
    let chance = Chance::new(plan.seed);
    let (archives, images, kills) = (Vec::new(), Vec::new(), BTreeMap::new());
    let mut run = Run { world, engine, chance, archives, images, kills, failed_deploys: 0 };
    let done = run.everything(plan, namespaces, foreign);
    if done.as_ref().map_or(true, |faults| !faults.is_empty()) {
        say(&format!("--- last lines of bob's log\n{}", run.world.log_tail("bob", 40)));
    }
    done
}

impl Run {
    fn everything(&mut self, plan: &Plan, namespaces: usize, foreign: usize) -> Result<Vec<String>, Failure> {
        for number in 0..IMAGES {
            let archive = image::archive(&format!("cycle:{number}"), &[(plan.seed ^ number, LAYER_BYTES)])?;
            self.archives.push(self.world.write(&format!("{number}.tar"), &archive.bytes)?);
            self.images.push(archive.id);
        }
        // One calm cycle first: whatever is opened once and kept belongs to the baseline.
        self.cycle(Moment::Never)?;
        self.world.restart_bob()?;
        self.cycle(Moment::Never)?;
        let baseline = self.baseline(namespaces, foreign)?;
        let start = Instant::now();
        for number in 0..plan.cycles {
            let moment = if number + CALM >= plan.cycles { Moment::Never } else { self.moment() };
            *self.kills.entry(moment).or_default() += 1;
            self.cycle(moment).map_err(|error| format!("cycle {number} ({moment:?}): {error}"))?;
        }
        let kills: u32 = self.kills.iter().filter(|(moment, _)| **moment != Moment::Never).map(|(_, n)| n).sum();
        let seconds = start.elapsed().as_secs();
        say(&format!("{} cycles with {kills} kills in {seconds} s: {:?}", plan.cycles, self.kills));
        say(&format!("{} deploys were cut short by a kill and reported it", self.failed_deploys));
        self.judge(&baseline)
    }

    /// A kill in four of five cycles.
    fn moment(&mut self) -> Moment {
        match self.chance.below(10) {
            0 | 1 => Moment::Never,
            2 => Moment::BeforeDeploy,
            3..=5 => Moment::DuringDeploy,
            6 => Moment::WhileRunning,
            7 => Moment::DuringStop,
            _ => Moment::DuringRemove,
        }
    }

    fn baseline(&mut self, namespaces: usize, foreign: usize) -> Result<Baseline, Failure> {
        let [bob, alice, gateway] = self.settled_descriptors()?;
        Ok(Baseline { namespaces, foreign, bob, alice, gateway })
    }

    /// Descriptors of all three after a pause in which what is idle is closed.
    fn settled_descriptors(&self) -> Result<[Vec<String>; 3], Failure> {
        thread::sleep(Duration::from_secs(5));
        let World { bob, alice, gateway, .. } = &self.world;
        Ok([descriptors(bob.process())?, descriptors(alice.process())?, descriptors(gateway.process())?])
    }

    fn cycle(&mut self, moment: Moment) -> Result<(), Failure> {
        if moment == Moment::BeforeDeploy {
            self.world.crash_bob()?;
        }
        let index = usize::try_from(self.chance.below(self.archives.len() as u64))?;
        let archive = self.archives[index].clone();
        let port = PORT.to_string();
        let deploy = ["deploy", &archive, "--peer", "bob", "--name", "cycle", "--expose", &port, "--json"];
        let deploying = self.world.peerctl("alice", &deploy)?;
        if moment == Moment::DuringDeploy {
            self.pause(900);
            self.world.crash_bob()?;
        }
        let said = deploying.wait()?;
        if !said.success {
            self.failed_deploys += 1;
            if !matches!(moment, Moment::DuringDeploy | Moment::BeforeDeploy) {
                return Err(format!("deploy failed: {}", said.complaint.trim()).into());
            }
        } else if moment == Moment::Never {
            self.visit(&said.output)?;
        }
        if moment == Moment::WhileRunning {
            self.world.crash_bob()?;
        }
        self.end(moment)
    }

    fn visit(&mut self, output: &str) -> Result<(), Failure> {
        let deployed: serde_json::Value = serde_json::from_str(output.lines().last().unwrap_or_default())?;
        let url = deployed["url"].as_str().ok_or("the deployment has no address")?;
        wait_for("the first 200", SETTLE, || {
            Ok(self.world.door.connect(url).and_then(|mut client| client.get("/")).is_ok_and(|page| page.status == 200))
        })
    }

    fn pause(&mut self, milliseconds: u64) {
        thread::sleep(Duration::from_millis(self.chance.below(milliseconds)));
    }

    /// Stops and removes until nothing is left of the cycle, as its owner would.
    fn end(&mut self, moment: Moment) -> Result<(), Failure> {
        let stopping = self.world.peerctl("alice", &["stop", "cycle"])?;
        if moment == Moment::DuringStop {
            self.pause(150);
            self.world.crash_bob()?;
        }
        stopping.wait()?;
        let mut removing = Some(self.world.peerctl("alice", &["rm", "cycle", "--force"])?);
        if moment == Moment::DuringRemove {
            self.pause(120);
            self.world.crash_bob()?;
        }
        let end = Instant::now() + CLEAN;
        let mut complaint = String::new();
        loop {
            if let Some(removing) = removing.take() {
                complaint = removing.wait()?.complaint;
            }
            let listed = self.world.peerctl("alice", &["ps", "--all", "--json"])?.succeed()?;
            let is_empty = |field: &str| listed[field].as_array().is_some_and(Vec::is_empty);
            if is_empty("deployments") && is_empty("unreachable") {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(format!("it cannot be removed: {}; listed: {listed}", complaint.trim()).into());
            }
            if !is_empty("deployments") {
                removing = Some(self.world.peerctl("alice", &["rm", "cycle", "--force"])?);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn judge(&mut self, baseline: &Baseline) -> Result<Vec<String>, Failure> {
        let mut faults = Vec::new();
        let containers = self.wait_for_none(|run| run.engine.labelled(NODE_LABEL, &run.world.bob_id))?;
        check(&mut faults, "containers with bob's label", &containers);
        faults.extend(self.namespace_faults(baseline)?);
        let [bob, alice, gateway] = self.settled_descriptors()?;
        let pairs =
            [("bob", &baseline.bob, bob), ("alice", &baseline.alice, alice), ("gateway", &baseline.gateway, gateway)];
        for (who, before, after) in pairs {
            say(&format!("{who}: {} descriptors before, {} after", before.len(), after.len()));
            if after.len() > before.len() + TOLERANCE {
                faults.push(format!("{who}: {} descriptors became {}: {after:?}", before.len(), after.len()));
            }
        }
        let images = self.images.iter().filter(|image| self.engine.has_image(image)).count();
        say(&format!("{images} of {} images are still in the engine, counted as brought", self.images.len()));
        self.world.stop_all()?;
        for (who, tables) in [("bob", &["deployment"][..]), ("alice", &["remote_deployment"][..])] {
            faults.extend(row_faults(&self.world.path(who).join("peer.db"), who, tables)?);
        }
        faults.extend(image_faults(&self.world.path("bob").join("peer.db"), images)?);
        self.remove_images();
        Ok(faults)
    }

    fn wait_for_none<T>(&self, list: impl Fn(&Self) -> Result<Vec<T>, Failure>) -> Result<Vec<T>, Failure> {
        let end = Instant::now() + SETTLE;
        loop {
            let left = list(self)?;
            if left.is_empty() || Instant::now() > end {
                return Ok(left);
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    fn namespace_faults(&self, baseline: &Baseline) -> Result<Vec<String>, Failure> {
        let end = Instant::now() + SETTLE;
        loop {
            // Other people's containers come and go beside ours.
            let foreign = self.engine.running_without(NODE_LABEL, &self.world.bob_id)?;
            let allowed = baseline.namespaces + foreign.saturating_sub(baseline.foreign);
            let now = network_namespaces()?;
            if now.len() <= allowed {
                say(&format!("network namespaces: {} before, {} after", baseline.namespaces, now.len()));
                return Ok(Vec::new());
            }
            if Instant::now() > end {
                let before = baseline.namespaces;
                return Ok(vec![format!("{before} network namespaces became {}: {now:?}", now.len())]);
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// The images of this run are of no use to anybody; a machine's own daemon would remove them in time.
    fn remove_images(&self) {
        for image in &self.images {
            self.engine.remove_image(image);
        }
    }
}

fn check(faults: &mut Vec<String>, what: &str, left: &[String]) {
    say(&format!("{what}: {}", left.len()));
    if !left.is_empty() {
        faults.push(format!("{what} are left: {left:?}"));
    }
}

fn open(path: &Path) -> Result<Connection, Failure> {
    Ok(Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?)
}

fn row_faults(database: &Path, who: &str, tables: &[&str]) -> Result<Vec<String>, Failure> {
    let connection = open(database)?;
    let mut faults = Vec::new();
    for table in tables {
        let count: u32 = connection.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0))?;
        say(&format!("{who}: {count} rows in {table}"));
        if count != 0 {
            faults.push(format!("{who}: {count} rows in {table}"));
        }
    }
    let integrity: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
    if integrity != "ok" {
        faults.push(format!("{who}: the database is damaged: {integrity}"));
    }
    Ok(faults)
}

/// Every image of this run that the engine still holds must be one that bob knows he brought, or it is never cleaned.
fn image_faults(database: &Path, in_engine: usize) -> Result<Vec<String>, Failure> {
    let connection = open(database)?;
    let known: usize = connection.query_row("SELECT count(*) FROM image", [], |row| row.get(0))?;
    let orphans: u32 = connection.query_row(
        "SELECT count(*) FROM image_owner WHERE digest NOT IN (SELECT digest FROM image)",
        [],
        |row| row.get(0),
    )?;
    say(&format!("bob: {known} images recorded as brought, {orphans} owners of none"));
    let mut faults = Vec::new();
    if in_engine > known {
        faults.push(format!("{in_engine} images of ours are in the engine, but only {known} are recorded"));
    }
    if orphans != 0 {
        faults.push(format!("{orphans} rows in image_owner name images that are not recorded"));
    }
    Ok(faults)
}
