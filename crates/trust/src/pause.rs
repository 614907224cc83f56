//! What the owner of this machine has paused, and when others' containers may run at all: every reason for which a
//! deployment is held. The reasons are durable; whoever drives a deployment asks for them again and again.

use libp2p_identity::PeerId;
use minicbor::{Decode, Encode};
use peer_proto::code::{Code, Problem};
use peer_proto::frame::{decode_strict, encode, peer_id};
use peer_proto::hours::{Hours, clock_face};
use peer_proto::id::DeploymentId;
use peer_proto::unit::Timestamp;
use peer_state::database::{DatabaseError, Tx};
use rusqlite::params;
use rusqlite::types::Type;

use crate::{limits, peers};

pub(crate) const TABLES: &str = "CREATE TABLE pause (subject BLOB PRIMARY KEY, pause BLOB NOT NULL) STRICT;";

const BLOB_MAX: usize = 256;

/// What is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Subject {
    /// Everything that runs here for others.
    #[n(0)]
    Machine,
    /// Everything of one peer.
    #[n(1)]
    Peer(
        #[n(0)]
        #[cbor(with = "peer_id")]
        PeerId,
    ),
    /// One deployment.
    #[n(2)]
    Deployment(#[n(0)] DeploymentId),
}

/// How a container is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
#[cbor(index_only)]
pub enum Means {
    /// It is frozen: its processes get no processor, and keep their memory.
    #[n(0)]
    Freeze,
    /// It is stopped: its memory is free, and what it had there is lost.
    #[n(1)]
    Stop,
    /// It was killed in an emergency.
    #[n(2)]
    Kill,
}

/// A pause as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Pause {
    /// How.
    #[n(0)]
    pub means: Means,
    /// Since when.
    #[n(1)]
    pub since: Timestamp,
}

/// Why a deployment may not run now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// How it is kept from running.
    pub means: Means,
    /// The reason, for its owner.
    pub problem: Problem,
}

/// Pauses a subject, or changes how it is paused.
pub fn set(tx: &Tx<'_>, subject: &Subject, pause: &Pause) -> Result<(), DatabaseError> {
    tx.execute(
        "INSERT INTO pause (subject, pause) VALUES (?1, ?2) ON CONFLICT (subject) DO UPDATE SET pause = excluded.pause",
        params![encode(subject), encode(pause)],
    )?;
    Ok(())
}

/// Takes a pause back; says whether there was one.
pub fn clear(tx: &Tx<'_>, subject: &Subject) -> Result<bool, DatabaseError> {
    Ok(tx.execute("DELETE FROM pause WHERE subject = ?1", [encode(subject)])? == 1)
}

/// Has the pause of a peer hold under its new key, or takes it back if the peer has none. Of two pauses the stronger stays.
pub(crate) fn succeed(tx: &Tx<'_>, old: &PeerId, new: Option<&PeerId>) -> Result<(), DatabaseError> {
    let Some(pause) = find(tx, &Subject::Peer(*old))? else { return Ok(()) };
    clear(tx, &Subject::Peer(*old))?;
    let Some(subject) = new.map(|new| Subject::Peer(*new)) else { return Ok(()) };
    let weaker = |present: Pause| present.means < pause.means;
    if find(tx, &subject)?.is_none_or(weaker) { set(tx, &subject, &pause) } else { Ok(()) }
}

/// The pause of a subject, if it is paused itself.
pub fn find(tx: &Tx<'_>, subject: &Subject) -> Result<Option<Pause>, DatabaseError> {
    match tx.query_row("SELECT pause FROM pause WHERE subject = ?1", [encode(subject)], |row| row.get::<_, Vec<u8>>(0))
    {
        Ok(bytes) => Ok(Some(decode(&bytes, 0)?)),
        Err(rusqlite::Error::QueryReturnedNoRows) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Every pause.
pub fn all(tx: &Tx<'_>) -> Result<Vec<(Subject, Pause)>, DatabaseError> {
    let mut statement = tx.prepare_cached("SELECT subject, pause FROM pause ORDER BY subject")?;
    let rows = statement.query_map([], |row| {
        let (subject, pause): (Vec<u8>, Vec<u8>) = (row.get(0)?, row.get(1)?);
        Ok((decode(&subject, 0)?, decode(&pause, 1)?))
    })?;
    rows.collect::<Result<_, _>>().map_err(Into::into)
}

fn decode<T>(bytes: &[u8], column: usize) -> rusqlite::Result<T>
where
    T: Encode<()> + for<'b> Decode<'b, ()>,
{
    decode_strict(bytes, BLOB_MAX)
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(column, Type::Blob, Box::new(error)))
}

/// Why nothing of this owner may begin to run now.
pub fn of_owner(tx: &Tx<'_>, owner: &PeerId, now: Timestamp) -> Result<Option<Hold>, DatabaseError> {
    first(tx, owner, None, now)
}

/// Why this deployment may not run now.
pub fn of_deployment(
    tx: &Tx<'_>,
    owner: &PeerId,
    id: DeploymentId,
    now: Timestamp,
) -> Result<Option<Hold>, DatabaseError> {
    first(tx, owner, Some(id), now)
}

/// What holds everything when the machine has been closed in an emergency.
pub fn emergency() -> Hold {
    Hold { means: Means::Kill, problem: problem(&Subject::Machine, Means::Kill) }
}

/// The reason that goes before all others, with the strongest means of all.
fn first(
    tx: &Tx<'_>,
    owner: &PeerId,
    deployment: Option<DeploymentId>,
    now: Timestamp,
) -> Result<Option<Hold>, DatabaseError> {
    let mut holds = Vec::new();
    let subjects = [Some(Subject::Machine), Some(Subject::Peer(*owner)), deployment.map(Subject::Deployment)];
    for subject in subjects.into_iter().flatten() {
        if let Some(pause) = find(tx, &subject)? {
            holds.push(Hold { means: pause.means, problem: problem(&subject, pause.means) });
        }
    }
    let granted = peers::find_peer(tx, owner)?.and_then(|peer| peer.grants.deploy).and_then(|grant| grant.hours);
    for hours in [limits::load(tx)?.hours, granted].into_iter().flatten() {
        let minute = minute_of_day(now);
        if !hours.contains(minute) {
            holds.push(Hold { means: Means::Freeze, problem: outside(&hours, minute) });
        }
    }
    let Some(means) = holds.iter().map(|hold| hold.means).max() else { return Ok(None) };
    Ok(holds.into_iter().next().map(|hold| Hold { means, ..hold }))
}

fn problem(subject: &Subject, means: Means) -> Problem {
    let message = match (subject, means) {
        (Subject::Machine, Means::Kill) => "the owner of this machine has closed it in an emergency; ask him",
        (_, Means::Kill) => {
            "the owner of this machine ended it in an emergency; it can run again once he resumes it there"
        }
        (Subject::Machine, _) => "the owner of this machine has paused it; try again once he has resumed it",
        (Subject::Peer(_), _) => {
            "the owner of this machine has paused what you have there; try again once he has resumed it"
        }
        (Subject::Deployment(_), _) => "the owner of this machine has paused it; it goes on once he resumes it there",
    };
    Problem::new(Code::Paused, message)
}

fn outside(hours: &Hours, minute: u16) -> Problem {
    let message = format!(
        "this machine runs it only at {hours} (its local time, {} now); it goes on at {}",
        clock_face(minute),
        clock_face(hours.next(minute))
    );
    Problem::new(Code::Paused, message)
}

/// The minute of the day in the machine's local time.
fn minute_of_day(now: Timestamp) -> u16 {
    let moment = i64::try_from(now.0).ok().and_then(|now| jiff::Timestamp::from_millisecond(now).ok());
    let local = jiff::tz::TimeZone::system().to_datetime(moment.unwrap_or_default());
    u16::from(local.hour().unsigned_abs()) * 60 + u16::from(local.minute().unsigned_abs())
}

#[cfg(test)]
#[path = "pause_tests.rs"]
mod tests;
