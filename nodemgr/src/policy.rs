//! What the owner has decided about the node, as it is kept: bounds, grants, denials, the posted script.

use std::collections::BTreeMap;

use mandoline_api::nodemgr::{Actuator, Grant, OwnerScript};
use mandoline_rspec::{Rspec, SliceId};
use serde::{Deserialize, Serialize};

use crate::caller::{Caller, Services};

/// Who runs the node by itself: the owner's own sliver (architecture paper, section 5.2.3).
pub const SITE_ADMIN: &str = "site_admin";

/// What the owner has decided.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Policy {
    /// Bounds of the node as a whole.
    pub node_limit: Rspec,
    /// What a slice is granted; none where it lost what it had from the configuration or from the start.
    pub grants: BTreeMap<SliceId, Option<Grant>>,
    /// Why a slice (`authority.name`) or an authority may not run here.
    pub denials: BTreeMap<String, String>,
    /// The script that came over the owner's socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub posted: Option<Posted>,
}

/// A script that came over the owner's socket: it stands until the file with the script changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Posted {
    /// The script.
    pub script: OwnerScript,
    /// SHA-256 of the file at that time, in hexadecimal; empty: there was none.
    pub file: String,
}

impl Policy {
    /// What a slice is granted: by the owner, else by the configuration, else from the start.
    pub fn grant(&self, services: &Services, slice: &SliceId) -> Grant {
        match self.grants.get(slice) {
            Some(grant) => grant.clone().unwrap_or_default(),
            None => services.grant(slice).unwrap_or_else(|| from_the_start(slice)),
        }
    }

    /// All that is granted.
    pub fn all_grants(&self, services: &Services) -> BTreeMap<SliceId, Grant> {
        let mut all = services.grants();
        if let Ok(admin) = SITE_ADMIN.parse::<SliceId>() {
            all.insert(admin.clone(), from_the_start(&admin));
        }
        for (slice, grant) in &self.grants {
            match grant {
                Some(grant) => drop(all.insert(slice.clone(), grant.clone())),
                None => drop(all.remove(slice)),
            }
        }
        all
    }

    /// Whether a caller may use a control of the node.
    pub fn may(&self, services: &Services, caller: &Caller, actuator: Actuator) -> bool {
        match caller {
            Caller::Owner => true,
            Caller::Slice(slice) => self.grant(services, slice).actuators.contains(&actuator),
            Caller::Stranger(_) => false,
        }
    }

    /// Whether a caller may make a VM of this type for a slice. For itself a slice may; what its pool allows
    /// bounds it.
    pub fn may_create(&self, services: &Services, caller: &Caller, slice: &SliceId, vm_type: &str) -> bool {
        let who = match caller {
            Caller::Owner => return true,
            Caller::Stranger(_) => return false,
            Caller::Slice(who) => who,
        };
        let grant = self.grant(services, who);
        let type_allowed = grant
            .vm_types
            .as_ref()
            .is_none_or(|types| types.contains(vm_type));
        let of_authority = slice.authority().is_some_and(|a| grant.authorities.contains(a));
        who == slice || (type_allowed && (of_authority || grant.slices.contains(slice)))
    }

    /// Why a slice may not run here.
    pub fn denial(&self, slice: &SliceId) -> Option<&str> {
        let by_authority = || self.denials.get(slice.authority()?.as_str());
        self.denials
            .get(&slice.to_string())
            .or_else(by_authority)
            .map(String::as_str)
    }
}

/// The site's administrators may cap the node, stop slivers and watch traffic (NSDI'04 paper, section 4.1.2),
/// and make the root pools (architecture paper, section 5.2.3).
fn from_the_start(slice: &SliceId) -> Grant {
    let is_admin = slice.authority().is_none() && slice.name().as_str() == SITE_ADMIN;
    Grant {
        actuators: match is_admin {
            true => Actuator::ALL.into_iter().collect(),
            false => Default::default(),
        },
        ..Grant::default()
    }
}
