//! The operations of the node manager's interface, as changes of the state: checked, then recorded.
//!
//! Nothing here waits or touches the node: [`crate::core::Core`] writes the change down, and the slivers'
//! supervisors bring the node to what is recorded.

mod loans;
mod policy;
pub(crate) mod pools;
mod resize;
mod slivers;
#[cfg(test)]
pub(crate) mod tests;
mod time;

use std::collections::BTreeMap;
use std::path::PathBuf;

use jiff::Timestamp;
use mandoline_api::nodemgr::{Actuator, ErrorBody, ErrorKind, Grant, OwnerScript};
use mandoline_rspec::{AuthorityName, NameError, Profile, Rcap, Rspec, SliceId, SliceName};

use crate::caller::{Caller, Services};
use crate::owner;
use crate::secret::{RcapIndex, Secret};
use crate::state::{Change, Pool, State};
use crate::store::Outcome;

pub use resize::Use;
pub use slivers::{gone, set_host_keys, set_stopped};
pub use time::pass;

/// Result of an operation.
pub type OpResult<T> = Result<T, ErrorBody>;

/// An operation that changes something.
#[derive(Debug, Clone)]
pub enum Operation {
    /// `create_root_pool(rspec, slice_name)`.
    CreateRootPool(Rspec, String),
    /// `split_pool(rcap, rspec)`.
    SplitPool(Rcap, Rspec),
    /// `acquire(rspec)`.
    Acquire(Rspec),
    /// `bind(rcap, slice_name)`.
    Bind(Rcap, String),
    /// `release(rcap)`.
    Release(Rcap),
    /// `start(rcap)`.
    Start(Rcap),
    /// `stop(rcap)`.
    Stop(Rcap),
    /// `restart(rcap)`.
    Restart(Rcap),
    /// `destroy(rcap)`.
    Destroy(Rcap),
    /// `resize(rcap, rspec)`.
    Resize(Rcap, Rspec),
    /// `start_slice(slice_name)` and its like.
    OnSlice(SliceAction, String),
    /// `set_loans(slice_name, [(recipient, resource, amount)])`.
    SetLoans(String, Vec<(String, String, u64)>),
    /// `set_node_limit(rspec)`.
    SetNodeLimit(Rspec),
    /// `deny(slice_name, reason)`.
    Deny(String, String),
    /// `allow(slice_name)`.
    Allow(String),
    /// `grant(slice_name, grant)`.
    Grant(String, Grant),
    /// `revoke(slice_name)`.
    Revoke(String),
    /// `owner_script(script)`.
    OwnerScript(OwnerScript),
}

/// What can be done to a slice's sliver by who may act for the slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SliceAction {
    /// `start_slice`.
    Start,
    /// `stop_slice`.
    Stop,
    /// `restart_slice`.
    Restart,
    /// `destroy_slice`.
    Destroy,
}

/// How far the owner lets limits be overbooked: the sum of all slivers' limits over what the node has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Overbook {
    /// Of memory.
    pub memory: f64,
    /// Of disk.
    pub disk: f64,
}

/// What operations go by beside the state.
#[derive(Debug)]
pub struct Rules {
    /// The authority of slice names that name none.
    pub default_authority: AuthorityName,
    /// Names of the node beside `site_admin` and `pl_conf`.
    pub local_names: Vec<SliceName>,
    /// Who may make slivers for whom.
    pub services: Services,
    /// Names of virtualisations that can be used, to the backend that does it.
    pub vm_types: BTreeMap<String, String>,
    /// The virtualisation of slices whose pools name none: services of the host that the node manager runs.
    pub default_vm_types: BTreeMap<SliceId, String>,
    /// How far limits may be overbooked.
    pub overbook: Overbook,
    /// Most slivers at once; their indices are 1 to this.
    pub max_slivers: u16,
    /// The defaults of what a sliver's pools do not name.
    pub profile: Profile,
    /// The file with the owner's script.
    pub owner_script: PathBuf,
    /// The owner's own sliver, where it is wanted.
    pub site_admin: Option<owner::Entry>,
}

impl Rules {
    /// Reads a slice's name.
    pub fn slice(&self, text: &str) -> OpResult<SliceId> {
        SliceId::parse(text, &self.default_authority, &self.local_names).map_err(name_error)
    }

    /// The account of a slice on this node: the bare name where that is unambiguous.
    pub fn account(&self, slice: &SliceId) -> String {
        let bare = slice.name().as_str();
        let is_local = || {
            mandoline_rspec::LOCAL_NAMES.contains(&bare)
                || self.local_names.iter().any(|name| name.as_str() == bare)
        };
        match slice.authority() {
            None => bare.to_owned(),
            Some(authority) if *authority == self.default_authority && !is_local() => bare.to_owned(),
            Some(_) => slice.to_string(),
        }
    }
}

fn name_error(error: NameError) -> ErrorBody {
    ErrorBody {
        kind: ErrorKind::InvalidName,
        message: error.to_string(),
        attribute: Some("slice_name".to_owned()),
        value: Some(error.value),
        allowed: Some(error.allowed.to_owned()),
    }
}

/// One operation in progress.
pub struct Op<'a> {
    /// Who calls.
    pub caller: &'a Caller,
    /// What it goes by.
    pub rules: &'a Rules,
    /// What rcaps are derived from.
    pub secret: &'a Secret,
    /// Finds pools by rcap.
    pub index: &'a RcapIndex,
    /// The state before.
    pub state: &'a State,
    /// The time.
    pub now: Timestamp,
    /// What the sliver uses that the operation is about, where that matters.
    pub used: Option<&'a Use>,
    /// The change in the making.
    pub change: Change<'a>,
}

impl Op<'_> {
    /// Does one operation: the change holds it, and the outcome says how to answer.
    pub fn perform(&mut self, operation: &Operation) -> OpResult<Outcome> {
        if let Caller::Stranger(uid) = self.caller {
            return Err(forbidden(format!("uid {uid} is no service of this node")).allowed(
                "the owner's socket, and the users that the node manager's configuration lists in [services]",
            ));
        }
        match operation {
            Operation::CreateRootPool(rspec, slice) => self.create_root_pool(rspec, slice),
            Operation::SplitPool(rcap, rspec) => self.split_pool(rcap, rspec),
            Operation::Acquire(rspec) => self.acquire(rspec),
            Operation::Bind(rcap, slice) => self.bind(rcap, slice),
            Operation::Release(rcap) => self.release(rcap),
            Operation::Start(rcap) => self.start(rcap),
            Operation::Stop(rcap) => self.stop(rcap),
            Operation::Restart(rcap) => self.restart(rcap),
            Operation::Destroy(rcap) => self.destroy(rcap),
            Operation::Resize(rcap, rspec) => self.resize(rcap, rspec),
            Operation::OnSlice(action, slice) => self.on_slice(*action, slice),
            Operation::SetLoans(slice, loans) => self.set_loans(slice, loans),
            Operation::SetNodeLimit(rspec) => self.set_node_limit(rspec),
            Operation::Deny(slice, reason) => self.deny(slice, reason),
            Operation::Allow(slice) => self.allow(slice),
            Operation::Grant(slice, grant) => self.grant(slice, grant),
            Operation::Revoke(slice) => self.revoke(slice),
            Operation::OwnerScript(script) => self.owner_script(script),
        }
    }

    /// Refuses a caller that may not use a control of the node.
    fn needs(&self, actuator: Actuator, what: &str) -> OpResult<()> {
        match self
            .change
            .policy()
            .may(&self.rules.services, self.caller, actuator)
        {
            true => Ok(()),
            false => Err(
                forbidden(format!("{} may not {what}", self.caller)).allowed(format!(
                    "the owner, and slices with a grant of the actuator `{}`",
                    actuator.name()
                )),
            ),
        }
    }

    /// The pool that an rcap stands for.
    fn pool(&self, rcap: &Rcap) -> OpResult<Pool> {
        self.index
            .find(self.secret, self.state, rcap)
            .cloned()
            .ok_or_else(unknown_rcap)
    }
}

/// No pool or sliver has this rcap.
pub fn unknown_rcap() -> ErrorBody {
    ErrorBody::new(
        ErrorKind::NotFound,
        "no pool or sliver of this node has this rcap",
    )
}

fn forbidden(message: impl Into<String>) -> ErrorBody {
    ErrorBody::new(ErrorKind::Forbidden, message)
}

fn conflict(message: impl Into<String>) -> ErrorBody {
    ErrorBody::new(ErrorKind::Conflict, message)
}

/// The unbound pools that a slice holds, oldest first.
pub fn pools_of<'a>(state: &'a State, slice: &'a SliceId) -> impl Iterator<Item = &'a Pool> {
    state
        .pools
        .values()
        .filter(move |pool| pool.holder == *slice && pool.bound.is_none() && !pool.retired && !pool.set_aside)
}
