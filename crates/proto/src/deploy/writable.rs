//! Writable places in a container that is otherwise read-only: each a tmpfs with a size.

use std::fmt;
use std::str::FromStr;

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use super::Limits;
use crate::id::text_id;
use crate::unit::ByteSize;

/// Most writable paths of one deployment.
pub const WRITABLE_MAX: usize = 16;
/// Longest path at which something is mounted (bytes).
const MOUNT_PATH_MAX: usize = 256;

text_id!(
    /// A place inside a container where a tmpfs may be put: an absolute path in its plainest form, neither the root nor
    /// anything that the kernel shows of itself.
    MountPath
);

impl MountPath {
    /// Reads a path with more slashes than it needs, as images write them.
    pub fn normalised(text: &str) -> Result<Self, String> {
        let invalid = |why: &str| Err(format!("'{}' {why}", crate::text::escape(text)));
        // What separates the parts of an engine's mount options must not be in it.
        if text.len() > MOUNT_PATH_MAX || !text.bytes().all(|b| b.is_ascii_graphic() && !b":,\\\"'".contains(&b)) {
            return invalid("is longer than 256 bytes, or has characters that a path cannot have here");
        }
        let parts: Vec<_> = text.split('/').filter(|part| !part.is_empty()).collect();
        if !text.starts_with('/') || parts.iter().any(|part| matches!(*part, "." | "..")) {
            return invalid("is not an absolute path without '.' and '..'");
        }
        match parts.first() {
            None => invalid("is the root itself"),
            Some(&("proc" | "sys" | "dev")) => invalid("belongs to the kernel"),
            Some(_) => Ok(Self(format!("/{}", parts.join("/")))),
        }
    }
}

impl FromStr for MountPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = Self::normalised(text)?;
        if path.0 != text {
            return Err(format!("'{text}' has more slashes than it needs; write {}", path.0));
        }
        Ok(path)
    }
}

/// One writable place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[serde(deny_unknown_fields)]
#[cbor(map)]
pub struct Writable {
    /// Where.
    #[n(0)]
    pub path: MountPath,
    /// How much fits (bytes); it counts as memory.
    #[n(1)]
    pub size: ByteSize,
}

impl FromStr for Writable {
    type Err = String;

    /// Parses `PATH=SIZE`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (path, size) = text
            .rsplit_once('=')
            .ok_or_else(|| format!("'{}' has no '='; write PATH=SIZE, such as /data=16m", crate::text::escape(text)))?;
        Ok(Self { path: path.parse()?, size: size.parse().map_err(|error| format!("{path}: {error}"))? })
    }
}

impl fmt::Display for Writable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.path, self.size)
    }
}

pub(super) fn check(writable: &[Writable], limits: &Limits) -> Result<(), String> {
    if writable.len() > WRITABLE_MAX {
        return Err(format!("writable has more than {WRITABLE_MAX} paths"));
    }
    for (index, Writable { path, size }) in writable.iter().enumerate() {
        if path.as_str() == "/tmp" {
            return Err("writable path /tmp is there already; give its size with --scratch".into());
        }
        if writable[..index].iter().any(|other| other.path == *path) {
            return Err(format!("writable path {path} is named twice"));
        }
        if size.get() < 4096 {
            return Err(format!("writable path {path} must have at least 4 KiB, not {size}"));
        }
    }
    let sum = writable.iter().fold(limits.scratch.get(), |sum, one| sum.saturating_add(one.size.get()));
    if sum > limits.memory.get() {
        return Err(format!(
            "scratch and writable paths together ({}) count as memory and must be at most the memory limit ({})",
            crate::unit::format_bytes(sum),
            limits.memory
        ));
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused(texts: &[&str], limits: &Limits) -> String {
        let writable: Vec<Writable> = texts.iter().map(|text| text.parse().unwrap()).collect();
        check(&writable, limits).unwrap_err()
    }

    #[test]
    fn writable_paths_are_read() {
        let writable: Writable = "/var/lib/a=b=16m".parse().unwrap();
        assert_eq!((writable.path.as_str(), writable.size), ("/var/lib/a=b", ByteSize::mebibytes(16)));
        assert_eq!(writable.to_string(), "/var/lib/a=b=16 MiB");
    }

    #[test]
    fn i2_places_of_the_kernel_and_ways_out_are_refused() {
        for text in
            ["/", "//", "/proc", "/sys/x", "/dev", "data", "/a/../etc", "/a/./b", "/a:/b", "/a,exec", "", "/ä", "/a b"]
        {
            assert!(MountPath::normalised(text).is_err(), "{text}");
        }
        assert!("/a//b".parse::<MountPath>().unwrap_err().ends_with("write /a/b"));
        for text in ["/a", "/a=", "/a=x", "=1m", "/proc/x=1m"] {
            assert!(text.parse::<Writable>().is_err(), "{text}");
        }
    }

    #[test]
    fn v5_writable_paths_stay_within_the_memory() {
        let limits = Limits { memory: ByteSize::mebibytes(64), scratch: ByteSize::mebibytes(32), ..Limits::default() };
        assert!(refused(&["/a=33m"], &limits).contains("memory limit (64 MiB)"));
        assert!(refused(&["/a=1m", "/a=1m"], &limits).contains("twice"));
        assert!(refused(&["/tmp=1m"], &limits).contains("--scratch"));
        assert!(refused(&["/a=1k"], &limits).contains("4 KiB"));
        let many: Vec<_> = (0..=WRITABLE_MAX).map(|n| format!("/{n}=4k")).collect();
        assert!(refused(&many.iter().map(String::as_str).collect::<Vec<_>>(), &limits).contains("more than"));
        assert_eq!(check(&["/a=32m".parse().unwrap()], &limits), Ok(()));
    }

    proptest! {
        #[test]
        fn a_path_that_is_taken_is_plain(text in "[/a.:, =\\\\]{0,24}") {
            if let Ok(path) = MountPath::normalised(&text) {
                prop_assert!(path.as_str().parse::<MountPath>().is_ok());
                prop_assert!(!path.as_str().contains([':', ',', ' ', '\\']) && !path.as_str().contains("/../"));
            }
        }
    }
}
