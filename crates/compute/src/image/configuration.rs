//! The image configuration (OCI image specification) as a stranger sends it: what this room needs of it, checked.

use std::collections::BTreeMap;

use minicbor::{Decode, Encode};
use peer_proto::{
    code::{Code, Problem},
    deploy::{IMAGE_CONFIGURATION_MAX, ImageOffer, LAYER_SIZE_MAX, LAYERS_MAX},
    id::Digest,
};
use serde::Deserialize;
use serde_json::Value;

use crate::engine::quote;

/// What an image says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageConfiguration {
    /// Its own digest, which is the image's name.
    pub digest: Digest,
    /// Such as `amd64`.
    pub architecture: String,
    /// Digests of the uncompressed layers, lowest first.
    pub layers: Vec<Digest>,
    /// Environment variables (`NAME=VALUE`).
    pub environment: Vec<String>,
    /// How it wants to run.
    pub wishes: Wishes,
}

/// How an image wants to run. Texts of a stranger: what is taken from them is checked, the rest is only shown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Wishes {
    /// Such as `linux`.
    #[n(0)]
    pub system: String,
    /// User that it wants to run as; never obeyed. Empty for root.
    #[n(1)]
    pub user: String,
    /// Command.
    #[n(2)]
    pub command: Vec<String>,
    /// Entrypoint.
    #[n(3)]
    pub entrypoint: Vec<String>,
    /// Working directory; empty if it names none.
    #[n(4)]
    pub working_directory: String,
    /// Paths that it wants as volumes.
    #[n(5)]
    pub volumes: Vec<String>,
    /// Ports that it says it listens on, such as `80/tcp`.
    #[n(6)]
    pub exposed_ports: Vec<String>,
}

/// Why a configuration is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigurationError {
    /// It is too large.
    #[error("the image's configuration has {0} bytes; at most {IMAGE_CONFIGURATION_MAX} are allowed")]
    TooLarge(usize),
    /// It is not what the specification says.
    #[error("the image's configuration is not valid: {0}")]
    Invalid(String),
    /// Its layers do not fit the sizes that came with it.
    #[error("the image has {layers} layers, but {sizes} sizes came with it")]
    LayerCount {
        /// Layers in the configuration.
        layers: usize,
        /// Sizes in the offer.
        sizes: usize,
    },
    /// A layer is too large.
    #[error("a layer of the image has {size} bytes; at most {LAYER_SIZE_MAX} are allowed")]
    LayerTooLarge {
        /// Its size.
        size: u64,
    },
}

impl ConfigurationError {
    /// Code and sentence.
    pub fn problem(&self) -> Problem {
        let code = match self {
            Self::TooLarge(_) | Self::LayerTooLarge { .. } => Code::ImageTooLarge,
            Self::Invalid(_) | Self::LayerCount { .. } => Code::InvalidImage,
        };
        Problem::new(code, self.to_string())
    }
}

#[derive(Deserialize)]
struct Document {
    architecture: String,
    os: String,
    rootfs: RootFiles,
    #[serde(default)]
    config: Option<Settings>,
}

#[derive(Deserialize)]
struct RootFiles {
    r#type: String,
    diff_ids: Option<Vec<String>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct Settings {
    env: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    working_dir: Option<String>,
    volumes: Option<BTreeMap<String, Value>>,
    exposed_ports: Option<BTreeMap<String, Value>>,
    user: Option<String>,
}

/// Reads a configuration.
pub fn parse(bytes: &[u8]) -> Result<ImageConfiguration, ConfigurationError> {
    let invalid = |why: String| ConfigurationError::Invalid(why);
    if bytes.len() > IMAGE_CONFIGURATION_MAX {
        return Err(ConfigurationError::TooLarge(bytes.len()));
    }
    let value: Value = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
    check_keys(&value)?;
    // Read again from the bytes: a field that stands there twice is an error here, and silently dropped above.
    let document: Document = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
    if document.rootfs.r#type != "layers" {
        return Err(invalid(format!("rootfs.type is '{}', not 'layers'", quote(&document.rootfs.r#type))));
    }
    let layers = document.rootfs.diff_ids.unwrap_or_default();
    if layers.is_empty() || layers.len() > LAYERS_MAX {
        return Err(invalid(format!("it has {} layers; 1 to {LAYERS_MAX} are possible", layers.len())));
    }
    let layers: Result<Vec<Digest>, _> = layers.iter().map(|layer| layer.parse()).collect();
    let settings = document.config.unwrap_or_default();
    Ok(ImageConfiguration {
        digest: Digest::of(bytes),
        architecture: document.architecture,
        layers: layers.map_err(|error| invalid(format!("rootfs.diff_ids: {error}")))?,
        environment: settings.env.unwrap_or_default(),
        wishes: Wishes {
            system: document.os,
            user: settings.user.unwrap_or_default(),
            command: settings.cmd.unwrap_or_default(),
            entrypoint: settings.entrypoint.unwrap_or_default(),
            working_directory: settings.working_dir.unwrap_or_default(),
            volumes: settings.volumes.unwrap_or_default().into_keys().collect(),
            exposed_ports: settings.exposed_ports.unwrap_or_default().into_keys().collect(),
        },
    })
}

/// Reads the configuration of an offer and checks the sizes of the layers against it.
pub fn parse_offer(offer: &ImageOffer) -> Result<ImageConfiguration, ConfigurationError> {
    let configuration = parse(&offer.configuration)?;
    let (layers, sizes) = (configuration.layers.len(), offer.layer_sizes.len());
    if layers != sizes {
        return Err(ConfigurationError::LayerCount { layers, sizes });
    }
    match offer.layer_sizes.iter().find(|size| **size > LAYER_SIZE_MAX) {
        Some(size) => Err(ConfigurationError::LayerTooLarge { size: *size }),
        None => Ok(configuration),
    }
}

/// The engine reads names of fields in any case: one that we would overlook must not be there.
fn check_keys(value: &Value) -> Result<(), ConfigurationError> {
    const TOP: [&str; 4] = ["architecture", "os", "rootfs", "config"];
    const ROOT: [&str; 2] = ["type", "diff_ids"];
    const CONFIG: [&str; 9] =
        ["Env", "Cmd", "Entrypoint", "WorkingDir", "Volumes", "ExposedPorts", "User", "Healthcheck", "Labels"];
    for (object, known) in [(value, &TOP[..]), (&value["rootfs"], &ROOT[..]), (&value["config"], &CONFIG[..])] {
        for key in object.as_object().into_iter().flatten().map(|(key, _)| key) {
            let variant = known.iter().any(|name| *name != key && name.eq_ignore_ascii_case(key));
            if variant || !key.is_ascii() {
                return Err(ConfigurationError::Invalid(format!("field '{}' is misspelt", quote(key))));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn document() -> Value {
        json!({
            "architecture": "amd64", "os": "linux", "history": [{}], "variant": "v8",
            "config": { "Cmd": ["/x"], "Env": null, "Volumes": { "/d": {} }, "ExposedPorts": { "80/tcp": {} }, "Other": 1 },
            "rootfs": { "type": "layers", "diff_ids": [Digest::of(b"a").to_string()] },
        })
    }

    #[test]
    fn a_configuration_is_read() {
        let configuration = parse(document().to_string().as_bytes()).unwrap();
        let wishes = &configuration.wishes;
        assert_eq!(configuration.layers, [Digest::of(b"a")]);
        assert_eq!(
            (wishes.volumes.as_slice(), wishes.command.as_slice()),
            (&["/d".to_owned()][..], &["/x".to_owned()][..])
        );
    }

    #[test]
    fn v4_fields_in_another_spelling_are_refused() {
        for (pointer, key) in [
            ("/config", "volumes"),
            ("/config", "VOLUMES"),
            ("/config", "Volume\u{17f}"),
            ("", "Config"),
            ("/rootfs", "Diff_ids"),
        ] {
            let mut document = document();
            document.pointer_mut(pointer).unwrap()[key] = json!({ "/evil": {} });
            assert!(parse(document.to_string().as_bytes()).is_err(), "{key}");
        }
        let twice = document().to_string().replacen("\"Volumes\"", "\"Volumes\":{\"/evil\":{}},\"Volumes\"", 1);
        assert!(parse(twice.as_bytes()).is_err());
    }

    #[test]
    fn wrong_values_are_refused() {
        for (pointer, value) in [
            ("/rootfs/type", json!("tar")),
            ("/rootfs/diff_ids", json!([])),
            ("/rootfs/diff_ids", json!(["sha256:x"])),
            ("/rootfs/diff_ids", json!(vec![Digest::of(b"a").to_string(); 128])),
            ("/architecture", json!(1)),
            ("/config/Cmd", json!("x")),
        ] {
            let mut document = document();
            *document.pointer_mut(pointer).unwrap() = value;
            assert!(parse(document.to_string().as_bytes()).is_err(), "{pointer}");
        }
        assert!(matches!(parse(&vec![b' '; IMAGE_CONFIGURATION_MAX + 1]), Err(ConfigurationError::TooLarge(_))));
    }

    #[test]
    fn sizes_must_fit_the_layers() {
        let configuration = document().to_string().into_bytes();
        let offer = |layer_sizes| ImageOffer { configuration: configuration.clone(), layer_sizes };
        assert!(parse_offer(&offer(vec![1])).is_ok());
        assert!(matches!(parse_offer(&offer(vec![])), Err(ConfigurationError::LayerCount { .. })));
        assert!(matches!(parse_offer(&offer(vec![u64::MAX])), Err(ConfigurationError::LayerTooLarge { .. })));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            drop(parse(&bytes));
        }
    }
}
