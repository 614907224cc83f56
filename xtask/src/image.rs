//! Container images made of bytes: the same input gives the same archive, bit for bit, and no engine is asked.
//!
//! [`Builder`] collects layers and configuration, [`Image`] is the result with its digests, written out as a Docker
//! archive or as an OCI layout. Tests build hostile images with [`Layer::raw`] and [`Builder::configuration`].

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, Write},
};

use data_encoding::HEXLOWER;
use flate2::{Compression as Level, GzBuilder};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use tar::{EntryType, Header};

/// A SHA-256 digest, written `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The 64 hexadecimal digits alone.
    pub fn hex(&self) -> String {
        HEXLOWER.encode(&self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[derive(Debug, Clone)]
enum Node {
    Directory,
    File { data: Vec<u8>, mode: u32 },
    Link(String),
}

/// One layer: files by their path, or the bytes of a tar as they are.
#[derive(Debug, Clone, Default)]
pub struct Layer {
    nodes: BTreeMap<String, Node>,
    raw: Option<Vec<u8>>,
}

impl Layer {
    /// An empty layer.
    pub fn new() -> Self {
        Self::default()
    }

    /// A layer whose tar is exactly these bytes, well formed or not.
    pub fn raw(tar: Vec<u8>) -> Self {
        Self { raw: Some(tar), ..Self::default() }
    }

    /// Adds a file of root's with its mode, and the directories above it.
    #[must_use]
    pub fn file(self, path: &str, data: &[u8], mode: u32) -> Self {
        self.node(path, Node::File { data: data.to_vec(), mode })
    }

    /// Adds a directory, and those above it.
    #[must_use]
    pub fn directory(self, path: &str) -> Self {
        self.node(path, Node::Directory)
    }

    /// Adds a symbolic link to `target`, and the directories above it.
    #[must_use]
    pub fn link(self, path: &str, target: &str) -> Self {
        self.node(path, Node::Link(target.to_owned()))
    }

    fn node(mut self, path: &str, node: Node) -> Self {
        let path = path.trim_matches('/');
        for (end, _) in path.match_indices('/') {
            self.nodes.entry(path[..end].to_owned()).or_insert(Node::Directory);
        }
        self.nodes.insert(path.to_owned(), node);
        self
    }

    fn into_tar(self) -> io::Result<Vec<u8>> {
        if let Some(raw) = self.raw {
            return Ok(raw);
        }
        let mut archive = tar::Builder::new(Vec::new());
        for (path, node) in self.nodes {
            match node {
                Node::Directory => {
                    append(&mut archive, EntryType::Directory, &format!("{path}/"), &[], 0o755)?;
                }
                Node::File { data, mode } => append(&mut archive, EntryType::Regular, &path, &data, mode)?,
                Node::Link(target) => {
                    let mut header = header(EntryType::Symlink, 0, 0o777);
                    archive.append_link(&mut header, &path, &target)?;
                }
            }
        }
        archive.into_inner()
    }
}

/// What an image is made of.
#[derive(Debug, Clone)]
pub struct Builder {
    name: String,
    layers: Vec<Layer>,
    settings: Map<String, Value>,
    environment: Vec<String>,
}

impl Builder {
    /// An image without layers, called `name` (`repository:tag`).
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), layers: Vec::new(), settings: Map::new(), environment: Vec::new() }
    }

    /// Puts a layer on top of the others.
    #[must_use]
    pub fn layer(mut self, layer: Layer) -> Self {
        self.layers.push(layer);
        self
    }

    /// Puts one program into a layer of its own, on top of the others.
    #[must_use]
    pub fn binary(self, path: &str, program: &[u8]) -> Self {
        self.layer(Layer::new().file(path, program, 0o755))
    }

    /// What a container of this image runs.
    #[must_use]
    pub fn command<S: AsRef<str>>(self, words: &[S]) -> Self {
        self.configuration("Cmd", words.iter().map(AsRef::as_ref).collect())
    }

    /// A TCP port that the image says it listens on.
    #[must_use]
    pub fn expose(self, port: u16) -> Self {
        self.member("ExposedPorts", &format!("{port}/tcp"), json!({}))
    }

    /// A variable of the environment.
    #[must_use]
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push(format!("{name}={value}"));
        let all = self.environment.iter().map(String::as_str).collect();
        self.configuration("Env", all)
    }

    /// The user that the image asks for.
    #[must_use]
    pub fn user(self, user: &str) -> Self {
        self.configuration("User", user.into())
    }

    /// The working directory.
    #[must_use]
    pub fn working_directory(self, path: &str) -> Self {
        self.configuration("WorkingDir", path.into())
    }

    /// A volume that the image asks for.
    #[must_use]
    pub fn volume(self, path: &str) -> Self {
        self.member("Volumes", path, json!({}))
    }

    /// A label.
    #[must_use]
    pub fn label(self, name: &str, value: &str) -> Self {
        self.member("Labels", name, value.into())
    }

    /// A command that the engine is asked to run each second, to learn whether the container is well.
    #[must_use]
    pub fn healthcheck<S: AsRef<str>>(self, words: &[S]) -> Self {
        let test = std::iter::once("CMD").chain(words.iter().map(AsRef::as_ref)).collect::<Value>();
        self.configuration("Healthcheck", json!({ "Test": test, "Interval": 1_000_000_000_u64 }))
    }

    /// Sets any field of the image's `config` object, by the engine's own name.
    #[must_use]
    pub fn configuration(mut self, field: &str, value: Value) -> Self {
        self.settings.insert(field.to_owned(), value);
        self
    }

    fn member(mut self, field: &str, name: &str, value: Value) -> Self {
        let object = self.settings.entry(field).or_insert_with(|| json!({}));
        object[name] = value;
        self
    }

    /// Computes the layers, the configuration and their digests.
    pub fn build(self) -> io::Result<Image> {
        let tars = self.layers.into_iter().map(Layer::into_tar).collect::<io::Result<Vec<_>>>()?;
        let layers: Vec<_> = tars.into_iter().map(|tar| (Digest::of(&tar), tar)).collect();
        let digests: Value = layers.iter().map(|(digest, _)| digest.to_string()).collect();
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": self.settings,
            "rootfs": { "type": "layers", "diff_ids": digests },
            "history": layers.iter().map(|_| json!({ "created": "1970-01-01T00:00:00Z", "created_by": "xtask image" })).collect::<Value>(),
        });
        Ok(Image { name: self.name, layers, config: config.to_string().into_bytes() })
    }
}

/// How layers are stored in an OCI layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// As they are.
    None,
    /// With gzip.
    Gzip,
}

/// A finished image. Change its parts to make one that does not fit its own digests.
#[derive(Debug, Clone)]
pub struct Image {
    /// Name and tag (`repository:tag`).
    pub name: String,
    /// The layers' tars from the bottom up, each with the digest that the configuration names for it.
    pub layers: Vec<(Digest, Vec<u8>)>,
    /// The configuration, as JSON.
    pub config: Vec<u8>,
}

impl Image {
    /// The image's id: the digest of its configuration.
    pub fn id(&self) -> Digest {
        Digest::of(&self.config)
    }

    /// What `docker save` would write: `manifest.json`, the configuration, one tar per layer.
    pub fn docker_archive(&self) -> io::Result<Vec<u8>> {
        let config = format!("{}.json", self.id().hex());
        let paths: Vec<_> = self.layers.iter().map(|(digest, _)| format!("{}/layer.tar", digest.hex())).collect();
        let manifest = json!([{ "Config": config, "RepoTags": [self.name], "Layers": paths }]);
        let mut archive = tar::Builder::new(Vec::new());
        append(&mut archive, EntryType::Regular, &config, &self.config, 0o644)?;
        let mut written = Vec::new();
        for (path, (digest, tar)) in paths.iter().zip(&self.layers) {
            if !written.contains(digest) {
                append(&mut archive, EntryType::Directory, &format!("{}/", digest.hex()), &[], 0o755)?;
                append(&mut archive, EntryType::Regular, path, tar, 0o644)?;
                written.push(*digest);
            }
        }
        append(&mut archive, EntryType::Regular, "manifest.json", manifest.to_string().as_bytes(), 0o644)?;
        archive.into_inner()
    }

    /// An OCI image layout in a tar: `oci-layout`, `index.json`, and everything else under `blobs/sha256/`.
    pub fn oci_layout(&self, compression: Compression) -> io::Result<Vec<u8>> {
        let (media_type, packed) = match compression {
            Compression::None => {
                ("application/vnd.oci.image.layer.v1.tar", self.layers.iter().map(|(_, tar)| tar.clone()).collect())
            }
            Compression::Gzip => {
                let packed = self.layers.iter().map(|(_, tar)| gzip(tar)).collect::<io::Result<Vec<_>>>()?;
                ("application/vnd.oci.image.layer.v1.tar+gzip", packed)
            }
        };
        let manifest_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": descriptor("application/vnd.oci.image.config.v1+json", &self.config),
            "layers": packed.iter().map(|blob| descriptor(media_type, blob)).collect::<Value>(),
        });
        let manifest = manifest.to_string().into_bytes();
        let mut entry = descriptor(manifest_type, &manifest);
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": self.name });
        let index = json!({ "schemaVersion": 2, "manifests": [entry] });
        let mut archive = tar::Builder::new(Vec::new());
        append(&mut archive, EntryType::Directory, "blobs/", &[], 0o755)?;
        append(&mut archive, EntryType::Directory, "blobs/sha256/", &[], 0o755)?;
        let parts = packed.iter().chain([&self.config, &manifest]);
        let blobs: BTreeMap<String, &Vec<u8>> = parts.map(|blob| (Digest::of(blob).hex(), blob)).collect();
        for (hex, blob) in blobs {
            append(&mut archive, EntryType::Regular, &format!("blobs/sha256/{hex}"), blob, 0o644)?;
        }
        append(&mut archive, EntryType::Regular, "index.json", index.to_string().as_bytes(), 0o644)?;
        append(&mut archive, EntryType::Regular, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644)?;
        archive.into_inner()
    }
}

fn descriptor(media_type: &str, blob: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": Digest::of(blob).to_string(), "size": blob.len() })
}

fn gzip(data: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = GzBuilder::new().mtime(0).write(Vec::new(), Level::fast());
    encoder.write_all(data)?;
    encoder.finish()
}

fn header(kind: EntryType, size: usize, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size as u64);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn append(archive: &mut tar::Builder<Vec<u8>>, kind: EntryType, path: &str, data: &[u8], mode: u32) -> io::Result<()> {
    let mut header = header(kind, data.len(), mode);
    archive.append_data(&mut header, path, data)
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use std::io::Read as _;

    use super::*;

    fn sample() -> Image {
        let base = Layer::new().directory("/tmp").file("/etc/name", b"x", 0o644).link("/bin/app", "../app");
        let builder = Builder::new("sample:1").layer(base).binary("/app", b"program");
        builder
            .command(&["/app"])
            .expose(80)
            .environment("A", "1")
            .environment("B", "=")
            .label("k", "v")
            .build()
            .unwrap()
    }

    fn entries(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(archive);
        let read = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut data = Vec::new();
            entry.read_to_end(&mut data).unwrap();
            (entry.path().unwrap().display().to_string(), data)
        });
        read.collect()
    }

    #[test]
    fn the_same_input_gives_the_same_bytes() {
        assert_eq!(sample().docker_archive().unwrap(), sample().docker_archive().unwrap());
        assert_eq!(sample().oci_layout(Compression::Gzip).unwrap(), sample().oci_layout(Compression::Gzip).unwrap());
    }

    #[test]
    fn every_layer_has_the_digest_that_the_configuration_names() {
        let image = sample();
        let config: Value = serde_json::from_slice(&image.config).unwrap();
        let entries = entries(&image.docker_archive().unwrap());
        let manifest: Value = serde_json::from_slice(&entries["manifest.json"]).unwrap();
        for (index, path) in manifest[0]["Layers"].as_array().unwrap().iter().enumerate() {
            let digest = Digest::of(&entries[path.as_str().unwrap()]).to_string();
            assert_eq!(config["rootfs"]["diff_ids"][index], digest.as_str());
        }
        assert_eq!(config["config"]["Env"], json!(["A=1", "B=="]));
        assert_eq!(config["config"]["ExposedPorts"], json!({ "80/tcp": {} }));
        let paths: Vec<_> = self::entries(&image.layers[0].1).into_keys().collect();
        assert_eq!(paths, ["bin/", "bin/app", "etc/", "etc/name", "tmp/"]);
    }

    #[test]
    fn an_oci_layout_names_its_blobs_by_their_digests() {
        let image = sample();
        let entries = entries(&image.oci_layout(Compression::Gzip).unwrap());
        for (path, data) in &entries {
            if let Some(hex) = path.strip_prefix("blobs/sha256/").filter(|hex| !hex.is_empty()) {
                assert_eq!(hex, Digest::of(data).hex());
            }
        }
        let index: Value = serde_json::from_slice(&entries["index.json"]).unwrap();
        let hex = index["manifests"][0]["digest"].as_str().unwrap().replace("sha256:", "");
        let manifest: Value = serde_json::from_slice(&entries[&format!("blobs/sha256/{hex}")]).unwrap();
        assert_eq!(manifest["config"]["digest"], image.id().to_string().as_str());
    }
}
