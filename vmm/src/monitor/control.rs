//! What happens to the whole VM, in the event loop: requests, signals, marks, reboots, sleep.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use mandoline_api::monitor::{ExitReason, InstanceState, Phase, RunState};
use vmm_sys_util::epoll::EventSet;

use super::sleep::{Sleeper, Waker};
use super::{Call, Calls, Report, Request, watch};
use crate::devices::control::Control;
use crate::devices::serial::Console;
use crate::devices::virtio::Slot;
use crate::exit::ExitLatch;
use crate::machine::Machine;
use crate::metrics::{self, Recorder};
use crate::state::{self, Phases, Since, StateFile};
use crate::vcpu;

const CONTROL_EXIT: u32 = 0;
const CONTROL_MARKED: u32 = 1;
const CONTROL_SIGNAL: u32 = 2;
const CONTROL_CALL: u32 = 3;
const CONTROL_TIMER: u32 = 4;
const CONTROL_ROUSED: u32 = 5;
const CONTROL_PAUSED_SOURCE: u32 = 6;
const CONTROL_METRICS: u32 = 7;

/// Requests, signals, marks.
pub(super) struct ControlEvents {
    pub(super) slots: Vec<Arc<Slot>>,
    pub(super) console: Arc<Console>,
    pub(super) handles: Vec<vcpu::Handle>,
    pub(super) instance: InstanceState,
    pub(super) state: StateFile,
    pub(super) phases: Arc<Phases>,
    pub(super) signals: OwnedFd,
    pub(super) exit: Arc<ExitLatch>,
    pub(super) marked: Arc<Control>,
    pub(super) calls: Option<Calls>,
    pub(super) boot_timer_from: Since,
    pub(super) recorder: Recorder,
    /// What parks the VM, if it has where to put its memory.
    pub(super) sleeper: Option<Sleeper>,
}

impl ControlEvents {
    fn stand_still(&self) {
        for handle in &self.handles {
            handle.pause();
        }
        for slot in &self.slots {
            slot.pause();
        }
    }

    fn go_on(&self) {
        for slot in &self.slots {
            slot.resume();
        }
        for handle in &self.handles {
            handle.resume();
        }
    }

    fn become_state(&mut self, instance: InstanceState) {
        self.instance = instance;
        let state = match instance {
            InstanceState::Paused => RunState::Paused,
            InstanceState::Parked => RunState::Parked,
            InstanceState::Running | InstanceState::NotStarted => RunState::Running,
        };
        self.state.state(state, None, None);
    }

    fn pause(&mut self, ops: &mut EventOps<'_>) {
        match self.instance {
            InstanceState::Running => self.stand_still(),
            InstanceState::Parked => self.watch_paused_sources(ops, false),
            InstanceState::Paused | InstanceState::NotStarted => return,
        }
        if let Some(sleeper) = &mut self.sleeper {
            sleeper.disarm();
        }
        self.become_state(InstanceState::Paused);
    }

    fn resume(&mut self, ops: &mut EventOps<'_>, by: Waker) {
        match self.instance {
            InstanceState::Paused => {}
            InstanceState::Parked => self.watch_paused_sources(ops, false),
            InstanceState::Running | InstanceState::NotStarted => return,
        }
        self.go_on();
        if let Some(sleeper) = &mut self.sleeper {
            sleeper.awake(by, &self.slots, &self.handles);
        }
        self.become_state(InstanceState::Running);
    }

    /// Stands the guest still and gives its memory back, if it sleeps. Says why not otherwise.
    fn park(&mut self, ops: &mut EventOps<'_>) -> Result<(), String> {
        match (self.instance, &self.sleeper) {
            (InstanceState::Parked, _) => return Ok(()),
            (_, None) => return Err("state is Parked: the configuration of this VM has no `park`".to_owned()),
            (InstanceState::Running, _) => {}
            (state, _) => {
                return Err(format!(
                    "state is Parked: only a running VM can be parked, and this is {state:?}"
                ));
            }
        }
        self.stand_still();
        let result = self.try_to_park();
        match &result {
            Ok(()) => {
                self.watch_paused_sources(ops, true);
                self.become_state(InstanceState::Parked);
            }
            Err(_) => self.go_on(),
        }
        result
    }

    fn try_to_park(&mut self) -> Result<(), String> {
        let Some(sleeper) = &mut self.sleeper else {
            return Ok(());
        };
        let now = state::monotonic_ns();
        let Some(sleep) = Sleeper::sleeps(&self.handles)? else {
            return Err(
                "state is Parked: the guest is busy (a vCPU runs, or its next timer is due)".to_owned(),
            );
        };
        match sleeper.fall_asleep(sleep, now) {
            Ok(given) => {
                tracing::debug!(given.written, given.freed, ?sleep, "parked");
                Ok(())
            }
            Err(error) => Err(format!("state is Parked: {error}")),
        }
    }

    /// Listens, or listens no more, to what only a parked VM's monitor listens to.
    fn watch_paused_sources(&self, ops: &mut EventOps<'_>, on: bool) {
        for fd in self.slots.iter().filter_map(|slot| slot.paused_source()) {
            let events =
                Events::with_data_raw(fd, CONTROL_PAUSED_SOURCE, EventSet::IN | EventSet::EDGE_TRIGGERED);
            if on {
                watch(ops, events);
            } else if let Err(error) = ops.remove(events) {
                tracing::error!(%error, "a descriptor stays watched");
            }
        }
    }

    /// The sleeper's timer: the guest's own when it is parked, the next look otherwise.
    fn timer(&mut self, ops: &mut EventOps<'_>) {
        let Some(sleeper) = &mut self.sleeper else { return };
        sleeper.heard(true);
        match self.instance {
            InstanceState::Parked => self.resume(ops, Waker::Timer),
            InstanceState::Running => {
                let idle = sleeper.is_idle(&self.slots, &self.handles);
                if idle && self.park(ops).is_ok() {
                    return;
                }
                if let Some(sleeper) = &mut self.sleeper {
                    sleeper.look_again(None, &self.slots, &self.handles);
                }
            }
            InstanceState::Paused | InstanceState::NotStarted => {}
        }
    }

    fn roused(&mut self, ops: &mut EventOps<'_>) {
        if let Some(sleeper) = &mut self.sleeper {
            sleeper.heard(false);
        }
        if self.instance == InstanceState::Parked {
            self.resume(ops, Waker::Device);
        }
    }

    /// Starts a guest that rebooted anew; false when the VM ends.
    pub(super) fn restart(&mut self, machine: &Machine, least: Duration) -> bool {
        let now = state::monotonic_ns();
        let lived = |since: u64| u128::from(now.saturating_sub(since)) >= least.as_nanos();
        let rebooted = self
            .exit
            .get()
            .is_some_and(|exit| exit.reason == ExitReason::Reboot);
        if !rebooted || !self.phases.reached(Phase::FirstRun).is_some_and(lived) {
            return false;
        }
        tracing::info!("the guest reboots");
        self.state.phases(&self.phases);
        self.state.state(RunState::Rebooting, None, None);
        self.stand_still();
        if let Some(sleeper) = &mut self.sleeper {
            sleeper.disarm();
        }
        if let Err(error) = machine.reset(&self.handles) {
            // The latch holds the reboot; a restart that fails is an error of its own.
            self.exit.reopen();
            self.exit
                .close(ExitReason::Error, Some(format!("reboot: {error}")));
            return false;
        }
        self.phases.guest_restarts();
        self.boot_timer_from = Since::now();
        self.exit.reopen();
        if let Some(sleeper) = &mut self.sleeper {
            sleeper.forget();
            sleeper.look_again(None, &self.slots, &self.handles);
        }
        self.go_on();
        self.become_state(InstanceState::Running);
        true
    }

    fn calls(&mut self, ops: &mut EventOps<'_>) {
        let Some(calls) = &self.calls else { return };
        let _ = calls.event.read();
        let pending: Vec<Call> = calls.receiver.try_iter().collect();
        for (request, answer) in pending {
            let mut said = Ok(serde_json::Value::Null);
            match request {
                Request::Pause => self.pause(ops),
                Request::Resume => self.resume(ops, Waker::Request),
                Request::Park => {
                    said = self.park(ops).map(|()| serde_json::Value::Null);
                    if let (Ok(_), Some(sleeper)) = (&said, &mut self.sleeper) {
                        sleeper.asked();
                    }
                }
                Request::Look => {}
                Request::Metrics => {
                    let seen = seen(self.instance, &self.slots, &self.console, self.sleeper.as_ref());
                    said = Ok(self.recorder.report(&seen));
                }
                Request::FlushMetrics => self.flush_metrics(),
                Request::Work(work) => said = work(&self.slots),
            }
            let report = said.map(|said| Report {
                state: self.instance,
                console_lost: self.console.lost(),
                sleep: self.sleeper.as_ref().map(Sleeper::counters),
                said,
            });
            // The asker may have left.
            let _ = answer.send(report);
        }
    }

    /// Writes a line of metrics.
    pub(super) fn flush_metrics(&mut self) {
        let seen = seen(self.instance, &self.slots, &self.console, self.sleeper.as_ref());
        self.recorder.flush(&seen);
    }

    fn marked(&mut self) {
        let _ = self.marked.marked().read();
        if let Some(at) = self.phases.reached(Phase::BootTimer) {
            let us = at.saturating_sub(self.boot_timer_from.monotonic_ns) / 1000;
            let cpu_us = state::cpu_ns().saturating_sub(self.boot_timer_from.cpu_ns) / 1000;
            // Firecracker's line, which benchmarks look for.
            tracing::info!(
                "Guest-boot-time = {us:>6} us {} ms, {cpu_us:>6} CPU us {} CPU ms",
                us / 1000,
                cpu_us / 1000
            );
        }
        self.state.phases(&self.phases);
    }

    fn signal(&mut self) {
        // SAFETY: zeroes are a valid signalfd_siginfo, which read fills in.
        let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
        let size = std::mem::size_of_val(&info);
        // SAFETY: reads at most `size` bytes into a structure of that size.
        let got = unsafe { libc::read(self.signals.as_raw_fd(), (&raw mut info).cast(), size) };
        if got == size as isize {
            let detail = format!("signal {} from pid {}", info.ssi_signo, info.ssi_pid);
            self.exit.close(ExitReason::Killed, Some(detail));
        }
    }
}

/// What the metrics hold beside what their recorder counts.
fn seen<'a>(
    state: InstanceState,
    slots: &'a [Arc<Slot>],
    console: &Console,
    sleeper: Option<&Sleeper>,
) -> metrics::Seen<'a> {
    metrics::Seen {
        state,
        slots,
        console_lost: console.lost(),
        sleep: sleeper.map(Sleeper::counters),
    }
}

impl MutEventSubscriber for ControlEvents {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(
            ops,
            Events::with_data(self.exit.event(), CONTROL_EXIT, EventSet::IN),
        );
        watch(
            ops,
            Events::with_data(self.marked.marked(), CONTROL_MARKED, EventSet::IN),
        );
        watch(
            ops,
            Events::with_data(&self.signals, CONTROL_SIGNAL, EventSet::IN),
        );
        if let Some(calls) = &self.calls {
            watch(
                ops,
                Events::with_data(calls.event.as_ref(), CONTROL_CALL, EventSet::IN),
            );
        }
        if let Some(timer) = self.recorder.timer() {
            watch(ops, Events::with_data(timer, CONTROL_METRICS, EventSet::IN));
        }
        if let Some(sleeper) = &mut self.sleeper {
            watch(
                ops,
                Events::with_data_raw(sleeper.timer_fd(), CONTROL_TIMER, EventSet::IN),
            );
            watch(
                ops,
                Events::with_data(sleeper.roused(), CONTROL_ROUSED, EventSet::IN),
            );
            sleeper.look_again(None, &self.slots, &self.handles);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            CONTROL_MARKED => self.marked(),
            CONTROL_SIGNAL => self.signal(),
            CONTROL_CALL => self.calls(ops),
            CONTROL_METRICS => self.flush_metrics(),
            CONTROL_TIMER => self.timer(ops),
            CONTROL_ROUSED | CONTROL_PAUSED_SOURCE => self.roused(ops),
            _ => {}
        }
    }
}
