//! Slices and slivers, as persons see them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::RspecObject;

/// How a slice comes to its nodes (PLCAPI's words).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Instantiation {
    /// Its slivers are not made.
    NotInstantiated,
    /// The authority's slice creation service makes them on every node of the slice.
    #[default]
    PlcInstantiated,
    /// Somebody else redeems a ticket on the node.
    Delegated,
    /// The slice of a service that makes delegated slices.
    NmController,
}

impl Instantiation {
    /// All, in PLCAPI's order.
    pub const ALL: [Instantiation; 4] = [
        Self::NotInstantiated,
        Self::PlcInstantiated,
        Self::Delegated,
        Self::NmController,
    ];

    /// PLCAPI's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotInstantiated => "not-instantiated",
            Self::PlcInstantiated => "plc-instantiated",
            Self::Delegated => "delegated",
            Self::NmController => "nm-controller",
        }
    }
}

/// A slice to make.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewSlice {
    /// `<login_base of its site>_<name>`, PlanetLab's rules.
    pub name: String,
    /// What each of its slivers may use; `vm_type` among it.
    #[serde(default)]
    #[schema(value_type = Object)]
    pub rspec: RspecObject,
    /// Hostnames of the nodes on which it gets a sliver.
    #[serde(default)]
    pub nodes: Vec<String>,
    /// A page about it. Renewal wants one.
    #[serde(default)]
    pub url: String,
    /// What it is for. Renewal wants one.
    #[serde(default)]
    pub description: String,
    /// How it comes to its nodes.
    #[serde(default)]
    pub instantiation: Instantiation,
    /// E-mail addresses of its further users; who makes it is always one.
    #[serde(default)]
    pub persons: Vec<String>,
}

/// What to change in a slice; what is absent stays.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SliceChange {
    /// See [`NewSlice::url`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// See [`NewSlice::description`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// See [`NewSlice::instantiation`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instantiation: Option<Instantiation>,
    /// New end, Unix seconds: in the future, at most eight weeks ahead for who is not admin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<i64>,
    /// Whether its slivers run (true) or are stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// The whole rspec, in place of the old one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub rspec: Option<RspecObject>,
}

/// A slice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Slice {
    /// PLCAPI's number.
    pub id: i64,
    /// This slice and no other: one that is deleted and made again under the same name has another uuid.
    pub uuid: String,
    /// Its name.
    pub name: String,
    /// `login_base` of its site.
    pub site: String,
    /// How it comes to its nodes.
    pub instantiation: Instantiation,
    /// Whether its slivers run.
    pub enabled: bool,
    /// A page about it.
    pub url: String,
    /// What it is for.
    pub description: String,
    /// What each of its slivers may use.
    #[schema(value_type = Object)]
    pub rspec: RspecObject,
    /// Hostnames of its nodes.
    pub nodes: Vec<String>,
    /// E-mail addresses of its users.
    pub persons: Vec<String>,
    /// When it was made, Unix seconds.
    pub created: i64,
    /// When it ends, Unix seconds.
    pub expires: i64,
}

/// Nodes by hostname.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Hostnames {
    /// Each must be a node of the authority.
    pub hostnames: Vec<String>,
}

/// Persons by e-mail address.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Emails {
    /// Each must be a person of the authority.
    pub emails: Vec<String>,
}

/// Where a sliver is in its life, as its node said last.
///
/// ```text
/// pending ─► defined ─► starting ─► up ─► reachable ─► gone
///                           └──► failed    ├─► paused, parked, stopped (and back)
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SliverState {
    /// Wanted; its node has said nothing of it yet. Only the authority says this.
    #[default]
    Pending,
    /// The node manager has recorded it.
    Defined,
    /// Its virtual machine is being started.
    Starting,
    /// Its kernel runs and its agent answers.
    Up,
    /// Its users can log in.
    Reachable,
    /// Stopped in its tracks, memory kept.
    Paused,
    /// Paused with its memory given back.
    Parked,
    /// Not running, disk kept.
    Stopped,
    /// It could not be made or kept running; reason and class say why.
    Failed,
    /// Destroyed on its node.
    Gone,
    /// A state that this client does not know.
    #[serde(other)]
    Other,
}

impl SliverState {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Defined => "defined",
            Self::Starting => "starting",
            Self::Up => "up",
            Self::Reachable => "reachable",
            Self::Paused => "paused",
            Self::Parked => "parked",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Gone => "gone",
            Self::Other => "other",
        }
    }
}

/// What can be done about a failed sliver (the Emulab portal's three classes).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailureClass {
    /// Trying again may succeed.
    Retryable,
    /// This sliver is lost, the slice can go on without it.
    Continuable,
    /// Nothing of the slice will work like this.
    Fatal,
}

/// Where outsiders reach a node's sshd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SshEndpoint {
    /// Name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// Where and as whom a slice's user logs in on a node, on the way to the sliver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SshLogin {
    /// Name or address of the node's sshd.
    pub host: String,
    /// Its TCP port.
    pub port: u16,
    /// The slice's account on the node.
    pub user: String,
}

/// One sliver of a slice, as the authority knows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Sliver {
    /// Name of its slice.
    pub slice: String,
    /// Id of its node.
    pub node: i64,
    /// Hostname of its node.
    pub hostname: String,
    /// Last reported state.
    pub state: SliverState,
    /// Why it failed or stopped.
    pub reason: Option<String>,
    /// What can be done about it.
    pub class: Option<FailureClass>,
    /// The node manager's id of its virtual machine.
    #[serde(default)]
    pub vm_id: Option<String>,
    /// Its own address on the node's sliver network, without prefix length.
    pub address: Option<String>,
    /// Way in: the node's sshd. Absent until the node has registered.
    pub ssh_endpoint: Option<SshLogin>,
    /// The sliver's host keys, public key lines.
    pub ssh_host_keys: Vec<String>,
    /// The node's host keys, public key lines.
    pub node_host_keys: Vec<String>,
    /// How it is virtualised.
    pub vm_type: Option<String>,
    /// State of its boot script: `none`, `running`, `ok` or `failed(code)`.
    pub initscript: Option<String>,
    /// How long each phase of its start took, microseconds, by the node manager's names.
    pub phases_us: BTreeMap<String, u64>,
    /// When the node last reported, Unix seconds; 0 = never.
    pub updated: i64,
}
