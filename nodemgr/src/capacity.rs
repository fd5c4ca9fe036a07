//! What the node has: found out at each start, or as the owner's configuration says.

use std::path::Path;

use mandoline_rspec::{CPU_SHARES, Rspec};
use serde_json::json;

use crate::config::{Config, ConfigError};
use crate::net::{FlowTable, NetError};

/// Works out the rspec of the whole node.
pub fn of_node(config: &Config, state_dir: &Path) -> Result<Rspec, ConfigError> {
    let memory = memory_total(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default());
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let rate = config.node_rate()?;
    let network = config.network()?;
    let refused = |error: NetError| ConfigError::Value {
        setting: "network".to_owned(),
        value: "the table".to_owned(),
        message: error.to_string(),
    };
    let plan = network.plan().map_err(refused)?;
    let flows = FlowTable::of_node(&network).map_err(refused)?;
    let mut found = json!({
        "cpu_guarantee": CPU_SHARES - config.host_cpu_shares,
        "vcpus": cpus.min(32),
        "base_rate": rate,
        "burst_rate": rate,
        "ports": plan.ownable().items(),
        "flow_limit": flows.reservable,
    });
    if let Some(memory) = memory {
        found["mem_limit"] = json!(memory);
        // A fifth is the node's own: kernel, daemons, page cache.
        found["mem_reserve"] = json!(memory / 5 * 4);
    }
    match rustix::fs::statvfs(state_dir) {
        Ok(stat) => {
            found["disk_quota"] = json!(stat.f_blocks.saturating_mul(stat.f_frsize));
            found["disk_reserve"] = json!(stat.f_bavail.saturating_mul(stat.f_frsize));
        }
        Err(error) => tracing::warn!(%error, directory = %state_dir.display(), "size of the disk not known"),
    }
    let set = config.capacity()?;
    for (name, value) in set.iter() {
        found[name] = value.to_json();
    }
    Rspec::from_json(&found).map_err(|error| ConfigError::Value {
        setting: "capacity".to_owned(),
        value: "what was found out".to_owned(),
        message: error.to_string(),
    })
}

/// `MemTotal` of /proc/meminfo, in bytes.
pub(crate) fn memory_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()
        .map(|kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_something_of_everything() {
        let table = toml::from_str("mem_limit = \"2 GiB\"\nmem_reserve = \"1 GiB\"").unwrap();
        let config = Config {
            capacity: table,
            ..Config::default()
        };
        let capacity = of_node(&config, Path::new("/")).unwrap();
        assert_eq!(capacity.number("mem_limit"), Some(2 << 30));
        assert_eq!(capacity.number("cpu_guarantee"), Some(900));
        assert!(capacity.number("disk_quota").unwrap() > 0);
        assert!(!capacity.ports().is_empty());
        assert_eq!(
            memory_total("MemTotal:       24573180 kB\nMemFree: 1 kB\n"),
            Some(24_573_180 << 10)
        );
    }
}
