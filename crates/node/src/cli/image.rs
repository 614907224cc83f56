//! Which image a command means, and how its layers are read. This machine needs no engine if the image is an archive.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use data_encoding::BASE64;
use hyper::body::Bytes;
use peer_compute::image::archive::{Archive, ArchiveError, LayerEntry, Selection};
use peer_proto::code::Code;
use peer_proto::control;
use peer_proto::deploy::{IMAGE_NAME_MAX, RegistryReference};
use peer_proto::id::Name;
use peer_proto::text::escape;
use peer_proto::unit::format_bytes;
use tempfile::NamedTempFile;
use tokio::io::AsyncWriteExt;

use super::Session;
use super::client::{SILENCE_DEADLINE, percent_encoded};
use super::failure::Failure;
use super::transfer::progress_bar;

/// Size of the pieces in which a layer is read (bytes).
const PIECE: usize = 128 * 1024;

/// Flags that say which image is meant.
#[derive(Debug, Clone, Args)]
pub(super) struct ImageArguments {
    /// Archive or directory on disk, or name in the local engine
    pub(super) image: String,
    /// Which image of the archive, by name or digest, if it holds several
    #[arg(long, value_name = "NAME")]
    select: Option<String>,
    /// Which platform of the image, if there are several, such as linux/arm64 [default: that of this machine]
    #[arg(long, value_parser = parse_platform)]
    platform: Option<String>,
}

/// An image as it is named on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ImageArgument {
    /// An archive, or a directory with an unpacked one.
    Archive(PathBuf),
    /// A name in the engine of this machine.
    Engine(String),
    /// The peer fetches it from a registry.
    Registry(RegistryReference),
}

/// An image that can be deployed.
#[derive(Debug)]
pub(super) enum Source {
    /// This machine holds it.
    Offered(Arc<Offer>),
    /// The peer fetches it from a registry.
    Registry(RegistryReference),
}

/// An image that this machine holds.
#[derive(Debug)]
pub(super) struct Offer {
    archive: Archive,
    name: String,
    // The engine's export is on disk as long as its layers may be wanted.
    _export: Option<NamedTempFile>,
}

/// Reads `linux/amd64` or `amd64`, and keeps the architecture.
fn parse_platform(text: &str) -> Result<String, String> {
    let architecture = text.strip_prefix("linux/").unwrap_or(text);
    let valid = !architecture.is_empty() && architecture.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if valid { Ok(architecture.to_owned()) } else { Err("write it as linux/amd64; only linux is possible".to_owned()) }
}

/// The architecture of this machine, as images name it.
fn own_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        other => other,
    }
}

impl ImageArgument {
    /// Decides what `text` means.
    pub(super) fn parse(text: &str, pull: bool) -> Result<Self, Failure> {
        if pull {
            return text.parse().map(Self::Registry).map_err(|why: String| Failure::argument(format!("image {why}")));
        }
        let path = Path::new(text);
        if is_archive(path, text) {
            return Ok(Self::Archive(path.to_owned()));
        }
        let valid = text.len() <= IMAGE_NAME_MAX
            && text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-/:@".contains(&byte));
        if valid {
            Ok(Self::Engine(text.to_owned()))
        } else {
            let text = escape(text);
            Err(Failure::argument(format!(
                "image '{text}' is neither a file on disk nor a name that an image can have"
            )))
        }
    }

    /// The base name of the image as a deployment's name, if one can be made of it.
    pub(super) fn default_name(&self) -> Option<Name> {
        let base = match self {
            Self::Archive(path) => path.file_name()?.to_string_lossy().into_owned(),
            Self::Engine(name) => base_of(name),
            Self::Registry(reference) => base_of(reference.name()),
        };
        let base = base.to_ascii_lowercase();
        let base = [".tar.gz", ".tgz", ".tar"].iter().find_map(|end| base.strip_suffix(end)).unwrap_or(&base);
        let valid = |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c) { c } else { '-' };
        let name: String = base.chars().map(valid).collect();
        name.trim_matches(|c: char| !c.is_ascii_alphanumeric()).chars().take(63).collect::<String>().parse().ok()
    }
}

/// Whether `text` names something on disk. A directory named like an image counts only if it holds one.
fn is_archive(path: &Path, text: &str) -> bool {
    let written_as_path = text.starts_with(['.', '/']) && text.contains('/');
    let lower = text.to_ascii_lowercase();
    let named_as_archive = [".tar", ".tar.gz", ".tgz"].iter().any(|end| lower.ends_with(end));
    let holds_image = ["oci-layout", "index.json", "manifest.json"].iter().any(|file| path.join(file).is_file());
    written_as_path || named_as_archive || path.is_file() || holds_image
}

/// `registry/path/name:tag@digest` without all but the name.
fn base_of(reference: &str) -> String {
    let reference = reference.split('@').next().unwrap_or_default();
    let last = reference.rsplit('/').next().unwrap_or_default();
    last.split(':').next().unwrap_or_default().to_owned()
}

impl Source {
    /// Opens what the argument names; an image of the local engine is written to a temporary file first.
    pub(super) async fn open(session: &Session, arguments: &ImageArguments, pull: bool) -> Result<Self, Failure> {
        match ImageArgument::parse(&arguments.image, pull)? {
            ImageArgument::Registry(reference) => Ok(Self::Registry(reference)),
            ImageArgument::Archive(path) => {
                let fallback = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
                open_archive(path, arguments, fallback, None).await
            }
            ImageArgument::Engine(name) => {
                let file = export(session, &name).await?;
                open_archive(file.path().to_owned(), arguments, name, Some(file)).await
            }
        }
    }

    /// The image as the local interface wants it.
    pub(super) fn image(&self) -> control::Image {
        match self {
            Self::Registry(reference) => control::Image::Registry(reference.clone()),
            Self::Offered(offer) => control::Image::Offered {
                configuration: BASE64.encode(&offer.archive.offer().configuration),
                layer_sizes: offer.layers().iter().map(|layer| layer.size).collect(),
            },
        }
    }

    /// What this machine may be asked to send.
    pub(super) fn offer(&self) -> Option<Arc<Offer>> {
        match self {
            Self::Registry(_) => None,
            Self::Offered(offer) => Some(Arc::clone(offer)),
        }
    }

    /// What people call it.
    pub(super) fn display_name(&self) -> String {
        displayed(match self {
            Self::Registry(reference) => reference.name(),
            Self::Offered(offer) => &offer.name,
        })
    }
}

impl Offer {
    /// Its layers, lowest first.
    pub(super) fn layers(&self) -> &[LayerEntry] {
        self.archive.layers()
    }

    /// Reads a layer to its end in pieces of uncompressed bytes, checked against its digest. Stops early, without a
    /// failure, once `take` wants no more. Blocks.
    pub(super) fn read_layer(&self, place: usize, mut take: impl FnMut(Bytes) -> bool) -> Result<(), Failure> {
        use std::io::{ErrorKind, Read};
        let name = escape(&self.name);
        let mut layer = self.archive.open_layer(place).map_err(|error| failure_with_flag(&error))?;
        let mut piece = vec![0; PIECE];
        loop {
            let length = layer.read(&mut piece).map_err(|error| {
                // The reader says so of bytes that are not those of the layer's digest.
                let broken = error.kind() == ErrorKind::InvalidData;
                let code = if broken { Code::DigestMismatch } else { Code::FileFailed };
                Failure::new(code, format!("image '{name}' cannot be read: {error}; make the archive again"))
            })?;
            if length == 0 || !take(Bytes::copy_from_slice(&piece[..length])) {
                return Ok(());
            }
        }
    }
}

/// A name of an image as a specification accepts it.
pub(super) fn displayed(name: &str) -> String {
    let name = escape(name);
    name[..name.floor_char_boundary(IMAGE_NAME_MAX)].to_owned()
}

async fn open_archive(
    path: PathBuf,
    arguments: &ImageArguments,
    fallback: String,
    export: Option<NamedTempFile>,
) -> Result<Source, Failure> {
    let ImageArguments { select, platform, .. } = arguments.clone();
    let opened = tokio::task::spawn_blocking(move || {
        let architecture = platform.as_deref().unwrap_or(own_architecture());
        Archive::open(&path, &Selection { name: select.as_deref(), architecture: Some(architecture) })
    });
    let opened = opened.await.map_err(|error| Failure::new(Code::Internal, format!("the reader broke: {error}")))?;
    let archive = opened.map_err(|error| failure_with_flag(&error))?;
    // An archive without a tag names its image by the digest, which says nothing to people.
    let name = archive.names().iter().find(|name| !name.starts_with("sha256:")).cloned().unwrap_or(fallback);
    Ok(Source::Offered(Arc::new(Offer { archive, name, _export: export })))
}

/// The failure to read an archive, with the flag that helps.
fn failure_with_flag(error: &ArchiveError) -> Failure {
    let flag = match error {
        ArchiveError::SeveralImages { .. } => " (--select NAME)",
        ArchiveError::NoSuchArchitecture { .. } => " (--platform linux/ARCHITECTURE)",
        _ => "",
    };
    Failure::new(error.code(), format!("image: {error}{flag}"))
}

/// Writes the engine's copy of an image to a temporary file, which goes when its handle does.
async fn export(session: &Session, name: &str) -> Result<NamedTempFile, Failure> {
    let path = format!("/v1/images/export?name={}", percent_encoded(name));
    let mut bytes = session.client.bytes(&path).await?;
    let directory = std::env::temp_dir();
    let failed = |error: std::io::Error| Failure::file("write a copy of the image to", &directory, &error);
    let file = NamedTempFile::with_prefix("peerctl-").map_err(failed)?;
    let mut writer = tokio::fs::File::from_std(file.reopen().map_err(failed)?);
    let bar = progress_bar(session.output, 0);
    bar.set_message(format!("reading {name} from the engine"));
    let mut length = 0;
    while let Some(piece) = bytes.next(Some(SILENCE_DEADLINE)).await? {
        writer.write_all(&piece).await.map_err(failed)?;
        length += piece.len() as u64;
        bar.set_length(length);
        bar.set_position(length);
    }
    writer.flush().await.map_err(failed)?;
    bar.finish_and_clear();
    session.output.note(&format!("read {name} from the engine, {}", format_bytes(length)));
    Ok(file)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use super::*;

    #[test]
    fn what_an_image_is_follows_from_its_text() {
        for text in ["web.tar", "images/web.TAR.GZ", "./web", "/srv/web", "web.tgz"] {
            assert_eq!(ImageArgument::parse(text, false).unwrap(), ImageArgument::Archive(text.into()), "{text}");
        }
        for text in ["web", "web:1", "registry.example:5000/team/web:1"] {
            assert_eq!(ImageArgument::parse(text, false).unwrap(), ImageArgument::Engine(text.into()), "{text}");
        }
        for text in ["", "-web", "web 1", "web\u{1b}[2J", "wéb"] {
            let failure = ImageArgument::parse(text, false).unwrap_err();
            assert!(failure.to_string().starts_with("image "), "{failure}");
        }
        assert!(ImageArgument::parse("web:1", true).unwrap_err().to_string().contains("sha256"));
    }

    #[test]
    fn directories_are_images_only_if_they_hold_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::create_dir(&path).unwrap();
        assert!(!is_archive(&path, "image"));
        std::fs::write(path.join("oci-layout"), "{}").unwrap();
        assert!(is_archive(&path, "image"));
    }

    #[test]
    fn default_names_come_from_the_image() {
        let digest = peer_proto::id::Digest::of(b"");
        for (text, pull, name) in [
            ("hello:1", false, Some("hello")),
            ("registry.example:5000/team/Web_App:v2", false, Some("web_app")),
            ("./out/My Image.tar.gz", false, Some("my-image")),
            (&*format!("docker.io/library/nginx@{digest}"), true, Some("nginx")),
            (&*format!("./{}.tar", "a".repeat(80)), false, Some(&*"a".repeat(63))),
            ("./語.tar", false, None),
        ] {
            let made = ImageArgument::parse(text, pull).unwrap().default_name();
            assert_eq!(made.as_ref().map(Name::as_str), name, "{text}");
        }
    }
}
