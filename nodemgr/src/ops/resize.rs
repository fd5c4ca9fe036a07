//! `resize`: another size for a pool that is there, bound or not; and what may be taken from a living sliver.

use mandoline_api::nodemgr::{Actuator, ErrorBody, ErrorKind};
use mandoline_rspec::{ATTRIBUTES, Kind, Rcap, Rspec, RspecError, Value};

use super::{Op, OpResult, conflict};
use crate::state::{Origin, Pool, Sliver};
use crate::store::Outcome;

/// What a sliver uses now, and what its backend can change while it runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Use {
    /// Memory, in bytes; 0 where it does not run.
    pub memory: u64,
    /// Blocks of its disk, in bytes.
    pub disk: u64,
    /// `resize:<attribute>` for each attribute that changes live.
    pub capabilities: Vec<String>,
}

impl Op<'_> {
    /// `resize`: the attributes that are named replace those of the pool, the others stay.
    pub(super) fn resize(&mut self, rcap: &Rcap, want: &Rspec) -> OpResult<Outcome> {
        let pool = self.pool(rcap)?;
        if pool.parent().is_none() && pool.origin != Origin::Acquired {
            self.needs(Actuator::RootPools, "resize a root pool")?;
        }
        if pool.retired {
            return Err(conflict("the owner has withdrawn this pool").allowed("a pool that is not withdrawn"));
        }
        let mut granted = pool.granted.clone();
        for (name, value) in want.iter() {
            granted.remove(name);
            granted.set_json(name, &value.to_json())?;
        }
        self.check_parent_has(&pool, &granted)?;
        self.put_resized(pool, granted, true)?;
        self.change.touch_changed();
        self.check_overbooking()?;
        Ok(Outcome::Done)
    }

    /// Refuses a pool a size that what it comes from has not.
    fn check_parent_has(&self, pool: &Pool, granted: &Rspec) -> OpResult<()> {
        match pool.parent().and_then(|id| self.change.pool(id)) {
            Some(parent) => {
                self.change.bounds(parent).check_within(granted)?;
                let mut rest = parent.granted.clone();
                for sibling in self
                    .change
                    .children(parent.id)
                    .filter(|other| other.id != pool.id)
                {
                    rest.take_out(&sibling.granted);
                }
                rest.split(granted)?;
            }
            None => drop(self.change.node_rest(Some(pool.id)).split(granted)?),
        }
        Ok(())
    }

    /// Gives a pool another size: what was split from it must still fit, and a sliver that it is bound to must
    /// get by with it. With `gently`, nothing that the sliver uses and that cannot be taken from it while it
    /// runs is taken. Whether what it comes from has as much is the caller's to check.
    pub(crate) fn put_resized(&mut self, mut pool: Pool, granted: Rspec, gently: bool) -> OpResult<()> {
        let mut rest = granted.clone();
        for child in self.change.children(pool.id) {
            // Limits may shrink below a child's: they are then bounded from above. Reservations may not.
            let mut reserved = child.granted.clone();
            for attribute in ATTRIBUTES {
                if !matches!(attribute.kind, Kind::Reservation | Kind::Set) {
                    reserved.remove(attribute.name);
                }
            }
            rest.split(&reserved)?;
        }
        let sliver = pool.bound.and_then(|vm_id| self.change.sliver(vm_id)).cloned();
        if let Some(sliver) = &sliver
            && sliver.pools.first() == Some(&pool.id)
            && pool.granted.vm_type() != granted.vm_type()
        {
            return Err(RspecError::Invalid {
                attribute: "vm_type".to_owned(),
                value: granted.vm_type().unwrap_or("none").to_owned(),
                problem: "another one than the living sliver's",
                allowed: pool.granted.vm_type().unwrap_or("none").to_owned(),
            }
            .into());
        }
        let before = sliver.as_ref().map(|sliver| self.change.sliver_rspec(sliver));
        pool.granted = granted;
        self.change.put_pool(pool);
        if let (Some(sliver), Some(before)) = (&sliver, &before) {
            let after = self.change.sliver_rspec(sliver);
            after.check_sliver()?;
            if gently {
                self.check_shrink(before, &after)?;
            }
        }
        Ok(())
    }

    /// Refuses to take a pool from a sliver that uses what it has from it.
    pub(super) fn check_take_away(&self, pool: &Pool, sliver: &Sliver) -> OpResult<()> {
        let before = self.change.sliver_rspec(sliver);
        let mut without = sliver.clone();
        without.pools.retain(|id| *id != pool.id);
        let after = self.change.sliver_rspec(&without);
        after.check_sliver()?;
        self.check_shrink(&before, &after)
    }

    /// Refuses a sliver less than it uses, where that cannot be taken while it runs: memory of a backend
    /// without a balloon, blocks of a disk.
    fn check_shrink(&self, before: &Rspec, after: &Rspec) -> OpResult<()> {
        let Some(used) = self.used else { return Ok(()) };
        let live = |name: &str| used.capabilities.iter().any(|capability| capability == name);
        let bounds = [
            (
                "mem_limit",
                if live("resize:mem_limit") { 0 } else { used.memory },
            ),
            ("disk_quota", used.disk),
        ];
        for (name, used) in bounds {
            let (Some(before), Some(after)) = (before.number(name), after.number(name)) else {
                continue;
            };
            if after < before && after < used {
                let show = |number| match mandoline_rspec::attribute(name) {
                    Some(attribute) => Value::Number(number).display(attribute),
                    None => number.to_string(),
                };
                return Err(ErrorBody {
                    kind: ErrorKind::Conflict,
                    ..ErrorBody::from(RspecError::Invalid {
                        attribute: name.to_owned(),
                        value: show(after),
                        problem: "less than the sliver uses, and cannot be taken from it while it lives",
                        allowed: format!("at least {}", show(used)),
                    })
                });
            }
        }
        Ok(())
    }
}
