//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2).
//!
//! ```text
//!  0 --ACKNOWLEDGE--> 1 --DRIVER--> 3 --FEATURES_OK--> 11 --DRIVER_OK--> 15: device active, registers frozen
//!  ^                                     (not if the driver took what was not offered)      |
//!  +------------------------------- a write of 0 from anywhere ------------------------------+
//!  FAILED (128) may be added anywhere; NEEDS_RESET (64) is the device's to show.
//! ```
//!
//! A write that is not the next step is ignored and the status stays: a driver reads it back. Queue registers
//! can be written between FEATURES_OK and DRIVER_OK only, queue by queue until that queue is ready; features
//! before FEATURES_OK only. So nothing that a device uses can change under it.

use std::sync::{Arc, Mutex, MutexGuard};

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use crate::devices::virtio::persist::{Progress, RestoreError, SavedDevice, SavedQueue, SavedTransport};
use crate::devices::virtio::queue::WorkQueue;
use crate::devices::virtio::{Activation, FEATURE_EVENT_INDEX, FEATURE_VERSION_1, Slot};
use crate::memory::Memory;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"MNDL");

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;

/// Registers (virtio 1.2, table 4.1).
#[allow(missing_docs)]
pub mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE: u64 = 0x08;
    pub const VENDOR: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESCRIPTORS: u64 = 0x80;
    pub const QUEUE_DESCRIPTORS_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

#[derive(Debug)]
struct Registers {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<SavedQueue>,
}

impl Registers {
    fn new(queues: usize) -> Self {
        Self {
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: vec![SavedQueue::default(); queues],
        }
    }
}

/// The window of registers of one device.
pub struct Transport {
    slot: Arc<Slot>,
    memory: Memory,
    registers: Mutex<Registers>,
}

impl Transport {
    /// The transport of the device in `slot`.
    pub fn new(slot: Arc<Slot>, memory: Memory) -> Self {
        let registers = Mutex::new(Registers::new(slot.queue_sizes.len()));
        Self {
            slot,
            memory,
            registers,
        }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// A load of the driver's.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= register::CONFIG {
            self.read_config(offset - register::CONFIG, data);
        } else if let Ok(bytes) = <&mut [u8; 4]>::try_from(&mut *data) {
            *bytes = self.read_register(offset).to_le_bytes();
        } else {
            data.fill(0); // registers are 32 bits wide (4.2.2.2); anything else is the driver's mistake
        }
    }

    /// A store of the driver's.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if offset >= register::CONFIG {
            self.slot.device().write_config(offset - register::CONFIG, data);
        } else if let Ok(bytes) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let device = self.slot.device();
        let config = device.config();
        let from = usize::try_from(offset)
            .ok()
            .and_then(|offset| config.get(offset..))
            .unwrap_or_default();
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            register::INTERRUPT_STATUS => return self.slot.interrupt.status(),
            register::MAGIC => return MAGIC,
            register::VERSION => return VERSION,
            register::DEVICE => return self.slot.kind as u32,
            register::VENDOR => return VENDOR,
            register::CONFIG_GENERATION => return self.slot.interrupt.generation(),
            _ => {}
        }
        let registers = self.registers();
        let select = registers.queue_select as usize;
        match offset {
            register::DEVICE_FEATURES => match registers.device_features_select {
                0 => self.slot.features as u32,
                1 => (self.slot.features >> 32) as u32,
                _ => 0,
            },
            register::QUEUE_SIZE_MAX => self
                .slot
                .queue_sizes
                .get(select)
                .map_or(0, |size| u32::from(*size)),
            register::QUEUE_READY => registers
                .queues
                .get(select)
                .map_or(0, |queue| u32::from(queue.ready)),
            register::STATUS => {
                let broken = if self.slot.interrupt.is_broken() {
                    NEEDS_RESET
                } else {
                    0
                };
                registers.status | broken
            }
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            register::INTERRUPT_ACK => return self.slot.interrupt.acknowledge(value),
            // Normally KVM's ioeventfd takes it and it never comes here.
            register::QUEUE_NOTIFY => {
                if let Some(kick) = self.slot.kicks.get(value as usize) {
                    let _ = kick.write(1);
                }
                return;
            }
            _ => {}
        }
        let mut registers = self.registers();
        match offset {
            register::DEVICE_FEATURES_SELECT => registers.device_features_select = value,
            register::DRIVER_FEATURES_SELECT => registers.driver_features_select = value,
            register::DRIVER_FEATURES if registers.status & (DRIVER | FEATURES_OK) == DRIVER => {
                let (shift, keep) = match registers.driver_features_select {
                    0 => (0, !0xffff_ffff),
                    1 => (32, 0xffff_ffff),
                    _ => return,
                };
                registers.driver_features = registers.driver_features & keep | u64::from(value) << shift;
            }
            register::QUEUE_SELECT => registers.queue_select = value,
            register::STATUS => self.write_status(&mut registers, value),
            _ => self.write_queue(&mut registers, offset, value),
        }
    }

    fn write_queue(&self, registers: &mut Registers, offset: u64, value: u32) {
        let open = registers.status & (FEATURES_OK | DRIVER_OK | FAILED) == FEATURES_OK;
        let select = registers.queue_select as usize;
        let Some(queue) = registers.queues.get_mut(select).filter(|_| open) else {
            return;
        };
        let low = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            register::QUEUE_READY => queue.ready = value == 1,
            _ if queue.ready => {}
            register::QUEUE_SIZE => queue.size = value,
            register::QUEUE_DESCRIPTORS => queue.descriptors = low(queue.descriptors),
            register::QUEUE_DESCRIPTORS_HIGH => queue.descriptors = high(queue.descriptors),
            register::QUEUE_DRIVER => queue.driver = low(queue.driver),
            register::QUEUE_DRIVER_HIGH => queue.driver = high(queue.driver),
            register::QUEUE_DEVICE => queue.device = low(queue.device),
            register::QUEUE_DEVICE_HIGH => queue.device = high(queue.device),
            _ => {}
        }
    }

    fn write_status(&self, registers: &mut Registers, value: u32) {
        if value == 0 {
            self.slot.reset();
            *registers = Registers::new(self.slot.queue_sizes.len());
            return;
        }
        let value = value & !NEEDS_RESET;
        if value & FAILED != 0 {
            registers.status |= FAILED;
            return;
        }
        let step = match (registers.status, value) {
            (0, ACKNOWLEDGE) => true,
            (ACKNOWLEDGE, v) => v == ACKNOWLEDGE | DRIVER,
            (3, v) if v == 3 | FEATURES_OK => self.accepts(registers.driver_features),
            (11, v) if v == 11 | DRIVER_OK => true,
            _ => false,
        };
        if !step {
            return;
        }
        registers.status = value;
        if value & DRIVER_OK != 0 {
            self.activate(registers, &[]);
        }
    }

    /// A driver must take what was offered only, and must be of this century: the legacy interface is not there.
    fn accepts(&self, features: u64) -> bool {
        features & !self.slot.features == 0 && features & FEATURE_VERSION_1 != 0
    }

    /// `progress`: where the queues stood when the device was saved; empty for a driver's own start.
    fn activate(&self, registers: &Registers, progress: &[Option<Progress>]) {
        let event_index = registers.driver_features & FEATURE_EVENT_INDEX != 0;
        let mut queues = Vec::with_capacity(registers.queues.len());
        for (index, (queue, max)) in registers.queues.iter().zip(self.slot.queue_sizes).enumerate() {
            if !queue.ready {
                queues.push(None);
                continue;
            }
            match build(queue, *max, event_index, &self.memory) {
                Ok(queue) => {
                    let mut queue = WorkQueue::new(
                        index,
                        queue,
                        self.memory.clone(),
                        self.slot.interrupt.clone(),
                        self.slot.kicks[index].clone(),
                    );
                    if let Some(Some(progress)) = progress.get(index) {
                        queue.advance_to(progress);
                    }
                    queues.push(Some(queue));
                }
                Err(error) => {
                    self.slot.interrupt.needs_reset();
                    self.slot.complain(&format!("queue {index}: {error}"));
                    return;
                }
            }
        }
        self.slot.activate(Activation {
            memory: self.memory.clone(),
            queues,
            features: registers.driver_features,
            interrupt: self.slot.interrupt.clone(),
            kicks: self.slot.kicks.clone(),
        });
    }

    /// The device as it stands; it must be paused.
    pub fn save(&self) -> SavedDevice {
        let registers = self.registers();
        let device = self.slot.device();
        let interrupt = &self.slot.interrupt;
        SavedDevice {
            name: self.slot.name.clone(),
            kind: self.slot.kind as u32,
            transport: SavedTransport {
                status: registers.status,
                device_features_select: registers.device_features_select,
                driver_features_select: registers.driver_features_select,
                driver_features: registers.driver_features,
                queue_select: registers.queue_select,
                interrupt_status: interrupt.status(),
                needs_reset: interrupt.is_broken(),
                config_generation: interrupt.generation(),
                queues: registers.queues.clone(),
            },
            queues: device.progress(),
            model: device.save(),
        }
    }

    /// Puts a saved device in place of this one, which no driver has touched. Nothing in `saved` is trusted.
    pub fn restore(&self, saved: &SavedDevice) -> Result<(), RestoreError> {
        let refused = |name, value: String, allowed: String| RestoreError::Value {
            device: "transport",
            name,
            value,
            allowed,
        };
        let from = &saved.transport;
        if (saved.kind, &saved.name) != (self.slot.kind as u32, &self.slot.name) {
            let is = format!("{} (type {})", saved.name, saved.kind);
            let allowed = format!("{} (type {})", self.slot.name, self.slot.kind as u32);
            return Err(refused("device", is, allowed));
        }
        let steps = [0, ACKNOWLEDGE, 3, 11, 15];
        if !steps.contains(&(from.status & !FAILED)) {
            return Err(refused("status", from.status.to_string(), format!("{steps:?}")));
        }
        let negotiated = from.status & FEATURES_OK != 0;
        if negotiated && !self.accepts(from.driver_features) {
            let (is, offered) = (from.driver_features, self.slot.features);
            return Err(refused(
                "features",
                format!("{is:#x}"),
                format!("of {offered:#x}"),
            ));
        }
        if from.queues.len() != self.slot.queue_sizes.len() {
            let allowed = self.slot.queue_sizes.len().to_string();
            return Err(refused(
                "number of queues",
                from.queues.len().to_string(),
                allowed,
            ));
        }
        for (progress, queue) in saved.queues.iter().zip(&from.queues) {
            let heads = progress.iter().flat_map(|progress| &progress.held);
            if let Some(head) = heads.into_iter().find(|head| u32::from(**head) >= queue.size) {
                return Err(refused("head", head.to_string(), format!("below {}", queue.size)));
            }
        }
        let mut registers = self.registers();
        *registers = Registers {
            status: from.status,
            device_features_select: from.device_features_select,
            driver_features_select: from.driver_features_select,
            driver_features: from.driver_features,
            queue_select: from.queue_select,
            queues: from.queues.clone(),
        };
        self.slot.device().restore(&saved.model)?;
        let interrupt = &self.slot.interrupt;
        interrupt.restore(from.interrupt_status, from.needs_reset, from.config_generation);
        if from.status & DRIVER_OK != 0 && !from.needs_reset {
            self.activate(&registers, &saved.queues);
        }
        Ok(())
    }

    /// Back to power-on: the machine is reset.
    pub fn power_on(&self) {
        let mut registers = self.registers();
        self.slot.reset();
        *registers = Registers::new(self.slot.queue_sizes.len());
    }
}

/// Why a queue cannot be used.
#[derive(Debug, thiserror::Error)]
enum QueueError {
    #[error("size {size} is not a power of two up to {max}")]
    Size { size: u32, max: u16 },
    #[error("{0}")]
    Address(virtio_queue::Error),
    #[error("rings at {descriptors:#x}, {driver:#x}, {device:#x} are not all guest memory")]
    Outside {
        descriptors: u64,
        driver: u64,
        device: u64,
    },
}

fn build(registers: &SavedQueue, max: u16, event_index: bool, memory: &Memory) -> Result<Queue, QueueError> {
    let size_error = || QueueError::Size {
        size: registers.size,
        max,
    };
    let mut queue = Queue::new(max).map_err(|_| size_error())?;
    let size = u16::try_from(registers.size).map_err(|_| size_error())?;
    queue.try_set_size(size).map_err(|_| size_error())?;
    queue
        .try_set_desc_table_address(GuestAddress(registers.descriptors))
        .map_err(QueueError::Address)?;
    queue
        .try_set_avail_ring_address(GuestAddress(registers.driver))
        .map_err(QueueError::Address)?;
    queue
        .try_set_used_ring_address(GuestAddress(registers.device))
        .map_err(QueueError::Address)?;
    queue.set_event_idx(event_index);
    queue.set_ready(true);
    // Address 0 is RAM, but to virtio-queue it means "not set".
    if registers.driver == 0 || !queue.is_valid(memory) {
        let SavedQueue {
            descriptors,
            driver,
            device,
            ..
        } = *registers;
        return Err(QueueError::Outside {
            descriptors,
            driver,
            device,
        });
    }
    Ok(queue)
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
