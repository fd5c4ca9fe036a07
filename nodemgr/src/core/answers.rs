//! What is answered from what is recorded: nothing here changes anything.

use std::collections::BTreeMap;

use mandoline_api::nodemgr::{
    Actuator, ErrorBody, ErrorKind, ListAnswer, LoansAnswer, NodeInfo, PolicyAnswer, PoolInfo, RspecAnswer,
    SliverInfo,
};
use mandoline_rspec::{ATTRIBUTE_TABLE_VERSION, Rcap};

use super::Core;
use crate::caller::Caller;
use crate::ops::{self, Op, OpResult};

impl Core {
    /// The answer that an outcome stands for.
    pub fn rcap(&self, pool: u64, epoch: u32) -> Rcap {
        self.secret.rcap(pool, epoch)
    }

    /// `get_rcap` and `get_rcaps`: the caller's unbound pools, oldest first.
    pub fn rcaps(&self, caller: &Caller) -> OpResult<Vec<Rcap>> {
        let inner = self.lock();
        match caller {
            Caller::Slice(slice) => Ok(ops::pools_of(&inner.state, slice)
                .map(|pool| self.secret.rcap(pool.id, pool.epoch))
                .collect()),
            Caller::Owner => Ok(Vec::new()),
            Caller::Stranger(uid) => Err(stranger(*uid)),
        }
    }

    /// The caller's oldest unbound pool.
    pub fn oldest_rcap(&self, caller: &Caller) -> OpResult<Rcap> {
        match (self.rcaps(caller)?.into_iter().next(), caller) {
            (Some(rcap), _) => Ok(rcap),
            (None, Caller::Slice(slice)) => Err(ops::pools::no_pool(slice)),
            (None, _) => Err(ErrorBody::new(ErrorKind::NotFound, "the owner holds no pool")
                .allowed("list shows all pools")),
        }
    }

    /// `get_rspec`.
    pub fn rspec(&self, caller: &Caller, rcap: &Rcap) -> OpResult<RspecAnswer> {
        if let Caller::Stranger(uid) = caller {
            return Err(stranger(*uid));
        }
        let inner = self.lock();
        let pool = inner
            .index
            .find(&self.secret, &inner.state, rcap)
            .ok_or_else(ops::unknown_rcap)?;
        let change = inner.state.change();
        let sliver = pool.bound.and_then(|vm_id| inner.state.slivers.get(&vm_id));
        let rspec = match sliver {
            Some(sliver) if sliver.pools.first() == Some(&pool.id) => change.effective_rspec(sliver),
            Some(_) => pool.granted.clone(),
            None => change.rest(pool),
        };
        Ok(RspecAnswer {
            rspec,
            vm_id: pool.bound,
            slice: sliver.map(|sliver| sliver.slice.to_string()),
        })
    }

    /// `list`.
    pub fn list(&self, caller: &Caller) -> OpResult<ListAnswer> {
        if let Caller::Stranger(uid) = caller {
            return Err(stranger(*uid));
        }
        let inner = self.lock();
        let change = inner.state.change();
        let sees = |holder: &mandoline_rspec::SliceId| match caller {
            Caller::Slice(slice) => slice == holder,
            _ => true,
        };
        let pools = inner
            .state
            .pools
            .values()
            .filter(|pool| pool.bound.is_none() && sees(&pool.holder));
        let pools = pools
            .map(|pool| PoolInfo {
                id: pool.id,
                parent: pool.parent(),
                rcap: self.secret.rcap(pool.id, pool.epoch),
                holder: pool.holder.to_string(),
                granted: pool.granted.clone(),
                rspec: change.rest(pool),
                children: change.children(pool.id).count(),
                retired: pool.retired,
            })
            .collect();
        let slivers = inner.state.slivers.values().filter_map(|sliver| {
            let pool = inner.state.pools.get(sliver.pools.first()?)?;
            (sees(&pool.holder) || sees(&sliver.slice)).then(|| SliverInfo {
                parent: pool.parent(),
                rcap: self.secret.rcap(pool.id, pool.epoch),
                rspec: change.effective_rspec(sliver),
                account: self.rules.account(&sliver.slice),
                event: self.event_of(sliver),
            })
        });
        Ok(ListAnswer {
            pools,
            slivers: slivers.collect(),
        })
    }

    /// `policy`: what the owner has decided, for those who may decide some of it.
    pub fn policy(&self, caller: &Caller) -> OpResult<PolicyAnswer> {
        let policy = &self.lock().state.policy;
        let services = &self.rules.services;
        let decides = |actuator: &Actuator| policy.may(services, caller, *actuator);
        if ![Actuator::NodeLimit, Actuator::Deny, Actuator::RootPools]
            .iter()
            .any(decides)
        {
            let message = format!("{caller} may not see what the owner has decided");
            return Err(ErrorBody::new(ErrorKind::Forbidden, message)
                .allowed("the owner, and who may decide some of it"));
        }
        Ok(PolicyAnswer {
            node_limit: policy.node_limit.clone(),
            grants: policy.all_grants(services),
            denials: policy.denials.clone(),
        })
    }

    /// Whether a caller may use a control of the node.
    pub fn may(&self, caller: &Caller, actuator: Actuator) -> bool {
        let inner = self.lock();
        inner.state.policy.may(&self.rules.services, caller, actuator)
    }

    /// `get_loans`, for who may act for the slice.
    pub fn loans(&self, caller: &Caller, slice: &str) -> OpResult<LoansAnswer> {
        self.ask(caller, |op| op.loans_of(slice))
    }

    /// Whether a caller may act for a slice that has a sliver here.
    pub fn acts_for(&self, caller: &Caller, slice: &str) -> OpResult<bool> {
        let slice = self.rules.slice(slice)?;
        Ok(self.ask(caller, |op| op.may_act_for(&slice, op.change.sliver_of(&slice))))
    }

    /// Sees the state as an operation of the caller does.
    fn ask<T>(&self, caller: &Caller, ask: impl FnOnce(&Op<'_>) -> T) -> T {
        let inner = self.lock();
        ask(&Op {
            caller,
            rules: &self.rules,
            secret: &self.secret,
            index: &inner.index,
            state: &inner.state,
            now: self.now(),
            used: None,
            change: inner.state.change(),
        })
    }

    /// `GET /v1/node`.
    pub fn node(&self) -> NodeInfo {
        let inner = self.lock();
        let names = self
            .rules
            .vm_types
            .iter()
            .filter(|(name, backend)| name != backend);
        NodeInfo {
            vm_types: self.registry.iter().map(|backend| backend.info()).collect(),
            vm_type_names: names
                .map(|(name, backend)| (name.clone(), backend.clone()))
                .collect(),
            attribute_table_version: ATTRIBUTE_TABLE_VERSION,
            capacity: inner.state.capacity.clone(),
            available: inner.state.change().node_rest(None),
            limits: BTreeMap::from([
                ("slivers".to_owned(), u64::from(self.rules.max_slivers)),
                ("slivers_now".to_owned(), inner.state.slivers.len() as u64),
                ("pools_now".to_owned(), inner.state.pools.len() as u64),
            ]),
        }
    }
}

fn stranger(uid: u32) -> ErrorBody {
    ErrorBody::new(
        ErrorKind::Forbidden,
        format!("uid {uid} is no service of this node"),
    )
    .allowed("users that the node manager's configuration lists in [services]")
}
