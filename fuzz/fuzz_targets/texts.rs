//! What people and files write: whatever is accepted is written in a way that is accepted again and means the same.
#![no_main]

use std::{fmt, str::FromStr};

use libfuzzer_sys::fuzz_target;
use peer_proto::{
    deploy::{RegistryReference, RestartPolicy, Variable},
    id::{DeploymentId, Digest, Label, Name, RequestId},
    text::escape,
    unit::{ByteSize, Millicores, Port, Span},
};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    round_trip::<Millicores>(text);
    round_trip::<Port>(text);
    round_trip::<Span>(text);
    round_trip::<Name>(text);
    round_trip::<Digest>(text);
    round_trip::<Label>(text);
    round_trip::<DeploymentId>(text);
    round_trip::<RequestId>(text);
    round_trip::<RegistryReference>(text);
    round_trip::<RestartPolicy>(text);
    if let Ok(size) = text.parse::<ByteSize>() {
        // Shown rounded; in plain bytes it is exact.
        assert_eq!(size.get().to_string().parse(), Ok(size));
        assert!(size.get() > 0 && !size.to_string().is_empty());
    }
    if let Ok(variable) = text.parse::<Variable>() {
        assert_eq!(format!("{}={}", variable.name, variable.value), text);
        assert!(!variable.value.contains('\0'));
    }
    // What is shown to people holds nothing that steers a terminal.
    assert!(!escape(text).chars().any(char::is_control), "{text:?}");
});

fn round_trip<T: FromStr + fmt::Display + fmt::Debug + PartialEq>(text: &str) {
    if let Ok(value) = text.parse::<T>() {
        let written = value.to_string();
        assert!(written.parse::<T>().is_ok_and(|read| read == value), "{text:?} is written as {written:?}");
    }
}
