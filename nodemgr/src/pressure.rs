//! What the node manager does when the node runs short of memory or disk.
//!
//! *Memory* (architecture paper, section 5.1.3): when swap is 90 % full, the sliver that uses the most is reset and its
//! slice is told. A node without swap goes by its memory. What is reserved for a sliver (`mem_reserve`) does not count
//! against it.
//!
//! *Disk*: below a bound of free space slivers wait, so that none of them sees a write fail and the node manager can
//! still write. A sliver whose `disk_reserve` is not used up goes on while the others wait: its space is kept free.
//!
//! ```text
//!   free space ──────────────────────────────────────────────────► 0
//!     all run │ without a reserve: paused │ all paused
//!             ▲                           ▲
//!             disk_free + unused reserves disk_free      (back a quarter of disk_free above)
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mandoline_api::nodemgr::VmId;
use mandoline_rspec::{Rspec, format_bytes};
use serde::Deserialize;
use tokio::time::{Instant, MissedTickBehavior};

use crate::core::Core;
use crate::vm_type::Stats;

/// How often the node is looked at. A disk takes about a gigabyte in this time.
const LOOK: Duration = Duration::from_secs(1);
/// How long the node may take to feel a reset before the next one.
const SETTLE: Duration = Duration::from_secs(15);

/// When the node is short of something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PressureConfig {
    /// Swap in use, in percent, from which the largest user of memory is reset.
    pub swap_percent: u64,
    /// The same of memory, on a node without swap.
    pub memory_percent: u64,
    /// Free space of the state directory's disk below which slivers wait, in MiB.
    pub disk_free_mib: u64,
}

impl Default for PressureConfig {
    /// The paper's 90 %; a gigabyte is what a disk takes between two looks.
    fn default() -> Self {
        Self {
            swap_percent: 90,
            memory_percent: 90,
            disk_free_mib: 1024,
        }
    }
}

/// Memory of the node, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// In all.
    pub total: u64,
    /// That could be had without swapping.
    pub available: u64,
    /// Of swap.
    pub swap_total: u64,
    /// Of swap, not in use.
    pub swap_free: u64,
}

impl Memory {
    /// Reads `/proc/meminfo`.
    pub fn parse(meminfo: &str) -> Self {
        let value = |name: &str| {
            let line = meminfo
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
            kib.unwrap_or(0) << 10
        };
        Self {
            total: value("MemTotal"),
            available: value("MemAvailable"),
            swap_total: value("SwapTotal"),
            swap_free: value("SwapFree"),
        }
    }

    /// Whether somebody has to go: what is how full, for people.
    pub fn pressure(&self, bounds: &PressureConfig) -> Option<String> {
        let (what, total, free, most) = match self.swap_total {
            0 => ("memory", self.total, self.available, bounds.memory_percent),
            total => ("swap", total, self.swap_free, bounds.swap_percent),
        };
        let used = total.saturating_sub(free);
        let percent = used.saturating_mul(100).checked_div(total)?;
        (percent >= most).then(|| {
            format!(
                "{what} of the node is {percent} % in use ({} of {}; the bound is {most} %)",
                format_bytes(used),
                format_bytes(total)
            )
        })
    }
}

/// What a sliver uses beside what is its own by reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holding {
    /// Memory in use, bytes.
    pub memory: u64,
    /// `mem_reserve`, bytes.
    pub mem_reserve: u64,
    /// Blocks of its disk that are allocated, bytes.
    pub disk: u64,
    /// `disk_reserve`, bytes.
    pub disk_reserve: u64,
}

impl Holding {
    fn new(stats: &Stats, rspec: &Rspec) -> Self {
        let number = |name| rspec.number(name).unwrap_or(0);
        Self {
            memory: stats.memory,
            mem_reserve: number("mem_reserve"),
            disk: stats.disk,
            disk_reserve: number("disk_reserve"),
        }
    }

    fn unused_reserve(&self) -> u64 {
        self.disk_reserve.saturating_sub(self.disk)
    }
}

/// Who uses the most memory beyond its reservation; nobody, if none does.
pub fn largest(slivers: &BTreeMap<VmId, Holding>) -> Option<VmId> {
    let excess = slivers
        .iter()
        .map(|(vm_id, holding)| (holding.memory.saturating_sub(holding.mem_reserve), *vm_id));
    excess
        .filter(|(excess, _)| *excess > 0)
        .max()
        .map(|(_, vm_id)| vm_id)
}

/// Who has to wait with `free` bytes of disk left. Who waits already goes on only well above the bound.
pub fn waiting(
    free: u64,
    bound: u64,
    slivers: &BTreeMap<VmId, Holding>,
    already: &BTreeSet<VmId>,
) -> BTreeSet<VmId> {
    let promised = slivers
        .values()
        .fold(0u64, |sum, holding| sum.saturating_add(holding.unused_reserve()));
    let waits = |vm_id: &VmId, holding: &Holding| {
        let needed = match holding.unused_reserve() {
            0 => bound.saturating_add(promised),
            _ => bound,
        };
        let margin = if already.contains(vm_id) { bound / 4 } else { 0 };
        free < needed.saturating_add(margin)
    };
    slivers
        .iter()
        .filter(|(vm_id, holding)| waits(vm_id, holding))
        .map(|(vm_id, _)| *vm_id)
        .collect()
}

/// Watches the node for as long as the node manager runs.
pub async fn watch(core: Arc<Core>, bounds: PressureConfig, state_dir: std::path::PathBuf) {
    let mut interval = tokio::time::interval(LOOK);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut quiet_until = Instant::now();
    let mut held = BTreeSet::new();
    loop {
        interval.tick().await;
        let memory = Memory::parse(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
        if Instant::now() >= quiet_until && relieve_memory(&core, &memory, &bounds).await {
            quiet_until = Instant::now() + SETTLE;
        }
        if let Some(free) = free_disk(&state_dir) {
            held = hold(&core, free, &bounds, held).await;
        }
    }
}

fn free_disk(directory: &Path) -> Option<u64> {
    match rustix::fs::statvfs(directory) {
        Ok(stat) => Some(stat.f_bavail.saturating_mul(stat.f_frsize)),
        Err(error) => {
            tracing::warn!(%error, directory = %directory.display(), "free space not known");
            None
        }
    }
}

/// What each sliver holds.
async fn holdings(core: &Core) -> BTreeMap<VmId, (Rspec, Holding)> {
    let mut found = BTreeMap::new();
    for vm_id in core.recorded() {
        let Some(sliver) = core.sliver(vm_id) else {
            continue;
        };
        let Some(backend) = core.registry.get(&sliver.vm_type) else {
            continue;
        };
        match backend.stats(vm_id).await {
            Ok(stats) => {
                let rspec = core.spec(&sliver).rspec;
                let holding = Holding::new(&stats, &rspec);
                found.insert(vm_id, (rspec, holding));
            }
            Err(failure) => tracing::debug!(vm_id, %failure, "use of resources not known"),
        }
    }
    found
}

/// Resets the largest user of memory if the node is short of it. True: somebody was reset.
pub async fn relieve_memory(core: &Arc<Core>, memory: &Memory, bounds: &PressureConfig) -> bool {
    let Some(pressure) = memory.pressure(bounds) else {
        return false;
    };
    let found = holdings(core).await;
    let slivers = found
        .iter()
        .map(|(vm_id, (_, holding))| (*vm_id, *holding))
        .collect();
    let Some(vm_id) = largest(&slivers) else {
        tracing::warn!(pressure, "no sliver uses memory beyond its reservation");
        return false;
    };
    let Some((rspec, holding)) = found.get(&vm_id) else {
        return false;
    };
    let reason = format!(
        "reset, since {pressure} and it used more than any other: {} (mem_limit {}, mem_reserve {}). A larger \
         mem_reserve, or less use, keeps it from this",
        format_bytes(holding.memory),
        format_bytes(rspec.number("mem_limit").unwrap_or(0)),
        format_bytes(holding.mem_reserve)
    );
    // The summary that the paper wants mailed: of everybody, for the owner's log.
    for (vm_id, holding) in &slivers {
        tracing::info!(
            vm_id,
            memory = holding.memory,
            reserve = holding.mem_reserve,
            "memory in use"
        );
    }
    tracing::warn!(vm_id, reason, "node is short of memory");
    core.order(vm_id, |orders| orders.reset = Some(reason));
    true
}

/// Lets slivers wait, or go on, by what is free of the disk. Gives who waits now.
pub async fn hold(
    core: &Arc<Core>,
    free: u64,
    bounds: &PressureConfig,
    already: BTreeSet<VmId>,
) -> BTreeSet<VmId> {
    let bound = bounds.disk_free_mib << 20;
    let reserves = core.bound_in_all("disk_reserve");
    // Nobody can have to wait: no sliver need be looked at.
    let plenty = free >= bound.saturating_add(reserves).saturating_add(bound / 4);
    let now = match plenty {
        true => BTreeSet::new(),
        false => {
            let found = holdings(core).await;
            let slivers = found
                .iter()
                .map(|(vm_id, (_, holding))| (*vm_id, *holding))
                .collect();
            waiting(free, bound, &slivers, &already)
        }
    };
    for vm_id in now.difference(&already) {
        let reason = format!(
            "waits: {} of the node's disk are free, and {} are kept",
            format_bytes(free),
            format_bytes(bound)
        );
        tracing::warn!(vm_id, reason, "node is short of disk");
        core.order(*vm_id, |orders| orders.hold = Some(reason));
    }
    for vm_id in already.difference(&now) {
        tracing::info!(vm_id, free, "goes on");
        core.order(*vm_id, |orders| orders.hold = None);
    }
    now
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn swap_decides_where_there_is_swap() {
        let text = "MemTotal:       1000 kB\nMemFree: 1 kB\nMemAvailable:     50 kB\nSwapTotal:       0 kB\nSwapFree: 0 kB\n";
        let bounds = PressureConfig::default();
        let without = Memory::parse(text);
        let reason = without.pressure(&bounds).unwrap();
        assert!(
            reason.starts_with("memory") && reason.contains("95 %"),
            "{reason}"
        );
        let memory = |swap_free| Memory {
            swap_total: 100 * GIB,
            swap_free,
            ..without
        };
        assert_eq!(memory(11 * GIB).pressure(&bounds), None);
        assert!(memory(10 * GIB).pressure(&bounds).unwrap().starts_with("swap"));
        // A file that says nothing is no reason to reset anybody.
        assert_eq!(Memory::parse("").pressure(&bounds), None);
    }

    fn holding(memory: u64, mem_reserve: u64) -> Holding {
        Holding {
            memory,
            mem_reserve,
            disk: 0,
            disk_reserve: 0,
        }
    }

    #[test]
    fn what_is_reserved_does_not_count() {
        let slivers = BTreeMap::from([
            (1, holding(900, 800)),
            (2, holding(300, 0)),
            (3, holding(200, 200)),
        ]);
        assert_eq!(largest(&slivers), Some(2));
        assert_eq!(largest(&BTreeMap::from([(3, holding(200, 200))])), None);
    }

    proptest! {
        #[test]
        fn reserves_are_kept_free(
            free in 0u64..1000,
            bound in 1u64..200,
            slivers in proptest::collection::vec((0u64..300, prop_oneof![Just(0u64), 0u64..300]), 1..12),
        ) {
            let slivers: BTreeMap<VmId, Holding> = (1..)
                .zip(slivers.iter().map(|(disk, disk_reserve)| Holding { memory: 0, mem_reserve: 0, disk: *disk, disk_reserve: *disk_reserve }))
                .collect();
            let now = waiting(free, bound, &slivers, &BTreeSet::new());
            let unused: u64 = slivers.values().map(Holding::unused_reserve).sum();
            for (vm_id, holding) in &slivers {
                let runs = !now.contains(vm_id);
                if runs && holding.unused_reserve() == 0 {
                    // Whoever writes beyond its reserve finds room for everybody else's.
                    prop_assert!(free >= bound + unused);
                }
                if holding.unused_reserve() > 0 && free >= bound {
                    prop_assert!(runs);
                }
                if free < bound {
                    prop_assert!(!runs);
                }
            }
            // No flutter: who was let go on at this much is not stopped at the same, and the other way round.
            let again = waiting(free, bound, &slivers, &now);
            prop_assert!(again.is_superset(&now));
            prop_assert_eq!(&waiting(free, bound, &slivers, &again), &again);
        }
    }
}
