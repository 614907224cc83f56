//! Every message that travels as a frame: what decodes is within its limit and encodes to the same bytes again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peer_proto::frame::{decode_strict, encode};

fuzz_target!(|data: &[u8]| {
    let Some((kind, bytes)) = data.split_first() else { return };
    macro_rules! check {
        ($index:literal, $message:ty, $limit:expr) => {
            if *kind == $index
                && let Ok(message) = decode_strict::<$message>(bytes, $limit)
            {
                assert!(bytes.len() <= $limit);
                assert_eq!(encode(&message), bytes);
                assert!(!format!("{message:?}").is_empty());
            }
        };
    }
    peer_fuzz::each_message!(check);
    // What a specification's own rules let through is what the engine is asked for.
    if *kind == 9
        && let Ok(peer_proto::deploy::Request::Deploy(request)) =
            decode_strict(bytes, peer_proto::frame::CONTROL_FRAME_MAX)
        && request.specification.check().is_ok()
    {
        let limits = request.specification.limits;
        assert!(limits.pids > 0 && limits.files > 0 && limits.scratch.get() > 0, "{limits:?}");
    }
});
