//! The cgroups of a node's slivers, for every backend: where they are, what they may use, who weighs what.
//!
//! ```text
//!  /sys/fs/cgroup
//!  ├── the node's own                  100, the kernel's default
//!  └── mandoline                       so heavy that the levels together keep 1000 − host of 1000
//!      ├── nodemgr                     100
//!      └── slivers
//!          ├── <vm_id>                 a guaranteed sliver      ┐ see `weights`
//!          └── best-effort             all others' parent       ┘
//!              └── <vm_id>             10 · cpu_share
//! ```
//!
//! Two levels, since a flat tree would weigh slivers that sleep: beside a guaranteed sliver, the one best-effort
//! sliver of hundreds that wants the processor would have a hundredth of what is left, and not all of it.
//!
//! A sliver that gains or loses its guarantee while it runs moves to the other place. Its memory stays charged where
//! it was touched (the kernel never moves charges), so the old cgroup is kept until it is empty, and what it holds is
//! subtracted from the bound of the new one: together they never pass `mem_limit`.

mod weights;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mandoline_api::nodemgr::VmId;
use mandoline_limits::cgroup::{Cgroup, CpuMax, CpuShare, MemoryLimits};
use mandoline_rspec::{CPU_SHARES, Rspec};

pub use self::weights::{Claim, Weights, weight_above, weights};
use crate::vm_type::Failure;

/// The parent of all slivers without a guarantee.
const BEST_EFFORT: &str = "best-effort";

/// A cgroup without processes that holds less than this is given up: it is the kernel's small change.
const SMALL_CHANGE: u64 = 1 << 20;

/// What a sliver may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Of the processor.
    pub claim: Claim,
    /// Never more of the processor than this.
    pub cpu_max: Option<CpuMax>,
    /// Never more memory than this, in bytes: the VM with its monitor.
    pub memory_max: u64,
    /// Memory that the node's pressure never takes, in bytes.
    pub memory_min: u64,
    /// Processes and threads.
    pub pids_max: u32,
}

impl Limits {
    /// The limits that an rspec stands for. `overhead` is what a monitor may use beside the guest's memory, in bytes.
    pub fn of(rspec: &Rspec, overhead: u64, pids_max: u32) -> Result<Self, Failure> {
        let fatal = |e: mandoline_limits::Error| Failure::fatal(e.to_string());
        let number = |name| rspec.number(name).unwrap_or(0);
        let claim = Claim {
            share: number("cpu_share").clamp(1, CPU_SHARES) as u32,
            guarantee: number("cpu_guarantee").min(CPU_SHARES) as u32,
        };
        let cpu_max = match rspec.flag("cpu_capped") {
            true => {
                // Of 1000 for the whole node; the kernel counts one processor as 1000.
                let thousandths = u64::from(claim.guarantee) * processors();
                Some(CpuMax::of_one_cpu(u32::try_from(thousandths).unwrap_or(u32::MAX)).map_err(fatal)?)
            }
            false => None,
        };
        let memory = number("mem_limit");
        Ok(Self {
            claim,
            cpu_max,
            memory_max: memory.saturating_add(overhead),
            memory_min: number("mem_reserve").min(memory),
            pids_max,
        })
    }
}

/// Processors of this node.
pub fn processors() -> u64 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u64)
}

/// What a cgroup's processes have used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Used {
    /// CPU time in microseconds.
    pub cpu_us: u64,
    /// Memory in bytes.
    pub memory: u64,
}

#[derive(Default)]
struct Inner {
    claims: BTreeMap<VmId, Claim>,
    /// Bounds of memory as they were asked for: what is written differs while a sliver has two cgroups.
    memory: BTreeMap<VmId, (u64, u64)>,
    /// Weights as they were written last.
    written: BTreeMap<PathBuf, u32>,
}

/// The slivers' part of a cgroup v2 tree.
pub struct Tree {
    root: PathBuf,
    name: PathBuf,
    host: u64,
    inner: Mutex<Inner>,
}

impl Tree {
    /// The tree below `name` of the hierarchy that is mounted at `root`, with `host` of 1000 CPU shares kept for the
    /// node's own. Nothing is made yet.
    pub fn new(root: &Path, name: &Path, host: u64) -> Self {
        Self {
            root: root.to_owned(),
            name: name.to_owned(),
            host,
            inner: Mutex::default(),
        }
    }

    /// Whether slivers can have cgroups here; if not, why.
    pub fn check(&self) -> Result<(), String> {
        match Cgroup::available(&self.root) {
            true => Ok(()),
            false => Err(format!(
                "no cgroup v2 with the controllers {} is mounted on {}",
                mandoline_limits::cgroup::CONTROLLERS.join(", "),
                self.root.display()
            )),
        }
    }

    /// Takes over what an earlier node manager has left running, before any sliver is started or stopped: so no
    /// guarantee is broken while slivers are adopted one after the other.
    pub fn take_over<'a>(&self, recorded: impl Iterator<Item = (VmId, &'a Rspec)>) {
        let mut inner = self.lock();
        for (vm_id, rspec) in recorded {
            if self.places(vm_id).iter().any(|place| place.exists())
                && let Ok(limits) = Limits::of(rspec, 0, 1)
            {
                inner.claims.insert(vm_id, limits.claim);
            }
        }
    }

    /// Makes a sliver's cgroup under its limits, and weighs all others anew.
    pub fn create(&self, vm_id: VmId, limits: &Limits) -> Result<Cgroup, Failure> {
        let mut inner = self.lock();
        let name = self.name.join(relative(vm_id, &limits.claim));
        let cgroup = Cgroup::create(&self.root, &name).map_err(failed)?;
        inner.claims.insert(vm_id, limits.claim);
        self.weigh_above(&mut inner)?;
        self.apply(&mut inner, vm_id, &cgroup, limits)?;
        self.weigh(&mut inner)?;
        Ok(cgroup)
    }

    /// Changes the limits of a sliver that runs.
    pub fn change(&self, vm_id: VmId, limits: &Limits) -> Result<(), Failure> {
        let mut inner = self.lock();
        let Some(mut home) = self.home(vm_id) else {
            return Err(Failure::retryable(format!("sliver {vm_id} has no cgroup")));
        };
        let wanted = self.root.join(&self.name).join(relative(vm_id, &limits.claim));
        if home != wanted {
            self.migrate(&home, vm_id, &limits.claim)?;
            home = wanted;
        }
        let cgroup = Cgroup::open(&home).map_err(failed)?;
        inner.claims.insert(vm_id, limits.claim);
        self.apply(&mut inner, vm_id, &cgroup, limits)?;
        self.weigh(&mut inner)
    }

    /// Kills what runs of a sliver, removes its cgroups, and weighs all others anew. Nothing of it need be there.
    pub fn remove(&self, vm_id: VmId, timeout: Duration) -> Result<(), Failure> {
        for path in self.places(vm_id) {
            if !path.exists() {
                continue;
            }
            let removed = Cgroup::open(&path).and_then(|cgroup| cgroup.remove(timeout));
            if let Err(error) = removed
                && path.exists()
            {
                return Err(Failure::retryable(format!("sliver {vm_id} is not gone: {error}")));
            }
        }
        let mut inner = self.lock();
        inner.memory.remove(&vm_id);
        match inner.claims.remove(&vm_id) {
            Some(_) => self.weigh(&mut inner),
            None => Ok(()),
        }
    }

    /// The cgroup in which a sliver's processes are, or will be.
    pub fn home(&self, vm_id: VmId) -> Option<PathBuf> {
        let places = self.places(vm_id);
        let there = || places.iter().filter(|place| place.exists());
        there()
            .find(|place| has_processes(place))
            .or(there().next())
            .cloned()
    }

    /// What a sliver has used; none if it has no cgroup.
    pub fn used(&self, vm_id: VmId) -> Result<Option<Used>, Failure> {
        let mut used = None;
        for path in self.places(vm_id) {
            if !path.exists() {
                continue;
            }
            let cgroup = Cgroup::open(&path).map_err(failed)?;
            let sum = used.get_or_insert_with(Used::default);
            sum.cpu_us += cgroup.cpu_stats().map_err(failed)?.usage_us;
            sum.memory += cgroup.memory_current().map_err(failed)?;
        }
        Ok(used)
    }

    /// The ids of all slivers that have a cgroup.
    pub fn present(&self) -> BTreeSet<VmId> {
        let base = self.root.join(&self.name);
        let mut found = BTreeSet::new();
        for directory in [base.join(BEST_EFFORT), base] {
            let Ok(entries) = fs::read_dir(directory) else {
                continue;
            };
            let names = entries
                .flatten()
                .filter_map(|entry| entry.file_name().into_string().ok());
            found.extend(names.filter_map(|name| name.parse::<VmId>().ok()));
        }
        found
    }

    /// Moves the bounds of slivers that have two cgroups as memory leaves the old one. To be called now and then.
    pub fn settle(&self) {
        let inner = self.lock();
        for (vm_id, (max, min)) in &inner.memory {
            if self.places(*vm_id).iter().all(|place| place.exists())
                && let Some(home) = self.home(*vm_id)
                && let Err(failure) = Cgroup::open(&home)
                    .map_err(failed)
                    .and_then(|cgroup| self.bound_memory(*vm_id, &cgroup, *max, *min))
            {
                tracing::warn!(vm_id, %failure, "memory's bound not moved");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a sliver's cgroup can be: with and without a guarantee.
    fn places(&self, vm_id: VmId) -> [PathBuf; 2] {
        let base = self.root.join(&self.name);
        [
            base.join(vm_id.to_string()),
            base.join(BEST_EFFORT).join(vm_id.to_string()),
        ]
    }

    fn apply(&self, inner: &mut Inner, vm_id: VmId, cgroup: &Cgroup, limits: &Limits) -> Result<(), Failure> {
        if limits.claim.guarantee == 0 {
            let share = CpuShare::new(limits.claim.share).map_err(failed)?;
            cgroup.set_cpu_share(share).map_err(failed)?;
        }
        cgroup.set_cpu_max(limits.cpu_max).map_err(failed)?;
        cgroup.set_pids_max(limits.pids_max).map_err(failed)?;
        inner.memory.insert(vm_id, (limits.memory_max, limits.memory_min));
        self.bound_memory(vm_id, cgroup, limits.memory_max, limits.memory_min)
    }

    /// Bounds the memory of a sliver's cgroup, less what its earlier one still holds.
    fn bound_memory(&self, vm_id: VmId, cgroup: &Cgroup, max: u64, min: u64) -> Result<(), Failure> {
        let mut held = 0;
        for path in self.places(vm_id) {
            if path == cgroup.path() || !path.exists() {
                continue;
            }
            let old = Cgroup::open(&path).map_err(failed)?;
            held = old.memory_current().map_err(failed)?;
            let kept = MemoryLimits {
                min: Some(held.min(min)),
                ..MemoryLimits::default()
            };
            old.set_memory(&kept).map_err(failed)?;
            if held < SMALL_CHANGE && old.remove(Duration::ZERO).is_ok() {
                held = 0;
            }
        }
        let memory = MemoryLimits {
            max: Some(max.saturating_sub(held).max(SMALL_CHANGE)),
            min: Some(min.saturating_sub(held)),
            // A monitor without some of its threads is of no use: all of it ends.
            oom_group: Some(true),
            ..MemoryLimits::default()
        };
        cgroup.set_memory(&memory).map_err(failed)
    }

    /// Moves a sliver's processes to its other place.
    fn migrate(&self, from: &Path, vm_id: VmId, claim: &Claim) -> Result<(), Failure> {
        let name = self.name.join(relative(vm_id, claim));
        let old = Cgroup::open(from).map_err(failed)?;
        let new = Cgroup::create(&self.root, &name).map_err(failed)?;
        for process in old.processes().map_err(failed)? {
            new.add_process(process).map_err(failed)?;
        }
        tracing::info!(vm_id, from = %from.display(), to = %new.path().display(), "moved to another cgroup");
        Ok(())
    }

    /// Weighs the groups above the slivers against the node's own.
    fn weigh_above(&self, inner: &mut Inner) -> Result<(), Failure> {
        let weight = weight_above(self.host, self.name.components().count());
        let mut path = self.root.clone();
        for component in self.name.components() {
            path.push(component);
            write_weight(inner, &path, weight)?;
        }
        Ok(())
    }

    /// Weighs guaranteed slivers and the parent of all others.
    fn weigh(&self, inner: &mut Inner) -> Result<(), Failure> {
        let weights = weights(self.host, &inner.claims);
        let base = self.root.join(&self.name);
        let parent = base.join(BEST_EFFORT);
        if parent.exists() {
            write_weight(inner, &parent, weights.best_effort)?;
        }
        for (vm_id, weight) in weights.guaranteed {
            let path = base.join(vm_id.to_string());
            if path.exists() {
                write_weight(inner, &path, weight)?;
            }
        }
        inner.written.retain(|path, _| path.exists());
        Ok(())
    }
}

/// Where a sliver's cgroup is, below the slivers' parent.
fn relative(vm_id: VmId, claim: &Claim) -> PathBuf {
    match claim.guarantee {
        0 => Path::new(BEST_EFFORT).join(vm_id.to_string()),
        _ => PathBuf::from(vm_id.to_string()),
    }
}

fn write_weight(inner: &mut Inner, path: &Path, weight: u32) -> Result<(), Failure> {
    if inner.written.get(path) == Some(&weight) {
        return Ok(());
    }
    Cgroup::open(path)
        .and_then(|cgroup| cgroup.set_cpu_weight(weight))
        .map_err(failed)?;
    inner.written.insert(path.to_owned(), weight);
    Ok(())
}

fn has_processes(cgroup: &Path) -> bool {
    fs::read_to_string(cgroup.join("cgroup.procs")).is_ok_and(|text| !text.trim().is_empty())
}

fn failed(error: mandoline_limits::Error) -> Failure {
    Failure::retryable(error.to_string())
}

#[cfg(test)]
mod tests;
