//! The program of ours that runs inside containers' networks, and the image that holds it and nothing else.
//!
//! The file lies beside the daemon's own. Its image names no tag and is the same wherever the file is the same, so that its
//! digest is known before the engine has it.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use peer_proto::{
    code::{Code, Problem},
    id::Digest,
};
use serde_json::json;

use crate::{engine::ArchiveStream, image::assemble};

/// Label of images of this program; each of them may be removed once no container of it is left.
pub(crate) const LABEL: &str = "peer-compute.guest-program";
/// Where the program is in its image.
const INSIDE: &str = "peer-guest";
/// Largest program (bytes).
const SIZE_MAX: u64 = 64 << 20;

/// The program, as it was when it was first needed.
#[derive(Debug, Clone)]
pub struct GuestProgram {
    path: PathBuf,
    configuration: Bytes,
    image: Digest,
}

/// Why there is no program to run.
#[derive(Debug, thiserror::Error)]
pub enum GuestProgramError {
    /// There is no such file.
    #[error("there is no program at {}; install peer-guest beside peerd, or set `guest_program` to where it is", .0.display())]
    Absent(PathBuf),
    /// The file cannot be read.
    #[error("the program {} cannot be read: {source}", .path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It could not run in an image of its own.
    #[error("{} {reason}; install the peer-guest that belongs to this peerd", .path.display())]
    Unfit {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// It is another one than when it was first needed.
    #[error("the program {} has been replaced; restart peerd", .0.display())]
    Replaced(PathBuf),
}

impl GuestProgramError {
    /// Code and sentence.
    pub fn problem(&self) -> Problem {
        Problem::new(Code::Internal, self.to_string())
    }
}

impl GuestProgram {
    /// Reads the program and computes its image.
    pub fn read(path: &Path) -> Result<Self, GuestProgramError> {
        let program = read(path)?;
        if let Some(reason) = unfit(&program) {
            return Err(GuestProgramError::Unfit { path: path.into(), reason });
        }
        let layer = layer(&program).map_err(|source| GuestProgramError::Unreadable { path: path.into(), source })?;
        let configuration = configuration(Digest::of(&layer));
        Ok(Self { path: path.into(), image: Digest::of(&configuration), configuration })
    }

    /// The digest of its image.
    pub fn image(&self) -> Digest {
        self.image
    }

    /// The archive that the engine loads, and its size (bytes).
    pub(crate) fn archive(&self) -> Result<(ArchiveStream, u64), GuestProgramError> {
        let unreadable = |source| GuestProgramError::Unreadable { path: self.path.clone(), source };
        let layer = layer(&read(&self.path)?).map_err(unreadable)?;
        if configuration(Digest::of(&layer)) != self.configuration {
            return Err(GuestProgramError::Replaced(self.path.clone()));
        }
        assemble::with_layer(&self.configuration, &layer).map_err(unreadable)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, GuestProgramError> {
    let unreadable = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => GuestProgramError::Absent(path.into()),
        _ => GuestProgramError::Unreadable { path: path.into(), source },
    };
    let mut program = Vec::new();
    File::open(path).map_err(unreadable)?.take(SIZE_MAX + 1).read_to_end(&mut program).map_err(unreadable)?;
    if program.len() as u64 > SIZE_MAX {
        return Err(GuestProgramError::Unfit { path: path.into(), reason: "is larger than any program of ours" });
    }
    Ok(program)
}

/// What keeps a file from running alone in an image of this machine's architecture: the file's ELF header tells.
fn unfit(program: &[u8]) -> Option<&'static str> {
    const X86_64: u16 = 62;
    const AARCH64: u16 = 183;
    /// A program header that names a loader, which the image has not.
    const INTERPRETER: u32 = 3;
    let half = |at: usize| Some(u16::from_le_bytes(*program.get(at..)?.first_chunk()?));
    let word = |at: usize| Some(u32::from_le_bytes(*program.get(at..)?.first_chunk()?));
    let long = |at: usize| Some(u64::from_le_bytes(*program.get(at..)?.first_chunk()?));
    // 64 bits, little-endian.
    if !program.starts_with(b"\x7fELF\x02\x01") {
        return Some("is not a program for Linux");
    }
    let machine = match std::env::consts::ARCH {
        "x86_64" => X86_64,
        "aarch64" => AARCH64,
        _ => return Some("is for another architecture"),
    };
    if half(18) != Some(machine) {
        return Some("is for another architecture");
    }
    let headers = || {
        let (start, size, count) = (usize::try_from(long(32)?).ok()?, usize::from(half(54)?), usize::from(half(56)?));
        (0..count).map(|index| word(start.checked_add(index * size)?)).collect::<Option<Vec<_>>>()
    };
    match headers() {
        None => Some("is cut short"),
        Some(kinds) if kinds.contains(&INTERPRETER) => Some("is not linked statically"),
        Some(_) => None,
    }
}

/// The one layer: the program, owned by root, writable by nobody.
fn layer(program: &[u8]) -> io::Result<Bytes> {
    let mut header = tar::Header::new_gnu();
    header.set_size(program.len() as u64);
    header.set_mode(0o555);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    let mut layer = tar::Builder::new(Vec::with_capacity(program.len() + 4096));
    layer.append_data(&mut header, INSIDE, program)?;
    Ok(layer.into_inner()?.into())
}

fn configuration(layer: Digest) -> Bytes {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let configuration = json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Entrypoint": [format!("/{INSIDE}")], "Labels": { LABEL: env!("CARGO_PKG_VERSION") } },
        "rootfs": { "type": "layers", "diff_ids": [layer.to_string()] },
    });
    configuration.to_string().into()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// The smallest header of a program with one program header of this kind.
    fn program(machine: u16, kind: u32) -> Vec<u8> {
        let mut program = vec![0; 64];
        program[..6].copy_from_slice(b"\x7fELF\x02\x01");
        program[18..20].copy_from_slice(&machine.to_le_bytes());
        program[32..40].copy_from_slice(&64_u64.to_le_bytes());
        program[54..56].copy_from_slice(&56_u16.to_le_bytes());
        program[56..58].copy_from_slice(&1_u16.to_le_bytes());
        program.extend(kind.to_le_bytes());
        program.resize(64 + 56, 0);
        program
    }

    const MACHINE: u16 = if cfg!(target_arch = "aarch64") { 183 } else { 62 };

    #[test]
    fn only_a_static_program_of_this_architecture_is_taken() {
        assert_eq!(unfit(&program(MACHINE, 1)), None);
        assert_eq!(unfit(&program(MACHINE, 3)), Some("is not linked statically"));
        assert_eq!(unfit(&program(3, 1)), Some("is for another architecture"));
        assert_eq!(unfit(&program(MACHINE, 1)[..60]), Some("is cut short"));
        assert_eq!(unfit(b"#!/bin/sh\n"), Some("is not a program for Linux"));
        // The program that runs the tests has a loader.
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(unfit(&own), Some("is not linked statically"));
    }

    #[test]
    fn the_image_follows_from_the_program_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("peer-guest");
        assert!(matches!(GuestProgram::read(&path), Err(GuestProgramError::Absent(_))));
        std::fs::write(&path, program(MACHINE, 1)).unwrap();
        let one = GuestProgram::read(&path).unwrap();
        assert_eq!(one.image(), GuestProgram::read(&path).unwrap().image());
        assert!(one.archive().is_ok());
        std::fs::write(&path, program(MACHINE, 2)).unwrap();
        assert_ne!(one.image(), GuestProgram::read(&path).unwrap().image());
        assert!(matches!(one.archive(), Err(GuestProgramError::Replaced(_))));
    }
}
