//! The project's own tools, as a program (`cargo run --release -p xtask -- --help`) and as a library for tests.
//!
//! - [`advisories`] looks for known vulnerabilities in what we link, in a local copy of the database.
//! - [`image`] builds container images from files, without any engine.
//! - [`examples`] builds the programs under `examples/` statically and says where they are.
//! - [`sbom`] writes a bill of materials of what is really linked.
//! - [`supply`] says why one of the checks above could not be made.
//! - [`tidy`] checks what the compiler does not: the arrows between crates, lengths, words, documents.

pub mod advisories;
pub mod examples;
pub mod image;
pub mod sbom;
pub mod supply;
pub mod tidy;
