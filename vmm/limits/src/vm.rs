//! All limits of one VM at once, for a monitor that is started by hand (`mandoline-vmm run`).
//!
//! ```text
//! let mut guard = vm::apply(&limits)?;     // cgroup, tap, class, redirect: all or none
//! let tap = guard.take_tap();              // the monitor's
//! ...start the monitor in guard.cgroup()...
//! guard.close()?;                          // or drop, which logs instead of returning errors
//! ```
//!
//! The process that holds the guard stays outside of the cgroup and outlives the monitor, which
//! is its child. Killed by force, it leaves a class and a cgroup behind; the next [`apply`] takes
//! such leftovers away.

use std::fs::{File, OpenOptions};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::cgroup::{Cgroup, CpuMax, CpuShare, KILL_TIMEOUT, MemoryLimits};
use crate::error::{Error, Result};
use crate::netlink::nft::{Family, Step, Table};
use crate::netlink::tc::Class;
use crate::netlink::{Connection, link};
use crate::rate::Rate;
use crate::shaper::{Bandwidth, SLOTS, Tree, TreeConfig};
use crate::tap::{self, TapOptions};

/// IFB device of the tree for monitors that are started by hand; the node manager has its own.
pub const DEVICE: &str = "mrun-ifb";
/// nftables table of the same.
pub const TABLE: &str = "mandoline-run";
/// Held while the tree is changed, so that two starts do not take the same slot.
const LOCK: &str = "/run/mandoline-run.lock";

/// Limits of one VM.
#[derive(Debug, Clone)]
pub struct VmLimits {
    /// Name of the VM; its cgroup is `mandoline-run/<name>`.
    pub name: String,
    /// Where cgroup v2 is mounted: `/sys/fs/cgroup` on a node.
    pub cgroup_root: PathBuf,
    /// Share of the processor.
    pub cpu_share: Option<CpuShare>,
    /// Cap on processor time.
    pub cpu_max: Option<CpuMax>,
    /// Memory of monitor and guest together, in bytes.
    pub memory: MemoryLimits,
    /// Processes and threads of the monitor.
    pub pids_max: Option<u32>,
    /// Its tap.
    pub tap: Option<TapLimits>,
}

/// A tap and what may be sent through it.
#[derive(Debug, Clone)]
pub struct TapLimits {
    /// Interface name.
    pub name: String,
    /// The host's address on it, with its prefix length.
    pub address: Option<(Ipv4Addr, u8)>,
    /// Largest packet, in bytes; the kernel's default is 1500.
    pub mtu: Option<u32>,
    /// What the VM may send; `None` = as much as it can.
    pub bandwidth: Option<Bandwidth>,
}

impl VmLimits {
    /// No limits yet, under the usual cgroup root.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            cgroup_root: PathBuf::from("/sys/fs/cgroup"),
            cpu_share: None,
            cpu_max: None,
            memory: MemoryLimits::default(),
            pids_max: None,
            tap: None,
        }
    }

    fn needs_cgroup(&self) -> bool {
        self.cpu_share.is_some()
            || self.cpu_max.is_some()
            || self.pids_max.is_some()
            || self.memory != MemoryLimits::default()
    }
}

/// Limits in force. They end with it.
#[derive(Debug)]
pub struct Guard {
    cgroup: Option<Cgroup>,
    tap: Option<OwnedFd>,
    tap_name: Option<String>,
    shaped: Option<Shaped>,
}

#[derive(Debug)]
struct Shaped {
    tree: Tree,
    slot: u16,
    chain: String,
}

/// Puts limits in force. When one of them cannot be had, none is left behind.
pub fn apply(limits: &VmLimits) -> Result<Guard> {
    // Filled step by step, so that an error on the way drops what was made until then.
    let mut guard = Guard {
        cgroup: None,
        tap: None,
        tap_name: None,
        shaped: None,
    };
    if limits.needs_cgroup() {
        let cgroup = Cgroup::create(
            &limits.cgroup_root,
            &Path::new("mandoline-run").join(&limits.name),
        )?;
        let cgroup = guard.cgroup.insert(cgroup);
        if let Some(share) = limits.cpu_share {
            cgroup.set_cpu_share(share)?;
        }
        if limits.cpu_max.is_some() {
            cgroup.set_cpu_max(limits.cpu_max)?;
        }
        cgroup.set_memory(&limits.memory)?;
        if let Some(pids) = limits.pids_max {
            cgroup.set_pids_max(pids)?;
        }
    }
    if let Some(wanted) = &limits.tap {
        let fd = tap::open(&TapOptions {
            name: wanted.name.clone(),
            ..Default::default()
        })?;
        guard.tap = Some(fd);
        guard.tap_name = Some(wanted.name.clone());
        let mut connection = Connection::route()?;
        let device = connection.require_link(&wanted.name)?;
        if let Some(bandwidth) = &wanted.bandwidth {
            guard.shaped = Some(shape(&mut connection, &wanted.name, bandwidth)?);
        }
        let change = link::LinkChange {
            up: Some(true),
            mtu: wanted.mtu,
            mac: None,
        };
        let mut requests = vec![link::change(device.index, &wanted.name, change)];
        requests.extend(
            wanted
                .address
                .map(|(address, prefix)| link::add_address(device.index, address.into(), prefix)),
        );
        connection.execute(&requests)?;
    }
    Ok(guard)
}

/// Takes a slot of the tree for a tap and sends what comes in by the tap through it.
fn shape(connection: &mut Connection, tap: &str, bandwidth: &Bandwidth) -> Result<Shaped> {
    let _lock = lock()?;
    // The tree itself bounds nothing: by hand, only the VM's own limit counts. A VM's weight is
    // its guarantee between 1 and 64 Mbit/s.
    let config = TreeConfig {
        unit: Rate::from_bits_per_second(1_000_000)?,
        ..TreeConfig::new(DEVICE, Rate::MAX)?
    };
    let tree = Tree::ensure(connection, config)?;
    let table = Table::new(Family::Netdev, TABLE);
    let mut filter = Connection::netfilter()?;
    filter.commit(&[table.create()])?;
    let taken = reap(connection, &mut filter, &tree, &table)?;
    let slot = (0..SLOTS)
        .find(|slot| !taken.contains(slot))
        .ok_or(Error::Exhausted {
            what: "slot of the HTB tree",
            capacity: SLOTS.into(),
        })?;
    connection.execute(&tree.set(slot, bandwidth)?)?;
    let shaped = Shaped {
        slot,
        chain: format!("{slot}-{tap}"),
        tree,
    };
    let steps = [
        Step::Count,
        Step::SetPriority(Tree::priority(slot)?),
        Step::Forward(shaped.tree.link),
    ];
    let changes = [
        table.add_ingress_chain(&shaped.chain, tap),
        table.add_rule(&shaped.chain, &steps),
    ];
    if let Err(error) = filter.commit(&changes) {
        connection.execute(&shaped.tree.remove(slot)?)?;
        return Err(error);
    }
    Ok(shaped)
}

/// Takes away the chains and classes of taps that are gone; returns the slots still in use.
fn reap(
    connection: &mut Connection,
    filter: &mut Connection,
    tree: &Tree,
    table: &Table,
) -> Result<Vec<u16>> {
    let mut used = Vec::new();
    for chain in filter.chains(table)? {
        let Some((slot, tap)) = chain
            .split_once('-')
            .and_then(|(s, tap)| Some((s.parse::<u16>().ok()?, tap)))
        else {
            continue;
        };
        if connection.link(tap)?.is_some() {
            used.push(slot);
        } else {
            filter.commit(&[table.delete_chain(&chain)])?;
        }
    }
    for slot in tree.slots(connection)?.into_keys() {
        if !used.contains(&slot) {
            connection.execute(&tree.remove(slot)?)?;
        }
    }
    Ok(used)
}

fn lock() -> Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(LOCK)
        .map_err(Error::file("open", LOCK))?;
    flock(&file, FlockOperation::LockExclusive).map_err(|e| Error::file("lock", LOCK)(e.into()))?;
    Ok(file)
}

impl Guard {
    /// The cgroup that the monitor is to be started in; `None` if no limit needed one.
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// The tap, once. The interface lives until the last copy of this descriptor is closed.
    pub fn take_tap(&mut self) -> Option<OwnedFd> {
        self.tap.take()
    }

    /// The HTB class of the tap as the kernel holds it now, with its counters.
    pub fn class(&self) -> Result<Option<Class>> {
        let Some(shaped) = &self.shaped else {
            return Ok(None);
        };
        let slot = shaped.tree.slots(&mut Connection::route()?)?.remove(&shaped.slot);
        Ok(slot.map(|slot| Class {
            stats: slot.stats(),
            ..slot.class
        }))
    }

    /// Changes what the VM may send, at once; a VM that had no limit gets one.
    pub fn set_bandwidth(&mut self, bandwidth: &Bandwidth) -> Result<()> {
        let mut connection = Connection::route()?;
        match (&self.shaped, &self.tap_name) {
            (Some(shaped), _) => connection.execute(&shaped.tree.set(shaped.slot, bandwidth)?),
            (None, Some(tap)) => {
                self.shaped = Some(shape(&mut connection, tap, bandwidth)?);
                Ok(())
            }
            (None, None) => Err(Error::NotFound {
                what: "a tap whose bandwidth could be limited".to_owned(),
            }),
        }
    }

    /// Ends the limits: kills what is left in the cgroup, and takes away everything that was made.
    pub fn close(mut self) -> Result<()> {
        self.undo()
    }

    fn undo(&mut self) -> Result<()> {
        // Each step is tried, whatever became of those before it; the first error is reported.
        let cgroup = self
            .cgroup
            .take()
            .map_or(Ok(()), |cgroup| cgroup.remove(KILL_TIMEOUT));
        let shaped = self.shaped.take().map_or(Ok(()), unshape);
        drop(self.tap.take());
        cgroup.and(shaped)
    }
}

fn unshape(shaped: Shaped) -> Result<()> {
    let _lock = lock()?;
    let table = Table::new(Family::Netdev, TABLE);
    let mut filter = Connection::netfilter()?;
    // Where the tap went first, its chain went with it.
    if filter.chains(&table)?.contains(&shaped.chain) {
        filter.commit(&[table.delete_chain(&shaped.chain)])?;
    }
    Connection::route()?.execute(&shaped.tree.remove(shaped.slot)?)
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            tracing::warn!(%error, "a limit was left behind");
        }
    }
}
