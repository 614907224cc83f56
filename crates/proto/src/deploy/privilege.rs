//! Who a container runs as, and the few powers of root that can be given back to it.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::id::text_in_json;

/// Who the first process of a container is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, Encode, Decode)]
#[serde(rename_all = "snake_case")]
#[cbor(index_only)]
pub enum User {
    /// A user that no other deployment has; the image's wish is not heard.
    #[default]
    #[n(0)]
    Private,
    /// User 0 inside the container. Where the engine maps users, that is nobody special on the host.
    #[n(1)]
    Root,
}

impl User {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde and minicbor call it so")]
    pub(super) fn is_private(&self) -> bool {
        *self == Self::Private
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Private => "private",
            Self::Root => "root",
        })
    }
}

impl FromStr for User {
    type Err = String;

    /// `root` (also as `0` and `0:0`) or `private`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "private" => Ok(Self::Private),
            "root" | "0" | "0:0" | "root:root" => Ok(Self::Root),
            _ => Err(format!(
                "'{}' is not a user that a container can have here; use root, or leave it out for a user of its own",
                crate::text::escape(text)
            )),
        }
    }
}

macro_rules! capabilities {
    ($($(#[$doc:meta])* $number:literal $variant:ident $text:literal $kernel:literal,)*) => {
        /// A power of root that a grant can give back (`capabilities(7)`). Why these and no others: decision 13.
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Encode, Decode,
        )]
        #[serde(try_from = "String", into = "String")]
        #[cbor(index_only)]
        pub enum Capability {
            $($(#[$doc])* #[n($number)] $variant,)*
        }

        impl Capability {
            /// Every one that can be given, by name.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Its name here: the kernel's, in small letters and without `CAP_`.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }

            /// The kernel's name.
            pub fn kernel_name(self) -> &'static str {
                match self { $(Self::$variant => $kernel),* }
            }
        }
    };
}

capabilities! {
    /// Give files to others.
    0 Chown "chown" "CAP_CHOWN",
    /// Pass by the permissions of files.
    1 DacOverride "dac-override" "CAP_DAC_OVERRIDE",
    /// Do with files of others what only their owner may.
    2 Fowner "fowner" "CAP_FOWNER",
    /// Send signals to processes of others, in this container.
    3 Kill "kill" "CAP_KILL",
    /// Listen on ports below 1024.
    4 NetBindService "net-bind-service" "CAP_NET_BIND_SERVICE",
    /// Take any group.
    5 Setgid "setgid" "CAP_SETGID",
    /// Take any user.
    6 Setuid "setuid" "CAP_SETUID",
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Capability {
    type Err = String;

    /// Takes `chown`, and the spellings `CHOWN` and `CAP_CHOWN` that users of other engines know.
    fn from_str(text: &str) -> Result<Self, String> {
        let small = text.to_ascii_lowercase().replace('_', "-");
        let name = small.strip_prefix("cap-").unwrap_or(&small);
        Self::ALL.iter().copied().find(|capability| capability.as_str() == name).ok_or_else(|| {
            let all: Vec<_> = Self::ALL.iter().map(|capability| capability.as_str()).collect();
            format!("'{}' is not a capability that can be given; use {}", crate::text::escape(text), all.join(", "))
        })
    }
}

text_in_json!(Capability);

/// Some capabilities in words: `chown, setuid`.
pub fn list_capabilities(capabilities: &BTreeSet<Capability>) -> String {
    let names: Vec<_> = capabilities.iter().map(|capability| capability.as_str()).collect();
    names.join(", ")
}

pub(super) fn check(user: User, capabilities: &BTreeSet<Capability>) -> Result<(), String> {
    if user == User::Private && !capabilities.is_empty() {
        return Err(format!(
            "capabilities ({}) are of use to root alone, because the kernel takes them from every other user; \
             add --user root",
            list_capabilities(capabilities)
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_have_the_names_that_users_know() {
        for text in ["net-bind-service", "NET_BIND_SERVICE", "CAP_NET_BIND_SERVICE", "cap-net_bind_service"] {
            assert_eq!(text.parse(), Ok(Capability::NetBindService), "{text}");
        }
        for capability in Capability::ALL {
            assert_eq!(capability.as_str().parse(), Ok(*capability));
            assert_eq!(capability.kernel_name().parse(), Ok(*capability));
        }
    }

    #[test]
    fn i1_no_dangerous_capability_has_a_name() {
        for text in
            ["all", "ALL", "", "sys-admin", "SYS_PTRACE", "CAP_NET_ADMIN", "net-raw", "sys-module", "mknod", "bpf"]
        {
            assert!(text.parse::<Capability>().is_err(), "{text}");
        }
    }

    #[test]
    fn users_are_root_or_private() {
        assert_eq!(("root".parse(), "0".parse()), (Ok(User::Root), Ok(User::Root)));
        for text in ["", "1000", "nobody", "0:1000", "Root"] {
            assert!(text.parse::<User>().is_err(), "{text}");
        }
    }
}
