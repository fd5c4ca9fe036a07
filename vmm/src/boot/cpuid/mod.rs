//! CPUID as the guest sees it: what KVM supports, made consistent, with its own [`topology`], and with the
//! [`clock`]'s frequencies told so that the guest calibrates nothing.

mod clock;
mod topology;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// The state component of protection keys in XSAVE (Intel SDM volume 1, 13.1).
const XSTATE_PKRU: u32 = 9;

/// More entries than KVM takes.
#[derive(Debug, thiserror::Error)]
#[error("CPUID of {0} entries: KVM takes at most {max}", max = kvm_bindings::KVM_MAX_CPUID_ENTRIES)]
pub struct TooManyEntries(usize);

/// Which vendor's rules the CPU follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Intel,
    /// AMD and Hygon.
    Amd,
    Other,
}

impl Vendor {
    fn of(entries: &[kvm_cpuid_entry2]) -> Self {
        let Some(leaf) = entries.iter().find(|entry| entry.function == 0) else {
            return Self::Other;
        };
        let name = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
        match name.as_flattened() {
            b"GenuineIntel" => Self::Intel,
            b"AuthenticAMD" | b"HygonGenuine" => Self::Amd,
            _ => Self::Other,
        }
    }
}

/// Shapes KVM's supported CPUID for vCPU `cpu` of `count`.
///
/// `tsc_khz` is the guest's TSC frequency, 0 when KVM does not know it.
pub fn shape(
    supported: &CpuId,
    cpu: u8,
    count: u8,
    tsc_khz: u32,
    tsc_deadline: bool,
) -> Result<CpuId, TooManyEntries> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported.as_slice().to_vec();
    let vendor = Vendor::of(&entries);
    features(&mut entries, tsc_deadline);
    topology::shape(&mut entries, vendor, cpu, count);
    if tsc_khz != 0 {
        clock::shape(&mut entries, vendor, tsc_khz);
    }
    CpuId::from_entries(&entries).map_err(|_| TooManyEntries(entries.len()))
}

fn features(entries: &mut Vec<kvm_cpuid_entry2>, tsc_deadline: bool) {
    entries.retain(|entry| !(entry.function == 0xd && entry.index == XSTATE_PKRU));
    let xsave_size = entries
        .iter()
        .filter(|entry| entry.function == 0xd && entry.index >= 2 && entry.eax != 0 && entry.ecx & 1 == 0)
        .map(|entry| entry.eax.saturating_add(entry.ebx))
        .max();
    for entry in entries {
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ecx |= 1 << 31; // runs under a hypervisor
                entry.ecx |= 1 << 21; // x2APIC: KVM's own, whatever the host's CPU has
                if tsc_deadline {
                    // Reported by no KVM_GET_SUPPORTED_CPUID, since only with KVM's own APIC is it there. With it
                    // a kernel needs no PIT and calibrates no APIC timer.
                    entry.ecx |= 1 << 24;
                }
            }
            // Always there: the local APIC's timer does not stop in deep sleep.
            (6, _) => entry.eax |= 1 << 2,
            // Protection keys: under emulation their state component is announced without their feature bit or
            // the reverse, and Linux then prints a page of warnings. Nobody asked for them: mask both.
            (7, 0) => entry.ecx &= !(1 << 3 | 1 << 4),
            (0xd, 0) => {
                entry.eax &= !(1 << XSTATE_PKRU);
                // 576: the legacy area and the header, which are always there.
                entry.ecx = xsave_size.unwrap_or(0).max(576);
            }
            _ => {}
        }
    }
}

/// The highest function of the basic (0), the hypervisor's (0x4000_0000) or the extended (0x8000_0000) range.
fn highest(entries: &[kvm_cpuid_entry2], range: u32) -> u32 {
    entries
        .iter()
        .find(|entry| entry.function == range)
        .map_or(range, |entry| entry.eax)
}

/// The state components that XCR0 may name; `None` where the CPU has no XSAVE.
pub fn xsave_features(cpuid: &CpuId) -> Option<u64> {
    const XSAVE: u32 = 1 << 26;
    let entries = cpuid.as_slice();
    entries
        .iter()
        .find(|entry| entry.function == 1)
        .filter(|entry| entry.ecx & XSAVE != 0)?;
    let leaf = entries
        .iter()
        .find(|entry| entry.function == 0xd && entry.index == 0)?;
    Some(u64::from(leaf.edx) << 32 | u64::from(leaf.eax))
}

#[cfg(test)]
mod tests {
    use kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

    use super::*;

    pub(super) const INTEL: &[u8; 12] = b"GenuineIntel";
    pub(super) const AMD: &[u8; 12] = b"AuthenticAMD";

    /// What KVM says of a CPU of this vendor, as far as something is shaped.
    pub(super) fn supported(vendor: &[u8; 12]) -> CpuId {
        let entry = |function, index, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            index,
            flags: if matches!(function, 4 | 7 | 0xb | 0xd | 0x1f | 0x8000_001d) {
                KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            } else {
                0
            },
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
        let mut entries = vec![
            entry(0, 0, 0x1f, word(0), word(8), word(4)),
            entry(1, 0, 0, 0x0800, 0, 1 << 28),
            entry(7, 0, 0, 0, 1 << 3 | 1 << 4 | 1 << 2, 0),
            entry(0xb, 0, 0, 0, 0, 0),
            entry(0xd, 0, 0x207, 2696, 2696, 0),
            entry(0xd, 2, 256, 576, 0, 0),
            entry(0xd, 9, 8, 2688, 0, 0),
            entry(0x1f, 0, 0, 0, 0, 0),
            entry(0x4000_0000, 0, 0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d),
            entry(0x8000_0000, 0, 0x8000_0022, 0, 0, 0),
            entry(0x8000_0001, 0, 0, 0, 1 << 1 | 1 << 22, 0),
            entry(0x8000_0008, 0, 0x3030, 0, 0x7077, 0),
        ];
        if vendor == AMD {
            // Data, instructions, level 2, level 3: as a host of 64 threads has them.
            for (index, level) in [(0, 1), (1, 1), (2, 2), (3, 3)] {
                entries.push(entry(0x8000_001d, index, 1 | level << 5 | 63 << 14, 0, 0, 0));
            }
            entries.push(entry(0x8000_001e, 0, 0, 0, 0, 0));
        } else {
            for (index, level) in [(0, 1), (1, 1), (2, 2), (3, 3)] {
                entries.push(entry(4, index, 1 | level << 5 | 63 << 14 | 31 << 26, 0, 0, 0));
            }
        }
        CpuId::from_entries(&entries).unwrap()
    }

    pub(super) fn leaf(cpuid: &CpuId, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        cpuid
            .as_slice()
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .copied()
    }

    #[test]
    fn protection_keys_vanish_from_every_leaf() {
        let cpuid = shape(&supported(INTEL), 0, 1, 2_000_000, true).unwrap();
        assert_eq!(leaf(&cpuid, 7, 0).unwrap().ecx, 1 << 2);
        let xsave = leaf(&cpuid, 0xd, 0).unwrap();
        assert_eq!((xsave.eax, xsave.ecx), (7, 832));
        assert!(leaf(&cpuid, 0xd, 9).is_none());
    }

    #[test]
    fn the_local_apic_is_kvms() {
        let ecx = |deadline| {
            leaf(&shape(&supported(AMD), 0, 1, 0, deadline).unwrap(), 1, 0)
                .unwrap()
                .ecx
        };
        assert_eq!(ecx(true), 1 << 31 | 1 << 24 | 1 << 21);
        assert_eq!(ecx(false), 1 << 31 | 1 << 21);
    }

    #[test]
    fn more_entries_than_kvm_takes_are_an_error() {
        let many = vec![kvm_cpuid_entry2::default(); kvm_bindings::KVM_MAX_CPUID_ENTRIES];
        let mut many = CpuId::from_entries(&many).unwrap();
        many.as_mut_slice()[0].eax = 0xb;
        let error = shape(&many, 0, 2, 0, true).err().unwrap().to_string();
        assert!(error.starts_with("CPUID of 258 entries"), "{error}");
    }
}
