//! A driver for tests: one queue in guest memory, and the device's view of it.

#![allow(dead_code, clippy::unwrap_used)] // tests and fuzzing each use a part

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::interrupt::Interrupt;
use crate::devices::virtio::queue::WorkQueue;
use crate::devices::virtio::{Activation, FEATURE_EVENT_INDEX, FEATURE_VERSION_1};
use crate::memory::{self, Memory};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// The driver's side of one queue: descriptors at `base`, rings behind them.
pub(crate) struct Ring {
    pub(crate) memory: Memory,
    base: u64,
    size: u16,
    made: u16,
    seen: u16,
    free: u16,
    /// Whether both sides say by index when they want to hear of more (`VIRTIO_F_EVENT_IDX`).
    event_index: bool,
}

impl Ring {
    pub(crate) fn new(memory: &Memory, base: u64, size: u16) -> Self {
        Self {
            memory: memory.clone(),
            base,
            size,
            made: 0,
            seen: 0,
            free: 0,
            event_index: false,
        }
    }

    fn available(&self) -> u64 {
        self.base + 0x4000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0x6000
    }

    /// Where its descriptors, its available ring and its used ring lie.
    pub(crate) fn places(&self) -> [u64; 3] {
        [self.base, self.available(), self.used_ring()]
    }

    pub(crate) fn queue(&self, index: usize, interrupt: &Arc<Interrupt>, kick: &Arc<EventFd>) -> WorkQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.base)).unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.available()))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(self.used_ring()))
            .unwrap();
        queue.set_event_idx(self.event_index);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        WorkQueue::new(index, queue, self.memory.clone(), interrupt.clone(), kick.clone())
    }

    pub(crate) fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = GuestAddress(self.base + 16 * u64::from(index));
        let bytes: Vec<u8> = [
            &address.to_le_bytes()[..],
            &length.to_le_bytes(),
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ]
        .concat();
        self.memory.write_slice(&bytes, at).unwrap();
    }

    /// Makes a chain of (address, length, device writes) available; returns its head.
    pub(crate) fn offer(&mut self, pieces: &[(u64, u32, bool)]) -> u16 {
        let head = self.free;
        for (n, (address, length, write)) in pieces.iter().enumerate() {
            let index = self.free;
            self.free = (self.free + 1) % self.size;
            let last = n + 1 == pieces.len();
            let flags = if *write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.descriptor(index, *address, *length, flags, self.free);
        }
        self.offer_head(head);
        head
    }

    pub(crate) fn offer_head(&mut self, head: u16) {
        let slot = self.available() + 4 + 2 * u64::from(self.made % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.made = self.made.wrapping_add(1);
        self.set_available_index(self.made);
    }

    pub(crate) fn set_available_index(&self, index: u16) {
        self.memory
            .write_obj(index, GuestAddress(self.available() + 2))
            .unwrap();
    }

    /// Whether the device wants a kick for the chain that was offered last.
    pub(crate) fn wants_kick(&self) -> bool {
        let at = self.used_ring() + 4 + 8 * u64::from(self.size);
        let event: u16 = self.memory.read_obj(GuestAddress(at)).unwrap();
        event == self.made.wrapping_sub(1)
    }

    pub(crate) fn set_used_index(&self, index: u16) {
        self.memory
            .write_obj(index, GuestAddress(self.used_ring() + 2))
            .unwrap();
    }

    /// The next chain that the device gave back: (head, bytes written).
    pub(crate) fn used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(self.used_ring() + 2)).unwrap();
        if index == self.seen {
            return None;
        }
        let at = self.used_ring() + 4 + 8 * u64::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let bytes: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        Some((head as u16, bytes))
    }

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// Memory with `count` rings of `size`, and what activates a device on them.
pub(crate) fn rings(count: usize, size: u16, features: u64) -> (Vec<Ring>, Activation, Vec<Arc<EventFd>>) {
    rings_in(memory::create(16 << 20).unwrap(), count, size, features)
}

/// The same in memory that is there, where rings may have been before.
pub(crate) fn rings_in(
    memory: Memory,
    count: usize,
    size: u16,
    features: u64,
) -> (Vec<Ring>, Activation, Vec<Arc<EventFd>>) {
    let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let interrupt = Arc::new(Interrupt::new(event()));
    let rings: Vec<Ring> = (0..count)
        .map(|n| Ring::new(&memory, 0x1_0000 * (n as u64 + 1), size))
        .map(|ring| Ring {
            event_index: features & FEATURE_EVENT_INDEX != 0,
            ..ring
        })
        .inspect(|ring| ring.put(ring.base, &[0; 0x8000]))
        .collect();
    let kicks: Vec<Arc<EventFd>> = (0..count).map(|_| Arc::new(event())).collect();
    let queues = rings
        .iter()
        .zip(&kicks)
        .enumerate()
        .map(|(n, (ring, kick))| Some(ring.queue(n, &interrupt, kick)))
        .collect();
    let features = features | FEATURE_VERSION_1;
    (
        rings,
        Activation {
            memory,
            queues,
            features,
            interrupt,
            kicks: kicks.clone(),
        },
        kicks,
    )
}
