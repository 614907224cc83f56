//! An owner goes on under a new key: what it has here passes to that key.

use peer_proto::PeerId;
use peer_state::database::{DatabaseError, Tx};
use peer_state::rusqlite::params;

use crate::record::{self, Record};
use crate::room::{Room, end_all_of};

/// What an owner's new key has taken over.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Succession {
    /// Deployments that belong to the new key now.
    pub passed: Vec<Record>,
    /// Deployments whose name the new key had given already: they end.
    pub ended: Vec<Record>,
}

/// Has everything of `old` belong to `new`: deployments, supplied layers, images, pulls, networks. Requests that `old` made stay seen
/// as its own. After the commit [`Room::succeeded`] tells those who look.
pub fn succeed(tx: &Tx<'_>, old: &PeerId, new: &PeerId) -> Result<Succession, DatabaseError> {
    let owned: Vec<_> = record::of_owner(tx, old)?.into_iter().map(|record| record.id).collect();
    record::change_owner(tx, old, new)?;
    for table in ["possession", "image_owner", "image_pull", "network"] {
        // What the new key has already is not taken over twice.
        let sql = format!("UPDATE OR IGNORE {table} SET owner = ?2 WHERE owner = ?1");
        tx.execute(&sql, params![old.to_bytes(), new.to_bytes()])?;
    }
    tx.execute("DELETE FROM image_pull WHERE owner = ?1", [old.to_bytes()])?;
    let ended = end_all_of(tx, old)?;
    let mut passed = record::of_owner(tx, new)?;
    passed.retain(|record| owned.contains(&record.id));
    Ok(Succession { passed, ended })
}

impl<E: crate::engine::Engine> Room<E> {
    /// Takes note of a committed [`Succession`].
    pub fn succeeded(&self, succession: &Succession) {
        for record in &succession.passed {
            self.change_endpoint_owner(record);
            self.committed(record);
        }
        for record in &succession.ended {
            self.committed(record);
        }
    }
}
