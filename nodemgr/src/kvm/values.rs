//! What the attributes of an rspec become: limits of the kernel, names of the guest.

use mandoline_limits::Rate;
use mandoline_limits::cgroup::{CpuMax, CpuShare, MemoryLimits};
use mandoline_rspec::{CPU_SHARES, Rspec};

use super::KvmConfig;
use super::host::Limits;
use crate::net::Bandwidth;
use crate::vm_type::Failure;

/// Limits of a sliver's cgroup.
pub(super) fn limits(config: &KvmConfig, rspec: &Rspec) -> Result<Limits, Failure> {
    let fatal = |e: mandoline_limits::Error| Failure::fatal(e.to_string());
    let share = rspec.number("cpu_share").unwrap_or(1).clamp(1, 1000) as u32;
    let guarantee = rspec.number("cpu_guarantee").unwrap_or(0);
    let cpu_max = match rspec.flag("cpu_capped") {
        true => {
            let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
            // Of 1000 for the whole node; the kernel counts one processor as 1000.
            let thousandths = guarantee.saturating_mul(cpus).min(CPU_SHARES * cpus);
            Some(CpuMax::of_one_cpu(u32::try_from(thousandths).unwrap_or(u32::MAX)).map_err(fatal)?)
        }
        false => None,
    };
    let memory = rspec.number("mem_limit").unwrap_or(0);
    Ok(Limits {
        cpu_share: CpuShare::new(share).map_err(fatal)?,
        cpu_max,
        memory: MemoryLimits {
            max: Some(memory.saturating_add(config.overhead_mib << 20)),
            min: Some(rspec.number("mem_reserve").unwrap_or(0).min(memory)),
            oom_group: Some(true),
            ..MemoryLimits::default()
        },
        pids_max: 32 + rspec.number("vcpus").unwrap_or(1) as u32,
    })
}

/// What a sliver may send: a guarantee of at least PlanetLab's 1 kbit/s, and a ceiling if it has one.
pub(super) fn bandwidth(rspec: &Rspec) -> Result<Bandwidth, Failure> {
    let rate = |bits| Rate::from_bits_per_second(bits).map_err(|e| Failure::fatal(e.to_string()));
    Ok(Bandwidth {
        guarantee: rate(rspec.number("base_rate").unwrap_or(1_000).max(1_000))?,
        peak: rspec.number("burst_rate").map(rate).transpose()?,
    })
}

/// A host name from an account: letters, digits and hyphens, as RFC 1123 has it, at most 63 of them.
pub(super) fn host_name(account: &str) -> String {
    let name: String = account
        .chars()
        .take(63)
        .map(|c| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '-'
            }
        })
        .collect();
    name.trim_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_keep_rfc_1123() {
        assert_eq!(host_name("princeton_codeen"), "princeton-codeen");
        assert_eq!(host_name("inria.sop_X."), "inria-sop-x");
        assert!(host_name(&format!("a_{}", "b".repeat(80))).len() <= 63);
    }

    #[test]
    fn a_sliver_always_has_some_bandwidth() {
        let none = bandwidth(&Rspec::new()).unwrap();
        assert_eq!((none.guarantee.bits_per_second(), none.peak), (1_000, None));
        let json = serde_json::json!({"base_rate": "2 Mbit/s", "burst_rate": "10 Mbit/s"});
        let some = bandwidth(&Rspec::from_json(&json).unwrap()).unwrap();
        assert_eq!(some.guarantee.bits_per_second(), 2_000_000);
        assert_eq!(some.peak.map(Rate::bits_per_second), Some(10_000_000));
    }
}
