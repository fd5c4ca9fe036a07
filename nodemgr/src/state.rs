//! What the node manager remembers: pools, slivers, and the one way to change them.
//!
//! A pool remembers what it was made with; what is *left* in it is worked out from its children. So nothing
//! can be counted twice and nothing can leak, whatever happens between two changes.
//!
//! A [`Change`] is built against the state, written to disk, and only then applied: see [`crate::store`].

use std::collections::{BTreeMap, BTreeSet};

use mandoline_api::nodemgr::VmId;
use mandoline_rspec::{Loan, MANDOLINE, Profile, Rspec, SliceId, Unlent, with_loans};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::policy::Policy;

/// A pool's number; never used twice.
pub type PoolId = u64;

/// Where a pool comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The owner's script: the n-th pool that it names for this slice.
    Script(u32),
    /// The owner's call of `create_root_pool`.
    Owner,
    /// Split from a pool.
    Split(PoolId),
    /// Taken by a slice from what the node had left.
    Acquired,
}

/// Resources that somebody holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pool {
    /// Its number.
    pub id: PoolId,
    /// Rises when its rcap is revoked.
    pub epoch: u32,
    /// Where it comes from.
    pub origin: Origin,
    /// The slice whose `get_rcap` finds it.
    pub holder: SliceId,
    /// What it was made with.
    pub granted: Rspec,
    /// The VM that it is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound: Option<VmId>,
    /// Withdrawn by the owner: it goes when its last child does.
    #[serde(default)]
    pub retired: bool,
    /// Bound, though its `start_time` is to come: until then it adds nothing.
    #[serde(default)]
    pub waiting: bool,
    /// Kept by the owner's script for a service of the host: nobody can fetch or split it.
    #[serde(default)]
    pub set_aside: bool,
    /// As the owner's script has it, where that is in per cent of the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub written: Option<Json>,
}

impl Pool {
    /// The pool that it was split from; none for a root pool.
    pub fn parent(&self) -> Option<PoolId> {
        match self.origin {
            Origin::Split(parent) => Some(parent),
            _ => None,
        }
    }
}

/// What is wanted of a sliver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// It should run.
    Running,
    /// It should not run; its disk stays.
    Stopped,
    /// It and all it has should go.
    Destroyed,
}

/// One VM on this node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sliver {
    /// Its id; never used twice, since audit records name it.
    pub vm_id: VmId,
    /// A small number that is used again: it picks address, tap, ports and user ids.
    pub index: u16,
    /// Whose it is.
    pub slice: SliceId,
    /// The backend.
    pub vm_type: String,
    /// The pools that it has; the first made it and stands for it.
    pub pools: Vec<PoolId>,
    /// What is wanted of it.
    pub wanted: Wanted,
    /// Counts `restart`s, so that one is neither lost nor done twice.
    #[serde(default)]
    pub restarts: u64,
    /// Counts changes of its resources.
    #[serde(default)]
    pub resizes: u64,
    /// Why it is stopped when nobody asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// The host keys of its sshd, kept since they stay the same from start to start.
    #[serde(default)]
    pub ssh_host_keys: Vec<String>,
    /// Stopped by the owner's denial, though it should run.
    #[serde(default)]
    pub held: bool,
    /// What it lends to other slices of the node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loans: Vec<Loan>,
}

/// Everything, as the store holds it.
#[derive(Debug, Clone)]
pub struct State {
    /// What was found on the node. Worked out at each start, not stored.
    pub found: Rspec,
    /// What the owner gives of it in all: what was found, within the owner's limit.
    pub capacity: Rspec,
    /// The defaults of what a sliver's pools do not name. From the configuration, not stored.
    pub profile: Profile,
    /// What the owner has decided.
    pub policy: Policy,
    /// Pools by number.
    pub pools: BTreeMap<PoolId, Pool>,
    /// Slivers by id.
    pub slivers: BTreeMap<VmId, Sliver>,
    /// The next pool's number.
    pub next_pool: PoolId,
    /// The next sliver's id.
    pub next_vm: VmId,
    children: BTreeMap<PoolId, BTreeSet<PoolId>>,
}

/// A change that is being prepared: the state seen through what it alters.
#[derive(Debug)]
pub struct Change<'a> {
    base: &'a State,
    /// What the owner decides anew, and the capacity that follows.
    policy: Option<(Policy, Rspec)>,
    /// Pools made or altered; none for a pool that goes.
    pub pools: BTreeMap<PoolId, Option<Pool>>,
    /// Slivers made or altered; none for a sliver that goes.
    pub slivers: BTreeMap<VmId, Option<Sliver>>,
    /// The next pool's number.
    pub next_pool: PoolId,
    /// The next sliver's id.
    pub next_vm: VmId,
}

/// A [`Change`] without its view of the state: what is to be written.
#[derive(Debug, Default)]
pub struct Delta {
    /// What the owner has decided, if that changed.
    pub policy: Option<Policy>,
    /// Pools made or altered; none for a pool that goes.
    pub pools: BTreeMap<PoolId, Option<Pool>>,
    /// Slivers made or altered; none for a sliver that goes.
    pub slivers: BTreeMap<VmId, Option<Sliver>>,
    /// The next pool's number.
    pub next_pool: PoolId,
    /// The next sliver's id.
    pub next_vm: VmId,
}

impl Delta {
    /// True if nothing is altered.
    pub fn is_empty(&self) -> bool {
        self.pools.is_empty() && self.slivers.is_empty() && self.policy.is_none()
    }
}

impl State {
    /// A state from what a store holds, on a node that has `found`.
    pub fn new(
        found: Rspec,
        policy: Policy,
        pools: Vec<Pool>,
        slivers: Vec<Sliver>,
        next: (PoolId, VmId),
    ) -> Self {
        let mut state = Self {
            capacity: found.limited(&policy.node_limit),
            found,
            profile: MANDOLINE,
            policy,
            pools: BTreeMap::new(),
            slivers: BTreeMap::new(),
            next_pool: next.0.max(1),
            next_vm: next.1.max(1),
            children: BTreeMap::new(),
        };
        for pool in pools {
            state.next_pool = state.next_pool.max(pool.id + 1);
            state.insert(pool);
        }
        for sliver in slivers {
            state.next_vm = state.next_vm.max(sliver.vm_id + 1);
            state.slivers.insert(sliver.vm_id, sliver);
        }
        state
    }

    fn insert(&mut self, pool: Pool) {
        if let Some(parent) = pool.parent() {
            self.children.entry(parent).or_default().insert(pool.id);
        }
        self.pools.insert(pool.id, pool);
    }

    /// Starts a change.
    pub fn change(&self) -> Change<'_> {
        Change {
            base: self,
            policy: None,
            pools: BTreeMap::new(),
            slivers: BTreeMap::new(),
            next_pool: self.next_pool,
            next_vm: self.next_vm,
        }
    }

    /// Applies what was written.
    pub fn apply(&mut self, delta: Delta) {
        if let Some(policy) = delta.policy {
            self.capacity = self.found.limited(&policy.node_limit);
            self.policy = policy;
        }
        for (id, pool) in delta.pools {
            if let Some(old) = self.pools.remove(&id)
                && let Some(parent) = old.parent()
                && let Some(children) = self.children.get_mut(&parent)
            {
                children.remove(&id);
                if children.is_empty() {
                    self.children.remove(&parent);
                }
            }
            if let Some(pool) = pool {
                self.insert(pool);
            }
        }
        for (id, sliver) in delta.slivers {
            match sliver {
                Some(sliver) => self.slivers.insert(id, sliver),
                None => self.slivers.remove(&id),
            };
        }
        self.next_pool = delta.next_pool;
        self.next_vm = delta.next_vm;
    }
}

impl<'a> Change<'a> {
    /// Ends the change: what is to be written.
    pub fn into_delta(self) -> Delta {
        Delta {
            policy: self.policy.map(|(policy, _)| policy),
            pools: self.pools,
            slivers: self.slivers,
            next_pool: self.next_pool,
            next_vm: self.next_vm,
        }
    }

    /// What the owner gives of the node in all.
    pub fn capacity(&self) -> &Rspec {
        match &self.policy {
            Some((_, capacity)) => capacity,
            None => &self.base.capacity,
        }
    }

    /// What the owner has decided.
    pub fn policy(&self) -> &Policy {
        match &self.policy {
            Some((policy, _)) => policy,
            None => &self.base.policy,
        }
    }

    /// Records what the owner decides.
    pub fn put_policy(&mut self, policy: Policy) {
        let capacity = self.base.found.limited(&policy.node_limit);
        self.policy = Some((policy, capacity));
    }

    /// A pool as the change leaves it.
    pub fn pool(&self, id: PoolId) -> Option<&Pool> {
        match self.pools.get(&id) {
            Some(pool) => pool.as_ref(),
            None => self.base.pools.get(&id),
        }
    }

    /// A sliver as the change leaves it.
    pub fn sliver(&self, id: VmId) -> Option<&Sliver> {
        match self.slivers.get(&id) {
            Some(sliver) => sliver.as_ref(),
            None => self.base.slivers.get(&id),
        }
    }

    /// All pools, oldest first.
    pub fn all_pools(&self) -> impl Iterator<Item = &Pool> {
        let made = self
            .pools
            .range(self.base.next_pool..)
            .filter_map(|(_, pool)| pool.as_ref());
        self.base.pools.keys().filter_map(|id| self.pool(*id)).chain(made)
    }

    /// All slivers, oldest first.
    pub fn all_slivers(&self) -> impl Iterator<Item = &Sliver> {
        let made = self
            .slivers
            .range(self.base.next_vm..)
            .filter_map(|(_, sliver)| sliver.as_ref());
        self.base
            .slivers
            .keys()
            .filter_map(|id| self.sliver(*id))
            .chain(made)
    }

    /// The pools that were split from a pool.
    pub fn children(&self, id: PoolId) -> impl Iterator<Item = &Pool> {
        let old = self
            .base
            .children
            .get(&id)
            .into_iter()
            .flatten()
            .filter_map(|id| self.pool(*id));
        let made = self
            .pools
            .range(self.base.next_pool..)
            .filter_map(|(_, pool)| pool.as_ref());
        old.chain(made.filter(move |pool| pool.parent() == Some(id)))
    }

    /// What is left in a pool.
    pub fn rest(&self, pool: &Pool) -> Rspec {
        let mut rest = pool.granted.clone();
        for child in self.children(pool.id) {
            rest.take_out(&child.granted);
        }
        rest
    }

    /// What is left of the node beside the root pools, as if `without` were not there.
    pub fn node_rest(&self, without: Option<PoolId>) -> Rspec {
        let mut rest = self.capacity().clone();
        for pool in self
            .all_pools()
            .filter(|pool| pool.parent().is_none() && Some(pool.id) != without)
        {
            rest.take_out(&pool.granted);
        }
        rest
    }

    /// Every limit, weight and interval that binds who splits from this pool: its own and those of the pools
    /// above it, up to the node's.
    pub fn bounds(&self, pool: &Pool) -> Rspec {
        let mut bounds = pool.granted.clone();
        let mut above = pool.parent();
        while let Some(parent) = above.and_then(|id| self.pool(id)) {
            bounds = bounds.bounded_by(&parent.granted);
            above = parent.parent();
        }
        bounds.bounded_by(self.capacity())
    }

    /// What a sliver was given in all: its pools together, none above what bounds it now, with the node's
    /// defaults where the first names nothing.
    pub fn sliver_rspec(&self, sliver: &Sliver) -> Rspec {
        let mut pools = sliver.pools.iter().filter_map(|id| self.pool(*id));
        let Some(first) = pools.next() else {
            return Rspec::new();
        };
        let bounds = self.bounds(first);
        let given = first.granted.clone();
        let mut rspec = given
            .with_profile(&self.base.profile, &bounds)
            .bounded_by(&bounds);
        for pool in pools.filter(|pool| !pool.waiting) {
            // A sum that overflows cannot come from pools that fit the node; bind has checked it.
            if let Err(error) = rspec.add(&pool.granted.clipped(&self.bounds(pool))) {
                tracing::warn!(vm_id = sliver.vm_id, %error, "pool not added to the sliver's resources");
            }
        }
        rspec
    }

    /// The living sliver of a slice.
    pub fn sliver_of(&self, slice: &SliceId) -> Option<&Sliver> {
        self.all_slivers()
            .find(|sliver| sliver.slice == *slice && sliver.wanted != Wanted::Destroyed)
    }

    /// What every living sliver has with all loans of the node, and the loans that move nothing now.
    pub fn effective(&self) -> (BTreeMap<SliceId, Rspec>, Vec<Unlent>) {
        let living = || {
            self.all_slivers()
                .filter(|sliver| sliver.wanted != Wanted::Destroyed)
        };
        let own = living()
            .map(|s| (s.slice.clone(), self.sliver_rspec(s)))
            .collect();
        let loans = living().flat_map(|s| s.loans.iter().map(|loan| (&s.slice, loan)));
        with_loans(&own, loans)
    }

    /// What a sliver has with all loans of the node.
    pub fn effective_rspec(&self, sliver: &Sliver) -> Rspec {
        let lends = |s: &Sliver| s.wanted != Wanted::Destroyed && !s.loans.is_empty();
        if sliver.wanted == Wanted::Destroyed || !self.all_slivers().any(lends) {
            return self.sliver_rspec(sliver);
        }
        let (mut effective, _) = self.effective();
        effective
            .remove(&sliver.slice)
            .unwrap_or_else(|| self.sliver_rspec(sliver))
    }

    /// Counts a change of resources for every living sliver that has another rspec now than before.
    pub fn touch_changed(&mut self) {
        let before = self.base.change().effective().0;
        let after = self.effective().0;
        let differ = |sliver: &&Sliver| {
            sliver.wanted != Wanted::Destroyed && before.get(&sliver.slice) != after.get(&sliver.slice)
        };
        let touched: Vec<Sliver> = self.all_slivers().filter(differ).cloned().collect();
        for mut sliver in touched {
            sliver.resizes += 1;
            self.put_sliver(sliver);
        }
    }

    /// Records a pool.
    pub fn put_pool(&mut self, pool: Pool) {
        self.pools.insert(pool.id, Some(pool));
    }

    /// Records a sliver.
    pub fn put_sliver(&mut self, sliver: Sliver) {
        self.slivers.insert(sliver.vm_id, Some(sliver));
    }

    /// A new pool's number.
    pub fn new_pool_id(&mut self) -> PoolId {
        self.next_pool += 1;
        self.next_pool - 1
    }

    /// A new sliver's id.
    pub fn new_vm_id(&mut self) -> VmId {
        self.next_vm += 1;
        self.next_vm - 1
    }

    /// Takes a pool away, and with it every withdrawn pool above it whose last child it was.
    pub fn remove_pool(&mut self, id: PoolId) {
        let Some(pool) = self.pool(id).cloned() else {
            return;
        };
        self.pools.insert(id, None);
        if let Some(parent) = pool.parent().and_then(|parent| self.pool(parent))
            && parent.retired
            && self.children(parent.id).next().is_none()
        {
            let parent = parent.id;
            self.remove_pool(parent);
        }
    }
}
