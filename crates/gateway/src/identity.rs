//! The gateway's own key, by which providers pin it: a file that only its owner can read, made on first start.

use std::path::Path;

use data_encoding::HEXLOWER;
use peer_proto::identity::Identity;
use peer_state::durable::{self, FileError};

/// Name of the key file in the data directory.
const FILE: &str = "identity.key";
const FILE_MAX: u64 = 1024;

/// Why there is no usable key.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file holds something else.
    #[error(
        "{0} does not hold a key (64 hexadecimal digits); restore it from a backup, or remove it to become a new gateway, which every provider then has to add again"
    )]
    Damaged(String),
}

/// Reads the key; `None` before the first start.
pub fn load(data_dir: &Path) -> Result<Option<Identity>, IdentityError> {
    let path = data_dir.join(FILE);
    let Some(bytes) = durable::read(&path, FILE_MAX)? else { return Ok(None) };
    let seed: Option<[u8; 32]> = HEXLOWER.decode(bytes.trim_ascii()).ok().and_then(|seed| seed.try_into().ok());
    seed.map(|seed| Some(Identity::from_seed(&seed))).ok_or_else(|| IdentityError::Damaged(path.display().to_string()))
}

/// Reads the key, or makes one.
pub fn load_or_create(data_dir: &Path) -> Result<Identity, IdentityError> {
    if let Some(identity) = load(data_dir)? {
        return Ok(identity);
    }
    let identity = Identity::generate();
    durable::write(&data_dir.join(FILE), format!("{}\n", HEXLOWER.encode(&*identity.seed())).as_bytes(), 0o600)?;
    Ok(identity)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn key_is_private_lasting_and_never_replaced_when_damaged() {
        let directory = tempfile::tempdir().unwrap();
        assert!(load(directory.path()).unwrap().is_none());
        let first = load_or_create(directory.path()).unwrap().peer_id();
        assert_eq!(load_or_create(directory.path()).unwrap().peer_id(), first);
        let path = directory.path().join(FILE);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::write(&path, "abc").unwrap();
        assert!(matches!(load_or_create(directory.path()), Err(IdentityError::Damaged(_))));
    }
}
