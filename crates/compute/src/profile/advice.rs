//! Why an ordinary image may have failed here, and which flag and grant would let it run.

use peer_proto::deploy::{Specification, User, list_capabilities};

use crate::engine::quote;
use crate::image::configuration::Wishes;

/// A run that ends sooner than this (milliseconds) may have failed because of who it ran as.
pub(crate) const EARLY_MILLISECONDS: u64 = 60_000;

/// What an image needs that begins as root, gives files to its worker and becomes that user.
const FOR_ROOT: &str = "chown,setgid,setuid";
/// What an image needs that has files for a user of its own.
const FOR_ANOTHER: &str = "dac-override";

/// A sentence for whoever deployed an image that wanted to be somebody else than it was, and failed early.
pub(crate) fn advise(wishes: &Wishes, specification: &Specification) -> Option<String> {
    let user = wishes.user.split(':').next().unwrap_or_default();
    let wants_root = matches!(user, "" | "0" | "root");
    let wanted = if wants_root { "root".to_owned() } else { format!("user '{}'", quote(user)) };
    let capabilities = if wants_root { FOR_ROOT } else { FOR_ANOTHER };
    match specification.user {
        User::Private => Some(format!(
            "The image is made to run as {wanted}, and here it ran as a user of its own without any power. If its log \
             speaks of permissions, deploy it with --user root --cap {capabilities}; the machine's owner must have run: \
             peerctl peers allow YOU --allow deploy ... --root --cap {capabilities}"
        )),
        User::Root if wants_root => {
            let has = match list_capabilities(&specification.capabilities) {
                none if none.is_empty() => "no capability".to_owned(),
                some => format!("only {some}"),
            };
            Some(format!(
                "It ran as root with {has}. If its log speaks of permissions, add what is lacking with --cap (chown, \
                 dac-override, fowner, kill, setgid, setuid); the machine's owner must have granted it: peerctl peers \
                 allow YOU --allow deploy ... --root --cap NAME"
            ))
        }
        User::Root => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::tests::specification;

    fn advised(user: &str, specification: &Specification) -> Option<String> {
        advise(&Wishes { user: user.into(), ..Wishes::default() }, specification)
    }

    #[test]
    fn the_advice_names_flag_and_grant() {
        for user in ["", "0", "root", "0:0", "root:root"] {
            let advice = advised(user, &specification()).unwrap_or_default();
            for part in ["as root", "--user root --cap chown,setgid,setuid", "... --root --cap chown"] {
                assert!(advice.contains(part), "{user}: {advice}");
            }
        }
        let advice = advised("nginx:\u{1b}[2J", &specification()).unwrap_or_default();
        assert!(advice.contains("user 'nginx'") && advice.contains("--cap dac-override"), "{advice}");
        let hostile = advised("a\u{1b}[2J", &specification()).unwrap_or_default();
        assert!(!hostile.contains('\u{1b}'), "{hostile}");
        let root = Specification { user: User::Root, ..specification() };
        assert!(advised("", &root).is_some_and(|advice| advice.contains("with no capability")));
        assert_eq!(advised("1000", &root), None);
        let some = Specification { capabilities: [peer_proto::deploy::Capability::Chown].into(), ..root };
        assert!(advised("", &some).is_some_and(|advice| advice.contains("with only chown")));
    }
}
