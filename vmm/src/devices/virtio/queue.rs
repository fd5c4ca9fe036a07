//! A queue at work: popping checked chains, giving them back, and interrupting only when the driver wants it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::DeviceError;
use crate::devices::virtio::chain::{Chain, ChainError};
use crate::devices::virtio::interrupt::Interrupt;
use crate::devices::virtio::persist::Progress;
use crate::memory::Memory;

/// Where a queue lies in guest memory, for one who serves it in the device's stead (vhost).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rings {
    /// Entries.
    pub size: u16,
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub driver: u64,
    /// The used ring.
    pub device: u64,
}

/// Where [`WorkQueue::held`] puts its ring: no guest memory reaches this far (1 TiB at most, above 4 GiB).
const BESIDE_MEMORY: GuestAddress = GuestAddress(1 << 50);
/// Size of that ring's page in bytes.
const RING_OF_ONE: usize = 4096;

/// A queue that its device works on.
pub struct WorkQueue {
    index: usize,
    queue: Queue,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    /// The queue's own kick, for work that is put off.
    kick: Arc<EventFd>,
    /// Whether something was used since the driver was last interrupted.
    unannounced: bool,
    /// Chains that are out: popped, not given back. A driver that makes a head available twice is caught by it.
    in_flight: Vec<bool>,
}

impl WorkQueue {
    /// `queue` must be valid in `memory`.
    pub fn new(
        index: usize,
        queue: Queue,
        memory: Memory,
        interrupt: Arc<Interrupt>,
        kick: Arc<EventFd>,
    ) -> Self {
        let in_flight = vec![false; usize::from(queue.size())];
        Self {
            index,
            queue,
            memory,
            interrupt,
            kick,
            unannounced: false,
            in_flight,
        }
    }

    /// The heads that are out, and how far both rings are.
    pub fn progress(&self) -> Progress {
        let held = (0u16..).zip(&self.in_flight).filter(|(_, out)| **out);
        Progress {
            next_available: self.queue.next_avail(),
            next_used: self.queue.next_used(),
            held: held.map(|(head, _)| head).collect(),
        }
    }

    /// Where it lies.
    pub fn rings(&self) -> Rings {
        Rings {
            size: self.queue.size(),
            descriptors: self.queue.desc_table(),
            driver: self.queue.avail_ring(),
            device: self.queue.used_ring(),
        }
    }

    /// Somebody else served the queue up to the available ring's entry `next_available`, and stopped: nothing is out, and
    /// the used ring says itself where it ends.
    pub fn was_served_to(&mut self, next_available: u16) -> Result<(), DeviceError> {
        let failed = self.ring_error();
        let next_used = self.queue.used_idx(&self.memory, Ordering::Acquire);
        self.queue.set_next_avail(next_available);
        self.queue.set_next_used(next_used.map_err(failed)?.0);
        Ok(())
    }

    /// Goes on where a saved queue stood.
    pub fn advance_to(&mut self, progress: &Progress) {
        self.queue.set_next_avail(progress.next_available);
        self.queue.set_next_used(progress.next_used);
        for head in &progress.held {
            if let Some(out) = self.in_flight.get_mut(usize::from(*head)) {
                *out = true;
            }
        }
    }

    /// Serves what is available, at most a ring full: `work` gets each chain and returns the bytes it wrote.
    /// What comes meanwhile is left to the next kick, which this makes itself where need be.
    pub fn serve(
        &mut self,
        chain: &mut Chain,
        mut work: impl FnMut(&mut Chain) -> Result<u32, ChainError>,
    ) -> Result<(), DeviceError> {
        self.no_kicks()?;
        for _ in 0..self.round() {
            if !self.pop(chain)? {
                break;
            }
            let written = work(chain).map_err(|error| self.refuse(error))?;
            self.used(chain.head, written)?;
        }
        self.announce()?;
        if self.want_kicks()? {
            self.again();
        }
        Ok(())
    }

    /// Makes the event loop come back to this queue after it has attended to the others.
    pub fn again(&self) {
        // Cannot fail in a way that matters: a full counter is a kick too.
        let _ = self.kick.write(1);
    }

    /// How many chains one round may take: what the ring can hold. A driver that refills as fast as the device
    /// works gets its next round only after the other devices had theirs.
    pub fn round(&self) -> usize {
        usize::from(self.queue.size())
    }

    fn ring_error(&self) -> impl Fn(virtio_queue::Error) -> DeviceError + 'static {
        let queue = self.index;
        move |source| DeviceError::Ring { queue, source }
    }

    fn chain_error(&self, source: ChainError) -> DeviceError {
        DeviceError::Chain {
            queue: self.index,
            source,
        }
    }

    /// Puts the next available chain into `chain`; false when there is none.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, DeviceError> {
        let failed = self.ring_error();
        // An iterator a chain: it checks the driver's index each time, and never lets it jump.
        let next = self.queue.iter(&self.memory).map_err(&failed)?.next();
        let Some(raw) = next else { return Ok(false) };
        let head = raw.head_index();
        match self.in_flight.get_mut(usize::from(head)) {
            Some(out) if !*out => *out = true,
            // Out of the table, or made available twice.
            _ => return Err(failed(virtio_queue::Error::InvalidDescriptorIndex)),
        }
        chain
            .load(&self.memory, raw)
            .map_err(|source| self.chain_error(source))?;
        Ok(true)
    }

    /// Puts a chain that is out (its head is among those of [`WorkQueue::progress`]) into `chain` again, from guest memory:
    /// for a device that was saved while it held one.
    pub fn held(&mut self, head: u16, chain: &mut Chain) -> Result<(), DeviceError> {
        let failed = self.ring_error();
        // A queue takes chains from its available ring only, and there this one is no more. So it gets a ring of one entry,
        // beside the guest's memory, and the chain passes the same checks as any.
        let ring = GuestRegionMmap::from_range(BESIDE_MEMORY, RING_OF_ONE, None)
            .map_err(|_| failed(virtio_queue::Error::InvalidAvailRingIndex))?;
        let memory = self
            .memory
            .insert_region(Arc::new(ring))
            .map_err(|_| failed(virtio_queue::Error::InvalidAvailRingIndex))?;
        // Index 1, then the only entry (virtio 1.2, 2.7.6).
        let [low, high] = head.to_le_bytes();
        memory
            .write_slice(&[0, 0, 1, 0, low, high], BESIDE_MEMORY)
            .map_err(|_| failed(virtio_queue::Error::InvalidAvailRingIndex))?;
        let mut state = self.queue.state();
        state.avail_ring = BESIDE_MEMORY.0;
        state.next_avail = 0;
        let mut queue = Queue::try_from(state).map_err(&failed)?;
        let next = queue.iter(&memory).map_err(&failed)?.next();
        let raw = next.ok_or_else(|| failed(virtio_queue::Error::InvalidDescriptorIndex))?;
        // Its buffers are looked for in the guest's memory alone, which stays.
        chain
            .load(&self.memory, raw)
            .map_err(|source| self.chain_error(source))
    }

    /// Puts the chain that was popped last back: it will be the next again.
    pub fn unpop(&mut self, chain: &Chain) {
        self.in_flight[usize::from(chain.head)] = false;
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back with `bytes` written to it.
    pub fn used(&mut self, head: u16, bytes: u32) -> Result<(), DeviceError> {
        let failed = self.ring_error();
        if let Some(out) = self.in_flight.get_mut(usize::from(head)) {
            *out = false;
        }
        self.queue.add_used(&self.memory, head, bytes).map_err(failed)?;
        self.unannounced = true;
        Ok(())
    }

    /// Interrupts the driver if something was used and it wants to know.
    pub fn announce(&mut self) -> Result<(), DeviceError> {
        let failed = self.ring_error();
        if std::mem::take(&mut self.unannounced)
            && self.queue.needs_notification(&self.memory).map_err(failed)?
        {
            self.interrupt.used();
        }
        Ok(())
    }

    /// Asks for a kick at the next chain; true when one came meanwhile.
    pub fn want_kicks(&mut self) -> Result<bool, DeviceError> {
        let failed = self.ring_error();
        self.queue.enable_notification(&self.memory).map_err(failed)
    }

    /// Asks for a kick at the next chain that the driver adds, though others wait already; returns how many it has added
    /// until now (modulo 2^16).
    pub fn want_kick_for_more(&mut self) -> Result<u16, DeviceError> {
        let added = self.added()?;
        let next = self.queue.next_avail();
        self.queue.set_next_avail(added);
        let result = self.want_kicks();
        self.queue.set_next_avail(next);
        result?;
        Ok(added)
    }

    /// How many chains the driver has added (modulo 2^16).
    pub fn added(&self) -> Result<u16, DeviceError> {
        let added = self.queue.avail_idx(&self.memory, Ordering::Acquire);
        Ok(added.map_err(self.ring_error())?.0)
    }

    /// Asks for no kicks.
    pub fn no_kicks(&mut self) -> Result<(), DeviceError> {
        let failed = self.ring_error();
        self.queue.disable_notification(&self.memory).map_err(failed)
    }

    /// Makes an error about a chain of this queue.
    pub fn refuse(&self, source: ChainError) -> DeviceError {
        self.chain_error(source)
    }
}
