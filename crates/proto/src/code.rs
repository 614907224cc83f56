//! Stable codes: what scripts match on, what the audit log records, and how a process exits.

use std::fmt;

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[$doc:meta])* $number:literal $variant:ident $text:literal $exit:ident,)*) => {
        /// Why something was not done. Text and number never change their meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Encode, Decode)]
        #[cbor(index_only)]
        pub enum Code {
            $($(#[$doc])* #[n($number)] #[serde(rename = $text)] $variant,)*
        }

        impl Code {
            /// Every code, for documents and tests.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The stable text.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }

            /// The exit status of `peerctl` for this code.
            pub fn exit_status(self) -> ExitStatus {
                match self { $(Self::$variant => ExitStatus::$exit),* }
            }
        }
    };
}

codes! {
    /// The command line or a field of the request is wrong.
    0 InvalidArgument "invalid_argument" Usage,
    /// A message could not be decoded.
    1 Malformed "malformed" Refused,
    /// A signature does not hold.
    2 InvalidSignature "invalid_signature" Refused,
    /// The request was made for another machine.
    3 WrongAudience "wrong_audience" Refused,
    /// The request was signed by somebody else than its sender.
    4 WrongSigner "wrong_signer" Refused,
    /// The two clocks differ by more than the allowed drift.
    5 ClockDrift "clock_drift" Refused,
    /// The request is past its own end.
    6 Expired "expired" Refused,
    /// The request has been made before; its recorded outcome is named.
    7 DuplicateRequest "duplicate_request" Refused,
    /// The request was made for an earlier run of the daemon.
    8 StaleIncarnation "stale_incarnation" Refused,
    /// Too many requests are remembered for this peer; try again later.
    9 TooManyRequests "too_many_requests" Busy,
    /// The peer is not in the trust list.
    10 UntrustedPeer "untrusted_peer" Refused,
    /// The peer lacks the grant for this.
    11 NotGranted "not_granted" Refused,
    /// The grant's limit does not allow it.
    12 OverLimit "over_limit" Refused,
    /// The machine has no room at present.
    13 NoCapacity "no_capacity" Busy,
    /// There is no such deployment (or it belongs to somebody else).
    14 NoSuchDeployment "no_such_deployment" NotFound,
    /// A name or an id prefix fits more than one thing.
    15 Ambiguous "ambiguous" Usage,
    /// A deployment of that name exists.
    16 NameTaken "name_taken" Refused,
    /// The deployment is in a state that does not allow this.
    17 WrongState "wrong_state" Refused,
    /// No peer of that name or id is in the trust list.
    18 UnknownPeer "unknown_peer" NotFound,
    /// The peer cannot be reached.
    19 PeerOffline "peer_offline" Unavailable,
    /// The peer closed the connection at its gate.
    20 RefusedByPeer "refused_by_peer" Refused,
    /// Something took longer than it may.
    21 Timeout "timeout" Unavailable,
    /// The container engine does not answer.
    22 EngineUnavailable "engine_unavailable" Unavailable,
    /// The container engine refused or failed.
    23 EngineFailed "engine_failed" Failed,
    /// The image cannot be read or is not an image.
    24 InvalidImage "invalid_image" Usage,
    /// There is no such image.
    25 NoSuchImage "no_such_image" NotFound,
    /// Bytes do not have the digest that was promised.
    26 DigestMismatch "digest_mismatch" Refused,
    /// The image is larger than allowed.
    27 ImageTooLarge "image_too_large" Refused,
    /// A layer that was wanted never came.
    28 MissingLayer "missing_layer" Failed,
    /// The container differs from its isolation profile.
    29 IsolationViolated "isolation_violated" Failed,
    /// The container ended by itself.
    30 ContainerExited "container_exited" Failed,
    /// The container wrote its log faster than allowed.
    31 LogFlood "log_flood" Failed,
    /// The disk is full.
    32 DiskFull "disk_full" Failed,
    /// The invitation is unknown, used or expired.
    33 InvalidTicket "invalid_ticket" Refused,
    /// The daemon has no identity yet.
    34 NoIdentity "no_identity" NotReady,
    /// The daemon has an identity already.
    35 IdentityExists "identity_exists" Refused,
    /// The local daemon does not answer.
    36 DaemonUnavailable "daemon_unavailable" NotReady,
    /// No gateway is set.
    37 NoGateway "no_gateway" NotReady,
    /// The gateway refuses this provider or this claim.
    38 GatewayRefused "gateway_refused" Refused,
    /// There is no such gateway in the list.
    39 UnknownGateway "unknown_gateway" NotFound,
    /// The audit log does not verify.
    40 AuditBroken "audit_broken" Failed,
    /// The port is not the one that the deployment exposes, or nothing listens there.
    41 PortClosed "port_closed" Unavailable,
    /// A fault in the program itself.
    42 Internal "internal" Failed,
    /// The peer of that name or id is in the trust list already.
    43 PeerExists "peer_exists" Refused,
    /// The machine is shutting down.
    44 ShuttingDown "shutting_down" Unavailable,
    /// The peer's program is of a version that does not understand this.
    45 UnsupportedVersion "unsupported_version" Failed,
    /// A file cannot be read or written.
    46 FileFailed "file_failed" Failed,
    /// This machine's clock stands before a time that it has shown already.
    47 ClockBehind "clock_behind" Refused,
    /// We have deployments on the peer that is to be removed.
    48 DeploymentsThere "deployments_there" Refused,
    /// The identity is sealed and has not been unlocked since the daemon began.
    49 Locked "locked" NotReady,
    /// The passphrase does not open the identity.
    50 WrongPassphrase "wrong_passphrase" Refused,
    /// The machine cannot isolate as was demanded.
    51 IsolationLacking "isolation_lacking" Refused,
    /// The key has been ended by a statement, and is refused for ever.
    53 RevokedKey "revoked_key" Refused,
    /// The words are no recovery phrase, or not the one of this machine.
    54 WrongRecoveryPhrase "wrong_recovery_phrase" Refused,
    /// The machine does not offer ways out of containers, or networks between them.
    56 EgressUnavailable "egress_unavailable" Refused,
    /// The provider's owner has paused it, or it lends itself at other hours.
    52 Paused "paused" Busy,
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a program of ours exits. Documented in `docs/cli.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// Done.
    Success = 0,
    /// Failed while doing it.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// There is no such thing.
    NotFound = 3,
    /// Refused: by a grant, a limit, a signature or a state.
    Refused = 4,
    /// Somebody else does not answer.
    Unavailable = 5,
    /// No room now; later perhaps.
    Busy = 6,
    /// Something must be set up first.
    NotReady = 7,
}

/// The threat that a refusal answers (`docs/threat-model.md`). The audit log names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the ids are explained in docs/threat-model.md")]
pub enum Threat {
    G1,
    G2,
    G3,
    G4,
    G5,
    G6,
    V1,
    V2,
    V3,
    V4,
    V4n,
    V5,
    V6,
    V7,
    V8,
    I1,
    I2,
    I3,
    I4,
    I5,
}

impl fmt::Display for Threat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A failure as it crosses a process or a wire: a stable code and one sentence for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode, thiserror::Error)]
#[cbor(map)]
#[error("{message}")]
pub struct Problem {
    /// Stable code.
    #[n(0)]
    pub code: Code,
    /// What failed, on what, and what to do.
    #[n(1)]
    pub message: String,
}

impl Problem {
    /// A failure with its sentence.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_and_numbers_are_unique() {
        let texts: std::collections::BTreeSet<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
        let numbers: std::collections::BTreeSet<_> = Code::ALL.iter().map(crate::frame::encode).collect();
        assert_eq!((texts.len(), numbers.len()), (Code::ALL.len(), Code::ALL.len()));
    }
}
