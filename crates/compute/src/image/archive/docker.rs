//! The `docker-archive` format: `manifest.json` names a configuration and layers for each image.

use peer_proto::id::Digest;
use serde::Deserialize;

use super::{ArchiveError, Description, MANIFEST_MAX, Selection, source::Source};
use crate::engine::quote;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

pub(super) fn describe(source: &Source, selection: &Selection<'_>) -> Result<Description, ArchiveError> {
    let bytes = source.read("manifest.json", MANIFEST_MAX)?;
    let items: Vec<Item> =
        serde_json::from_slice(&bytes).map_err(|error| source.invalid(format!("manifest.json: {error}")))?;
    let all: Vec<String> = items.iter().flat_map(names).collect();
    let matches = |item: &Item| match selection.name {
        Some(name) => {
            let tagged = |tag: &String| tag == name || tag.strip_suffix(":latest") == Some(name);
            item.repo_tags.iter().flatten().any(tagged) || digest(item).is_some_and(|digest| digest.to_string() == name)
        }
        None => true,
    };
    let count = items.len();
    let mut found: Vec<Item> = items.into_iter().filter(matches).collect();
    match (found.pop(), selection.name) {
        (Some(item), _) if found.is_empty() => {
            let names = names(&item);
            Ok(Description { configuration: item.config, layers: item.layers, names })
        }
        (Some(_), _) => Err(ArchiveError::SeveralImages { names: all }),
        (None, Some(name)) if count > 0 => Err(ArchiveError::NoSuchImage { name: quote(name), names: all }),
        (None, _) => Err(source.invalid("its manifest.json names no image".to_owned())),
    }
}

/// The image's tags, or its digest if it has none.
fn names(item: &Item) -> Vec<String> {
    let tags = item.repo_tags.iter().flatten().map(|tag| quote(tag)).collect::<Vec<_>>();
    if tags.is_empty() { digest(item).map(|digest| digest.to_string()).into_iter().collect() } else { tags }
}

/// The digest that the configuration's name says: `<hex>.json` up to version 24, `blobs/sha256/<hex>` since.
fn digest(item: &Item) -> Option<Digest> {
    let name = item.config.rsplit('/').next()?;
    format!("sha256:{}", name.strip_suffix(".json").unwrap_or(name)).parse().ok()
}
