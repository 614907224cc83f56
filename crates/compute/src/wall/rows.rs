//! The rows of networks: each is written before the engine is asked for the network, and deleted after the engine has
//! removed it.

use std::net::Ipv4Addr;

use peer_proto::PeerId;
use peer_proto::deploy::Egress;
use peer_proto::id::DeploymentId;
use peer_state::database::{DatabaseError, Tx};
use peer_state::rusqlite::{self, Row, params};

use super::ranges::Range;
use crate::record::{self, Record};

/// This part's table.
pub(crate) const TABLE: &str = "CREATE TABLE network (
        number INTEGER PRIMARY KEY CHECK (number > 0),
        owner BLOB NOT NULL,
        name TEXT,
        deployment BLOB UNIQUE,
        first INTEGER NOT NULL,
        length INTEGER NOT NULL,
        CHECK ((name IS NULL) <> (deployment IS NULL)),
        UNIQUE (owner, name)
    ) STRICT;";

/// Bits of the network of one deployment: the bridge, and one container with room to be replaced.
pub(crate) const OUTWARD_LENGTH: u8 = 29;
/// Bits of a network that deployments share: the bridge and up to 61 containers.
pub(crate) const SHARED_LENGTH: u8 = 26;
/// Candidates that are looked at before the pool counts as full.
const CANDIDATES_MAX: u32 = 1 << 16;

/// What a network is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The way out of one deployment.
    Outward(DeploymentId),
    /// What the owner's deployments share under this name.
    Shared(String),
}

/// A network as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Network {
    pub(crate) number: u16,
    pub(crate) owner: PeerId,
    pub(crate) purpose: Purpose,
    pub(crate) subnet: Range,
}

fn read(row: &Row<'_>) -> rusqlite::Result<Network> {
    let bad = |column, what: String| {
        rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Blob, what.into())
    };
    let purpose = match (row.get::<_, Option<String>>(2)?, row.get::<_, Option<[u8; 16]>>(3)?) {
        (Some(name), _) => Purpose::Shared(name),
        (None, Some(id)) => Purpose::Outward(DeploymentId(id)),
        (None, None) => return Err(bad(3, "a network for nothing".into())),
    };
    Ok(Network {
        number: row.get(0)?,
        owner: PeerId::from_bytes(&row.get::<_, Vec<u8>>(1)?).map_err(|error| bad(1, error.to_string()))?,
        purpose,
        subnet: Range::around(Ipv4Addr::from_bits(row.get(4)?), row.get::<_, u8>(5)?.min(32)),
    })
}

/// Every network.
pub(crate) fn all(tx: &Tx<'_>) -> Result<Vec<Network>, DatabaseError> {
    let mut statement =
        tx.prepare_cached("SELECT number, owner, name, deployment, first, length FROM network ORDER BY number")?;
    let rows = statement.query_map([], read)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// What the deployment needs: its way out first, then what it shares.
pub(crate) fn purposes(record: &Record) -> Vec<Purpose> {
    let outward = (record.specification.egress != Egress::None).then_some(Purpose::Outward(record.id));
    let shared = record.specification.network.as_ref().map(|name| Purpose::Shared(name.to_string()));
    outward.into_iter().chain(shared).collect()
}

/// The network for this purpose, with a number and addresses of its own. Nothing if no addresses are left that overlap
/// neither another network of ours nor what is `taken`. Looking begins at a place in the pools that differs by `salt`, so
/// that two machines on one host seldom meet.
pub(crate) fn claim(
    tx: &Tx<'_>,
    owner: &PeerId,
    purpose: &Purpose,
    pools: &[Range],
    taken: &[Range],
    salt: u32,
) -> Result<Option<Network>, DatabaseError> {
    let networks = all(tx)?;
    if let Some(found) = networks.iter().find(|network| network.owner == *owner && network.purpose == *purpose) {
        return Ok(Some(found.clone()));
    }
    let length = if matches!(purpose, Purpose::Outward(_)) { OUTWARD_LENGTH } else { SHARED_LENGTH };
    let free = |range: &Range| {
        !networks.iter().any(|network| network.subnet.overlaps(*range)) && !taken.iter().any(|one| one.overlaps(*range))
    };
    let number = (1..u16::MAX).find(|number| !networks.iter().any(|network| network.number == *number));
    let subnet = candidates(pools, length, salt).find(free);
    let (Some(number), Some(subnet)) = (number, subnet) else { return Ok(None) };
    let network = Network { number, owner: *owner, purpose: purpose.clone(), subnet };
    let (name, deployment) = match purpose {
        Purpose::Outward(id) => (None, Some(id.0)),
        Purpose::Shared(name) => (Some(name), None),
    };
    tx.execute(
        "INSERT INTO network (number, owner, name, deployment, first, length) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![number, owner.to_bytes(), name, deployment, subnet.first().to_bits(), subnet.length()],
    )?;
    Ok(Some(network))
}

/// Ranges of this length inside the pools.
pub(crate) fn candidates(pools: &[Range], length: u8, salt: u32) -> impl Iterator<Item = Range> {
    pools.iter().filter(move |pool| pool.length() <= length).flat_map(move |pool| {
        let count = 1_u32.checked_shl(u32::from(length - pool.length())).unwrap_or(u32::MAX);
        let size = 1_u32.checked_shl(32 - u32::from(length)).unwrap_or(0);
        let place =
            move |index: u32| Range::around(pool.nth((salt % count).wrapping_add(index) % count * size), length);
        (0..count.min(CANDIDATES_MAX)).map(place)
    })
}

/// Forgets a network, because the engine has it no more.
pub(crate) fn forget(tx: &Tx<'_>, number: u16) -> Result<(), DatabaseError> {
    tx.execute("DELETE FROM network WHERE number = ?1", [number])?;
    Ok(())
}

/// Networks that no deployment needs any more.
pub(crate) fn unneeded(tx: &Tx<'_>) -> Result<Vec<Network>, DatabaseError> {
    let records = record::all(tx)?;
    let needed = |network: &Network| {
        records.iter().any(|record| record.owner == network.owner && purposes(record).contains(&network.purpose))
    };
    Ok(all(tx)?.into_iter().filter(|network| !needed(network)).collect())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use peer_proto::identity::Identity;
    use peer_state::database::Database;

    use super::*;

    fn pool(text: &str) -> Vec<Range> {
        vec![text.parse().unwrap()]
    }

    #[test]
    fn v4n_networks_never_share_addresses_or_owners() {
        let directory = tempfile::tempdir().unwrap();
        let database = Database::open(&directory.path().join("db"), &[record::SCHEMA]).unwrap();
        let (alice, bob) = (Identity::generate().peer_id(), Identity::generate().peer_id());
        let shared = Purpose::Shared("back".into());
        let pools = pool("198.18.0.0/24");
        let claimed: Vec<_> = database
            .write_blocking(|tx| -> Result<_, DatabaseError> {
                let mut claimed = Vec::new();
                for (owner, purpose) in [
                    (&alice, shared.clone()),
                    (&bob, shared.clone()),
                    (&alice, Purpose::Outward(DeploymentId::random())),
                    (&alice, Purpose::Outward(DeploymentId::random())),
                ] {
                    claimed.push(claim(tx, owner, &purpose, &pools, &pool("198.18.0.64/26"), 3)?.unwrap());
                    assert_eq!(claim(tx, owner, &purpose, &pools, &[], 9)?.as_ref(), claimed.last());
                }
                assert_eq!(all(tx)?, claimed);
                assert_eq!(unneeded(tx)?, claimed, "no deployment needs them");
                let none = claim(tx, &bob, &Purpose::Shared("other".into()), &pools, &pool("198.18.0.0/24"), 0)?;
                assert_eq!(none, None);
                Ok(claimed)
            })
            .unwrap();
        for (index, one) in claimed.iter().enumerate() {
            assert!(
                !claimed[..index].iter().any(|other| other.subnet.overlaps(one.subnet) || other.number == one.number)
            );
            assert!(pools[0].contains(one.subnet.first()) && !one.subnet.overlaps("198.18.0.64/26".parse().unwrap()));
        }
    }

    #[test]
    fn candidates_fill_the_pool_once() {
        let pools = pool("198.18.0.0/24");
        let mut all: Vec<_> = candidates(&pools, 29, 12345).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 32);
        assert!(candidates(&pools, 20, 0).next().is_none());
    }
}
