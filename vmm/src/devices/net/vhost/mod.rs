//! virtio-net whose frames the host's kernel moves (vhost-net): no thread of the monitor is on their path.
//!
//! ```text
//!            kick: KVM's ioeventfd                     call: KVM's irqfd
//!  guest  ------------------------>  vhost-net worker  ----------------->  guest
//!                                     |          ^
//!                                     +-- tap ---+
//!
//!           activate: features, rings, kick, call, error       pause: backends off, VHOST_GET_VRING_BASE
//!  (idle) --------------------------------------------> SERVED ------------------------------------------> PAUSED
//!    ^  ^                       backends on                |   <------------- resume: backends on ----------- |
//!    |  +------------- reset: backends off ----------------+                                                 |
//!    +-------------------------------------------------------------------------------------------------------+
//! ```
//!
//! What the worker finds wrong with a ring or a chain it says on that queue's error descriptor: the device then
//! needs a reset, like any other of ours. The worker interrupts without asking the monitor, so the interrupt
//! status always says "used buffers" while a driver runs the device ([`Interrupt::raised_by_kernel`]).
//!
//! [`Interrupt::raised_by_kernel`]: crate::devices::virtio::interrupt::Interrupt::raised_by_kernel

pub mod kernel;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use serde::Serialize;
use vhost::VringConfigData;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::net::persist::State;
use crate::devices::net::vhost::kernel::Kernel;
use crate::devices::net::{Options, QUEUE_SIZE, config_space, offered, persist, tap};
use crate::devices::virtio::persist::{Progress, RestoreError, Saved};
use crate::devices::virtio::queue::WorkQueue;
use crate::devices::virtio::rate_limiter::SavedRateLimiter;
use crate::devices::virtio::{
    Activation, COMMON_FEATURES, Device, DeviceError, DeviceType, Event, FEATURE_VERSION_1, Source,
};
use crate::memory::Memory;

/// What concerns the rings, and so whoever serves them; all else is between driver and tap.
const RING_FEATURES: u64 = COMMON_FEATURES | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// The host's kernel refused to serve an interface.
#[derive(Debug, thiserror::Error)]
#[error("vhost-net: {what}: {source}")]
pub struct Error {
    what: &'static str,
    source: vhost::Error,
}

/// What the monitor sees of such an interface; its frames are counted by the tap.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Rings or chains that the kernel found wrong.
    pub vhost_faults: u64,
}

/// See the module. `B` is [`Kernel`] but for tests.
pub struct VhostNet<B = Kernel> {
    tap: File,
    backend: B,
    features: u64,
    config: [u8; 12],
    /// One for each queue, written by the worker.
    errors: [EventFd; 2],
    /// The queues while a driver runs the device.
    queues: Option<[WorkQueue; 2]>,
    metrics: Metrics,
}

impl VhostNet<Kernel> {
    /// An interface on `tap`, prepared as for [`Net`](crate::devices::net::Net); `vhost` is an open `/dev/vhost-net`.
    pub fn new(tap: File, vhost: File, memory: &Memory, options: &Options) -> Result<Self, Error> {
        Self::with_backend(tap, Kernel::new(vhost, memory)?, options)
    }
}

impl<B: vhost::net::VhostNet> VhostNet<B> {
    fn with_backend(tap: File, backend: B, options: &Options) -> Result<Self, Error> {
        let failed = |what| move |source| Error { what, source };
        let served = backend.get_features().map_err(failed("VHOST_GET_FEATURES"))?;
        if served & FEATURE_VERSION_1 == 0 {
            return Err(failed("VIRTIO_F_VERSION_1 is missing")(
                vhost::Error::InvalidOperation,
            ));
        }
        let event = || {
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(vhost::Error::IOError)
                .map_err(failed("eventfd"))
        };
        Ok(Self {
            features: offered(&tap, options) & (served | !RING_FEATURES),
            config: config_space(options),
            tap,
            backend,
            errors: [event()?, event()?],
            queues: None,
            metrics: Metrics::default(),
        })
    }

    fn set_up(&self, index: usize, queue: &WorkQueue, activation: &Activation) -> vhost::Result<()> {
        let rings = queue.rings();
        self.backend.set_vring_num(index, rings.size)?;
        let addresses = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: rings.size,
            flags: 0,
            desc_table_addr: rings.descriptors,
            used_ring_addr: rings.device,
            avail_ring_addr: rings.driver,
            log_addr: None,
        };
        self.backend.set_vring_addr(index, &addresses)?;
        self.backend
            .set_vring_base(index, queue.progress().next_available)?;
        self.backend.set_vring_call(index, activation.interrupt.line())?;
        self.backend.set_vring_err(index, &self.errors[index])?;
        let kick = activation.kicks.get(index).ok_or(vhost::Error::InvalidQueue)?;
        self.backend.set_vring_kick(index, kick)
    }

    fn start(&self) -> Result<(), DeviceError> {
        for index in 0..self.errors.len() {
            self.backend
                .set_backend(index, Some(&self.tap))
                .map_err(refused("VHOST_NET_SET_BACKEND"))?;
        }
        Ok(())
    }

    /// When it returns, the worker touches neither rings nor buffers.
    fn stop(&self) -> Result<(), DeviceError> {
        let mut result = Ok(());
        for index in 0..self.errors.len() {
            result = result.and(self.backend.set_backend(index, None));
        }
        result.map_err(refused("VHOST_NET_SET_BACKEND, none"))
    }
}

fn refused(what: &'static str) -> impl Fn(vhost::Error) -> DeviceError {
    move |error| {
        let source = match error {
            vhost::Error::IoctlError(source) => source,
            other => io::Error::other(other),
        };
        DeviceError::Host { what, source }
    }
}

impl<B: vhost::net::VhostNet + Send + 'static> Device for VhostNet<B> {
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

    fn kicks_taken(&self) -> bool {
        true
    }

    /// While the device is paused nobody takes frames from the tap: one that comes shows.
    fn paused_source(&self) -> Option<RawFd> {
        Some(self.tap.as_raw_fd())
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        tap::set_offload(&self.tap, activation.features).map_err(|source| DeviceError::Host {
            what: "setting the tap's offloads",
            source,
        })?;
        let mut queues = std::mem::take(&mut activation.queues).into_iter().flatten();
        let (Some(rx), Some(tx)) = (queues.next(), queues.next()) else {
            return Ok(());
        };
        self.backend
            .set_features(activation.features & RING_FEATURES)
            .map_err(refused("VHOST_SET_FEATURES"))?;
        let queues = [rx, tx];
        for (index, queue) in queues.iter().enumerate() {
            self.set_up(index, queue, &activation)
                .map_err(refused("giving a queue to vhost-net"))?;
        }
        // Before the first interrupt can come.
        activation.interrupt.raised_by_kernel();
        self.queues = Some(queues);
        self.start()
    }

    fn reset(&mut self) {
        if self.queues.take().is_some() {
            // Fails only for a descriptor or an index that is wrong, and these were right before.
            if let Err(error) = self.stop() {
                tracing::error!(%error, "an interface cannot be taken from vhost-net");
            }
        }
        for error in &self.errors {
            let _ = error.read();
        }
    }

    /// Edge-triggered: while the VM is paused nobody reads them.
    fn sources(&self) -> Vec<Source> {
        use std::os::fd::AsRawFd;
        let tokens = (0..).zip(&self.errors);
        tokens
            .map(|(token, error)| Source {
                fd: error.as_raw_fd(),
                events: EventSet::IN | EventSet::EDGE_TRIGGERED,
                token,
            })
            .collect()
    }

    fn handle(&mut self, event: Event) -> Result<(), DeviceError> {
        let Event::Host(token, _) = event else {
            return Ok(());
        };
        let queue = token as usize;
        let told = self.errors.get(queue).is_some_and(|error| error.read().is_ok());
        if told && self.queues.is_some() {
            self.metrics.vhost_faults += 1;
            return Err(DeviceError::Vhost { queue });
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        if self.queues.is_none() {
            return Ok(());
        }
        self.stop()?;
        for (index, queue) in self.queues.iter_mut().flatten().enumerate() {
            let next = self.backend.get_vring_base(index);
            // A split ring's index has 16 bits.
            queue.was_served_to(next.map_err(refused("VHOST_GET_VRING_BASE"))? as u16)?;
        }
        Ok(())
    }

    /// The worker looks at both rings and the tap when it gets its backends: no kick is lost.
    fn resume(&mut self) -> Result<(), DeviceError> {
        match &self.queues {
            Some(_) => self.start(),
            None => Ok(()),
        }
    }

    fn progress(&self) -> Vec<Option<Progress>> {
        let queues = self.queues.iter().flatten();
        queues.map(|queue| Some(queue.progress())).collect()
    }

    fn save(&self) -> Saved {
        persist::save(&State {
            config: self.config,
            rx_rate_limiter: SavedRateLimiter::default(),
            tx_rate_limiter: SavedRateLimiter::default(),
        })
    }

    fn restore(&mut self, saved: &Saved) -> Result<(), RestoreError> {
        let state = persist::restore(saved)?;
        for limiter in [state.rx_rate_limiter, state.tx_rate_limiter] {
            if limiter != SavedRateLimiter::default() {
                return Err(RestoreError::Value {
                    device: persist::DEVICE,
                    name: "rate limiter",
                    value: format!("{limiter:?}"),
                    allowed: "none, where vhost is used".to_owned(),
                });
            }
        }
        self.config = state.config;
        Ok(())
    }

    fn metrics(&self) -> serde_json::Value {
        serde_json::to_value(self.metrics).unwrap_or_default()
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
