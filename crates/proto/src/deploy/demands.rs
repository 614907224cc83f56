//! What a requester demands of the machine that runs his deployment. Demands are met or refused, never lowered.

use std::str::FromStr;

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::id::text_id;

text_id!(
    /// Name of a runtime in the engine, such as `runsc`: 1 to 64 of `a-z 0-9 . _ -`, beginning with a letter or digit.
    RuntimeName
);

impl FromStr for RuntimeName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-');
        let valid =
            (1..=64).contains(&text.len()) && text.bytes().all(plain) && text.as_bytes()[0].is_ascii_alphanumeric();
        if valid {
            return Ok(Self(text.to_owned()));
        }
        let shown = crate::text::escape(text);
        Err(format!("'{shown}' is not a runtime's name; use 1 to 64 of a-z, 0-9, '.', '_' and '-', such as runsc"))
    }
}

/// What the machine must have.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[serde(deny_unknown_fields)]
#[cbor(map)]
pub struct Demands {
    /// That users of containers are mapped to others of the host.
    #[n(0)]
    pub user_namespace: bool,
    /// That the container is run by this runtime.
    #[n(1)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<RuntimeName>,
}

impl Demands {
    pub(super) fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// How well a machine keeps containers apart from itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[cbor(map)]
pub struct Isolation {
    /// Whether users of containers are mapped to others of the host.
    #[n(0)]
    pub user_namespace: bool,
    /// The runtime that starts containers.
    #[n(1)]
    pub runtime: String,
    /// Whether a writable root can be given, because the engine keeps to its size.
    #[n(2)]
    pub writable_root: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v4_runtime_names_are_strict() {
        for text in ["runsc", "kata-qemu", "io.containerd.runc.v2"] {
            assert!(text.parse::<RuntimeName>().is_ok(), "{text}");
        }
        for text in ["", "-x", "/bin/sh", "../runc", "a b", "Runc", "a\n", &"a".repeat(65)] {
            assert!(text.parse::<RuntimeName>().is_err(), "{text}");
        }
    }
}
