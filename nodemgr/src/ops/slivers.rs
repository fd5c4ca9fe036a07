//! Slivers: made by `bind`, started, stopped, destroyed.

use std::collections::BTreeSet;

use jiff::Timestamp;
use mandoline_api::nodemgr::{ErrorBody, ErrorKind, VmId};
use mandoline_rspec::{Rcap, Rspec, RspecError, SliceId, Value, format_bytes};

use super::{Op, OpResult, conflict, forbidden};
use crate::state::{Change, Pool, PoolId, Sliver, Wanted};
use crate::store::Outcome;

impl Op<'_> {
    pub(super) fn bind(&mut self, rcap: &Rcap, slice: &str) -> OpResult<Outcome> {
        let pool = self.pool(rcap)?;
        let slice = self.rules.slice(slice)?;
        if let Some(vm_id) = pool.bound {
            return Err(
                conflict(format!("the pool is bound to sliver {vm_id} already")).allowed("an unbound pool")
            );
        }
        if pool.retired || self.change.children(pool.id).next().is_some() {
            return Err(conflict("the pool is withdrawn, or pools were split from it")
                .allowed("a whole pool: split one off and bind that"));
        }
        if let Some(Value::Time(end)) = pool.granted.get("end_time")
            && *end <= Timestamp::now()
        {
            return Err(ErrorBody::from(RspecError::Invalid {
                attribute: "end_time".to_owned(),
                value: end.to_string(),
                problem: "past",
                allowed: "a time to come".to_owned(),
            }));
        }
        let living = self
            .change
            .all_slivers()
            .find(|s| s.slice == slice && s.wanted != Wanted::Destroyed);
        match living.cloned() {
            Some(sliver) => self.add(pool, sliver),
            None => self.create(pool, slice),
        }
    }

    fn create(&mut self, mut pool: Pool, slice: SliceId) -> OpResult<Outcome> {
        if !self.rules.services.may_create(self.caller, &slice) {
            return Err(
                forbidden(format!("{} may not make a sliver for slice {slice}", self.caller)).allowed(
                    "the owner, the slice itself, and services that the owner lets act for its authority",
                ),
            );
        }
        let vm_type = self.backend(&pool.granted)?;
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
        };
        pool.bound = Some(vm_id);
        self.change.put_pool(pool);
        self.change.put_sliver(sliver);
        self.check_overbooking()?;
        Ok(Outcome::Vm { vm_id })
    }

    /// Adds a further pool to a living sliver.
    fn add(&mut self, mut pool: Pool, mut sliver: Sliver) -> OpResult<Outcome> {
        // The sum must be one that the sliver can have; after this nothing can go wrong with it.
        self.change.sliver_rspec(&sliver).add(&pool.granted)?;
        pool.bound = Some(sliver.vm_id);
        sliver.pools.push(pool.id);
        sliver.resizes += 1;
        let vm_id = sliver.vm_id;
        self.change.put_pool(pool);
        self.change.put_sliver(sliver);
        self.check_overbooking()?;
        Ok(Outcome::Vm { vm_id })
    }

    fn backend(&self, rspec: &Rspec) -> OpResult<String> {
        let names = || self.rules.vm_types.keys().cloned().collect::<Vec<_>>().join(", ");
        let Some(name) = rspec.vm_type() else {
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
    fn check_overbooking(&self) -> OpResult<()> {
        let bounds = [
            ("mem_limit", self.rules.overbook.memory),
            ("disk_quota", self.rules.overbook.disk),
        ];
        for (attribute, factor) in bounds {
            let Some(capacity) = self.change.capacity().number(attribute) else {
                continue;
            };
            let bound = (capacity as f64 * factor) as u64;
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
        let mut sliver = self.living_sliver(rcap)?;
        sliver.wanted = Wanted::Running;
        sliver.note = None;
        self.change.put_sliver(sliver);
        Ok(Outcome::Done)
    }

    pub(super) fn stop(&mut self, rcap: &Rcap) -> OpResult<Outcome> {
        let mut sliver = self.living_sliver(rcap)?;
        sliver.wanted = Wanted::Stopped;
        sliver.note = None;
        self.change.put_sliver(sliver);
        Ok(Outcome::Done)
    }

    pub(super) fn restart(&mut self, rcap: &Rcap) -> OpResult<Outcome> {
        let mut sliver = self.living_sliver(rcap)?;
        sliver.wanted = Wanted::Running;
        sliver.note = None;
        sliver.restarts += 1;
        self.change.put_sliver(sliver);
        Ok(Outcome::Done)
    }

    pub(super) fn destroy(&mut self, rcap: &Rcap) -> OpResult<Outcome> {
        let mut sliver = self.sliver(rcap)?;
        sliver.wanted = Wanted::Destroyed;
        self.change.put_sliver(sliver);
        Ok(Outcome::Done)
    }
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

/// Lets what is past its `end_time` return: slivers are to be destroyed, added pools leave their sliver,
/// pools from which nothing is split go.
pub fn expire(change: &mut Change<'_>, now: Timestamp) {
    let is_past = |pool: &Pool| matches!(pool.granted.get("end_time"), Some(Value::Time(end)) if *end <= now);
    let past: Vec<PoolId> = change
        .all_pools()
        .filter(|pool| is_past(pool))
        .map(|pool| pool.id)
        .collect();
    for id in past {
        let Some(pool) = change.pool(id).cloned() else {
            continue;
        };
        match pool.bound.and_then(|vm_id| change.sliver(vm_id).cloned()) {
            Some(sliver) if sliver.wanted == Wanted::Destroyed => {}
            Some(mut sliver) if sliver.pools.first() == Some(&id) => {
                sliver.wanted = Wanted::Destroyed;
                sliver.note = Some("its end_time has come".to_owned());
                change.put_sliver(sliver);
            }
            Some(mut sliver) => {
                sliver.pools.retain(|other| *other != id);
                sliver.resizes += 1;
                change.put_sliver(sliver);
                change.remove_pool(id);
            }
            None if change.children(id).next().is_none() => change.remove_pool(id),
            None => {}
        }
    }
}
