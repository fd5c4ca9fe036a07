//! CPUID as the guest sees it: what KVM supports, made consistent, with the clock's frequencies told so that
//! the guest calibrates nothing.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// The hypervisor leaf that gives TSC and APIC timer frequencies in kHz (VMware's convention, which KVM guests
/// and QEMU share).
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
/// KVM's APIC timer runs at 1 GHz (`APIC_BUS_FREQUENCY`).
const APIC_BUS_KHZ: u32 = 1_000_000;
/// The state component of protection keys in XSAVE (Intel SDM volume 1, 13.1).
const XSTATE_PKRU: u32 = 9;

/// Shapes KVM's supported CPUID for vCPU `cpu` of `count`.
///
/// `tsc_khz` is the guest's TSC frequency, 0 when KVM does not know it.
pub fn shape(supported: &CpuId, cpu: u8, count: u8, tsc_khz: u32, tsc_deadline: bool) -> CpuId {
    let mut entries: Vec<kvm_cpuid_entry2> = supported.as_slice().to_vec();
    entries.retain(|entry| !(entry.function == 0xd && entry.index == XSTATE_PKRU));
    let xsave_size = entries
        .iter()
        .filter(|entry| entry.function == 0xd && entry.index >= 2 && entry.eax != 0 && entry.ecx & 1 == 0)
        .map(|entry| entry.eax.saturating_add(entry.ebx))
        .max();
    for entry in &mut entries {
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ecx |= 1 << 31; // runs under a hypervisor
                if tsc_deadline {
                    // Reported by no KVM_GET_SUPPORTED_CPUID, since only with KVM's own APIC is it there. With it
                    // a kernel needs no PIT and calibrates no APIC timer.
                    entry.ecx |= 1 << 24;
                }
                let topology = if count > 1 {
                    u32::from(count.next_power_of_two()) << 16
                } else {
                    1 << 16
                };
                entry.ebx = u32::from(cpu) << 24 | topology | entry.ebx & 0xffff;
                if count > 1 {
                    entry.edx |= 1 << 28; // the count above is meant
                } else {
                    entry.edx &= !(1 << 28);
                }
            }
            // Cores per package in the deterministic cache leaf; a cache below the last belongs to one core.
            (4, _) => {
                let cores = u32::from(count.next_power_of_two()) - 1;
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { cores } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | cores << 26;
            }
            // Always there: the local APIC's timer does not stop in deep sleep.
            (6, _) => entry.eax |= 1 << 2,
            // Protection keys: under emulation their state component is announced without their feature bit or
            // the reverse, and Linux then prints a page of warnings. Nobody asked for them: mask both.
            (7, 0) => entry.ecx &= !(1 << 3 | 1 << 4),
            (0xb | 0x1f, index) => {
                entry.edx = u32::from(cpu);
                let shift = u32::from(count.next_power_of_two()).trailing_zeros();
                match index {
                    0 => (entry.eax, entry.ebx, entry.ecx) = (0, 1, 1 << 8),
                    1 => (entry.eax, entry.ebx, entry.ecx) = (shift, u32::from(count), 2 << 8 | 1),
                    _ => (entry.eax, entry.ebx, entry.ecx) = (0, 0, index),
                }
            }
            (0xd, 0) => {
                entry.eax &= !(1 << XSTATE_PKRU);
                // 576: the legacy area and the header, which are always there.
                entry.ecx = xsave_size.unwrap_or(0).max(576);
            }
            (0x8000_0008, _) => {
                // AMD: APIC id bits and threads, less one.
                let shift = u32::from(count.next_power_of_two()).trailing_zeros();
                entry.ecx = shift << 12 | u32::from(count - 1);
            }
            (0x4000_0000, _) if tsc_khz != 0 => entry.eax = entry.eax.max(HYPERVISOR_TIMING),
            _ => {}
        }
    }
    if tsc_khz != 0 {
        entries.retain(|entry| entry.function != HYPERVISOR_TIMING);
        entries.push(kvm_cpuid_entry2 {
            function: HYPERVISOR_TIMING,
            eax: tsc_khz,
            ebx: APIC_BUS_KHZ,
            ..Default::default()
        });
    }
    // Cannot fail: at most one more than KVM itself returned, far below the limit of the FAM structure.
    CpuId::from_entries(&entries).unwrap_or_else(|_| supported.clone())
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

    fn supported() -> CpuId {
        let entry = |function, index, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            index,
            flags: if matches!(function, 4 | 7 | 0xb | 0xd) {
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
        CpuId::from_entries(&[
            entry(1, 0, 0, 0x0800, 0, 0),
            entry(7, 0, 0, 0, 1 << 3 | 1 << 4 | 1 << 2, 0),
            entry(0xb, 0, 0, 0, 0, 0),
            entry(0xb, 1, 0, 0, 0, 0),
            entry(0xd, 0, 0x207, 2696, 2696, 0),
            entry(0xd, 2, 256, 576, 0, 0),
            entry(0xd, 9, 8, 2688, 0, 0),
            entry(0x4000_0000, 0, 0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d),
        ])
        .unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        cpuid
            .as_slice()
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .copied()
    }

    #[test]
    fn protection_keys_vanish_from_every_leaf() {
        let cpuid = shape(&supported(), 0, 1, 2_000_000, true);
        assert_eq!(leaf(&cpuid, 7, 0).unwrap().ecx, 1 << 2);
        let xsave = leaf(&cpuid, 0xd, 0).unwrap();
        assert_eq!((xsave.eax, xsave.ecx), (7, 832));
        assert!(leaf(&cpuid, 0xd, 9).is_none());
    }

    #[test]
    fn frequencies_are_told() {
        let cpuid = shape(&supported(), 0, 1, 2_345_678, true);
        let timing = leaf(&cpuid, HYPERVISOR_TIMING, 0).unwrap();
        assert_eq!((timing.eax, timing.ebx), (2_345_678, 1_000_000));
        assert_eq!(leaf(&cpuid, 0x4000_0000, 0).unwrap().eax, HYPERVISOR_TIMING);
        assert_ne!(leaf(&cpuid, 1, 0).unwrap().ecx & 1 << 24, 0);
    }

    #[test]
    fn each_cpu_has_its_own_apic_id() {
        for cpu in 0..3 {
            let cpuid = shape(&supported(), cpu, 3, 0, false);
            assert_eq!(leaf(&cpuid, 1, 0).unwrap().ebx >> 24, u32::from(cpu));
            assert_eq!(leaf(&cpuid, 1, 0).unwrap().ebx >> 16 & 0xff, 4);
            assert_eq!(leaf(&cpuid, 0xb, 1).unwrap().edx, u32::from(cpu));
            assert_eq!(leaf(&cpuid, 0xb, 1).unwrap().eax, 2);
            assert!(leaf(&cpuid, HYPERVISOR_TIMING, 0).is_none());
        }
    }
}
