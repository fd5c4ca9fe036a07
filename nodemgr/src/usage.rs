//! What the node and its slivers use: backends' statistics, the network's counters and `/proc`, put together for
//! the interface, the sensors and the metrics.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use mandoline_api::nodemgr::{NodeUse, SliverUse, Usage};
use mandoline_limits::Rate;

use crate::caller::Caller;
use crate::config::Config;
use crate::core::{Core, unix_ns};
use crate::net::{self, Network, NodeCounters, SliverCounters, Spent};
use crate::ops::OpResult;
use crate::sensors::Published;
use crate::services::Dispatcher;

/// Looks at what is used.
pub struct Meter {
    /// The node manager.
    pub core: Arc<Core>,
    /// What services publish as sensors.
    pub published: Published,
    /// Who passes slivers' streams on; none where no sliver has any.
    pub services: Option<Arc<Dispatcher>>,
    network: Option<Network>,
    state_dir: PathBuf,
    /// Where the slivers' consoles and logs are.
    pub logs: PathBuf,
}

impl Meter {
    /// A meter. Without a network there is nothing to say of bandwidth.
    pub fn new(
        core: Arc<Core>,
        config: &Config,
        network: Option<Network>,
        services: Option<Arc<Dispatcher>>,
    ) -> Self {
        Self {
            core,
            published: Published::open(&config.state_dir.join("sensors")),
            services,
            network,
            state_dir: config.state_dir.clone(),
            logs: config.log_dir.join("slivers"),
        }
    }

    /// What the node and the slivers that the caller may see use.
    pub async fn usage(&self, caller: &Caller) -> OpResult<Usage> {
        let counters = self.counters().await;
        let spent = self.spent().await;
        let mut slivers = Vec::new();
        for info in self.core.list(caller)?.slivers {
            let event = &info.event;
            let number = |name: &str| info.rspec.number(name).unwrap_or(0);
            let mut usage = SliverUse {
                vm_id: event.vm_id,
                slice: event.slice.clone(),
                vm_type: event.vm_type.clone(),
                state: event.state,
                cpu_share: number("cpu_share"),
                cpu_guarantee: number("cpu_guarantee"),
                mem_limit: number("mem_limit"),
                disk_quota: number("disk_quota"),
                base_rate: number("base_rate"),
                burst_rate: number("burst_rate"),
                day_bytes: spent.get(&event.slice).map_or(0, |spent| spent.bytes),
                day_budget: Rate::from_bits_per_second(number("sustained_rate")).map_or(0, net::budget),
                ..SliverUse::default()
            };
            if let Some(sliver) = self.core.sliver(event.vm_id) {
                let backend = self.core.registry.get(&sliver.vm_type);
                if let Some(backend) = backend
                    && let Ok(stats) = backend.stats(sliver.vm_id).await
                {
                    (usage.cpu_us, usage.memory, usage.disk) = (stats.cpu_us, stats.memory, stats.disk);
                }
                if let Some(counted) = counters.get(&sliver.index) {
                    usage.sent_bytes = counted.sent.bytes;
                    usage.sent_packets = counted.sent.packets;
                    usage.dropped_packets = counted.sent.drops;
                    usage.received_bytes = counted.received.bytes;
                    usage.received_packets = counted.received.packets;
                    usage.spoofed_frames = counted.spoofed.packets;
                    usage.refused_flows = counted.refused_flows.packets;
                }
            }
            slivers.push(usage);
        }
        Ok(Usage {
            unix_ns: unix_ns(),
            node: self.node(),
            slivers,
        })
    }

    async fn counters(&self) -> BTreeMap<u16, SliverCounters> {
        let Some(network) = &self.network else {
            return BTreeMap::new();
        };
        network.counters().await.unwrap_or_else(|error| {
            tracing::warn!(%error, "no counters of the slivers' network");
            BTreeMap::new()
        })
    }

    async fn spent(&self) -> BTreeMap<String, Spent> {
        match &self.network {
            Some(network) => network.spent().await.unwrap_or_default(),
            None => BTreeMap::new(),
        }
    }

    /// What the packet filter has dropped.
    pub async fn node_counters(&self) -> NodeCounters {
        match &self.network {
            Some(network) => network.node_counters().await.unwrap_or_default(),
            None => NodeCounters::default(),
        }
    }

    /// What the node as a whole uses.
    pub fn node(&self) -> NodeUse {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{name}")).unwrap_or_default();
        let memory = memory(&read("meminfo"));
        let bytes = |name: &str| {
            memory
                .iter()
                .find(|(known, _)| known == name)
                .map_or(0, |(_, n)| *n)
        };
        let disk = rustix::fs::statvfs(&self.state_dir);
        let cpus = std::thread::available_parallelism().map_or(0, |n| n.get() as u64);
        NodeUse {
            cpus,
            load: load(&read("loadavg")),
            uptime_s: uptime(&read("uptime")),
            memory_total: bytes("MemTotal"),
            memory_available: bytes("MemAvailable"),
            disk_total: disk
                .as_ref()
                .map_or(0, |fs| fs.f_blocks.saturating_mul(fs.f_frsize)),
            disk_free: disk
                .as_ref()
                .map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize)),
        }
    }
}

/// `/proc/meminfo` in bytes, in its order. Values without a unit are counts and stay what they are.
pub(crate) fn memory(text: &str) -> Vec<(String, u64)> {
    text.lines()
        .filter_map(|line| {
            let (name, rest) = line.split_once(':')?;
            let mut words = rest.split_whitespace();
            let number: u64 = words.next()?.parse().ok()?;
            let unit = if words.next() == Some("kB") { 1024 } else { 1 };
            Some((name.trim().to_owned(), number.saturating_mul(unit)))
        })
        .collect()
}

fn load(text: &str) -> [f64; 3] {
    let mut numbers = text.split_whitespace().map(|word| word.parse().unwrap_or(0.0));
    std::array::from_fn(|_| numbers.next().unwrap_or(0.0))
}

fn uptime(text: &str) -> u64 {
    let whole = text.split(['.', ' ']).next().unwrap_or("");
    whole.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_is_read() {
        let memory = memory("MemTotal:       16 kB\nHugePages_Total:       3\nbroken\nX: y kB\n");
        assert_eq!(
            memory,
            [("MemTotal".to_owned(), 16384), ("HugePages_Total".to_owned(), 3)]
        );
        assert_eq!(load("0.50 1.25 2.00 3/400 12345\n"), [0.5, 1.25, 2.0]);
        assert_eq!(uptime("12345.67 99.0\n"), 12345);
        assert_eq!((load(""), uptime("")), ([0.0; 3], 0));
    }
}
