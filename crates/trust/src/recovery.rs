//! The recovery phrase: twenty-four words (BIP-39) that derive a key which is never used online.
//!
//! Its public half is on every card. It can certify a new machine key, or revoke a lost one; the phrase is shown once and
//! stored nowhere.

use bip39::Mnemonic;
use peer_proto::identity::Identity;
use zeroize::Zeroizing;

/// A phrase that is not twenty-four words of the list with a right checksum.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this is not a recovery phrase: {0}")]
pub struct PhraseError(String);

/// Draws a new phrase of 256 random bits.
pub fn generate() -> Zeroizing<String> {
    let mut entropy = Zeroizing::new([0; 32]);
    getrandom::fill(&mut entropy[..]).expect("the operating system gives random bytes");
    let mnemonic = Mnemonic::from_entropy(&entropy[..]).expect("32 bytes make 24 words");
    Zeroizing::new(mnemonic.to_string())
}

/// Derives the recovery key of a phrase.
pub fn key_of(phrase: &str) -> Result<Identity, PhraseError> {
    let mnemonic = Mnemonic::parse_normalized(phrase).map_err(|error| PhraseError(error.to_string()))?;
    let seed = Zeroizing::new(mnemonic.to_seed_normalized(""));
    let key = Zeroizing::new(blake3::derive_key("peer-compute 2026 recovery key", &seed[..]));
    Ok(Identity::from_seed(&key))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;

    #[test]
    fn phrase_always_derives_the_same_key() {
        let phrase = generate();
        assert_eq!(phrase.split(' ').count(), 24);
        assert_eq!(key_of(&phrase).unwrap().public_key(), key_of(&phrase).unwrap().public_key());
        assert_ne!(key_of(&phrase).unwrap().public_key(), key_of(&generate()).unwrap().public_key());
        assert!(key_of("one two three").is_err());
    }
}
