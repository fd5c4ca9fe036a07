//! The memory of a parked VM: written to a file, and given back to the host.
//!
//! ```text
//! guest page          what it becomes                          and the page is
//! written to          its bytes in the park file               mapped from there, copy-on-write
//! never touched       nothing                                  a hole of the file, or left alone
//! from the kernel     nothing: it is the kernel file's still   left alone
//! ```
//!
//! The guest finds each page again at its first touch; the next time only pages that it has written to since
//! are written to the file. Which these are is in `/proc/self/pagemap`: a page of a private mapping that is no
//! file's page has been written to (Linux, admin-guide/mm/pagemap.rst, bits 61 to 63).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::Memory;

const PAGE: u64 = 4096;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_A_FILE: u64 = 1 << 61;
/// Entries of the page map that are read at once: 2 MiB of memory.
const BATCH: usize = 512;

/// Memory could not be given back; the VM goes on as it was.
#[derive(Debug, thiserror::Error)]
#[error("park file: {what}: {source}")]
pub struct Error {
    what: &'static str,
    source: io::Error,
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error { what, source }
}

/// What was given back.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Given {
    /// Bytes that were written to the file.
    pub written: u64,
    /// Bytes that the VM had in memory of its own and has no more.
    pub freed: u64,
}

/// Where a VM's memory goes.
pub struct ParkFile {
    file: File,
    pagemap: File,
    /// Its length: all of guest memory.
    bytes: u64,
    /// One bit a page: whether the file has bytes of it.
    stored: Vec<u64>,
}

/// Pages that are mapped anew from the file.
struct Run {
    host: *mut u8,
    bytes: u64,
    offset: u64,
}

/// What becomes of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Page {
    /// The guest has written to it.
    Own,
    /// Nobody has touched it since it was mapped, and its mapping is not the kernel's.
    Untouched,
    /// Its bytes are in a file, unchanged.
    Clean,
}

impl ParkFile {
    /// Parks `memory` in `file`. Must be made before the jail closes: it opens the page map.
    pub fn new(file: File, memory: &Memory) -> Result<Self, Error> {
        let bytes: u64 = memory.iter().map(|region| region.len()).sum();
        file.set_len(bytes).map_err(failed("setting its length"))?;
        let pagemap = File::open("/proc/self/pagemap").map_err(failed("opening /proc/self/pagemap"))?;
        Ok(Self {
            file,
            pagemap,
            bytes,
            stored: vec![0; usize::try_from(bytes / PAGE).unwrap_or(0).div_ceil(64)],
        })
    }

    /// Writes what the guest has written to and gives all memory back. Its vCPUs and devices must stand still. `kernel` is
    /// where pages may be a kernel file's.
    pub fn give_back(&mut self, memory: &Memory, kernel: &Range<u64>) -> Result<Given, Error> {
        let mut given = Given::default();
        let mut runs = Vec::new();
        let mut offset = 0;
        for region in memory.iter() {
            let start = region.start_addr().raw_value();
            let host = region.as_ptr();
            let (mut at, mut run) = (0, None::<Run>);
            while at < region.len() {
                let mut entries = [0u64; BATCH];
                let count = (BATCH as u64).min((region.len() - at) / PAGE) as usize;
                self.read_pagemap(host.wrapping_add(at as usize), &mut entries[..count])?;
                for entry in &entries[..count] {
                    let guest = start + at;
                    let here = host.wrapping_add(at as usize);
                    let page = classify(*entry, kernel.contains(&guest));
                    if page == Page::Own {
                        given.freed += PAGE;
                        given.written += self.store(here, offset + at)?;
                    }
                    match (&mut run, page) {
                        (run, Page::Clean) => runs.extend(run.take()),
                        (Some(run), _) => run.bytes += PAGE,
                        (run, _) => {
                            *run = Some(Run {
                                host: here,
                                bytes: PAGE,
                                offset: offset + at,
                            });
                        }
                    }
                    at += PAGE;
                }
            }
            runs.extend(run.take());
            offset += region.len();
        }
        // Nothing is mapped anew before everything is written: a full disk loses nothing.
        self.file.sync_data().map_err(failed("syncing it"))?;
        for run in &runs {
            self.map(run)?;
        }
        // SAFETY: no memory is involved. Advice only: what it does not drop, the host drops when it needs to.
        unsafe { libc::posix_fadvise(self.file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        Ok(given)
    }

    fn read_pagemap(&self, host: *const u8, entries: &mut [u64]) -> Result<(), Error> {
        let mut bytes = [0u8; BATCH * 8];
        let wanted = &mut bytes[..entries.len() * 8];
        self.pagemap
            .read_exact_at(wanted, host as u64 / PAGE * 8)
            .map_err(failed("reading /proc/self/pagemap"))?;
        for (entry, bytes) in entries.iter_mut().zip(wanted.as_chunks::<8>().0) {
            *entry = u64::from_ne_bytes(*bytes);
        }
        Ok(())
    }

    /// Writes one page at `offset`, unless it is zero and a hole already; returns the bytes written.
    fn store(&mut self, host: *const u8, offset: u64) -> Result<u64, Error> {
        let mut page = [0u8; PAGE as usize];
        // SAFETY: the page is mapped guest memory of this process; the guest stands still, and a copy is all that is made.
        unsafe { std::ptr::copy_nonoverlapping(host, page.as_mut_ptr(), page.len()) };
        let number = offset / PAGE;
        let (word, bit) = ((number / 64) as usize, 1u64 << (number % 64));
        let stored = self.stored.get_mut(word);
        if page.iter().all(|byte| *byte == 0) && stored.as_ref().is_none_or(|word| **word & bit == 0) {
            return Ok(0);
        }
        self.file
            .write_all_at(&page, offset)
            .map_err(failed("writing a page"))?;
        if let Some(word) = stored {
            *word |= bit;
        }
        Ok(PAGE)
    }

    fn map(&self, run: &Run) -> Result<(), Error> {
        // SAFETY: the run is whole pages of one region of guest memory, whose bytes the file has; MAP_FIXED replaces exactly
        // those, and no Rust reference points into guest memory.
        let mapped = unsafe {
            libc::mmap(
                run.host.cast(),
                run.bytes as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                self.file.as_raw_fd(),
                run.offset as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(failed("mapping it")(io::Error::last_os_error()));
        }
        Ok(())
    }

    /// Forgets what was stored: the guest starts anew.
    pub fn forget(&mut self) {
        self.stored.fill(0);
        // Holes again. If that fails the old bytes stay, and zeroes would be taken for holes over them: so say they are there.
        if self
            .file
            .set_len(0)
            .and_then(|()| self.file.set_len(self.bytes))
            .is_err()
        {
            self.stored.fill(u64::MAX);
        }
    }
}

fn classify(entry: u64, in_kernel: bool) -> Page {
    let own = entry & SWAPPED != 0 || entry & (PRESENT | OF_A_FILE) == PRESENT;
    match (own, entry & PRESENT != 0, in_kernel) {
        (true, ..) => Page::Own,
        // Outside the kernel a file's page can only be the park file's: mapping it once more changes nothing.
        (false, _, false) => Page::Untouched,
        (false, _, true) => Page::Clean,
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const NONE: Range<u64> = 0..0;

    fn resident(memory: &Memory, park: &ParkFile, page: u64) -> bool {
        let region = memory.iter().next().unwrap();
        let mut entry = [0];
        park.read_pagemap(region.as_ptr().wrapping_add((page * PAGE) as usize), &mut entry)
            .unwrap();
        entry[0] & PRESENT != 0
    }

    #[test]
    fn memory_is_given_back_and_comes_back() {
        let memory = crate::memory::create(16 << 20).unwrap();
        let mut park = ParkFile::new(tempfile::tempfile().unwrap(), &memory).unwrap();
        let put = |byte: u8, page: u64| {
            memory
                .write_slice(&[byte; 100], GuestAddress(page * PAGE))
                .unwrap()
        };
        let get = |page: u64| memory.read_obj::<u8>(GuestAddress(page * PAGE + 99)).unwrap();
        put(1, 0);
        put(2, 700);
        put(0, 900);
        let given = park.give_back(&memory, &NONE).unwrap();
        assert_eq!((given.written, given.freed), (2 * PAGE, 3 * PAGE));
        assert!(!resident(&memory, &park, 0) && !resident(&memory, &park, 700));
        assert_eq!((get(0), get(700), get(900), get(4095)), (1, 2, 0, 0));

        // Only what is written to afterwards is written again, zeroes over old bytes included.
        put(3, 1);
        put(0, 700);
        let given = park.give_back(&memory, &NONE).unwrap();
        assert_eq!((given.written, given.freed), (2 * PAGE, 2 * PAGE));
        assert_eq!((get(0), get(1), get(700)), (1, 3, 0));
        assert_eq!(park.give_back(&memory, &NONE).unwrap(), Given::default());

        crate::memory::clear(&memory).unwrap();
        park.forget();
        put(9, 2);
        assert_eq!(park.give_back(&memory, &NONE).unwrap().written, PAGE);
        assert_eq!((get(0), get(1), get(2), get(700)), (0, 0, 9, 0));
    }

    #[test]
    fn clean_pages_of_a_kernel_stay_the_kernel_files() {
        use crate::boot::elf;
        use std::io::Write;
        let memory = crate::memory::create(16 << 20).unwrap();
        let mut image = tempfile::tempfile().unwrap();
        image
            .write_all(&elf::tiny(&[7; 4 * PAGE as usize], 0x10_0000))
            .unwrap();
        let boot = crate::boot::loader::Boot {
            kernel: image,
            initrd: None,
            command_line: crate::boot::loader::command_line("", &[]).unwrap(),
            vcpus: 1,
            acpi: None,
        };
        let kernel = boot.load(&memory).unwrap().kernel;
        assert_eq!(kernel, 0x10_0000..0x10_0000 + 4 * PAGE);
        let mut park = ParkFile::new(tempfile::tempfile().unwrap(), &memory).unwrap();
        let get = |page: u64| {
            memory
                .read_obj::<u8>(GuestAddress(0x10_0000 + page * PAGE))
                .unwrap()
        };
        assert_eq!(get(1), 7);
        memory.write_obj(8u8, GuestAddress(0x10_0000 + 2 * PAGE)).unwrap();
        let before = park.give_back(&memory, &kernel).unwrap();
        assert_eq!((get(0), get(1), get(2), get(3)), (7, 7, 8, 7));
        assert!(before.freed >= PAGE);
        assert_eq!(park.give_back(&memory, &kernel).unwrap().written, 0);
    }
}
