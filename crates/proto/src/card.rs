//! Peer cards and invitation tickets: what two people exchange out of band.

use std::fmt;
use std::str::FromStr;

use data_encoding::BASE64URL_NOPAD;
use libp2p_identity::PeerId;
use minicbor::{Decode, Encode};
use multiaddr::Multiaddr;
use zeroize::Zeroizing;

use crate::frame::{FrameError, INTRODUCTION_FRAME_MAX, as_text, decode_strict, encode, peer_id};
use crate::id::Name;
use crate::identity::{Context, Identity, Sealed, SignatureError};
use crate::unit::Timestamp;

/// Most addresses that one card may name.
pub const CARD_ADDRESSES_MAX: usize = 16;
const CARD_PREFIX: &str = "peercard1.";
const TICKET_PREFIX: &str = "peerinvite1.";

/// Why a card or a ticket is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CardError {
    /// The text is not of this kind at all.
    #[error("this is not {0}; copy the whole text, which begins with '{1}'")]
    NotOfThisKind(&'static str, &'static str),
    /// The content is not what it should be.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The signature is not by the machine that the card names.
    #[error("the card's signature is wrong: {0}")]
    Signature(#[from] SignatureError),
    /// Too many addresses.
    #[error("the card names {0} addresses; at most {CARD_ADDRESSES_MAX} are accepted")]
    TooManyAddresses(usize),
}

/// What a machine says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Card {
    /// Its PeerId.
    #[n(0)]
    #[cbor(with = "peer_id")]
    pub peer: PeerId,
    /// The name that it suggests for itself.
    #[n(1)]
    pub name: Name,
    /// Addresses at which it may be reached; may be empty.
    #[n(2)]
    addresses: Vec<Address>,
    /// Public half of the recovery key (Ed25519), which can replace or revoke a lost machine key.
    #[n(3)]
    #[cbor(with = "minicbor::bytes")]
    pub recovery_key: [u8; 32],
    /// When the card was made.
    #[n(4)]
    pub issued_at: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(transparent)]
struct Address(
    #[n(0)]
    #[cbor(with = "as_text")]
    Multiaddr,
);

impl Card {
    /// Describes `identity`; addresses beyond [`CARD_ADDRESSES_MAX`] are left out.
    pub fn new(
        identity: &Identity,
        name: Name,
        addresses: &[Multiaddr],
        recovery_key: [u8; 32],
        issued_at: Timestamp,
    ) -> Self {
        let addresses = addresses.iter().take(CARD_ADDRESSES_MAX).cloned().map(Address).collect();
        Self { peer: identity.peer_id(), name, addresses, recovery_key, issued_at }
    }

    /// Addresses at which the machine may be reached.
    pub fn addresses(&self) -> impl Iterator<Item = &Multiaddr> {
        self.addresses.iter().map(|address| &address.0)
    }
}

/// A card with its machine's signature. Exists only if the signature holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedCard {
    card: Card,
    sealed: Sealed,
}

impl SignedCard {
    /// Signs a card with the key that it names.
    pub fn sign(identity: &Identity, card: Card) -> Self {
        assert_eq!(identity.peer_id(), card.peer, "a machine signs its own card only");
        let sealed = identity.seal(Context::Card, encode(&card));
        Self { card, sealed }
    }

    /// Takes a card from its encoding, if it is sound.
    pub fn decode(bytes: &[u8]) -> Result<Self, CardError> {
        let sealed: Sealed = decode_strict(bytes, INTRODUCTION_FRAME_MAX)?;
        let card: Card = decode_strict(&sealed.bytes, INTRODUCTION_FRAME_MAX)?;
        if card.addresses.len() > CARD_ADDRESSES_MAX {
            return Err(CardError::TooManyAddresses(card.addresses.len()));
        }
        sealed.verify(Context::Card, &card.peer)?;
        Ok(Self { card, sealed })
    }

    /// The encoding that [`SignedCard::decode`] takes.
    pub fn to_bytes(&self) -> Vec<u8> {
        encode(&self.sealed)
    }

    /// What the card says.
    pub fn card(&self) -> &Card {
        &self.card
    }
}

impl fmt::Display for SignedCard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{CARD_PREFIX}{}", BASE64URL_NOPAD.encode(&self.to_bytes()))
    }
}

impl FromStr for SignedCard {
    type Err = CardError;
    fn from_str(text: &str) -> Result<Self, CardError> {
        Self::decode(&unwrap_text(text, CARD_PREFIX, "a peer card")?)
    }
}

/// An invitation: the inviter's card and a one-time key that its gate lets in once, to the join protocol alone.
#[derive(Clone)]
pub struct Ticket {
    /// Who invites.
    pub inviter: SignedCard,
    /// Seed of the one-time Ed25519 key.
    pub seed: Zeroizing<[u8; 32]>,
    /// When the invitation ends.
    pub expires_at: Timestamp,
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ticket(from {}, expires {})", self.inviter.card().peer, self.expires_at.0)
    }
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct TicketFrame {
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    inviter: Vec<u8>,
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    seed: [u8; 32],
    #[n(2)]
    expires_at: Timestamp,
}

impl Ticket {
    /// The text to hand over. It is a secret: whoever holds it can join.
    pub fn to_text(&self) -> Zeroizing<String> {
        let frame = TicketFrame { inviter: self.inviter.to_bytes(), seed: *self.seed, expires_at: self.expires_at };
        let bytes = Zeroizing::new(encode(&frame));
        Zeroizing::new(format!("{TICKET_PREFIX}{}", BASE64URL_NOPAD.encode(&bytes)))
    }
}

impl FromStr for Ticket {
    type Err = CardError;
    fn from_str(text: &str) -> Result<Self, CardError> {
        let bytes = Zeroizing::new(unwrap_text(text, TICKET_PREFIX, "an invitation ticket")?);
        let frame: TicketFrame = decode_strict(&bytes, 2 * INTRODUCTION_FRAME_MAX)?;
        let inviter = SignedCard::decode(&frame.inviter)?;
        Ok(Self { inviter, seed: Zeroizing::new(frame.seed), expires_at: frame.expires_at })
    }
}

pub(crate) fn unwrap_text(text: &str, prefix: &'static str, what: &'static str) -> Result<Vec<u8>, CardError> {
    let not_of_this_kind = || CardError::NotOfThisKind(what, prefix);
    let encoded = text.trim().strip_prefix(prefix).ok_or_else(not_of_this_kind)?;
    if encoded.len() > 4 * INTRODUCTION_FRAME_MAX {
        return Err(not_of_this_kind());
    }
    BASE64URL_NOPAD.decode(encoded.as_bytes()).map_err(|_| not_of_this_kind())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use super::*;

    fn card() -> SignedCard {
        let identity = Identity::generate();
        let addresses = ["/ip4/192.0.2.1/tcp/4001".parse().unwrap()];
        SignedCard::sign(&identity, Card::new(&identity, "bob".parse().unwrap(), &addresses, [7; 32], Timestamp(5)))
    }

    #[test]
    fn card_round_trips_as_text() {
        let card = card();
        assert_eq!(card.to_string().parse::<SignedCard>().unwrap(), card);
    }

    #[test]
    fn v2_card_with_any_bit_changed_is_refused() {
        let bytes = card().to_bytes();
        for index in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[index] ^= 1;
            assert!(SignedCard::decode(&changed).is_err(), "byte {index}");
        }
    }

    #[test]
    fn ticket_round_trips_and_refuses_cut_text() {
        let ticket = Ticket { inviter: card(), seed: Zeroizing::new([9; 32]), expires_at: Timestamp(77) };
        let text = ticket.to_text();
        let read: Ticket = text.parse().unwrap();
        assert_eq!((read.seed, read.expires_at, read.inviter), (ticket.seed, ticket.expires_at, ticket.inviter));
        assert!(text[..text.len() - 4].parse::<Ticket>().is_err());
        assert!("hello".parse::<Ticket>().is_err());
    }
}
