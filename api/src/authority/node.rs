//! Nodes: as persons see them, and what they tell and are told.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{FailureClass, Instantiation, RspecObject, SliverState, SshEndpoint};

/// A `vm_type` that a node offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmType {
    /// Its name, as in the rspec.
    pub name: String,
    /// What it can do beyond create, start, stop and destroy.
    #[serde(default)]
    pub capabilities: Vec<String>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    /// PLCAPI's number, `NODE_ID` of its configuration.
    pub id: i64,
    /// Persistent: changes only when the node's role does.
    pub uuid: String,
    /// Its name.
    pub hostname: String,
    /// `login_base` of its site.
    pub site: String,
    /// PLCAPI's boot state: what the operators want it to do.
    pub boot_state: String,
    /// Whether it has announced its key.
    pub registered: bool,
    /// What it offers; empty until it has registered.
    pub vm_types: Vec<VmType>,
    /// Version of the attribute table that its node manager speaks.
    pub attribute_table_version: Option<u32>,
    /// What it has to give, as an rspec.
    #[schema(value_type = Object)]
    pub capacity: RspecObject,
    /// Where its sshd is reached.
    pub ssh_endpoint: Option<SshEndpoint>,
    /// Host keys of its sshd, public key lines.
    pub ssh_host_keys: Vec<String>,
    /// When it last called, Unix seconds; absent = never.
    pub last_contact: Option<i64>,
}

/// A node to add.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewNode {
    /// Its name.
    pub hostname: String,
    /// `login_base` of its site.
    pub site: String,
    /// PLCAPI's boot state; absent = `reinstall`, as a node begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_state: Option<String>,
}

/// A node that was added, with the secret that goes into its `pl_node.txt`.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct NodeAdded {
    /// The node.
    pub node: Node,
    /// `NODE_KEY`: keep it secret. Admins can read it again over PLCAPI (GetNodes, field `key`).
    pub node_key: String,
}

/// Never prints the node key.
impl fmt::Debug for NodeAdded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeAdded")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

/// What a node tells when it registers: at each start, signed with HMAC-SHA256 under the text of `NODE_KEY`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NodeRegistration {
    /// Its public key for all further calls: base64 of 32 bytes.
    pub ed25519_public_key: String,
    /// Host keys of its sshd, public key lines.
    #[serde(default)]
    pub ssh_host_keys: Vec<String>,
    /// Where outsiders reach its sshd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh_endpoint: Option<SshEndpoint>,
    /// What it offers.
    pub vm_types: Vec<VmType>,
    /// Version of the attribute table that its node manager speaks.
    pub attribute_table_version: u32,
    /// What it has to give, as an rspec.
    #[serde(default)]
    #[schema(value_type = Object)]
    pub capacity: RspecObject,
}

/// Answer to a registration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeRegistered {
    /// PLCAPI's number.
    pub node_id: i64,
    /// The node's persistent id.
    pub uuid: String,
    /// Its name at the authority.
    pub hostname: String,
    /// What the operators want it to do: slivers run only in `boot`.
    pub boot_state: String,
}

/// What a node should run: the whole set; what it runs for this authority beside it is to be destroyed.
///
/// The answer's `ETag` is the quoted revision; with `If-None-Match` an unchanged set answers 304.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DesiredSlivers {
    /// Hash of the set: equal sets have equal revisions.
    pub revision: String,
    /// The authority's clock, Unix seconds.
    pub time: i64,
    /// The slivers, by slice name.
    pub slivers: Vec<DesiredSliver>,
    /// The authority's nodes, by name: what a node's sensor `nodes` tells.
    #[serde(default)]
    pub nodes: Vec<KnownNode>,
}

/// One node of the authority.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KnownNode {
    /// Its name.
    pub hostname: String,
    /// The host part of its ssh endpoint: an address, or a name that has one; absent until it has registered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
}

/// One sliver that a node should have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DesiredSliver {
    /// The slice's uuid: another one under the same name is another slice, whose sliver starts afresh.
    pub slice_id: String,
    /// The slice's name, also its account on the node.
    pub slice: String,
    /// What the sliver may use. `keys` and `initscript` are beside it, not in it.
    #[schema(value_type = Object)]
    pub rspec: RspecObject,
    /// Public key lines of its users.
    pub keys: Vec<String>,
    /// Text of its boot script.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initscript: Option<String>,
    /// When the slice ends, Unix seconds: the node destroys the sliver then, by itself if need be.
    pub expires: i64,
    /// How the slice comes to its nodes; the slice creation service makes `plc-instantiated` ones only.
    pub instantiation: Instantiation,
    /// False: the sliver is to be stopped.
    pub enabled: bool,
}

/// Data of a [`NODE_EVENT_SLIVERS`] event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SliversChanged {
    /// Sequence number of the change that was last; a hint to log, not to compare.
    pub seq: i64,
}

/// What a node reports of its slivers.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct NodeStatus {
    /// New states, oldest first; several of one sliver may come in one report.
    pub slivers: Vec<SliverReport>,
}

/// One state that a sliver has come to: the node manager's event with the slice's uuid.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SliverReport {
    /// The slice's name.
    pub slice: String,
    /// The slice's uuid as in [`DesiredSliver`]: keeps a late report off a new slice of the same name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slice_id: Option<String>,
    /// The node manager's sequence number; an older report than the last known is ignored.
    #[serde(default)]
    pub seq: u64,
    /// The node manager's id of the virtual machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_id: Option<String>,
    /// The state.
    pub state: SliverState,
    /// Why it failed or stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What can be done about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<FailureClass>,
    /// `none`, `running`, `ok` or `failed(code)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initscript: Option<String>,
    /// Address of the sliver on the node's sliver network, without prefix length.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// The sliver's host keys, public key lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh_host_keys: Option<Vec<String>>,
    /// How long each phase took, microseconds.
    #[serde(default)]
    pub phases_us: BTreeMap<String, u64>,
}
