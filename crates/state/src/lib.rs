//! What survives a crash: one data directory, one SQLite file with one writer, durable small files, and the audit log.
//!
//! Each room brings its own tables as a [`database::Schema`] and knows no other room's. Rooms meet inside one transaction,
//! so that what belongs together is committed together.

pub mod audit;
pub mod data_dir;
pub mod database;
pub mod durable;

pub use rusqlite;
