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
    /// See [`Interrupt::raised_by_kernel`].
    by_kernel: AtomicBool,
    /// Counts changes of the configuration space (`ConfigGeneration`).
    generation: AtomicU32,
    line: EventFd,
}

impl Interrupt {
    /// An interrupt on this line.
    pub fn new(line: EventFd) -> Self {
        Self {
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            by_kernel: AtomicBool::new(false),
            generation: AtomicU32::new(0),
            line,
        }
    }

    /// The status register.
    pub fn status(&self) -> u32 {
        let used = if self.by_kernel.load(Ordering::Acquire) {
            USED_BUFFERS
        } else {
            0
        };
        self.status.load(Ordering::Acquire) | used
    }

    /// The driver acknowledges.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Tells the driver that buffers were used.
    pub fn used(&self) {
        self.raise(USED_BUFFERS);
    }

    /// Tells the driver that the configuration space has changed.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(CONFIG_CHANGED);
    }

    /// How often the configuration space has changed.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// The line itself, for one who interrupts without asking (vhost).
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// Until the next reset the kernel raises the line for used buffers (vhost), and nobody can tell when: so the status
    /// always says so. A driver that finds nothing used does nothing.
    pub fn raised_by_kernel(&self) {
        self.by_kernel.store(true, Ordering::Release);
    }

    /// Puts back what was saved; what was raised is raised again, since a line that was not heard would be lost.
    pub fn restore(&self, status: u32, needs_reset: bool, generation: u32) {
        self.status
            .store(status & (USED_BUFFERS | CONFIG_CHANGED), Ordering::Release);
        self.needs_reset.store(needs_reset, Ordering::Release);
        self.generation.store(generation, Ordering::Release);
        if status != 0 {
            let _ = self.line.write(1);
        }
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
        self.by_kernel.store(false, Ordering::Release);
    }

    fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::AcqRel);
        // Cannot fail in a way that matters: the counter is KVM's to empty, and full means "raised".
        let _ = self.line.write(1);
    }
}
