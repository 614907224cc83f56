//! Where the parts of an archive are: members of a tar file, or files under a directory.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use flate2::read::MultiGzDecoder;
use peer_proto::id::Digest;

use super::ArchiveError;
use crate::{
    engine::quote,
    image::tar::{self, Kind, TarError, parts},
};

/// Most members of an archive: some layers of some images, and little else.
const MEMBERS_MAX: u64 = 65_536;
/// Largest archive that is unpacked because it is compressed as a whole (bytes).
const UNPACKED_MAX: u64 = 64 << 30;
/// Most links in a row.
const LINKS_MAX: usize = 8;

/// An archive.
#[derive(Debug)]
pub(super) struct Source {
    path: PathBuf,
    contents: Contents,
}

#[derive(Debug)]
enum Contents {
    Tar { file: File, members: HashMap<String, Place> },
    Directory(PathBuf),
}

#[derive(Debug, Clone)]
enum Place {
    Bytes {
        offset: u64,
        size: u64,
    },
    /// Another member's path.
    Link(String),
}

/// How a layer is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    None,
    Gzip,
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Self, ArchiveError> {
        let failure = |source| ArchiveError::Read { path: path.into(), source };
        let contents = if path.is_dir() {
            // Resolved once, so that links inside can be compared with it.
            Contents::Directory(path.canonicalize().map_err(failure)?)
        } else {
            let file = unpack(File::open(path).map_err(failure)?).map_err(failure)?;
            let members = index(&file).map_err(|error| match error {
                TarError::Read(source) => failure(source),
                TarError::Refused(reason) => ArchiveError::NotAnImage { path: path.into(), reason },
            })?;
            if members.is_empty() {
                return Err(ArchiveError::NotAnImage { path: path.into(), reason: "it is empty".to_owned() });
            }
            Contents::Tar { file, members }
        };
        Ok(Self { path: path.into(), contents })
    }

    pub(super) fn failure(&self, source: io::Error) -> ArchiveError {
        ArchiveError::Read { path: self.path.clone(), source }
    }

    pub(super) fn invalid(&self, reason: String) -> ArchiveError {
        ArchiveError::NotAnImage { path: self.path.clone(), reason }
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.open_part(name).is_ok()
    }

    pub(super) fn size(&self, name: &str) -> Result<u64, ArchiveError> {
        self.open_part(name).map(|(_, size)| size)
    }

    /// A whole part of at most `size_max` bytes.
    pub(super) fn read(&self, name: &str, size_max: u64) -> Result<Vec<u8>, ArchiveError> {
        let (mut part, size) = self.open_part(name)?;
        if size > size_max {
            return Err(ArchiveError::TooLarge { name: quote(name), size_max });
        }
        let mut bytes = Vec::new();
        part.read_to_end(&mut bytes).map_err(|error| self.failure(error))?;
        Ok(bytes)
    }

    /// How a layer is packed, by its first bytes.
    pub(super) fn packing(&self, name: &str) -> Result<Packing, ArchiveError> {
        let (part, _) = self.open_part(name)?;
        let mut magic = Vec::new();
        part.take(6).read_to_end(&mut magic).map_err(|error| self.failure(error))?;
        let unsupported = |method| Err(ArchiveError::Compression { name: quote(name), method });
        match magic.as_slice() {
            [0x1f, 0x8b, ..] => Ok(Packing::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => unsupported("zstd"),
            [0xfd, b'7', b'z', b'X', b'Z', 0] => unsupported("xz"),
            [b'B', b'Z', b'h', ..] => unsupported("bzip2"),
            _ => Ok(Packing::None),
        }
    }

    pub(super) fn unpacked(&self, name: &str, packing: Packing) -> Result<Box<dyn Read + Send>, ArchiveError> {
        let (part, _) = self.open_part(name)?;
        Ok(match packing {
            Packing::None => part,
            Packing::Gzip => Box::new(MultiGzDecoder::new(part)),
        })
    }

    /// A part and its size, through links inside the archive.
    fn open_part(&self, name: &str) -> Result<(Box<dyn Read + Send>, u64), ArchiveError> {
        let missing = || ArchiveError::Missing { name: quote(name) };
        let name = normal(name).ok_or_else(missing)?;
        match &self.contents {
            Contents::Tar { members, .. } => {
                let (offset, size) = find(members, &name).ok_or_else(missing)?;
                // Opened anew: a duplicate of the handle would share its position.
                let mut file = self.reopen().map_err(|error| self.failure(error))?;
                file.seek(SeekFrom::Start(offset)).map_err(|error| self.failure(error))?;
                Ok((Box::new(BufReader::with_capacity(64 << 10, file).take(size)), size))
            }
            Contents::Directory(root) => {
                let path = root.join(&name).canonicalize().map_err(|_| missing())?;
                if !path.starts_with(root) || !path.is_file() {
                    return Err(missing());
                }
                let file = File::open(&path).map_err(|error| self.failure(error))?;
                let size = file.metadata().map_err(|error| self.failure(error))?.len();
                Ok((Box::new(BufReader::with_capacity(64 << 10, file).take(size)), size))
            }
        }
    }

    /// The tar file once more, with a position of its own. It may have no name any more.
    fn reopen(&self) -> io::Result<File> {
        use std::os::fd::AsRawFd as _;
        match &self.contents {
            Contents::Tar { file, .. } => File::open(format!("/proc/self/fd/{}", file.as_raw_fd())),
            Contents::Directory(_) => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// Refuses a blob whose own name says another digest than its bytes have.
pub(super) fn check_name(name: &str, actual: &Digest) -> Result<(), ArchiveError> {
    let stem = name.rsplit('/').next().unwrap_or(name);
    let stem = stem.strip_suffix(".json").unwrap_or(stem);
    match format!("sha256:{stem}").parse::<Digest>() {
        Ok(expected) if expected != *actual => {
            Err(ArchiveError::DigestMismatch { name: quote(name), expected, actual: *actual })
        }
        _ => Ok(()),
    }
}

/// Unpacks the file into one without a name if it is compressed as a whole.
fn unpack(mut file: File) -> io::Result<File> {
    let mut magic = Vec::new();
    Read::by_ref(&mut file).take(2).read_to_end(&mut magic)?;
    file.rewind()?;
    if magic != [0x1f, 0x8b] {
        return Ok(file);
    }
    let mut unpacked = tempfile::tempfile()?;
    let reader = MultiGzDecoder::new(BufReader::new(file));
    if io::copy(&mut reader.take(UNPACKED_MAX + 1), &mut unpacked)? > UNPACKED_MAX {
        return Err(io::Error::other("it is larger than 64 GiB when unpacked"));
    }
    Ok(unpacked)
}

fn index(file: &File) -> Result<HashMap<String, Place>, TarError> {
    let mut members = HashMap::new();
    tar::walk(file, MEMBERS_MAX, |member| {
        let hostile = || {
            TarError::Refused(format!("its member '{}' leads out of it", quote(&String::from_utf8_lossy(&member.path))))
        };
        let path = String::from_utf8(member.path.clone()).ok().and_then(|path| normal(&path)).ok_or_else(hostile)?;
        let place = match member.kind {
            Kind::File => Place::Bytes { offset: member.offset, size: member.size },
            Kind::Symlink(target) => {
                let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
                let target = String::from_utf8(target).ok().and_then(|target| relative(directory, &target));
                Place::Link(target.ok_or_else(hostile)?)
            }
            Kind::HardLink(target) => {
                Place::Link(String::from_utf8(target).ok().and_then(|target| normal(&target)).ok_or_else(hostile)?)
            }
            Kind::Directory => return Ok(()),
            Kind::Device | Kind::Pipe => return Err(TarError::Refused("it holds a device or a pipe".to_owned())),
        };
        // Two members of one name could be two different images to two readers.
        match members.insert(path, place) {
            None => Ok(()),
            Some(_) => Err(TarError::Refused("it holds two members of the same name".to_owned())),
        }
    })?;
    Ok(members)
}

fn find(members: &HashMap<String, Place>, name: &str) -> Option<(u64, u64)> {
    let mut name = name;
    for _ in 0..LINKS_MAX {
        match members.get(name)? {
            Place::Bytes { offset, size } => return Some((*offset, *size)),
            Place::Link(target) => name = target,
        }
    }
    None
}

/// A path inside the archive in its one normal spelling; the archive's root has none.
fn normal(path: &str) -> Option<String> {
    let parts = parts(path.as_bytes())?;
    let parts: Result<Vec<_>, _> = parts.into_iter().map(std::str::from_utf8).collect();
    Some(parts.ok()?.join("/"))
}

/// The path that a symbolic link in `directory` leads to, if it stays inside.
fn relative(directory: &str, target: &str) -> Option<String> {
    if target.is_empty() || target.len() > 4096 || target.starts_with('/') {
        return None;
    }
    let mut path: Vec<&str> = directory.split('/').filter(|part| !part.is_empty()).collect();
    for part in target.split('/').filter(|part| !matches!(*part, "" | ".")) {
        if part == ".." {
            path.pop()?;
        } else {
            path.push(part);
        }
    }
    Some(path.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_inside() {
        assert_eq!(relative("a", "../b/layer.tar").as_deref(), Some("b/layer.tar"));
        assert_eq!(relative("", "b").as_deref(), Some("b"));
        for target in ["../../b", "/etc/passwd", "", "x/../../../y"] {
            assert_eq!(relative("a", target), None, "{target}");
        }
    }

    #[test]
    fn links_in_a_circle_lead_nowhere() {
        let link = |to: &str| Place::Link(to.to_owned());
        let members = [("a".to_owned(), link("b")), ("b".to_owned(), link("a"))].into();
        assert_eq!(find(&members, "a"), None);
    }
}
