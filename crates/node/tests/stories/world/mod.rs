//! Machines made of the real programs, each with directories of its own. What a test started or made is gone at its end,
//! also when it fails.

mod gate;
mod host;
mod images;
mod machine;
mod recorder;
mod registry;
mod services;
mod variants;
mod wire;

use std::net::TcpListener;
use std::time::{Duration, Instant};

use peer_proto::id::DeploymentId;

pub(crate) use gate::{Answer, Gate, host_of};
pub(crate) use host::{HOST, Host};
pub(crate) use images::{Files, Loaded, docker, docker_try, hello, noise, ordinary, probe, salted, shell};
pub(crate) use machine::{Forward, Machine, Output, Running};
pub(crate) use recorder::Recorder;
pub(crate) use registry::Registry;
pub(crate) use services::Services;
pub(crate) use variants::variants;
pub(crate) use wire::{Wire, key_of};

/// Longest wait for something that must happen; reaching it fails the test.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// Waits until `look` finds something.
pub(crate) fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "it did not happen: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A port that is free now and that the kernel does not hand out by itself.
pub(crate) fn free_port() -> u16 {
    loop {
        let random = u16::from_be_bytes([DeploymentId::random().0[0], DeploymentId::random().0[0]]);
        let port = 12_000 + random % 18_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A text that no other test and no other run has.
pub(crate) fn salt() -> String {
    DeploymentId::random().to_string()
}

/// The usual pair: alice, who has no engine and may deploy on bob.
pub(crate) struct Pair {
    pub(crate) alice: Machine,
    pub(crate) bob: Machine,
    pub(crate) files: Files,
}

impl Pair {
    /// Alice may hold two processors, two gibibytes and eight deployments.
    pub(crate) fn start() -> Self {
        Self::granted(&["--max-cpu", "2", "--max-memory", "2g", "--max-containers", "8"])
    }

    /// Alice may hold what these flags of `invite` say.
    pub(crate) fn granted(limits: &[&str]) -> Self {
        Self::on(Machine::start("bob"), limits)
    }

    /// The same with this machine as bob.
    pub(crate) fn on(bob: Machine, limits: &[&str]) -> Self {
        let pair = Self { alice: Machine::without_engine("alice"), bob, files: Files::new() };
        pair.alice.join(&pair.bob, limits);
        pair
    }

    /// The same with a provider's daemon that is not root.
    pub(crate) fn without_root() -> Self {
        /// A user whom nobody else is.
        const USER: u32 = 48_123;
        let mut bob = Machine::prepared("bob", &[]).run_by(USER);
        bob.up();
        bob.init();
        let pair = Self { alice: Machine::without_engine("alice"), bob, files: Files::new() };
        pair.alice.join(&pair.bob, &["--max-cpu", "2", "--max-memory", "2g", "--max-containers", "8"]);
        pair
    }

    /// Deploys the example without a gateway, and gives its id.
    pub(crate) fn hello(&self, name: &str, flags: &[&str]) -> String {
        self.alice.deploy_to("bob", &self.files.write(&hello()), name, flags)
    }
}

/// The pair and a gateway through which bob serves.
pub(crate) struct Trio {
    pub(crate) pair: Pair,
    pub(crate) gate: Gate,
}

impl Trio {
    pub(crate) fn start() -> Self {
        Self::of(Pair::start())
    }

    /// This pair and a gateway.
    pub(crate) fn of(pair: Pair) -> Self {
        let gate = Gate::start();
        gate.admit(&pair.bob);
        Self { pair, gate }
    }

    /// Deploys the example published, and gives its id and public address.
    pub(crate) fn hello(&self, name: &str, flags: &[&str]) -> (String, String) {
        let flags = [&["--expose", "8080"], flags].concat();
        let id = self.pair.hello(name, &flags);
        (id, self.url(name))
    }

    /// The public address of a deployment, once it is live.
    pub(crate) fn url(&self, name: &str) -> String {
        eventually("a public address", || Some(self.pair.alice.json(&["status", name])["url"].as_str()?.to_owned()))
    }
}
