//! The node manager's interface: HTTP and JSON on Unix sockets of the node.
//!
//! The operations are those of the architecture paper (section 5.1.2) under its names, each
//! `POST /v1/<operation>` with the request's fields as a JSON object:
//!
//! | operation | request | answer |
//! | --- | --- | --- |
//! | `create_root_pool` | [`CreateRootPool`] | [`RcapAnswer`] |
//! | `get_rcap`, `get_rcaps` | `{}` | [`RcapAnswer`], [`RcapsAnswer`] |
//! | `get_rspec` | [`RcapRequest`] | [`RspecAnswer`] |
//! | `split_pool` | [`SplitPool`] | [`RcapAnswer`] |
//! | `acquire` | [`Acquire`] | [`RcapAnswer`] |
//! | `bind` | [`Bind`] | [`BindAnswer`] |
//! | `release`, `start`, `stop`, `restart`, `destroy` | [`RcapRequest`] | [`Done`] |
//! | `list` | `{}` | [`ListAnswer`] |
//! | `resize` | [`SplitPool`] | [`Done`] |
//! | `start_slice`, `stop_slice`, `restart_slice`, `destroy_slice` | [`SliceRequest`] | [`Done`] |
//! | `get_loans`, `set_loans` | [`SliceRequest`], [`SetLoans`] | [`LoansAnswer`], [`Done`] |
//!
//! What the owner decides is in [`OwnerScript`] and beside it.
//!
//! `GET /v1/node` is [`NodeInfo`]; `GET /v1/events[?since=N]` is a stream of server-sent events whose data are
//! [`SliverEvent`]s; `GET /v1/ssh_keys/{account}` is text for the node's sshd; `GET /v1/usage` is [`Usage`];
//! `GET /v1/slivers/{vm_id}/console[?from=N]` and `…/log` are a [`Tail`]; `PUT /v1/sensors/{name}` publishes a table
//! of comma separated values; `GET /metrics` is for Prometheus, `POST /RPC2` the same operations as XML-RPC.
//!
//! Who calls is known by the socket and the peer's uid, never by what it says. A request may carry the header
//! [`IDEMPOTENCY_KEY`]: when it is repeated, the stored answer comes back.

use std::collections::BTreeMap;
use std::net::IpAddr;

use mandoline_rspec::{Loan, Rcap, Rspec, RspecError};
use serde::{Deserialize, Serialize};

#[cfg(feature = "unix-client")]
mod client;
mod owner;
mod usage;

#[cfg(feature = "unix-client")]
pub use client::{ClientError, Events, NodeManager};
pub use owner::{Actuator, Deny, Grant, OwnerScript, PolicyAnswer, ScriptPool, SetGrant};

pub use usage::{NodeUse, SliverUse, Usage};

/// The socket of the owner, mode 0600.
pub const OWNER_SOCKET: &str = "/run/mandoline/owner.sock";
/// The socket of services on the host, who are known by their uid.
pub const SERVICE_SOCKET: &str = "/run/mandoline/nm.sock";
/// Header that makes a request safe to repeat: 1 to 128 printable ASCII characters of the caller's choice.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// Identifies a virtual machine on its node; never used twice.
pub type VmId = u32;

/// `create_root_pool`: the owner only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateRootPool {
    /// What the pool holds.
    pub rspec: Rspec,
    /// The slice that may fetch it with `get_rcap`.
    pub slice_name: String,
}

/// `split_pool`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitPool {
    /// The pool to split.
    pub rcap: Rcap,
    /// What the new pool holds.
    pub rspec: Rspec,
}

/// `acquire`: `split_pool` from the caller's own oldest pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Acquire {
    /// What the new pool holds.
    pub rspec: Rspec,
}

/// `bind`: makes the slice's VM from a pool, or adds the pool to the VM that is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bind {
    /// The pool.
    pub rcap: Rcap,
    /// The slice, `authority.name` or bare.
    pub slice_name: String,
}

/// A request about one pool or sliver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RcapRequest {
    /// The pool or sliver.
    pub rcap: Rcap,
}

/// A request about the sliver of a slice, by who may act for that slice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SliceRequest {
    /// The slice, `authority.name` or bare.
    pub slice_name: String,
}

/// `set_loans`: everything that a slice lends on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetLoans {
    /// The lender.
    pub slice_name: String,
    /// Recipient, resource and amount of each, as the shipped node manager had them.
    pub loans: Vec<(String, String, u64)>,
}

/// `get_loans`: what a slice lends, and what that does now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoansAnswer {
    /// Its loans.
    pub loans: Vec<Loan>,
    /// Those that move nothing now, and why.
    pub waiting: Vec<(Loan, String)>,
    /// What the slice was given.
    pub rspec: Rspec,
    /// What it has with all loans of the node.
    pub effective: Rspec,
}

/// The rcap of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RcapAnswer {
    /// The pool.
    pub rcap: Rcap,
}

/// All unbound pools of the caller, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RcapsAnswer {
    /// The pools.
    pub rcaps: Vec<Rcap>,
}

/// What an rcap stands for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RspecAnswer {
    /// What is left in the pool, or what the sliver has.
    pub rspec: Rspec,
    /// The VM that the pool is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_id: Option<VmId>,
    /// The slice of that VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slice: Option<String>,
}

/// The VM that a pool was bound to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindAnswer {
    /// Its id.
    pub vm_id: VmId,
}

/// Part of a sliver's console or log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tail {
    /// Where to go on: `from` of the next request.
    pub next: u64,
    /// The bytes from there, as text; at most [`TAIL_MAX`].
    pub text: String,
}

/// Most bytes of a [`Tail`].
pub const TAIL_MAX: u64 = 64 << 10;

/// The change is recorded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}

/// What the caller holds: its pools, and slivers made from them. The owner sees all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ListAnswer {
    /// Unbound pools, oldest first.
    pub pools: Vec<PoolInfo>,
    /// Slivers by vm_id.
    pub slivers: Vec<SliverInfo>,
}

/// A pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PoolInfo {
    /// Its number; never used twice.
    pub id: u64,
    /// The number of the pool that it was split from; none for a root pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<u64>,
    /// The pool.
    pub rcap: Rcap,
    /// The slice that holds it.
    pub holder: String,
    /// What it was made with.
    pub granted: Rspec,
    /// What is left in it.
    pub rspec: Rspec,
    /// How many pools were split from it and are not given back.
    pub children: usize,
    /// True for a root pool that the owner has withdrawn: nothing more can be split from it.
    pub retired: bool,
}

/// A sliver.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SliverInfo {
    /// The number of the pool that the pool it was made from was split from; none for a root pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<u64>,
    /// The pool that it was made from, which stands for the sliver.
    pub rcap: Rcap,
    /// What it has in all.
    pub rspec: Rspec,
    /// Its account for ssh on the node.
    pub account: String,
    /// Its state, as the last event said.
    #[serde(flatten)]
    pub event: SliverEvent,
}

/// A sliver's states.
///
/// ```text
///  bind                                  agent answers        join answered, sshd listens
///   │                                          │                       │
///   ▼         disk, tap, cgroup, monitor       ▼                       ▼
/// defined ──────────► starting ──────────────► up ────────────────► reachable ◄──► paused ◄──► parked
///   ▲  ▲                 │ │                   │ │                    │ │
///   │  └─ start ─ stopped◄─┴── stop, shutdown ─┴─│────────────────────┘ │
///   │                                            ▼                      │
///   └──── start, or by itself when retryable ─ failed(reason, class) ◄──┘
///
///   destroy, from every state ──► gone
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SliverState {
    /// Recorded.
    #[default]
    Defined,
    /// Its resources are being made and its kernel boots.
    Starting,
    /// Its agent answers.
    Up,
    /// Its users can log in.
    Reachable,
    /// Its CPUs stand still.
    Paused,
    /// Paused with its memory given back.
    Parked,
    /// Not running, because that is wanted.
    Stopped,
    /// Not running, though that is not wanted: see reason and class.
    Failed,
    /// Destroyed; the last event of a sliver.
    Gone,
}

/// What to do about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureClass {
    /// It may work when tried again, and the node manager tries it by itself.
    Retryable,
    /// The sliver runs, without something it asked for.
    Continuable,
    /// It will not work until the request or the node is changed.
    Fatal,
}

/// The boot script, which never delays `reachable`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "state", content = "code", rename_all = "snake_case")]
pub enum Initscript {
    /// There is none.
    #[default]
    None,
    /// It runs.
    Running,
    /// It ended with 0.
    Ok,
    /// It ended with another code; 128 and more are 128 plus a signal.
    Failed(i32),
}

/// The state of a sliver and what is known with it. Every event carries all of it, so that the last one is
/// enough.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliverEvent {
    /// Rises with every event of this node, also across restarts of the node manager.
    pub seq: u64,
    /// The VM.
    pub vm_id: VmId,
    /// The slice, `authority.name` or a name of the node.
    pub slice: String,
    /// Its `vm_type`.
    pub vm_type: String,
    /// Its state.
    pub state: SliverState,
    /// Why it failed or stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What to do about a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<FailureClass>,
    /// The boot script.
    #[serde(default)]
    pub initscript: Initscript,
    /// The sliver's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Public host keys of the sliver's sshd.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ssh_host_keys: Vec<String>,
    /// When each phase of the last start ended, in microseconds after the request that caused it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub phases_us: BTreeMap<String, u64>,
    /// When the state was entered, in ns since 1970.
    pub unix_ns: u64,
}

/// What a node is and can do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// The virtualisations that it has.
    pub vm_types: Vec<VmTypeInfo>,
    /// Names that the operator maps to one of them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub vm_type_names: BTreeMap<String, String>,
    /// [`mandoline_rspec::ATTRIBUTE_TABLE_VERSION`].
    pub attribute_table_version: u32,
    /// What the node has in all.
    pub capacity: Rspec,
    /// What is left of it beside the root pools.
    pub available: Rspec,
    /// Bounds of this node manager by name, such as the number of slivers.
    pub limits: BTreeMap<String, u64>,
}

/// A virtualisation of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmTypeInfo {
    /// Its name, as in `vm_type`.
    pub name: String,
    /// Whether it can be used now; if not, `detail` says why.
    pub available: bool,
    /// Why it can't be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// What it can do: `pause`, `snapshot`, `channel`, `resize:cpu_share`, ...
    pub capabilities: Vec<String>,
}

/// The body of every error answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{error}")]
pub struct ErrorAnswer {
    /// What went wrong.
    pub error: ErrorBody,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ErrorBody {
    /// For programs.
    pub kind: ErrorKind,
    /// For people.
    pub message: String,
    /// The attribute or field that was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attribute: Option<String>,
    /// Its value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// What would have been accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed: Option<String>,
}

/// Kinds of errors, each with its HTTP status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// 400: not JSON, a field is missing or of the wrong shape.
    BadRequest,
    /// 400: an attribute is unknown, or its value is not allowed by the table.
    InvalidRspec,
    /// 400: a slice name that PlanetLab's rules don't allow.
    InvalidName,
    /// 400: the node has no such `vm_type`; `allowed` lists those that it has.
    UnknownVmType,
    /// 403: this caller may not do that.
    Forbidden,
    /// 404: no pool or sliver has this rcap, or the caller has no pool.
    NotFound,
    /// 409: the state of the pool or sliver does not allow it.
    Conflict,
    /// 409: the pool does not hold what is asked.
    Insufficient,
    /// 422: the idempotency key was used with another request.
    KeyReused,
    /// 500: the node manager failed; its log says more.
    Internal,
    /// 503: the node has no room (slivers, addresses, disk) now.
    Unavailable,
}

impl ErrorKind {
    /// The HTTP status.
    pub const fn status(self) -> u16 {
        match self {
            Self::BadRequest | Self::InvalidRspec | Self::InvalidName | Self::UnknownVmType => 400,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::Conflict | Self::Insufficient => 409,
            Self::KeyReused => 422,
            Self::Internal => 500,
            Self::Unavailable => 503,
        }
    }
}

impl ErrorBody {
    /// An error without attribute and value.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            attribute: None,
            value: None,
            allowed: None,
        }
    }

    /// With what would have been accepted.
    pub fn allowed(mut self, allowed: impl Into<String>) -> Self {
        self.allowed = Some(allowed.into());
        self
    }
}

impl From<RspecError> for ErrorBody {
    fn from(error: RspecError) -> Self {
        let kind = match error {
            RspecError::Exceeds { .. } => ErrorKind::Insufficient,
            _ => ErrorKind::InvalidRspec,
        };
        Self {
            kind,
            message: error.to_string(),
            attribute: error.attribute().map(str::to_owned),
            value: error.value().map(str::to_owned),
            allowed: error.allowed().map(str::to_owned),
        }
    }
}
