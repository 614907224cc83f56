//! The seal over the key file: a passphrase, stretched by Argon2id (RFC 9106), opens it with XChaCha20-Poly1305.
//!
//! Everything that stands open in a sealed file (version, cost, salt, nonce, and whose it is) is authenticated with what is
//! enciphered. Cost is bounded when it is read, so that a changed file cannot make the daemon take all memory.

use std::sync::Arc;

use argon2::{Algorithm, Argon2, Params, Version};
use chacha20poly1305::aead::{AeadInPlace, KeyInit};
use chacha20poly1305::{Key, XChaCha20Poly1305, XNonce};
use libp2p_identity::PeerId;
use minicbor::{Decode, Encode};
use peer_proto::frame::{decode_strict, encode, peer_id};
use peer_proto::id::Name;
use zeroize::Zeroizing;

/// The one version of the form.
const VERSION: u8 = 1;
/// Shortest passphrase that seals (bytes).
pub const PASSPHRASE_MIN: usize = 8;
/// Longest passphrase (bytes).
pub const PASSPHRASE_MAX: usize = 1024;
/// Largest sealed file (bytes).
pub(crate) const SEALED_MAX: usize = 64 * 1024;

/// Why a file is not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// Not a sealed file of a version and a cost that this program accepts.
    #[error("the sealed identity is damaged, or was sealed by a newer version of this program")]
    Damaged,
    /// The passphrase does not open it; or it was changed.
    #[error("the passphrase is wrong")]
    WrongPassphrase,
    /// No passphrase of ours is that short or that long.
    #[error(
        "a passphrase has {PASSPHRASE_MIN} to {PASSPHRASE_MAX} bytes; several words in a row are easiest to keep in mind"
    )]
    Length,
}

/// What stretching a passphrase costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Cost {
    /// Memory (KiB).
    #[n(0)]
    memory: u32,
    #[n(1)]
    passes: u32,
    #[n(2)]
    lanes: u32,
}

impl Cost {
    /// The second recommended option of RFC 9106, section 4.
    const RECOMMENDED: Self = Self { memory: 64 * 1024, passes: 3, lanes: 4 };
    /// Weaker than this (OWASP's smallest) is not accepted.
    const LEAST: Self = Self { memory: 19 * 1024, passes: 2, lanes: 1 };
    const MOST: Self = Self { memory: 256 * 1024, passes: 10, lanes: 16 };

    fn is_sound(self) -> bool {
        let within = |value: u32, least: u32, most: u32| (least..=most).contains(&value);
        within(self.memory, Self::LEAST.memory, Self::MOST.memory)
            && within(self.passes, Self::LEAST.passes, Self::MOST.passes)
            && within(self.lanes, Self::LEAST.lanes, Self::MOST.lanes)
    }
}

/// What stands open in a sealed file.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Header {
    #[n(0)]
    version: u8,
    #[n(1)]
    cost: Cost,
    #[n(2)]
    #[cbor(with = "minicbor::bytes")]
    salt: [u8; 16],
    #[n(3)]
    #[cbor(with = "minicbor::bytes")]
    nonce: [u8; 24],
    /// Whose key is inside; for people, and proven only when it is open.
    #[n(4)]
    #[cbor(with = "peer_id")]
    pub(crate) peer: PeerId,
    #[n(5)]
    pub(crate) name: Name,
}

/// The numbers of its fields are none of the plain file's, so that one is never read as the other.
#[derive(Encode, Decode)]
#[cbor(map)]
struct SealedFile {
    #[n(16)]
    #[cbor(with = "minicbor::bytes")]
    header: Vec<u8>,
    #[n(17)]
    #[cbor(with = "minicbor::bytes")]
    content: Vec<u8>,
}

/// The key that a passphrase became. It stays in memory while the identity is open, so that what changes in the file is
/// sealed again without asking.
#[derive(Clone)]
pub struct SealKey {
    cost: Cost,
    salt: [u8; 16],
    key: Arc<Zeroizing<[u8; 32]>>,
}

impl std::fmt::Debug for SealKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SealKey")
    }
}

impl SealKey {
    /// Stretches a new passphrase with a fresh salt. Takes a tenth of a second or so, on purpose.
    pub fn of(passphrase: &[u8]) -> Result<Self, SealError> {
        Self::with(passphrase, Cost::RECOMMENDED)
    }

    fn with(passphrase: &[u8], cost: Cost) -> Result<Self, SealError> {
        if !(PASSPHRASE_MIN..=PASSPHRASE_MAX).contains(&passphrase.len()) {
            return Err(SealError::Length);
        }
        Self::stretch(passphrase, cost, random())
    }

    fn stretch(passphrase: &[u8], cost: Cost, salt: [u8; 16]) -> Result<Self, SealError> {
        let params = Params::new(cost.memory, cost.passes, cost.lanes, Some(32)).map_err(|_| SealError::Damaged)?;
        let mut key = Zeroizing::new([0; 32]);
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password_into(passphrase, &salt, &mut key[..])
            .map_err(|_| SealError::WrongPassphrase)?;
        Ok(Self { cost, salt, key: Arc::new(key) })
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new(Key::from_slice(&self.key[..]))
    }

    /// Seals `plain`, which is the key file of `peer`.
    pub(crate) fn seal(&self, plain: &[u8], peer: PeerId, name: Name) -> Vec<u8> {
        let header = Header { version: VERSION, cost: self.cost, salt: self.salt, nonce: random(), peer, name };
        let open = encode(&header);
        // The copy of the secret is enciphered where it lies, in a buffer that the tag does not make move.
        let mut content = Vec::with_capacity(plain.len() + 16);
        content.extend_from_slice(plain);
        self.cipher()
            .encrypt_in_place(XNonce::from_slice(&header.nonce), &open, &mut content)
            .expect("a key file is far shorter than the cipher's limit");
        encode(&SealedFile { header: open, content })
    }
}

fn random<const LENGTH: usize>() -> [u8; LENGTH] {
    let mut bytes = [0; LENGTH];
    getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
    bytes
}

/// The open part of a sealed file; nothing if it is no sealed file at all.
pub(crate) fn header(file: &[u8]) -> Option<Result<Header, SealError>> {
    let sealed: SealedFile = decode_strict(file, SEALED_MAX).ok()?;
    Some(read(&sealed))
}

fn read(sealed: &SealedFile) -> Result<Header, SealError> {
    let header: Header = decode_strict(&sealed.header, SEALED_MAX).map_err(|_| SealError::Damaged)?;
    if header.version == VERSION && header.cost.is_sound() { Ok(header) } else { Err(SealError::Damaged) }
}

/// Opens a sealed file: its open part, the key that opened it, and what was inside.
pub(crate) fn open(file: &[u8], passphrase: &[u8]) -> Result<(Header, SealKey, Zeroizing<Vec<u8>>), SealError> {
    let sealed: SealedFile = decode_strict(file, SEALED_MAX).map_err(|_| SealError::Damaged)?;
    let header = read(&sealed)?;
    let key = SealKey::stretch(passphrase, header.cost, header.salt)?;
    let mut content = Zeroizing::new(sealed.content);
    key.cipher()
        .decrypt_in_place(XNonce::from_slice(&header.nonce), &sealed.header, &mut *content)
        .map_err(|_| SealError::WrongPassphrase)?;
    Ok((header, key, content))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use peer_proto::identity::Identity;
    use proptest::prelude::*;

    use super::*;

    const PASSPHRASE: &[u8] = b"correct horse battery staple";

    fn sealed(cost: Cost) -> Vec<u8> {
        let key = SealKey::with(PASSPHRASE, cost).unwrap();
        key.seal(b"the secret", Identity::from_seed(&[1; 32]).peer_id(), "alice".parse().unwrap())
    }

    #[test]
    fn only_the_passphrase_opens_it() {
        let file = sealed(Cost::RECOMMENDED);
        let (header, key, content) = open(&file, PASSPHRASE).unwrap();
        assert_eq!((header.name.as_str(), header.cost, &content[..]), ("alice", Cost::RECOMMENDED, &b"the secret"[..]));
        assert_eq!(open(&file, b"correct horse battery stable").unwrap_err(), SealError::WrongPassphrase);
        assert!(!file.windows(10).any(|part| part == b"the secret"));
        // The same key seals again, with another nonce.
        let again = key.seal(b"the secret", header.peer, header.name);
        assert_ne!(again, file);
        assert_eq!(&open(&again, PASSPHRASE).unwrap().2[..], b"the secret");
        assert_eq!(SealKey::of(b"short").unwrap_err(), SealError::Length);
    }

    #[test]
    fn g3_any_changed_byte_is_refused() {
        let file = sealed(Cost::LEAST);
        for index in 0..file.len() {
            let mut changed = file.clone();
            changed[index] ^= 1;
            assert!(open(&changed, PASSPHRASE).is_err(), "byte {index}");
        }
    }

    #[test]
    fn v5_cost_beyond_its_bounds_is_refused_before_it_is_paid() {
        let mut sealed: SealedFile = decode_strict(&sealed(Cost::LEAST), SEALED_MAX).unwrap();
        let header: Header = decode_strict(&sealed.header, SEALED_MAX).unwrap();
        for cost in [
            Cost { memory: u32::MAX, ..Cost::LEAST },
            Cost { memory: 8, ..Cost::LEAST },
            Cost { passes: u32::MAX, ..Cost::LEAST },
            Cost { passes: 1, ..Cost::LEAST },
            Cost { lanes: 0, ..Cost::LEAST },
            Cost { lanes: 1 << 20, ..Cost::LEAST },
        ] {
            sealed.header = encode(&Header { cost, ..header.clone() });
            assert_eq!(open(&encode(&sealed), PASSPHRASE).unwrap_err(), SealError::Damaged, "{cost:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            prop_assert!(header(&bytes).is_none());
            prop_assert_eq!(open(&bytes, PASSPHRASE).unwrap_err(), SealError::Damaged);
        }
    }
}
