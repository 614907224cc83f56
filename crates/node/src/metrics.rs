//! Counters and gauges in the text form of Prometheus. Labels come from fixed sets, so that nobody outside can add series.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use peer_net::CountersSnapshot;
use peer_proto::code::Code;
use peer_proto::deploy::State;
use peer_proto::unit::Timestamp;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

/// Media type of the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Verb {
    verb: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Refused {
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Refusal {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Deployments {
    state: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Side {
    direction: &'static str,
}

#[derive(Debug, Default)]
struct Values {
    accepted: Family<Verb, Counter>,
    refused_requests: Family<Refused, Counter>,
    replays: Counter,
    connections: Gauge,
    connections_total: Counter,
    refused: Family<Refusal, Counter>,
    handshakes_pending: Gauge,
    streams: Family<Side, Counter>,
    streams_refused: Counter,
    deployments: Family<Deployments, Gauge>,
    visits: Counter,
    visits_open: Gauge,
    layer_bytes: Family<Side, Counter>,
    audit_lines: Gauge,
    started: Gauge<f64, AtomicU64>,
}

/// What the daemon counts; clones share it.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    values: Arc<Values>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// All at zero.
    pub fn new(started_at: Timestamp) -> Self {
        let values = Values::default();
        // Seconds of this century are far below 2^53.
        #[expect(clippy::cast_precision_loss, reason = "milliseconds since 1970 fit the fraction of a double")]
        values.started.set(started_at.0 as f64 / 1000.0);
        let mut registry = Registry::with_prefix("peer");
        register(&mut registry, &values);
        Self { registry: Arc::new(registry), values: Arc::new(values) }
    }

    /// A request of a peer was accepted.
    pub fn accepted(&self, verb: &'static str) {
        self.values.accepted.get_or_create(&Verb { verb }).inc();
    }

    /// A request of a peer was refused.
    pub fn refused(&self, code: Code) {
        self.values.refused_requests.get_or_create(&Refused { code: code.as_str() }).inc();
        if code == Code::DuplicateRequest {
            self.values.replays.inc();
        }
    }

    /// A visit or a forwarded connection begins; it lasts until the guard is dropped.
    pub fn visit(&self) -> Visit {
        self.values.visits.inc();
        self.values.visits_open.inc();
        Visit { open: self.values.visits_open.clone() }
    }

    /// Bytes of layers that were sent to providers.
    pub fn layer_bytes_sent(&self, bytes: u64) {
        self.values.layer_bytes.get_or_create(&Side { direction: "sent" }).inc_by(bytes);
    }

    /// Bytes of layers that arrived from requesters.
    pub fn layer_bytes_received(&self, bytes: u64) {
        self.values.layer_bytes.get_or_create(&Side { direction: "received" }).inc_by(bytes);
    }

    /// Takes over what the network has counted and how many connections it holds.
    pub fn observe_network(&self, counters: &CountersSnapshot, connections: usize) {
        let values = &self.values;
        values.connections.set(i64::try_from(connections).unwrap_or(i64::MAX));
        values.handshakes_pending.set(i64::try_from(counters.handshakes_pending).unwrap_or(i64::MAX));
        store(&values.connections_total, counters.connections_established);
        store(&values.streams_refused, counters.streams_refused);
        for (reason, count) in [
            ("not_admitted", counters.connections_not_admitted),
            ("over_limit", counters.connections_over_limit),
            ("handshake_failed", counters.handshakes_failed),
            ("wrong_key", counters.dials_wrong_peer),
        ] {
            store(&values.refused.get_or_create(&Refusal { reason }), count);
        }
        for (direction, count) in [("sent", counters.streams_opened), ("received", counters.streams_accepted)] {
            store(&values.streams.get_or_create(&Side { direction }), count);
        }
    }

    /// Takes over the states of all deployments on this machine.
    pub fn observe_deployments(&self, states: impl Iterator<Item = State>) {
        let family = &self.values.deployments;
        family.clear();
        for state in states {
            family.get_or_create(&Deployments { state: state.to_string() }).inc();
        }
    }

    /// Takes over the number of lines in the audit log.
    pub fn observe_audit(&self, lines: u64) {
        self.values.audit_lines.set(i64::try_from(lines).unwrap_or(i64::MAX));
    }

    /// Everything as text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a String cannot fail");
        text
    }
}

/// An open visit; dropping it ends it.
#[derive(Debug)]
pub struct Visit {
    open: Gauge,
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.open.dec();
    }
}

fn store(counter: &Counter, value: u64) {
    counter.inner().store(value, Ordering::Relaxed);
}

fn register(registry: &mut Registry, values: &Values) {
    let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION")), ("architecture", std::env::consts::ARCH)]);
    registry.register("build", "The running program", build);
    let started = "When the daemon began, since 1970";
    registry.register_with_unit("process_start_time", started, Unit::Seconds, values.started.clone());
    registry.register("requests_accepted", "Requests of peers by verb", values.accepted.clone());
    registry.register("requests_refused", "Requests of peers by code", values.refused_requests.clone());
    registry.register("replays_refused", "Requests that had been made before", values.replays.clone());
    registry.register("connections", "Live connections", values.connections.clone());
    registry.register("connections_established", "Connections since the start", values.connections_total.clone());
    registry.register("connections_refused", "Connections refused by reason", values.refused.clone());
    registry.register("handshakes_pending", "Inbound handshakes in progress", values.handshakes_pending.clone());
    registry.register("streams", "Streams by the side that opened them", values.streams.clone());
    registry.register("streams_refused", "Streams reset because a limit was reached", values.streams_refused.clone());
    registry.register("deployments", "Deployments on this machine by state", values.deployments.clone());
    registry.register("visits", "Visits and forwarded connections", values.visits.clone());
    registry.register("visits_open", "Visits and forwarded connections at present", values.visits_open.clone());
    registry.register_with_unit("layers", "Layers over the network", Unit::Bytes, values.layer_bytes.clone());
    registry.register("audit_lines", "Lines in the audit log", values.audit_lines.clone());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_holds_what_was_counted() {
        let metrics = Metrics::new(Timestamp(1_700_000_000_500));
        metrics.accepted("deploy");
        metrics.refused(Code::DuplicateRequest);
        metrics.layer_bytes_sent(10);
        let visit = metrics.visit();
        metrics.observe_deployments([State::Running, State::Running, State::Stopped].into_iter());
        metrics.observe_network(&CountersSnapshot { connections_not_admitted: 7, ..CountersSnapshot::default() }, 2);
        metrics.observe_audit(12);
        let text = metrics.text();
        for line in [
            "peer_process_start_time_seconds 1700000000.5",
            "peer_requests_accepted_total{verb=\"deploy\"} 1",
            "peer_requests_refused_total{code=\"duplicate_request\"} 1",
            "peer_replays_refused_total 1",
            "peer_connections 2",
            "peer_connections_refused_total{reason=\"not_admitted\"} 7",
            "peer_deployments{state=\"running\"} 2",
            "peer_layers_bytes_total{direction=\"sent\"} 10",
            "peer_visits_open 1",
            "peer_audit_lines 12",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
        }
        drop(visit);
        metrics.observe_deployments([State::Stopped].into_iter());
        let text = metrics.text();
        assert!(text.contains("peer_visits_open 0") && !text.contains("state=\"running\""));
    }
}
