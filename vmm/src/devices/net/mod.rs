//! virtio-net (virtio 1.2, section 5.1) on a tap.
//!
//! ```text
//!  guest <--RX-- [rx] <--read--- tap          each direction by itself: one that is throttled, full or out of
//!  guest --TX--> [tx] --writev-> tap          buffers waits alone
//! ```
//!
//! Checksums and segmentation are left to whoever can do them best: the guest sends 64 KiB frames with
//! unfinished checksums, and gets such frames, wherever it agreed to (`VIRTIO_NET_F_*_TSO*`, `*_USO*`, `*_CSUM`). UDP
//! fragmentation (`*_UFO`) is not offered: Linux has sent none since 4.14, and segments (USO) take its place.

pub mod metrics;
mod persist;
mod rx;
pub mod tap;
#[cfg(test)]
pub(crate) mod testing;
mod tx;
pub mod vhost;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use mandoline_api::monitor as api;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use vmm_sys_util::epoll::EventSet;

use crate::devices::net::metrics::Metrics;
use crate::devices::net::persist::State;
use crate::devices::net::rx::Receive;
use crate::devices::net::tap::HEADER_BYTES;
use crate::devices::net::tx::Transmit;
use crate::devices::virtio::persist::{Progress, RestoreError, Saved};
use crate::devices::virtio::queue::WorkQueue;
use crate::devices::virtio::rate_limiter::RateLimiter;
use crate::devices::virtio::{Activation, COMMON_FEATURES, Device, DeviceError, DeviceType, Event, Source};

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZE: u16 = 256;
const TAP_TOKEN: u32 = 0;
const RX_LIMITER_TOKEN: u32 = 1;
const TX_LIMITER_TOKEN: u32 = 2;
/// The largest frame with offloads, with its header.
const MAX_FRAME: usize = HEADER_BYTES + 14 + 65_536;

/// How an interface behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// The guest's address; `None` lets it choose.
    pub mac: Option<[u8; 6]>,
    /// The MTU to tell the guest.
    pub mtu: Option<u16>,
    /// What comes to the guest: frames, and bytes without the virtio-net header. A frame with offloads is one.
    pub rx_rate_limiter: Option<api::RateLimiter>,
    /// What the guest sends, counted alike.
    pub tx_rate_limiter: Option<api::RateLimiter>,
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
    receive: Receive,
    transmit: Transmit,
}

struct Active {
    rx: WorkQueue,
    tx: WorkQueue,
    merge: bool,
}

impl Net {
    /// An interface on `tap`, which must be non-blocking with a [`HEADER_BYTES`](tap::HEADER_BYTES) header: see
    /// [`tap::prepare`]. Fails when the host has no timers to give.
    pub fn new(tap: File, options: &Options) -> io::Result<Self> {
        Ok(Self {
            features: offered(&tap, options),
            config: config_space(options),
            tap,
            active: None,
            receive: Receive::new(RateLimiter::of(options.rx_rate_limiter.as_ref())?),
            transmit: Transmit::new(RateLimiter::of(options.tx_rate_limiter.as_ref())?),
        })
    }

    /// Changes the limits of what comes to the guest and of what it sends; `None`, and a bucket that is absent, stays as it
    /// is. See [`RateLimiter::update`].
    pub fn set_rate_limiters(&mut self, rx: Option<&api::RateLimiter>, tx: Option<&api::RateLimiter>) {
        if let Some(rx) = rx {
            self.receive.limiter.update(rx);
        }
        if let Some(tx) = tx {
            self.transmit.limiter.update(tx);
        }
    }

    fn counted(&self) -> Metrics {
        let (rx, tx) = (&self.receive, &self.transmit);
        Metrics {
            rx_frames: rx.frames,
            rx_bytes: rx.bytes,
            rx_dropped: rx.dropped,
            rx_throttled: rx.limiter.throttled(),
            tx_frames: tx.frames,
            tx_bytes: tx.bytes,
            tx_dropped: tx.dropped,
            tx_throttled: tx.limiter.throttled(),
        }
    }

    fn receive(&mut self) -> Result<(), DeviceError> {
        match &mut self.active {
            Some(Active { rx, merge, .. }) => self.receive.run(&mut self.tap, rx, *merge),
            None => Ok(()),
        }
    }

    fn transmit(&mut self) -> Result<(), DeviceError> {
        match &mut self.active {
            Some(Active { tx, .. }) => self.transmit.run(&self.tap, tx),
            None => Ok(()),
        }
    }
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
        self.active = match (queues.next(), queues.next()) {
            (Some(rx), Some(tx)) => Some(Active { rx, tx, merge }),
            _ => None,
        };
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.receive.reset();
        self.transmit.reset();
    }

    /// Edge-triggered: a tap whose frames nobody takes, or a timer while the VM is paused, must not wake the loop for ever.
    fn sources(&self) -> Vec<Source> {
        let tap = Source {
            fd: self.tap.as_raw_fd(),
            events: EventSet::IN | EventSet::OUT,
            token: TAP_TOKEN,
        };
        let rx = self.receive.limiter.source(RX_LIMITER_TOKEN);
        let tx = self.transmit.limiter.source(TX_LIMITER_TOKEN);
        [tap, rx, tx]
            .map(|source| Source {
                events: source.events | EventSet::EDGE_TRIGGERED,
                ..source
            })
            .to_vec()
    }

    fn handle(&mut self, event: Event) -> Result<(), DeviceError> {
        match event {
            Event::Kick(RX) => self.receive(),
            Event::Kick(TX) => self.transmit(),
            Event::Kick(_) => Ok(()),
            Event::Host(RX_LIMITER_TOKEN, _) => {
                self.receive.limiter.woken();
                self.receive()
            }
            Event::Host(TX_LIMITER_TOKEN, _) => {
                self.transmit.limiter.woken();
                self.transmit()
            }
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
        persist::save(&State {
            config: self.config,
            rx_rate_limiter: self.receive.limiter.save(),
            tx_rate_limiter: self.transmit.limiter.save(),
        })
    }

    fn restore(&mut self, saved: &Saved) -> Result<(), RestoreError> {
        let state = persist::restore(saved)?;
        self.config = state.config;
        self.receive.limiter.restore(&state.rx_rate_limiter);
        self.transmit.limiter.restore(&state.tx_rate_limiter);
        Ok(())
    }

    fn metrics(&self) -> serde_json::Value {
        serde_json::to_value(self.counted()).unwrap_or_default()
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
