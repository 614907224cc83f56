//! Cards, tickets and answers to invitations: what strangers send before anybody trusts them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peer_fuzz::{alice, bob, ticket};
use peer_proto::{
    card::{CARD_ADDRESSES_MAX, SignedCard, Ticket},
    frame::encode,
    identity::Context,
    join,
};

fuzz_target!(|data: &[u8]| {
    let (alice, bob, ticket) = (alice(), bob(), ticket());
    if let Ok(text) = std::str::from_utf8(data) {
        if let Ok(card) = text.parse::<SignedCard>() {
            check_card(&card);
        }
        if let Ok(read) = text.parse::<Ticket>() {
            check_card(&read.inviter);
            assert_eq!(*read.to_text(), text.trim());
        }
    }
    for bytes in [data, &encode(&alice.seal(Context::Card, data.to_vec()))] {
        if let Ok(card) = SignedCard::decode(bytes) {
            assert_eq!(card.to_bytes(), bytes);
            check_card(&card);
        }
    }
    for bytes in [data, &encode(&alice.seal(Context::Join, data.to_vec()))] {
        if let Ok(card) = join::open(bytes, &ticket.peer_id(), &bob.peer_id()) {
            check_card(&card);
            assert!(join::open(bytes, &bob.peer_id(), &bob.peer_id()).is_err());
            assert!(join::open(bytes, &ticket.peer_id(), &alice.peer_id()).is_err());
        }
    }
});

fn check_card(card: &SignedCard) {
    assert!(card.card().addresses().count() <= CARD_ADDRESSES_MAX);
    assert_eq!(card.to_string().parse().as_ref(), Ok(card));
}
