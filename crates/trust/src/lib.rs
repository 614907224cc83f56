//! Turns a signed request into an authorised one, or into an audited refusal; nothing else may.
//!
//! Trust is explicit, directional and never transitive: a peer in the list may talk, and may do what its grants say.

pub mod allowed;
pub mod authorise;
mod detail;
pub mod floor;
pub mod follow;
pub mod kept;
pub mod key_file;
pub mod limits;
pub mod pause;
pub mod peers;
pub mod pending;
pub mod recovery;
pub mod refusal;
pub mod refused;
pub mod refused_keys;
pub mod replay;
pub mod run;
pub mod seal;
pub mod tally;
pub mod trust;

use peer_state::database::Schema;

/// This room's tables.
pub const SCHEMA: Schema = Schema {
    room: "trust",
    steps: &[
        peers::TABLES,
        replay::TABLES,
        kept::TABLES,
        floor::TABLES,
        replay::RUNS,
        kept::ENDS,
        limits::TABLES,
        pause::TABLES,
        refused_keys::TABLES,
        pending::TABLES,
    ],
};
