//! Images as they are offered, and where a provider gets them from.

use std::fmt;
use std::str::FromStr;

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::id::{Digest, text_form};

/// Largest image configuration (bytes).
pub const IMAGE_CONFIGURATION_MAX: usize = 256 * 1024;
/// Most layers of one image; overlayfs stacks no more than 127.
pub const LAYERS_MAX: usize = 127;
/// Largest single layer, uncompressed (bytes).
pub const LAYER_SIZE_MAX: u64 = 16 << 30;
/// Longest image name kept for display (bytes).
pub const IMAGE_NAME_MAX: usize = 255;

/// An image that its owner can send: the configuration itself and the size of each layer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ImageOffer {
    /// The image's configuration blob (OCI image specification), whose SHA-256 names the image.
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub configuration: Vec<u8>,
    /// Uncompressed size of each layer (bytes), lowest first; as many as the configuration names diff ids.
    #[n(1)]
    pub layer_sizes: Vec<u64>,
}

impl ImageOffer {
    /// The name of the image: SHA-256 of its configuration.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.configuration)
    }
}

/// Where the provider gets the image from.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ImageSource {
    /// From the requester, over the peer connection.
    #[n(0)]
    Offered(#[n(0)] ImageOffer),
    /// From a registry that the provider can reach: `host/name@sha256:…`, always pinned to a digest.
    #[n(1)]
    Registry(#[n(0)] RegistryReference),
}

/// A reference to an image in a registry, pinned to the digest of its manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RegistryReference {
    name: String,
    digest: Digest,
}

impl RegistryReference {
    /// Registry, repository and image name, without the digest.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Digest of the manifest.
    pub fn digest(&self) -> Digest {
        self.digest
    }
}

impl fmt::Display for RegistryReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.digest)
    }
}

impl FromStr for RegistryReference {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let invalid =
            || format!("'{}' is not pinned to a digest; write it as registry/name@sha256:…", crate::text::escape(text));
        let (name, digest) = text.split_once('@').ok_or_else(invalid)?;
        let digest = digest.parse().map_err(|_| invalid())?;
        let component = |part: &str| {
            !part.is_empty()
                && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-:".contains(&b))
                && part.as_bytes()[0].is_ascii_alphanumeric()
        };
        if name.len() > IMAGE_NAME_MAX || !name.split('/').all(component) {
            return Err(invalid());
        }
        Ok(Self { name: name.to_owned(), digest })
    }
}

text_form!(RegistryReference);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registry_references_must_be_pinned() {
        let digest = Digest::of(b"manifest");
        assert!(format!("registry.example/a/b@{digest}").parse::<RegistryReference>().is_ok());
        for text in ["a/b", "a/b:latest", "--privileged@sha256:00", "A/b@sha256:00", "a//b@sha256:"] {
            assert!(text.parse::<RegistryReference>().is_err(), "{text}");
        }
    }
}
