//! A device's interrupt: its status register and its line.
//!
//! Drivers read the status on every interrupt, so it is atomics, free of the device's lock.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// Interrupt status bit: buffers were used.
pub const USED_BUFFERS: u32 = 1;
/// Interrupt status bit: configuration (or the device's status) changed.
pub const CONFIG_CHANGED: u32 = 2;

/// See the module.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    needs_reset: AtomicBool,
    line: EventFd,
}

impl Interrupt {
    /// An interrupt on this line.
    pub fn new(line: EventFd) -> Self {
        Self {
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            line,
        }
    }

    /// The status register.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// The driver acknowledges.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Tells the driver that buffers were used.
    pub fn used(&self) {
        self.raise(USED_BUFFERS);
    }

    /// Shows `DEVICE_NEEDS_RESET` and tells the driver to look (virtio 1.2, 2.1.2).
    pub fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.raise(CONFIG_CHANGED);
    }

    /// Whether the device is broken.
    pub fn is_broken(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// The driver resets the device.
    pub fn reset(&self) {
        self.status.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }

    fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::AcqRel);
        // Cannot fail in a way that matters: the counter is KVM's to empty, and full means "raised".
        let _ = self.line.write(1);
    }
}
