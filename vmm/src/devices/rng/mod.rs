//! virtio-rng (virtio 1.2, section 5.4): the host kernel's random bytes.

use std::io;

use mandoline_api::monitor as api;

use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::persist::{Progress, RestoreError, Saved};
use crate::devices::virtio::queue::WorkQueue;
use crate::devices::virtio::rate_limiter::{RateLimiter, SavedRateLimiter};
use crate::devices::virtio::{Activation, COMMON_FEATURES, Device, DeviceError, DeviceType, Event, Source};

const QUEUE_SIZE: u16 = 16;
/// Most bytes for one request: overlapping buffers would let a guest ask for gigabytes that it does not have.
const MAX_BYTES: usize = 4096;
/// Of the saved state.
const VERSION: u16 = 1;

const LIMITER: u32 = 0;

/// See the module.
pub struct Rng {
    queue: Option<WorkQueue>,
    chain: Chain,
    limiter: RateLimiter,
    bytes: u64,
    host_fails: u64,
}

impl Rng {
    /// A device that gives no more than `limit` allows.
    pub fn new(limit: &api::RateLimiter) -> io::Result<Self> {
        Ok(Self {
            queue: None,
            chain: Chain::default(),
            limiter: RateLimiter::new(limit)?,
            bytes: 0,
            host_fails: 0,
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
        for _ in 0..queue.round() {
            if !queue.pop(&mut self.chain)? {
                break;
            }
            let chain = &mut self.chain;
            chain.only_writable().map_err(|error| queue.refuse(error))?;
            let mut bytes = [0u8; MAX_BYTES];
            let wanted = chain.writable.bytes().min(MAX_BYTES as u64);
            if !self.limiter.consume(wanted, 1) {
                queue.unpop(chain);
                break;
            }
            // The kernel's generator is ready long before a node runs slivers; should it fail, the guest gets
            // no bytes and says so itself.
            let room = &mut bytes[..wanted as usize];
            let got =
                rustix::rand::getrandom(room, rustix::rand::GetRandomFlags::empty()).unwrap_or_else(|_| {
                    self.host_fails += 1;
                    0
                });
            let given = chain.writable.put_front(&bytes[..got]);
            self.bytes += given as u64;
            queue.used(chain.head, given as u32)?;
        }
        queue.announce()?;
        if !self.limiter.is_throttled() && queue.want_kicks()? {
            queue.again();
        }
        Ok(())
    }
}

impl Device for Rng {
    fn kind(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.queue = activation.queues.into_iter().next().flatten();
        Ok(())
    }

    fn reset(&mut self) {
        self.queue = None;
    }

    fn sources(&self) -> Vec<Source> {
        vec![self.limiter.source(LIMITER)]
    }

    fn handle(&mut self, event: Event) -> Result<(), DeviceError> {
        match event {
            Event::Kick(0) => self.work(),
            Event::Host(LIMITER, _) => {
                self.limiter.woken();
                self.work()
            }
            _ => Ok(()),
        }
    }

    fn progress(&self) -> Vec<Option<Progress>> {
        self.queue.iter().map(|queue| Some(queue.progress())).collect()
    }

    /// The limiter only: random bytes have no past.
    fn save(&self) -> Saved {
        Saved::new(VERSION, &self.limiter.save())
    }

    fn restore(&mut self, saved: &Saved) -> Result<(), RestoreError> {
        let limiter: SavedRateLimiter = saved.read("rng", VERSION)?;
        self.limiter.restore(&limiter);
        Ok(())
    }

    fn metrics(&self) -> serde_json::Value {
        serde_json::json!({
            "bytes": self.bytes,
            "host_rng_fails": self.host_fails,
            "throttled": self.limiter.throttled(),
        })
    }
}

#[cfg(test)]
mod tests;
