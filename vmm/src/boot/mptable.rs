//! The Intel MultiProcessor table (specification 1.4): CPUs, the IOAPIC, and which line goes to which pin.
//!
//! It is the whole hardware description of the fast path: a kernel without ACPI and PCI finds its CPUs and
//! interrupts here in microseconds, where an ACPI interpreter takes tens of milliseconds.

use crate::boot::layout::{IOAPIC, IOAPIC_PINS, LOCAL_APIC, MP_TABLE, MP_TABLE_SIZE};

const ENTRY_CPU: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTERNAL: u8 = 3;

const LOCAL_APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
/// Family 6, an FPU and an APIC: what the table's fixed fields can say; the rest is CPUID's.
const CPU_SIGNATURE: u32 = 0x600;
const CPU_FEATURES: u32 = 0x201;
const ISA_BUS: u8 = 0;

/// The table does not fit: more CPUs than [`mandoline_api::monitor::MAX_VCPUS`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("MP table of {bytes} bytes for {vcpus} vCPUs: at most {MP_TABLE_SIZE} bytes fit below 640 KiB")]
pub struct TableTooLong {
    vcpus: u8,
    bytes: usize,
}

/// The table's bytes, to be written at [`MP_TABLE`].
pub fn build(vcpus: u8) -> Result<Vec<u8>, TableTooLong> {
    let ioapic_id = vcpus;
    let mut entries = Vec::with_capacity(MP_TABLE_SIZE);
    let mut count: u16 = 0;
    for cpu in 0..vcpus {
        let flags = CPU_ENABLED | if cpu == 0 { CPU_BOOT } else { 0 };
        entries.extend([ENTRY_CPU, cpu, LOCAL_APIC_VERSION, flags]);
        entries.extend(CPU_SIGNATURE.to_le_bytes());
        entries.extend(CPU_FEATURES.to_le_bytes());
        entries.extend([0; 8]);
        count += 1;
    }
    entries.extend([ENTRY_BUS, ISA_BUS]);
    entries.extend(b"ISA   ");
    entries.extend([ENTRY_IOAPIC, ioapic_id, IOAPIC_VERSION, 1]);
    entries.extend(IOAPIC.to_le_bytes());
    count += 2;
    // KVM routes line n to pin n by default. Zero flags: as the ISA bus has it, edge-triggered and active
    // high, which is what an irqfd gives.
    for line in 0..IOAPIC_PINS as u8 {
        entries.extend([
            ENTRY_INTERRUPT,
            INTERRUPT_VECTORED,
            0,
            0,
            ISA_BUS,
            line,
            ioapic_id,
            line,
        ]);
        count += 1;
    }
    entries.extend([ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTERNAL, 0, 0, ISA_BUS, 0, 0, 0]);
    entries.extend([ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, ISA_BUS, 0, 0xff, 1]);
    count += 2;

    const FLOATING: usize = 16;
    const HEADER: usize = 44;
    let bytes = FLOATING + HEADER + entries.len();
    if bytes > MP_TABLE_SIZE {
        return Err(TableTooLong { vcpus, bytes });
    }

    let mut floating = [0u8; FLOATING];
    floating[..4].copy_from_slice(b"_MP_");
    floating[4..8].copy_from_slice(&(MP_TABLE as u32 + FLOATING as u32).to_le_bytes());
    floating[8] = 1; // length in units of 16 bytes
    floating[9] = 4; // specification 1.4
    floating[10] = checksum(&floating);

    let mut table = Vec::with_capacity(bytes);
    table.extend(b"PCMP");
    table.extend(((HEADER + entries.len()) as u16).to_le_bytes());
    table.extend([4, 0]);
    table.extend(b"MANDOLIN");
    table.extend(b"MICROVM     ");
    table.extend([0; 4]);
    table.extend([0; 2]);
    table.extend(count.to_le_bytes());
    table.extend(LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries);
    table[7] = checksum(&table);

    let mut whole = floating.to_vec();
    whole.extend(table);
    Ok(whole)
}

/// The byte that makes all bytes sum to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mandoline_api::monitor::MAX_VCPUS;

    #[test]
    fn checksums_are_zero_and_the_count_is_right_for_every_number_of_cpus() {
        for vcpus in 1..=MAX_VCPUS {
            let table = build(vcpus).unwrap();
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum(&table[..16]), 0);
            assert_eq!(sum(&table[16..]), 0);
            assert_eq!(
                usize::from(u16::from_le_bytes([table[20], table[21]])),
                table.len() - 16
            );
            let (mut at, mut seen) = (16 + 44, 0);
            while at < table.len() {
                at += if table[at] == ENTRY_CPU { 20 } else { 8 };
                seen += 1;
            }
            assert_eq!(at, table.len());
            assert_eq!(seen, u16::from_le_bytes([table[16 + 34], table[16 + 35]]));
        }
    }

    #[test]
    fn too_many_cpus_are_an_error() {
        assert!(build(60).is_err());
    }
}
