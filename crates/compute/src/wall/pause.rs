//! The smallest image that can be: one program that does nothing but wait, so that its network can be tried.

use std::io::Write as _;

use peer_proto::id::Digest;
use serde_json::json;
use tar::{Builder, Header};

use crate::engine::{Engine, EngineError};
use crate::image::assemble::{LayerSource, assemble};

/// Where an executable is put in memory.
const BASE: u64 = 0x40_0000;
/// Sizes of the two headers of an executable (ELF, 64 bit).
const FILE_HEADER: u64 = 64;
const SEGMENT_HEADER: u64 = 56;

/// Machine of the header, and a program that waits again and again, for this architecture.
fn machine() -> Option<(u16, &'static str, &'static [u8])> {
    match std::env::consts::ARCH {
        // mov eax, 34 (pause); syscall; jmp to the beginning
        "x86_64" => Some((62, "amd64", &[0xb8, 0x22, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7])),
        // mov x0..x4, 0; mov x8, 73 (ppoll); svc 0; b to the beginning
        "aarch64" => Some((
            183,
            "arm64",
            &[
                0x00, 0x00, 0x80, 0xd2, 0x01, 0x00, 0x80, 0xd2, 0x02, 0x00, 0x80, 0xd2, 0x03, 0x00, 0x80, 0xd2, 0x04,
                0x00, 0x80, 0xd2, 0x28, 0x09, 0x80, 0xd2, 0x01, 0x00, 0x00, 0xd4, 0xf9, 0xff, 0xff, 0x17,
            ],
        )),
        _ => None,
    }
}

/// A static executable of one segment.
fn executable(machine: u16, code: &[u8]) -> Vec<u8> {
    let start = FILE_HEADER + SEGMENT_HEADER;
    let size = start + code.len() as u64;
    let mut bytes = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0];
    bytes.resize(16, 0);
    let half = |bytes: &mut Vec<u8>, value: u16| bytes.extend(value.to_le_bytes());
    let word = |bytes: &mut Vec<u8>, value: u32| bytes.extend(value.to_le_bytes());
    let long = |bytes: &mut Vec<u8>, value: u64| bytes.extend(value.to_le_bytes());
    // Executable; machine; version.
    half(&mut bytes, 2);
    half(&mut bytes, machine);
    word(&mut bytes, 1);
    // Entry; segment headers; no section headers; no flags.
    long(&mut bytes, BASE + start);
    long(&mut bytes, FILE_HEADER);
    long(&mut bytes, 0);
    word(&mut bytes, 0);
    for value in [64, 56, 1, 64, 0, 0] {
        half(&mut bytes, value);
    }
    // One segment to load, readable and executable: the whole file.
    word(&mut bytes, 1);
    word(&mut bytes, 5);
    for value in [0, BASE, BASE, size, size, 0x1000] {
        long(&mut bytes, value);
    }
    bytes.extend_from_slice(code);
    bytes
}

fn layer(program: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut builder = Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_size(program.len() as u64);
    header.set_mode(0o755);
    header.set_cksum();
    builder.append_data(&mut header, "pause", program)?;
    builder.into_inner()
}

/// Brings the image to the engine if it is not there, and gives its digest.
pub(crate) async fn load(engine: &impl Engine) -> Result<Digest, EngineError> {
    let failed = |error: std::io::Error| EngineError::failed(&error.to_string());
    let (machine, architecture, code) =
        machine().ok_or_else(|| EngineError::failed("there is no test program for this architecture"))?;
    let layer = layer(&executable(machine, code)).map_err(failed)?;
    let digest = Digest::of(&layer);
    let configuration = json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Entrypoint": ["/pause"], "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": [digest.to_string()] },
    })
    .to_string();
    let image = Digest::of(configuration.as_bytes());
    if engine.has_image(image).await?.is_some() {
        return Ok(image);
    }
    let mut file = tempfile::NamedTempFile::new().map_err(failed)?;
    file.write_all(&layer).map_err(failed)?;
    let source = LayerSource { layer: digest, file: Some((file.path().to_owned(), layer.len() as u64)) };
    let (archive, size) = assemble(configuration.as_bytes(), &[source]).map_err(failed)?;
    engine.load(archive, size).await?;
    Ok(image)
}
