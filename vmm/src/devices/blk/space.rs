//! Requests that found the host's disk full: they wait, and are tried again each second.
//!
//! A guest whose write fails remounts its file system read-only, or loses data; one whose write takes long only
//! waits. The operator sees `waiting_for_space` in the metrics and a line in the log, and makes room.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vmm_sys_util::epoll::EventSet;

use crate::devices::virtio::Source;
use crate::log::RateLimit;

const RETRY: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};
const AT_ONCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1,
};

/// See the module. It holds the heads only; the requests stay with the drive.
pub(super) struct Space {
    drive: String,
    timer: OwnedFd,
    /// At most as many as the queue is long, since each head is out once.
    heads: Vec<u16>,
    complaints: RateLimit,
}

impl Space {
    pub(super) fn new(drive: &str) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self {
            drive: drive.to_owned(),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            heads: Vec::new(),
            complaints: RateLimit::new(1, std::time::Duration::from_secs(60)),
        })
    }

    /// Ready (edge-triggered) when the requests are to be tried again.
    pub(super) fn source(&self, token: u32) -> Source {
        Source {
            fd: self.timer.as_raw_fd(),
            events: EventSet::IN | EventSet::EDGE_TRIGGERED,
            token,
        }
    }

    /// Requests that wait.
    pub(super) fn waiting(&self) -> usize {
        self.heads.len()
    }

    /// A request found no space: it is tried again in a second.
    pub(super) fn wait(&mut self, head: u16) {
        if self.heads.is_empty() {
            self.set_timer(RETRY);
            if let Some(suppressed) = self.complaints.pass() {
                let drive = &self.drive;
                tracing::warn!(drive, suppressed, "no space on the host: the guest's writes wait");
            }
        }
        self.heads.push(head);
    }

    /// A request that a saved VM waited with: it is tried again at once.
    pub(super) fn restore(&mut self, head: u16) {
        self.heads.push(head);
        self.set_timer(AT_ONCE);
    }

    /// Takes all that wait.
    pub(super) fn take(&mut self) -> Vec<u16> {
        std::mem::take(&mut self.heads)
    }

    /// The driver is gone, and what it waited for.
    pub(super) fn clear(&mut self) {
        self.heads.clear();
    }

    fn set_timer(&self, value: Timespec) {
        let once = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: value,
        };
        // Cannot fail: the descriptor is a timer, and the times are valid.
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            tracing::error!(%error, "the timer of a full disk cannot be set");
        }
    }
}
