//! The OCI image layout: `index.json` leads to manifests, each of which names a configuration and layers by digest.

use std::collections::{BTreeSet, HashMap};

use peer_proto::id::Digest;
use serde::Deserialize;

use super::{ArchiveError, Description, MANIFEST_MAX, Selection, source::Source};
use crate::engine::quote;

/// Most manifests of a layout, over all of its indexes.
const MANIFESTS_MAX: usize = 256;
/// Indexes may lead to indexes, but not for ever.
const DEPTH_MAX: usize = 4;
const NAMES: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize, Clone)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: Digest,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: HashMap<String, String>,
}

#[derive(Deserialize, Clone)]
struct Platform {
    architecture: String,
    os: String,
}

/// A manifest that the layout leads to.
struct Found {
    descriptor: Descriptor,
    names: Vec<String>,
}

impl Found {
    fn architecture(&self) -> &str {
        self.descriptor.platform.as_ref().map_or("", |platform| platform.architecture.as_str())
    }
}

pub(super) fn describe(source: &Source, selection: &Selection<'_>) -> Result<Description, ArchiveError> {
    let index: Index = parse(source, "index.json", &source.read("index.json", MANIFEST_MAX)?)?;
    let mut found = Vec::new();
    collect(source, index, &[], 0, &mut found)?;
    let all: Vec<String> = found.iter().flat_map(shown).collect::<BTreeSet<_>>().into_iter().collect();
    if found.is_empty() {
        return Err(source.invalid("its index.json names no linux image".to_owned()));
    }
    if let Some(name) = selection.name {
        found.retain(|image| {
            image.names.iter().any(|own| same(own, name)) || image.descriptor.digest.to_string() == name
        });
        if found.is_empty() {
            return Err(ArchiveError::NoSuchImage { name: quote(name), names: all });
        }
    }
    let found = choose(found, selection.architecture, all)?;
    let blob = blob(&found.descriptor.digest);
    let manifest: Manifest = parse(source, &blob, &read_verified(source, &found.descriptor.digest)?)?;
    Ok(Description {
        configuration: self::blob(&manifest.config.digest),
        layers: manifest.layers.iter().map(|layer| self::blob(&layer.digest)).collect(),
        names: shown(&found),
    })
}

/// Follows indexes to the manifests of linux images. Attestations and the like have another platform or none known.
fn collect(
    source: &Source,
    index: Index,
    names: &[String],
    depth: usize,
    found: &mut Vec<Found>,
) -> Result<(), ArchiveError> {
    for descriptor in index.manifests {
        if found.len() >= MANIFESTS_MAX || depth >= DEPTH_MAX {
            return Err(source.invalid("it has too many manifests".to_owned()));
        }
        let mut names = names.to_vec();
        names.extend(NAMES.iter().filter_map(|name| descriptor.annotations.get(*name).cloned()));
        if descriptor.media_type.contains("index") || descriptor.media_type.contains("manifest.list") {
            let bytes = read_verified(source, &descriptor.digest)?;
            let inner = parse(source, &blob(&descriptor.digest), &bytes)?;
            collect(source, inner, &names, depth + 1, found)?;
        } else if descriptor.platform.as_ref().is_none_or(|platform| platform.os == "linux") {
            found.push(Found { descriptor, names });
        }
    }
    Ok(())
}

/// The one image for this architecture.
fn choose(mut found: Vec<Found>, wanted: Option<&str>, names: Vec<String>) -> Result<Found, ArchiveError> {
    let digests: BTreeSet<_> = found.iter().map(|image| image.descriptor.digest).collect();
    if digests.len() > 1
        && let Some(wanted) = wanted
    {
        let architectures: BTreeSet<_> = found.iter().map(|image| quote(image.architecture())).collect();
        found.retain(|image| image.architecture() == wanted);
        if found.is_empty() {
            let architectures = architectures.into_iter().collect();
            return Err(ArchiveError::NoSuchArchitecture { architecture: quote(wanted), architectures });
        }
    }
    let digests: BTreeSet<_> = found.iter().map(|image| image.descriptor.digest).collect();
    match found.pop() {
        Some(image) if digests.len() == 1 => Ok(image),
        _ => Err(ArchiveError::SeveralImages { names }),
    }
}

fn shown(image: &Found) -> Vec<String> {
    if image.names.is_empty() {
        return vec![image.descriptor.digest.to_string()];
    }
    image.names.iter().map(|name| quote(name)).collect()
}

/// `docker.io/library/hello:1` is what people call `hello:1`, and no tag means `latest`.
fn same(own: &str, wanted: &str) -> bool {
    let short = own.strip_prefix("docker.io/library/").or_else(|| own.strip_prefix("docker.io/")).unwrap_or(own);
    [own, short].iter().any(|own| *own == wanted || own.strip_suffix(":latest") == Some(wanted))
}

fn blob(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn read_verified(source: &Source, digest: &Digest) -> Result<Vec<u8>, ArchiveError> {
    let name = blob(digest);
    let bytes = source.read(&name, MANIFEST_MAX)?;
    let actual = Digest::of(&bytes);
    if actual == *digest { Ok(bytes) } else { Err(ArchiveError::DigestMismatch { name, expected: *digest, actual }) }
}

fn parse<T: serde::de::DeserializeOwned>(source: &Source, name: &str, bytes: &[u8]) -> Result<T, ArchiveError> {
    serde_json::from_slice(bytes).map_err(|error| source.invalid(format!("{name}: {error}")))
}
