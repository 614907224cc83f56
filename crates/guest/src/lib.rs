//! What runs inside containers' networks on the daemon's behalf, as a static program in an image of its own.
//!
//! - [`forward`] carries streams to the one exposed port of a guest, where the daemon itself may not enter its network.
//! - [`dial`] is the other end of that, in the daemon.
//!
//! The program is told everything on its command line, speaks on its standard streams alone, and listens nowhere.

mod carry;
pub mod command;
pub mod dial;
pub mod forward;
