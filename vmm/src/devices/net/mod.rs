//! virtio-net (virtio 1.2, section 5.1) on a tap.
//!
//! ```text
//! guest TX chain --writev--> tap          tap --read--> frame (one, 64 KiB) --copy--> RX chains (merged)
//!   tap full: the chain goes back,          no RX chain: the frame waits, the tap is left alone, and its
//!   EPOLLOUT goes on                        own queue takes and drops what comes: the guest is never run over
//! ```
//!
//! Checksums and segmentation are left to whoever can do them best: the guest sends 64 KiB frames with
//! unfinished checksums, and gets such frames, wherever it agreed to (`VIRTIO_NET_F_*_TSO*`, `*_CSUM`).

pub mod metrics;
mod persist;
pub mod tap;
#[cfg(test)]
pub(crate) mod testing;
pub mod vhost;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use vmm_sys_util::epoll::EventSet;

use crate::devices::net::metrics::Metrics;
use crate::devices::net::tap::HEADER_BYTES;
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::persist::{Progress, RestoreError, Saved};
use crate::devices::virtio::queue::WorkQueue;
use crate::devices::virtio::{Activation, COMMON_FEATURES, Device, DeviceError, DeviceType, Event, Source};

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZE: u16 = 256;
const TAP_TOKEN: u32 = 0;
/// The largest frame with offloads, with its header.
const MAX_FRAME: usize = HEADER_BYTES + 14 + 65_536;
/// Where the header counts merged buffers.
const NUM_BUFFERS_AT: usize = 10;
/// Frames from the tap in one go, so that a flood leaves time for the other devices.
const RX_ROUND: usize = 256;

/// How an interface behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// The guest's address; `None` lets it choose.
    pub mac: Option<[u8; 6]>,
    /// The MTU to tell the guest.
    pub mtu: Option<u16>,
}

/// What an interface on `tap` offers.
fn offered(tap: &File, options: &Options) -> u64 {
    let mut features = COMMON_FEATURES
        | 1 << VIRTIO_NET_F_CSUM
        | 1 << VIRTIO_NET_F_GUEST_CSUM
        | 1 << VIRTIO_NET_F_HOST_TSO4
        | 1 << VIRTIO_NET_F_HOST_TSO6
        | 1 << VIRTIO_NET_F_GUEST_TSO4
        | 1 << VIRTIO_NET_F_GUEST_TSO6
        | 1 << VIRTIO_NET_F_MRG_RXBUF;
    if tap::has_udp_segmentation(tap) {
        features |= 1 << VIRTIO_NET_F_HOST_USO | 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;
    }
    if options.mac.is_some() {
        features |= 1 << VIRTIO_NET_F_MAC;
    }
    if options.mtu.is_some() {
        features |= 1 << VIRTIO_NET_F_MTU;
    }
    features
}

/// `struct virtio_net_config`: mac 0, status 6, max_virtqueue_pairs 8, mtu 10.
fn config_space(options: &Options) -> [u8; 12] {
    let mut config = [0; 12];
    config[..6].copy_from_slice(&options.mac.unwrap_or_default());
    config[10..].copy_from_slice(&options.mtu.unwrap_or_default().to_le_bytes());
    config
}

/// See the module.
pub struct Net {
    tap: File,
    features: u64,
    config: [u8; 12],
    active: Option<Active>,
    /// The frame under way to the guest.
    frame: Box<[u8]>,
    /// Its length with header; 0: none.
    waiting: usize,
    chain: Chain,
    /// Chains that take one merged frame: (head, bytes).
    taken: Vec<(u16, u32)>,
    metrics: Metrics,
}

struct Active {
    rx: WorkQueue,
    tx: WorkQueue,
    merge: bool,
}

impl Net {
    /// An interface on `tap`, which must be non-blocking with a [`HEADER_BYTES`] header: see [`tap::prepare`].
    pub fn new(tap: File, options: &Options) -> Self {
        Self {
            features: offered(&tap, options),
            config: config_space(options),
            tap,
            active: None,
            // Zeroed by the kernel when touched: an idle interface costs a page or two of it.
            frame: vec![0; MAX_FRAME].into_boxed_slice(),
            waiting: 0,
            chain: Chain::default(),
            taken: Vec::with_capacity(usize::from(QUEUE_SIZE)),
            metrics: Metrics::default(),
        }
    }

    /// Tap to guest.
    fn receive(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let mut budget = RX_ROUND;
        loop {
            if self.waiting == 0 {
                if budget == 0 {
                    active.rx.again();
                    break;
                }
                budget -= 1;
                match self.tap.read(&mut self.frame) {
                    Ok(length) if length > HEADER_BYTES => self.waiting = length,
                    Ok(_) => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    // EAGAIN: nothing more. EIO or EBADFD: the interface is down or gone; it may come back.
                    Err(_) => break,
                }
            }
            match deliver(
                active,
                &mut self.chain,
                &mut self.taken,
                &mut self.frame[..self.waiting],
            )? {
                Delivery::Done => self.metrics.rx_frames += 1,
                Delivery::TooLong => self.metrics.rx_dropped += 1,
                Delivery::NoBuffers => break,
            }
            self.waiting = 0;
        }
        active.rx.announce()
    }

    /// Guest to tap.
    fn transmit(&mut self) -> Result<(), DeviceError> {
        let Some(Active { tx, .. }) = &mut self.active else {
            return Ok(());
        };
        tx.no_kicks()?;
        let mut full = false;
        for _ in 0..tx.round() {
            if !tx.pop(&mut self.chain)? {
                break;
            }
            let chain = &self.chain;
            chain.only_readable().map_err(|error| tx.refuse(error))?;
            let bytes = chain.readable.bytes();
            let (least, most) = (HEADER_BYTES as u64 + 1, MAX_FRAME as u64);
            if bytes < least || bytes > most {
                return Err(tx.refuse(chain.wrong_length("frame", bytes, least, most)));
            }
            match write_frame(&self.tap, chain) {
                Ok(()) => self.metrics.tx_frames += 1,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    tx.unpop(chain);
                    full = true;
                    break;
                }
                Err(_) => self.metrics.tx_dropped += 1,
            }
            tx.used(chain.head, 0)?;
        }
        tx.announce()?;
        // A full tap says itself when to go on (EPOLLOUT).
        if !full && tx.want_kicks()? {
            tx.again();
        }
        Ok(())
    }
}

fn write_frame(tap: &File, chain: &Chain) -> io::Result<()> {
    let pieces = chain.readable.pieces();
    loop {
        // SAFETY: the pieces are guest memory (see `Buffers`), at most UIO_MAXIOV of them.
        let done = unsafe { libc::writev(tap.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) };
        if done >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

enum Delivery {
    Done,
    /// Longer than all of the guest's buffers together can ever be.
    TooLong,
    NoBuffers,
}

/// Puts a frame into as many chains as it takes, all or none.
fn deliver(
    active: &mut Active,
    chain: &mut Chain,
    taken: &mut Vec<(u16, u32)>,
    frame: &mut [u8],
) -> Result<Delivery, DeviceError> {
    let rx = &mut active.rx;
    taken.clear();
    let mut done = 0;
    let mut count_at = None;
    while done < frame.len() {
        if taken.len() == rx.round() || (!active.merge && !taken.is_empty()) {
            // A frame that does not fit is dropped; what was popped for it is given back empty.
            for (head, _) in taken.drain(..) {
                rx.used(head, 0)?;
            }
            return Ok(Delivery::TooLong);
        }
        if !rx.pop(chain)? {
            // Before the chains go back: the driver is to say when there is one more than these.
            if rx.want_kicks()? {
                rx.no_kicks()?;
                continue;
            }
            for (head, _) in taken.drain(..).rev() {
                chain.head = head;
                rx.unpop(chain);
            }
            return Ok(Delivery::NoBuffers);
        }
        chain.only_writable().map_err(|error| rx.refuse(error))?;
        let room = chain.writable.bytes();
        if taken.is_empty() {
            if room < HEADER_BYTES as u64 {
                let error = chain.wrong_length("receive buffer", room, HEADER_BYTES as u64, u64::MAX);
                return Err(rx.refuse(error));
            }
            // The number of merged buffers is known at the end only: remember where it stands.
            frame[NUM_BUFFERS_AT..HEADER_BYTES].copy_from_slice(&1u16.to_le_bytes());
            count_at = chain.writable.place_of_u16(NUM_BUFFERS_AT);
        }
        let written = chain.writable.put_front(&frame[done..]);
        done += written;
        taken.push((chain.head, written as u32));
    }
    if taken.len() > 1
        && let Some(place) = count_at
    {
        place.set(taken.len() as u16);
    }
    for (head, bytes) in taken.drain(..) {
        rx.used(head, bytes)?;
    }
    Ok(Delivery::Done)
}

impl Device for Net {
    fn kind(&self) -> DeviceType {
        DeviceType::Net
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        tap::set_offload(&self.tap, activation.features).map_err(|source| DeviceError::Host {
            what: "setting the tap's offloads",
            source,
        })?;
        let merge = activation.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let mut queues = activation.queues.into_iter().flatten();
        self.waiting = 0;
        self.active = match (queues.next(), queues.next()) {
            (Some(rx), Some(tx)) => Some(Active { rx, tx, merge }),
            _ => None,
        };
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.waiting = 0;
    }

    /// Edge-triggered: a tap whose frames nobody takes must not wake the loop for ever.
    fn sources(&self) -> Vec<Source> {
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        vec![Source {
            fd: self.tap.as_raw_fd(),
            events,
            token: TAP_TOKEN,
        }]
    }

    fn handle(&mut self, event: Event) -> Result<(), DeviceError> {
        match event {
            Event::Kick(RX) => self.receive(),
            Event::Kick(TX) => self.transmit(),
            Event::Kick(_) => Ok(()),
            Event::Host(_, events) => {
                if events.contains(EventSet::OUT) {
                    self.transmit()?;
                }
                self.receive()
            }
        }
    }

    fn progress(&self) -> Vec<Option<Progress>> {
        match &self.active {
            Some(active) => vec![Some(active.rx.progress()), Some(active.tx.progress())],
            None => Vec::new(),
        }
    }

    fn save(&self) -> Saved {
        persist::save(&self.config)
    }

    fn restore(&mut self, saved: &Saved) -> Result<(), RestoreError> {
        self.config = persist::restore(saved)?;
        Ok(())
    }

    fn metrics(&self) -> serde_json::Value {
        serde_json::to_value(self.metrics).unwrap_or_default()
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
