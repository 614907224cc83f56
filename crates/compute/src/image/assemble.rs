//! Puts an image together for the engine: a `docker-archive` tar with the configuration and only those layers that the
//! engine lacks. All names in it are ours, and it names no tag, so that loading it cannot re-point one.

use std::{collections::HashSet, io, path::PathBuf};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use peer_proto::id::Digest;
use serde_json::json;
use tar::Header;
use tokio_util::io::ReaderStream;

use crate::engine::ArchiveStream;

const CHUNK: usize = 256 << 10;

/// A layer of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSource {
    /// Digest of the uncompressed layer.
    pub layer: Digest,
    /// Its uncompressed bytes, unless the engine has them: the file and its size.
    pub file: Option<(PathBuf, u64)>,
}

/// The archive of an image and its size (bytes). Layers are lowest first, as many as the configuration names.
pub fn assemble(configuration: &[u8], layers: &[LayerSource]) -> io::Result<(ArchiveStream, u64)> {
    let mut parts = description(configuration, layers.iter().map(|source| &source.layer))?;
    let mut added = HashSet::new();
    for source in layers {
        if let Some((path, size)) = &source.file
            && added.insert(source.layer)
        {
            parts.push(Part::Bytes(header(&name_of(&source.layer), *size)?));
            parts.push(Part::File(path.clone(), *size));
            parts.push(padding(*size));
        }
    }
    Ok(finish(parts))
}

/// The same of an image with one layer, whose bytes are at hand.
pub fn with_layer(configuration: &[u8], layer: Bytes) -> io::Result<(ArchiveStream, u64)> {
    let (digest, size) = (Digest::of(&layer), layer.len() as u64);
    let mut parts = description(configuration, std::iter::once(&digest))?;
    parts.extend([Part::Bytes(header(&name_of(&digest), size)?), Part::Bytes(layer), padding(size)]);
    Ok(finish(parts))
}

/// What stands before the layers.
fn description<'a>(configuration: &[u8], layers: impl Iterator<Item = &'a Digest>) -> io::Result<Vec<Part>> {
    let names: Vec<_> = layers.map(name_of).collect();
    let configuration_name = format!("{}.json", Digest::of(configuration).hex());
    let manifest = json!([{ "Config": configuration_name, "RepoTags": null, "Layers": names }]).to_string();
    let mut parts = Vec::new();
    for (name, contents) in [("manifest.json", manifest.as_bytes()), (&configuration_name, configuration)] {
        parts.push(Part::Bytes(header(name, contents.len() as u64)?));
        parts.push(Part::Bytes(Bytes::copy_from_slice(contents)));
        parts.push(padding(contents.len() as u64));
    }
    Ok(parts)
}

fn finish(mut parts: Vec<Part>) -> (ArchiveStream, u64) {
    parts.push(Part::Bytes(Bytes::from_static(&[0; 1024])));
    let size = parts.iter().map(Part::size).sum();
    (stream::iter(parts).flat_map(Part::into_stream).boxed(), size)
}

fn name_of(layer: &Digest) -> String {
    format!("{}.tar", layer.hex())
}

enum Part {
    Bytes(Bytes),
    File(PathBuf, u64),
}

impl Part {
    fn size(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(_, size) => *size,
        }
    }

    fn into_stream(self) -> ArchiveStream {
        match self {
            Self::Bytes(bytes) => stream::once(async { Ok(bytes) }).boxed(),
            Self::File(path, size) => {
                let open = async move {
                    let file = tokio::fs::File::open(&path).await?;
                    // A file of another length would shift everything after it.
                    if file.metadata().await?.len() != size {
                        return Err(io::Error::other(format!("layer {} has changed its size", path.display())));
                    }
                    Ok(ReaderStream::with_capacity(tokio::io::AsyncReadExt::take(file, size), CHUNK))
                };
                stream::once(open).try_flatten().boxed()
            }
        }
    }
}

fn header(name: &str, size: u64) -> io::Result<Bytes> {
    let mut header = Header::new_gnu();
    header.set_path(name)?;
    header.set_size(size);
    header.set_mode(0o644);
    header.set_cksum();
    Ok(Bytes::copy_from_slice(header.as_bytes()))
}

fn padding(size: u64) -> Part {
    let count = usize::try_from(size.next_multiple_of(512) - size).expect("less than 512");
    Part::Bytes(Bytes::from_static(&[0; 512][..count]))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::io::Read as _;

    use super::*;

    async fn collect(stream: ArchiveStream) -> io::Result<Vec<u8>> {
        stream
            .try_fold(Vec::new(), async |mut all, piece| {
                all.extend_from_slice(&piece);
                Ok(all)
            })
            .await
    }

    #[tokio::test]
    async fn v4_archive_names_no_tag_and_holds_only_what_lacks() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("layer");
        std::fs::write(&file, b"layer").unwrap();
        let (one, two) = (Digest::of(b"present"), Digest::of(b"layer"));
        let source = LayerSource { layer: two, file: Some((file, 5)) };
        let layers = [LayerSource { layer: one, file: None }, source.clone(), source];
        let (stream, size) = assemble(b"{}", &layers).unwrap();
        let bytes = collect(stream).await.unwrap();
        assert_eq!(bytes.len() as u64, size);
        let mut names = Vec::new();
        let mut archive = tar::Archive::new(bytes.as_slice());
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            if name == "manifest.json" {
                let manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
                assert!(manifest[0]["RepoTags"].is_null());
                assert_eq!(manifest[0]["Layers"].as_array().unwrap().len(), 3);
            }
            names.push(name);
        }
        let hex = Digest::of(b"{}").hex();
        assert_eq!(names, ["manifest.json".to_owned(), format!("{hex}.json"), format!("{}.tar", two.hex())]);
    }

    #[tokio::test]
    async fn a_layer_that_changed_its_size_ends_the_archive() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("layer");
        std::fs::write(&file, b"longer").unwrap();
        let layers = [LayerSource { layer: Digest::of(b"layer"), file: Some((file, 5)) }];
        assert!(collect(assemble(b"{}", &layers).unwrap().0).await.is_err());
    }
}
