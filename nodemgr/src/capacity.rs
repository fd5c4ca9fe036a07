//! What the node has: found out at each start, or as the owner's configuration says.

use std::path::Path;

use mandoline_rspec::{CPU_SHARES, PortSet, Rspec};
use serde_json::json;

use crate::config::{Config, ConfigError};

/// Works out the rspec of the whole node.
pub fn of_node(config: &Config, state_dir: &Path) -> Result<Rspec, ConfigError> {
    let memory = memory_total(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default());
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let rate = config.node_rate()?;
    let mut found = json!({
        "cpu_guarantee": CPU_SHARES - config.host_cpu_shares,
        "vcpus": cpus.min(32),
        "base_rate": rate,
        "burst_rate": rate,
        "ports": own_ports(config).items(),
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
    if let Some(flows) = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max")
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok())
    {
        found["flow_limit"] = json!(flows.min(1 << 24));
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

/// Ports that slices may own: neither the node's ssh, nor its clients' ephemeral ports, which end where the
/// slivers' own blocks start.
fn own_ports(config: &Config) -> PortSet {
    let mut ports = PortSet::default();
    for item in ["tcp/1-21", "udp/1-66", "tcp/23-9999", "udp/69-9999"] {
        if let Ok((protocol, mut range)) = PortSet::parse_item(item) {
            range.last = range.last.min(config.network.first_port.saturating_sub(1));
            if range.first <= range.last {
                ports.insert(protocol, range);
            }
        }
    }
    ports
}

fn memory_total(meminfo: &str) -> Option<u64> {
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
