//! One package of `count` cores with a thread each, whose APIC ids are their numbers, in every leaf that speaks of
//! it. What KVM passes on of the host's own topology is written over: a guest's scheduler would believe it.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::{Vendor, highest};

/// Extended topology (Intel SDM volume 3, 10.9.1); AMD has it since family 17h.
const EXTENDED_TOPOLOGY: u32 = 0xb;
/// The same with more levels (version 2), which nobody needs here.
const EXTENDED_TOPOLOGY_V2: u32 = 0x1f;
/// The same, AMD's.
const AMD_EXTENDED_TOPOLOGY: u32 = 0x8000_0026;
/// AMD: APIC id, core and node (`TOPOEXT`).
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// Shows vCPU `cpu` of `count`.
pub(super) fn shape(entries: &mut Vec<kvm_cpuid_entry2>, vendor: Vendor, cpu: u8, count: u8) {
    let (id, count) = (u32::from(cpu), u32::from(count));
    // Ids are as wide as a power of two is.
    let ids = count.next_power_of_two();
    let shift = ids.trailing_zeros();
    entries.retain(|entry| {
        !matches!(
            entry.function,
            EXTENDED_TOPOLOGY | EXTENDED_TOPOLOGY_V2 | AMD_TOPOLOGY | AMD_EXTENDED_TOPOLOGY
        )
    });
    for entry in entries.iter_mut() {
        match entry.function {
            1 => {
                entry.ebx = id << 24 | ids << 16 | entry.ebx & 0xffff;
                // HTT: the count above is meant.
                set(&mut entry.edx, 28, count > 1);
            }
            // Deterministic caches: the last level is everybody's, those below belong to a core.
            4 if entry.eax & 0x1f != 0 => {
                entry.eax = entry.eax & 0x3fff | sharing(entry.eax, ids) << 14 | (ids - 1) << 26;
            }
            // The same of AMD's, which says how many cores and does not count ids.
            0x8000_001d if entry.eax & 0x1f != 0 => {
                entry.eax = entry.eax & 0x3fff | sharing(entry.eax, count) << 14;
            }
            // CmpLegacy: no threads, cores.
            0x8000_0001 if vendor == Vendor::Amd => set(&mut entry.ecx, 1, count > 1),
            // Bits of an id that are the core's, and cores less one.
            0x8000_0008 if vendor == Vendor::Amd => entry.ecx = shift << 12 | (count - 1),
            _ => {}
        }
    }
    if highest(entries, 0) >= EXTENDED_TOPOLOGY {
        // What is asked of a higher level KVM answers from level 1.
        let level = |index, eax, ebx, ecx| kvm_cpuid_entry2 {
            function: EXTENDED_TOPOLOGY,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx,
            edx: id,
            ..Default::default()
        };
        entries.push(level(0, 0, 1, LEVEL_THREAD));
        entries.push(level(1, shift, count, LEVEL_CORE | 1));
    }
    if vendor == Vendor::Amd && highest(entries, 0x8000_0000) >= AMD_TOPOLOGY {
        // A thread a core, one node: everything else is zero.
        entries.push(kvm_cpuid_entry2 {
            function: AMD_TOPOLOGY,
            eax: id,
            ebx: id & 0xff,
            ..Default::default()
        });
    }
}

/// Who shares the cache of a leaf, less one.
fn sharing(cache: u32, everybody: u32) -> u32 {
    let level = cache >> 5 & 7;
    if level >= 3 { everybody - 1 } else { 0 }
}

fn set(register: &mut u32, bit: u32, value: bool) {
    *register = *register & !(1 << bit) | u32::from(value) << bit;
}

#[cfg(test)]
mod tests {
    use kvm_bindings::CpuId;
    use mandoline_api::monitor::MAX_VCPUS;

    use super::super::shape;
    use super::super::tests::{AMD, INTEL, leaf, supported};

    const COUNTS: [u8; 5] = [1, 3, 8, 17, MAX_VCPUS];

    fn each(vendor: &[u8; 12], check: impl Fn(&CpuId, u32, u32)) {
        for count in COUNTS {
            for cpu in 0..count {
                let cpuid = shape(&supported(vendor), cpu, count, 0, true).unwrap();
                check(&cpuid, u32::from(cpu), u32::from(count));
            }
        }
    }

    #[test]
    fn ids_and_levels_agree_in_leaf_1_and_leaf_0xb() {
        for vendor in [INTEL, AMD] {
            each(vendor, |cpuid, cpu, count| {
                let basic = leaf(cpuid, 1, 0).unwrap();
                assert_eq!(basic.ebx >> 24, cpu);
                assert_eq!(basic.ebx >> 16 & 0xff, count.next_power_of_two());
                assert_eq!(basic.edx >> 28 & 1, u32::from(count > 1));
                assert_eq!(basic.ebx & 0xffff, 0x0800, "CLFLUSH stays");

                // SDM 10.9.1: shifting the id right by a level's EAX gives the id of the next level.
                let thread = leaf(cpuid, 0xb, 0).unwrap();
                let core = leaf(cpuid, 0xb, 1).unwrap();
                assert_eq!((thread.edx, core.edx), (cpu, cpu));
                assert_eq!((thread.ecx, core.ecx), (0x100, 0x201));
                assert_eq!((thread.ebx, core.ebx), (1, count));
                assert_eq!(cpu >> thread.eax, cpu, "a core of its own");
                assert_eq!(cpu >> core.eax, 0, "one package");
                assert!(core.eax < 32 && 1 << core.eax >= count && count > (1 << core.eax) / 2);
                assert!(leaf(cpuid, 0x1f, 0).is_none());
            });
        }
    }

    #[test]
    fn intels_caches_are_a_cores_up_to_the_last_level() {
        each(INTEL, |cpuid, _, count| {
            let ids = count.next_power_of_two();
            for (index, sharing) in [(0, 1), (1, 1), (2, 1), (3, ids)] {
                let cache = leaf(cpuid, 4, index).unwrap();
                assert_eq!((cache.eax >> 14 & 0xfff) + 1, sharing, "ids that share it");
                assert_eq!((cache.eax >> 26) + 1, ids, "ids in the package");
            }
            // Reserved with Intel.
            assert_eq!(leaf(cpuid, 0x8000_0008, 0).unwrap().ecx, 0x7077);
            assert!(leaf(cpuid, 0x8000_001e, 0).is_none());
        });
    }

    #[test]
    fn amds_own_leaves_say_the_same() {
        each(AMD, |cpuid, cpu, count| {
            let size = leaf(cpuid, 0x8000_0008, 0).unwrap().ecx;
            assert_eq!((size & 0xff) + 1, count);
            assert_eq!(cpu >> (size >> 12 & 0xf), 0, "one package");
            assert_eq!(
                leaf(cpuid, 0x8000_0001, 0).unwrap().ecx,
                1 << 22 | u32::from(count > 1) << 1
            );
            let extended = leaf(cpuid, 0x8000_001e, 0).unwrap();
            assert_eq!((extended.eax, extended.ebx, extended.ecx), (cpu, cpu, 0));
            for (index, sharing) in [(0, 1), (1, 1), (2, 1), (3, count)] {
                let cache = leaf(cpuid, 0x8000_001d, index).unwrap();
                assert_eq!((cache.eax >> 14 & 0xfff) + 1, sharing);
            }
        });
    }
}
