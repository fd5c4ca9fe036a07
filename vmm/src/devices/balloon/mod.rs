//! virtio-balloon (virtio 1.2, section 5.5): memory that the guest gives back.
//!
//! ```text
//!  inflate:   guest names pages          -> the host takes them; the guest uses them no more
//!  deflate:   guest names pages          -> nothing to do: the next touch brings a fresh one
//!  reporting: guest lends its free pages -> the host takes them, the guest gets them back at once, empty
//!  stats:     guest --buffer--> held by the device --timer--> used, and the guest sends the next
//! ```
//!
//! Taking back is `MADV_DONTNEED`: what the guest finds in such a page later is whatever its mapping has beneath.
//! That is zeroes in anonymous memory, but the file's bytes where the monitor mapped a file copy-on-write: the kernel's
//! segments (Linux frees its `init` sections, so pages of the image do come here), or all of a restored guest's memory.
//! Both are the guest's own bytes, nobody else's; and it may not rely on any: the pages are its own again, and
//! uninitialised (5.5.6.2, 5.5.6.7). A guest that does rely on what freed pages hold (Linux with `init_on_free` or
//! `page_poison`) needs `VIRTIO_BALLOON_F_PAGE_POISON` before it reports any (5.5.3.1), and that is not offered.
//!
//! Drivers disagree on the numbers of queues: the specification numbers all five, Linux (6.12 over virtio-mmio) only
//! those whose features it took. What a queue is for follows from the features here, so that both are right.

mod metrics;
mod persist;
mod statistics;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use mandoline_api::monitor::{self as api, BalloonStats};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::EventSet;

use crate::devices::balloon::metrics::Metrics;
use crate::devices::virtio::chain::{Chain, ChainError};
use crate::devices::virtio::interrupt::Interrupt;
use crate::devices::virtio::persist::{Progress, RestoreError, Saved};
use crate::devices::virtio::queue::WorkQueue;
use crate::devices::virtio::{Activation, COMMON_FEATURES, Device, DeviceError, DeviceType, Event, Source};
use crate::log::RateLimit;
use crate::memory::{self, Memory};

/// `VIRTIO_BALLOON_F_STATS_VQ` (5.5.3).
const FEATURE_STATS: u64 = 1 << 1;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`.
const FEATURE_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`.
const FEATURE_REPORTING: u64 = 1 << 5;

/// inflateq, deflateq, statsq, free_page_vq, reporting_vq (5.5.2).
const QUEUES: usize = 5;
/// Linux reports up to 32 ranges at once and refuses a shorter queue (`PAGE_REPORTING_CAPACITY`).
const QUEUE_SIZE: u16 = 64;
/// A balloon's page, whatever the guest's (5.5.6).
const PAGE: u64 = 4096;
const PAGES_IN_MIB: u32 = 256;
/// Most pages in a request: 16 MiB. Linux sends 256, Windows 1024.
const MAX_PAGES: u64 = 4096;
/// Bytes taken back after which the other devices have their turn: a report may name all of memory.
const ROUND_BYTES: u64 = 256 << 20;
/// Bytes of the configuration space, and where `num_pages` and `actual` stand in it (5.5.4).
const CONFIG_BYTES: usize = 16;
const TARGET: std::ops::Range<usize> = 0..4;
const ACTUAL: std::ops::Range<usize> = 4..8;
const TIMER_TOKEN: u32 = 0;

/// A request that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UpdateError {
    /// More than the guest has.
    #[error("amount_mib is {amount_mib}; allowed: up to {most}, the guest's memory")]
    Amount {
        /// What was asked for.
        amount_mib: u32,
        /// The guest's memory in MiB.
        most: u64,
    },
    /// The balloon was made without statistics.
    #[error("this balloon has no statistics: its stats_polling_interval_s was 0 at the start")]
    NoStatistics,
    /// Statistics cannot be switched off.
    #[error("stats_polling_interval_s is 0; allowed: 1 to 65535 (statistics cannot be switched off)")]
    Interval,
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

/// What queue `index` is for, under `features`. Hints (queue 3) are not offered; so what stands behind the statistics is
/// for reports, however the driver counts.
fn role(index: usize, features: u64) -> Option<Role> {
    match index {
        0 => Some(Role::Inflate),
        1 => Some(Role::Deflate),
        2 if features & FEATURE_STATS != 0 => Some(Role::Stats),
        2..QUEUES if features & FEATURE_REPORTING != 0 => Some(Role::Reporting),
        _ => None,
    }
}

/// See the module.
pub struct Balloon {
    options: api::Balloon,
    memory_pages: u64,
    config: [u8; CONFIG_BYTES],
    timer: OwnedFd,
    active: Option<Active>,
    chain: Chain,
    host: Host,
    stats: BalloonStats,
}

struct Active {
    queues: Vec<Option<WorkQueue>>,
    features: u64,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    /// The statistics' buffer, until the next are due.
    held: Option<u16>,
}

impl Balloon {
    /// The balloon of a guest with `memory_bytes`. Fails when the host has no timer to give, or when the amount is more
    /// than the guest's memory.
    pub fn new(options: &api::Balloon, memory_bytes: u64) -> std::io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let mut balloon = Self {
            options: *options,
            memory_pages: memory_bytes / PAGE,
            config: [0; CONFIG_BYTES],
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            active: None,
            chain: Chain::default(),
            host: Host::default(),
            stats: BalloonStats::default(),
        };
        balloon
            .set_target(options.amount_mib)
            .map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidInput, error))?;
        balloon.set_interval(options.stats_polling_interval_s);
        Ok(balloon)
    }

    /// Asks the guest for `amount_mib` in all.
    pub fn set_target(&mut self, amount_mib: u32) -> Result<(), UpdateError> {
        let most = self.memory_pages / u64::from(PAGES_IN_MIB);
        if u64::from(amount_mib) > most {
            return Err(UpdateError::Amount { amount_mib, most });
        }
        // Memory is at most 1 TiB: its pages fit.
        self.set_target_pages(amount_mib.saturating_mul(PAGES_IN_MIB));
        if let Some(active) = &self.active {
            active.interrupt.config_changed();
        }
        Ok(())
    }

    /// Asks for statistics every `seconds` from now on.
    pub fn set_statistics_interval(&mut self, seconds: u16) -> Result<(), UpdateError> {
        match (self.options.stats_polling_interval_s, seconds) {
            (0, _) => Err(UpdateError::NoStatistics),
            (_, 0) => Err(UpdateError::Interval),
            _ => {
                self.set_interval(seconds);
                Ok(())
            }
        }
    }

    /// What the guest said last.
    pub fn statistics(&self) -> Result<BalloonStats, UpdateError> {
        if self.options.stats_polling_interval_s == 0 {
            return Err(UpdateError::NoStatistics);
        }
        let (target_pages, actual_pages) = (self.target_pages(), self.actual_pages());
        Ok(BalloonStats {
            target_pages,
            actual_pages,
            target_mib: target_pages / PAGES_IN_MIB,
            actual_mib: actual_pages / PAGES_IN_MIB,
            ..self.stats
        })
    }

    /// How it is configured now.
    pub fn options(&self) -> api::Balloon {
        api::Balloon {
            amount_mib: self.target_pages() / PAGES_IN_MIB,
            ..self.options
        }
    }

    fn config_u32(&self, at: std::ops::Range<usize>) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.config[at]);
        u32::from_le_bytes(bytes)
    }

    fn target_pages(&self) -> u32 {
        self.config_u32(TARGET)
    }

    fn actual_pages(&self) -> u32 {
        self.config_u32(ACTUAL)
    }

    fn set_target_pages(&mut self, pages: u32) {
        self.config[TARGET].copy_from_slice(&pages.to_le_bytes());
    }

    fn set_actual_pages(&mut self, pages: u32) {
        self.config[ACTUAL].copy_from_slice(&pages.to_le_bytes());
    }

    fn set_interval(&mut self, seconds: u16) {
        self.options.stats_polling_interval_s = seconds;
        let time = Timespec {
            tv_sec: i64::from(seconds),
            tv_nsec: 0,
        };
        let spec = Itimerspec {
            it_interval: time,
            it_value: time,
        };
        // Cannot fail: the descriptor is a timer, and the time is a valid one.
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec) {
            tracing::error!(%error, "the timer of the balloon's statistics cannot be set");
        }
    }

    /// Statistics are due: the guest gets its buffer back, which asks for them.
    fn ask_for_statistics(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let Some(head) = active.held.take() else {
            // The guest has not answered yet.
            return Ok(());
        };
        for (index, queue) in active.queues.iter_mut().enumerate() {
            if let (Some(Role::Stats), Some(queue)) = (role(index, active.features), queue) {
                queue.used(head, 0)?;
                queue.announce()?;
            }
        }
        self.take_statistics()
    }

    /// Takes a buffer of statistics, if none is held: one more is left where it is until that one is due.
    fn take_statistics(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        for (index, queue) in active.queues.iter_mut().enumerate() {
            let (Some(Role::Stats), Some(queue)) = (role(index, active.features), queue) else {
                continue;
            };
            if active.held.is_some() {
                continue;
            }
            if !queue.pop(&mut self.chain)? {
                if queue.want_kicks()? {
                    queue.again();
                }
                continue;
            }
            let chain = &mut self.chain;
            chain.only_readable().map_err(|error| queue.refuse(error))?;
            statistics::read(chain, &mut self.stats).map_err(|error| queue.refuse(error))?;
            active.held = Some(chain.head);
            self.host.metrics.stats_updates_count += 1;
        }
        Ok(())
    }

    fn work(&mut self, index: usize) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let role = role(index, active.features);
        let (Some(role), Some(Some(queue))) = (role, active.queues.get_mut(index)) else {
            return Ok(());
        };
        let (memory, host) = (&active.memory, &mut self.host);
        match role {
            Role::Inflate => serve(queue, &mut self.chain, |chain| host.inflate(memory, chain)),
            Role::Deflate => serve(queue, &mut self.chain, |chain| host.deflate(chain)),
            Role::Reporting => serve(queue, &mut self.chain, |chain| host.report(chain)),
            Role::Stats => self.take_statistics(),
        }
    }
}

/// Serves what is available until [`ROUND_BYTES`] are taken back, or a ring full. `work` returns the bytes that a chain
/// names.
fn serve(
    queue: &mut WorkQueue,
    chain: &mut Chain,
    mut work: impl FnMut(&mut Chain) -> Result<u64, ChainError>,
) -> Result<(), DeviceError> {
    queue.no_kicks()?;
    let mut bytes = 0;
    for _ in 0..queue.round() {
        if bytes >= ROUND_BYTES || !queue.pop(chain)? {
            break;
        }
        bytes += work(chain).map_err(|error| queue.refuse(error))?;
        queue.used(chain.head, 0)?;
    }
    queue.announce()?;
    if queue.want_kicks()? {
        queue.again();
    }
    Ok(())
}

/// What takes memory back.
struct Host {
    /// Pages of the request in hand, kept for the next.
    pages: Vec<u32>,
    metrics: Metrics,
    complaints: RateLimit,
}

impl Default for Host {
    fn default() -> Self {
        Self {
            pages: Vec::new(),
            metrics: Metrics::default(),
            complaints: RateLimit::new(10, Duration::from_secs(10)),
        }
    }
}

impl Host {
    fn inflate(&mut self, memory: &Memory, chain: &mut Chain) -> Result<u64, ChainError> {
        let count = pages(chain)?;
        self.pages.clear();
        let mut page = [0u8; 4];
        while chain.readable.take_front(&mut page) {
            self.pages.push(u32::from_le_bytes(page));
        }
        self.pages.sort_unstable();
        self.pages.dedup();
        let runs = || {
            self.pages
                .chunk_by(|page, next| page.checked_add(1) == Some(*next))
        };
        let place = |run: &[u32]| {
            let first = run.first().map_or(0, |page| u64::from(*page));
            (GuestAddress(first * PAGE), run.len() as u64 * PAGE)
        };
        // All of it is memory, or nothing is taken.
        for (address, bytes) in runs().map(place) {
            if !memory::contains(memory, address, bytes) {
                return Err(ChainError::OutsideMemory {
                    head: chain.head,
                    address: address.0,
                    // At most MAX_PAGES.
                    length: bytes as u32,
                });
            }
        }
        let mut failed = None;
        for (address, bytes) in runs().map(place) {
            if let Err(error) = memory::discard_range(memory, address, bytes) {
                failed = Some(error);
                self.metrics.discard_fails += 1;
            }
        }
        self.complain(failed);
        self.metrics.inflate_count += count;
        Ok(count * PAGE)
    }

    /// There is nothing to do: a page comes back when it is touched, and the guest need not have asked.
    fn deflate(&mut self, chain: &Chain) -> Result<u64, ChainError> {
        self.metrics.deflate_count += pages(chain)?;
        Ok(0)
    }

    fn report(&mut self, chain: &Chain) -> Result<u64, ChainError> {
        chain.only_writable()?;
        let mut failed = None;
        for range in chain.writable.slices() {
            match memory::discard(&range) {
                Ok(bytes) => self.metrics.free_page_report_freed += bytes,
                Err(error) => {
                    failed = Some(error);
                    self.metrics.discard_fails += 1;
                }
            }
        }
        self.complain(failed);
        self.metrics.free_page_report_count += 1;
        Ok(chain.writable.bytes())
    }

    /// The guest has lost nothing; the host has not got all that it could.
    fn complain(&self, error: Option<std::io::Error>) {
        if let Some(error) = error
            && let Some(suppressed) = self.complaints.pass()
        {
            tracing::warn!(%error, suppressed, "balloon: the host did not take memory back");
        }
    }
}

/// How many pages a request names.
fn pages(chain: &Chain) -> Result<u64, ChainError> {
    chain.only_readable()?;
    let bytes = chain.readable.bytes();
    if !bytes.is_multiple_of(4) || bytes / 4 > MAX_PAGES {
        return Err(chain.wrong_length("list of 32-bit page numbers", bytes, 4, MAX_PAGES * 4));
    }
    Ok(bytes / 4)
}

impl Device for Balloon {
    fn kind(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn features(&self) -> u64 {
        let mut features = COMMON_FEATURES;
        for (feature, offered) in [
            (FEATURE_STATS, self.options.stats_polling_interval_s != 0),
            (FEATURE_DEFLATE_ON_OOM, self.options.deflate_on_oom),
            (FEATURE_REPORTING, self.options.free_page_reporting),
        ] {
            if offered {
                features |= feature;
            }
        }
        features
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    /// `actual` is the driver's to write; it may do so byte by byte.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        for (index, byte) in data.iter().enumerate() {
            let at = offset.saturating_add(index);
            if ACTUAL.contains(&at) {
                self.config[at] = *byte;
            }
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let stats = |(index, _): &(usize, _)| role(*index, activation.features) == Some(Role::Stats);
        // A restored queue knows the buffer that the device held when it was saved.
        let queue = activation.queues.iter().enumerate().find(stats);
        let queue = queue.and_then(|(_, queue)| queue.as_ref());
        let held = queue.and_then(|queue| queue.progress().held.first().copied());
        // Linux offers its first buffer, and kicks, before it says that it is ready.
        if let Some(queue) = queue {
            queue.again();
        }
        self.active = Some(Active {
            queues: activation.queues,
            features: activation.features,
            memory: activation.memory,
            interrupt: activation.interrupt,
            held,
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.set_actual_pages(0);
        self.stats = BalloonStats::default();
    }

    /// Edge-triggered, since a pause leaves it unattended.
    fn sources(&self) -> Vec<Source> {
        vec![Source {
            fd: self.timer.as_raw_fd(),
            events: EventSet::IN | EventSet::EDGE_TRIGGERED,
            token: TIMER_TOKEN,
        }]
    }

    /// Statistics of a guest that stands still are not worth waking it.
    fn rouses(&self, _token: u32) -> bool {
        false
    }

    fn handle(&mut self, event: Event) -> Result<(), DeviceError> {
        match event {
            Event::Kick(queue) => self.work(queue),
            Event::Host(..) => {
                // Never blocks. Nothing to read: it did not fire (every source is attended to after a pause).
                match rustix::io::read(&self.timer, &mut [0u8; 8]) {
                    Ok(_) => self.ask_for_statistics(),
                    Err(_) => Ok(()),
                }
            }
        }
    }

    fn progress(&self) -> Vec<Option<Progress>> {
        let queues = self.active.iter().flat_map(|active| &active.queues);
        queues
            .map(|queue| queue.as_ref().map(WorkQueue::progress))
            .collect()
    }

    fn save(&self) -> Saved {
        persist::save(self)
    }

    fn restore(&mut self, saved: &Saved) -> Result<(), RestoreError> {
        persist::restore(self, saved)
    }

    fn metrics(&self) -> serde_json::Value {
        serde_json::to_value(self.host.metrics).unwrap_or_default()
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
