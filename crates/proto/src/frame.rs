//! Frames: strict, canonical CBOR (RFC 8949) with a length limit known before anything is allocated.
//!
//! Strictness comes from one rule: a message must equal the encoding of what it decodes to. That refuses unknown
//! fields, duplicate keys, trailing bytes and over-long integers at once, with no list of cases to forget.

use minicbor::{Decode, Encode};

/// Bytes of the big-endian length in front of every frame on a stream.
pub const LENGTH_BYTES: usize = 4;
/// Largest control frame (bytes): a deployment with its image configuration fits with room to spare.
pub const CONTROL_FRAME_MAX: usize = 1024 * 1024;
/// Largest frame (bytes) that may arrive from somebody who has not been added as a peer yet.
pub const INTRODUCTION_FRAME_MAX: usize = 8 * 1024;
/// Largest frame (bytes) of the tunnel and lease protocols.
pub const TUNNEL_FRAME_MAX: usize = 4 * 1024;

/// Why bytes are not the message that they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The message is longer than its kind may be.
    #[error("message of {length} bytes is longer than the limit of {limit} bytes")]
    TooLong {
        /// Length found (bytes).
        length: usize,
        /// Limit of this kind of message (bytes).
        limit: usize,
    },
    /// Not CBOR, or not of the expected shape.
    #[error("message is malformed: {0}")]
    Malformed(String),
    /// Decodes, but is not the canonical encoding of what it says.
    #[error("message is not in canonical form (unknown field, duplicate key, or trailing bytes)")]
    NotCanonical,
}

/// Encodes a message in canonical form.
pub fn encode<T: Encode<()>>(message: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    minicbor::encode(message, &mut bytes).expect("writing to a Vec cannot fail");
    bytes
}

/// Decodes a message, accepting only its canonical encoding of at most `limit` bytes.
pub fn decode_strict<T>(bytes: &[u8], limit: usize) -> Result<T, FrameError>
where
    T: Encode<()> + for<'b> Decode<'b, ()>,
{
    if bytes.len() > limit {
        return Err(FrameError::TooLong { length: bytes.len(), limit });
    }
    let message: T = minicbor::decode(bytes).map_err(|error| FrameError::Malformed(error.to_string()))?;
    if encode(&message) != bytes {
        return Err(FrameError::NotCanonical);
    }
    Ok(message)
}

/// CBOR form of a [`crate::PeerId`]: its multihash as a byte string.
pub mod peer_id {
    use libp2p_identity::PeerId;
    use minicbor::encode::Write;
    use minicbor::{Decoder, Encoder};

    /// Encodes a PeerId.
    pub fn encode<C, W: Write>(
        peer: &PeerId,
        encoder: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        encoder.bytes(&peer.to_bytes())?.ok()
    }

    /// Decodes a PeerId.
    pub fn decode<C>(decoder: &mut Decoder<'_>, _: &mut C) -> Result<PeerId, minicbor::decode::Error> {
        PeerId::from_bytes(decoder.bytes()?)
            .map_err(|error| minicbor::decode::Error::message(format!("peer id: {error}")))
    }
}

/// CBOR form of any type that has a text form: `Display` one way, `FromStr` the other.
pub mod as_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use minicbor::encode::Write;
    use minicbor::{Decoder, Encoder};

    /// Encodes the text form.
    pub fn encode<C, T: Display, W: Write>(
        value: &T,
        encoder: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        encoder.str(&value.to_string())?.ok()
    }

    /// Decodes and parses the text form.
    pub fn decode<C, T: FromStr>(decoder: &mut Decoder<'_>, _: &mut C) -> Result<T, minicbor::decode::Error>
    where
        T::Err: Display,
    {
        decoder.str()?.parse().map_err(|error: T::Err| minicbor::decode::Error::message(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Encode, Decode)]
    #[cbor(map)]
    struct Message {
        #[n(0)]
        number: u32,
        #[n(1)]
        text: Option<String>,
    }

    #[test]
    fn canonical_message_round_trips() {
        let message = Message { number: 7, text: Some("a".into()) };
        assert_eq!(decode_strict::<Message>(&encode(&message), 64), Ok(message));
    }

    #[test]
    fn unknown_field_duplicate_key_and_trailing_bytes_are_refused() {
        for bytes in [
            vec![0xa2, 0x00, 0x07, 0x05, 0x01], // unknown key 5
            vec![0xa2, 0x00, 0x07, 0x00, 0x07], // key 0 twice
            vec![0xa1, 0x00, 0x07, 0x00],       // trailing byte
            vec![0xa1, 0x00, 0x18, 0x07],       // over-long integer
            vec![0xbf, 0x00, 0x07, 0xff],       // indefinite length
        ] {
            assert!(decode_strict::<Message>(&bytes, 64).is_err(), "{bytes:x?}");
        }
    }

    #[test]
    fn limit_is_checked_before_decoding() {
        assert_eq!(decode_strict::<Message>(&[0; 65], 64), Err(FrameError::TooLong { length: 65, limit: 64 }));
    }
}
