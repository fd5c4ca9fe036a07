//! What a guest finds that is started by the 64-bit Linux boot protocol (`Documentation/arch/x86/boot.rst`):
//! `boot_params`, the "zero page", with the memory map; a GDT; page tables that map what it needs at its own
//! address; and a seed for its random numbers, which PVH has no place for.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{
    LOADED_HIGH, SETUP_RNG_SEED, boot_e820_entry, boot_params, setup_header,
};
use vm_memory::{Bytes, GuestAddress};

use crate::boot::bzimage::{BOOT_FLAG, MAGIC};
use crate::boot::layout::{COMMAND_LINE, GDT, PAGE_TABLES, RNG_SEED, ZERO_PAGE};
use crate::boot::loader::{Error, Found, write_error};
use crate::memory::Memory;

/// The protocol that a kernel without a header of its own is told of: 2.15, of Linux 5.5.
const PROTOCOL: u16 = 0x20f;
/// "Undefined": a boot loader that has no number.
const LOADER: u8 = 0xff;

/// Selector of the 64-bit code segment (`__BOOT_CS`).
pub const CODE_SELECTOR: u16 = 0x10;
/// Selector of the data segment (`__BOOT_DS`).
pub const DATA_SELECTOR: u16 = 0x18;
/// Null, unused, flat 64-bit code, flat data (Intel SDM volume 3, 3.4.5).
pub const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

const PAGE: u64 = 4096;
const ENTRIES: usize = 512;
const PRESENT_WRITABLE: u64 = 3;
/// A page of 2 MiB.
const LARGE: u64 = 1 << 7;
const LARGE_PAGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;

/// How much entropy the seed has: as Linux's generator wants.
const SEED_BYTES: usize = 32;

/// Writes them. `header`: the image's own setup header; `mapped`: the first address that need not be mapped, at
/// most 4 GiB.
pub(super) fn write(
    memory: &Memory,
    found: &Found<'_>,
    header: Option<setup_header>,
    mapped: u64,
) -> Result<(), Error> {
    let mut parameters = boot_params {
        hdr: header.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: MAGIC,
            version: PROTOCOL,
            loadflags: LOADED_HIGH,
            ..Default::default()
        }),
        acpi_rsdp_addr: found.rsdp.unwrap_or(0),
        ..Default::default()
    };
    parameters.hdr.type_of_loader = LOADER;
    parameters.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    parameters.hdr.setup_data = RNG_SEED;
    if let Some((start, bytes)) = found.initrd {
        // Both below 4 GiB: it lies in low RAM.
        parameters.hdr.ramdisk_image = start as u32;
        parameters.hdr.ramdisk_size = bytes as u32;
    }
    let mut table = { parameters.e820_table };
    for (entry, range) in table.iter_mut().zip(found.map) {
        *entry = boot_e820_entry {
            addr: range.start,
            size: range.bytes,
            r#type: range.kind as u32,
        };
    }
    parameters.e820_table = table;
    parameters.e820_entries = found.map.len().min(table.len()) as u8;
    let parameters = BootParams::new(&parameters, GuestAddress(ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&parameters, memory).map_err(write_error("boot_params"))?;

    write_seed(memory)?;
    let gdt = GDT_ENTRIES.map(u64::to_le_bytes).concat();
    memory
        .write_slice(&gdt, GuestAddress(GDT))
        .map_err(write_error("GDT"))?;
    write_page_tables(memory, mapped)
}

/// A `struct setup_data`: next, type, length, data. The kernel mixes the seed in and wipes it.
fn write_seed(memory: &Memory) -> Result<(), Error> {
    let mut data = 0u64.to_le_bytes().to_vec();
    data.extend(SETUP_RNG_SEED.to_le_bytes());
    data.extend((SEED_BYTES as u32).to_le_bytes());
    let seed_at = data.len();
    data.resize(seed_at + SEED_BYTES, 0);
    rustix::rand::getrandom(&mut data[seed_at..], rustix::rand::GetRandomFlags::empty())
        .map_err(write_error("seed"))?;
    memory
        .write_slice(&data, GuestAddress(RNG_SEED))
        .map_err(write_error("seed"))
}

/// Maps whole GiB, one at least, in pages of 2 MiB.
fn write_page_tables(memory: &Memory, mapped: u64) -> Result<(), Error> {
    let directories = mapped.div_ceil(GIB).clamp(1, 4);
    let pdpt = PAGE_TABLES + PAGE;
    let directory = |n: u64| pdpt + (n + 1) * PAGE;
    let write = |address: u64, entries: &[u64]| {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        memory
            .write_slice(&bytes, GuestAddress(address))
            .map_err(write_error("page tables"))
    };
    write(PAGE_TABLES, &[pdpt | PRESENT_WRITABLE])?;
    let pointers: Vec<u64> = (0..directories)
        .map(|n| directory(n) | PRESENT_WRITABLE)
        .collect();
    write(pdpt, &pointers)?;
    for n in 0..directories {
        let pages: Vec<u64> = (0..ENTRIES as u64)
            .map(|page| (n * GIB + page * LARGE_PAGE) | LARGE | PRESENT_WRITABLE)
            .collect();
        write(directory(n), &pages)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use linux_loader::loader::bootparam::boot_params;

    use super::*;
    use crate::boot::memory_map;

    const NOTHING: Found<'static> = Found {
        map: &[],
        initrd: None,
        rsdp: None,
    };

    fn number(memory: &Memory, address: u64) -> u64 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    /// Walks the page tables as a CPU does.
    fn translate(memory: &Memory, address: u64) -> Option<u64> {
        let mut table = PAGE_TABLES;
        for shift in [39, 30, 21] {
            let entry = number(memory, table + (address >> shift & 511) * 8);
            if entry & 1 == 0 {
                return None;
            }
            table = entry & 0x000f_ffff_ffff_f000;
            if entry & LARGE != 0 {
                return Some(table + (address & ((1 << shift) - 1)));
            }
        }
        None
    }

    #[test]
    fn what_must_be_mapped_is_mapped_at_its_own_address() {
        for (mapped, end) in [(5, GIB), (GIB + 1, 2 * GIB), (4 * GIB, 4 * GIB)] {
            let memory = crate::memory::create(16 << 20).unwrap();
            write(&memory, &NOTHING, None, mapped).unwrap();
            for address in [0, ZERO_PAGE, 0x12_3456, mapped - 1, end - 1] {
                assert_eq!(translate(&memory, address), Some(address), "{address:#x}");
            }
            assert_eq!(translate(&memory, end), None, "{mapped:#x}");
            // They end where the command line begins, or before.
            assert_eq!(number(&memory, COMMAND_LINE), 0);
        }
    }

    #[test]
    fn the_zero_page_has_map_command_line_and_initial_ram_disk() {
        let memory = crate::memory::create(5 << 30).unwrap();
        let header = setup_header {
            version: 0x20c,
            header: MAGIC,
            ..Default::default()
        };
        let map = memory_map::build(&memory, true);
        let found = Found {
            map: &map,
            initrd: Some((0x200_0000, 4097)),
            rsdp: Some(0xe_0000),
        };
        write(&memory, &found, Some(header), GIB).unwrap();
        let page: boot_params = memory.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        assert_eq!({ page.acpi_rsdp_addr }, 0xe_0000);
        let hdr = { page.hdr };
        assert_eq!(({ hdr.version }, { hdr.type_of_loader }), (0x20c, 0xff));
        assert_eq!(
            ({ hdr.cmd_line_ptr }, { hdr.ramdisk_image }, { hdr.ramdisk_size }),
            (0x2_0000, 0x200_0000, 4097)
        );
        let table = { page.e820_table };
        let seen: Vec<_> = table[..usize::from(page.e820_entries)]
            .iter()
            .map(|e| ({ e.addr }, { e.size }, { e.r#type }))
            .collect();
        let told: Vec<_> = map.iter().map(|r| (r.start, r.bytes, r.kind as u32)).collect();
        assert_eq!(seen, told);
    }

    #[test]
    fn every_start_has_another_seed() {
        let seed = || {
            let memory = crate::memory::create(16 << 20).unwrap();
            write(&memory, &NOTHING, None, GIB).unwrap();
            let mut node = [0u8; 16 + SEED_BYTES];
            memory.read_slice(&mut node, GuestAddress(RNG_SEED)).unwrap();
            node
        };
        let (one, other) = (seed(), seed());
        assert_eq!(one[..16], [0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 32, 0, 0, 0]);
        assert_ne!(one[16..], other[16..]);
    }
}
