//! From the node manager's events to the authority's reports: in order, in batches, again until accepted.
//!
//! ```text
//!            ┌───────────── stream lost: wait, ask from the last accepted seq ────────────┐
//!            ▼                                                                            │
//!        connecting ──► reading ──(an event, and all that wait behind it)──► sending ──► reading
//!                                                                             │    ▲
//!                                                               not answered  └────┘ wait, the same batch
//! ```
//!
//! Nothing is written down: the node manager repeats the last event of every sliver when it is asked from
//! zero, and the authority ignores reports that are older than what it knows.

use std::collections::HashMap;
use std::sync::Arc;

use mandoline_api::authority::{
    FailureClass as AuthorityClass, NodeStatus, SliverReport, SliverState as AuthorityState,
};
use mandoline_api::authority_client::{AuthorityClient, ErrorClass};
use mandoline_api::nodemgr::{
    ClientError, Events, FailureClass, Initscript, NodeManager, SliverEvent, SliverState, VmId,
};
use tokio::sync::{Notify, mpsc};

use super::backoff::Backoff;
use super::plan::{Failure, SliceRef, Tag};

/// The most reports of one call.
const BATCH: usize = 256;

/// Sends reports until the process ends.
pub struct Reporter {
    /// The node manager.
    pub nm: NodeManager,
    /// The authority, called as this node.
    pub authority: AuthorityClient,
    /// Failures that the service found itself.
    pub failures: mpsc::Receiver<Failure>,
    /// Poked when the authority does not know the node.
    pub unknown: Arc<Notify>,
    /// How long to wait between attempts.
    pub backoff: Backoff,
}

impl Reporter {
    /// Sends reports for ever.
    pub async fn run(mut self) {
        let mut slices = Slices::default();
        let mut accepted = 0;
        let mut pause = self.backoff.clone();
        loop {
            let mut events = match self.nm.events(Some(accepted)).await {
                Ok(events) => events,
                Err(error) => {
                    tracing::warn!(%error, "cannot follow the node manager's events");
                    pause.wait().await;
                    continue;
                }
            };
            loop {
                let batch = match self.next_batch(&mut events).await {
                    Ok(Some(batch)) => batch,
                    Ok(None) => break,
                    Err(error) => {
                        tracing::warn!(%error, "the node manager's events broke off");
                        break;
                    }
                };
                pause.reset();
                let last = batch.iter().filter_map(Batched::seq).max();
                let reports = slices.reports(&self.nm, batch, accepted).await;
                self.send(reports).await;
                accepted = last.map_or(accepted, |last| last.max(accepted));
            }
            pause.wait().await;
        }
    }

    /// Waits for something to report, then takes along what is there already.
    async fn next_batch(&mut self, events: &mut Events) -> Result<Option<Vec<Batched>>, ClientError> {
        let mut batch = Vec::new();
        while batch.len() < BATCH {
            tokio::select! {
                biased;
                event = events.next() => match event? {
                    Some(event) => batch.push(Batched::Event(Box::new(event))),
                    None if batch.is_empty() => return Ok(None),
                    None => break,
                },
                Some(failure) = self.failures.recv() => batch.push(Batched::Failure(failure)),
                // Only when neither has anything more.
                () = std::future::ready(()), if !batch.is_empty() => break,
            }
        }
        Ok(Some(batch))
    }

    async fn send(&self, slivers: Vec<SliverReport>) {
        if slivers.is_empty() {
            return;
        }
        let status = NodeStatus { slivers };
        let mut pause = self.backoff.clone();
        loop {
            let Err(error) = self.authority.node_status(&status).await else {
                return;
            };
            match error.class() {
                // It will not take these, however often they come: what follows must not wait for ever.
                ErrorClass::Fatal => {
                    tracing::error!(%error, reports = status.slivers.len(), "the authority refuses a report");
                    return;
                }
                ErrorClass::Forbidden | ErrorClass::NotFound => self.unknown.notify_one(),
                ErrorClass::Retryable => {}
            }
            tracing::warn!(%error, reports = status.slivers.len(), "cannot report; trying again");
            pause.wait().await;
        }
    }
}

enum Batched {
    Event(Box<SliverEvent>),
    Failure(Failure),
}

impl Batched {
    fn seq(&self) -> Option<u64> {
        match self {
            Self::Event(event) => Some(event.seq),
            Self::Failure(_) => None,
        }
    }
}

/// Which slice a virtual machine is of.
#[derive(Default)]
struct Slices {
    known: HashMap<VmId, SliceRef>,
}

impl Slices {
    async fn reports(&mut self, nm: &NodeManager, batch: Vec<Batched>, seq: u64) -> Vec<SliverReport> {
        let unknown = |item: &Batched| match item {
            Batched::Event(event) => !self.known.contains_key(&event.vm_id),
            Batched::Failure(_) => false,
        };
        if batch.iter().any(unknown) {
            self.learn(nm).await;
        }
        let mut out = Vec::with_capacity(batch.len());
        let mut seq = seq;
        for item in batch {
            match item {
                Batched::Event(event) => {
                    seq = seq.max(event.seq);
                    let slice = self.known.get(&event.vm_id).cloned();
                    if event.state == SliverState::Gone {
                        self.known.remove(&event.vm_id);
                    }
                    out.push(report(*event, slice));
                }
                Batched::Failure(failure) => out.push(failed(failure, seq)),
            }
        }
        out
    }

    async fn learn(&mut self, nm: &NodeManager) {
        match nm.list().await {
            Err(error) => tracing::warn!(%error, "cannot ask which slices the slivers are of"),
            Ok(list) => {
                for sliver in list.slivers {
                    if let Some(tag) = Tag::of(&sliver.rspec) {
                        let slice = SliceRef {
                            name: tag.slice,
                            id: tag.id,
                        };
                        self.known.insert(sliver.event.vm_id, slice);
                    }
                }
            }
        }
    }
}

fn report(event: SliverEvent, slice: Option<SliceRef>) -> SliverReport {
    let (slice, slice_id) = match slice {
        Some(slice) => (slice.name, Some(slice.id)),
        // Gone before it was ever listed: the node manager's name, without the authority's.
        None => (bare(&event.slice).to_owned(), None),
    };
    SliverReport {
        slice,
        slice_id,
        seq: event.seq,
        vm_id: Some(event.vm_id.to_string()),
        state: state(event.state),
        reason: event.reason,
        class: event.class.map(class),
        initscript: Some(match event.initscript {
            Initscript::None => "none".into(),
            Initscript::Running => "running".into(),
            Initscript::Ok => "ok".into(),
            Initscript::Failed(code) => format!("failed({code})"),
        }),
        address: event.address.map(|address| address.to_string()),
        ssh_host_keys: (!event.ssh_host_keys.is_empty()).then_some(event.ssh_host_keys),
        phases_us: event.phases_us,
    }
}

fn failed(failure: Failure, seq: u64) -> SliverReport {
    SliverReport {
        slice: failure.slice.name,
        slice_id: Some(failure.slice.id),
        seq,
        vm_id: None,
        state: failure.state.map_or(AuthorityState::Failed, state),
        reason: Some(failure.reason),
        class: Some(class(failure.class)),
        initscript: None,
        address: None,
        ssh_host_keys: None,
        phases_us: Default::default(),
    }
}

fn bare(name: &str) -> &str {
    match name.split_once('.') {
        Some((authority, rest)) if !authority.contains('_') => rest,
        _ => name,
    }
}

fn state(state: SliverState) -> AuthorityState {
    match state {
        SliverState::Defined => AuthorityState::Defined,
        SliverState::Starting => AuthorityState::Starting,
        SliverState::Up => AuthorityState::Up,
        SliverState::Reachable => AuthorityState::Reachable,
        SliverState::Paused => AuthorityState::Paused,
        SliverState::Parked => AuthorityState::Parked,
        SliverState::Stopped => AuthorityState::Stopped,
        SliverState::Failed => AuthorityState::Failed,
        SliverState::Gone => AuthorityState::Gone,
    }
}

fn class(class: FailureClass) -> AuthorityClass {
    match class {
        FailureClass::Retryable => AuthorityClass::Retryable,
        FailureClass::Continuable => AuthorityClass::Continuable,
        FailureClass::Fatal => AuthorityClass::Fatal,
    }
}
