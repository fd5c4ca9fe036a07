//! virtio-blk (virtio 1.2, section 5.2) on a raw file or block device.
//!
//! ```text
//!  queue --pop--> Request --limiter--> engine (Sync: at once; Async: io_uring) --> status byte, used ring
//!    ^                       |            |  ^
//!    +------- unpop ---------+            v  | each second
//!      until the limiter wakes          host's disk full
//! ```
//!
//! Data goes straight between the file and guest memory. Raw only: a format that is guessed from what a guest wrote
//! would let it read the node's files.

mod engine;
mod metrics;
mod persist;
mod request;
mod space;
mod update;

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::sync::Arc;

use mandoline_api::monitor::{self as api, IoEngine};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use vmm_sys_util::epoll::EventSet;

use crate::devices::blk::engine::{Engine, sync};
use crate::devices::blk::metrics::{Metrics, Shown};
use crate::devices::blk::request::{Disk, Outcome, Request};
use crate::devices::blk::space::Space;
use crate::devices::virtio::chain::{Buffers, Chain};
use crate::devices::virtio::interrupt::Interrupt;
use crate::devices::virtio::persist::{Progress, RestoreError, Saved};
use crate::devices::virtio::queue::WorkQueue;
use crate::devices::virtio::rate_limiter::RateLimiter;
use crate::devices::virtio::{Activation, COMMON_FEATURES, Device, DeviceError, DeviceType, Event, Source};

pub use crate::devices::blk::update::UpdateError;

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
/// Bytes after which other devices have their turn.
const ROUND_BYTES: u64 = 16 << 20;

/// How requests are executed where the configuration says nothing. Chosen by `tests::speed` (4 KiB at random places of a
/// file on ext4, two busy cores, Linux 6.18, two runs): while the host has the file in its cache, reads cost the same to a
/// fifth (5 to 8 us at depth 32) and writes are mostly dearer by `Async`, up to 2.5 times; and most of a sliver's disk is in
/// the cache. Where it is not, `Async` reads four times as much at depth 32 and leaves the other devices alone meanwhile:
/// ask for it by `io_engine` where cold reads matter.
pub const DEFAULT_ENGINE: IoEngine = IoEngine::Sync;

const LIMITER: u32 = 0;
const SPACE: u32 = 1;
const RING: u32 = 2;

/// A drive could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("drive {drive}: {what}: {source}")]
pub struct OpenError {
    drive: String,
    what: &'static str,
    source: std::io::Error,
}

/// What a write does that finds the host's disk full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnFull {
    /// It waits until there is space.
    #[default]
    Wait,
    /// It ends with an I/O error.
    Report,
}

/// How a drive behaves.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// The drive's name; its first 20 bytes are its serial number.
    pub id: String,
    /// The guest may only read.
    pub read_only: bool,
    /// Flush requests are offered and sync the file.
    pub flush: bool,
    /// How requests are executed.
    pub io_engine: IoEngine,
    /// How much the guest may read and write in a time.
    pub rate_limiter: api::RateLimiter,
    /// What a write does that finds the host's disk full.
    pub on_full: OnFull,
}

/// See the module.
pub struct Blk {
    engine: Engine,
    disk: Disk,
    limiter: RateLimiter,
    on_full: OnFull,
    space: Space,
    metrics: Metrics,
    features: u64,
    config: [u8; 60],
    queue: Option<WorkQueue>,
    interrupt: Option<Arc<Interrupt>>,
    chain: Chain,
    /// Requests that are out, by head: in flight, or waiting for space.
    requests: Vec<Option<Request>>,
    /// Lists of buffers for reuse, so that requests allocate nothing.
    spares: Vec<Buffers>,
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
        let sectors = sectors(&mut file).map_err(failed("finding its size"))?;
        let mut features = COMMON_FEATURES | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        if options.read_only {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            // Block devices take both too: `fallocate` discards and zeroes there.
            features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
            if options.flush {
                features |= 1 << VIRTIO_BLK_F_FLUSH;
            }
        }
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(options.id.bytes()) {
            *to = from;
        }
        Ok(Self {
            limiter: RateLimiter::new(&options.rate_limiter).map_err(failed("its rate limiter"))?,
            space: Space::new(&options.id).map_err(failed("its timer"))?,
            engine: Engine::new(file, options.io_engine, &options.id),
            disk: Disk {
                sectors,
                id,
                features,
                read_only: options.read_only,
            },
            on_full: options.on_full,
            metrics: Metrics::default(),
            features,
            config: config(sectors),
            queue: None,
            interrupt: None,
            chain: Chain::default(),
            requests: (0..QUEUE_SIZE).map(|_| None).collect(),
            spares: Vec::new(),
        })
    }

    /// Changes the size that the guest sees.
    fn set_sectors(&mut self, sectors: u64) {
        self.disk.sectors = sectors;
        self.config = config(sectors);
    }

    /// Lets `work` at the queue, if there is one. After an error it is gone, as after a reset.
    fn with_queue(
        &mut self,
        work: impl FnOnce(&mut Self, &mut WorkQueue) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let Some(mut queue) = self.queue.take() else {
            return Ok(());
        };
        work(self, &mut queue)?;
        queue.announce()?;
        self.queue = Some(queue);
        Ok(())
    }

    /// Takes what the driver made available.
    fn serve(&mut self, queue: &mut WorkQueue) -> Result<(), DeviceError> {
        // Who waits for the limiter needs no kicks: its timer comes.
        queue.no_kicks()?;
        if self.limiter.is_throttled() {
            return Ok(());
        }
        let mut left = ROUND_BYTES;
        for _ in 0..queue.round() {
            if !queue.pop(&mut self.chain)? {
                break;
            }
            let request = self.parse(queue)?;
            if !self.limiter.consume(request.bytes(), 1) {
                queue.unpop(&self.chain);
                self.spare(request.into_buffers());
                break;
            }
            left = left.saturating_sub(request.bytes());
            self.run(queue, request)?;
            if left == 0 {
                break;
            }
        }
        self.submit()?;
        self.reap(queue)?;
        if !self.limiter.is_throttled() && queue.want_kicks()? {
            queue.again();
        }
        Ok(())
    }

    fn parse(&mut self, queue: &WorkQueue) -> Result<Request, DeviceError> {
        let spares = &mut self.spares;
        let spare = || spares.pop().unwrap_or_default();
        Request::parse(&self.disk, &mut self.chain, spare).map_err(|error| queue.refuse(error))
    }

    /// Executes a request, or begins to.
    fn run(&mut self, queue: &mut WorkQueue, mut request: Request) -> Result<(), DeviceError> {
        while let Some(step) = request.step() {
            if let Some(ring) = self.engine.ring() {
                // The ring is as deep as the queue is long, and each head is out once.
                if !ring.push(step, request.head) {
                    return Err(ring_failed(std::io::ErrorKind::StorageFull.into()));
                }
                self.keep(request);
                return Ok(());
            }
            let result = sync::run(&self.engine.file, step);
            if request.advance(result, self.on_full) == Outcome::Full {
                self.hold(request);
                return Ok(());
            }
        }
        let head = request.head;
        let (written, buffers) = request.finish(&mut self.metrics);
        self.spare(buffers);
        queue.used(head, written)
    }

    fn spare(&mut self, mut buffers: Buffers) {
        if self.spares.len() < usize::from(QUEUE_SIZE) {
            buffers.clear();
            self.spares.push(buffers);
        }
    }

    fn keep(&mut self, request: Request) {
        // The queue lets no head out twice, and none beyond its size.
        if let Some(place) = self.requests.get_mut(usize::from(request.head)) {
            *place = Some(request);
        }
    }

    fn taken(&mut self, head: u16) -> Option<Request> {
        self.requests.get_mut(usize::from(head)).and_then(Option::take)
    }

    /// Puts a request aside until there is space.
    fn hold(&mut self, request: Request) {
        self.metrics.host_full_count += 1;
        self.space.wait(request.head);
        self.keep(request);
    }

    fn submit(&mut self) -> Result<(), DeviceError> {
        match self.engine.ring() {
            Some(ring) => ring.submit().map_err(ring_failed),
            None => Ok(()),
        }
    }

    /// Attends to the steps that the ring has completed; what has further steps goes in again.
    fn reap(&mut self, queue: &mut WorkQueue) -> Result<(), DeviceError> {
        loop {
            let mut on = false;
            while let Some((head, result)) = self.engine.ring().and_then(|ring| ring.completed()) {
                let Some(mut request) = self.taken(head) else {
                    continue;
                };
                match request.advance(result, self.on_full) {
                    Outcome::On => self.run(queue, request)?,
                    Outcome::Full => self.hold(request),
                }
                on = true;
            }
            if !on {
                return Ok(());
            }
            self.submit()?;
        }
    }

    /// Tries again what found no space.
    fn retry(&mut self, queue: &mut WorkQueue) -> Result<(), DeviceError> {
        for head in self.space.take() {
            if let Some(request) = self.taken(head) {
                self.run(queue, request)?;
            }
        }
        self.submit()?;
        self.reap(queue)
    }

    /// Ends what is in flight, with its results; what waits for space goes on waiting.
    fn drain(&mut self) -> Result<(), DeviceError> {
        self.with_queue(|blk, queue| {
            while let Some(ring) = blk.engine.ring()
                && ring.in_flight() > 0
            {
                ring.wait();
                blk.reap(queue)?;
            }
            Ok(())
        })
    }

    /// Reads the requests again that a saved VM waited for space with.
    fn hold_again(&mut self, queue: &mut WorkQueue) -> Result<(), DeviceError> {
        for head in queue.progress().held {
            queue.held(head, &mut self.chain)?;
            let request = self.parse(queue)?;
            self.space.restore(head);
            self.keep(request);
        }
        Ok(())
    }
}

fn ring_failed(source: std::io::Error) -> DeviceError {
    DeviceError::Host {
        what: "io_uring_enter",
        source,
    }
}

/// Whole sectors of a file or a block device.
fn sectors(file: &mut File) -> std::io::Result<u64> {
    // Works for both alike, which `stat` does not.
    Ok(file.seek(SeekFrom::End(0))? / SECTOR)
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
        self.disk.features = activation.features;
        self.interrupt = Some(activation.interrupt);
        self.queue = activation.queues.into_iter().next().flatten();
        self.with_queue(Self::hold_again)
    }

    fn reset(&mut self) {
        self.engine.quiesce();
        for request in &mut self.requests {
            *request = None;
        }
        self.space.clear();
        self.queue = None;
        self.interrupt = None;
        self.disk.features = self.features;
    }

    fn sources(&self) -> Vec<Source> {
        let mut sources = vec![self.limiter.source(LIMITER), self.space.source(SPACE)];
        sources.extend(self.engine.descriptor().map(|fd| Source {
            fd,
            events: EventSet::IN | EventSet::EDGE_TRIGGERED,
            token: RING,
        }));
        sources
    }

    fn handle(&mut self, event: Event) -> Result<(), DeviceError> {
        match event {
            Event::Kick(0) => self.with_queue(Self::serve),
            Event::Host(LIMITER, _) => {
                self.limiter.woken();
                self.with_queue(Self::serve)
            }
            Event::Host(SPACE, _) => self.with_queue(Self::retry),
            Event::Host(RING, _) => self.with_queue(Self::reap),
            _ => Ok(()),
        }
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        self.drain()
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
        let shown = Shown {
            counts: self.metrics,
            io_engine: match self.engine.kind() {
                IoEngine::Sync => "Sync",
                IoEngine::Async => "Async",
            },
            io_engine_fallback: self.engine.fallback.clone(),
            inflight: self.engine.in_flight(),
            waiting_for_space: self.space.waiting(),
            throttled: self.limiter.throttled(),
        };
        serde_json::to_value(shown).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
