//! virtio-blk (virtio 1.2, section 5.2) on a raw file or block device.
//!
//! Requests are executed one after the other in the event loop by `preadv` and `pwritev` straight between the
//! file and guest memory. Raw only: a format that is guessed from what a guest wrote would let it read the
//! node's files.

mod metrics;
mod persist;
mod request;

use std::fs::File;
use std::io::{Seek, SeekFrom};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::devices::blk::metrics::Metrics;
use crate::devices::blk::request::Engine;
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::persist::{Progress, RestoreError, Saved};
use crate::devices::virtio::queue::WorkQueue;
use crate::devices::virtio::{Activation, COMMON_FEATURES, Device, DeviceError, DeviceType, Event};

/// The unit of everything in virtio-blk, whatever the disk's own.
pub const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 128;
/// Most data buffers in a request: the ring less header and status.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Most sectors in one discard or write-zeroes range: 1 GiB, since the host does each in one call.
const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Most ranges in one such request.
const MAX_RANGES: u32 = 16;
/// Most of a drive's name that a guest sees (`VIRTIO_BLK_ID_BYTES`).
const ID_BYTES: usize = 20;

/// A drive could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("drive {drive}: {what}: {source}")]
pub struct OpenError {
    drive: String,
    what: &'static str,
    source: std::io::Error,
}

/// How a drive behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The drive's name; its first 20 bytes are its serial number.
    pub id: String,
    /// The guest may only read.
    pub read_only: bool,
    /// Flush requests are offered and sync the file.
    pub flush: bool,
}

/// See the module.
pub struct Blk {
    engine: Engine,
    features: u64,
    config: [u8; 60],
    queue: Option<WorkQueue>,
    chain: Chain,
}

impl Blk {
    /// A drive on `file`.
    pub fn new(mut file: File, options: &Options) -> Result<Self, OpenError> {
        let failed = |what| {
            move |source| OpenError {
                drive: options.id.clone(),
                what,
                source,
            }
        };
        // Works for files and block devices alike, which `stat` does not.
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed("finding its size"))?;
        let is_file = file.metadata().map_err(failed("looking at it"))?.is_file();
        let sectors = bytes / SECTOR;
        let mut features = COMMON_FEATURES | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        if options.read_only {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            if options.flush {
                features |= 1 << VIRTIO_BLK_F_FLUSH;
            }
            if is_file {
                features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
            }
        }
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(options.id.bytes()) {
            *to = from;
        }
        Ok(Self {
            engine: Engine {
                file,
                sectors,
                id,
                features,
                read_only: options.read_only,
                metrics: Metrics::default(),
            },
            features,
            config: config(sectors),
            queue: None,
            chain: Chain::default(),
        })
    }

    /// Changes the size that the guest sees.
    fn set_sectors(&mut self, sectors: u64) {
        self.engine.sectors = sectors;
        self.config = config(sectors);
    }

    fn work(&mut self) -> Result<(), DeviceError> {
        let Some(queue) = &mut self.queue else {
            return Ok(());
        };
        queue.serve(&mut self.chain, |chain| self.engine.execute(chain))
    }
}

/// The configuration space (virtio 1.2, 5.2.4).
fn config(sectors: u64) -> [u8; 60] {
    let mut config = [0; 60];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    put(12, &SEGMENTS.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(36, &MAX_RANGE_SECTORS.to_le_bytes()); // discard: sectors in a range,
    put(40, &MAX_RANGES.to_le_bytes()); // ranges in a request,
    put(44, &8u32.to_le_bytes()); // alignment: holes are punched in pages
    put(48, &MAX_RANGE_SECTORS.to_le_bytes()); // write zeroes, likewise
    put(52, &MAX_RANGES.to_le_bytes());
    put(56, &[1]); // write zeroes may unmap
    config
}

impl Device for Blk {
    fn kind(&self) -> DeviceType {
        DeviceType::Block
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.engine.features = activation.features;
        self.queue = activation.queues.into_iter().next().flatten();
        Ok(())
    }

    fn reset(&mut self) {
        self.queue = None;
        self.engine.features = self.features;
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

    fn save(&self) -> Saved {
        persist::save(self)
    }

    fn restore(&mut self, saved: &Saved) -> Result<(), RestoreError> {
        persist::restore(self, saved)
    }

    fn metrics(&self) -> serde_json::Value {
        serde_json::to_value(self.engine.metrics).unwrap_or_default()
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
