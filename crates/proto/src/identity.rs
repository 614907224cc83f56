//! The machine's key and detached signatures over the bytes that travel.
//!
//! Every signature is made over a context string, its length, and the message, so that a signature of one kind can never
//! be taken for another. Verification is strict (RFC 8032 with the small-order and malleability checks of `verify_strict`).

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use libp2p_identity::{Keypair, PeerId, PublicKey, ed25519};
use minicbor::{Decode, Encode};
use zeroize::Zeroizing;

/// What a signature is for. One context string per kind of message (SECURITY M1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// A request that changes state.
    Request,
    /// One event of the answer to a request.
    Reply,
    /// A peer card.
    Card,
    /// An answer to an invitation.
    Join,
    /// One line of the audit log.
    Audit,
    /// A machine's new key in the place of its old one, by both of them.
    Rotation,
    /// A new key in the place of keys that nobody may use any more, by the recovery key and the new one.
    Replacement,
    /// The end of a key, by the recovery key.
    Revocation,
}

impl Context {
    fn text(self) -> &'static [u8] {
        match self {
            Self::Request => b"peer-compute/request/1",
            Self::Reply => b"peer-compute/reply/1",
            Self::Card => b"peer-compute/card/1",
            Self::Join => b"peer-compute/join/1",
            Self::Audit => b"peer-compute/audit/1",
            Self::Rotation => b"peer-compute/rotation/1",
            Self::Replacement => b"peer-compute/replacement/1",
            Self::Revocation => b"peer-compute/revocation/1",
        }
    }

    fn message(self, bytes: &[u8]) -> Vec<u8> {
        let text = self.text();
        let mut message = Vec::with_capacity(8 + text.len() + bytes.len());
        message.extend_from_slice(&(text.len() as u64).to_be_bytes());
        message.extend_from_slice(text);
        message.extend_from_slice(bytes);
        message
    }
}

/// Why a signature proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// The PeerId does not contain an Ed25519 public key.
    #[error("the peer id does not hold an Ed25519 key")]
    NotEd25519,
    /// The signature is not by that key over those bytes.
    #[error("the signature is not valid")]
    Invalid,
}

/// An Ed25519 key that signs for one machine. Its secret is wiped from memory when dropped.
#[derive(Clone)]
pub struct Identity {
    key: SigningKey,
    peer: PeerId,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", self.peer)
    }
}

impl Identity {
    /// Draws a new random key.
    pub fn generate() -> Self {
        let mut seed = Zeroizing::new([0; 32]);
        getrandom::fill(&mut seed[..]).expect("the operating system gives random bytes");
        Self::from_seed(&seed)
    }

    /// The key of a 32-byte seed (RFC 8032 private key).
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        let key = SigningKey::from_bytes(seed);
        let peer = peer_id_of(&key.verifying_key().to_bytes()).expect("a public key derived from a seed is valid");
        Self { key, peer }
    }

    /// The seed, for storing it.
    pub fn seed(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.key.to_bytes())
    }

    /// The PeerId that this key proves.
    pub fn peer_id(&self) -> PeerId {
        self.peer
    }

    /// The public key.
    pub fn public_key(&self) -> [u8; 32] {
        self.key.verifying_key().to_bytes()
    }

    /// The same key for libp2p's security handshake.
    pub fn to_keypair(&self) -> Keypair {
        Keypair::ed25519_from_bytes(*self.seed()).expect("32 bytes are an Ed25519 seed")
    }

    /// Signs `bytes` for `context`.
    pub fn seal(&self, context: Context, bytes: Vec<u8>) -> Sealed {
        let signature = self.key.sign(&context.message(&bytes)).to_bytes();
        Sealed { bytes, signature }
    }
}

/// Bytes with a signature, as they travel; they are never encoded again to be verified.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Sealed {
    /// The signed bytes, exactly.
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub bytes: Vec<u8>,
    /// Ed25519 signature over context and bytes.
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub signature: [u8; 64],
}

impl Sealed {
    /// Checks that `peer` signed these bytes for `context`.
    pub fn verify(&self, context: Context, peer: &PeerId) -> Result<(), SignatureError> {
        let key = VerifyingKey::from_bytes(&public_key_of(peer).ok_or(SignatureError::NotEd25519)?)
            .map_err(|_| SignatureError::NotEd25519)?;
        key.verify_strict(&context.message(&self.bytes), &Signature::from_bytes(&self.signature))
            .map_err(|_| SignatureError::Invalid)
    }
}

/// The PeerId of an Ed25519 public key, if the bytes are one.
pub fn peer_id_of(public_key: &[u8; 32]) -> Option<PeerId> {
    let key = ed25519::PublicKey::try_from_bytes(public_key).ok()?;
    Some(PublicKey::from(key).to_peer_id())
}

/// The Ed25519 public key inside a PeerId (libp2p specification: identity multihash of the encoded key).
pub fn public_key_of(peer: &PeerId) -> Option<[u8; 32]> {
    let multihash = peer.as_ref();
    if multihash.code() != 0 {
        return None;
    }
    let key = PublicKey::try_decode_protobuf(multihash.digest()).ok()?;
    Some(key.try_into_ed25519().ok()?.to_bytes())
}

/// A short code that two people can compare aloud: nine digits that depend on both PeerIds alone.
pub fn verification_code(one: &PeerId, other: &PeerId) -> String {
    let (mut first, mut second) = (one.to_bytes(), other.to_bytes());
    if first > second {
        std::mem::swap(&mut first, &mut second);
    }
    let mut hasher = blake3::Hasher::new_derive_key("peer-compute 2026 verification code");
    for bytes in [first, second] {
        hasher.update(&(bytes.len() as u64).to_be_bytes());
        hasher.update(&bytes);
    }
    let hash = hasher.finalize();
    let number = u64::from_be_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes")) % 1_000_000_000;
    format!("{:03} {:03} {:03}", number / 1_000_000, number / 1000 % 1000, number % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v2_signature_holds_for_its_context_signer_and_bytes_only() {
        let (identity, other) = (Identity::generate(), Identity::generate());
        let sealed = identity.seal(Context::Request, b"run".to_vec());
        assert_eq!(sealed.verify(Context::Request, &identity.peer_id()), Ok(()));
        assert_eq!(sealed.verify(Context::Reply, &identity.peer_id()), Err(SignatureError::Invalid));
        assert_eq!(sealed.verify(Context::Request, &other.peer_id()), Err(SignatureError::Invalid));
        let mut changed = sealed.clone();
        changed.bytes[0] ^= 1;
        assert_eq!(changed.verify(Context::Request, &identity.peer_id()), Err(SignatureError::Invalid));
    }

    #[test]
    fn verification_code_is_symmetric() {
        let (one, other) = (Identity::generate().peer_id(), Identity::generate().peer_id());
        assert_eq!(verification_code(&one, &other), verification_code(&other, &one));
    }

    /// Both friends must read the same digits, whatever version of the program each has.
    #[test]
    fn verification_code_of_known_keys_never_changes() {
        let [one, other] = [1, 2].map(|seed| Identity::from_seed(&[seed; 32]).peer_id());
        assert_eq!(verification_code(&one, &other), "813 308 618");
        assert_ne!(verification_code(&one, &one), verification_code(&other, &other));
    }

    #[test]
    fn an_identity_is_written_as_its_peer_id_alone() {
        let identity = Identity::generate();
        assert_eq!(format!("{identity:?}"), format!("Identity({})", identity.peer_id()));
    }

    #[test]
    fn libp2p_and_our_key_agree_on_the_peer_id() {
        let identity = Identity::generate();
        assert_eq!(identity.to_keypair().public().to_peer_id(), identity.peer_id());
        assert_eq!(public_key_of(&identity.peer_id()), Some(identity.public_key()));
    }
}
