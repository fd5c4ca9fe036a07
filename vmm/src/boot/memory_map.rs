//! What the guest is told of its physical memory, the same for PVH and for the 64-bit Linux protocol.

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::boot::layout::{
    ACPI_TABLES, ACPI_TABLES_SIZE, GENERATION_ID, GENERATION_ID_SIZE, HIGH_RAM, MP_TABLE,
};
use crate::memory::Memory;

/// What a range is for. The numbers are those of e820 (ACPI specification 15.1), which PVH has taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// RAM for everybody.
    Ram = 1,
    /// Nobody's.
    Reserved = 2,
    /// ACPI tables: RAM once they are read.
    Acpi = 3,
}

/// A range of physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Size.
    pub bytes: u64,
    /// What it is for.
    pub kind: Kind,
}

/// The map, in rising order: base memory, what ACPI has, high memory up to the hole, and what lies above it.
pub fn build(memory: &Memory, acpi: bool) -> Vec<Range> {
    let range = |start, bytes, kind| Range { start, bytes, kind };
    let ram = |start, bytes| range(start, bytes, Kind::Ram);
    let mut map = vec![ram(0, MP_TABLE)];
    if acpi {
        map.push(range(ACPI_TABLES, ACPI_TABLES_SIZE, Kind::Acpi));
        map.push(range(GENERATION_ID, GENERATION_ID_SIZE, Kind::Reserved));
    }
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        let end = start + region.len();
        let start = if start == 0 { HIGH_RAM } else { start };
        if end > start {
            map.push(ram(start, end - start));
        }
    }
    map
}

/// End of the RAM below the hole for devices.
pub fn low_ram_end(memory: &Memory) -> u64 {
    memory.iter().next().map_or(0, |region| region.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(bytes: u64) -> Vec<(u64, u64)> {
        let memory = crate::memory::create(bytes).unwrap();
        build(&memory, false)
            .iter()
            .map(|r| (r.start, r.start + r.bytes))
            .collect()
    }

    #[test]
    fn memory_goes_round_both_holes() {
        const BASE: (u64, u64) = (0, 0x9_fc00);
        assert_eq!(map(32 << 20), [BASE, (0x10_0000, 0x200_0000)]);
        assert_eq!(map(3 << 30), [BASE, (0x10_0000, 0xc000_0000)]);
        let above = |end| [BASE, (0x10_0000, 0xc000_0000), (0x1_0000_0000, end)];
        assert_eq!(map((3 << 30) + 4096), above(0x1_0000_1000));
        assert_eq!(map(5 << 30), above(0x1_8000_0000));
    }

    #[test]
    fn what_acpi_has_is_no_ram_and_nothing_overlaps() {
        for bytes in [16 << 20, 5 << 30] {
            let memory = crate::memory::create(bytes).unwrap();
            let map = build(&memory, true);
            assert!(
                map.windows(2)
                    .all(|pair| pair[0].start + pair[0].bytes <= pair[1].start)
            );
            let kinds: Vec<_> = map[..4].iter().map(|r| (r.start, r.kind)).collect();
            assert_eq!(
                kinds,
                [
                    (0, Kind::Ram),
                    (ACPI_TABLES, Kind::Acpi),
                    (GENERATION_ID, Kind::Reserved),
                    (HIGH_RAM, Kind::Ram)
                ]
            );
        }
    }
}
