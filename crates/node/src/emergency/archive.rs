//! A compressed tar that is put together in memory, bounded in size.

use std::io::{self, Write};

use flate2::Compression;
use flate2::write::GzEncoder;
use peer_proto::unit::Timestamp;
use serde_json::Value;

/// Largest sum of what is put in (bytes).
const SIZE_MAX: usize = 128 << 20;

/// Files for one archive.
#[derive(Debug, Default)]
pub(super) struct Archive {
    files: Vec<(String, Vec<u8>)>,
    size: usize,
    left_out: Vec<String>,
}

impl Archive {
    /// Adds a file. One that would be too much is named in the archive instead.
    pub(super) fn bytes(&mut self, name: &str, bytes: &[u8]) {
        if self.size.saturating_add(bytes.len()) > SIZE_MAX {
            self.left_out.push(name.to_owned());
            return;
        }
        self.size += bytes.len();
        self.files.push((name.to_owned(), bytes.to_vec()));
    }

    /// Adds a text.
    pub(super) fn text(&mut self, name: &str, text: &str) {
        self.bytes(name, text.as_bytes());
    }

    /// Adds a value as JSON.
    pub(super) fn json(&mut self, name: &str, value: &Value) {
        self.text(name, &format!("{value:#}\n"));
    }

    /// The archive.
    pub(super) fn finish(mut self, now: Timestamp) -> io::Result<Vec<u8>> {
        if !self.left_out.is_empty() {
            self.files.push(("left-out.txt".to_owned(), self.left_out.join("\n").into_bytes()));
        }
        let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for (name, bytes) in &self.files {
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o600);
            header.set_mtime(now.0 / 1000);
            tar.append_data(&mut header, format!("evidence/{name}"), bytes.as_slice())?;
        }
        let mut encoder = tar.into_inner()?;
        encoder.flush()?;
        encoder.finish()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn what_is_put_in_can_be_read_and_too_much_is_named() {
        let mut archive = Archive::default();
        archive.text("a.txt", "hello");
        archive.bytes("huge", &vec![0; SIZE_MAX]);
        let bytes = archive.finish(Timestamp(1_800_000_000_000)).unwrap();
        let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(bytes.as_slice()));
        let files: Vec<(String, String)> = tar
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let mut text = String::new();
                entry.read_to_string(&mut text).unwrap();
                (entry.path().unwrap().display().to_string(), text)
            })
            .collect();
        let expected = [("evidence/a.txt", "hello"), ("evidence/left-out.txt", "huge")];
        assert_eq!(files, expected.map(|(name, text)| (name.to_owned(), text.to_owned())));
    }
}
