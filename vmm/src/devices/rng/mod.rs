//! virtio-rng (virtio 1.2, section 5.4): the host kernel's random bytes.

use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::persist::{Progress, RestoreError, Saved};
use crate::devices::virtio::queue::WorkQueue;
use crate::devices::virtio::{Activation, COMMON_FEATURES, Device, DeviceError, DeviceType, Event};

const QUEUE_SIZE: u16 = 16;
/// Most bytes for one request: overlapping buffers would let a guest ask for gigabytes that it does not have.
const MAX_BYTES: usize = 4096;
/// Of the saved state.
const VERSION: u16 = 1;

/// See the module.
#[derive(Default)]
pub struct Rng {
    queue: Option<WorkQueue>,
    chain: Chain,
    bytes: u64,
}

impl Rng {
    fn work(&mut self) -> Result<(), DeviceError> {
        let Some(queue) = &mut self.queue else {
            return Ok(());
        };
        queue.serve(&mut self.chain, |chain| {
            chain.only_writable()?;
            let mut bytes = [0u8; MAX_BYTES];
            let wanted = chain.writable.bytes().min(MAX_BYTES as u64) as usize;
            // The kernel's generator is ready long before a node runs slivers; should it fail, the guest gets
            // no bytes and says so itself.
            let got = rustix::rand::getrandom(&mut bytes[..wanted], rustix::rand::GetRandomFlags::empty());
            let given = chain.writable.put_front(&bytes[..got.unwrap_or(0)]);
            self.bytes += given as u64;
            Ok(given as u32)
        })
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

    fn handle(&mut self, event: Event) -> Result<(), DeviceError> {
        match event {
            Event::Kick(0) => self.work(),
            _ => Ok(()),
        }
    }

    fn progress(&self) -> Vec<Option<Progress>> {
        self.queue.iter().map(|queue| Some(queue.progress())).collect()
    }

    /// Nothing: random bytes have no past.
    fn save(&self) -> Saved {
        Saved::new(VERSION, &())
    }

    fn restore(&mut self, saved: &Saved) -> Result<(), RestoreError> {
        saved.read::<()>("rng", VERSION)
    }

    fn metrics(&self) -> serde_json::Value {
        serde_json::json!({ "bytes": self.bytes })
    }
}
