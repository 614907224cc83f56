//! What the fuzz targets and the maker of their seeds share: the same keys and the same moment in every run, and the
//! list of messages.

use peer_proto::{identity::Identity, unit::Timestamp};

/// The moment at which everything happens.
pub const NOW: Timestamp = Timestamp(1_800_000_000_000);

/// Who asks.
pub fn alice() -> Identity {
    Identity::from_seed(&[1; 32])
}

/// Who is asked.
pub fn bob() -> Identity {
    Identity::from_seed(&[2; 32])
}

/// The one-time key of an invitation.
pub fn ticket() -> Identity {
    Identity::from_seed(&[3; 32])
}

/// Calls `$visit!(index, Type, limit)` for every message that travels as a frame; the index is the first byte of an
/// input of the target `frames`.
#[macro_export]
macro_rules! each_message {
    ($visit:ident) => {
        $visit!(0, peer_proto::query::Hello, peer_proto::frame::CONTROL_FRAME_MAX);
        $visit!(1, peer_proto::query::Call, peer_proto::frame::CONTROL_FRAME_MAX);
        $visit!(2, peer_proto::query::Answer, peer_proto::frame::CONTROL_FRAME_MAX);
        $visit!(3, peer_proto::query::LogsQuery, peer_proto::frame::CONTROL_FRAME_MAX);
        $visit!(4, peer_proto::query::LogFrame, peer_proto::frame::CONTROL_FRAME_MAX);
        $visit!(5, peer_proto::query::ForwardHeader, peer_proto::frame::CONTROL_FRAME_MAX);
        $visit!(6, peer_proto::query::StreamReply, peer_proto::frame::CONTROL_FRAME_MAX);
        $visit!(7, peer_proto::deploy::LayerHeader, peer_proto::frame::CONTROL_FRAME_MAX);
        $visit!(8, peer_proto::deploy::LayerReply, peer_proto::frame::CONTROL_FRAME_MAX);
        $visit!(9, peer_proto::deploy::Request, peer_proto::frame::CONTROL_FRAME_MAX);
        $visit!(10, peer_proto::deploy::Reply, peer_proto::frame::CONTROL_FRAME_MAX);
        $visit!(11, peer_proto::tunnel::LeaseRequest, peer_proto::frame::TUNNEL_FRAME_MAX);
        $visit!(12, peer_proto::tunnel::LeaseReply, peer_proto::frame::TUNNEL_FRAME_MAX);
        $visit!(13, peer_proto::tunnel::VisitHeader, peer_proto::frame::TUNNEL_FRAME_MAX);
        $visit!(14, peer_proto::join::JoinReply, peer_proto::frame::INTRODUCTION_FRAME_MAX);
    };
}
