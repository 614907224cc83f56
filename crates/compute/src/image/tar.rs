//! A strict reader of tar files from strangers. It reads headers and skips contents, allocates nothing of a size that
//! the file decides beyond 1 MiB, and refuses whatever two readers could understand differently.

use std::{
    fs::File,
    io::{self, BufReader, Read},
};

use tar::{EntryType, Header};

const BLOCK: u64 = 512;
/// Largest extension header (bytes): long names and extended attributes.
const EXTENSION_MAX: u64 = 1 << 20;

/// One member of a tar file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its path, as written.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Where its contents begin in the tar file (bytes).
    pub offset: u64,
    /// Size of its contents (bytes).
    pub size: u64,
}

/// What a member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link to a target.
    Symlink(Vec<u8>),
    /// Another name of an earlier member.
    HardLink(Vec<u8>),
    /// A character or block device.
    Device,
    /// A named pipe.
    Pipe,
}

/// Why a tar file is refused.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// It is not a well-formed tar file, or holds what it must not.
    #[error("{0}")]
    Refused(String),
}

fn refused<T>(why: impl Into<String>) -> Result<T, TarError> {
    Err(TarError::Refused(why.into()))
}

/// Visits each member of the tar file, from its beginning to its end. Gives their number.
pub fn walk(
    file: &File,
    members_max: u64,
    mut visit: impl FnMut(Member) -> Result<(), TarError>,
) -> Result<u64, TarError> {
    let length = file.metadata()?.len();
    let mut walk = Walk { reader: BufReader::with_capacity(64 << 10, file), offset: 0, length };
    io::Seek::rewind(&mut walk.reader)?;
    let (mut headers, mut members) = (0_u64, 0);
    let mut extension = Extension::default();
    while let Some(header) = walk.header()? {
        headers += 1;
        if headers > members_max.saturating_mul(3) || members >= members_max {
            return refused(format!("it has more than {members_max} members"));
        }
        if walk.extension(&header, &mut extension)? {
            continue;
        }
        let member = member(&header, std::mem::take(&mut extension), walk.offset)?;
        walk.skip(member.size)?;
        members += 1;
        visit(member)?;
    }
    if extension != Extension::default() {
        return refused("it ends in the middle of a member");
    }
    Ok(members)
}

/// What extension headers say of the member that follows.
#[derive(Debug, Default, PartialEq, Eq)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

struct Walk<'a> {
    reader: BufReader<&'a File>,
    offset: u64,
    length: u64,
}

impl Walk<'_> {
    /// The next header, or nothing at the end, after which only zeros may come.
    fn header(&mut self) -> Result<Option<Header>, TarError> {
        if self.offset == self.length {
            return Ok(None);
        }
        let mut header = Header::new_old();
        if self.offset == 0 && self.length < BLOCK {
            return refused("it is not a tar file");
        }
        self.read(header.as_mut_bytes())?;
        let bytes = header.as_bytes();
        if bytes.iter().all(|byte| *byte == 0) {
            return self.only_zeros_follow().map(|()| None);
        }
        let sum: u32 = bytes[..148].iter().chain(&bytes[156..]).map(|byte| u32::from(*byte)).sum();
        if header.cksum().ok() != Some(sum + 8 * u32::from(b' ')) {
            return match self.offset - BLOCK {
                0 => refused("it is not a tar file"),
                at => refused(format!("the header at byte {at} is damaged")),
            };
        }
        Ok(Some(header))
    }

    fn only_zeros_follow(&mut self) -> Result<(), TarError> {
        let mut block = [0; 8192];
        loop {
            match self.reader.read(&mut block)? {
                0 => return Ok(()),
                count if block[..count].iter().any(|byte| *byte != 0) => return refused("something follows its end"),
                _ => {}
            }
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), TarError> {
        self.offset += bytes.len() as u64;
        match self.reader.read_exact(bytes) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => refused("it is cut off"),
            other => Ok(other?),
        }
    }

    /// Goes past contents and their padding.
    fn skip(&mut self, size: u64) -> Result<(), TarError> {
        let padded = size.checked_next_multiple_of(BLOCK).and_then(|padded| self.offset.checked_add(padded));
        match padded {
            Some(end) if end <= self.length => {
                let step = i64::try_from(end - self.offset).map_err(io::Error::other)?;
                self.reader.seek_relative(step)?;
                self.offset = end;
                Ok(())
            }
            _ => refused("it is cut off"),
        }
    }

    /// Takes in an extension header, if this is one.
    fn extension(&mut self, header: &Header, extension: &mut Extension) -> Result<bool, TarError> {
        let kind = header.entry_type();
        let long = kind.is_gnu_longname() || kind.is_gnu_longlink();
        if !long && !kind.is_pax_local_extensions() && !kind.is_pax_global_extensions() {
            return Ok(false);
        }
        let size = header.entry_size()?;
        if size > EXTENSION_MAX {
            return refused("it has a name or an attribute of more than 1 MiB");
        }
        let mut contents = vec![0; usize::try_from(size).map_err(io::Error::other)?];
        self.read(&mut contents)?;
        self.skip_padding(size)?;
        if long {
            while contents.last() == Some(&0) {
                contents.pop();
            }
            let slot = if kind.is_gnu_longname() { &mut extension.path } else { &mut extension.link };
            *slot = Some(contents);
        } else if kind.is_pax_local_extensions() {
            records(&contents, extension)?;
        }
        Ok(true)
    }

    fn skip_padding(&mut self, size: u64) -> Result<(), TarError> {
        let mut padding = [0; 512];
        let count = usize::try_from(size.next_multiple_of(BLOCK) - size).map_err(io::Error::other)?;
        self.read(&mut padding[..count])
    }
}

/// Reads records of the form `LENGTH KEY=VALUE\n`.
fn records(mut contents: &[u8], extension: &mut Extension) -> Result<(), TarError> {
    const DAMAGED: &str = "it has a damaged extension header";
    while !contents.is_empty() {
        let space = contents.iter().take(8).position(|byte| *byte == b' ');
        let length = space.and_then(|space| std::str::from_utf8(&contents[..space]).ok()?.parse::<usize>().ok());
        let (Some(space), Some(length)) = (space, length) else { return refused(DAMAGED) };
        if length <= space + 1 || length > contents.len() || contents[length - 1] != b'\n' {
            return refused(DAMAGED);
        }
        let record = &contents[space + 1..length - 1];
        contents = &contents[length..];
        let Some(equals) = record.iter().position(|byte| *byte == b'=') else { return refused(DAMAGED) };
        let (key, value) = (&record[..equals], record[equals + 1..].to_vec());
        match key {
            b"path" => extension.path = Some(value),
            b"linkpath" => extension.link = Some(value),
            b"size" => {
                let size = std::str::from_utf8(&value).ok().and_then(|text| text.parse().ok());
                extension.size = Some(size.map_or_else(|| refused(DAMAGED), Ok)?);
            }
            _ if key.starts_with(b"GNU.sparse") => return refused("it has a sparse file"),
            _ => {}
        }
    }
    Ok(())
}

fn member(header: &Header, extension: Extension, offset: u64) -> Result<Member, TarError> {
    let path = extension.path.unwrap_or_else(|| header.path_bytes().into_owned());
    let shown = crate::engine::quote(&String::from_utf8_lossy(&path));
    let size = extension.size.map_or_else(|| header.entry_size(), Ok)?;
    let link = || {
        let link = extension.link.clone().or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
        link.map_or_else(|| refused(format!("link '{shown}' has no target")), Ok)
    };
    let kind = match header.entry_type() {
        EntryType::Regular if path.ends_with(b"/") => Kind::Directory,
        EntryType::Regular | EntryType::Continuous => Kind::File,
        EntryType::Directory => Kind::Directory,
        EntryType::Symlink => Kind::Symlink(link()?),
        EntryType::Link => Kind::HardLink(link()?),
        EntryType::Char | EntryType::Block => Kind::Device,
        EntryType::Fifo => Kind::Pipe,
        EntryType::GNUSparse => return refused(format!("'{shown}' is a sparse file")),
        _ => return refused(format!("'{shown}' is of an unknown kind")),
    };
    // Some readers skip such contents and some take them for the next header.
    if kind != Kind::File && size != 0 {
        return refused(format!("'{shown}' has contents but is not a file"));
    }
    Ok(Member { path, kind, offset, size })
}

/// The parts of a relative path, or nothing if it could lead out of its root.
pub fn parts(path: &[u8]) -> Option<Vec<&[u8]>> {
    let valid = !path.is_empty() && path.len() <= 4096 && path[0] != b'/' && !path.contains(&0);
    let parts: Vec<_> = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    (valid && parts.iter().all(|part| part.len() <= 255 && *part != b"..")).then_some(parts)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn list(bytes: &[u8]) -> Result<Vec<Member>, TarError> {
        let mut members = Vec::new();
        walk(&file(bytes), 100, |member| {
            members.push(member);
            Ok(())
        })?;
        Ok(members)
    }

    fn sample(path: &str, data: &[u8]) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = Header::new_gnu();
        header.set_size(data.len() as u64);
        archive.append_data(&mut header, path, data).unwrap();
        archive.into_inner().unwrap()
    }

    #[test]
    fn long_names_and_offsets_are_read() {
        let path = format!("{}/file", "d".repeat(200));
        let bytes = sample(&path, b"contents");
        let members = list(&bytes).unwrap();
        assert_eq!((members.len(), members[0].path.as_slice()), (1, path.as_bytes()));
        let offset = usize::try_from(members[0].offset).unwrap();
        assert_eq!(&bytes[offset..offset + 8], b"contents");
    }

    #[test]
    fn damaged_files_are_refused() {
        let good = sample("a", &[7; 1000]);
        assert!(list(&good[..1000]).is_err(), "cut off");
        let mut bad = good.clone();
        bad[0] ^= 1;
        assert!(list(&bad).is_err(), "checksum");
        bad = good.clone();
        bad.push(1);
        assert!(list(&bad).is_err(), "something after the end");
        assert!(list(b"no tar file at all").is_err());
        assert!(walk(&file(&good), 0, |_| Ok(())).is_err(), "too many");
        assert!(list(&[]).unwrap().is_empty());
    }

    #[test]
    fn v5_a_name_of_gigabytes_is_refused_before_it_is_read() {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::GNULongName);
        header.set_size(8 << 30);
        header.set_cksum();
        assert!(matches!(list(header.as_bytes()), Err(TarError::Refused(_))));
    }

    #[test]
    fn paths_that_lead_out_have_no_parts() {
        for path in ["", "/a", "..", "a/../b", "a/..", "a\0b", &"x".repeat(256), &"x/".repeat(3000)] {
            assert_eq!(parts(path.as_bytes()), None, "{path}");
        }
        assert_eq!(parts(b"./a//b/"), Some(vec![b"a".as_slice(), b"b"]));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            drop(list(&bytes));
        }

        #[test]
        fn a_changed_archive_never_panics(at in 0_usize..2048, value in any::<u8>()) {
            let mut bytes = sample(&format!("{}/f", "d".repeat(120)), b"x");
            let length = bytes.len();
            bytes[at % length] = value;
            drop(list(&bytes));
        }
    }
}
