//! What a layer from a stranger may hold. The engine unpacks it as root: nothing in it may be a device or lead out of
//! its directory.

use std::fs::File;

use crate::{
    engine::quote,
    image::tar::{self, Kind, Member, TarError, parts},
};

/// Most members of one layer.
pub const MEMBERS_MAX: u64 = 1_000_000;

/// What a layer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerFacts {
    /// Number of members.
    pub members: u64,
    /// Sum of the sizes of its files (bytes).
    pub unpacked: u64,
}

/// Reads the whole layer (an uncompressed tar file) and refuses it if it holds anything that no image needs.
pub fn check(file: &File) -> Result<LayerFacts, TarError> {
    let mut unpacked = 0_u64;
    let members = tar::walk(file, MEMBERS_MAX, |member| {
        unpacked = unpacked.saturating_add(member.size);
        check_member(&member).map_err(|why| {
            TarError::Refused(format!("its member '{}' {why}", quote(&String::from_utf8_lossy(&member.path))))
        })
    })?;
    Ok(LayerFacts { members, unpacked })
}

fn check_member(member: &Member) -> Result<(), &'static str> {
    if parts(&member.path).is_none() {
        return Err("has a path that is absolute, leads out of the image or is too long");
    }
    match &member.kind {
        Kind::Device => Err("is a device"),
        // Relative to the image's root, with or without the slash.
        Kind::HardLink(target) => {
            let target = target.strip_prefix(b"/").unwrap_or(target);
            parts(target)
                .filter(|parts| !parts.is_empty())
                .map(|_| ())
                .ok_or("is a hard link that leads out of the image")
        }
        // Resolved inside the container alone: any target will do.
        Kind::Symlink(target) if target.is_empty() || target.len() > 4096 || target.contains(&0) => {
            Err("is a symbolic link without a sane target")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::io::Write as _;

    use ::tar::{Builder, EntryType, Header};

    use super::*;

    fn layer(kind: EntryType, path: &str, link: Option<&str>) -> File {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(kind);
        header.set_size(0);
        if let Some(link) = link {
            header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        }
        header.set_cksum();
        let mut archive = Builder::new(Vec::new());
        archive.append(&header, std::io::empty()).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&archive.into_inner().unwrap()).unwrap();
        file
    }

    #[test]
    fn v4_hostile_layers_are_refused() {
        for (kind, path, link) in [
            (EntryType::Regular, "/etc/passwd", None),
            (EntryType::Regular, "../../etc/passwd", None),
            (EntryType::Regular, "a/../../b", None),
            (EntryType::Char, "dev/kmem", None),
            (EntryType::Block, "dev/sda", None),
            (EntryType::Link, "a", Some("../../etc/shadow")),
            (EntryType::Link, "a", Some("/../etc/shadow")),
            (EntryType::Link, "a", Some("/")),
            (EntryType::Link, "a", None),
            (EntryType::Symlink, "a", None),
            (EntryType::GNUSparse, "a", None),
            (EntryType::new(b'Z'), "a", None),
        ] {
            assert!(check(&layer(kind, path, link)).is_err(), "{kind:?} {path} {link:?}");
        }
    }

    #[test]
    fn ordinary_members_are_accepted() {
        for (kind, path, link) in [
            (EntryType::Regular, "./usr/bin/x", None),
            (EntryType::Regular, "usr/.wh.x", None),
            (EntryType::Directory, "./", None),
            (EntryType::Symlink, "a", Some("/usr/lib")),
            (EntryType::Symlink, "a", Some("../../../lib")),
            (EntryType::Link, "a", Some("usr/bin/x")),
            (EntryType::Fifo, "run/pipe", None),
        ] {
            assert_eq!(check(&layer(kind, path, link)).unwrap().members, 1, "{path}");
        }
    }
}
