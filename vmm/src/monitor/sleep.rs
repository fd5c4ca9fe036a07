//! When a VM is parked, and what wakes it.
//!
//! ```text
//!          asked for, or idle for `idle_ms`:                   an event for the guest (packet, stream, request),
//!          every vCPU halted, nothing pending                  or its next timer
//! Running ------------------------------------> Parked ------------------------------------------> Running
//!    ^                                                                                                |
//!    +----------- busy after all: looked at again after `idle_ms` -----------+     after a timer alone: parked
//!                                                                            |     again as soon as it sleeps
//!                                                                   (stays Running)
//! ```
//!
//! A VM that was asked to park stays so until something comes for it: its own timers wake it for as long as they take,
//! with `idle_ms` and without.
//!
//! Idle is: no event of any device, and vCPU threads that used almost no CPU time. Nothing is lost while a VM is
//! parked: taps queue what comes, sockets wait in their listener, timers of the guest's interrupt controller go
//! on in the host's kernel.

use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::devices::virtio::Slot;
use crate::memory::Memory;
use crate::park::{Given, ParkFile};
use crate::vcpu::{self, state::Sleep};

/// A guest that wakes sooner than this by itself is not worth parking.
const LEAST_SLEEP: Duration = Duration::from_millis(50);
/// Pause before a guest that a timer woke is parked again.
const AFTER_TIMER: Duration = Duration::from_millis(100);
/// Pause before a guest that should be parked, but was busy after a timer, is looked at again.
const WHEN_BUSY: Duration = Duration::from_secs(1);
/// CPU time that an idle guest's vCPUs may use, as a part of the time that is looked at: 1/20.
const IDLE_CPU_PART: u32 = 20;

/// What parks a VM.
pub struct Sleeper {
    /// Where its memory goes.
    pub file: ParkFile,
    /// Its memory.
    pub memory: Memory,
    /// Where pages may be the kernel file's.
    pub kernel: Range<u64>,
    /// Park by itself after so long.
    pub idle: Option<Duration>,
    /// Somebody asked for it to be parked, and nothing has come for it since.
    asked: bool,
    /// Fires when it is time to look whether the guest is idle, or when the guest's own timer does.
    timer: TimerFd,
    /// Signalled by devices that have something for a guest that stands still.
    roused: Arc<EventFd>,
    /// When the guest was looked at last: its devices' events and its vCPUs' CPU time.
    seen: (u64, Duration),
    counters: Counters,
}

/// What a sleeper counts.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Times that the VM was parked.
    pub parked: u64,
    /// Times that its own timer woke it.
    pub woken_by_timer: u64,
    /// Times that a device woke it.
    pub woken_by_device: u64,
    /// Bytes written to the park file.
    pub written_bytes: u64,
    /// Bytes of memory given back.
    pub freed_bytes: u64,
}

impl Sleeper {
    /// A sleeper whose file and memory are these.
    pub fn new(
        file: ParkFile,
        memory: Memory,
        kernel: Range<u64>,
        idle: Option<Duration>,
        slots: &[Arc<Slot>],
    ) -> std::io::Result<Self> {
        let roused = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        for slot in slots {
            slot.rouse_by(roused.clone());
        }
        Ok(Self {
            file,
            memory,
            kernel,
            idle,
            asked: false,
            timer: TimerFd::new()?,
            roused,
            seen: (0, Duration::ZERO),
            counters: Counters::default(),
        })
    }

    /// What it counted.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    pub(super) fn timer_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    pub(super) fn roused(&self) -> &EventFd {
        &self.roused
    }

    /// Takes the timer's or a device's signal.
    pub(super) fn heard(&mut self, by_timer: bool) {
        if by_timer {
            let _ = self.timer.wait();
        } else {
            let _ = self.roused.read();
        }
    }

    /// How long the guest sleeps; `None` when it does not.
    pub(super) fn sleeps(vcpus: &[vcpu::Handle]) -> Result<Option<Sleep>, String> {
        let mut sleeps = Sleep::Deep;
        for handle in vcpus {
            let Some(state) = handle.at(vcpu::state::sleep) else {
                return Ok(None);
            };
            sleeps = match (sleeps, state.map_err(|error| error.to_string())?) {
                (_, Sleep::Awake) => return Ok(None),
                (Sleep::Until(a), Sleep::Until(b)) => Sleep::Until(a.min(b)),
                (Sleep::Deep, other) | (other, Sleep::Deep) => other,
                (sleeps, _) => sleeps,
            };
        }
        let short = matches!(sleeps, Sleep::Until(ns) if u128::from(ns) < LEAST_SLEEP.as_nanos());
        Ok((!short).then_some(sleeps))
    }

    /// Gives the guest's memory back and sets the timer to its next one.
    pub(super) fn fall_asleep(
        &mut self,
        sleep: Sleep,
        measured_ns: u64,
    ) -> Result<Given, crate::park::Error> {
        let given = self.file.give_back(&self.memory, &self.kernel)?;
        self.counters.parked += 1;
        self.counters.written_bytes += given.written;
        self.counters.freed_bytes += given.freed;
        match sleep {
            Sleep::Until(ns) => {
                let passed = crate::state::monotonic_ns().saturating_sub(measured_ns);
                // At least 1 ns: zero would disarm it.
                self.set(Duration::from_nanos(ns.saturating_sub(passed).max(1)));
            }
            Sleep::Deep | Sleep::Awake => self.disarm(),
        }
        Ok(given)
    }

    /// The VM is parked because somebody asked for it.
    pub(super) fn asked(&mut self) {
        self.asked = true;
    }

    /// Counts a waking, and looks at the guest again when it may sleep.
    pub(super) fn awake(&mut self, by: Waker, slots: &[Arc<Slot>], vcpus: &[vcpu::Handle]) {
        match by {
            Waker::Timer => self.counters.woken_by_timer += 1,
            Waker::Device => self.counters.woken_by_device += 1,
            Waker::Request => {}
        }
        self.asked &= by == Waker::Timer;
        let soon = (by == Waker::Timer).then_some(AFTER_TIMER);
        self.look_again(soon, slots, vcpus);
    }

    /// Sets the timer for the next look at whether the guest is idle.
    pub(super) fn look_again(&mut self, soon: Option<Duration>, slots: &[Arc<Slot>], vcpus: &[vcpu::Handle]) {
        self.seen = activity(slots, vcpus);
        match self.interval() {
            Some(interval) => self.set(soon.unwrap_or(interval).min(interval)),
            None => self.disarm(),
        }
    }

    /// How long nothing must happen before the VM is parked; `None` when it never is.
    fn interval(&self) -> Option<Duration> {
        if self.asked { Some(WHEN_BUSY) } else { self.idle }
    }

    /// Whether nothing happened since the last look. After a timer's waking the CPU time says nothing: that the vCPUs
    /// are halted will have to do.
    pub(super) fn is_idle(&self, slots: &[Arc<Slot>], vcpus: &[vcpu::Handle]) -> bool {
        let Some(interval) = self.interval() else {
            return false;
        };
        let (events, cpu) = activity(slots, vcpus);
        events == self.seen.0
            && cpu.saturating_sub(self.seen.1) <= (interval / IDLE_CPU_PART).max(AFTER_TIMER)
    }

    /// The guest starts anew: nothing of its past is kept.
    pub(super) fn forget(&mut self) {
        self.asked = false;
        self.file.forget();
    }

    pub(super) fn disarm(&mut self) {
        let _ = self.timer.clear();
    }

    fn set(&mut self, after: Duration) {
        if let Err(error) = self.timer.reset(after, None) {
            tracing::error!(%error, "the timer that wakes a parked VM cannot be set");
        }
    }
}

/// What wakes a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waker {
    Timer,
    Device,
    Request,
}

fn activity(slots: &[Arc<Slot>], vcpus: &[vcpu::Handle]) -> (u64, Duration) {
    let events = slots.iter().map(|slot| slot.attended()).sum();
    (events, vcpus.iter().map(vcpu::Handle::cpu_time).sum())
}
