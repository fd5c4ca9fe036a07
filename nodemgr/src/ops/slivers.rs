//! Slivers: made by `bind`, started, stopped, destroyed.

use std::collections::BTreeSet;

use mandoline_api::nodemgr::{Actuator, ErrorBody, ErrorKind, VmId};
use mandoline_rspec::{Rcap, RspecError, SliceId, format_bytes};

use super::{Op, OpResult, SliceAction, conflict, forbidden, time};
use crate::caller::Caller;
use crate::state::{Change, Pool, Sliver, Wanted};
use crate::store::Outcome;

impl Op<'_> {
    pub(super) fn bind(&mut self, rcap: &Rcap, slice: &str) -> OpResult<Outcome> {
        let pool = self.pool(rcap)?;
        let slice = self.rules.slice(slice)?;
        self.check_allowed(&slice)?;
        if let Some(vm_id) = pool.bound {
            return Err(
                conflict(format!("the pool is bound to sliver {vm_id} already")).allowed("an unbound pool")
            );
        }
        self.bind_pool(pool, slice)
    }

    /// Binds an unbound pool: makes the slice's VM, or adds to the one that is there.
    pub(crate) fn bind_pool(&mut self, pool: Pool, slice: SliceId) -> OpResult<Outcome> {
        if pool.set_aside {
            return Err(
                conflict("the owner keeps this pool for a service of the node").allowed("another pool")
            );
        }
        if pool.retired || self.change.children(pool.id).next().is_some() {
            return Err(conflict("the pool is withdrawn, or pools were split from it")
                .allowed("a whole pool: split one off and bind that"));
        }
        if let Some(end) = time::end(&self.change, &pool)
            && end <= self.now
        {
            return Err(ErrorBody::from(RspecError::Invalid {
                attribute: "end_time".to_owned(),
                value: end.to_string(),
                problem: "past",
                allowed: format!("a time after {}", self.now),
            }));
        }
        match self.change.sliver_of(&slice).cloned() {
            Some(sliver) => self.add(pool, sliver),
            None => self.create(pool, slice),
        }
    }

    fn create(&mut self, mut pool: Pool, slice: SliceId) -> OpResult<Outcome> {
        let by_default = self.rules.default_vm_types.get(&slice).map(String::as_str);
        let named = pool.granted.vm_type().or(by_default);
        // Who may not is told so before what is wrong with the rest.
        let backend = named.and_then(|name| self.rules.vm_types.get(name).map(String::as_str));
        let asked = backend.or(named).unwrap_or_default();
        let policy = self.change.policy();
        if !policy.may_create(&self.rules.services, self.caller, &slice, asked) {
            return Err(forbidden(format!(
                "{} may not make a sliver of vm_type {asked:?} for slice {slice}",
                self.caller
            ))
            .allowed("the owner, the slice itself, and slices that the owner's grant lets do it"));
        }
        let vm_type = self.backend(named)?;
        let index = self.free_index()?;
        let vm_id = self.change.new_vm_id();
        let sliver = Sliver {
            vm_id,
            index,
            slice,
            vm_type,
            pools: vec![pool.id],
            wanted: Wanted::Running,
            restarts: 0,
            resizes: 0,
            note: None,
            ssh_host_keys: Vec::new(),
            held: false,
            loans: Vec::new(),
        };
        pool.bound = Some(vm_id);
        pool.waiting = time::start(&self.change, &pool).is_some_and(|start| start > self.now);
        self.change.put_pool(pool);
        self.change.put_sliver(sliver.clone());
        self.change.sliver_rspec(&sliver).check_sliver()?;
        self.check_overbooking()?;
        Ok(Outcome::Vm { vm_id })
    }

    /// Adds a further pool to a living sliver.
    fn add(&mut self, mut pool: Pool, mut sliver: Sliver) -> OpResult<Outcome> {
        // The sum must be one that the sliver can have; after this nothing can go wrong with it.
        let mut sum = self.change.sliver_rspec(&sliver);
        sum.add(&pool.granted)?;
        sum.check_sliver()?;
        self.renew(&pool, &sliver)?;
        pool.bound = Some(sliver.vm_id);
        pool.waiting = time::start(&self.change, &pool).is_some_and(|start| start > self.now);
        sliver.pools.push(pool.id);
        sliver.resizes += 1;
        let vm_id = sliver.vm_id;
        self.change.put_pool(pool);
        self.change.put_sliver(sliver);
        self.check_overbooking()?;
        Ok(Outcome::Vm { vm_id })
    }

    fn backend(&self, name: Option<&str>) -> OpResult<String> {
        let names = || self.rules.vm_types.keys().cloned().collect::<Vec<_>>().join(", ");
        let Some(name) = name else {
            let allowed = names();
            return Err(RspecError::Missing {
                attribute: "vm_type".to_owned(),
                allowed,
            }
            .into());
        };
        self.rules.vm_types.get(name).cloned().ok_or_else(|| ErrorBody {
            kind: ErrorKind::UnknownVmType,
            message: format!("this node has no vm_type `{name}`; it has: {}", names()),
            attribute: Some("vm_type".to_owned()),
            value: Some(name.to_owned()),
            allowed: Some(names()),
        })
    }

    /// The smallest index that no sliver has. One that is being destroyed still has its own.
    fn free_index(&self) -> OpResult<u16> {
        let taken: BTreeSet<u16> = self.change.all_slivers().map(|s| s.index).collect();
        (1..=self.rules.max_slivers)
            .find(|index| !taken.contains(index))
            .ok_or_else(|| {
                ErrorBody::new(
                    ErrorKind::Unavailable,
                    format!("the node has {} slivers and room for no more", taken.len()),
                )
                .allowed(format!("at most {} slivers", self.rules.max_slivers))
            })
    }

    /// Limits are not subtracted from pools, but the owner bounds how far their sum may pass the node.
    pub(super) fn check_overbooking(&self) -> OpResult<()> {
        let bounds = [
            ("mem_limit", self.rules.overbook.memory),
            ("disk_quota", self.rules.overbook.disk),
        ];
        for (attribute, factor) in bounds {
            let Some(capacity) = self.change.capacity().number(attribute) else {
                continue;
            };
            let bound = (capacity as f64 * factor) as u64;
            // What binds is what the sum may be; a node that shrank under its slivers takes no more of them.
            let each = |sliver| self.change.sliver_rspec(sliver).number(attribute).unwrap_or(0);
            let sum = self
                .change
                .all_slivers()
                .map(each)
                .fold(0u64, u64::saturating_add);
            if sum > bound {
                let error = RspecError::Exceeds {
                    attribute: attribute.to_owned(),
                    value: format!("{} in all slivers together", format_bytes(sum)),
                    allowed: format!(
                        "at most {}: {factor} times what the node has",
                        format_bytes(bound)
                    ),
                };
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// The sliver that an rcap stands for: the pool that made it does, one that was added does not.
    fn sliver(&self, rcap: &Rcap) -> OpResult<Sliver> {
        let pool = self.pool(rcap)?;
        let Some(sliver) = pool.bound.and_then(|vm_id| self.change.sliver(vm_id)) else {
            return Err(conflict("this pool is not bound to a sliver").allowed("the rcap of a sliver"));
        };
        if sliver.pools.first() != Some(&pool.id) {
            return Err(forbidden(format!(
                "this pool was added to sliver {} and does not stand for it",
                sliver.vm_id
            ))
            .allowed("the rcap that the sliver was made from; release takes the added pool back"));
        }
        Ok(sliver.clone())
    }

    fn living_sliver(&self, rcap: &Rcap) -> OpResult<Sliver> {
        let sliver = self.sliver(rcap)?;
        match sliver.wanted {
            Wanted::Destroyed => {
                Err(conflict(format!("sliver {} is being destroyed", sliver.vm_id))
                    .allowed("a living sliver"))
            }
            _ => Ok(sliver),
        }
    }

    pub(super) fn start(&mut self, rcap: &Rcap) -> OpResult<Outcome> {
        let sliver = self.living_sliver(rcap)?;
        self.act(SliceAction::Start, sliver)
    }

    pub(super) fn stop(&mut self, rcap: &Rcap) -> OpResult<Outcome> {
        let sliver = self.living_sliver(rcap)?;
        self.act(SliceAction::Stop, sliver)
    }

    pub(super) fn restart(&mut self, rcap: &Rcap) -> OpResult<Outcome> {
        let sliver = self.living_sliver(rcap)?;
        self.act(SliceAction::Restart, sliver)
    }

    pub(super) fn destroy(&mut self, rcap: &Rcap) -> OpResult<Outcome> {
        let sliver = self.sliver(rcap)?;
        self.act(SliceAction::Destroy, sliver)
    }

    /// `start_slice` and its like: for the slice itself, who it lets act for it, the owner, and who may stop
    /// every sliver.
    pub(super) fn on_slice(&mut self, action: SliceAction, slice: &str) -> OpResult<Outcome> {
        let slice = self.rules.slice(slice)?;
        let sliver = self.change.sliver_of(&slice).cloned();
        let may_stop = self
            .change
            .policy()
            .may(&self.rules.services, self.caller, Actuator::Stop);
        let may = self.may_act_for(&slice, sliver.as_ref()) || (may_stop && action != SliceAction::Destroy);
        if !may {
            return Err(forbidden(format!("{} may not act for slice {slice}", self.caller)).allowed(
                "the slice itself, slices that its attribute `delegations` names, who holds its pool, the owner, \
                 and slices with a grant of the actuator `stop`",
            ));
        }
        let sliver = sliver.ok_or_else(|| no_sliver(&slice))?;
        self.act(action, sliver)
    }

    /// Whether the caller is the slice, one that it lets act for it, or who holds the pool that its sliver was
    /// made from.
    pub(crate) fn may_act_for(&self, slice: &SliceId, sliver: Option<&Sliver>) -> bool {
        let delegates = |who: &SliceId| {
            let rspec = sliver.map(|sliver| self.change.sliver_rspec(sliver));
            let names = rspec.as_ref().and_then(|rspec| rspec.text("delegations"));
            names
                .into_iter()
                .flat_map(|names| names.split(','))
                .any(|name| self.rules.slice(name.trim()).is_ok_and(|name| name == *who))
        };
        let holds = |who: &SliceId| {
            let first = sliver.and_then(|sliver| sliver.pools.first());
            first
                .and_then(|id| self.change.pool(*id))
                .is_some_and(|pool| pool.holder == *who)
        };
        match self.caller {
            Caller::Owner => true,
            Caller::Slice(who) => who == slice || delegates(who) || holds(who),
            Caller::Stranger(_) => false,
        }
    }

    fn act(&mut self, action: SliceAction, mut sliver: Sliver) -> OpResult<Outcome> {
        if matches!(action, SliceAction::Start | SliceAction::Restart) {
            self.check_allowed(&sliver.slice)?;
        }
        sliver.wanted = match action {
            SliceAction::Start | SliceAction::Restart => Wanted::Running,
            SliceAction::Stop => Wanted::Stopped,
            SliceAction::Destroy => Wanted::Destroyed,
        };
        if action == SliceAction::Restart {
            sliver.restarts += 1;
        }
        sliver.held = false;
        sliver.note = None;
        self.change.put_sliver(sliver);
        Ok(Outcome::Done)
    }
}

/// The slice has no living sliver on this node.
pub(crate) fn no_sliver(slice: &SliceId) -> ErrorBody {
    ErrorBody::new(
        ErrorKind::NotFound,
        format!("slice {slice} has no sliver on this node"),
    )
    .allowed("a slice with a sliver here; list shows them")
}

/// Records that a sliver is destroyed and all it had is gone: its pools return to where they came from. A
/// root pool that was bound itself becomes an ordinary root pool again, under a new rcap.
pub fn gone(change: &mut Change<'_>, vm_id: VmId) {
    let Some(sliver) = change.sliver(vm_id).cloned() else {
        return;
    };
    change.slivers.insert(vm_id, None);
    for id in sliver.pools {
        match change.pool(id).cloned() {
            Some(mut pool) if pool.parent().is_none() && !pool.retired => {
                pool.bound = None;
                pool.waiting = false;
                pool.epoch += 1;
                change.put_pool(pool);
            }
            _ => change.remove_pool(id),
        }
    }
}

/// Records that a sliver stopped by itself and is to stay so.
pub fn set_stopped(change: &mut Change<'_>, vm_id: VmId, note: &str) {
    if let Some(mut sliver) = change.sliver(vm_id).cloned()
        && sliver.wanted == Wanted::Running
    {
        sliver.wanted = Wanted::Stopped;
        sliver.note = Some(note.to_owned());
        change.put_sliver(sliver);
    }
}

/// Records the host keys of a sliver's sshd.
pub fn set_host_keys(change: &mut Change<'_>, vm_id: VmId, keys: &[String]) {
    if let Some(mut sliver) = change.sliver(vm_id).cloned()
        && sliver.ssh_host_keys != keys
    {
        sliver.ssh_host_keys = keys.to_vec();
        change.put_sliver(sliver);
    }
}
