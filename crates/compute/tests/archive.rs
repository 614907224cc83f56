//! Archives as people have them: of every format, from strangers, and damaged.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
};

use peer_compute::image::archive::{Archive, ArchiveError, Selection};
use peer_proto::id::Digest;
use serde_json::json;
use tar::{EntryType, Header};
use tempfile::TempDir;
use xtask::image::{Builder, Compression, Image, Layer};

fn image() -> Image {
    let layer = |name: &str| Layer::new().file(name, &[7; 10_000], 0o644);
    let builder = Builder::new("hello:1").layer(layer("/one")).layer(layer("/two")).layer(layer("/one"));
    builder.command(&["/one"]).build().unwrap()
}

fn write(bytes: &[u8]) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.tar");
    fs::write(&path, bytes).unwrap();
    (directory, path)
}

fn open(bytes: &[u8]) -> Result<Archive, ArchiveError> {
    let (directory, path) = write(bytes);
    let archive = Archive::open(&path, &Selection::default());
    // The archive is open by now: its name may go.
    drop(directory);
    archive
}

fn assert_whole(archive: &Archive, image: &Image) {
    assert_eq!(archive.digest().to_string(), image.id().to_string());
    assert_eq!(archive.offer().digest(), archive.digest());
    assert_eq!(archive.layers().len(), image.layers.len());
    for (index, (layer, (digest, bytes))) in archive.layers().iter().zip(&image.layers).enumerate() {
        assert_eq!((layer.diff_id.to_string(), layer.size), (digest.to_string(), bytes.len() as u64));
        let mut read = Vec::new();
        archive.open_layer(index).unwrap().read_to_end(&mut read).unwrap();
        assert_eq!(&read, bytes);
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    flate2::read::GzEncoder::new(bytes, flate2::Compression::fast()).read_to_end(&mut packed).unwrap();
    packed
}

/// A tar of named parts; a part that begins with `->` is a symbolic link.
fn tar(parts: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, contents) in parts {
        let mut header = Header::new_gnu();
        header.set_mode(0o644);
        if let Some(target) = contents.strip_prefix(b"->") {
            header.set_entry_type(EntryType::Symlink);
            header.set_size(0);
            archive.append_link(&mut header, name, std::str::from_utf8(target).unwrap()).unwrap();
        } else {
            header.set_size(contents.len() as u64);
            archive.append_data(&mut header, name, *contents).unwrap();
        }
    }
    archive.into_inner().unwrap()
}

#[test]
fn every_format_is_read() {
    let image = image();
    let docker = image.docker_archive().unwrap();
    for bytes in [
        docker.clone(),
        gzip(&docker),
        image.oci_layout(Compression::None).unwrap(),
        image.oci_layout(Compression::Gzip).unwrap(),
    ] {
        let archive = open(&bytes).unwrap();
        assert_whole(&archive, &image);
        assert_eq!(archive.names(), ["hello:1"]);
    }
}

#[test]
fn directories_are_read_and_links_out_of_them_are_not_followed() {
    let image = image();
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("layout");
    fs::create_dir(&root).unwrap();
    tar::Archive::new(image.oci_layout(Compression::Gzip).unwrap().as_slice()).unpack(&root).unwrap();
    assert_whole(&Archive::open(&root, &Selection::default()).unwrap(), &image);
    let blob = blob(&root, &image);
    let outside = directory.path().join("outside");
    fs::rename(&blob, &outside).unwrap();
    std::os::unix::fs::symlink(&outside, &blob).unwrap();
    let error = Archive::open(&root, &Selection::default()).unwrap_err();
    assert!(matches!(error, ArchiveError::Missing { .. }), "{error}");
}

fn blob(root: &Path, image: &Image) -> PathBuf {
    root.join("blobs/sha256").join(image.id().hex())
}

/// What `docker save` up to version 24 wrote where two images share a layer: a link to the first copy.
#[test]
fn links_of_old_archives_are_followed() {
    let image = image();
    let config = format!("{}.json", image.id().hex());
    let manifest =
        json!([{ "Config": config, "RepoTags": ["a:1"], "Layers": ["a/layer.tar", "b/layer.tar", "c/layer.tar"] }]);
    let manifest = manifest.to_string();
    let bytes = |target: &'static [u8]| {
        tar(&[
            ("a/layer.tar", image.layers[0].1.as_slice()),
            ("b/layer.tar", image.layers[1].1.as_slice()),
            ("c/layer.tar", target),
            (&config, &image.config),
            ("manifest.json", manifest.as_bytes()),
        ])
    };
    assert_whole(&open(&bytes(b"->../a/layer.tar")).unwrap(), &image);
    for target in [b"->../../etc/passwd".as_slice(), b"->/etc/passwd", b"->../c/layer.tar", b"->nothing"] {
        assert!(open(&bytes(target)).is_err());
    }
}

#[test]
fn an_image_is_chosen_by_name() {
    let image = image();
    let config = format!("{}.json", image.id().hex());
    let item = |name: &str| json!({ "Config": config, "RepoTags": [name], "Layers": ["l", "m", "l"] });
    let manifest = json!([item("a:1"), item("b:latest")]).to_string();
    let bytes = tar(&[
        ("l", image.layers[0].1.as_slice()),
        ("m", image.layers[1].1.as_slice()),
        (&config, &image.config),
        ("manifest.json", manifest.as_bytes()),
    ]);
    let (_directory, path) = write(&bytes);
    let choose = |name| Archive::open(&path, &Selection { name, architecture: None });
    assert_eq!(choose(Some("a:1")).unwrap().names(), ["a:1"]);
    assert_eq!(choose(Some("b")).unwrap().names(), ["b:latest"]);
    let error = choose(None).unwrap_err().to_string();
    assert!(error.contains("a:1, b:latest"), "{error}");
    assert!(matches!(choose(Some("c:1")), Err(ArchiveError::NoSuchImage { .. })));
}

#[test]
fn an_architecture_is_chosen_from_an_index_of_several() {
    let image = image();
    let mut parts: Vec<(String, Vec<u8>)> = vec![("oci-layout".into(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec())];
    let mut add = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        parts.push((format!("blobs/sha256/{}", digest.hex()), bytes.to_vec()));
        digest.to_string()
    };
    let layers: Vec<_> = image.layers[..2].iter().map(|(_, bytes)| json!({ "digest": add(bytes) })).collect();
    let layers = json!([layers[0], layers[1], layers[0]]);
    let config = add(&image.config);
    let manifests: Vec<_> = ["amd64", "arm64"]
        .map(|architecture| {
            let manifest =
                json!({ "config": { "digest": config }, "layers": layers, "annotations": { "x": architecture } });
            let digest = add(manifest.to_string().as_bytes());
            json!({ "digest": digest, "platform": { "architecture": architecture, "os": "linux" } })
        })
        .into();
    let attestation = json!({ "digest": Digest::of(b"x"), "platform": { "architecture": "unknown", "os": "unknown" } });
    let inner = json!({ "manifests": [manifests[0], manifests[1], attestation] }).to_string();
    let inner = add(inner.as_bytes());
    let names = json!({ "io.containerd.image.name": "docker.io/library/hello:latest" });
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index =
        json!({ "manifests": [{ "digest": inner, "mediaType": media_type, "annotations": names }] }).to_string();
    parts.push(("index.json".into(), index.into_bytes()));
    let parts: Vec<_> = parts.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let (_directory, path) = write(&tar(&parts));
    let choose = |name, architecture| Archive::open(&path, &Selection { name, architecture });
    assert_whole(&choose(Some("hello"), Some("arm64")).unwrap(), &image);
    assert!(matches!(choose(None, None), Err(ArchiveError::SeveralImages { .. })));
    let error = choose(None, Some("riscv64")).unwrap_err();
    assert!(error.to_string().contains("amd64, arm64"), "{error}");
}

#[test]
fn g2_damaged_layers_are_found() {
    let mut image = image();
    image.layers[1].1[600] ^= 1;
    // Packed layers are read when the archive is opened, others when they are sent.
    let error = open(&image.oci_layout(Compression::Gzip).unwrap()).unwrap_err();
    assert!(matches!(error, ArchiveError::DigestMismatch { .. }), "{error}");
    let archive = open(&image.docker_archive().unwrap()).unwrap();
    let error = archive.open_layer(1).unwrap().read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
}

#[test]
fn damaged_archives_are_refused_with_the_reason() {
    let image = image();
    let config = format!("{}.json", image.id().hex());
    let manifest = |config: &str, layers: &[&str]| json!([{ "Config": config, "Layers": layers }]).to_string();
    let good = manifest(&config, &["l", "m", "l"]);
    let build = |manifest: &str, extra: &[(&str, &[u8])]| {
        let mut parts = vec![
            ("l", image.layers[0].1.as_slice()),
            ("m", image.layers[1].1.as_slice()),
            (config.as_str(), image.config.as_slice()),
            ("manifest.json", manifest.as_bytes()),
        ];
        parts.extend_from_slice(extra);
        open(&tar(&parts)).map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(build(&good, &[]), Ok(()));
    for (expected, manifest) in [
        ("'x', but does not hold", manifest(&config, &["x", "m", "l"])),
        ("'../../etc/passwd', but does not hold", manifest(&config, &["../../etc/passwd", "m", "l"])),
        ("'/etc/passwd', but does not hold", manifest("/etc/passwd", &["l", "m", "l"])),
        ("3 layers, but 1", manifest(&config, &["l"])),
        ("configuration is not valid", manifest("l", &["l"])),
        ("names no image", "[]".to_owned()),
        ("manifest.json", "{".to_owned()),
    ] {
        let error = build(&manifest, &[]).unwrap_err();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let twice = build(&good, &[("m", b"other")]).unwrap_err();
    assert!(twice.contains("same name"), "{twice}");
    let renamed = "0".repeat(64) + ".json";
    let wrong = build(&manifest(&renamed, &["l", "m", "l"]), &[(&renamed, &image.config)]).unwrap_err();
    assert!(wrong.contains("should have the digest"), "{wrong}");
    let zstd = build(&manifest(&config, &["l", "z", "l"]), &[("z", b"\x28\xb5\x2f\xfd1234")]).unwrap_err();
    assert!(zstd.contains("zstd"), "{zstd}");
}

#[test]
fn what_is_no_archive_is_refused() {
    for (bytes, reason) in [
        (b"".as_slice(), "it is empty"),
        (&[0; 2048], "it is empty"),
        (b"hello", "it is not a tar file"),
        (&[7; 2048], "it is not a tar file"),
        (&gzip(b"hello"), "it is not a tar file"),
        (&tar(&[("file", b"x")]), "neither a manifest.json nor an index.json"),
        (&image().docker_archive().unwrap()[..600], "it is cut off"),
    ] {
        let error = open(bytes).unwrap_err();
        assert!(matches!(&error, ArchiveError::NotAnImage { reason: found, .. } if found.contains(reason)), "{error}");
    }
    let absent = Archive::open(Path::new("/nonexistent"), &Selection::default()).unwrap_err();
    assert!(matches!(absent, ArchiveError::Read { .. }), "{absent}");
    let good = image().docker_archive().unwrap();
    assert!(open(&good[..good.len() / 2]).is_err());
}
