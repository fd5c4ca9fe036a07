//! One task for each sliver: it compares what is recorded with what runs, and acts.
//!
//! It is level-triggered: woken or restarted at any point it looks at the record again, so nothing depends on
//! having seen every change.
//!
//! ```text
//!             wanted: running                 wanted: stopped             wanted: destroyed
//!  not       ┌───────────────────┐           ┌───────────────┐           ┌────────────────────┐
//!  running   │ create, start ────┼─► running │ tell stopped  │           │ destroy, gone, end │
//!            │ (after a backoff) │           └───────────────┘           └────────────────────┘
//!            └───────────────────┘                   ▲                             ▲
//!  running    restarts rose: stop, start ────────────┤ stop with grace             │ stop at once
//!             resizes rose: resize                   └─────────────────────────────┘
//!             exited: shutdown ─► stopped · reboot ─► start · died ─► failed, backoff, start
//!             ordered: reset ─► failed, start · hold ─► paused, until the order is taken back
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use mandoline_api::nodemgr::{FailureClass, Initscript, SliverState, VmId};
use mandoline_rspec::Value;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::Instant;

use crate::core::{Core, Waker, unix_ns};
use crate::state::{Sliver, Wanted};
use crate::vm_type::{Exit, Failure, Report, Reports, Resized, SliverSpec, VmType, monotonic_ns};

/// How long a sliver's own system may take to stop before it is killed.
const GRACE: Duration = Duration::from_secs(10);
/// After a death, the first retry comes this soon; then each takes twice as long.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// Retries never come further apart than this.
const LAST_RETRY: Duration = Duration::from_secs(60);
/// Deaths in a row after which only `start` or `restart` tries again.
const GIVE_UP_AFTER: u32 = 10;
/// Who has run for this long has not failed to start.
const SETTLED: Duration = Duration::from_secs(60);

struct Supervisor {
    core: Arc<Core>,
    waker: Arc<Waker>,
    backend: Arc<dyn VmType>,
    running: Option<Running>,
    failures: u32,
    retry_at: Option<Instant>,
    gave_up: bool,
    /// The state in which it was told to wait.
    held: Option<SliverState>,
}

struct Running {
    reports: UnboundedReceiver<Report>,
    since: Instant,
    restarts: u64,
    resizes: u64,
}

/// What a view of a sliver changes in its event.
#[derive(Default)]
struct News {
    state: Option<SliverState>,
    reason: Option<(String, Option<FailureClass>)>,
    clear_reason: bool,
}

/// Supervises a sliver until it is gone.
pub async fn run(core: Arc<Core>, vm_id: VmId, waker: Arc<Waker>) {
    let Some(sliver) = core.sliver(vm_id) else { return };
    let Some(backend) = core.registry.get(&sliver.vm_type).cloned() else {
        let reason = format!("this node has no backend for vm_type {}", sliver.vm_type);
        tracing::error!(vm_id, reason);
        let mut event = core.event_of(&sliver);
        event.state = SliverState::Failed;
        event.reason = Some(reason);
        event.class = Some(FailureClass::Fatal);
        core.events.tell(event, core.audience(&sliver), false);
        return;
    };
    let mut supervisor = Supervisor {
        core,
        waker,
        backend,
        running: None,
        failures: 0,
        retry_at: None,
        gave_up: false,
        held: None,
    };
    supervisor.adopt(&sliver).await;
    supervisor.run(vm_id).await;
}

impl Supervisor {
    async fn run(&mut self, vm_id: VmId) {
        loop {
            let Some(sliver) = self.core.sliver(vm_id) else {
                return;
            };
            let orders = self.waker.take_orders();
            if let Some(reason) = orders.reset {
                self.reset(&sliver, reason).await;
            }
            match sliver.wanted {
                Wanted::Destroyed => {
                    if self.retry_at.is_none() && self.destroy(&sliver).await {
                        return;
                    }
                }
                Wanted::Stopped => self.stopped(&sliver).await,
                Wanted::Running => self.wanted_running(&sliver, orders.hold).await,
            }
            let retry_at = self.retry_at;
            tokio::select! {
                () = self.waker.bell.notified() => {
                    // Somebody asked for something: what was given up is tried again.
                    self.gave_up = false;
                    self.failures = 0;
                    self.retry_at = None;
                }
                report = next(&mut self.running) => self.report(vm_id, report).await,
                () = until(retry_at) => self.retry_at = None,
            }
        }
    }

    /// Takes over what an earlier node manager has left running.
    async fn adopt(&mut self, sliver: &Sliver) {
        let spec = self.core.spec(sliver);
        let (reports, receiver) = Reports::new();
        match self.backend.adopt(&spec, &reports).await {
            Ok(true) => {
                tracing::info!(vm_id = sliver.vm_id, slice = %sliver.slice, "adopted");
                // An earlier node manager may have let it wait; this one finds out for itself whether it has to.
                if let Err(failure) = self.backend.resume(sliver.vm_id).await {
                    tracing::debug!(vm_id = sliver.vm_id, %failure, "not resumed");
                }
                self.running = Some(Running {
                    reports: receiver,
                    since: Instant::now(),
                    restarts: sliver.restarts,
                    // What was bound while nobody could act on it is applied again; it does no harm twice.
                    resizes: sliver.resizes.wrapping_sub(1),
                });
                self.tell(
                    sliver,
                    News {
                        state: Some(SliverState::Starting),
                        ..News::default()
                    },
                    |_| {},
                );
            }
            Ok(false) => self.tell(
                sliver,
                News {
                    state: Some(SliverState::Defined),
                    ..News::default()
                },
                |_| {},
            ),
            Err(failure) => {
                tracing::warn!(vm_id = sliver.vm_id, %failure, "not adopted; stopping what runs");
                self.clean(&spec).await;
            }
        }
    }

    async fn destroy(&mut self, sliver: &Sliver) -> bool {
        let spec = self.core.spec(sliver);
        self.running = None;
        let result = match self.backend.stop(&spec, Duration::ZERO).await {
            Ok(()) => self.backend.destroy(sliver.vm_id, Some(sliver.index)).await,
            Err(failure) => Err(failure),
        };
        match result {
            Ok(()) => {
                tracing::info!(vm_id = sliver.vm_id, slice = %sliver.slice, "destroyed");
                self.core.gone(sliver).await;
                true
            }
            Err(failure) => {
                tracing::error!(vm_id = sliver.vm_id, %failure, "not destroyed; trying again");
                let reason = format!("not destroyed yet: {failure}");
                self.fail(sliver, Failure::retryable(reason)).await;
                false
            }
        }
    }

    async fn stopped(&mut self, sliver: &Sliver) {
        let told = self.core.events.last(sliver.vm_id);
        if self.running.is_none() && told.is_some_and(|event| event.state == SliverState::Stopped) {
            return;
        }
        if self.retry_at.is_some() {
            return;
        }
        let grace = if self.running.take().is_some() {
            GRACE
        } else {
            Duration::ZERO
        };
        let spec = self.core.spec(sliver);
        if let Err(failure) = self.backend.stop(&spec, grace).await {
            return self
                .fail(sliver, Failure::retryable(format!("not stopped yet: {failure}")))
                .await;
        }
        tracing::info!(vm_id = sliver.vm_id, slice = %sliver.slice, "stopped");
        let reason = sliver.note.clone().map(|note| (note, None));
        let clear_reason = reason.is_none();
        self.tell(
            sliver,
            News {
                state: Some(SliverState::Stopped),
                reason,
                clear_reason,
            },
            |_| {},
        );
    }

    /// Ends it at once; it is started again like one that died, without waiting.
    async fn reset(&mut self, sliver: &Sliver, reason: String) {
        if self.running.is_none() || sliver.wanted != Wanted::Running {
            return;
        }
        let spec = self.core.spec(sliver);
        self.clean(&spec).await;
        self.waker.since_ns.store(monotonic_ns(), Ordering::Relaxed);
        let news = News {
            state: Some(SliverState::Failed),
            reason: Some((reason, Some(FailureClass::Retryable))),
            clear_reason: false,
        };
        self.tell(sliver, news, |_| {});
    }

    /// Lets what runs wait, or go on.
    async fn hold(&mut self, sliver: &Sliver, hold: Option<String>) {
        if self.running.is_none() {
            self.held = None;
            return;
        }
        match (hold, self.held) {
            (Some(reason), None) => match self.backend.pause(sliver.vm_id).await {
                Ok(()) => {
                    self.held = Some(self.core.event_of(sliver).state);
                    let news = News {
                        state: Some(SliverState::Paused),
                        reason: Some((reason, Some(FailureClass::Continuable))),
                        clear_reason: false,
                    };
                    self.tell(sliver, news, |_| {});
                }
                Err(failure) => tracing::warn!(vm_id = sliver.vm_id, %failure, "cannot be paused"),
            },
            (None, Some(before)) => match self.backend.resume(sliver.vm_id).await {
                Ok(()) => {
                    self.held = None;
                    let news = News {
                        state: Some(before),
                        reason: None,
                        clear_reason: true,
                    };
                    self.tell(sliver, news, |_| {});
                }
                Err(failure) => self.fail_soon(sliver, &failure),
            },
            _ => {}
        }
    }

    /// What did not go on is looked at again soon.
    fn fail_soon(&mut self, sliver: &Sliver, failure: &Failure) {
        tracing::error!(vm_id = sliver.vm_id, %failure, "does not go on; trying again");
        self.retry_at = Some(Instant::now() + FIRST_RETRY);
    }

    async fn wanted_running(&mut self, sliver: &Sliver, hold: Option<String>) {
        self.hold(sliver, hold.clone()).await;
        if let Some(running) = &mut self.running {
            if running.restarts != sliver.restarts {
                self.running = None;
                let spec = self.core.spec(sliver);
                if let Err(failure) = self.backend.stop(&spec, GRACE).await {
                    return self.fail(sliver, failure).await;
                }
            } else if running.resizes != sliver.resizes {
                running.resizes = sliver.resizes;
                let spec = self.core.spec(sliver);
                let resized = self.backend.resize(&spec).await;
                self.resized(sliver, resized);
            }
        }
        if self.running.is_some() || self.gave_up || self.retry_at.is_some() {
            return;
        }
        if let Some(reason) = hold {
            // Rung again when it may start.
            let news = News {
                reason: Some((reason, Some(FailureClass::Retryable))),
                ..News::default()
            };
            return self.tell(sliver, news, |_| {});
        }
        let spec = self.core.spec(sliver);
        if let Some(wait) = not_yet(&spec, self.core.now()) {
            self.retry_at = Some(Instant::now() + wait);
            return;
        }
        self.start(sliver, &spec).await;
    }

    /// Tells what came of a change of resources.
    fn resized(&self, sliver: &Sliver, resized: Result<Resized, Failure>) {
        let reason = match resized {
            Ok(resized) if resized.waits.is_empty() => {
                // What an earlier change left waiting may be in order now.
                let told = self.core.event_of(sliver);
                if told.class == Some(FailureClass::Continuable) {
                    let news = News {
                        clear_reason: true,
                        ..News::default()
                    };
                    self.tell(sliver, news, |_| {});
                }
                return;
            }
            Ok(resized) => format!("waits for its next start: {}", resized.waits.join("; ")),
            Err(failure) => {
                tracing::warn!(vm_id = sliver.vm_id, %failure, "resources not changed live");
                failure.reason
            }
        };
        let news = News {
            reason: Some((reason, Some(FailureClass::Continuable))),
            ..News::default()
        };
        self.tell(sliver, news, |_| {});
    }

    async fn start(&mut self, sliver: &Sliver, spec: &SliverSpec) {
        let (reports, receiver) = Reports::new();
        let address = self.backend.address(spec);
        let since = self.waker.since_ns.load(Ordering::Relaxed);
        let recorded = monotonic_ns().saturating_sub(since) / 1000;
        let news = News {
            state: Some(SliverState::Starting),
            clear_reason: true,
            reason: None,
        };
        self.tell(sliver, news, |event| {
            event.address = address;
            event.initscript = Initscript::None;
            event.phases_us = BTreeMap::from([("recorded".to_owned(), recorded)]);
        });
        let result = match self.backend.create(spec, &reports).await {
            Ok(()) => self.backend.start(spec, &reports).await,
            Err(failure) => Err(failure),
        };
        match result {
            Ok(()) => {
                self.running = Some(Running {
                    reports: receiver,
                    since: Instant::now(),
                    restarts: sliver.restarts,
                    resizes: sliver.resizes,
                });
            }
            Err(failure) => {
                self.clean(spec).await;
                self.fail(sliver, failure).await;
            }
        }
    }

    async fn report(&mut self, vm_id: VmId, report: Option<Report>) {
        let Some(sliver) = self.core.sliver(vm_id) else {
            return;
        };
        let since = self.waker.since_ns.load(Ordering::Relaxed);
        let news = |state| News {
            state: Some(state),
            ..News::default()
        };
        match report {
            Some(Report::PhaseAt(name, at)) => {
                let us = at.saturating_sub(since) / 1000;
                self.note(&sliver, |event| event.phases_us.extend([(name.to_owned(), us)]));
            }
            Some(Report::Part(name, us)) => {
                self.note(&sliver, |event| event.phases_us.extend([(name, us)]));
            }
            Some(Report::Up) => self.tell(&sliver, news(SliverState::Up), |_| {}),
            Some(Report::Reachable(keys)) => {
                let us = monotonic_ns().saturating_sub(since) / 1000;
                let address = self.backend.address(&self.core.spec(&sliver));
                self.tell(&sliver, news(SliverState::Reachable), |event| {
                    event.ssh_host_keys.clone_from(&keys);
                    event.address = address;
                    event.phases_us.entry("reachable".to_owned()).or_insert(us);
                });
                tracing::info!(vm_id, slice = %sliver.slice, us, "reachable");
                if sliver.ssh_host_keys != keys {
                    self.core.host_keys(vm_id, keys).await;
                }
            }
            Some(Report::Initscript(state)) => {
                self.tell(&sliver, News::default(), |event| event.initscript = state);
            }
            Some(Report::Lacks(reason)) => {
                let reason = Some((reason, Some(FailureClass::Continuable)));
                self.tell(
                    &sliver,
                    News {
                        reason,
                        ..News::default()
                    },
                    |_| {},
                );
            }
            Some(Report::Failed(failure)) => {
                self.end(&sliver).await;
                self.fail(&sliver, failure).await;
            }
            Some(Report::Exited(Exit::Shutdown)) => {
                self.end(&sliver).await;
                self.core
                    .stopped_by_itself(vm_id, "its own system shut down".to_owned())
                    .await;
            }
            Some(Report::Exited(Exit::Reboot)) => {
                self.end(&sliver).await;
                self.waker.since_ns.store(monotonic_ns(), Ordering::Relaxed);
            }
            Some(Report::Exited(Exit::Died(reason))) => {
                self.end(&sliver).await;
                self.fail(&sliver, Failure::retryable(reason)).await;
            }
            None => {
                self.end(&sliver).await;
                self.fail(&sliver, Failure::retryable("the backend lost sight of the VM"))
                    .await;
            }
        }
    }

    /// What ran is over: takes away what only a running VM needs.
    async fn end(&mut self, sliver: &Sliver) {
        if self
            .running
            .take()
            .is_some_and(|running| running.since.elapsed() >= SETTLED)
        {
            self.failures = 0;
        }
        let spec = self.core.spec(sliver);
        self.clean(&spec).await;
    }

    async fn clean(&mut self, spec: &SliverSpec) {
        self.running = None;
        self.held = None;
        if let Err(failure) = self.backend.stop(spec, Duration::ZERO).await {
            tracing::error!(vm_id = spec.vm_id, %failure, "not cleaned up; the reconcile loop tries again");
        }
    }

    /// Tells a failure and sets the time of the next try.
    async fn fail(&mut self, sliver: &Sliver, mut failure: Failure) {
        self.failures += 1;
        // What is to end is tried for ever.
        let to_end = sliver.wanted != Wanted::Running;
        if failure.class == FailureClass::Retryable
            && self.failures >= GIVE_UP_AFTER
            && self.backend.gives_up()
            && !to_end
        {
            failure.class = FailureClass::Fatal;
            failure.reason = format!("{} (the {}th time in a row)", failure.reason, self.failures);
        }
        if failure.class == FailureClass::Retryable || to_end {
            let wait = FIRST_RETRY
                .saturating_mul(1 << (self.failures - 1).min(10))
                .min(LAST_RETRY);
            self.retry_at = Some(Instant::now() + wait);
            self.waker
                .since_ns
                .store(monotonic_ns() + wait.as_nanos() as u64, Ordering::Relaxed);
        } else {
            self.gave_up = true;
        }
        tracing::warn!(vm_id = sliver.vm_id, slice = %sliver.slice, class = ?failure.class, reason = failure.reason, "failed");
        let reason = Some((failure.reason, Some(failure.class)));
        self.tell(
            sliver,
            News {
                state: Some(SliverState::Failed),
                reason,
                clear_reason: false,
            },
            |_| {},
        );
    }

    /// Tells what is new of a sliver.
    fn tell(
        &self,
        sliver: &Sliver,
        news: News,
        alter: impl FnOnce(&mut mandoline_api::nodemgr::SliverEvent),
    ) {
        let mut event = self.core.event_of(sliver);
        if let Some(state) = news.state {
            event.state = state;
            event.unix_ns = unix_ns();
        }
        if news.clear_reason {
            (event.reason, event.class) = (None, None);
        }
        if let Some((reason, class)) = news.reason {
            (event.reason, event.class) = (Some(reason), class);
        }
        alter(&mut event);
        self.core.events.tell(event, self.core.audience(sliver), false);
    }

    /// Remembers something for the next event without telling it by itself.
    fn note(&self, sliver: &Sliver, alter: impl FnOnce(&mut mandoline_api::nodemgr::SliverEvent)) {
        self.core.events.note(sliver.vm_id, alter);
    }
}

/// How long until the sliver's `start_time`, if that is still to come.
fn not_yet(spec: &SliverSpec, now: Timestamp) -> Option<Duration> {
    let Some(Value::Time(start)) = spec.rspec.get("start_time") else {
        return None;
    };
    let wait = start.duration_since(now);
    // Looked at again at least once an hour: clocks are set.
    Duration::try_from(wait)
        .ok()
        .filter(|wait| !wait.is_zero())
        .map(|wait| wait.min(Duration::from_secs(3600)))
}

async fn next(running: &mut Option<Running>) -> Option<Report> {
    match running {
        Some(running) => running.reports.recv().await,
        None => std::future::pending().await,
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}
