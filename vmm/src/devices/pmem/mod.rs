//! virtio-pmem (virtio 1.2, section 5.19): a file that the guest has as memory.
//!
//! The memory itself is KVM's business (see [`mapping`]); the device says where it is and syncs the file when the guest
//! asks. A guest that mounts it with DAX keeps no copy of its own: what it maps and reads are the host's pages.
//!
//! A read-only device is a read-only slot of KVM's over a mapping that cannot be written: a store of the guest's leaves it
//! as an access to a device that is not there, and is ignored (see `Bus`). There is nothing to sync then.
//!
//! Flushes that wait together share one sync, which began after all of them. One sync an event, and as many as the rate
//! limiter lets through: the other devices have their turn between them.

pub mod file_system;
pub mod mapping;
mod metrics;
mod persist;

use std::fs::File;
use std::io;
use std::ops::Range;

use mandoline_api::monitor as api;
use vmm_sys_util::epoll::EventSet;

use crate::devices::pmem::metrics::Metrics;
use crate::devices::virtio::chain::{Buffers, Chain, ChainError};
use crate::devices::virtio::persist::{Progress, RestoreError, Saved};
use crate::devices::virtio::queue::WorkQueue;
use crate::devices::virtio::rate_limiter::RateLimiter;
use crate::devices::virtio::{Activation, COMMON_FEATURES, Device, DeviceError, DeviceType, Event, Source};

const QUEUE_SIZE: u16 = 64;
/// `VIRTIO_PMEM_REQ_TYPE_FLUSH` (5.19.6).
const FLUSH: u32 = 0;
/// `VIRTIO_PMEM_RESP_TYPE_OK`.
const OK: u32 = 0;
/// `VIRTIO_PMEM_RESP_TYPE_EIO`.
const EIO: u32 = 1;
/// Bytes of a request (type) and of a response (result): one le32 each.
const FIELD_BYTES: u64 = 4;
const LIMITER: u32 = 0;

/// See the module.
pub struct Pmem {
    file: File,
    /// Where the guest has it.
    window: Range<u64>,
    read_only: bool,
    config: [u8; 16],
    limiter: RateLimiter,
    queue: Option<WorkQueue>,
    chain: Chain,
    /// Flushes that share the next sync: chain, room for the result.
    flushes: Vec<(u16, Buffers)>,
    metrics: Metrics,
}

impl Pmem {
    /// The device of `file`, which the guest has at `window`. Fails when the host has no timer for the limiter.
    pub fn new(
        file: File,
        window: Range<u64>,
        read_only: bool,
        limit: Option<&api::RateLimiter>,
    ) -> io::Result<Self> {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&window.start.to_le_bytes());
        config[8..].copy_from_slice(&(window.end - window.start).to_le_bytes());
        Ok(Self {
            file,
            window,
            read_only,
            config,
            limiter: RateLimiter::of(limit)?,
            queue: None,
            chain: Chain::default(),
            flushes: Vec::new(),
            metrics: Metrics::default(),
        })
    }

    /// Replaces the limits that `config` names.
    pub fn set_rate_limiter(&mut self, config: &api::RateLimiter) {
        self.limiter.update(config);
    }

    fn work(&mut self) -> Result<(), DeviceError> {
        let Some(queue) = &mut self.queue else {
            return Ok(());
        };
        // Who waits for the limiter needs no kicks: its timer comes.
        queue.no_kicks()?;
        if self.limiter.is_throttled() {
            return Ok(());
        }
        let chain = &mut self.chain;
        for _ in 0..queue.round() {
            if !queue.pop(chain)? {
                break;
            }
            let kind = request(chain).map_err(|error| queue.refuse(error))?;
            if kind != FLUSH {
                self.metrics.execute_fails += 1;
                let written = chain.writable.put_front(&EIO.to_le_bytes());
                queue.used(chain.head, written as u32)?;
                continue;
            }
            // The first of a batch pays for the sync, which may write all of the file.
            let bytes = self.window.end - self.window.start;
            if !self.read_only && self.flushes.is_empty() && !self.limiter.consume(bytes, 1) {
                queue.unpop(chain);
                break;
            }
            self.flushes
                .push((chain.head, std::mem::take(&mut chain.writable)));
        }
        let mut result = OK;
        if !self.flushes.is_empty() && !self.read_only {
            self.metrics.sync_count += 1;
            // What the guest stored through the mapping is dirty in the page cache, as if it were written.
            if self.file.sync_data().is_err() {
                result = EIO;
                self.metrics.execute_fails += self.flushes.len() as u64;
            }
        }
        for (head, mut room) in self.flushes.drain(..) {
            self.metrics.flush_count += 1;
            let written = room.put_front(&result.to_le_bytes());
            queue.used(head, written as u32)?;
        }
        queue.announce()?;
        if !self.limiter.is_throttled() && queue.want_kicks()? {
            queue.again();
        }
        Ok(())
    }
}

/// The type of a request; there must be room for its result.
fn request(chain: &mut Chain) -> Result<u32, ChainError> {
    let (readable, writable) = (chain.readable.bytes(), chain.writable.bytes());
    if writable < FIELD_BYTES {
        return Err(chain.wrong_length("result", writable, FIELD_BYTES, u64::MAX));
    }
    let mut kind = [0; FIELD_BYTES as usize];
    if !chain.readable.take_front(&mut kind) {
        return Err(chain.wrong_length("request", readable, FIELD_BYTES, u64::MAX));
    }
    Ok(u32::from_le_bytes(kind))
}

impl Device for Pmem {
    fn kind(&self) -> DeviceType {
        DeviceType::Pmem
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.queue = activation.queues.into_iter().next().flatten();
        Ok(())
    }

    fn reset(&mut self) {
        self.queue = None;
        self.flushes.clear();
    }

    fn sources(&self) -> Vec<Source> {
        vec![self.limiter.source(LIMITER)]
    }

    fn handle(&mut self, event: Event) -> Result<(), DeviceError> {
        match event {
            Event::Kick(0) => self.work(),
            Event::Host(LIMITER, events) if events.contains(EventSet::IN) => {
                self.limiter.woken();
                self.work()
            }
            _ => Ok(()),
        }
    }

    fn progress(&self) -> Vec<Option<Progress>> {
        self.queue.iter().map(|queue| Some(queue.progress())).collect()
    }

    fn save(&self) -> Saved {
        persist::save(self)
    }

    fn restore(&mut self, saved: &Saved) -> Result<(), RestoreError> {
        persist::restore(self, saved)
    }

    fn metrics(&self) -> serde_json::Value {
        let mut metrics = serde_json::to_value(self.metrics).unwrap_or_default();
        metrics["throttled"] = self.limiter.throttled().into();
        metrics
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
