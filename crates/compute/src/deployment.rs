//! The life of a deployment: one enum, one transition function, and the restart policy. Pure.
//!
//! ```text
//!            ┌──────────┐  ┌──────────┐  ┌──────────┐  ┌─────────┐
//!  record ──▶│ pending  ├─▶│ fetching ├─▶│ starting ├─▶│ running │
//!            └────┬─────┘  └────┬─────┘  └─▲──┬───▲─┘  └─┬───┬───┘
//!                 │             │          │  │   └──────┘   │ ended by itself: the policy decides
//!                 │             │    start │  │  again       │
//!                 ▼             ▼          │  ▼              ▼
//!               failed ◀────────┴──────────┼──┴───── stopping ─▶ stopped
//!                 └────────────────────────┴─────────────────────────┘
//! ```
//!
//! What starts or runs may also be paused by the machine's owner, who alone lets it go on.
//!
//! Every transition is committed before it is announced.

use minicbor::{Decode, Encode};
use peer_proto::code::{Code, Problem};
use peer_proto::deploy::{RestartPolicy, State};
use peer_proto::unit::Timestamp;

/// First pause before a restart (milliseconds); it doubles with each restart in a row.
const PAUSE_FIRST_MILLISECONDS: u64 = 200;
/// Longest pause before a restart (milliseconds).
pub(crate) const PAUSE_MAX_MILLISECONDS: u64 = 60_000;
/// A run of this length (milliseconds) counts as a success and resets the pause.
const RUN_LONG_MILLISECONDS: u64 = 10_000;

/// What the deployment's owner wants of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Wanted {
    /// That it runs.
    #[n(0)]
    Running,
    /// That it does not run.
    #[n(1)]
    Stopped,
    /// That it be forgotten.
    #[n(2)]
    Removed,
    /// That it stops and then runs again.
    #[n(3)]
    Restarted,
}

/// Where a deployment is in its life, with what belongs to that state and to no other.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Life {
    /// Recorded; nothing has been done yet.
    #[n(0)]
    Pending,
    /// Its image is on the way.
    #[n(1)]
    Fetching,
    /// Its container is being made or started, not before the given moment.
    #[n(2)]
    Starting(#[n(0)] Option<Timestamp>),
    /// Its container runs since the given moment.
    #[n(3)]
    Running(#[n(0)] Timestamp),
    /// Its container is being ended.
    #[n(4)]
    Stopping,
    /// It does not run, and need not.
    #[n(5)]
    Stopped,
    /// It does not run, and should.
    #[n(6)]
    Failed(#[n(0)] Problem),
    /// The machine's owner keeps it from running, for this reason. If its container is frozen, it runs since the given
    /// moment; else it does not run.
    #[n(7)]
    Paused(#[n(0)] Problem, #[n(1)] Option<Timestamp>),
}

/// What moves a deployment on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Its image has to be fetched.
    Fetch,
    /// Its image is complete.
    Fetched,
    /// Its container has been started at this moment.
    Started(Timestamp),
    /// Its container has ended by itself, or is gone.
    Ended {
        /// Exit code, if the engine knows it.
        exit_code: Option<i64>,
        /// When it was noticed.
        at: Timestamp,
    },
    /// The engine or the host took its container down, and it has to be started again whatever the policy.
    Interrupted,
    /// Its container, which runs, has been frozen for this reason, or the reason has become another.
    Freeze(Problem),
    /// It is kept from running for this reason; its container does not run.
    Hold(Problem),
    /// Nothing keeps it from running any more.
    Resume,
    /// It cannot go on.
    Fail(Problem),
    /// Its owner wants it ended.
    Stop,
    /// Its container has been ended, or there was none.
    StopDone,
    /// Its owner wants it to run again.
    Start,
}

/// A step that the present state does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a deployment that is {state} cannot take the step {step:?}")]
pub struct WrongStep {
    /// The state.
    pub state: State,
    /// The step.
    pub step: Step,
}

/// What the restart policy needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restarts {
    /// The policy.
    pub policy: RestartPolicy,
    /// Restarts in a row so far.
    pub in_row: u32,
}

impl Life {
    /// The state's public name.
    pub fn state(&self) -> State {
        match self {
            Self::Pending => State::Pending,
            Self::Fetching => State::Fetching,
            Self::Starting(_) => State::Starting,
            Self::Running(_) => State::Running,
            Self::Stopping => State::Stopping,
            Self::Stopped => State::Stopped,
            Self::Failed(_) => State::Failed,
            Self::Paused(..) => State::Paused,
        }
    }

    /// The one transition function.
    #[expect(clippy::match_same_arms, reason = "one arm for each arrow of the diagram")]
    pub fn next(&self, step: Step, restarts: Restarts) -> Result<Self, WrongStep> {
        Ok(match (self, step) {
            (Self::Pending, Step::Fetch) => Self::Fetching,
            (Self::Pending | Self::Fetching, Step::Fetched) => Self::Starting(None),
            (Self::Starting(_), Step::Started(at)) => Self::Running(at),
            (Self::Running(_), Step::Interrupted) => Self::Starting(None),
            (Self::Running(since), Step::Ended { exit_code, at }) => after_end(*since, exit_code, at, restarts),
            (Self::Running(since) | Self::Paused(_, Some(since)), Step::Freeze(problem)) => {
                Self::Paused(problem, Some(*since))
            }
            (Self::Starting(_) | Self::Running(_) | Self::Paused(..), Step::Hold(problem)) => {
                Self::Paused(problem, None)
            }
            (Self::Paused(_, Some(since)), Step::Resume) => Self::Running(*since),
            (Self::Paused(_, None), Step::Resume) => Self::Starting(None),
            (state, Step::Fail(problem)) if state.state().holds_share() => Self::Failed(problem),
            (state, Step::Stop) if state.state().holds_share() => Self::Stopping,
            (Self::Stopping, Step::StopDone | Step::Ended { .. }) => Self::Stopped,
            (Self::Stopped | Self::Failed(_), Step::Start) => Self::Pending,
            (state, step) => return Err(WrongStep { state: state.state(), step }),
        })
    }
}

/// What follows when a container has ended by itself.
fn after_end(since: Timestamp, exit_code: Option<i64>, at: Timestamp, restarts: Restarts) -> Life {
    let failed = exit_code != Some(0);
    let again = match restarts.policy {
        RestartPolicy::No => false,
        RestartPolicy::Always => true,
        RestartPolicy::OnFailure(limit) => failed && limit.is_none_or(|limit| restarts.in_row < limit),
    };
    if again {
        let in_row = if at.since(since) >= RUN_LONG_MILLISECONDS { 0 } else { restarts.in_row };
        Life::Starting(Some(at.plus(pause_milliseconds(in_row))))
    } else if failed {
        let sentence = match exit_code {
            Some(code) => {
                format!("the container ended by itself with exit code {code}; `peerctl logs` shows what it said")
            }
            None => "the container ended while nobody watched, and its exit code is not known".into(),
        };
        Life::Failed(Problem::new(Code::ContainerExited, sentence))
    } else {
        Life::Stopped
    }
}

/// Pause before the next restart (milliseconds) after so many in a row.
fn pause_milliseconds(in_row: u32) -> u64 {
    PAUSE_FIRST_MILLISECONDS.saturating_mul(1_u64.checked_shl(in_row).unwrap_or(u64::MAX)).min(PAUSE_MAX_MILLISECONDS)
}

/// Restarts in a row after a run that lasted from `since` to `at` and is followed by another.
pub fn restarts_in_row(before: u32, since: Timestamp, at: Timestamp) -> u32 {
    if at.since(since) >= RUN_LONG_MILLISECONDS { 1 } else { before.saturating_add(1) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NEVER: Restarts = Restarts { policy: RestartPolicy::No, in_row: 0 };

    fn problem() -> Problem {
        Problem::new(Code::EngineFailed, "x")
    }

    fn any_life() -> impl Strategy<Value = Life> {
        prop_oneof![
            Just(Life::Pending),
            Just(Life::Fetching),
            Just(Life::Starting(None)),
            any::<u32>().prop_map(|at| Life::Starting(Some(Timestamp(at.into())))),
            any::<u32>().prop_map(|at| Life::Running(Timestamp(at.into()))),
            Just(Life::Stopping),
            Just(Life::Stopped),
            Just(Life::Failed(problem())),
            any::<Option<u32>>().prop_map(|since| Life::Paused(problem(), since.map(|at| Timestamp(at.into())))),
        ]
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            Just(Step::Fetch),
            Just(Step::Fetched),
            any::<u32>().prop_map(|at| Step::Started(Timestamp(at.into()))),
            (proptest::option::of(any::<i64>()), any::<u32>())
                .prop_map(|(exit_code, at)| Step::Ended { exit_code, at: Timestamp(at.into()) }),
            Just(Step::Fail(problem())),
            Just(Step::Stop),
            Just(Step::StopDone),
            Just(Step::Start),
            Just(Step::Interrupted),
            Just(Step::Freeze(problem())),
            Just(Step::Hold(problem())),
            Just(Step::Resume),
        ]
    }

    fn any_restarts() -> impl Strategy<Value = Restarts> {
        let policy = prop_oneof![
            Just(RestartPolicy::No),
            Just(RestartPolicy::Always),
            proptest::option::of(1_u32..9).prop_map(RestartPolicy::OnFailure),
        ];
        (policy, any::<u32>()).prop_map(|(policy, in_row)| Restarts { policy, in_row })
    }

    proptest! {
        #[test]
        fn nothing_runs_without_having_been_started_and_rest_is_left_by_start_alone(
            life in any_life(), step in any_step(), restarts in any_restarts(),
        ) {
            let before = life.state();
            if let Ok(after) = life.next(step.clone(), restarts) {
                if after.state() == State::Running {
                    let started = matches!(step, Step::Started(_)) && before == State::Starting;
                    let thawed = step == Step::Resume && matches!(life, Life::Paused(_, Some(_)));
                    prop_assert!(started || thawed);
                }
                if before == State::Paused && after.state() != State::Paused {
                    prop_assert!(matches!(step, Step::Resume | Step::Stop | Step::Fail(_)));
                }
                if !before.holds_share() {
                    prop_assert_eq!((step, after.state()), (Step::Start, State::Pending));
                }
            }
        }

        #[test]
        fn a_stop_always_leads_to_rest(life in any_life(), restarts in any_restarts()) {
            if life.state().holds_share() {
                let stopping = life.next(Step::Stop, restarts).expect("everything that holds a share can be stopped");
                prop_assert_eq!(stopping.next(Step::StopDone, restarts), Ok(Life::Stopped));
            }
        }

        #[test]
        fn pauses_are_bounded(in_row in any::<u32>()) {
            prop_assert!(pause_milliseconds(in_row) <= PAUSE_MAX_MILLISECONDS);
        }

        #[test]
        fn life_round_trips(life in any_life()) {
            let bytes = peer_proto::frame::encode(&life);
            prop_assert_eq!(peer_proto::frame::decode_strict::<Life>(&bytes, 4096), Ok(life));
        }
    }

    #[test]
    fn crashed_containers_do_not_stay_running() {
        let running = Life::Running(Timestamp(0));
        let ended = |code, restarts| running.next(Step::Ended { exit_code: code, at: Timestamp(5) }, restarts);
        assert_eq!(ended(Some(0), NEVER), Ok(Life::Stopped));
        assert_eq!(ended(Some(3), NEVER).map(|life| life.state()), Ok(State::Failed));
        assert_eq!(ended(None, NEVER).map(|life| life.state()), Ok(State::Failed));
        let always = Restarts { policy: RestartPolicy::Always, in_row: 0 };
        assert_eq!(ended(Some(0), always), Ok(Life::Starting(Some(Timestamp(205)))));
        let thrice = |in_row| Restarts { policy: RestartPolicy::OnFailure(Some(3)), in_row };
        assert_eq!(ended(Some(1), thrice(2)).map(|life| life.state()), Ok(State::Starting));
        assert_eq!(ended(Some(1), thrice(3)).map(|life| life.state()), Ok(State::Failed));
        assert_eq!(ended(Some(0), thrice(0)), Ok(Life::Stopped));
    }
}
