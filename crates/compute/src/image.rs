//! Images as layers named by their digests: read from an archive, moved one by one, checked, and put together again.
//!
//! The requester's side is [`archive`]; the provider's is [`configuration`], [`missing`], [`spool`] with [`layer`], and
//! [`assemble`].

pub mod archive;
pub mod assemble;
pub mod configuration;
pub mod layer;
pub mod missing;
pub mod spool;
pub mod tar;
