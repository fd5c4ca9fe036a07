//! Who calls: known by the channel and the peer's uid, never by what it says.

use std::collections::BTreeMap;
use std::fmt;

use mandoline_api::nodemgr::Grant;
use mandoline_rspec::{AuthorityName, SliceId};

/// A caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// The node's owner: whoever may open the owner's socket.
    Owner,
    /// A service on the host, or a sliver: it acts as this slice.
    Slice(SliceId),
    /// A uid that no service has: it may only ask what is public on the node.
    Stranger(u32),
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Owner => f.write_str("owner"),
            Self::Slice(slice) => write!(f, "slice {slice}"),
            Self::Stranger(uid) => write!(f, "uid {uid}"),
        }
    }
}

/// A service on the host that may call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// The slice that it acts as.
    pub slice: SliceId,
    /// The authorities whose slices it may make slivers for.
    pub authorities: Vec<AuthorityName>,
}

/// The services of the host, by uid.
#[derive(Debug, Clone, Default)]
pub struct Services(BTreeMap<u32, Service>);

impl Services {
    /// Services by uid.
    pub fn new(services: impl IntoIterator<Item = (u32, Service)>) -> Self {
        Self(services.into_iter().collect())
    }

    /// Who a uid is.
    pub fn caller(&self, uid: u32) -> Caller {
        match self.0.get(&uid) {
            Some(service) => Caller::Slice(service.slice.clone()),
            None => Caller::Stranger(uid),
        }
    }

    /// What the configuration grants a service.
    pub fn grant(&self, slice: &SliceId) -> Option<Grant> {
        let mut found = self
            .0
            .values()
            .filter(|service| service.slice == *slice)
            .peekable();
        found.peek()?;
        Some(Grant {
            authorities: found.flat_map(|service| service.authorities.clone()).collect(),
            ..Grant::default()
        })
    }

    /// What the configuration grants.
    pub fn grants(&self) -> BTreeMap<SliceId, Grant> {
        let slices = self.0.values().map(|service| &service.slice);
        slices
            .filter_map(|slice| Some((slice.clone(), self.grant(slice)?)))
            .collect()
    }
}
