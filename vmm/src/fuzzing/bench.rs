//! A device with its transport and an event loop, a hostile driver, and at last an honest one.

use event_manager::{EventManager, SubscriberOps};
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::mmio::{Transport, register};
use crate::devices::virtio::persist::SavedDevice;
use crate::devices::virtio::testing::{NEXT, Ring, WRITE};
use crate::devices::virtio::{Slot, Subscription};
use crate::devices::vsock::packet::{HEADER_BYTES, Header, TYPE_STREAM};
use crate::fuzzing::script::{BUFFERS, RAM, Step, length, place};
use crate::fuzzing::subject::{CID, Host, KINDS, Kind};
use crate::memory::{self, Memory};

/// Entries of each queue: the least of all devices' largest.
const SIZE: u16 = 16;
/// Rounds of the event loop after a step. Whoever makes itself work for ever (a kick of its own after each round) is not
/// waited for.
const ROUNDS: usize = 8;
/// Rounds, of up to a millisecond each, in which an honest request must be answered.
const PATIENCE: usize = 20_000;
/// Where the honest driver's buffers are, and the packets' of [`Step::Packet`].
const HONEST: u64 = 0x40_0000;
const PACKETS: u64 = 0x50_0000;

/// See the module.
pub(super) struct Bench {
    kind: Kind,
    limited: bool,
    host: Host,
    memory: Memory,
    slot: Arc<Slot>,
    transport: Transport,
    events: EventManager<Subscription>,
    rings: Vec<Ring>,
    packets: u64,
}

impl Bench {
    /// A device that a driver has brought up.
    pub(super) fn new(kind: Kind, limited: bool) -> Self {
        let memory = memory::create(RAM).unwrap();
        let mut host = Host::new();
        let (slot, transport, events) = install(&mut host, kind, limited, &memory);
        let mut bench = Self {
            kind,
            limited,
            host,
            memory,
            slot,
            transport,
            events,
            rings: Vec::new(),
            packets: 0,
        };
        bench.up();
        bench
    }

    fn register(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn read(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Whether the device shows that it needs a reset.
    pub(super) fn is_broken(&self) -> bool {
        self.read(register::STATUS) & 64 != 0
    }

    /// Resets the device and brings it up with all its queues, empty.
    pub(super) fn up(&mut self) {
        self.register(register::STATUS, 0);
        assert_eq!(self.read(register::STATUS), 0);
        self.register(register::STATUS, 1);
        self.register(register::STATUS, 3);
        for select in 0..2 {
            self.register(register::DEVICE_FEATURES_SELECT, select);
            self.register(register::DRIVER_FEATURES_SELECT, select);
            // All but the event index, so that every used buffer is told.
            let mask = if select == 0 { !(1 << 29) } else { u32::MAX };
            self.register(
                register::DRIVER_FEATURES,
                self.read(register::DEVICE_FEATURES) & mask,
            );
        }
        self.register(register::STATUS, 11);
        self.rings.clear();
        for queue in 0..self.slot.kicks.len() {
            let ring = Ring::new(&self.memory, 0x1_0000 * (queue as u64 + 1), SIZE);
            let [descriptors, driver, device] = ring.places();
            ring.put(descriptors, &[0; 0x8000]);
            self.register(register::QUEUE_SELECT, queue as u32);
            self.register(register::QUEUE_SIZE, u32::from(SIZE));
            for (low, address) in [
                (register::QUEUE_DESCRIPTORS, descriptors),
                (register::QUEUE_DRIVER, driver),
                (register::QUEUE_DEVICE, device),
            ] {
                self.register(low, address as u32);
                self.register(low + 4, 0);
            }
            self.register(register::QUEUE_READY, 1);
            self.rings.push(ring);
        }
        self.register(register::STATUS, 15);
        assert_eq!(
            self.read(register::STATUS),
            15,
            "{:?} does not come up",
            self.kind
        );
    }

    fn turn(&mut self, wait: i32) -> usize {
        self.events.run_with_timeout(wait).unwrap()
    }

    fn turns(&mut self) {
        for _ in 0..ROUNDS {
            if self.turn(0) == 0 {
                return;
            }
        }
    }

    fn queue(&self, queue: u8) -> usize {
        usize::from(queue) % self.rings.len()
    }

    /// Does what a step says.
    pub(super) fn step(&mut self, step: &Step) {
        match step {
            Step::Descriptor {
                queue,
                index,
                place: at,
                length: bytes,
                flags,
                next,
            } => {
                let ring = &self.rings[self.queue(*queue)];
                let index = u16::from(*index) % SIZE;
                let (flags, next) = (u16::from(*flags) & 7, u16::from(*next));
                ring.descriptor(index, place(*at), length(*bytes), flags, next);
            }
            Step::Offer { queue, head } => {
                let queue = self.queue(*queue);
                self.rings[queue].offer_head(u16::from(*head));
            }
            Step::Index { queue, index } => {
                let queue = self.queue(*queue);
                self.rings[queue].set_available_index(*index);
            }
            Step::Kick { queue } => {
                self.register(register::QUEUE_NOTIFY, u32::from(*queue));
                self.turns();
            }
            Step::Write { place: at, bytes } => {
                // What lies outside memory is not written.
                let _ = self.memory.write(bytes, GuestAddress(place(*at)));
            }
            Step::Register { offset, value } => {
                self.register(4 * u64::from(*offset), *value);
                self.turns();
            }
            Step::Config { offset, bytes } => {
                let offset = register::CONFIG + u64::from(*offset);
                let mut seen = vec![0; bytes.len()];
                self.transport.write(offset, bytes);
                self.transport.read(offset, &mut seen);
            }
            Step::Up => self.up(),
            Step::Twin => self.twin(),
            Step::Pause => {
                self.slot.pause();
                self.turns();
                self.slot.resume();
                self.turns();
            }
            Step::Host { bytes } => {
                self.host.say(self.kind, bytes);
                self.turns();
            }
            Step::Close => {
                self.host.streams.pop();
                self.turns();
                self.host.listen();
            }
            Step::Packet { .. } => self.packet(step),
            Step::Timers => {
                self.turn(2);
            }
        }
    }

    /// Sends a packet with a header that says what it likes.
    fn packet(&mut self, step: &Step) {
        let Step::Packet {
            operation,
            host_port,
            guest_port,
            length: bytes,
            flags,
            credit,
            forwarded,
        } = *step
        else {
            return;
        };
        let Some(tx) = self.rings.get_mut(1).filter(|_| self.kind == Kind::Vsock) else {
            return;
        };
        let header = Header {
            src_cid: CID.into(),
            dst_cid: 2,
            src_port: u32::from(guest_port),
            // Of streams that the host opened, and of those that the guest opens.
            dst_port: if host_port & 1 == 0 { 1 << 30 } else { 0 } | u32::from(host_port >> 1),
            length: length(bytes),
            kind: TYPE_STREAM,
            op: u16::from(operation) % 9,
            flags: u32::from(flags),
            buf_alloc: length(credit),
            fwd_cnt: length(forwarded),
        };
        let at = PACKETS + 0x1_0000 * (self.packets % 8);
        self.packets += 1;
        tx.put(at, &header.bytes());
        let total = HEADER_BYTES as u32 + u32::from(bytes);
        tx.offer(&[(at, total, false)]);
        self.step(&Step::Kick { queue: 1 });
        self.host.listen();
    }

    /// Saves the device and goes on with another one, made of what was saved.
    fn twin(&mut self) {
        self.slot.pause();
        let saved = self.transport.save();
        let text = serde_json::to_string(&saved).unwrap();
        let read: SavedDevice = serde_json::from_str(&text).unwrap();
        assert_eq!(read, saved);
        // The first one is gone before the second comes, as with its process.
        self.transport.power_on();
        let (slot, transport, events) = install(&mut self.host, self.kind, self.limited, &self.memory);
        (self.slot, self.transport, self.events) = (slot, transport, events);
        self.slot.pause();
        self.transport.restore(&read).unwrap();
        self.slot.resume();
        self.turns();
    }

    /// Whatever happened: a driver that resets the device gets one that works.
    pub(super) fn must_work_after_a_reset(&mut self) {
        self.slot.metrics();
        self.up();
        self.host.listen();
        self.honest();
        // Nothing is under way when the memory goes.
        self.transport.power_on();
    }

    /// An honest request, and its answer.
    pub(super) fn honest(&mut self) {
        let offer = |ring: &mut Ring, pieces: &[(u64, u32, bool)]| {
            // Past what the script left in the ring's table.
            for (index, (address, bytes, write)) in (0..).zip(pieces) {
                let flags = if *write { WRITE } else { 0 };
                let more = usize::from(index) + 1 < pieces.len();
                let flags = flags | if more { NEXT } else { 0 };
                ring.descriptor(index, *address, *bytes, flags, index + 1);
            }
            ring.offer_head(0);
        };
        let at = HONEST;
        let [first, ..] = &mut self.rings[..] else {
            panic!("a device without queues");
        };
        match self.kind {
            Kind::BlkSync | Kind::BlkAsync => {
                first.put(at, &[0; 16]);
                first.put(at + 0x1000, &[9]);
                offer(
                    first,
                    &[(at, 16, false), (at + 0x2000, 512, true), (at + 0x1000, 1, true)],
                );
            }
            Kind::Pmem => {
                first.put(at, &[0; 4]);
                offer(first, &[(at, 4, false), (at + 0x1000, 4, true)]);
            }
            Kind::Rng => offer(first, &[(at, 64, true)]),
            Kind::Balloon => {
                first.put(at, &0x800u32.to_le_bytes());
                offer(first, &[(at, 4, false)]);
            }
            Kind::Net | Kind::Vsock => {
                offer(first, &[(at, 0x1_0000, true)]);
                let header = Header {
                    src_cid: CID.into(),
                    dst_cid: 2,
                    src_port: 7,
                    // A stream that is not there gets a reset.
                    op: 5,
                    kind: TYPE_STREAM,
                    ..Header::default()
                };
                let frame = [0; 12 + 60];
                let (bytes, second) = (header.bytes(), &mut self.rings[1]);
                let bytes = if self.kind == Kind::Net {
                    &frame[..]
                } else {
                    &bytes[..]
                };
                second.put(at + 0x2_0000, bytes);
                offer(second, &[(at + 0x2_0000, bytes.len() as u32, false)]);
                if self.kind == Kind::Net {
                    self.host.say(Kind::Net, &frame);
                }
            }
        }
        let queues = if matches!(self.kind, Kind::Net | Kind::Vsock) {
            2
        } else {
            1
        };
        for queue in 0..queues {
            self.register(register::QUEUE_NOTIFY, queue);
        }
        for queue in 0..queues as usize {
            let answered = (0..PATIENCE).any(|_| {
                self.turn(1);
                self.rings[queue].used().is_some()
            });
            assert!(answered, "{:?}: queue {queue} does not answer", self.kind);
        }
        assert!(!self.is_broken());
        if matches!(self.kind, Kind::BlkSync | Kind::BlkAsync) {
            assert_eq!(self.rings[0].get(HONEST + 0x1000, 1), [0]);
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // After a panic, too, nothing may work on memory that goes.
        self.transport.power_on();
    }
}

/// A device, its transport, and an event loop with it.
fn install(
    host: &mut Host,
    kind: Kind,
    limited: bool,
    memory: &Memory,
) -> (Arc<Slot>, Transport, EventManager<Subscription>) {
    let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap();
    let slot = Slot::new("subject".into(), host.device(kind, limited), line).unwrap();
    let mut events = EventManager::new().unwrap();
    events.add_subscriber(Subscription(slot.clone()));
    (slot.clone(), Transport::new(slot, memory.clone()), events)
}

/// Target: a device is restored from what somebody made up. It refuses that, or it lives with it. The first byte says
/// which device.
pub(super) fn restore(bytes: &[u8]) {
    let Some((first, text)) = bytes.split_first() else {
        return;
    };
    let Ok(saved) = serde_json::from_slice::<SavedDevice>(text) else {
        return;
    };
    let kind = KINDS[usize::from(*first) % KINDS.len()];
    let mut bench = Bench::new(kind, false);
    bench.transport.power_on();
    let memory = bench.memory.clone();
    // What the guest's memory holds is made up, too.
    for (n, byte) in (0..).zip(text) {
        let _ = memory.write_obj(*byte, GuestAddress(BUFFERS + n));
    }
    bench.slot.pause();
    if bench.transport.restore(&saved).is_ok() {
        bench.slot.resume();
        for queue in 0..bench.rings.len() {
            bench.register(register::QUEUE_NOTIFY, queue as u32);
        }
        bench.turns();
    } else {
        bench.slot.resume();
    }
    bench.must_work_after_a_reset();
}

#[cfg(test)]
impl Bench {
    /// The device as it stands, for seeds.
    pub(super) fn saved(&self) -> SavedDevice {
        self.slot.pause();
        self.transport.save()
    }
}
