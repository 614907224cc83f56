//! What a deployment demands of the machine, and what its owner does, against what the engine has. Met or refused.

use peer_proto::code::{Code, Problem};
use peer_proto::deploy::{Isolation, RuntimeName, Specification};

use crate::engine::EngineFacts;

/// Runtimes that keep the profile: what a requester may ask for, and what an engine's default may be. Others, which pass
/// devices in or change the profile, are the choice of the machine's owner alone.
pub(crate) const RUNTIMES: [&str; 12] = [
    "runc",
    "crun",
    "youki",
    "io.containerd.runc.v2",
    "runsc",
    "io.containerd.runsc.v1",
    "kata",
    "kata-runtime",
    "kata-qemu",
    "kata-clh",
    "kata-fc",
    "io.containerd.kata.v2",
];

/// Refuses what the machine cannot meet, and gives the runtime to name to the engine; none for the engine's own choice.
pub fn meet(specification: &Specification, engine: &EngineFacts) -> Result<Option<RuntimeName>, Problem> {
    let lacking = |message: String| Err(Problem::new(Code::IsolationLacking, message));
    if specification.demands.user_namespace && !maps_users(engine) {
        return lacking(
            "you demand that users are mapped (--require-userns), and the engine of this machine does not map them; \
             its owner can turn it on: `peerctl doctor` there says how"
                .into(),
        );
    }
    if specification.writable_root.is_some() && !engine.sized_root {
        return lacking(format!(
            "a writable root needs an engine that holds it to a size, and this machine's ({}) does not: it needs btrfs, \
             zfs, or overlay2 on xfs with project quotas; use --writable PATH=SIZE, which is memory",
            crate::engine::quote(&engine.storage_driver)
        ));
    }
    let has = |name: &RuntimeName| engine.runtimes.iter().any(|runtime| runtime == name.as_str());
    match (&engine.owner_runtime, &specification.demands.runtime) {
        (Some(owners), _) if !has(owners) => lacking(format!(
            "the owner of this machine has every container run by '{owners}', and its engine does not have that runtime"
        )),
        (Some(owners), Some(asked)) if owners != asked => {
            lacking(format!("you demand the runtime '{asked}', and this machine runs every container by '{owners}'"))
        }
        (Some(owners), _) => Ok(Some(owners.clone())),
        (None, Some(asked)) if !RUNTIMES.contains(&asked.as_str()) || !has(asked) => {
            let known: Vec<_> =
                engine.runtimes.iter().map(String::as_str).filter(|name| RUNTIMES.contains(name)).collect();
            lacking(format!("you demand the runtime '{asked}', and this machine offers {}", known.join(", ")))
        }
        (None, asked) => Ok(asked.clone()),
    }
}

/// What a peer is told before he asks.
pub fn of(engine: &EngineFacts) -> Isolation {
    let runtime = engine.owner_runtime.as_ref().map_or(engine.runtime.as_str(), RuntimeName::as_str);
    Isolation {
        user_namespace: maps_users(engine),
        runtime: crate::engine::quote(runtime),
        writable_root: engine.sized_root,
    }
}

fn maps_users(engine: &EngineFacts) -> bool {
    engine.user_namespace || engine.rootless
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use peer_proto::deploy::Demands;
    use peer_proto::unit::ByteSize;

    use super::*;
    use crate::order::tests::engine;
    use crate::profile::tests::specification;

    fn asking(runtime: &str) -> Specification {
        let demands = Demands { runtime: Some(runtime.parse().unwrap()), ..Demands::default() };
        Specification { demands, ..specification() }
    }

    fn with(runtimes: &[&str], owners: Option<&str>) -> EngineFacts {
        let runtimes = runtimes.iter().map(|name| (*name).to_owned()).collect();
        EngineFacts { runtimes, owner_runtime: owners.map(|name| name.parse().unwrap()), ..engine() }
    }

    fn refused(specification: &Specification, engine: &EngineFacts) -> String {
        let problem = meet(specification, engine).unwrap_err();
        assert_eq!(problem.code, Code::IsolationLacking);
        problem.message
    }

    #[test]
    fn v4_a_runtime_is_the_one_demanded_or_none_runs() {
        let name = |text: &str| Some(text.parse().unwrap());
        let plain = with(&["runc", "runsc", "nvidia"], None);
        assert_eq!(meet(&specification(), &plain), Ok(None));
        assert_eq!(meet(&asking("runsc"), &plain), Ok(name("runsc")));
        assert!(refused(&asking("kata"), &plain).ends_with("offers runc, runsc"));
        // One that passes devices in is not for a requester to choose.
        refused(&asking("nvidia"), &plain);
        let owned = with(&["runc", "strong"], Some("strong"));
        assert_eq!(meet(&specification(), &owned), Ok(name("strong")));
        assert_eq!(meet(&asking("strong"), &owned), Ok(name("strong")));
        assert!(refused(&asking("runc"), &owned).contains("'strong'"));
        refused(&specification(), &with(&["runc"], Some("strong")));
        assert_eq!(of(&owned).runtime, "strong");
    }

    #[test]
    fn v4_mapped_users_are_met_or_refused() {
        let demands = Demands { user_namespace: true, ..Demands::default() };
        let asking = Specification { demands, ..specification() };
        assert!(refused(&asking, &engine()).contains("--require-userns"));
        assert_eq!(meet(&asking, &EngineFacts { user_namespace: true, ..engine() }), Ok(None));
        assert_eq!(meet(&asking, &EngineFacts { rootless: true, ..engine() }), Ok(None));
    }

    #[test]
    fn v5_a_writable_root_is_refused_where_its_size_would_not_hold() {
        let asking = Specification { writable_root: Some(ByteSize::mebibytes(9)), ..specification() };
        assert!(refused(&asking, &engine()).contains("overlay2"));
        assert_eq!(meet(&asking, &EngineFacts { sized_root: true, ..engine() }), Ok(None));
    }
}
