//! What a guest finds that is started by PVH: `hvm_start_info`, its memory map and the initial RAM disk
//! (Xen's `docs/misc/pvh.pandoc` and `xen/include/public/arch-x86/hvm/start_info.h`).

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::GuestAddress;

use crate::boot::layout::{COMMAND_LINE, MEMORY_MAP, MODULE_LIST, START_INFO};
use crate::boot::loader::{Error, Found, write_error};
use crate::memory::Memory;

const START_MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const START_VERSION: u32 = 1;

/// Writes them.
pub(super) fn write(memory: &Memory, found: &Found<'_>) -> Result<(), Error> {
    let map: Vec<hvm_memmap_table_entry> = found
        .map
        .iter()
        .map(|range| hvm_memmap_table_entry {
            addr: range.start,
            size: range.bytes,
            type_: range.kind as u32,
            reserved: 0,
        })
        .collect();
    let mut start = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: found.rsdp.unwrap_or(0),
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let modules: Vec<hvm_modlist_entry> = found
        .initrd
        .iter()
        .map(|(paddr, size)| hvm_modlist_entry {
            paddr: *paddr,
            size: *size,
            ..Default::default()
        })
        .collect();
    if !modules.is_empty() {
        start.nr_modules = modules.len() as u32;
        start.modlist_paddr = MODULE_LIST;
    }
    let mut parameters = BootParams::new(&start, GuestAddress(START_INFO));
    parameters.set_sections(&map, GuestAddress(MEMORY_MAP));
    if !modules.is_empty() {
        parameters.set_modules(&modules, GuestAddress(MODULE_LIST));
    }
    PvhBootConfigurator::write_bootparams(&parameters, memory).map_err(write_error("hvm_start_info"))
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::boot::memory_map;

    #[test]
    fn the_start_info_leads_to_everything() {
        let memory = crate::memory::create(16 << 20).unwrap();
        let map = memory_map::build(&memory, true);
        let found = Found {
            map: &map,
            initrd: Some((0x20_0000, 77)),
            rsdp: Some(0xe_0000),
        };
        write(&memory, &found).unwrap();
        let start: hvm_start_info = memory.read_obj(GuestAddress(START_INFO)).unwrap();
        assert_eq!(
            (start.magic, start.version, start.rsdp_paddr),
            (0x336e_c578, 1, 0xe_0000)
        );
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(start.modlist_paddr)).unwrap();
        assert_eq!((start.nr_modules, module.paddr, module.size), (1, 0x20_0000, 77));
        for (n, range) in map.iter().enumerate() {
            let at = start.memmap_paddr + (n * size_of::<hvm_memmap_table_entry>()) as u64;
            let entry: hvm_memmap_table_entry = memory.read_obj(GuestAddress(at)).unwrap();
            assert_eq!(
                (entry.addr, entry.size, entry.type_),
                (range.start, range.bytes, range.kind as u32)
            );
        }
        assert_eq!(start.memmap_entries as usize, map.len());
    }
}
