//! Time bounds act by themselves: nothing before its `start_time`, nothing after its `end_time`.
//!
//! ```text
//!            bind             start_time              end_time
//!             │                   │                       │
//!   unbound ──► bound, waiting ───► counts for its sliver ─► returned (a sliver's own pool: destroyed)
//!                                        ▲
//!                 renewal: binding a pool that ends later moves the sliver's own end_time there
//! ```

use jiff::Timestamp;
use mandoline_rspec::Value;

use super::{Op, OpResult};
use crate::state::{Change, Pool, PoolId, Sliver, Wanted};

fn time(pool: &Pool, name: &str) -> Option<Timestamp> {
    match pool.granted.get(name) {
        Some(Value::Time(time)) => Some(*time),
        _ => None,
    }
}

/// The pool and those above it.
fn chain<'a>(change: &'a Change<'_>, pool: &'a Pool) -> impl Iterator<Item = &'a Pool> {
    std::iter::successors(Some(pool), |pool| change.pool(pool.parent()?))
}

/// From when a pool may be used: the latest `start_time` of it and those above it.
pub(super) fn start(change: &Change<'_>, pool: &Pool) -> Option<Timestamp> {
    chain(change, pool)
        .filter_map(|pool| time(pool, "start_time"))
        .max()
}

/// Until when a pool may be used: the earliest `end_time` of it and those above it.
pub(super) fn end(change: &Change<'_>, pool: &Pool) -> Option<Timestamp> {
    chain(change, pool)
        .filter_map(|pool| time(pool, "end_time"))
        .min()
}

impl Op<'_> {
    /// A pool that ends later renews the sliver it is bound to: the sliver's own pool ends then, as far as
    /// what that was split from allows.
    pub(super) fn renew(&mut self, pool: &Pool, sliver: &Sliver) -> OpResult<()> {
        let own = sliver.pools.first().and_then(|id| self.change.pool(*id)).cloned();
        let (Some(mut own), Some(until)) = (own, time(pool, "end_time")) else {
            return Ok(());
        };
        if time(&own, "end_time").is_none_or(|end| end >= until) {
            return Ok(());
        }
        own.granted
            .set_json("end_time", &until.to_string().into())
            .map_err(mandoline_api::nodemgr::ErrorBody::from)?;
        if let Some(above) = own.parent().and_then(|id| self.change.pool(id)) {
            self.change.bounds(above).check_within(&own.granted)?;
        }
        self.change.put_pool(own);
        Ok(())
    }
}

/// Lets time act: what begins counts for its sliver; what is past its end returns. Slivers are to be
/// destroyed, added pools leave theirs, pools from which nothing is split go.
pub fn pass(change: &mut Change<'_>, now: Timestamp) {
    let begun: Vec<Pool> = change
        .all_pools()
        .filter(|pool| pool.waiting && start(change, pool).is_none_or(|start| start <= now))
        .cloned()
        .collect();
    for mut pool in begun {
        if let Some(mut sliver) = pool.bound.and_then(|vm_id| change.sliver(vm_id).cloned()) {
            if sliver.pools.first() != Some(&pool.id) {
                sliver.resizes += 1;
            }
            // Recorded even where nothing of it changes: that wakes its supervisor.
            change.put_sliver(sliver);
        }
        pool.waiting = false;
        change.put_pool(pool);
    }
    // Children are younger than what they were split from: they go first.
    let mut past: Vec<PoolId> = change
        .all_pools()
        .filter(|pool| end(change, pool).is_some_and(|end| end <= now))
        .map(|pool| pool.id)
        .collect();
    past.reverse();
    for id in past {
        end_pool(change, id);
    }
}

fn end_pool(change: &mut Change<'_>, id: PoolId) {
    let Some(pool) = change.pool(id).cloned() else {
        return;
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
