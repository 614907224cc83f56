//! Whether a grant covers what one deployment asks for, beyond the sums that [`crate::authorise`] counts: each thing that
//! has to be asked for is refused with the flag that would allow it.

use peer_proto::code::{Code, Threat};
use peer_proto::deploy::{Capability, Specification, User};
use peer_proto::grant::DeployGrant;

use crate::refusal::Refusal;

/// Refuses a specification that wants more than the grant gives. The sentence names the flags that are lacking.
pub fn check(specification: &Specification, grant: &DeployGrant) -> Result<(), Refusal> {
    privileges(specification, grant)?;
    writable_root(specification, grant)?;
    egress(specification, grant)
}

/// What its containers would reach.
fn egress(specification: &Specification, grant: &DeployGrant) -> Result<(), Refusal> {
    let Some(lacking) = grant.egress.lacks(&specification.egress) else { return Ok(()) };
    let message = not_granted(&format!("egress to {lacking}"), &format!("--egress {lacking}"));
    Err(Refusal::new(Code::NotGranted, Threat::V4n, message))
}

/// Root, and powers of it.
fn privileges(specification: &Specification, grant: &DeployGrant) -> Result<(), Refusal> {
    let mut lacking = Vec::new();
    let mut flags = Vec::new();
    if specification.user == User::Root && !grant.root {
        lacking.push("to run as root".to_owned());
        flags.push("--root".to_owned());
    }
    let capabilities: Vec<_> =
        specification.capabilities.difference(&grant.capabilities).map(|capability| capability.as_str()).collect();
    if !capabilities.is_empty() {
        let noun = if capabilities.len() == 1 { "capability" } else { "capabilities" };
        lacking.push(format!("the {noun} {}", capabilities.join(", ")));
        // All of them: a new grant replaces the old one whole.
        let all = grant.capabilities.union(&specification.capabilities);
        let all: Vec<_> = all.copied().map(Capability::as_str).collect();
        if grant.root {
            flags.push("--root".to_owned());
        }
        flags.push(format!("--cap {}", all.join(",")));
    }
    if lacking.is_empty() {
        return Ok(());
    }
    Err(Refusal::new(Code::NotGranted, Threat::V4, not_granted(&lacking.join(" and "), &flags.join(" "))))
}

/// A disk that a guest fills is the host's.
fn writable_root(specification: &Specification, grant: &DeployGrant) -> Result<(), Refusal> {
    let Some(size) = specification.writable_root else { return Ok(()) };
    let flag = format!("--writable-root {}m", size.get().div_ceil(1 << 20));
    match grant.writable_root {
        Some(granted) if size <= granted => Ok(()),
        Some(granted) => {
            let what = format!("a writable root of {size} (at most {granted})");
            Err(Refusal::new(Code::OverLimit, Threat::V5, not_granted(&what, &flag)))
        }
        None => Err(Refusal::new(Code::NotGranted, Threat::V5, not_granted("a writable root", &flag))),
    }
}

/// The sentence of every such refusal: what is lacking, and what its owner would have to run.
pub(crate) fn not_granted(what: &str, flags: &str) -> String {
    format!(
        "this machine does not allow you {what}; ask its owner to run, with what you are allowed already: \
         peerctl peers allow YOU --allow deploy ... {flags}"
    )
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use peer_proto::unit::{ByteSize, Millicores};
    use proptest::prelude::*;

    use super::*;

    fn plain() -> Specification {
        Specification::plain("web".parse().unwrap(), "web:1")
    }

    fn grant() -> DeployGrant {
        DeployGrant::new(Millicores::new(1000).unwrap(), ByteSize::mebibytes(1024), 4)
    }

    #[test]
    fn what_is_plain_needs_no_more_than_a_grant() {
        let writable = vec!["/data=16m".parse().unwrap()];
        assert_eq!(check(&Specification { writable, ..plain() }, &grant()), Ok(()));
    }

    #[test]
    fn v4_root_and_its_powers_need_a_grant_that_the_sentence_names() {
        let asked =
            Specification { user: User::Root, capabilities: [Capability::Chown, Capability::Setuid].into(), ..plain() };
        let refusal = check(&asked, &grant()).unwrap_err();
        assert_eq!((refusal.problem.code, refusal.threat), (Code::NotGranted, Threat::V4));
        assert!(refusal.problem.message.ends_with("--allow deploy ... --root --cap chown,setuid"), "{refusal}");
        let rooted = DeployGrant { root: true, capabilities: [Capability::Kill].into(), ..grant() };
        let refusal = check(&asked, &rooted).unwrap_err();
        assert!(refusal.problem.message.ends_with("... --root --cap chown,kill,setuid"), "{refusal}");
        assert!(!refusal.problem.message.contains("run as root"), "{refusal}");
        assert!(refusal.problem.message.contains("the capabilities chown, setuid"), "{refusal}");
        let one = Specification { capabilities: [Capability::Chown].into(), ..plain() };
        assert!(check(&one, &grant()).unwrap_err().problem.message.contains("the capability chown"));
        let enough = DeployGrant { capabilities: Capability::ALL.iter().copied().collect(), ..rooted };
        assert_eq!(check(&asked, &enough), Ok(()));
    }

    #[test]
    fn v5_a_writable_root_is_bounded_by_the_grant() {
        let asked = |mebibytes| Specification { writable_root: Some(ByteSize::mebibytes(mebibytes)), ..plain() };
        let refusal = check(&asked(10), &grant()).unwrap_err();
        assert_eq!((refusal.problem.code, refusal.threat), (Code::NotGranted, Threat::V5));
        assert!(refusal.problem.message.ends_with("--writable-root 10m"), "{refusal}");
        let granted = DeployGrant { writable_root: Some(ByteSize::mebibytes(10)), ..grant() };
        assert_eq!(check(&asked(10), &granted), Ok(()));
        assert_eq!(check(&asked(11), &granted).unwrap_err().problem.code, Code::OverLimit);
    }

    #[test]
    fn v4n_nothing_is_reached_without_a_grant_that_the_sentence_names() {
        let granted = |egress: &str| DeployGrant { egress: egress.parse().unwrap(), ..grant() };
        let asked = |egress: &str| Specification { egress: egress.parse().unwrap(), ..plain() };
        for (level, wanted, lacking) in
            [("none", "internet", "internet"), ("a.b", "internet", "internet"), ("a.b", "a.b:1,c.d:2", "c.d:2")]
        {
            let refusal = check(&asked(wanted), &granted(level)).unwrap_err();
            assert_eq!((refusal.problem.code, refusal.threat), (Code::NotGranted, Threat::V4n));
            assert!(refusal.problem.message.ends_with(&format!("--egress {lacking}")), "{refusal}");
        }
        for (level, wanted) in [("none", "none"), ("internet", "internet"), ("internet", "a.b:1"), ("*.b.c", "a.b.c:1")]
        {
            assert_eq!(check(&asked(wanted), &granted(level)), Ok(()));
        }
    }

    fn any_capabilities() -> impl Strategy<Value = std::collections::BTreeSet<Capability>> {
        proptest::collection::btree_set(proptest::sample::select(Capability::ALL), 0..Capability::ALL.len())
    }

    proptest! {
        #[test]
        fn v4_nothing_passes_that_is_not_in_the_grant(
            root in any::<bool>(), asked in any_capabilities(), granted_root in any::<bool>(), granted in any_capabilities(),
        ) {
            let user = if root { User::Root } else { User::Private };
            let specification = Specification { user, capabilities: asked.clone(), ..plain() };
            let grant = DeployGrant { root: granted_root, capabilities: granted.clone(), ..grant() };
            let covered = (granted_root || !root) && asked.is_subset(&granted);
            prop_assert_eq!(check(&specification, &grant).is_ok(), covered);
        }
    }
}
