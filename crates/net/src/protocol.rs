//! Protocol names, and which of them each role may open towards us.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use crate::gate::Role;

/// First thing opened on a connection that is meant for bulk traffic; it carries no bytes.
pub(crate) const BULK_MARKER: Protocol = Protocol::new("/peer-compute/bulk/1");

/// Name of a protocol, as negotiated when a stream is opened: `/peer-compute/control/1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Protocol(&'static str);

impl Protocol {
    /// A protocol name; it must start with a slash (checked when the constant is evaluated).
    pub const fn new(name: &'static str) -> Self {
        assert!(!name.is_empty() && name.as_bytes()[0] == b'/', "a protocol name starts with a slash");
        Self(name)
    }

    /// The name.
    pub const fn name(&self) -> &'static str {
        self.0
    }
}

impl AsRef<str> for Protocol {
    fn as_ref(&self) -> &str {
        self.0
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.0)
    }
}

/// The protocols that are offered to a remote of each role; a role that is not listed is offered none.
#[derive(Debug, Clone, Default)]
pub struct Protocols {
    by_role: HashMap<Role, Vec<Protocol>>,
}

impl Protocols {
    /// Offers nothing to anybody.
    pub fn none() -> Self {
        Self::default()
    }

    /// Lets a remote of this role open these protocols here.
    #[must_use]
    pub fn allow(mut self, role: Role, protocols: &[Protocol]) -> Self {
        self.by_role.entry(role).or_default().extend_from_slice(protocols);
        self
    }

    /// What is offered on one connection. Long-lived roles may also mark a connection as the bulk one.
    pub(crate) fn offered_to(&self, role: Role) -> Arc<[Protocol]> {
        let mut protocols = self.by_role.get(&role).cloned().unwrap_or_default();
        if role != Role::Joiner {
            protocols.push(BULK_MARKER);
        }
        protocols.into()
    }
}
