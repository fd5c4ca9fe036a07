//! The state of every sliver as last told, and its spreading to who listens.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use mandoline_api::nodemgr::{SliverEvent, VmId};
use mandoline_rspec::SliceId;
use tokio::sync::broadcast;

/// How many events a slow listener may be behind; beyond that its stream ends and it asks again with `since`.
const BACKLOG: usize = 4096;

/// An event, and who may see it beside the owner.
#[derive(Debug, Clone)]
pub struct Told {
    /// The event.
    pub event: SliverEvent,
    /// The slice that holds the pool the sliver was made from, and the sliver's own slice.
    pub audience: [SliceId; 2],
}

struct Inner {
    last: BTreeMap<VmId, Told>,
    seq: u64,
}

/// Events of all slivers.
pub struct EventHub {
    inner: Mutex<Inner>,
    sender: broadcast::Sender<Told>,
}

impl EventHub {
    /// A hub whose sequence numbers go on from those of all earlier starts: the start's number is the upper
    /// half, so that no event needs a write to the disk.
    pub fn new(starts: u64) -> Self {
        let (sender, _) = broadcast::channel(BACKLOG);
        Self {
            inner: Mutex::new(Inner {
                last: BTreeMap::new(),
                seq: starts << 32,
            }),
            sender,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change below is one assignment: a panic elsewhere leaves nothing half-done here.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last event of a sliver.
    pub fn last(&self, vm_id: VmId) -> Option<SliverEvent> {
        self.lock().last.get(&vm_id).map(|told| told.event.clone())
    }

    /// Tells an event: numbers it, remembers it and sends it to who listens.
    pub fn tell(&self, mut event: SliverEvent, audience: [SliceId; 2], is_last: bool) -> SliverEvent {
        let mut inner = self.lock();
        inner.seq += 1;
        event.seq = inner.seq;
        let told = Told {
            event: event.clone(),
            audience,
        };
        match is_last {
            true => drop(inner.last.remove(&event.vm_id)),
            false => drop(inner.last.insert(event.vm_id, told.clone())),
        }
        // Nobody may be listening. Sent under the lock, so that listeners see events in order.
        let _ = self.sender.send(told);
        event
    }

    /// Changes the last event of a sliver without telling it: the next one carries it.
    pub fn note(&self, vm_id: VmId, alter: impl FnOnce(&mut SliverEvent)) {
        if let Some(told) = self.lock().last.get_mut(&vm_id) {
            alter(&mut told.event);
        }
    }

    /// What has changed since `since` (the last event of each sliver), and all that comes after.
    pub fn subscribe(&self, since: Option<u64>) -> (Vec<Told>, broadcast::Receiver<Told>) {
        let inner = self.lock();
        let receiver = self.sender.subscribe();
        let mut past: Vec<Told> = match since {
            Some(since) => inner
                .last
                .values()
                .filter(|told| told.event.seq > since)
                .cloned()
                .collect(),
            None => Vec::new(),
        };
        past.sort_by_key(|told| told.event.seq);
        (past, receiver)
    }
}
