//! The clocks' frequencies: what a guest is told it need not measure.
//!
//! Linux on KVM asks kvm-clock for the TSC's frequency, and with the TSC deadline timer asks nobody for the APIC
//! timer's. The leaves here are for whoever has neither.

use kvm_bindings::kvm_cpuid_entry2;

use super::{Vendor, highest};

/// The hypervisor leaf that gives TSC and APIC timer frequencies in kHz (VMware's convention, which KVM guests
/// and QEMU share).
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
const HYPERVISOR: u32 = 0x4000_0000;
/// Time stamp counter and core crystal clock (Intel SDM volume 2A, CPUID).
const TSC_LEAF: u32 = 0x15;
/// Processor frequencies in MHz (the same).
const FREQUENCY_LEAF: u32 = 0x16;
/// KVM's APIC timer runs at 1 GHz (`APIC_BUS_FREQUENCY`); leaf 0x15 calls what drives it the crystal.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// Tells of a TSC of `tsc_khz`.
pub(super) fn shape(entries: &mut Vec<kvm_cpuid_entry2>, vendor: Vendor, tsc_khz: u32) {
    entries.retain(|entry| !matches!(entry.function, TSC_LEAF | FREQUENCY_LEAF | HYPERVISOR_TIMING));
    for entry in entries.iter_mut().filter(|entry| entry.function == HYPERVISOR) {
        entry.eax = entry.eax.max(HYPERVISOR_TIMING);
    }
    entries.push(kvm_cpuid_entry2 {
        function: HYPERVISOR_TIMING,
        eax: tsc_khz,
        ebx: APIC_BUS_KHZ,
        ..Default::default()
    });
    if vendor != Vendor::Intel || highest(entries, 0) < FREQUENCY_LEAF {
        return;
    }
    if let Some((denominator, numerator)) = ratio(tsc_khz) {
        entries.push(kvm_cpuid_entry2 {
            function: TSC_LEAF,
            eax: denominator,
            ebx: numerator,
            ecx: APIC_BUS_KHZ * 1000,
            ..Default::default()
        });
    }
    let mhz = tsc_khz.div_ceil(1000);
    entries.push(kvm_cpuid_entry2 {
        function: FREQUENCY_LEAF,
        eax: mhz,
        ebx: mhz,
        ecx: APIC_BUS_KHZ / 1000,
        ..Default::default()
    });
}

/// TSC to crystal as (denominator, numerator), in lowest terms. `None` where Linux, which multiplies the crystal's
/// kHz and the numerator in 32 bits, would overflow: no leaf is better than a wrong frequency.
fn ratio(tsc_khz: u32) -> Option<(u32, u32)> {
    let (mut divisor, mut rest) = (tsc_khz, APIC_BUS_KHZ);
    while rest != 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    let numerator = tsc_khz / divisor;
    APIC_BUS_KHZ.checked_mul(numerator)?;
    Some((APIC_BUS_KHZ / divisor, numerator))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::shape;
    use super::super::tests::{AMD, INTEL, leaf, supported};
    use super::*;

    #[test]
    fn every_hypervisor_guest_is_told_the_frequencies() {
        for vendor in [INTEL, AMD] {
            let cpuid = shape(&supported(vendor), 0, 1, 2_345_678, true).unwrap();
            let timing = leaf(&cpuid, HYPERVISOR_TIMING, 0).unwrap();
            assert_eq!((timing.eax, timing.ebx), (2_345_678, 1_000_000));
            assert_eq!(leaf(&cpuid, HYPERVISOR, 0).unwrap().eax, HYPERVISOR_TIMING);
            let unknown = shape(&supported(vendor), 0, 1, 0, true).unwrap();
            assert!(leaf(&unknown, HYPERVISOR_TIMING, 0).is_none());
        }
    }

    #[test]
    fn intels_own_leaves_are_intels_only() {
        let cpuid = shape(&supported(INTEL), 0, 1, 2_100_000, true).unwrap();
        let tsc = leaf(&cpuid, TSC_LEAF, 0).unwrap();
        assert_eq!((tsc.eax, tsc.ebx, tsc.ecx), (10, 21, 1_000_000_000));
        let frequency = leaf(&cpuid, FREQUENCY_LEAF, 0).unwrap();
        assert_eq!((frequency.eax, frequency.ebx, frequency.ecx), (2100, 2100, 1000));
        let amd = shape(&supported(AMD), 0, 1, 2_100_000, true).unwrap();
        assert!(leaf(&amd, TSC_LEAF, 0).is_none() && leaf(&amd, FREQUENCY_LEAF, 0).is_none());
        // A frequency that Linux could not compute: said by the hypervisor's leaf only.
        let odd = shape(&supported(INTEL), 0, 1, 2_345_679, true).unwrap();
        assert!(leaf(&odd, TSC_LEAF, 0).is_none());
        assert_eq!(leaf(&odd, FREQUENCY_LEAF, 0).unwrap().eax, 2346);
    }

    proptest! {
        #[test]
        fn linux_computes_the_frequency_from_leaf_0x15(mhz in 1u32..6000, khz in 0u32..1000) {
            // `native_calibrate_tsc()`: all in 32 bits.
            for tsc_khz in [mhz * 1000, mhz * 1000 + khz] {
                if let Some((denominator, numerator)) = ratio(tsc_khz) {
                    let crystal_khz = 1_000_000u32;
                    prop_assert_eq!(crystal_khz.checked_mul(numerator).unwrap() / denominator, tsc_khz);
                }
            }
        }
    }
}
