//! What the attributes of an rspec become: limits of the kernel, names of the guest.

use mandoline_rspec::{CPU_SHARES, Rspec};

use crate::cgroup::{Limits, processors};
use crate::vm_type::Failure;

/// Limits of a sliver's cgroup, whose monitor may use `overhead_mib` and `threads` beside the guest's.
pub(super) fn limits(overhead_mib: u64, threads: u32, rspec: &Rspec) -> Result<Limits, Failure> {
    let vcpus = rspec.number("vcpus").unwrap_or(1) as u32;
    Limits::of(rspec, overhead_mib << 20, threads + vcpus)
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
}
