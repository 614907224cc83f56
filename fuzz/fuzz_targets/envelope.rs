//! Signed requests and answers: as they arrive, and (since no fuzzer forges a signature) with any content signed.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peer_fuzz::{NOW, alice, bob};
use peer_proto::{
    envelope::{DRIFT_MAX_MILLISECONDS, LIFE_MAX_MILLISECONDS, Signed, hash_of_bytes, open, open_reply},
    frame::{CONTROL_FRAME_MAX, decode_strict, encode},
    id::RequestHash,
    identity::{Context, Sealed},
};

fuzz_target!(|data: &[u8]| {
    let (alice, bob) = (alice(), bob());
    let (from, me) = (alice.peer_id(), bob.peer_id());
    if let Ok(signed) = open(data, &from, &me, NOW) {
        check(&signed, data);
    }
    // A request is never taken from another sender or for another machine, nor as an answer.
    assert!(open(data, &me, &from, NOW).is_err() || open(data, &from, &me, NOW).is_err());
    let sealed = encode(&alice.seal(Context::Request, data.to_vec()));
    if let Ok(signed) = open(&sealed, &from, &me, NOW) {
        check(&signed, &sealed);
        assert_eq!(signed.signer(), from);
        assert!(open(&sealed, &from, &from, NOW).is_err());
        let other_purpose = encode(&alice.seal(Context::Reply, data.to_vec()));
        assert!(open(&other_purpose, &from, &me, NOW).is_err());
    }
    check_reply(data);
});

fn check(signed: &Signed, bytes: &[u8]) {
    assert_eq!(hash_of_bytes(bytes), Some(signed.hash()));
    assert!(NOW <= signed.not_after().plus(DRIFT_MAX_MILLISECONDS));
    assert!(signed.not_after().since(NOW) <= LIFE_MAX_MILLISECONDS + DRIFT_MAX_MILLISECONDS);
    assert!(!signed.body().verb().is_empty());
    let body = encode(signed.body());
    assert_eq!(decode_strict(&body, CONTROL_FRAME_MAX).as_ref(), Ok(signed.body()));
    let sealed: Sealed = decode_strict(bytes, CONTROL_FRAME_MAX).expect("an accepted envelope decodes");
    assert_eq!(sealed.verify(Context::Request, &signed.signer()), Ok(()));
}

/// The answer of bob to alice's request of this hash, at the first position.
fn check_reply(data: &[u8]) {
    let (alice, bob) = (alice(), bob());
    let (me, provider, request) = (alice.peer_id(), bob.peer_id(), RequestHash([7; 32]));
    let sealed = encode(&bob.seal(Context::Reply, data.to_vec()));
    for bytes in [data, &sealed] {
        let Ok(reply) = open_reply(bytes, &provider, &me, request, 0) else { continue };
        assert_eq!((reply.request, reply.audience, reply.sequence), (request, me, 0));
        assert!(open_reply(bytes, &provider, &me, request, 1).is_err());
        assert!(open_reply(bytes, &provider, &me, RequestHash([8; 32]), 0).is_err());
        assert!(open_reply(bytes, &me, &me, request, 0).is_err());
    }
}
