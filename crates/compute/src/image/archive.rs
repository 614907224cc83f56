//! Reads an image from an archive on the requester's disk: what `docker save` writes (of any version) or an OCI layout,
//! as a tar file or as a directory. No engine is needed.
//!
//! Names inside the archive are looked up inside the archive only; a link that leads out of it leads nowhere.

mod docker;
mod oci;
mod source;

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
};

use peer_proto::{
    code::{Code, Problem},
    deploy::{IMAGE_CONFIGURATION_MAX, ImageOffer, LAYER_SIZE_MAX},
    id::Digest,
};
use sha2::{Digest as _, Sha256};

use self::source::{Packing, Source};
use crate::image::configuration::{self, ConfigurationError};

/// Largest index or manifest (bytes).
const MANIFEST_MAX: u64 = 4 << 20;

/// An image in an archive.
#[derive(Debug)]
pub struct Archive {
    source: Source,
    configuration: Vec<u8>,
    digest: Digest,
    architecture: String,
    layers: Vec<LayerEntry>,
    blobs: Vec<Blob>,
    names: Vec<String>,
}

/// A layer of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerEntry {
    /// Digest of the uncompressed layer.
    pub diff_id: Digest,
    /// Uncompressed size (bytes).
    pub size: u64,
}

/// Where a layer's bytes are.
#[derive(Debug)]
struct Blob {
    path: String,
    packing: Packing,
}

/// An image as one of the formats describes it.
#[derive(Debug)]
struct Description {
    configuration: String,
    layers: Vec<String>,
    names: Vec<String>,
}

/// Why no image could be read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The file cannot be read.
    #[error("{} cannot be read: {source}", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is something else.
    #[error("{} is not an image archive: {reason}; make one with 'docker save' or as an OCI layout", .path.display())]
    NotAnImage {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Something that it names is not in it.
    #[error("the archive names '{name}', but does not hold it; make it again")]
    Missing {
        /// What is missing.
        name: String,
    },
    /// A part is larger than it may be.
    #[error("'{name}' in the archive is larger than the {size_max} bytes allowed")]
    TooLarge {
        /// Which part.
        name: String,
        /// What is allowed.
        size_max: u64,
    },
    /// A part is not what its digest says.
    #[error("'{name}' in the archive should have the digest {expected}, but has {actual}; make it again")]
    DigestMismatch {
        /// Which part.
        name: String,
        /// What it should be.
        expected: Digest,
        /// What it is.
        actual: Digest,
    },
    /// It holds several images.
    #[error("the archive holds several images; choose one of: {}", .names.join(", "))]
    SeveralImages {
        /// Their names.
        names: Vec<String>,
    },
    /// It holds no image of that name.
    #[error("the archive holds no image '{name}'; it holds: {}", .names.join(", "))]
    NoSuchImage {
        /// What was asked for.
        name: String,
        /// What there is.
        names: Vec<String>,
    },
    /// It holds no image for that kind of machine.
    #[error("the archive holds no image for '{architecture}'; it holds: {}", .architectures.join(", "))]
    NoSuchArchitecture {
        /// What was asked for.
        architecture: String,
        /// What there is.
        architectures: Vec<String>,
    },
    /// A layer is packed in a way that is not supported.
    #[error("layer '{name}' is compressed with {method}, which is not supported; use gzip or none")]
    Compression {
        /// Which layer.
        name: String,
        /// How it is packed.
        method: &'static str,
    },
    /// Its configuration is refused.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
}

impl ArchiveError {
    /// The stable code.
    pub fn code(&self) -> Code {
        match self {
            Self::Read { .. } => Code::FileFailed,
            Self::NotAnImage { .. } | Self::Compression { .. } => Code::InvalidImage,
            Self::Missing { .. } => Code::MissingLayer,
            Self::TooLarge { .. } => Code::ImageTooLarge,
            Self::DigestMismatch { .. } => Code::DigestMismatch,
            Self::SeveralImages { .. } => Code::Ambiguous,
            Self::NoSuchImage { .. } | Self::NoSuchArchitecture { .. } => Code::NoSuchImage,
            Self::Configuration(error) => error.problem().code,
        }
    }

    /// Code and sentence.
    pub fn problem(&self) -> Problem {
        Problem::new(self.code(), self.to_string())
    }
}

/// Which image of an archive is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Selection<'a> {
    /// Its name (`repository:tag`) or its digest; not needed if the archive holds only one.
    pub name: Option<&'a str>,
    /// The machine's architecture, such as `amd64`; it matters where one name stands for several.
    pub architecture: Option<&'a str>,
}

impl Archive {
    /// Reads the description of an image. Layers packed with gzip are unpacked once, to learn their sizes. This blocks.
    pub fn open(path: &Path, selection: &Selection<'_>) -> Result<Self, ArchiveError> {
        let source = Source::open(path)?;
        let description = if source.contains("manifest.json") {
            docker::describe(&source, selection)?
        } else if source.contains("index.json") {
            oci::describe(&source, selection)?
        } else {
            let reason = "it has neither a manifest.json nor an index.json".to_owned();
            return Err(ArchiveError::NotAnImage { path: path.into(), reason });
        };
        let configuration = source.read(&description.configuration, IMAGE_CONFIGURATION_MAX as u64)?;
        let parsed = configuration::parse(&configuration)?;
        source::check_name(&description.configuration, &parsed.digest)?;
        if parsed.layers.len() != description.layers.len() {
            let (layers, sizes) = (parsed.layers.len(), description.layers.len());
            return Err(ConfigurationError::LayerCount { layers, sizes }.into());
        }
        let (mut layers, mut blobs) = (Vec::new(), Vec::new());
        for (diff_id, path) in parsed.layers.iter().zip(description.layers) {
            let packing = source.packing(&path)?;
            let size = match packing {
                Packing::None => source.size(&path)?,
                Packing::Gzip => unpacked_size(&source, &path, *diff_id)?,
            };
            if size > LAYER_SIZE_MAX {
                return Err(ArchiveError::TooLarge { name: path, size_max: LAYER_SIZE_MAX });
            }
            layers.push(LayerEntry { diff_id: *diff_id, size });
            blobs.push(Blob { path, packing });
        }
        let (digest, architecture, names) = (parsed.digest, parsed.architecture, description.names);
        Ok(Self { source, configuration, digest, architecture, layers, blobs, names })
    }

    /// The image's digest.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Such as `amd64`.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// The image's layers, lowest first.
    pub fn layers(&self) -> &[LayerEntry] {
        &self.layers
    }

    /// The names that the archive gives the image.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// What a provider is told of the image.
    pub fn offer(&self) -> ImageOffer {
        let layer_sizes = self.layers.iter().map(|layer| layer.size).collect();
        ImageOffer { configuration: self.configuration.clone(), layer_sizes }
    }

    /// The uncompressed bytes of a layer, by its position. Reading fails at the end if they are not what the layer's
    /// digest says. This blocks.
    pub fn open_layer(&self, index: usize) -> Result<LayerReader, ArchiveError> {
        let (Some(layer), Some(blob)) = (self.layers.get(index), self.blobs.get(index)) else {
            return Err(ArchiveError::Missing { name: format!("layer {index}") });
        };
        let inner = self.source.unpacked(&blob.path, blob.packing)?;
        Ok(LayerReader { inner, hasher: Sha256::new(), rest: layer.size, expected: layer.diff_id })
    }
}

/// Unpacks a layer to learn its size, and verifies it by the way.
fn unpacked_size(source: &Source, path: &str, expected: Digest) -> Result<u64, ArchiveError> {
    let mut reader = source.unpacked(path, Packing::Gzip)?.take(LAYER_SIZE_MAX + 1);
    let (mut hasher, mut size, mut block) = (Sha256::new(), 0, vec![0; 256 << 10]);
    loop {
        let count = reader.read(&mut block).map_err(|error| source.failure(error))?;
        if count == 0 {
            break;
        }
        hasher.update(&block[..count]);
        size += count as u64;
    }
    if size > LAYER_SIZE_MAX {
        return Err(ArchiveError::TooLarge { name: path.to_owned(), size_max: LAYER_SIZE_MAX });
    }
    let actual = Digest(hasher.finalize().into());
    if actual == expected {
        Ok(size)
    } else {
        Err(ArchiveError::DigestMismatch { name: path.to_owned(), expected, actual })
    }
}

/// The uncompressed bytes of a layer, verified while they are read.
pub struct LayerReader {
    inner: Box<dyn Read + Send>,
    hasher: Sha256,
    rest: u64,
    expected: Digest,
}

impl std::fmt::Debug for LayerReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayerReader").field("layer", &self.expected).field("rest", &self.rest).finish_non_exhaustive()
    }
}

impl Read for LayerReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.rest == 0 || buffer.is_empty() {
            return Ok(0);
        }
        let most = usize::try_from(self.rest).map_or(buffer.len(), |rest| rest.min(buffer.len()));
        let count = self.inner.read(&mut buffer[..most])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.hasher.update(&buffer[..count]);
        self.rest -= count as u64;
        // The last bytes are held back if the whole is wrong.
        if self.rest == 0 && Digest(self.hasher.clone().finalize().into()) != self.expected {
            let message = format!("the layer's bytes are not those of {}", self.expected);
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(count)
    }
}
