//! Kernel, initial RAM disk, command line and tables into guest memory: everything that the guest finds at its
//! first instruction.
//!
//! The kernel's segments are mapped copy-on-write from its file wherever file and memory agree modulo the
//! page size: nothing is copied, the pages that no sliver writes are shared by all slivers of the node, and
//! pages that the guest never touches are never read. The rest (the ends of segments) is read.

use std::fs::File;
use std::io::Seek;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use linux_loader::cmdline::Cmdline;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile, VolatileSlice};

use crate::boot::image::{self, Entry, Image, Segment};
use crate::boot::layout::{ACPI_TABLES, COMMAND_LINE, COMMAND_LINE_SIZE, HIGH_RAM, MMIO_WINDOW, MP_TABLE};
use crate::boot::memory_map::{Range, low_ram_end};
use crate::boot::{acpi, linux64, memory_map, mptable, pvh};
use crate::devices::generation::GenerationId;
use crate::memory::Memory;

const PAGE: u64 = 4096;

/// Something could not be put in guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image is no kernel.
    #[error(transparent)]
    Image(#[from] image::Error),
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
        "initial RAM disk of {bytes} bytes does not fit above the kernel's end {kernel_end:#x} and below {high:#x}: give the machine more memory"
    )]
    Initrd {
        /// Its size.
        bytes: u64,
        /// Where the kernel ends.
        kernel_end: u64,
        /// End of low RAM, or what the kernel can reach.
        high: u64,
    },
    /// The kernel takes a shorter command line.
    #[error("kernel command line of {bytes} bytes with the devices: this kernel takes {allowed}")]
    CommandLineTooLong {
        /// Its size.
        bytes: usize,
        /// The image's `cmdline_size`.
        allowed: u32,
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
    /// Too many of something for ACPI.
    #[error(transparent)]
    Acpi(#[from] acpi::TablesTooLong),
}

/// What is loaded at the guest's start, and once more when it reboots.
pub struct Boot {
    /// The kernel image.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The command line, with the devices.
    pub command_line: Cmdline,
    /// vCPUs.
    pub vcpus: u8,
    /// What ACPI tells of; without it the guest is told of its hardware by the MP table and the command line.
    pub acpi: Option<Acpi>,
}

/// What ACPI tells of beyond the vCPUs.
pub struct Acpi {
    /// Virtio devices: (window, interrupt line).
    pub devices: Vec<(u64, u32)>,
    /// The VM generation id.
    pub generation: Arc<GenerationId>,
}

/// What the guest has to find, by either protocol.
pub(super) struct Found<'a> {
    /// Its memory.
    pub map: &'a [Range],
    /// Where the initial RAM disk lies and its size.
    pub initrd: Option<(u64, u64)>,
    /// Where ACPI's root pointer lies.
    pub rsdp: Option<u64>,
}

impl Boot {
    /// Loads everything into `memory`, which must be clear.
    pub fn load(&self, memory: &Memory) -> Result<Loaded, Error> {
        let image = image::read(&self.kernel)?;
        let kernel_end = kernel(memory, &self.kernel, &image)?;
        let initrd = self
            .initrd
            .as_ref()
            .map(|file| initrd(memory, file, kernel_end, initrd_limit(&image)))
            .transpose()?;

        let line = self
            .command_line
            .as_cstring()
            .map_err(|source| Error::CommandLine { bytes: 0, source })?;
        let bytes = line.as_bytes().len();
        if let Some(header) = image.header
            && bytes > header.cmdline_size as usize
        {
            let allowed = header.cmdline_size;
            return Err(Error::CommandLineTooLong { bytes, allowed });
        }
        memory
            .write_slice(line.as_bytes_with_nul(), GuestAddress(COMMAND_LINE))
            .map_err(write_error("command line"))?;
        let rsdp = match &self.acpi {
            None => {
                memory
                    .write_slice(&mptable::build(self.vcpus)?, GuestAddress(MP_TABLE))
                    .map_err(write_error("MP table"))?;
                None
            }
            Some(acpi) => {
                memory
                    .write_slice(
                        &acpi::build(self.vcpus, &acpi.devices)?,
                        GuestAddress(ACPI_TABLES),
                    )
                    .map_err(write_error("ACPI tables"))?;
                acpi.generation.write().map_err(write_error("VM generation id"))?;
                Some(ACPI_TABLES)
            }
        };
        let found = Found {
            map: &memory_map::build(memory, rsdp.is_some()),
            initrd,
            rsdp,
        };
        match image.entry {
            Entry::Pvh { .. } => pvh::write(memory, &found)?,
            Entry::Linux64 { .. } => linux64::write(memory, &found, image.header, kernel_end)?,
        }
        Ok(Loaded {
            entry: image.entry,
            kernel: HIGH_RAM..kernel_end,
            image: from_file(&image),
        })
    }
}

/// What was loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// Where the boot processor starts.
    pub entry: Entry,
    /// Where pages of guest memory may be the kernel file's.
    pub kernel: std::ops::Range<u64>,
    /// What of it the file has.
    pub image: std::ops::Range<u64>,
}

/// From the first byte that the file has of a kernel to the last.
fn from_file(image: &Image) -> std::ops::Range<u64> {
    let starts = image.segments.iter().map(|segment| segment.address);
    let ends = image
        .segments
        .iter()
        .map(|segment| segment.address + segment.file_bytes);
    starts.min().unwrap_or(0)..ends.max().unwrap_or(0)
}

/// The first address that an initial RAM disk may not use.
fn initrd_limit(image: &Image) -> u64 {
    image
        .header
        .map_or(u64::MAX, |header| u64::from(header.initrd_addr_max) + 1)
}

/// Loads the kernel; returns the first address after it.
fn kernel(memory: &Memory, file: &File, image: &Image) -> Result<u64, Error> {
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
    Ok(kernel_end)
}

/// Maps the whole pages of a segment from the file; returns how many bytes that covers.
fn map_segment(memory: &Memory, file: &File, segment: &Segment) -> Result<u64, Error> {
    let bytes = segment.file_bytes / PAGE * PAGE;
    // Host and guest pages agree because regions are page-aligned on both sides.
    if bytes == 0 || !segment.address.is_multiple_of(PAGE) || !segment.offset.is_multiple_of(PAGE) {
        return Ok(0);
    }
    // A page that the file does not have could be mapped all the same, and the first touch would be fatal.
    image::read_at(file, &mut [0], segment.offset + bytes - 1)?;
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
fn read_rest(memory: &Memory, file: &File, segment: &Segment, done: u64) -> Result<(), Error> {
    let mut offset = segment.offset + done;
    let mut address = segment.address + done;
    let mut left = segment.file_bytes - done;
    let mut buffer = vec![0u8; left.min(64 << 10) as usize];
    while left > 0 {
        let now = left.min(buffer.len() as u64) as usize;
        std::os::unix::fs::FileExt::read_exact_at(file, &mut buffer[..now], offset).map_err(|source| {
            image::Error::Read {
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

/// Loads the initial RAM disk at the end of the low RAM below `limit`; returns where it lies and its size.
fn initrd(memory: &Memory, mut file: &File, kernel_end: u64, limit: u64) -> Result<(u64, u64), Error> {
    // By seeking, which the monitor may still do when a guest reboots.
    let bytes = file
        .seek(std::io::SeekFrom::End(0))
        .map_err(write_error("initial RAM disk"))?;
    let high = low_ram_end(memory).min(limit);
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

pub(super) fn write_error<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> Error {
    move |error| Error::Write {
        what,
        detail: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::boot::{bzimage, elf};

    fn load_kernel(memory: &Memory, file: &File) -> Result<u64, Error> {
        kernel(memory, file, &image::read(file)?)
    }

    fn boot(kernel: &[u8], initrd: Option<&[u8]>, line: &str) -> Boot {
        Boot {
            kernel: file(kernel),
            initrd: initrd.map(file),
            command_line: command_line(line, &[]).unwrap(),
            vcpus: 1,
            acpi: None,
        }
    }

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
            let end = load_kernel(&memory, &file(&elf::tiny(&code, address))).unwrap();
            assert_eq!(end, address + code.len() as u64);
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
        load_kernel(&memory, &image).unwrap();
        memory.write_slice(&[9; 8192], GuestAddress(HIGH_RAM)).unwrap();
        let mut byte = [0u8];
        std::os::unix::fs::FileExt::read_exact_at(&image, &mut byte, 0x1000).unwrap();
        assert_eq!(byte, [7]);
    }

    #[test]
    fn a_segment_longer_than_the_file_is_refused() {
        let memory = crate::memory::create(16 << 20).unwrap();
        let mut image = elf::tiny(&[7; 8192], HIGH_RAM);
        image.truncate(0x2fff);
        assert!(matches!(
            load_kernel(&memory, &file(&image)),
            Err(Error::Image(image::Error::Read { offset: 0x2fff, .. }))
        ));
    }

    #[test]
    fn a_kernel_outside_memory_is_refused() {
        let memory = crate::memory::create(16 << 20).unwrap();
        for address in [0x1000, 16 << 20, (16 << 20) - 4] {
            let result = load_kernel(&memory, &file(&elf::tiny(&[0; 8], address)));
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
    fn the_initrd_ends_the_memory_that_the_kernel_can_reach() {
        const SIZE: u64 = 16 << 20;
        let memory = crate::memory::create(SIZE).unwrap();
        let disk = file(&[5; 5000]);
        let load = |kernel_end, limit| initrd(&memory, &disk, kernel_end, limit);
        assert_eq!(load(HIGH_RAM, u64::MAX).unwrap(), (SIZE - 8192, 5000));
        assert_eq!(load(HIGH_RAM, 0x20_0000).unwrap(), (0x20_0000 - 8192, 5000));
        assert_eq!(load(SIZE - 8192, u64::MAX).unwrap(), (SIZE - 8192, 5000));
        for (kernel_end, limit) in [(SIZE - 8191, u64::MAX), (HIGH_RAM, HIGH_RAM + 1), (HIGH_RAM, 1)] {
            assert!(matches!(load(kernel_end, limit), Err(Error::Initrd { .. })));
        }
    }

    #[test]
    fn a_bzimage_gets_the_room_that_it_unpacks_itself_in() {
        let memory = crate::memory::create(16 << 20).unwrap();
        let load = |address| boot(&bzimage::tiny(&[0xf4; 9000], address), Some(&[5; 5000]), "").load(&memory);
        assert_eq!(load(0x20_0000).unwrap().entry, Entry::Linux64 { rip: 0x20_0200 });
        let mut seen = [0u8; 0x210];
        memory.read_slice(&mut seen, GuestAddress(0x20_0000)).unwrap();
        assert_eq!((seen[0x1ff], seen[0x200]), (0, 0xf4));
        // Its init_size is a MiB: there is none left for the initial RAM disk, or not even for itself.
        assert!(matches!(load(0xf0_0000), Err(Error::Initrd { .. })));
        assert!(matches!(load(0x100_0000), Err(Error::Outside { .. })));
    }

    #[test]
    fn a_command_line_is_as_long_as_the_kernel_takes() {
        let memory = crate::memory::create(16 << 20).unwrap();
        let mut image = bzimage::tiny(&[0xf4], 0x20_0000);
        image[0x238..0x23c].copy_from_slice(&7u32.to_le_bytes());
        assert!(boot(&image, None, "console").load(&memory).is_ok());
        let error = boot(&image, None, "console=").load(&memory).unwrap_err();
        assert_eq!(
            error.to_string(),
            "kernel command line of 8 bytes with the devices: this kernel takes 7"
        );
    }
}
