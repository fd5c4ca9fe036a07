//! What the owner of a node decides: who may do what, which slices are not wanted, how much of the node is
//! given, and the start-up script.
//!
//! | operation | request | answer |
//! | --- | --- | --- |
//! | `set_node_limit` | `{"rspec": …}` | [`Done`](super::Done) |
//! | `deny`, `allow` | [`Deny`], `{"slice_name": …}` | [`Done`](super::Done) |
//! | `grant`, `revoke` | [`SetGrant`], `{"slice_name": …}` | [`Done`](super::Done) |
//! | `policy` | `{}` | [`PolicyAnswer`] |
//! | `owner_script` | [`OwnerScript`] | [`RcapsAnswer`](super::RcapsAnswer) |

use std::collections::{BTreeMap, BTreeSet};

use mandoline_rspec::{AuthorityName, Rspec, SliceId};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

/// Controls of the node that only trusted services may use (NSDI'04 paper, section 4.4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Actuator {
    /// Take a pool from what the node has left, without holding one.
    Acquire,
    /// Start, stop and restart every sliver.
    Stop,
    /// See the traffic of all slivers.
    Capture,
    /// Bound what the node gives in all.
    NodeLimit,
    /// Forbid slices, and allow them again.
    Deny,
    /// Make root pools and run the owner's script.
    RootPools,
}

impl Actuator {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Acquire,
        Self::Stop,
        Self::Capture,
        Self::NodeLimit,
        Self::Deny,
        Self::RootPools,
    ];

    /// Its name in a grant.
    pub fn name(self) -> &'static str {
        match self {
            Self::Acquire => "acquire",
            Self::Stop => "stop",
            Self::Capture => "capture",
            Self::NodeLimit => "node_limit",
            Self::Deny => "deny",
            Self::RootPools => "root_pools",
        }
    }
}

/// What the owner lets a slice do on this node beyond its own pools and sliver.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// Authorities for whose slices it may make slivers.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub authorities: BTreeSet<AuthorityName>,
    /// Slices for which it may make slivers, names of the node among them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub slices: BTreeSet<SliceId>,
    /// The virtualisations that it may use for them; none given: every one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_types: Option<BTreeSet<String>>,
    /// Controls of the node that it may use.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub actuators: BTreeSet<Actuator>,
}

/// `grant`: replaces what a slice was granted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetGrant {
    /// The slice that gets it.
    pub slice_name: String,
    /// What it gets.
    pub grant: Grant,
}

/// `deny`: a slice, or all slices of an authority, may not run here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deny {
    /// The slice, or an authority.
    pub slice_name: String,
    /// Why, for those who are refused.
    pub reason: String,
}

/// `policy`: what the owner has decided.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PolicyAnswer {
    /// Bounds of the node as a whole.
    pub node_limit: Rspec,
    /// What is granted, by slice: by the owner, by the configuration, or from the start.
    pub grants: BTreeMap<SliceId, Grant>,
    /// Slices and authorities that may not run here, and why.
    pub denials: BTreeMap<String, String>,
}

/// `owner_script`: the state that the owner wants, as one transaction. A part that is not given stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnerScript {
    /// In the papers' words: `rcap5 = create_root_pool(rspec5, pl.conf)`. Instead of `pools` and `deny`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub script: Option<String>,
    /// Every root pool that the script is to have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pools: Option<Vec<ScriptPool>>,
    /// Every slice or authority that may not run here, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deny: Option<BTreeMap<String, String>>,
    /// Everything that is granted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grants: Option<BTreeMap<String, Grant>>,
    /// Bounds of the node as a whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_limit: Option<Rspec>,
}

/// One root pool of the owner's script.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScriptPool {
    /// The slice that gets it.
    pub slice: String,
    /// What it holds: an rspec in which reservations and limits may be written in per cent of the node
    /// (`"cpu_guarantee": "10 %"`), and `"capacity": "10 %"` stands for that part of every reservation.
    pub rspec: Json,
    /// Bind it to the slice at once.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bind: bool,
}
