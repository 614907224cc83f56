//! Statements about keys: what any peer may carry, and people paste.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peer_fuzz::alice;
use peer_proto::{
    frame::encode,
    identity::Context,
    statement::{REPLACED_MAX, STATEMENT_MAX, Statement},
};

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(statement) = text.parse::<Statement>()
    {
        check(&statement);
    }
    // Signed by a key that the statement may name or not, so that what stands behind the signature is reached as well.
    for context in [Context::Rotation, Context::Replacement, Context::Revocation] {
        // Sealed bytes have the form of a statement without a successor.
        let bytes = encode(&alice().seal(context, data.to_vec()));
        if let Ok(statement) = Statement::decode(&bytes) {
            check(&statement);
        }
    }
    if let Ok(statement) = Statement::decode(data) {
        assert_eq!(statement.as_bytes(), data);
        check(&statement);
    }
});

fn check(statement: &Statement) {
    assert!(statement.as_bytes().len() <= STATEMENT_MAX);
    assert!((1..=REPLACED_MAX).contains(&statement.subjects().len()));
    let successor = statement.successor().map(|card| card.card().peer);
    assert!(statement.subjects().iter().all(|subject| Some(*subject) != successor));
    assert_eq!(statement.to_string().parse().as_ref(), Ok(statement));
}
