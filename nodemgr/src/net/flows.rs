//! The node's table of tracked flows, and how it is shared out.
//!
//! ```text
//!  entries (by memory, or `network.flows`)
//!  ├─ 3/8  what pools reserve: flow_limit
//!  ├─ 3/8  even shares of slivers without a flow_limit, one for each place of the node
//!  └─ 1/4  the node's own, and flows that have ended but are remembered
//! ```
//!
//! So the sum of all limits fits the table: who opens a hundred thousand flows fills its own part.
//! The kernel's count of a sliver's flows leaves out those that have ended; they hold an entry
//! until they time out. Hence their time is short here ([`ENDED_S`]), and a sliver opens at most a
//! tenth of its limit in a second: what has ended never adds more than a third to what lives.

use std::fs;

use mandoline_limits::sysctl;

use super::{NetError, NetworkConfig};
use crate::capacity::memory_total;

/// Memory of one tracked flow with its extensions (NAT, accounting, time stamp), in bytes.
const ENTRY: u64 = 512;
/// The part of the node's memory that flows may take: a sixteenth.
const OF_MEMORY: u64 = 16;
/// The fewest entries that a node is worth: Linux's own default on small machines.
const LEAST: u64 = 65_536;
/// The most that are chosen without being asked for.
const MOST: u64 = 4 << 20;
/// How long a flow is remembered after both sides have closed it, in seconds.
const ENDED_S: &str = "2";

/// How many flows the node tracks, and who may have how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowTable {
    /// Entries in all.
    pub entries: u32,
    /// What pools may reserve.
    pub reservable: u32,
    /// What a sliver that reserves nothing may have.
    pub share: u32,
}

impl FlowTable {
    /// The table of a node with so many entries and places for slivers.
    pub fn new(entries: u32, places: u16) -> Self {
        // 3/8 of a u32 fits a u32.
        let part = (u64::from(entries) * 3 / 8) as u32;
        Self {
            entries,
            reservable: part,
            share: part / u32::from(places.max(1)),
        }
    }

    /// The table that the configuration asks for, or that this node's memory allows.
    pub fn of_node(config: &NetworkConfig) -> Result<Self, NetError> {
        let places = config.plan()?.capacity();
        let entries = config.flows.unwrap_or_else(|| {
            let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
            by_memory(&meminfo)
        });
        Ok(Self::new(entries, places))
    }

    /// Brings the kernel to it. Where the table belongs to another namespace (in tests), it stays
    /// as it is.
    pub(super) fn install(&self) -> Result<(), NetError> {
        for (name, value) in [
            ("netfilter/nf_conntrack_max", self.entries),
            ("netfilter/nf_conntrack_buckets", self.entries / 4),
        ] {
            if let Err(error) = sysctl::set(name, &value.to_string()) {
                tracing::warn!(%error, "the table of flows keeps its size");
            }
        }
        for state in ["time_wait", "close"] {
            sysctl::set_if_there(&format!("netfilter/nf_conntrack_tcp_timeout_{state}"), ENDED_S)?;
        }
        // Segments outside of the window are what measuring tools and TCP stacks of a sliver's
        // own send on purpose (OSDI'04 section 4.3.3): they are tracked, not dropped as invalid.
        Ok(sysctl::set_if_there(
            "netfilter/nf_conntrack_tcp_be_liberal",
            "1",
        )?)
    }
}

fn by_memory(meminfo: &str) -> u32 {
    let memory = memory_total(meminfo).unwrap_or_default();
    // Clamped: fits.
    (memory / OF_MEMORY / ENTRY).clamp(LEAST, MOST) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_table_grows_with_the_nodes_memory() {
        assert_eq!(by_memory("MemTotal:        4194304 kB\nMemFree: 1 kB\n"), 524_288);
        assert_eq!(by_memory("MemTotal:        262144 kB\n"), 65_536);
        assert_eq!(by_memory("nothing"), 65_536);
        assert_eq!(by_memory("MemTotal:        999999999 kB\n"), 4 << 20);
        assert_eq!(FlowTable::new(524_288, 711).share, 276);
    }

    proptest! {
        #[test]
        fn all_limits_together_leave_a_quarter(entries in 0u32.., places: u16) {
            let table = FlowTable::new(entries, places);
            let limits = u64::from(table.reservable) + u64::from(table.share) * u64::from(places);
            prop_assert!(limits * 4 <= u64::from(entries) * 3);
        }
    }
}
