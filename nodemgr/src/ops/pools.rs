//! Pools: made by the owner, split, given back.

use mandoline_api::nodemgr::{Actuator, ErrorBody, ErrorKind};
use mandoline_rspec::{Rcap, Rspec, SliceId};

use super::{Op, OpResult, conflict, pools_of};
use crate::caller::Caller;
use crate::state::{Origin, Pool, PoolId};
use crate::store::Outcome;

impl Op<'_> {
    pub(super) fn create_root_pool(&mut self, rspec: &Rspec, slice: &str) -> OpResult<Outcome> {
        self.needs(Actuator::RootPools, "create root pools")?;
        let holder = self.rules.slice(slice)?;
        self.new_root_pool(rspec, holder, Origin::Owner)
    }

    /// Makes a root pool from what the node has left.
    pub(super) fn new_root_pool(
        &mut self,
        rspec: &Rspec,
        holder: SliceId,
        origin: Origin,
    ) -> OpResult<Outcome> {
        let mut rest = self.change.node_rest(None);
        let granted = rest.split(rspec)?;
        Ok(self.new_pool(origin, holder, granted))
    }

    fn new_pool(&mut self, origin: Origin, holder: SliceId, granted: Rspec) -> Outcome {
        let pool = self.put_new_pool(origin, holder, granted);
        Outcome::Rcap { pool, epoch: 0 }
    }

    /// Records a new pool; that what it comes from has as much is the caller's to check.
    pub(crate) fn put_new_pool(&mut self, origin: Origin, holder: SliceId, granted: Rspec) -> PoolId {
        let id = self.change.new_pool_id();
        self.change.put_pool(Pool {
            id,
            epoch: 0,
            origin,
            holder,
            granted,
            bound: None,
            retired: false,
            waiting: false,
            set_aside: false,
            written: None,
        });
        id
    }

    pub(super) fn split_pool(&mut self, rcap: &Rcap, want: &Rspec) -> OpResult<Outcome> {
        let pool = self.pool(rcap)?;
        self.split(&pool, want)
    }

    pub(super) fn acquire(&mut self, want: &Rspec) -> OpResult<Outcome> {
        let Caller::Slice(slice) = self.caller else {
            return Err(
                conflict("the owner has no pool of its own to acquire from").allowed("create_root_pool")
            );
        };
        if let Some(pool) = pools_of(self.state, slice).next() {
            return self.split(pool, want);
        }
        // Who holds no pool takes from what the node has left, if it is privileged (NSDI'04 paper, section
        // 4.2.1).
        let policy = self.change.policy();
        match policy.may(&self.rules.services, self.caller, Actuator::Acquire) {
            true => self.new_root_pool(want, slice.clone(), Origin::Acquired),
            false => Err(no_pool(slice)),
        }
    }

    fn split(&mut self, pool: &Pool, want: &Rspec) -> OpResult<Outcome> {
        if let Some(vm_id) = pool.bound {
            return Err(
                conflict(format!("the pool is bound to sliver {vm_id} and cannot be split"))
                    .allowed("a pool that is not bound"),
            );
        }
        if pool.set_aside {
            return Err(
                conflict("the owner keeps this pool for a service of the node").allowed("another pool")
            );
        }
        if pool.retired {
            return Err(
                conflict("the owner has withdrawn this pool").allowed("releasing what was split from it")
            );
        }
        self.change.bounds(pool).check_within(want)?;
        let granted = self.change.rest(pool).split(want)?;
        // The child belongs to who splits; the owner splits on behalf of the pool's holder.
        let holder = match self.caller {
            Caller::Slice(slice) => slice.clone(),
            _ => pool.holder.clone(),
        };
        Ok(self.new_pool(Origin::Split(pool.id), holder, granted))
    }

    pub(super) fn release(&mut self, rcap: &Rcap) -> OpResult<Outcome> {
        let pool = self.pool(rcap)?;
        let children = self.change.children(pool.id).count();
        if children > 0 {
            return Err(conflict(format!(
                "{children} pools were split from this one and are not given back"
            ))
            .allowed("releasing or destroying those first"));
        }
        if pool.parent().is_none() && pool.origin != Origin::Acquired {
            self.needs(Actuator::RootPools, "take a root pool away")?;
        }
        match pool.bound.and_then(|vm_id| self.change.sliver(vm_id).cloned()) {
            Some(sliver) if sliver.pools.first() == Some(&pool.id) => Err(conflict(format!(
                "the pool is what sliver {} was made from",
                sliver.vm_id
            ))
            .allowed("destroy, which gives the pool back too")),
            Some(mut sliver) => {
                self.check_take_away(&pool, &sliver)?;
                sliver.pools.retain(|id| *id != pool.id);
                sliver.resizes += 1;
                self.change.put_sliver(sliver);
                self.change.remove_pool(pool.id);
                Ok(Outcome::Done)
            }
            None => {
                self.change.remove_pool(pool.id);
                Ok(Outcome::Done)
            }
        }
    }
}

/// The caller holds no unbound pool.
pub(crate) fn no_pool(slice: &SliceId) -> ErrorBody {
    ErrorBody::new(
        ErrorKind::NotFound,
        format!("slice {slice} holds no unbound pool on this node"),
    )
    .allowed("after the owner's create_root_pool names this slice")
}
