//! Counters in Prometheus' text format, served on a loopback address where the operator asks for it.

use std::fmt;

use std::sync::atomic::AtomicU64;

use http::StatusCode;
use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

type ByText = Family<[(&'static str, &'static str); 1], Counter>;

/// What is read at the moment of asking.
#[derive(Debug, Clone, Copy, Default)]
pub struct Levels {
    /// Connections of visitors.
    pub connections: usize,
    /// Live names.
    pub leases: usize,
    /// Providers that hold names.
    pub providers: usize,
    /// Streams to deployments that wait for another request.
    pub idle_streams: usize,
    /// Streams to deployments opened since the start.
    pub streams_opened: u64,
    /// Buckets of the rate limits.
    pub rate_entries: usize,
}

/// All counters of the gateway.
pub struct Metrics {
    registry: Registry,
    responses: ByText,
    pages: ByText,
    connections_refused: ByText,
    relays: Gauge,
    connections: Gauge,
    leases: Gauge,
    providers: Gauge,
    idle_streams: Gauge,
    rate_entries: Gauge,
    streams_opened: Counter<u64, AtomicU64>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// A switched connection is open.
#[derive(Debug)]
pub struct RelayCount(Gauge);

impl Drop for RelayCount {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("peergate"),
            responses: ByText::default(),
            pages: ByText::default(),
            connections_refused: ByText::default(),
            relays: Gauge::default(),
            connections: Gauge::default(),
            leases: Gauge::default(),
            providers: Gauge::default(),
            idle_streams: Gauge::default(),
            rate_entries: Gauge::default(),
            streams_opened: Counter::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register("responses", "Answers to visitors, by class of status", self.responses.clone());
        registry.register("pages", "Answers that the gateway gave itself, by code", self.pages.clone());
        registry.register(
            "connections_refused",
            "Connections of visitors that were closed before any request, by reason",
            self.connections_refused.clone(),
        );
        registry.register("tunnel_streams_opened", "Streams opened to deployments", self.streams_opened.clone());
        for (name, help, gauge) in [
            ("connections", "Connections of visitors", &self.connections),
            ("leases", "Live names", &self.leases),
            ("providers", "Providers that hold names", &self.providers),
            ("tunnel_streams_idle", "Streams to deployments that wait for another request", &self.idle_streams),
            ("websocket_connections", "Connections switched to WebSocket", &self.relays),
            ("rate_limit_entries", "Buckets of the rate limits", &self.rate_entries),
        ] {
            registry.register(name, help, gauge.clone());
        }
    }

    /// Counts an answer.
    pub fn count_response(&self, status: StatusCode) {
        let class = match status.as_u16() / 100 {
            1 => "1xx",
            2 => "2xx",
            3 => "3xx",
            4 => "4xx",
            _ => "5xx",
        };
        self.responses.get_or_create(&[("class", class)]).inc();
    }

    /// Counts a page of the gateway.
    pub fn count_page(&self, code: &'static str) {
        self.pages.get_or_create(&[("code", code)]).inc();
    }

    /// Counts a connection that ended before any request.
    pub fn count_refused_connection(&self, reason: &'static str) {
        self.connections_refused.get_or_create(&[("reason", reason)]).inc();
    }

    /// Counts a switched connection until the value is dropped.
    pub fn count_relay(&self) -> RelayCount {
        self.relays.inc();
        RelayCount(self.relays.clone())
    }

    /// All counters as text, with the levels of this moment.
    pub fn render(&self, levels: Levels) -> Result<String, fmt::Error> {
        for (gauge, level) in [
            (&self.connections, levels.connections),
            (&self.leases, levels.leases),
            (&self.providers, levels.providers),
            (&self.idle_streams, levels.idle_streams),
            (&self.rate_entries, levels.rate_entries),
        ] {
            gauge.set(i64::try_from(level).unwrap_or(i64::MAX));
        }
        let behind = levels.streams_opened.saturating_sub(self.streams_opened.get());
        self.streams_opened.inc_by(behind);
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;

    #[test]
    fn text_holds_counters_and_levels() {
        let metrics = Metrics::default();
        metrics.count_response(StatusCode::NOT_FOUND);
        metrics.count_page("no_such_name");
        let relay = metrics.count_relay();
        let text = metrics.render(Levels { leases: 3, streams_opened: 5, ..Levels::default() }).unwrap();
        for line in [
            "peergate_responses_total{class=\"4xx\"} 1",
            "peergate_pages_total{code=\"no_such_name\"} 1",
            "peergate_leases 3",
            "peergate_tunnel_streams_opened_total 5",
            "peergate_websocket_connections 1",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
        drop(relay);
        assert!(metrics.render(Levels::default()).unwrap().contains("peergate_websocket_connections 0"));
    }
}
