//! Signed requests (V2, V3; SECURITY M1) and signed answers (M2).
//!
//! The bytes that were signed travel as they are. [`open`] checks in a fixed order: size, decoding, signer, audience,
//! drift, signature; whatever it returns has passed all of them. Replay and authorisation come next, in `peer-trust`.

use libp2p_identity::PeerId;
use minicbor::{Decode, Encode};

use crate::code::{Code, Problem};
use crate::deploy::{Reply, Request};
use crate::frame::{CONTROL_FRAME_MAX, FrameError, decode_strict, encode, peer_id};
use crate::id::{Incarnation, RequestHash, RequestId};
use crate::identity::{Context, Identity, Sealed, SignatureError};
use crate::unit::Timestamp;

/// Allowed difference of two clocks, either way (milliseconds). The threat model's five minutes.
pub const DRIFT_MAX_MILLISECONDS: u64 = 5 * 60 * 1000;
/// Longest life of a request (milliseconds).
pub const LIFE_MAX_MILLISECONDS: u64 = 15 * 60 * 1000;
/// Life that we give to our own requests (milliseconds).
const LIFE_MILLISECONDS: u64 = 5 * 60 * 1000;

/// What is signed.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct Statement {
    #[n(0)]
    version: u8,
    #[n(1)]
    #[cbor(with = "peer_id")]
    signer: PeerId,
    /// Rises when the signer's key is certified anew.
    #[n(2)]
    signer_epoch: u64,
    #[n(3)]
    #[cbor(with = "peer_id")]
    audience: PeerId,
    #[n(4)]
    incarnation: Incarnation,
    #[n(5)]
    request: RequestId,
    #[n(6)]
    issued_at: Timestamp,
    #[n(7)]
    not_after: Timestamp,
    #[n(8)]
    body: Request,
}

/// Why an envelope is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// Too long, or not in the one accepted form.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Of a version that this program does not know.
    #[error("request has version {0}; this program understands version 1: update the older side")]
    Version(u8),
    /// Signed in the name of somebody else than its sender.
    #[error("request names {0} as its signer, but another peer sent it")]
    Signer(PeerId),
    /// Made for another machine.
    #[error("request was made for another machine")]
    Audience,
    /// The clocks disagree.
    #[error("{}", drift_sentence(*.issued_at, *.now))]
    Drift {
        /// The signer's clock.
        issued_at: Timestamp,
        /// Our clock.
        now: Timestamp,
    },
    /// Its time is over, or longer than allowed.
    #[error("request is past its end")]
    Expired,
    /// The signature does not hold.
    #[error(transparent)]
    Signature(#[from] SignatureError),
}

fn drift_sentence(issued_at: Timestamp, now: Timestamp) -> String {
    let (direction, milliseconds) =
        if issued_at > now { ("ahead of", issued_at.since(now)) } else { ("behind", now.since(issued_at)) };
    format!(
        "the requester's clock is {} {direction} the provider's clock (at most 5 min are accepted); set the wrong one right",
        duration_sentence(milliseconds)
    )
}

fn duration_sentence(milliseconds: u64) -> String {
    match milliseconds / 1000 {
        seconds if seconds < 120 => format!("{seconds} s"),
        seconds if seconds < 7200 => format!("{} min", seconds / 60),
        seconds if seconds < 172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

impl EnvelopeError {
    /// The stable code.
    pub fn code(&self) -> Code {
        match self {
            Self::Frame(_) => Code::Malformed,
            Self::Version(_) => Code::UnsupportedVersion,
            Self::Signer(_) => Code::WrongSigner,
            Self::Audience => Code::WrongAudience,
            Self::Drift { .. } => Code::ClockDrift,
            Self::Expired => Code::Expired,
            Self::Signature(_) => Code::InvalidSignature,
        }
    }

    /// As it is told to the sender.
    pub fn to_problem(&self) -> Problem {
        Problem::new(self.code(), self.to_string())
    }
}

/// A request whose signature, signer, audience and times have been checked. Made by [`open`] alone, and by [`open_kept`]
/// for what was opened in its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    statement: Statement,
    hash: RequestHash,
    envelope: Vec<u8>,
}

impl Signed {
    /// Who signed.
    pub fn signer(&self) -> PeerId {
        self.statement.signer
    }

    /// The request's own id.
    pub fn request_id(&self) -> RequestId {
        self.statement.request
    }

    /// Hash of the signed bytes, which every reply names.
    pub fn hash(&self) -> RequestHash {
        self.hash
    }

    /// The machine that the request was made for.
    pub fn audience(&self) -> PeerId {
        self.statement.audience
    }

    /// The envelope as it came, for [`open_kept`].
    pub fn envelope(&self) -> &[u8] {
        &self.envelope
    }

    /// The run of the daemon that the request was made for.
    pub fn incarnation(&self) -> Incarnation {
        self.statement.incarnation
    }

    /// The moment after which the request must not act.
    pub fn not_after(&self) -> Timestamp {
        self.statement.not_after
    }

    /// What is asked.
    pub fn body(&self) -> &Request {
        &self.statement.body
    }

    /// What is asked, for whoever acts on it.
    pub fn into_body(self) -> Request {
        self.statement.body
    }
}

/// A request ready to be sent.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// The frame's bytes.
    pub bytes: Vec<u8>,
    /// What the answers will name.
    pub hash: RequestHash,
    /// The request's own id.
    pub request_id: RequestId,
}

/// Signs a request for `audience` in its present run.
pub fn seal(
    identity: &Identity,
    audience: PeerId,
    incarnation: Incarnation,
    request_id: RequestId,
    now: Timestamp,
    body: Request,
) -> Outgoing {
    let statement = Statement {
        version: 1,
        signer: identity.peer_id(),
        signer_epoch: 0,
        audience,
        incarnation,
        request: request_id,
        issued_at: now,
        not_after: now.plus(LIFE_MILLISECONDS),
        body,
    };
    let sealed = identity.seal(Context::Request, encode(&statement));
    Outgoing { hash: hash_of(&sealed), bytes: encode(&sealed), request_id }
}

fn hash_of(sealed: &Sealed) -> RequestHash {
    RequestHash(*blake3::hash(&sealed.bytes).as_bytes())
}

/// The hash under which an envelope can be answered even if it is refused; `None` if it is no envelope at all.
pub fn hash_of_bytes(bytes: &[u8]) -> Option<RequestHash> {
    decode_strict(bytes, CONTROL_FRAME_MAX).ok().map(|sealed| hash_of(&sealed))
}

/// Takes an envelope that the authenticated peer `from` sent to `me`.
pub fn open(bytes: &[u8], from: &PeerId, me: &PeerId, now: Timestamp) -> Result<Signed, EnvelopeError> {
    let sealed: Sealed = decode_strict(bytes, CONTROL_FRAME_MAX)?;
    let statement = addressed(&sealed, from, me)?;
    let (issued_at, not_after) = (statement.issued_at, statement.not_after);
    if now.since(issued_at) > DRIFT_MAX_MILLISECONDS || issued_at.since(now) > DRIFT_MAX_MILLISECONDS {
        return Err(EnvelopeError::Drift { issued_at, now });
    }
    // The end is judged with the same tolerance as the beginning: both were read from the signer's clock.
    if not_after.since(issued_at) > LIFE_MAX_MILLISECONDS || now > not_after.plus(DRIFT_MAX_MILLISECONDS) {
        return Err(EnvelopeError::Expired);
    }
    sealed.verify(Context::Request, from)?;
    Ok(Signed { hash: hash_of(&sealed), statement, envelope: bytes.to_vec() })
}

/// Takes an envelope that was opened when it came and has been kept since: everything is checked again but its times. It
/// says what was asked once, and is no reason to do it a second time.
pub fn open_kept(bytes: &[u8], from: &PeerId, me: &PeerId) -> Result<Signed, EnvelopeError> {
    let sealed: Sealed = decode_strict(bytes, CONTROL_FRAME_MAX)?;
    let statement = addressed(&sealed, from, me)?;
    sealed.verify(Context::Request, from)?;
    Ok(Signed { hash: hash_of(&sealed), statement, envelope: bytes.to_vec() })
}

fn addressed(sealed: &Sealed, from: &PeerId, me: &PeerId) -> Result<Statement, EnvelopeError> {
    let statement: Statement = decode_strict(&sealed.bytes, CONTROL_FRAME_MAX)?;
    if statement.version != 1 {
        return Err(EnvelopeError::Version(statement.version));
    }
    if statement.signer != *from {
        return Err(EnvelopeError::Signer(statement.signer));
    }
    if statement.audience != *me {
        return Err(EnvelopeError::Audience);
    }
    Ok(statement)
}

/// Signs one event of an answer.
pub fn seal_reply(identity: &Identity, reply: &Reply) -> Vec<u8> {
    encode(&identity.seal(Context::Reply, encode(reply)))
}

/// Takes one event of the answer to `request` from `provider`; `sequence` is the position expected.
pub fn open_reply(
    bytes: &[u8],
    provider: &PeerId,
    me: &PeerId,
    request: RequestHash,
    sequence: u32,
) -> Result<Reply, EnvelopeError> {
    let sealed: Sealed = decode_strict(bytes, CONTROL_FRAME_MAX)?;
    let reply: Reply = decode_strict(&sealed.bytes, CONTROL_FRAME_MAX)?;
    if reply.audience != *me || reply.request != request || reply.sequence != sequence {
        return Err(EnvelopeError::Audience);
    }
    sealed.verify(Context::Reply, provider)?;
    Ok(reply)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing parse is a failing test")]
mod tests {
    use super::*;
    use crate::id::DeploymentId;

    const NOW: Timestamp = Timestamp(1_800_000_000_000);

    fn sample(identity: &Identity, audience: PeerId) -> Outgoing {
        let body = Request::Stop(DeploymentId([3; 16]));
        seal(identity, audience, Incarnation([1; 16]), RequestId([2; 16]), NOW, body)
    }

    #[test]
    fn request_round_trips() {
        let (alice, bob) = (Identity::generate(), Identity::generate());
        let outgoing = sample(&alice, bob.peer_id());
        let signed = open(&outgoing.bytes, &alice.peer_id(), &bob.peer_id(), NOW).unwrap();
        assert_eq!((signed.hash(), signed.request_id()), (outgoing.hash, RequestId([2; 16])));
        assert_eq!(signed.into_body(), Request::Stop(DeploymentId([3; 16])));
    }

    #[test]
    fn v2_every_single_bit_flip_is_refused() {
        let (alice, bob) = (Identity::generate(), Identity::generate());
        let bytes = sample(&alice, bob.peer_id()).bytes;
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(open(&changed, &alice.peer_id(), &bob.peer_id(), NOW).is_err(), "bit {bit}");
            assert!(open_kept(&changed, &alice.peer_id(), &bob.peer_id()).is_err(), "bit {bit}, kept");
        }
    }

    #[test]
    fn what_was_sealed_is_read_back_whole() {
        let (alice, bob) = (Identity::generate(), Identity::generate());
        let outgoing = sample(&alice, bob.peer_id());
        assert_eq!(hash_of_bytes(&outgoing.bytes), Some(outgoing.hash));
        assert_eq!(hash_of_bytes(b"no envelope"), None);
        let signed = open(&outgoing.bytes, &alice.peer_id(), &bob.peer_id(), NOW).unwrap();
        assert_eq!((signed.signer(), signed.incarnation()), (alice.peer_id(), Incarnation([1; 16])));
        assert_eq!(signed.not_after(), NOW.plus(300_000), "our own requests live for five minutes");
    }

    /// A request with these times, signed by whoever may.
    fn with_times(identity: &Identity, audience: PeerId, issued_at: Timestamp, not_after: Timestamp) -> Vec<u8> {
        let (signer, body) = (identity.peer_id(), Request::Stop(DeploymentId([3; 16])));
        let (incarnation, request) = (Incarnation([1; 16]), RequestId([2; 16]));
        let statement = Statement {
            version: 1,
            signer,
            signer_epoch: 0,
            audience,
            incarnation,
            request,
            issued_at,
            not_after,
            body,
        };
        encode(&identity.seal(Context::Request, encode(&statement)))
    }

    #[test]
    fn v3_life_and_end_are_judged_to_the_millisecond() {
        const MINUTE: u64 = 60_000;
        let (alice, bob) = (Identity::generate(), Identity::generate());
        let judged = |issued_at: u64, not_after: u64| {
            let bytes = with_times(&alice, bob.peer_id(), Timestamp(issued_at), Timestamp(not_after));
            open(&bytes, &alice.peer_id(), &bob.peer_id(), NOW).map(|_| ()).map_err(|error| error.code())
        };
        let now = NOW.0;
        for (issued_at, not_after, expected) in [
            (now, now + 15 * MINUTE, Ok(())),
            (now, now + 15 * MINUTE + 1, Err(Code::Expired)),
            (now, now + 60 * MINUTE, Err(Code::Expired)),
            (now - 5 * MINUTE, now - 5 * MINUTE, Ok(())),
            (now - 5 * MINUTE, now - 5 * MINUTE - 1, Err(Code::Expired)),
            (now, now - 10 * MINUTE, Err(Code::Expired)),
            (now - 5 * MINUTE - 1, now, Err(Code::ClockDrift)),
            (now + 5 * MINUTE, now + 6 * MINUTE, Ok(())),
            (now + 5 * MINUTE + 1, now + 6 * MINUTE, Err(Code::ClockDrift)),
        ] {
            assert_eq!(judged(issued_at, not_after), expected, "{issued_at} to {not_after}");
        }
    }

    #[test]
    fn a_difference_is_told_in_the_unit_that_fits() {
        for (milliseconds, text) in [
            (0, "0 s"),
            (119_999, "119 s"),
            (120_000, "2 min"),
            (7_199_999, "119 min"),
            (7_200_000, "2 h"),
            (172_799_999, "47 h"),
            (172_800_000, "2 days"),
            (864_000_000, "10 days"),
        ] {
            assert_eq!(duration_sentence(milliseconds), text);
        }
        assert!(drift_sentence(NOW.plus(1_000), NOW).contains("1 s ahead of"));
        assert!(drift_sentence(NOW, NOW.plus(1_000)).contains("1 s behind"));
        assert!(drift_sentence(NOW, NOW).contains("0 s behind"));
    }

    /// What the signature keeps out: bytes that were changed on the way are sound requests for something else.
    #[test]
    fn control_v2_g2_without_the_signature_changed_bytes_are_other_requests() {
        let (alice, bob) = (Identity::generate(), Identity::generate());
        let sealed: Sealed = decode_strict(&sample(&alice, bob.peer_id()).bytes, CONTROL_FRAME_MAX).unwrap();
        let sound: Statement = decode_strict(&sealed.bytes, CONTROL_FRAME_MAX).unwrap();
        let mut others = 0;
        for bit in 0..sealed.bytes.len() * 8 {
            let mut changed = sealed.clone();
            changed.bytes[bit / 8] ^= 1 << (bit % 8);
            let Ok(other) = decode_strict::<Statement>(&changed.bytes, CONTROL_FRAME_MAX) else { continue };
            if other.body != sound.body && other.signer == sound.signer && other.audience == sound.audience {
                others += 1;
                assert!(changed.verify(Context::Request, &alice.peer_id()).is_err(), "bit {bit}");
            }
        }
        assert!(others >= 128, "every bit of the deployment's id names another: {others}");
    }

    #[test]
    fn v2_another_sender_and_v3_another_audience_are_refused() {
        let (alice, bob, carol) = (Identity::generate(), Identity::generate(), Identity::generate());
        let bytes = sample(&alice, bob.peer_id()).bytes;
        let as_carol = open(&bytes, &carol.peer_id(), &bob.peer_id(), NOW).unwrap_err();
        assert_eq!(as_carol.code(), Code::WrongSigner);
        let to_carol = open(&bytes, &alice.peer_id(), &carol.peer_id(), NOW).unwrap_err();
        assert_eq!(to_carol.code(), Code::WrongAudience);
        let kept = |from: &Identity, me: &Identity| open_kept(&bytes, &from.peer_id(), &me.peer_id());
        assert_eq!(kept(&carol, &bob).unwrap_err().code(), Code::WrongSigner);
        assert_eq!(kept(&alice, &carol).unwrap_err().code(), Code::WrongAudience);
        assert_eq!(kept(&alice, &bob).unwrap().envelope(), bytes);
    }

    #[test]
    fn v3_drift_of_more_than_five_minutes_is_refused_with_whose_and_how_much() {
        let (alice, bob) = (Identity::generate(), Identity::generate());
        let bytes = sample(&alice, bob.peer_id()).bytes;
        let at = |now| open(&bytes, &alice.peer_id(), &bob.peer_id(), now);
        assert!(at(NOW.plus(300_000)).is_ok());
        assert!(at(Timestamp(NOW.0 - 300_000)).is_ok());
        assert_eq!(at(NOW.plus(300_001)).unwrap_err().code(), Code::ClockDrift);
        let ahead = at(Timestamp(NOW.0 - 420_000)).unwrap_err();
        assert!(ahead.to_string().contains("requester's clock is 7 min ahead of"), "{ahead}");
    }

    #[test]
    fn reply_is_bound_to_request_audience_and_position() {
        let (alice, bob) = (Identity::generate(), Identity::generate());
        let outgoing = sample(&alice, bob.peer_id());
        let event = Event::Removed(DeploymentId([3; 16]));
        let reply = Reply { request: outgoing.hash, audience: alice.peer_id(), sequence: 0, at: NOW, event };
        let bytes = seal_reply(&bob, &reply);
        let me = alice.peer_id();
        assert_eq!(open_reply(&bytes, &bob.peer_id(), &me, outgoing.hash, 0), Ok(reply));
        assert!(open_reply(&bytes, &bob.peer_id(), &me, RequestHash([0; 32]), 0).is_err());
        assert!(open_reply(&bytes, &bob.peer_id(), &me, outgoing.hash, 1).is_err());
        assert!(open_reply(&bytes, &alice.peer_id(), &me, outgoing.hash, 0).is_err());
    }

    use crate::deploy::Event;
}
