//! virtio-vsock (virtio 1.2, section 5.10): streams between the guest and Unix sockets of the host.
//!
//! Inwards a host program connects to the listening socket, writes `CONNECT <port>\n` and reads `OK <n>\n`.
//! Outwards the guest connects to CID 2, and the stream is handed to the node manager (see [`outward`]).
//!
//! Streams do not survive a restore; the guest's driver is told to end them. Linux does that in a thread of its own, in
//! which it would end a new stream too. So the guest gets no packet until it is through:
//!
//! ```text
//!  restore -> Due --a buffer for events--> Told --the driver put it back--> None
//! ```

pub mod connection;
mod metrics;
pub mod muxer;
pub mod outward;
pub mod packet;
mod persist;

use vmm_sys_util::epoll::EventSet;

use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::persist::{Progress, RestoreError, Saved};
use crate::devices::virtio::queue::WorkQueue;
use crate::devices::virtio::{Activation, COMMON_FEATURES, Device, DeviceError, DeviceType, Event, Source};
use crate::devices::vsock::muxer::Muxer;
use crate::devices::vsock::packet::{HEADER_BYTES, Header};

const TX: usize = 1;
const EVENTS: usize = 2;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (5.10.6.7), as `struct virtio_vsock_event` has it.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();
const QUEUE_SIZE: u16 = 128;
/// Most data in a packet (Linux: `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
const MAX_DATA: u64 = 64 << 10;
const MUXER_TOKEN: u32 = 0;

/// See the module.
pub struct Vsock {
    muxer: Muxer,
    config: [u8; 8],
    active: Option<Active>,
    chain: Chain,
    transport_reset: TransportReset,
}

/// Streams of a saved guest did not come along: its driver is to end them (5.10.6.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TransportReset {
    /// Nothing to tell, or told and done.
    None,
    /// To be told.
    Due,
    /// Told, when the driver had added this many buffers for events: it is done when it adds the next.
    Told(u16),
}

struct Active {
    rx: WorkQueue,
    tx: WorkQueue,
    /// For the one event that there is: a transport reset after a restore.
    events: Option<WorkQueue>,
}

impl Vsock {
    /// The device of the guest `guest_cid`.
    pub fn new(guest_cid: u32, muxer: Muxer) -> Self {
        Self {
            muxer,
            config: u64::from(guest_cid).to_le_bytes(),
            active: None,
            chain: Chain::default(),
            transport_reset: TransportReset::None,
        }
    }

    /// To the guest, while it has buffers.
    fn receive(&mut self) -> Result<(), DeviceError> {
        if !self.transport_reset_done()? {
            return Ok(());
        }
        let Some(Active { rx, .. }) = &mut self.active else {
            return Ok(());
        };
        let chain = &mut self.chain;
        let mut budget = rx.round();
        while self.muxer.has_packet() {
            if budget == 0 {
                rx.again();
                break;
            }
            budget -= 1;
            if !rx.pop(chain)? {
                if rx.want_kicks()? {
                    rx.no_kicks()?;
                    continue;
                }
                break;
            }
            chain.only_writable().map_err(|error| rx.refuse(error))?;
            let room = chain.writable.bytes();
            // A header alone carries no data: a stream that has some would wait for ever.
            if room <= HEADER_BYTES as u64 {
                let error = chain.wrong_length("receive buffer", room, HEADER_BYTES as u64 + 1, u64::MAX);
                return Err(rx.refuse(error));
            }
            let mut front = chain.writable.clone_front(HEADER_BYTES as u64);
            chain.writable.skip_front(HEADER_BYTES);
            chain.writable.truncate(MAX_DATA);
            match self.muxer.next_packet(&mut chain.writable) {
                Some(header) => {
                    front.put_front(&header.bytes());
                    rx.used(chain.head, HEADER_BYTES as u32 + header.length)?;
                }
                None => {
                    rx.unpop(chain);
                    break;
                }
            }
        }
        rx.announce()
    }

    /// Tells a restored driver that its streams are gone, as soon as it has a buffer for that.
    fn tell_transport_reset(&mut self) -> Result<(), DeviceError> {
        let events = self.active.as_mut().and_then(|active| active.events.as_mut());
        let Some(events) = events.filter(|_| self.transport_reset == TransportReset::Due) else {
            return Ok(());
        };
        if events.pop(&mut self.chain)? {
            let chain = &mut self.chain;
            chain.only_writable().map_err(|error| events.refuse(error))?;
            let written = chain.writable.put_front(&TRANSPORT_RESET);
            events.used(chain.head, written as u32)?;
            // Before the driver hears of it, so that what it adds is after this.
            self.transport_reset = TransportReset::Told(events.want_kick_for_more()?);
            events.announce()?;
        } else if events.want_kicks()? {
            events.again();
        }
        Ok(())
    }

    /// Whether the driver has ended the streams of before. One without a queue for events cannot be told.
    fn transport_reset_done(&mut self) -> Result<bool, DeviceError> {
        let events = self.active.as_ref().and_then(|active| active.events.as_ref());
        let done = match (self.transport_reset, events) {
            (TransportReset::None, _) | (_, None) => true,
            (TransportReset::Due, Some(_)) => false,
            (TransportReset::Told(added), Some(events)) => events.added()? != added,
        };
        if done {
            self.transport_reset = TransportReset::None;
        }
        Ok(done)
    }

    /// From the guest.
    fn transmit(&mut self) -> Result<(), DeviceError> {
        let Some(Active { tx, .. }) = &mut self.active else {
            return Ok(());
        };
        let muxer = &mut self.muxer;
        tx.serve(&mut self.chain, |chain| {
            chain.only_readable()?;
            let bytes = chain.readable.bytes();
            let mut header = [0; HEADER_BYTES];
            if !chain.readable.take_front(&mut header) {
                return Err(chain.wrong_length("header", bytes, HEADER_BYTES as u64, u64::MAX));
            }
            let header = Header::parse(&header);
            let data = chain.readable.bytes();
            // The buffer may be longer than the packet, never shorter.
            if u64::from(header.length) > data.min(MAX_DATA) {
                let length = u64::from(header.length);
                return Err(chain.wrong_length("packet", length, 0, data.min(MAX_DATA)));
            }
            chain.readable.truncate(u64::from(header.length));
            muxer.guest_packet(&header, &mut chain.readable);
            Ok(0)
        })
    }
}

impl Device for Vsock {
    fn kind(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE, QUEUE_SIZE, 16]
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let mut queues = activation.queues.into_iter();
        let (rx, tx, events) = (
            queues.next().flatten(),
            queues.next().flatten(),
            queues.next().flatten(),
        );
        self.active = match (rx, tx) {
            (Some(rx), Some(tx)) => Some(Active { rx, tx, events }),
            _ => None,
        };
        self.tell_transport_reset()
    }

    fn reset(&mut self) {
        self.active = None;
        self.transport_reset = TransportReset::None;
        self.muxer.reset();
    }

    /// Edge-triggered, since a pause leaves it unattended; the muxer empties its inner set each time.
    fn sources(&self) -> Vec<Source> {
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        vec![Source {
            fd: self.muxer.epoll_fd(),
            events,
            token: MUXER_TOKEN,
        }]
    }

    fn handle(&mut self, event: Event) -> Result<(), DeviceError> {
        match event {
            Event::Host(..) => self.muxer.host_events(self.active.is_some()),
            Event::Kick(TX) => self.transmit()?,
            Event::Kick(EVENTS) => self.tell_transport_reset()?,
            Event::Kick(_) => {}
        }
        self.receive()
    }

    fn progress(&self) -> Vec<Option<Progress>> {
        match &self.active {
            Some(Active { rx, tx, events }) => vec![
                Some(rx.progress()),
                Some(tx.progress()),
                events.as_ref().map(WorkQueue::progress),
            ],
            None => Vec::new(),
        }
    }

    fn save(&self) -> Saved {
        persist::save(self)
    }

    fn restore(&mut self, saved: &Saved) -> Result<(), RestoreError> {
        persist::restore(self, saved)
    }

    fn metrics(&self) -> serde_json::Value {
        let mut metrics = serde_json::to_value(self.muxer.metrics).unwrap_or_default();
        metrics["streams"] = self.muxer.streams().into();
        metrics
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
