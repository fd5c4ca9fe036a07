//! A file in the guest's address space.
//!
//! ```text
//!  guest:  ... RAM | up to 1 GiB | window 0 | window 1 | ...     2 MiB aligned, up to the CPU's last address
//!                                    |
//!  monitor:  | the file's pages, MAP_SHARED | zeroes up to 2 MiB, private |
//! ```
//!
//! The guest's loads and stores go to the host's page cache: nothing is copied, and all VMs that map one file share its
//! pages. The window is no part of the guest's RAM as devices know it: no queue and no buffer may lie in it, so that
//! a device never writes to a file that is another's too, or faults on one that became shorter.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use kvm_bindings::{CpuId, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestMemoryBackend};

use crate::boot::layout::{PMEM_ALIGNMENT, pmem_window};
use crate::memory::Memory;

/// Address bits of a CPU that does not say (the first x86-64 with PAE).
const LEAST_ADDRESS_BITS: u32 = 36;
/// The CPUID leaf that says: physical bits in EAX 7..0, a guest's, if fewer can be mapped, in 23..16 (KVM since 6.10).
const ADDRESS_BITS_LEAF: u32 = 0x8000_0008;

/// A file cannot be the guest's memory.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Nothing is in it.
    #[error("pmem {id}: the file is empty; allowed: 1 byte or more")]
    Empty {
        /// Which device.
        id: String,
    },
    /// The address space ends before it.
    #[error(
        "pmem {id}: {bytes} bytes at {start:#x} end above this host's last guest-physical address {last:#x}"
    )]
    TooLarge {
        /// Which device.
        id: String,
        /// Bytes wanted.
        bytes: u64,
        /// Where they would begin.
        start: u64,
        /// The last address.
        last: u64,
    },
    /// The host failed.
    #[error("pmem {id}: {what}: {source}")]
    Host {
        /// Which device.
        id: String,
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// KVM refused it.
    #[error("pmem {id}: KVM_SET_USER_MEMORY_REGION at {start:#x}, {bytes} bytes: {source}")]
    Kvm {
        /// Which device.
        id: String,
        /// Guest-physical address.
        start: u64,
        /// Size.
        bytes: u64,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
}

/// Gives out windows above RAM.
pub struct Space {
    next: u64,
    last: u64,
    slot: u32,
}

impl Space {
    /// The space above `memory` on a CPU that `cpuid` describes.
    pub fn above(memory: &Memory, cpuid: &CpuId) -> Self {
        Self {
            next: pmem_window(memory.last_addr().raw_value()),
            last: last_address(cpuid),
            slot: memory.num_regions() as u32,
        }
    }

    /// Maps `file` and gives it to the guest; returns where. The mapping lives as long as the process.
    pub fn map(&mut self, vm: &VmFd, id: &str, file: &File, read_only: bool) -> Result<Range<u64>, MapError> {
        let host = |what| {
            let id = id.to_owned();
            move |source| MapError::Host { id, what, source }
        };
        let bytes = file.metadata().map_err(host("the file's size"))?.len();
        if bytes == 0 {
            return Err(MapError::Empty { id: id.to_owned() });
        }
        let window = self.place(id, bytes)?;
        if !read_only {
            // A store to a hole while the disk is full would be a bus error in the middle of the guest.
            match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
                Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
                Err(error) => return Err(host("allocating the file's blocks")(error.into())),
            }
        }
        let size = window.end - window.start;
        let base = map(file, bytes, size, read_only).map_err(host("mmap"))?;
        let region = kvm_userspace_memory_region {
            slot: self.slot,
            guest_phys_addr: window.start,
            memory_size: size,
            userspace_addr: base as u64,
            flags: if read_only { KVM_MEM_READONLY } else { 0 },
        };
        // SAFETY: the region is a live mapping of `size` bytes that is never unmapped, and nothing else of this
        // process lies in it.
        unsafe { vm.set_user_memory_region(region) }.map_err(|source| MapError::Kvm {
            id: id.to_owned(),
            start: window.start,
            bytes: size,
            source,
        })?;
        self.slot += 1;
        self.next = window.end;
        Ok(window)
    }

    fn place(&self, id: &str, bytes: u64) -> Result<Range<u64>, MapError> {
        let start = self.next;
        let end = bytes
            .checked_next_multiple_of(PMEM_ALIGNMENT)
            .and_then(|size| start.checked_add(size));
        match end {
            Some(end) if end - 1 <= self.last => Ok(start..end),
            _ => Err(MapError::TooLarge {
                id: id.to_owned(),
                bytes,
                start,
                last: self.last,
            }),
        }
    }
}

/// The last address that the guest's CPU can use.
fn last_address(cpuid: &CpuId) -> u64 {
    let leaf = cpuid
        .as_slice()
        .iter()
        .find(|entry| entry.function == ADDRESS_BITS_LEAF);
    let eax = leaf.map_or(0, |entry| entry.eax);
    let bits = match (eax & 0xff, eax >> 16 & 0xff) {
        (0, _) => LEAST_ADDRESS_BITS,
        (bits, 0) => bits,
        (bits, guest) => bits.min(guest),
    };
    1u64.checked_shl(bits).map_or(u64::MAX, |end| end - 1)
}

/// Maps `bytes` of `file` and zeroes after them up to `size`, aligned so that huge pages fit.
fn map(file: &File, bytes: u64, size: u64, read_only: bool) -> io::Result<*mut u8> {
    let too_large = |_| io::Error::from(io::ErrorKind::OutOfMemory);
    let (bytes, size) = (
        usize::try_from(bytes).map_err(too_large)?,
        usize::try_from(size).map_err(too_large)?,
    );
    let alignment = PMEM_ALIGNMENT as usize;
    let zeroes = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let access = if read_only {
        libc::PROT_READ
    } else {
        libc::PROT_READ | libc::PROT_WRITE
    };
    // SAFETY: new memory where the kernel likes it; what is over on both sides costs addresses only.
    let reserved = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size.saturating_add(alignment),
            libc::PROT_NONE,
            zeroes,
            -1,
            0,
        )
    };
    if reserved == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let skipped = (reserved as usize).next_multiple_of(alignment) - reserved as usize;
    let base = reserved.cast::<u8>().wrapping_add(skipped);
    for (length, flags, fd) in [(size, zeroes, -1), (bytes, libc::MAP_SHARED, file.as_raw_fd())] {
        // SAFETY: replaces pages of the reservation just made, which nobody else knows.
        let mapped = unsafe { libc::mmap(base.cast(), length, access, flags | libc::MAP_FIXED, fd, 0) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(base)
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;
    use std::io::Write;
    use vm_memory::VolatileSlice;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn cpuid(eax: u32) -> CpuId {
        let entry = kvm_cpuid_entry2 {
            function: ADDRESS_BITS_LEAF,
            eax,
            ..Default::default()
        };
        CpuId::from_entries(&[entry]).unwrap()
    }

    #[test]
    fn address_bits_are_the_cpus_or_the_guests() {
        assert_eq!(last_address(&cpuid(0x3028)), (1 << 40) - 1);
        assert_eq!(last_address(&cpuid(48 << 16 | 52)), (1 << 48) - 1);
        assert_eq!(last_address(&cpuid(64)), u64::MAX);
        assert_eq!(last_address(&CpuId::new(0).unwrap()), (1 << 36) - 1);
    }

    #[test]
    fn windows_lie_above_ram_and_below_the_last_address() {
        let memory = crate::memory::create(16 * MIB).unwrap();
        let mut space = Space::above(&memory, &cpuid(33));
        assert_eq!(space.slot, 1);
        let first = space.place("a", 1).unwrap();
        assert_eq!(first, 0x1_0000_0000..0x1_0020_0000);
        space.next = first.end;
        assert_eq!(
            space.place("b", 2 * MIB + 1).unwrap(),
            0x1_0020_0000..0x1_0060_0000
        );
        let left = (1 << 33) - first.end;
        assert!(space.place("c", left).is_ok());
        for bytes in [left + 1, u64::MAX] {
            let error = space.place("c", bytes).unwrap_err().to_string();
            assert!(
                error.contains("pmem c") && error.contains("0x1ffffffff"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_file_is_mapped_whole_with_zeroes_behind() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        for read_only in [true, false] {
            let base = map(&file, 5000, 2 * MIB, read_only).unwrap();
            assert_eq!(base as u64 % (2 * MIB), 0);
            // SAFETY: the mapping just made.
            let memory = unsafe { VolatileSlice::new(base, 2 << 20) };
            let mut seen = vec![0u8; 2 << 20];
            memory.copy_to(&mut seen[..]);
            assert!(seen[..5000].iter().all(|byte| *byte == 7));
            assert!(seen[5000..].iter().all(|byte| *byte == 0));
            if !read_only {
                memory.copy_from(&[9u8; 10]);
            }
        }
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 9).unwrap();
        assert_eq!(byte, [9]);
    }
}
