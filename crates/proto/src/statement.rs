//! Statements about keys: a new key in the place of an old one, or the end of a key.
//!
//! A statement proves itself, so that anybody may carry it: a friend to another friend, or a person in a file. It is signed
//! over the bytes that travel, under a context of its own for each kind, by every key whose word it is.

use std::fmt;
use std::str::FromStr;

use data_encoding::BASE64URL_NOPAD;
use libp2p_identity::PeerId;
use minicbor::{Decode, Encode};

use crate::card::{CardError, SignedCard, unwrap_text};
use crate::frame::{FrameError, INTRODUCTION_FRAME_MAX, decode_strict, encode, peer_id};
use crate::id::Incarnation;
use crate::identity::{Context, Identity, Sealed, SignatureError, peer_id_of};
use crate::unit::Timestamp;

/// Longest statement (bytes): a card, and little more.
pub const STATEMENT_MAX: usize = INTRODUCTION_FRAME_MAX + 2048;
/// Most keys that one replacement may end: those that a machine has had.
pub const REPLACED_MAX: usize = 8;
/// Most keys about which one call may offer statements.
pub const OFFERS_MAX: usize = 64;
const PREFIX: &str = "peerstatement1.";

/// Why bytes are no statement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StatementError {
    /// Not a message of this kind.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The text, or the card inside, is not sound.
    #[error(transparent)]
    Card(#[from] CardError),
    /// A signature is missing, or does not hold.
    #[error("the statement is not signed by every key whose word it is: {0}")]
    Signature(#[from] SignatureError),
    /// It names no key, too many, or one as its own successor.
    #[error("the statement's keys do not fit together")]
    Keys,
}

/// A machine goes on under a new key. Signed by the old key and the new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotation {
    /// The key of before.
    pub old: PeerId,
    /// Card of the new key.
    pub card: SignedCard,
    /// Rises with each rotation of a machine.
    pub epoch: u64,
    /// When it was made.
    pub issued_at: Timestamp,
}

/// Keys that others may hold are refused from now on, and a new one stands in their place. Signed by the recovery key and
/// the new key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replacement {
    /// The keys that end: all that the machine has had, newest last.
    pub old: Vec<PeerId>,
    /// The recovery key that signs, which must be the one that the receiver knows of the machine.
    pub recovery_key: [u8; 32],
    /// Card of the new key.
    pub card: SignedCard,
    /// When it was made. Of two words of one recovery key the later one counts.
    pub issued_at: Timestamp,
}

/// A key is refused from now on, and nothing stands in its place. Signed by the recovery key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    /// The key that ends.
    pub peer: PeerId,
    /// The recovery key that signs, which must be the one that the receiver knows of the machine.
    pub recovery_key: [u8; 32],
    /// When it was made. Of two words of one recovery key the later one counts.
    pub issued_at: Timestamp,
}

/// What a statement says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A new key, by the old one.
    Rotation(Rotation),
    /// A new key, by the recovery key.
    Replacement(Replacement),
    /// The end of a key, by the recovery key.
    Revocation(Revocation),
}

/// A statement whose signatures have been checked. Made by signing, or by [`Statement::decode`] alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    content: Content,
    bytes: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(transparent)]
struct Key(
    #[n(0)]
    #[cbor(with = "peer_id")]
    PeerId,
);

/// What is signed.
#[derive(Encode, Decode)]
enum Body {
    #[n(0)]
    Rotation {
        #[n(0)]
        old: Key,
        #[n(1)]
        #[cbor(with = "minicbor::bytes")]
        card: Vec<u8>,
        #[n(2)]
        epoch: u64,
        #[n(3)]
        issued_at: Timestamp,
    },
    #[n(1)]
    Replacement {
        #[n(0)]
        old: Vec<Key>,
        #[n(1)]
        #[cbor(with = "minicbor::bytes")]
        recovery_key: [u8; 32],
        #[n(2)]
        #[cbor(with = "minicbor::bytes")]
        card: Vec<u8>,
        #[n(3)]
        issued_at: Timestamp,
    },
    #[n(2)]
    Revocation {
        #[n(0)]
        peer: Key,
        #[n(1)]
        #[cbor(with = "minicbor::bytes")]
        recovery_key: [u8; 32],
        #[n(2)]
        issued_at: Timestamp,
    },
}

/// As it travels: the signed bytes, the signature of who ends a key, and that of the new key.
#[derive(Encode, Decode)]
#[cbor(map)]
struct Frame {
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    bytes: Vec<u8>,
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    by: [u8; 64],
    #[n(2)]
    successor: Option<Signature>,
}

#[derive(Clone, Copy, Encode, Decode)]
#[cbor(transparent)]
struct Signature(
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    [u8; 64],
);

impl Statement {
    /// `old` hands its place to `new`, which `card` describes.
    pub fn rotate(old: &Identity, new: &Identity, card: &SignedCard, epoch: u64, issued_at: Timestamp) -> Self {
        let body = Body::Rotation { old: Key(old.peer_id()), card: card.to_bytes(), epoch, issued_at };
        let content = Rotation { old: old.peer_id(), card: card.clone(), epoch, issued_at };
        Self::sign(Context::Rotation, &body, Content::Rotation(content), old, Some(new))
    }

    /// The recovery key puts `new`, which `card` describes, in the place of the keys `old`.
    pub fn replace(
        recovery: &Identity,
        new: &Identity,
        card: &SignedCard,
        old: Vec<PeerId>,
        issued_at: Timestamp,
    ) -> Self {
        let recovery_key = recovery.public_key();
        let keys = old.iter().copied().map(Key).collect();
        let body = Body::Replacement { old: keys, recovery_key, card: card.to_bytes(), issued_at };
        let content = Replacement { old, recovery_key, card: card.clone(), issued_at };
        Self::sign(Context::Replacement, &body, Content::Replacement(content), recovery, Some(new))
    }

    /// The recovery key ends `peer`.
    pub fn revoke(recovery: &Identity, peer: PeerId, issued_at: Timestamp) -> Self {
        let recovery_key = recovery.public_key();
        let body = Body::Revocation { peer: Key(peer), recovery_key, issued_at };
        let content = Content::Revocation(Revocation { peer, recovery_key, issued_at });
        Self::sign(Context::Revocation, &body, content, recovery, None)
    }

    fn sign(context: Context, body: &Body, content: Content, by: &Identity, successor: Option<&Identity>) -> Self {
        let sealed = by.seal(context, encode(body));
        let successor = successor.map(|new| Signature(new.seal(context, sealed.bytes.clone()).signature));
        let bytes = encode(&Frame { bytes: sealed.bytes, by: sealed.signature, successor });
        Self { content, bytes }
    }

    /// Takes a statement from its encoding, if every signature holds.
    pub fn decode(bytes: &[u8]) -> Result<Self, StatementError> {
        let frame: Frame = decode_strict(bytes, STATEMENT_MAX)?;
        let body: Body = decode_strict(&frame.bytes, STATEMENT_MAX)?;
        let recovery = |key: &[u8; 32]| peer_id_of(key).ok_or(SignatureError::NotEd25519);
        let (context, by, content) = match body {
            Body::Rotation { old: Key(old), card, epoch, issued_at } => {
                let card = SignedCard::decode(&card)?;
                (Context::Rotation, old, Content::Rotation(Rotation { old, card, epoch, issued_at }))
            }
            Body::Replacement { old, recovery_key, card, issued_at } => {
                let card = SignedCard::decode(&card)?;
                let old = old.into_iter().map(|key| key.0).collect();
                let content = Replacement { old, recovery_key, card, issued_at };
                (Context::Replacement, recovery(&recovery_key)?, Content::Replacement(content))
            }
            Body::Revocation { peer: Key(peer), recovery_key, issued_at } => {
                let content = Content::Revocation(Revocation { peer, recovery_key, issued_at });
                (Context::Revocation, recovery(&recovery_key)?, content)
            }
        };
        let statement = Self { content, bytes: bytes.to_vec() };
        statement.check_keys()?;
        let verify = |signature: [u8; 64], signer: &PeerId| {
            Sealed { bytes: frame.bytes.clone(), signature }.verify(context, signer)
        };
        verify(frame.by, &by)?;
        match (frame.successor, statement.successor()) {
            (Some(signature), Some(card)) => verify(signature.0, &card.card().peer)?,
            (None, None) => {}
            _ => return Err(SignatureError::Invalid.into()),
        }
        Ok(statement)
    }

    fn check_keys(&self) -> Result<(), StatementError> {
        let keys = self.subjects();
        let successor = self.successor().map(|card| card.card().peer);
        let repeated = keys.iter().enumerate().any(|(index, key)| keys[..index].contains(key));
        if keys.is_empty() || keys.len() > REPLACED_MAX || repeated || keys.iter().any(|key| Some(*key) == successor) {
            return Err(StatementError::Keys);
        }
        Ok(())
    }

    /// What it says.
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// The keys that it ends.
    pub fn subjects(&self) -> &[PeerId] {
        match &self.content {
            Content::Rotation(rotation) => std::slice::from_ref(&rotation.old),
            Content::Replacement(replacement) => &replacement.old,
            Content::Revocation(revocation) => std::slice::from_ref(&revocation.peer),
        }
    }

    /// Card of the key that stands in their place.
    pub fn successor(&self) -> Option<&SignedCard> {
        match &self.content {
            Content::Rotation(rotation) => Some(&rotation.card),
            Content::Replacement(replacement) => Some(&replacement.card),
            Content::Revocation(_) => None,
        }
    }

    /// The recovery key that signed it, if one did.
    pub fn recovery_key(&self) -> Option<[u8; 32]> {
        match &self.content {
            Content::Rotation(_) => None,
            Content::Replacement(replacement) => Some(replacement.recovery_key),
            Content::Revocation(revocation) => Some(revocation.recovery_key),
        }
    }

    /// When it was made.
    pub fn issued_at(&self) -> Timestamp {
        match &self.content {
            Content::Rotation(rotation) => rotation.issued_at,
            Content::Replacement(replacement) => replacement.issued_at,
            Content::Revocation(revocation) => revocation.issued_at,
        }
    }

    /// What it does, in one word.
    pub fn kind(&self) -> &'static str {
        match &self.content {
            Content::Rotation(_) => "rotation",
            Content::Replacement(_) => "replacement",
            Content::Revocation(_) => "revocation",
        }
    }

    /// The encoding that [`Statement::decode`] takes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl fmt::Display for Statement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", BASE64URL_NOPAD.encode(&self.bytes))
    }
}

impl FromStr for Statement {
    type Err = StatementError;
    fn from_str(text: &str) -> Result<Self, StatementError> {
        Self::decode(&unwrap_text(text, PREFIX, "a statement about a key")?)
    }
}

/// A key about which a statement is held. It is named by a hash that only those recognise who know the key, and that is
/// another one for each run of the receiver: whom one trusts is nobody else's business.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Offered {
    /// Hash of the key and the receiver's run.
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub subject: [u8; 16],
    /// Whether the recovery key made the statement.
    #[n(1)]
    pub by_recovery: bool,
}

impl Offered {
    /// Names `peer` to the receiver whose present run is `incarnation`.
    pub fn new(peer: &PeerId, incarnation: &Incarnation, by_recovery: bool) -> Self {
        Self { subject: Self::hash(peer, incarnation), by_recovery }
    }

    /// The name of `peer` in an offer.
    pub fn hash(peer: &PeerId, incarnation: &Incarnation) -> [u8; 16] {
        let mut hasher = blake3::Hasher::new_derive_key("peer-compute 2026 offered statement");
        hasher.update(&incarnation.0);
        hasher.update(&peer.to_bytes());
        let mut subject = [0; 16];
        hasher.finalize_xof().fill(&mut subject);
        subject
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::card::Card;

    fn card(identity: &Identity) -> SignedCard {
        SignedCard::sign(identity, Card::new(identity, "alice".parse().unwrap(), &[], [7; 32], Timestamp(5)))
    }

    fn all() -> Vec<Statement> {
        let [old, new, recovery] = [1, 2, 3].map(|seed| Identity::from_seed(&[seed; 32]));
        let both = vec![Identity::from_seed(&[4; 32]).peer_id(), old.peer_id()];
        vec![
            Statement::rotate(&old, &new, &card(&new), 1, Timestamp(9)),
            Statement::replace(&recovery, &new, &card(&new), both, Timestamp(9)),
            Statement::revoke(&recovery, old.peer_id(), Timestamp(9)),
        ]
    }

    #[test]
    fn statements_round_trip_as_bytes_and_as_text() {
        for statement in all() {
            assert_eq!(Statement::decode(statement.as_bytes()).unwrap(), statement);
            assert_eq!(statement.to_string().parse::<Statement>().unwrap(), statement);
            assert!(statement.as_bytes().len() < STATEMENT_MAX / 2);
        }
    }

    #[test]
    fn v2_any_changed_byte_of_a_statement_is_refused() {
        for statement in all() {
            for index in 0..statement.as_bytes().len() {
                for bit in [1, 0x80] {
                    let mut changed = statement.as_bytes().to_vec();
                    changed[index] ^= bit;
                    assert!(Statement::decode(&changed).is_err(), "byte {index} of a {}", statement.kind());
                }
            }
        }
    }

    #[test]
    fn v2_every_key_must_have_signed() {
        let [old, new, mallory] = [1, 2, 5].map(|seed| Identity::from_seed(&[seed; 32]));
        let honest = Statement::rotate(&old, &new, &card(&new), 1, Timestamp(9));
        let frame = |statement: &Statement| decode_strict::<Frame>(statement.as_bytes(), STATEMENT_MAX).unwrap();
        let signed = |by: &Identity| by.seal(Context::Rotation, frame(&honest).bytes).signature;
        let by_new_alone = Frame { by: signed(&new), ..frame(&honest) };
        let by_old_alone = Frame { successor: Some(Signature(signed(&old))), ..frame(&honest) };
        let without_new = Frame { successor: None, ..frame(&honest) };
        let by_another = Frame { by: signed(&mallory), ..frame(&honest) };
        for forged in [by_new_alone, by_old_alone, without_new, by_another] {
            let refused = Statement::decode(&encode(&forged)).unwrap_err();
            assert!(matches!(refused, StatementError::Signature(_)), "{refused}");
        }
        // The same words under another context are not the same word.
        let elsewhere = Frame { by: old.seal(Context::Card, frame(&honest).bytes).signature, ..frame(&honest) };
        assert!(Statement::decode(&encode(&elsewhere)).is_err());
        let [_, replacement, revocation] = &all()[..] else { unreachable!("three were made") };
        for statement in [replacement, revocation] {
            let by = mallory.seal(Context::Revocation, frame(statement).bytes).signature;
            assert!(Statement::decode(&encode(&Frame { by, ..frame(statement) })).is_err());
        }
    }

    #[test]
    fn keys_that_do_not_fit_together_are_refused() {
        let [old, recovery] = [1, 3].map(|seed| Identity::from_seed(&[seed; 32]));
        let keys = |number: u8| (0..number).map(|seed| Identity::from_seed(&[100 + seed; 32]).peer_id()).collect();
        for statement in [
            Statement::rotate(&old, &old, &card(&old), 1, Timestamp(1)),
            Statement::replace(&recovery, &old, &card(&old), Vec::new(), Timestamp(1)),
            Statement::replace(&recovery, &old, &card(&old), vec![old.peer_id()], Timestamp(1)),
            Statement::replace(&recovery, &old, &card(&old), vec![recovery.peer_id(); 2], Timestamp(1)),
            Statement::replace(&recovery, &old, &card(&old), keys(9), Timestamp(1)),
        ] {
            assert_eq!(Statement::decode(statement.as_bytes()).unwrap_err(), StatementError::Keys);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            prop_assert!(Statement::decode(&bytes).is_err());
        }
    }
}
