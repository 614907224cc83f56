//! No envelope acts twice, wherever the wall clock goes (V3).
#![expect(clippy::unwrap_used, reason = "a failing step is a failing test")]

use std::collections::HashMap;

use peer_proto::card::{Card, SignedCard};
use peer_proto::deploy::Request;
use peer_proto::envelope;
use peer_proto::grant::Grants;
use peer_proto::id::{DeploymentId, RequestId};
use peer_proto::identity::Identity;
use peer_proto::unit::Timestamp;
use peer_state::database::Database;
use proptest::prelude::*;

use super::*;
use crate::authorise::{Held, authorise};
use crate::refused::Refused;
use crate::run::Run;
use crate::trust::{Repeated, Trust};

const NOW: u64 = 1_800_000_000_000;
const HOUR: u64 = 3_600_000;

/// What happens to a machine and to the requests that somebody has recorded.
#[derive(Debug, Clone)]
enum Step {
    /// A new request arrives; its signer's clock differs by so much.
    Send(i64),
    /// A request that was made earlier arrives once more.
    Copy(usize),
    /// Time passes.
    Pass(u64),
    /// The wall clock is set.
    Set(i64),
    /// The owner says that the wall clock is right.
    Accept,
    /// The daemon starts again.
    Restart,
}

/// A machine whose clocks are ours to set.
struct Machine {
    _directory: tempfile::TempDir,
    database: Database,
    alice: Identity,
    bob: PeerId,
    run: Run,
    wall: u64,
    elapsed: u64,
    sent: Vec<(RequestId, Vec<u8>)>,
    acted: HashMap<RequestId, u32>,
}

impl Machine {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let schemas = [peer_state::audit::SCHEMA, crate::SCHEMA];
        let database = Database::open(&directory.path().join("db"), &schemas).unwrap();
        let trust = Trust::open(database.clone()).unwrap();
        let (alice, bob) = (Identity::generate(), Identity::generate().peer_id());
        let card = SignedCard::sign(&alice, Card::new(&alice, "alice".parse().unwrap(), &[], [0; 32], Timestamp(NOW)));
        trust.add(card, None, Grants::default(), Repeated::Refused, Timestamp(NOW)).await.unwrap();
        let (run, acted) = (Run::begin(), HashMap::new());
        Self { _directory: directory, database, alice, bob, run, wall: NOW, elapsed: 0, sent: Vec::new(), acted }
    }

    fn deliver(&mut self, index: usize) {
        let (id, bytes) = self.sent[index].clone();
        let now = Timestamp(self.wall);
        let Ok(signed) = envelope::open(&bytes, &self.alice.peer_id(), &self.bob, now) else { return };
        let decided = self.database.write_blocking(|tx| {
            let moment = Moment { elapsed: Duration::from_millis(self.elapsed), ..self.run.moment(tx, now) };
            authorise(tx, signed, moment, Held::default(), None, &Refused::default()).map(|decision| decision.is_ok())
        });
        if decided.unwrap() {
            *self.acted.entry(id).or_default() += 1;
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Send(skew) => {
                let (id, issued) = (RequestId::random(), Timestamp(self.wall.saturating_add_signed(*skew)));
                let body = Request::Stop(DeploymentId([1; 16]));
                let run = self.run.incarnation();
                self.sent.push((id, envelope::seal(&self.alice, self.bob, run, id, issued, body).bytes));
                self.deliver(self.sent.len() - 1);
            }
            Step::Copy(index) => {
                if let Some(index) = index.checked_rem(self.sent.len()) {
                    self.deliver(index);
                }
            }
            Step::Pass(time) => (self.wall, self.elapsed) = (self.wall + time, self.elapsed + time),
            Step::Set(difference) => self.wall = self.wall.saturating_add_signed(*difference),
            Step::Accept => {
                self.database.write_blocking(|tx| self.run.accept_clock(tx, Timestamp(self.wall))).unwrap();
                self.elapsed = 0;
            }
            Step::Restart => (self.run, self.elapsed) = (Run::begin(), 0),
        }
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let drift = i64::try_from(DRIFT_MAX_MILLISECONDS).unwrap();
    let hour = i64::try_from(HOUR).unwrap();
    let step = prop_oneof![
        3 => (-drift..=drift).prop_map(Step::Send),
        6 => any::<usize>().prop_map(Step::Copy),
        2 => (0..HOUR).prop_map(Step::Pass),
        2 => prop_oneof![-48 * hour..48 * hour, Just(24 * hour), Just(-24 * hour)].prop_map(Step::Set),
        1 => Just(Step::Accept),
        1 => Just(Step::Restart),
    ];
    proptest::collection::vec(step, 1..40)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap().block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn v3_no_envelope_acts_twice_wherever_the_clock_goes(steps in steps()) {
        let mut machine = block_on(Machine::new());
        for step in &steps {
            machine.step(step);
            prop_assert!(machine.acted.values().all(|times| *times == 1), "{:?}", machine.acted);
        }
    }
}

/// A request acts; the clock jumps a day ahead, another request comes, the clock is set right and accepted.
fn jump_and_return(machine: &mut Machine) {
    let day = i64::try_from(24 * HOUR).unwrap();
    for step in [Step::Send(0), Step::Set(day), Step::Send(0), Step::Set(-day)] {
        machine.step(&step);
    }
}

#[tokio::test]
async fn v3_a_clock_that_jumped_ahead_and_was_set_right_reopens_nothing() {
    let mut machine = Machine::new().await;
    jump_and_return(&mut machine);
    machine.step(&Step::Accept);
    machine.step(&Step::Copy(0));
    assert!(machine.acted.values().all(|times| *times == 1), "{:?}", machine.acted);
    // A new request is taken at once.
    machine.step(&Step::Send(0));
    assert_eq!(machine.acted.len(), 3);
}

/// The control: where forgetting goes by the wall clock alone and the run goes on, the same steps make it act twice.
#[tokio::test]
async fn v3_control_by_the_wall_clock_alone_a_copy_would_act() {
    let mut machine = Machine::new().await;
    jump_and_return(&mut machine);
    let day_after = Timestamp(NOW + 24 * HOUR);
    let forget = "DELETE FROM request WHERE kept_until < ?1";
    machine
        .database
        .write_blocking(|tx| -> Result<(), DatabaseError> {
            tx.execute(forget, [day_after.0])?;
            crate::floor::accept(tx, Timestamp(NOW)).map(drop)
        })
        .unwrap();
    machine.step(&Step::Copy(0));
    assert!(machine.acted.values().any(|times| *times == 2), "{:?}", machine.acted);
}
