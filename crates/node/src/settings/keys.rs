//! The keys: their names, what they mean, and how they are called as flags and variables.

/// One key of the configuration.
#[derive(Debug)]
pub(super) struct Key {
    /// As in the file; the flag has hyphens instead.
    pub(super) name: &'static str,
    /// What the flag's help calls its value.
    pub(super) value: &'static str,
    /// What it means.
    pub(super) help: &'static str,
    /// Whether it takes several values: an array in the file, separated by commas elsewhere.
    pub(super) list: bool,
}

impl Key {
    /// The environment variable.
    pub(super) fn variable(&self) -> String {
        format!("PEER_{}", self.name.to_ascii_uppercase())
    }

    /// The flag without its leading hyphens.
    pub(super) fn flag(&self) -> String {
        self.name.replace('_', "-")
    }

    /// The values in a text of a flag or a variable.
    pub(super) fn split(&self, text: &str) -> Vec<String> {
        if !self.list {
            return vec![text.to_owned()];
        }
        text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect()
    }
}

const fn one(name: &'static str, value: &'static str, help: &'static str) -> Key {
    Key { name, value, help, list: false }
}

const fn list(name: &'static str, value: &'static str, help: &'static str) -> Key {
    Key { name, value, help, list: true }
}

/// Every key, in the order in which they are explained.
pub(super) const KEYS: &[Key] = &[
    one("data_dir", "PATH", "Directory of everything durable: key, database, arriving layers"),
    one("socket", "PATH", "Unix socket of the local interface, in a directory of its own"),
    one("socket_owner", "USER", "User (name or uid) who may use the local interface beside root"),
    one("user", "ACCOUNT", "Account (name or uid) of the process that hears from other machines; root's daemon only"),
    list("listen", "ADDRESS", "Addresses to listen on for peers, such as /ip4/0.0.0.0/tcp/4100"),
    list("announce", "ADDRESS", "Addresses that the card names instead of those listened on"),
    one("engine", "KIND", "Container engine: docker, or none to run nobody's containers"),
    one("engine_socket", "PATH", "Unix socket of the container engine"),
    one("runtime", "NAME", "Runtime that runs every container of a peer, such as runsc; the engine's own if unset"),
    one("guest_program", "PATH", "Program to run inside containers' networks where the daemon may not enter them"),
    one("offer_cpu", "CPU", "Processors that all peers together may use, such as 1.5"),
    one("offer_memory", "SIZE", "Memory that all peers together may use, such as 4g"),
    one("offer_containers", "NUMBER", "Deployments that all peers together may hold"),
    one("image_size_max", "SIZE", "Largest image accepted, unpacked"),
    one("image_keep", "SPAN", "How long an image that peers brought is kept when nothing uses it, such as 24h"),
    one("transfer_patience", "SPAN", "How long a deployment waits for its image when nothing arrives, such as 2m"),
    one("egress", "LEVEL", "Ways out of containers by grant: auto, if the test of the wall passes, or off"),
    list("egress_subnets", "RANGE", "IPv4 ranges for containers with a way out, which nobody else may use"),
    list(
        "egress_resolvers",
        "ADDRESS",
        "Resolvers to ask for those containers, such as 192.0.2.53, not this machine's own",
    ),
    one("metrics_listen", "HOST:PORT", "Loopback address to serve metrics on as well"),
    one("log", "FILTER", "What is logged, such as info or peer_node=debug,warn"),
    one("log_format", "FORMAT", "text or json"),
    one(
        "passphrase_file",
        "PATH",
        "File with the passphrase of a sealed identity, such as /dev/fd/3 or a systemd credential",
    ),
    one("max_connections", "NUMBER", "Established connections, over all peers"),
    one("max_connections_per_address", "NUMBER", "Established inbound connections from one address"),
    one("max_connections_per_peer", "NUMBER", "Established connections with one peer"),
    one("max_streams_per_peer", "NUMBER", "Streams that one peer may have open here, over all of its connections"),
    one("max_queries_per_peer", "NUMBER", "Reads that one peer may send in a second"),
    one("max_requests_per_peer", "NUMBER", "Signed requests that one peer may send in a minute"),
    one("max_handshakes", "NUMBER", "Inbound handshakes in progress, over all addresses"),
    one("max_handshakes_per_address", "NUMBER", "Inbound handshakes in progress from one address"),
];

/// The key of this name.
pub(super) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}
