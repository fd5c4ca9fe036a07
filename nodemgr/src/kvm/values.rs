//! What the attributes of an rspec become: limits of the kernel, names of the guest.

use mandoline_limits::Rate;
use mandoline_rspec::{CPU_SHARES, Rspec};

use super::KvmConfig;
use crate::cgroup::{Limits, processors};
use crate::net::Bandwidth;
use crate::vm_type::Failure;

/// Limits of a sliver's cgroup.
pub(super) fn limits(config: &KvmConfig, rspec: &Rspec) -> Result<Limits, Failure> {
    let vcpus = rspec.number("vcpus").unwrap_or(1) as u32;
    Limits::of(rspec, config.overhead_mib << 20, 32 + vcpus)
}

/// What of a guarantee the sliver's virtual CPUs cannot use.
pub(super) fn unusable_guarantee(rspec: &Rspec) -> Option<String> {
    let guarantee = rspec.number("cpu_guarantee")?;
    let (vcpus, processors) = (rspec.number("vcpus").unwrap_or(1), processors());
    let usable = CPU_SHARES * vcpus / processors.max(1);
    (guarantee > usable).then(|| {
        format!("cpu_guarantee is {guarantee}, but {vcpus} vcpus of {processors} processors can use {usable} at most")
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
