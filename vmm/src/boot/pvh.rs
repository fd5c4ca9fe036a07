//! What a guest finds that is started by PVH: `hvm_start_info`, its memory map and the initial RAM disk
//! (Xen's `docs/misc/pvh.pandoc` and `xen/include/public/arch-x86/hvm/start_info.h`).

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::GuestAddress;

use crate::boot::layout::{COMMAND_LINE, MEMORY_MAP, MODULE_LIST, START_INFO};
use crate::boot::loader::{Error, write_error};
use crate::boot::memory_map::Range;
use crate::memory::Memory;

const START_MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const START_VERSION: u32 = 1;

/// Writes them. `initrd`: where it lies and its size.
pub fn write(memory: &Memory, map: &[Range], initrd: Option<(u64, u64)>) -> Result<(), Error> {
    let map: Vec<hvm_memmap_table_entry> = map
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
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let modules: Vec<hvm_modlist_entry> = initrd
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
