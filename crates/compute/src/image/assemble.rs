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

/// A piece of an image's archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// These bytes.
    Bytes(Bytes),
    /// The uncompressed bytes of a layer.
    Layer {
        /// Its place among the layers.
        index: usize,
        /// How many bytes it has.
        size: u64,
    },
}

/// The archive of an image as pieces, and its size (bytes). Of each layer the digest is given and, unless the engine has
/// it, its size; they are lowest first, as many as the configuration names.
pub fn parts(configuration: &[u8], layers: &[(Digest, Option<u64>)]) -> io::Result<(Vec<Part>, u64)> {
    let digest = Digest::of(configuration);
    let name = |layer: &Digest| format!("{}.tar", layer.hex());
    let names: Vec<_> = layers.iter().map(|(layer, _)| name(layer)).collect();
    let configuration_name = format!("{}.json", digest.hex());
    let manifest = json!([{ "Config": configuration_name, "RepoTags": null, "Layers": names }]).to_string();
    let mut parts = Vec::new();
    for (name, contents) in [("manifest.json", manifest.as_bytes()), (&configuration_name, configuration)] {
        parts.push(Part::Bytes(header(name, contents.len() as u64)?));
        parts.push(Part::Bytes(Bytes::copy_from_slice(contents)));
        parts.push(padding(contents.len() as u64));
    }
    let mut added = HashSet::new();
    for (index, (layer, size)) in layers.iter().enumerate() {
        if let Some(size) = *size
            && added.insert(layer)
        {
            parts.push(Part::Bytes(header(&name(layer), size)?));
            parts.push(Part::Layer { index, size });
            parts.push(padding(size));
        }
    }
    parts.push(Part::Bytes(Bytes::from_static(&[0; 1024])));
    let size = parts.iter().map(Part::size).fold(0, u64::saturating_add);
    Ok((parts, size))
}

/// The archive of an image and its size (bytes). Layers are lowest first, as many as the configuration names.
pub fn assemble(configuration: &[u8], layers: &[LayerSource]) -> io::Result<(ArchiveStream, u64)> {
    let known: Vec<_> = layers.iter().map(LayerSource::size).collect();
    let (parts, size) = parts(configuration, &known)?;
    let streams: Vec<_> = parts
        .into_iter()
        .map(|part| match part {
            Part::Bytes(bytes) => stream::once(async { Ok(bytes) }).boxed(),
            Part::Layer { index, .. } => layers[index].read(),
        })
        .collect();
    Ok((stream::iter(streams).flatten().boxed(), size))
}

/// The same of an image with one layer, whose bytes are at hand.
pub fn with_layer(configuration: &[u8], layer: &Bytes) -> io::Result<(ArchiveStream, u64)> {
    let (parts, size) = parts(configuration, &[(Digest::of(layer), Some(layer.len() as u64))])?;
    let pieces: Vec<_> = parts
        .into_iter()
        .map(|part| match part {
            Part::Bytes(bytes) => Ok(bytes),
            Part::Layer { .. } => Ok(layer.clone()),
        })
        .collect();
    Ok((stream::iter(pieces).boxed(), size))
}

impl LayerSource {
    /// Its digest and, unless the engine has it, its size.
    pub fn size(&self) -> (Digest, Option<u64>) {
        (self.layer, self.file.as_ref().map(|(_, size)| *size))
    }

    /// Its bytes; none, if the engine has it.
    pub fn read(&self) -> ArchiveStream {
        let Some((path, size)) = self.file.clone() else { return stream::empty().boxed() };
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

impl Part {
    fn size(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Layer { size, .. } => *size,
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
    let count = usize::try_from((512 - size % 512) % 512).expect("less than 512");
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
