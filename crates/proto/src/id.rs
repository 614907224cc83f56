//! Identifiers: a newtype for each, valid by construction.

use std::fmt;
use std::str::FromStr;

use data_encoding::{Encoding, HEXLOWER, Specification};
use libp2p_identity::PeerId;
use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// An identifier in a form that its kind does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct IdError(pub(crate) String);

/// The form in JSON of a type whose text says all of it: `Display` one way, `FromStr` the other.
macro_rules! text_in_json {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = <Self as std::str::FromStr>::Err;
            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }
    };
}

/// The same, and the form in CBOR.
macro_rules! text_form {
    ($name:ident) => {
        $crate::id::text_in_json!($name);

        impl<C> minicbor::Encode<C> for $name {
            fn encode<W: minicbor::encode::Write>(
                &self,
                encoder: &mut minicbor::Encoder<W>,
                context: &mut C,
            ) -> Result<(), minicbor::encode::Error<W::Error>> {
                $crate::frame::as_text::encode(self, encoder, context)
            }
        }
        impl<'b, C> minicbor::Decode<'b, C> for $name {
            fn decode(decoder: &mut minicbor::Decoder<'b>, context: &mut C) -> Result<Self, minicbor::decode::Error> {
                $crate::frame::as_text::decode(decoder, context)
            }
        }
    };
}

/// A text of which `FromStr` says what may be in it.
macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }
        $crate::id::text_form!($name);
    };
}

pub(crate) use {text_form, text_id, text_in_json};

macro_rules! bytes_id {
    ($(#[$doc:meta])* $name:ident, $length:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Encode, Decode)]
        #[serde(try_from = "String", into = "String")]
        #[cbor(transparent)]
        pub struct $name(#[n(0)] #[cbor(with = "minicbor::bytes")] pub [u8; $length]);

        impl $name {
            /// Draws a random one.
            pub fn random() -> Self {
                let mut bytes = [0; $length];
                getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
                Self(bytes)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&HEXLOWER.encode(&self.0))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{self}")
            }
        }
        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                HEXLOWER.decode(text.as_bytes()).ok().and_then(|bytes| bytes.try_into().ok()).map(Self).ok_or_else(|| {
                    IdError(format!("'{}' is not {} of {} hexadecimal digits", crate::text::escape(text), $what, 2 * $length))
                })
            }
        }
        text_in_json!($name);
    };
}

bytes_id!(
    /// A deployment on one provider. Derived from its owner and the request that made it, so that repeating a request cannot make two.
    DeploymentId, 16, "a deployment id"
);
bytes_id!(
    /// 128 random bits that name one request for ever (SECURITY M1).
    RequestId, 16, "a request id"
);
bytes_id!(
    /// 128 random bits that a daemon draws at each start (SECURITY M3).
    Incarnation, 16, "an incarnation"
);
bytes_id!(
    /// BLAKE3 hash of the exact bytes of a signed request; replies name it.
    RequestHash, 32, "a request hash"
);

impl DeploymentId {
    /// The id of the deployment that `request` of `owner` makes.
    pub fn derive(owner: &PeerId, request: &RequestId) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("peer-compute 2026 deployment id");
        hasher.update(&(owner.to_bytes().len() as u64).to_be_bytes());
        hasher.update(&owner.to_bytes());
        hasher.update(&request.0);
        let mut id = [0; 16];
        hasher.finalize_xof().fill(&mut id);
        Self(id)
    }

    /// First twelve digits, enough for people.
    pub fn short(&self) -> String {
        HEXLOWER.encode(&self.0[..6])
    }
}

/// A SHA-256 digest in the notation of the OCI image specification: `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Encode, Decode)]
#[serde(try_from = "String", into = "String")]
#[cbor(transparent)]
pub struct Digest(
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub [u8; 32],
);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The 64 digits without the algorithm's name.
    pub fn hex(&self) -> String {
        HEXLOWER.encode(&self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for Digest {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        text.strip_prefix("sha256:")
            .and_then(|hex| HEXLOWER.decode(hex.as_bytes()).ok())
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| IdError(format!("'{}' is not a digest (sha256:<64 digits>)", crate::text::escape(text))))
    }
}

text_in_json!(Digest);

text_id!(
    /// A name that a person gives to a peer or a deployment: 1 to 63 of `a-z 0-9 - _ .`, beginning with a letter or digit.
    Name
);

impl FromStr for Name {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let valid = (1..=63).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.'))
            && text.as_bytes()[0].is_ascii_alphanumeric();
        if valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdError(format!(
                "'{}' is not a name: use 1 to 63 of a-z, 0-9, '-', '_' and '.', beginning with a letter or digit",
                crate::text::escape(text)
            )))
        }
    }
}

/// The leftmost DNS label of a deployment's public name: lower-case base32 of the first 120 bits of
/// BLAKE3(context, provider, deployment), so that a claim to it proves itself (V8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label([u8; 15]);

fn base32_lower() -> Encoding {
    let mut specification = Specification::new();
    specification.symbols.push_str("abcdefghijklmnopqrstuvwxyz234567");
    specification.encoding().expect("32 distinct symbols")
}

impl Label {
    /// The only label that `provider` can serve `deployment` under.
    pub fn derive(provider: &PeerId, deployment: &DeploymentId) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("peer-compute 2026 gateway label");
        hasher.update(&(provider.to_bytes().len() as u64).to_be_bytes());
        hasher.update(&provider.to_bytes());
        hasher.update(&deployment.0);
        let mut label = [0; 15];
        hasher.finalize_xof().fill(&mut label);
        Self(label)
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&base32_lower().encode(&self.0))
    }
}

impl FromStr for Label {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        base32_lower()
            .decode(text.to_ascii_lowercase().as_bytes())
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| IdError(format!("'{}' is not a deployment's label", crate::text::escape(text))))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use super::*;
    use crate::identity::Identity;

    #[test]
    fn names_are_strict() {
        for text in ["web", "web-1", "0x", "a.b_c"] {
            assert!(text.parse::<Name>().is_ok(), "{text}");
        }
        for text in ["", "-web", "Web", "a b", "a/b", "--privileged", "ä", "a\n", &"a".repeat(64)] {
            assert!(text.parse::<Name>().is_err(), "{text}");
        }
    }

    #[test]
    fn v8_label_depends_on_provider_and_deployment_alone() {
        let (one, other) = (Identity::generate().peer_id(), Identity::generate().peer_id());
        let deployment = DeploymentId::random();
        assert_eq!(Label::derive(&one, &deployment), Label::derive(&one, &deployment));
        assert_ne!(Label::derive(&one, &deployment), Label::derive(&other, &deployment));
        let label = Label::derive(&one, &deployment).to_string();
        assert_eq!(label.len(), 24);
        assert_eq!(label.parse::<Label>().unwrap(), Label::derive(&one, &deployment));
    }

    #[test]
    fn ids_round_trip_as_text() {
        let id = DeploymentId::random();
        assert_eq!(id.to_string().parse::<DeploymentId>().unwrap(), id);
        let digest = Digest::of(b"layer");
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert!("sha256:AB".parse::<Digest>().is_err());
    }
}
