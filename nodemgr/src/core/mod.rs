//! The node manager itself: takes operations, writes them down, answers, and wakes who makes them real.
//!
//! ```text
//!  HTTP ──► Core::execute ──► ops (check, change) ──► store (durable) ──► state ──► answer
//!                                                                          │
//!                                              supervisor of each sliver ◄─┘ wake
//!                                                          │
//!                                              vm_type backend ──► events
//! ```

mod answers;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use mandoline_api::nodemgr::{
    ErrorBody, ErrorKind, FailureClass, Initscript, OwnerScript, SliverEvent, SliverState, VmId,
};
use mandoline_rspec::Rcap;
use tokio::sync::{Notify, watch};

use crate::caller::Caller;
use crate::events::EventHub;
use crate::net::{Held, Spent};
use crate::ops::{self, Op, OpResult, Operation, Rules, Use};
use crate::owner;
use crate::secret::{RcapIndex, Secret};
use crate::state::{Change, Sliver, State};
use crate::store::{ANSWERS_MAX, Loaded, Outcome, Store, StoreError, StoredAnswer};
use crate::vm_type::{Registry, SliverSpec, monotonic_ns};

struct Inner {
    state: State,
    index: RcapIndex,
    store: Store,
    answers: BTreeMap<String, StoredAnswer>,
}

/// How a sliver's supervisor is woken.
#[derive(Debug, Default)]
pub struct Waker {
    /// Rung whenever what is recorded of the sliver has changed.
    pub bell: Notify,
    /// When the request that caused the current start came in, `CLOCK_MONOTONIC` ns.
    pub since_ns: AtomicU64,
    /// What the node's state asks of it.
    pub orders: Mutex<Orders>,
}

/// What the state of the node asks of a sliver; nothing that is recorded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Orders {
    /// Stop it at once and start it again, for this reason.
    pub reset: Option<String>,
    /// Let it wait for as long as this reason holds.
    pub hold: Option<String>,
}

impl Waker {
    /// The orders as they are now. A reset is given once.
    pub fn take_orders(&self) -> Orders {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        Orders {
            reset: orders.reset.take(),
            hold: orders.hold.clone(),
        }
    }
}

/// A request that carries an idempotency key.
#[derive(Debug, Clone)]
pub struct Key {
    /// The caller's key.
    pub key: String,
    /// SHA-256 of operation and request, in hexadecimal.
    pub request: String,
}

/// Tells the time by which time bounds act.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// The node manager.
pub struct Core {
    /// What operations go by.
    pub rules: Rules,
    /// The backends.
    pub registry: Registry,
    /// What is told of slivers.
    pub events: EventHub,
    /// Rung when slivers come or go: the node's accounts are to be written.
    pub accounts_bell: Notify,
    /// What all slivers together may send now, in bit/s: the owner can bound it while they run.
    pub node_rate: watch::Sender<Option<u64>>,
    clock: Clock,
    secret: Secret,
    inner: Mutex<Inner>,
    wakers: Mutex<BTreeMap<VmId, Arc<Waker>>>,
}

/// Nanoseconds since 1970.
pub fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

impl Core {
    /// A node manager on what a store holds.
    pub fn new(
        rules: Rules,
        registry: Registry,
        secret: Secret,
        store: Store,
        mut loaded: Loaded,
        clock: Clock,
    ) -> Self {
        loaded.state.profile = rules.profile;
        let node_rate = watch::Sender::new(loaded.state.capacity.number("burst_rate"));
        let index = RcapIndex::new(&secret, &loaded.state);
        let inner = Inner {
            state: loaded.state,
            index,
            store,
            answers: loaded.answers,
        };
        Self {
            rules,
            registry,
            events: EventHub::new(loaded.starts),
            accounts_bell: Notify::new(),
            node_rate,
            clock,
            secret,
            inner: Mutex::new(inner),
            wakers: Mutex::new(BTreeMap::new()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // State is applied in one go after it is written; a panic before that leaves it as it was.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What slices have sent in their days, as it was last kept.
    pub fn spent(&self) -> Result<BTreeMap<String, Spent>, StoreError> {
        self.lock().store.spent()
    }

    /// Keeps what slices have sent; none for one of which nothing is kept.
    pub async fn keep_spent(
        self: &Arc<Self>,
        changes: BTreeMap<String, Option<Spent>>,
    ) -> Result<(), StoreError> {
        let core = Arc::clone(self);
        let work = move || core.lock().store.keep_spent(&changes);
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            // Cancelled with the runtime: the node manager is ending.
            Err(_) => Ok(()),
        }
    }

    /// Tells a sliver's slice that it is held to its sustained rate, or no more.
    pub fn tell_held(&self, vm_id: VmId, held: Option<Held>) {
        const WHY: &str = "its slice has used up its day's bytes";
        let Some(sliver) = self.sliver(vm_id) else { return };
        let mut event = self.event_of(&sliver);
        // What else there is to say of it stays.
        let ours = |reason: &String| reason.starts_with(WHY);
        if held.is_none() && !event.reason.as_ref().is_some_and(ours) {
            return;
        }
        (event.reason, event.class) = match held {
            Some(Held { rate, until_ns }) => {
                let until = i64::try_from(until_ns / 1_000_000_000)
                    .ok()
                    .and_then(|seconds| Timestamp::from_second(seconds).ok())
                    .unwrap_or(Timestamp::MAX);
                let reason = format!("{WHY}: held to {rate} until {until}");
                tracing::info!(vm_id, slice = %sliver.slice, reason);
                (Some(reason), Some(FailureClass::Continuable))
            }
            None => (None, None),
        };
        self.events.tell(event, self.audience(&sliver), false);
    }

    /// Does an operation, durably. A repeated key gives the stored outcome.
    pub async fn execute(
        self: &Arc<Self>,
        caller: Caller,
        operation: Operation,
        key: Option<Key>,
    ) -> OpResult<Outcome> {
        let since = monotonic_ns();
        let used = match &operation {
            Operation::Resize(rcap, _) | Operation::Release(rcap) => self.use_of(rcap).await,
            _ => None,
        };
        let core = Arc::clone(self);
        let work = move || core.execute_now(&caller, &operation, used.as_ref(), key, since);
        match tokio::task::spawn_blocking(work).await {
            Ok((outcome, touched)) => {
                for vm_id in touched {
                    self.wake(vm_id, Some(since));
                }
                outcome
            }
            Err(error) => {
                tracing::error!(%error, "operation ended in a panic");
                Err(internal())
            }
        }
    }

    /// What the sliver uses that a pool is bound to.
    async fn use_of(&self, rcap: &Rcap) -> Option<Use> {
        let sliver = {
            let inner = self.lock();
            let pool = inner.index.find(&self.secret, &inner.state, rcap)?;
            inner.state.slivers.get(&pool.bound?)?.clone()
        };
        let backend = self.registry.get(&sliver.vm_type)?;
        // One that does not run may have no figures: then nothing of it is in use.
        let stats = backend.stats(sliver.vm_id).await.unwrap_or_default();
        Some(Use {
            memory: stats.memory,
            disk: stats.disk,
            capabilities: backend.info().capabilities,
        })
    }

    /// The time by the node manager's clock.
    pub fn now(&self) -> Timestamp {
        (self.clock)()
    }

    fn execute_now(
        &self,
        caller: &Caller,
        operation: &Operation,
        used: Option<&Use>,
        key: Option<Key>,
        since: u64,
    ) -> (OpResult<Outcome>, Vec<VmId>) {
        let mut inner = self.lock();
        let slot = key.as_ref().map(|key| format!("{caller}\n{}", key.key));
        if let (Some(slot), Some(key)) = (&slot, &key)
            && let Some(stored) = inner.answers.get(slot)
        {
            return match stored.request == key.request {
                true => (Ok(stored.outcome.clone()), Vec::new()),
                false => (Err(key_reused(&key.key)), Vec::new()),
            };
        }
        let Inner { state, index, .. } = &*inner;
        let mut op = Op {
            caller,
            rules: &self.rules,
            secret: &self.secret,
            index,
            state,
            now: self.now(),
            used,
            change: state.change(),
        };
        let outcome = match op.perform(operation) {
            Ok(outcome) => outcome,
            Err(error) => return (Err(error), Vec::new()),
        };
        let delta = op.change.into_delta();
        let answer = key.map(|key| StoredAnswer {
            request: key.request,
            outcome: outcome.clone(),
            unix_ns: unix_ns(),
        });
        let touched: Vec<VmId> = delta.slivers.keys().copied().collect();
        let stored = slot.as_deref().zip(answer.as_ref());
        if let Err(error) = self.write(&mut inner, delta, stored) {
            tracing::error!(%error, "change not recorded");
            return (Err(internal()), Vec::new());
        }
        drop(inner);
        tracing::debug!(took_us = (monotonic_ns() - since) / 1000, "recorded");
        (Ok(outcome), touched)
    }

    /// Writes a change to the disk, then applies it.
    fn write(
        &self,
        inner: &mut Inner,
        delta: crate::state::Delta,
        answer: Option<(&str, &StoredAnswer)>,
    ) -> Result<(), StoreError> {
        let mut forget = Vec::new();
        if answer.is_some() && inner.answers.len() >= ANSWERS_MAX {
            let oldest = inner
                .answers
                .iter()
                .min_by_key(|(_, a)| a.unix_ns)
                .map(|(slot, _)| slot.clone());
            forget.extend(oldest);
        }
        inner.store.commit(&delta, answer, &forget)?;
        for slot in &forget {
            inner.answers.remove(slot);
        }
        if let Some((slot, answer)) = answer {
            inner.answers.insert(slot.to_owned(), answer.clone());
        }
        for (id, pool) in &delta.pools {
            if let Some(old) = inner.state.pools.get(id) {
                inner.index.remove(&self.secret, old);
            }
            if let Some(new) = pool {
                inner.index.insert(&self.secret, new);
            }
        }
        let decides = delta.policy.is_some();
        inner.state.apply(delta);
        if decides {
            let rate = inner.state.capacity.number("burst_rate");
            self.node_rate
                .send_if_modified(|now| std::mem::replace(now, rate) != rate);
        }
        Ok(())
    }

    /// Makes a change of the node manager's own, durably. Gives the slivers that it touched.
    fn alter(&self, alter: impl FnOnce(&mut Change<'_>)) -> Result<Vec<VmId>, StoreError> {
        let mut inner = self.lock();
        let mut change = inner.state.change();
        alter(&mut change);
        let delta = change.into_delta();
        if delta.is_empty() {
            return Ok(Vec::new());
        }
        let touched = delta.slivers.keys().copied().collect();
        self.write(&mut inner, delta, None)?;
        Ok(touched)
    }

    async fn alter_async(
        self: &Arc<Self>,
        change: impl FnOnce(&mut Change<'_>) + Send + 'static,
    ) -> Vec<VmId> {
        let core = Arc::clone(self);
        match tokio::task::spawn_blocking(move || core.alter(change)).await {
            Ok(Ok(touched)) => touched,
            Ok(Err(error)) => {
                tracing::error!(%error, "change not recorded");
                Vec::new()
            }
            Err(error) => {
                tracing::error!(%error, "change ended in a panic");
                Vec::new()
            }
        }
    }

    /// The owner's script as it stands at the start: the one that came over the socket, or the file's.
    pub fn script_at_start(&self, path: &std::path::Path) -> Result<Option<OwnerScript>, owner::ScriptError> {
        owner::at_start(path, &self.lock().state.policy)
    }

    /// Applies the owner's script; without one, only the owner's own sliver is seen to. Gives how many root
    /// pools it names.
    pub fn apply_script(&self, script: Option<&OwnerScript>) -> Result<usize, ErrorBody> {
        let mut inner = self.lock();
        let Inner { state, index, .. } = &*inner;
        let mut op = Op {
            caller: &Caller::Owner,
            rules: &self.rules,
            secret: &self.secret,
            index,
            state,
            now: self.now(),
            used: None,
            change: state.change(),
        };
        let pools = match script {
            Some(script) => op.run_script(script)?,
            None => op.owners_sliver()?,
        };
        let delta = op.change.into_delta();
        if !delta.is_empty() {
            self.write(&mut inner, delta, None).map_err(|error| {
                tracing::error!(%error, "owner's script not recorded");
                internal()
            })?;
        }
        Ok(pools.len())
    }

    /// Lets time act: what begins counts, what is past its end returns.
    pub async fn expire(self: &Arc<Self>) {
        let now = self.now();
        for vm_id in self.alter_async(move |change| ops::pass(change, now)).await {
            self.wake(vm_id, None);
        }
    }

    /// Records that a sliver and all it had is gone, and tells so.
    pub async fn gone(self: &Arc<Self>, sliver: &Sliver) {
        let vm_id = sliver.vm_id;
        let audience = self.audience(sliver);
        self.alter_async(move |change| ops::gone(change, vm_id)).await;
        let mut event = self.event_of(sliver);
        event.state = SliverState::Gone;
        event.reason = sliver.note.clone();
        event.class = None;
        event.unix_ns = unix_ns();
        self.events.tell(event, audience, true);
        self.wakers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&vm_id);
        self.accounts_bell.notify_one();
    }

    /// Records that a sliver stopped by itself.
    pub async fn stopped_by_itself(self: &Arc<Self>, vm_id: VmId, note: String) {
        self.alter_async(move |change| ops::set_stopped(change, vm_id, &note))
            .await;
    }

    /// Records a sliver's host keys.
    pub async fn host_keys(self: &Arc<Self>, vm_id: VmId, keys: Vec<String>) {
        self.alter_async(move |change| ops::set_host_keys(change, vm_id, &keys))
            .await;
    }

    /// The ids of all slivers that are recorded, the owner's own first.
    pub fn recorded(&self) -> Vec<VmId> {
        let inner = self.lock();
        let own = self.rules.site_admin.as_ref().map(|admin| &admin.slice);
        let mut slivers: Vec<&Sliver> = inner.state.slivers.values().collect();
        slivers.sort_by_key(|sliver| Some(&sliver.slice) != own);
        slivers.iter().map(|sliver| sliver.vm_id).collect()
    }

    /// What is recorded of a sliver.
    pub fn sliver(&self, vm_id: VmId) -> Option<Sliver> {
        self.lock().state.slivers.get(&vm_id).cloned()
    }

    /// What a backend needs to know of a sliver.
    pub fn spec(&self, sliver: &Sliver) -> SliverSpec {
        let rspec = self.lock().state.change().effective_rspec(sliver);
        SliverSpec {
            vm_id: sliver.vm_id,
            index: sliver.index,
            slice: sliver.slice.clone(),
            vm_type: sliver.vm_type.clone(),
            account: self.rules.account(&sliver.slice),
            rspec,
        }
    }

    /// All slivers as backends know them.
    pub fn specs(&self) -> Vec<SliverSpec> {
        let slivers: Vec<Sliver> = self.lock().state.slivers.values().cloned().collect();
        slivers.iter().map(|sliver| self.spec(sliver)).collect()
    }

    /// What the pools of all slivers name of a reservation, together. Defaults reserve nothing.
    pub fn bound_in_all(&self, attribute: &str) -> u64 {
        let inner = self.lock();
        let bound = inner.state.pools.values().filter(|pool| pool.bound.is_some());
        bound.fold(0, |sum: u64, pool| {
            sum.saturating_add(pool.granted.number(attribute).unwrap_or(0))
        })
    }

    /// Who may see a sliver's events.
    pub fn audience(&self, sliver: &Sliver) -> [mandoline_rspec::SliceId; 2] {
        let inner = self.lock();
        let holder = sliver
            .pools
            .first()
            .and_then(|id| inner.state.pools.get(id))
            .map(|p| p.holder.clone());
        [
            holder.unwrap_or_else(|| sliver.slice.clone()),
            sliver.slice.clone(),
        ]
    }

    /// The last event of a sliver, or the first that there can be.
    pub fn event_of(&self, sliver: &Sliver) -> SliverEvent {
        self.events.last(sliver.vm_id).unwrap_or_else(|| SliverEvent {
            seq: 0,
            vm_id: sliver.vm_id,
            slice: sliver.slice.to_string(),
            vm_type: sliver.vm_type.clone(),
            state: SliverState::Defined,
            reason: None,
            class: None,
            initscript: Initscript::None,
            address: None,
            ssh_host_keys: sliver.ssh_host_keys.clone(),
            phases_us: BTreeMap::new(),
            unix_ns: unix_ns(),
        })
    }

    /// Rings a sliver's supervisor, which is started if there is none.
    pub fn wake(self: &Arc<Self>, vm_id: VmId, since: Option<u64>) {
        let mut wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        let waker = match wakers.get(&vm_id) {
            Some(waker) => Arc::clone(waker),
            None => {
                let waker = Arc::new(Waker::default());
                wakers.insert(vm_id, Arc::clone(&waker));
                waker
                    .since_ns
                    .store(since.unwrap_or_else(monotonic_ns), Ordering::Relaxed);
                tokio::spawn(crate::supervisor::run(
                    Arc::clone(self),
                    vm_id,
                    Arc::clone(&waker),
                ));
                self.accounts_bell.notify_one();
                return;
            }
        };
        if let Some(since) = since {
            waker.since_ns.store(since, Ordering::Relaxed);
        }
        waker.bell.notify_one();
    }

    /// Orders a sliver's supervisor about, and rings it.
    pub fn order(&self, vm_id: VmId, alter: impl FnOnce(&mut Orders)) {
        let wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waker) = wakers.get(&vm_id) {
            alter(&mut waker.orders.lock().unwrap_or_else(PoisonError::into_inner));
            waker.bell.notify_one();
        }
    }
}

fn internal() -> ErrorBody {
    ErrorBody::new(
        ErrorKind::Internal,
        "the node manager failed and recorded nothing; its log says why",
    )
}

fn key_reused(key: &str) -> ErrorBody {
    ErrorBody {
        kind: ErrorKind::KeyReused,
        message: format!("idempotency key {key:?} was used with another request"),
        attribute: Some("idempotency-key".to_owned()),
        value: Some(key.to_owned()),
        allowed: Some("a new key for each new request".to_owned()),
    }
}
