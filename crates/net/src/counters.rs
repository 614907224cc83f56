//! What the network has done since it started, as plain counters for metrics and tests.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub(crate) $name: AtomicU64,)* }

        /// Values of all counters at one moment.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct CountersSnapshot { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            pub(crate) fn snapshot(&self) -> CountersSnapshot {
                CountersSnapshot { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Connections established and admitted, both directions.
    connections_established,
    /// Inbound connections refused because the PeerId is not admitted.
    connections_not_admitted,
    /// Inbound connections refused because a limit was reached.
    connections_over_limit,
    /// Inbound connections that failed before the PeerId was proven.
    handshakes_failed,
    /// Inbound handshakes in progress now.
    handshakes_pending,
    /// Dials that failed, for any reason.
    dials_failed,
    /// Dials that met another key than the expected one.
    dials_wrong_peer,
    /// Connections that the other side ended before it answered anything.
    refused_by_peer,
    /// Streams opened by us.
    streams_opened,
    /// Streams opened by peers and handed to the program.
    streams_accepted,
    /// Streams opened by peers and reset because a limit was reached.
    streams_refused,
}

/// Adds one.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
