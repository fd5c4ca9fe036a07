//! Kernel, command line, memory map and tables into guest memory: everything that the guest finds at its
//! first instruction.
//!
//! The kernel's segments are mapped copy-on-write from its file wherever file and memory agree modulo the
//! page size: nothing is copied, the pages that no sliver writes are shared by all slivers of the node, and
//! pages that the guest never touches are never read. The rest (the ends of segments) is read.

use std::fs::File;
use std::io::Seek;
use std::os::fd::AsRawFd;

use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, ReadVolatile, VolatileSlice,
};

use crate::boot::layout::{
    COMMAND_LINE, COMMAND_LINE_SIZE, HIGH_RAM, MEMORY_MAP, MMIO_WINDOW, MODULE_LIST, MP_TABLE, START_INFO,
};
use crate::boot::{elf, mptable};
use crate::memory::Memory;

const START_MAGIC: u32 = 0x336e_c578;
const START_VERSION: u32 = 1;
const MAP_RAM: u32 = 1;
const PAGE: u64 = 4096;

/// Something could not be put in guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image is no kernel.
    #[error(transparent)]
    Image(#[from] elf::Error),
    /// A segment lies where there is no RAM.
    #[error(
        "kernel segment {start:#x}..{end:#x} does not fit in guest RAM {low:#x}..{high:#x}: give the machine more memory"
    )]
    Outside {
        /// First address.
        start: u64,
        /// First address after it.
        end: u64,
        /// Lowest address that a kernel may use.
        low: u64,
        /// End of low RAM.
        high: u64,
    },
    /// Mapping a part of the kernel failed.
    #[error("mapping {bytes} bytes of the kernel image: {source}")]
    Map {
        /// How much.
        bytes: u64,
        /// What the host said.
        source: std::io::Error,
    },
    /// Copying into guest memory failed.
    #[error("writing {what} to guest memory: {detail}")]
    Write {
        /// What was written.
        what: &'static str,
        /// What went wrong.
        detail: String,
    },
    /// The initial RAM disk does not fit.
    #[error(
        "initial RAM disk of {bytes} bytes does not fit above the kernel's end {kernel_end:#x} in RAM up to {high:#x}"
    )]
    Initrd {
        /// Its size.
        bytes: u64,
        /// Where the kernel ends.
        kernel_end: u64,
        /// End of low RAM.
        high: u64,
    },
    /// The command line does not fit or has characters that no command line may have.
    #[error("kernel command line ({bytes} bytes, at most {COMMAND_LINE_SIZE} with the devices): {source}")]
    CommandLine {
        /// Its size.
        bytes: usize,
        /// What is wrong.
        source: linux_loader::cmdline::Error,
    },
    /// Too many CPUs.
    #[error(transparent)]
    MpTable(#[from] mptable::TableTooLong),
}

/// Loads the kernel; returns its PVH entry and the first address after it.
pub fn kernel(memory: &Memory, file: &File) -> Result<(u64, u64), Error> {
    let image = elf::read(file)?;
    let high = low_ram_end(memory);
    let mut kernel_end = HIGH_RAM;
    for segment in &image.segments {
        if segment.address < HIGH_RAM || segment.end() > high {
            return Err(Error::Outside {
                start: segment.address,
                end: segment.end(),
                low: HIGH_RAM,
                high,
            });
        }
        kernel_end = kernel_end.max(segment.end());
        let mapped = map_segment(memory, file, segment)?;
        read_rest(memory, file, segment, mapped)?;
    }
    Ok((image.pvh_entry, kernel_end))
}

/// Maps the whole pages of a segment from the file; returns how many bytes that covers.
fn map_segment(memory: &Memory, file: &File, segment: &elf::Segment) -> Result<u64, Error> {
    let bytes = segment.file_bytes / PAGE * PAGE;
    // Host and guest pages agree because regions are page-aligned on both sides.
    if bytes == 0 || !segment.address.is_multiple_of(PAGE) || !segment.offset.is_multiple_of(PAGE) {
        return Ok(0);
    }
    let target = memory
        .get_slice(GuestAddress(segment.address), bytes as usize)
        .map_err(|error| write_error("kernel")(error))?;
    let start = target.ptr_guard_mut();
    // SAFETY: the target is `bytes` bytes of guest RAM in one region (get_slice checked), page-aligned, and no
    // Rust reference points into guest RAM; MAP_FIXED replaces exactly those pages by a private mapping.
    let mapped = unsafe {
        libc::mmap(
            start.as_ptr().cast(),
            bytes as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            segment.offset as libc::off_t,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(Error::Map {
            bytes,
            source: std::io::Error::last_os_error(),
        });
    }
    Ok(bytes)
}

/// Reads what could not be mapped. Memory beyond the file's bytes is zero already: it is untouched.
fn read_rest(memory: &Memory, file: &File, segment: &elf::Segment, done: u64) -> Result<(), Error> {
    let mut offset = segment.offset + done;
    let mut address = segment.address + done;
    let mut left = segment.file_bytes - done;
    let mut buffer = vec![0u8; left.min(64 << 10) as usize];
    while left > 0 {
        let now = left.min(buffer.len() as u64) as usize;
        std::os::unix::fs::FileExt::read_exact_at(file, &mut buffer[..now], offset).map_err(|source| {
            elf::Error::Read {
                offset,
                bytes: now,
                source,
            }
        })?;
        memory
            .write_slice(&buffer[..now], GuestAddress(address))
            .map_err(write_error("kernel"))?;
        offset += now as u64;
        address += now as u64;
        left -= now as u64;
    }
    Ok(())
}

/// Loads the initial RAM disk at the end of low RAM; returns where it lies.
pub fn initrd(memory: &Memory, mut file: &File, kernel_end: u64) -> Result<(u64, u64), Error> {
    let bytes = file
        .metadata()
        .map_err(|source| Error::Write {
            what: "initial RAM disk",
            detail: source.to_string(),
        })?
        .len();
    let high = low_ram_end(memory);
    let start = high
        .checked_sub(bytes)
        .map(|start| start / PAGE * PAGE)
        .filter(|start| *start >= kernel_end);
    let start = start.ok_or(Error::Initrd {
        bytes,
        kernel_end,
        high,
    })?;
    let mut target: VolatileSlice = memory
        .get_slice(GuestAddress(start), bytes as usize)
        .map_err(write_error("initial RAM disk"))?;
    // An inherited descriptor may stand anywhere.
    file.rewind().map_err(write_error("initial RAM disk"))?;
    file.read_exact_volatile(&mut target)
        .map_err(|error| write_error("initial RAM disk")(error))?;
    Ok((start, bytes))
}

/// The command line with an entry for each virtio device: (window, interrupt line).
pub fn command_line(arguments: &str, devices: &[(u64, u32)]) -> Result<Cmdline, Error> {
    let failed = |source| Error::CommandLine {
        bytes: arguments.len(),
        source,
    };
    let mut line = Cmdline::try_from(arguments, COMMAND_LINE_SIZE).map_err(failed)?;
    for (window, gsi) in devices {
        line.add_virtio_mmio_device(MMIO_WINDOW, GuestAddress(*window), *gsi, None)
            .map_err(failed)?;
    }
    Ok(line)
}

/// Writes command line, memory map, MP table and `hvm_start_info`.
pub fn tables(memory: &Memory, line: &Cmdline, initrd: Option<(u64, u64)>, vcpus: u8) -> Result<(), Error> {
    let text = line
        .as_cstring()
        .map_err(|source| Error::CommandLine { bytes: 0, source })?;
    memory
        .write_slice(text.as_bytes_with_nul(), GuestAddress(COMMAND_LINE))
        .map_err(write_error("command line"))?;
    memory
        .write_slice(&mptable::build(vcpus)?, GuestAddress(MP_TABLE))
        .map_err(write_error("MP table"))?;

    let map = memory_map(memory);
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

/// RAM as the guest is told of it: base memory, high memory up to the hole, and what lies above it.
fn memory_map(memory: &Memory) -> Vec<hvm_memmap_table_entry> {
    let ram = |addr, size| hvm_memmap_table_entry {
        addr,
        size,
        type_: MAP_RAM,
        reserved: 0,
    };
    let mut map = vec![ram(0, MP_TABLE)];
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

fn low_ram_end(memory: &Memory) -> u64 {
    memory.iter().next().map_or(0, |region| region.len())
}

fn write_error<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> Error {
    move |error| Error::Write {
        what,
        detail: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn segments_arrive_whole_however_they_are_aligned() {
        for address in [0x10_0000u64, 0x10_0123] {
            let memory = crate::memory::create(16 << 20).unwrap();
            let code: Vec<u8> = (0..3 * 4096 + 77).map(|n| (n % 251) as u8).collect();
            let (entry, end) = kernel(&memory, &file(&elf::tiny(&code, address))).unwrap();
            assert_eq!((entry, end), (address, address + code.len() as u64));
            let mut seen = vec![0u8; code.len() + 9];
            memory.read_slice(&mut seen, GuestAddress(address)).unwrap();
            assert_eq!(&seen[..code.len()], code);
            assert_eq!(&seen[code.len()..], [0; 9]);
        }
    }

    #[test]
    fn writing_guest_memory_leaves_the_kernel_file_alone() {
        let memory = crate::memory::create(16 << 20).unwrap();
        let image = file(&elf::tiny(&[7; 8192], HIGH_RAM));
        kernel(&memory, &image).unwrap();
        memory.write_slice(&[9; 8192], GuestAddress(HIGH_RAM)).unwrap();
        let mut byte = [0u8];
        std::os::unix::fs::FileExt::read_exact_at(&image, &mut byte, 0x1000).unwrap();
        assert_eq!(byte, [7]);
    }

    #[test]
    fn a_kernel_outside_memory_is_refused() {
        let memory = crate::memory::create(16 << 20).unwrap();
        for address in [0x1000, 16 << 20, (16 << 20) - 4] {
            let result = kernel(&memory, &file(&elf::tiny(&[0; 8], address)));
            assert!(matches!(result, Err(Error::Outside { .. })), "{address:#x}");
        }
    }

    #[test]
    fn devices_come_before_the_arguments_of_init() {
        let line = command_line("quiet -- single", &[(0xc000_1000, 5)]).unwrap();
        let text = line.as_cstring().unwrap().into_string().unwrap();
        assert_eq!(text, "quiet virtio_mmio.device=4K@0xc0001000:5 -- single");
        assert!(command_line(&"x".repeat(3000), &[]).is_err());
    }

    #[test]
    fn the_initrd_ends_low_memory() {
        let memory = crate::memory::create(16 << 20).unwrap();
        let (start, bytes) = initrd(&memory, &file(&[5; 5000]), HIGH_RAM).unwrap();
        assert_eq!((start, bytes), ((16 << 20) - 8192, 5000));
        assert!(matches!(
            initrd(&memory, &file(&[5; 5000]), 16 << 20),
            Err(Error::Initrd { .. })
        ));
    }
}
