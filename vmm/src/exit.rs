//! Why the VM ends: one latch that the first reason closes.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use mandoline_api::monitor::ExitReason;
use vmm_sys_util::eventfd::EventFd;

/// An end and its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Why.
    pub reason: ExitReason,
    /// More for people.
    pub detail: Option<String>,
}

/// The first reason to end wins; closing the latch wakes the event loop.
#[derive(Debug)]
pub struct ExitLatch {
    closed: AtomicBool,
    exit: Mutex<Option<Exit>>,
    event: EventFd,
}

impl ExitLatch {
    /// An open latch.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            closed: AtomicBool::new(false),
            exit: Mutex::new(None),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// Ends the VM for `reason`, unless it ends already.
    pub fn close(&self, reason: ExitReason, detail: Option<String>) {
        let mut exit = self.exit.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if exit.is_none() {
            *exit = Some(Exit { reason, detail });
            self.closed.store(true, Ordering::Release);
            // Cannot block: a counter of 64 bits takes one more.
            let _ = self.event.write(1);
        }
    }

    /// Opens the latch again: the guest starts anew. What closed it must have come to rest.
    pub fn reopen(&self) {
        let mut exit = self.exit.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *exit = None;
        let _ = self.event.read();
        self.closed.store(false, Ordering::Release);
    }

    /// Whether the VM ends.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// The reason, once there is one.
    pub fn get(&self) -> Option<Exit> {
        self.exit
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .clone()
    }

    /// Readable once the latch is closed.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_wins() {
        let latch = ExitLatch::new().unwrap();
        assert!(!latch.is_closed());
        latch.close(ExitReason::Panic, Some("first".into()));
        latch.close(ExitReason::Reboot, None);
        assert_eq!(
            latch.get().unwrap(),
            Exit {
                reason: ExitReason::Panic,
                detail: Some("first".into())
            }
        );
        assert_eq!(latch.event().read().unwrap(), 1);
    }
}
