//! The join protocol: one frame each way on a connection made with the ticket's one-time key.

use libp2p_identity::PeerId;
use minicbor::{Decode, Encode};

use crate::card::{CardError, SignedCard};
use crate::code::Problem;
use crate::frame::{FrameError, INTRODUCTION_FRAME_MAX, decode_strict, encode, peer_id};
use crate::identity::{Context, Identity, Sealed, SignatureError};

/// Why an answer to an invitation is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// Not a message of this kind.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The card inside is not sound.
    #[error(transparent)]
    Card(#[from] CardError),
    /// Not signed by the machine that joins.
    #[error(transparent)]
    Signature(#[from] SignatureError),
    /// Made for another invitation.
    #[error("the answer belongs to another invitation")]
    OtherInvitation,
}

/// Binds the joining machine's own key to one invitation.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Statement {
    #[n(0)]
    #[cbor(with = "peer_id")]
    ticket: PeerId,
    #[n(1)]
    #[cbor(with = "peer_id")]
    inviter: PeerId,
    #[n(2)]
    #[cbor(with = "minicbor::bytes")]
    card: Vec<u8>,
}

/// Signs the answer of `identity` to the invitation whose one-time key is `ticket`.
pub fn seal(identity: &Identity, card: &SignedCard, ticket: PeerId, inviter: PeerId) -> Vec<u8> {
    let statement = Statement { ticket, inviter, card: card.to_bytes() };
    encode(&identity.seal(Context::Join, encode(&statement)))
}

/// Takes the answer that came over a connection proven by the one-time key `ticket`.
pub fn open(bytes: &[u8], ticket: &PeerId, me: &PeerId) -> Result<SignedCard, JoinError> {
    let sealed: Sealed = decode_strict(bytes, INTRODUCTION_FRAME_MAX)?;
    let statement: Statement = decode_strict(&sealed.bytes, INTRODUCTION_FRAME_MAX)?;
    if statement.ticket != *ticket || statement.inviter != *me {
        return Err(JoinError::OtherInvitation);
    }
    let card = SignedCard::decode(&statement.card)?;
    sealed.verify(Context::Join, &card.card().peer)?;
    Ok(card)
}

/// The inviter's answer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum JoinReply {
    /// Both now trust each other; what the inviter allows is named.
    #[n(0)]
    Welcome(#[n(0)] crate::grant::Grants),
    /// Not accepted.
    #[n(1)]
    Refused(#[n(0)] Problem),
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use super::*;
    use crate::card::Card;
    use crate::unit::Timestamp;

    #[test]
    fn answer_is_bound_to_ticket_inviter_and_key() {
        let (alice, bob, ticket) = (Identity::generate(), Identity::generate(), Identity::generate());
        let card = Card::new(&alice, "alice".parse().unwrap(), &[], [0; 32], Timestamp(1));
        let card = SignedCard::sign(&alice, card);
        let bytes = seal(&alice, &card, ticket.peer_id(), bob.peer_id());
        assert_eq!(open(&bytes, &ticket.peer_id(), &bob.peer_id()), Ok(card.clone()));
        assert_eq!(open(&bytes, &Identity::generate().peer_id(), &bob.peer_id()), Err(JoinError::OtherInvitation));
        assert_eq!(open(&bytes, &ticket.peer_id(), &Identity::generate().peer_id()), Err(JoinError::OtherInvitation));
        let by_another = seal(&bob, &card, ticket.peer_id(), bob.peer_id());
        assert!(matches!(open(&by_another, &ticket.peer_id(), &bob.peer_id()), Err(JoinError::Signature(_))));
    }
}
