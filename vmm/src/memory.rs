//! Guest memory: anonymous private mappings that cost nothing until they are touched.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice};

use crate::boot::layout::{MMIO_HOLE, RAM_ABOVE_HOLE};

/// Guest memory as the whole monitor uses it.
pub type Memory = GuestMemoryMmap<()>;

/// The host's page.
const HOST_PAGE: usize = 4096;

/// Guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused the mapping.
    #[error("mapping {bytes} bytes of guest memory: {source}")]
    Map {
        /// Bytes asked for.
        bytes: u64,
        /// What the host said.
        source: vm_memory::mmap::FromRangesError,
    },
    /// The host refused new pages.
    #[error("clearing {bytes} bytes of guest memory: {source}")]
    Clear {
        /// Size of the region.
        bytes: u64,
        /// What the host said.
        source: std::io::Error,
    },
    /// KVM refused the memory.
    #[error("KVM_SET_USER_MEMORY_REGION at {address:#x}, {bytes} bytes: {source}")]
    Region {
        /// Guest-physical address.
        address: u64,
        /// Size of the region.
        bytes: u64,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
}

/// The guest-physical ranges of `bytes` of RAM: below the hole for devices, and above it.
pub fn ranges(bytes: u64) -> Vec<(GuestAddress, usize)> {
    let low = bytes.min(MMIO_HOLE);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if bytes > low {
        ranges.push((GuestAddress(RAM_ABOVE_HOLE), (bytes - low) as usize));
    }
    ranges
}

/// Maps `bytes` of RAM (private, not reserved, untouched).
pub fn create(bytes: u64) -> Result<Memory, Error> {
    Memory::from_ranges(&ranges(bytes)).map_err(|source| Error::Map { bytes, source })
}

/// Lets the host back the memory by huge pages where it finds some.
pub fn prefer_huge_pages(memory: &Memory) {
    for region in memory.iter() {
        // SAFETY: advice about a live mapping of this process; its bytes stay. A host without huge pages refuses, and
        // small ones are as good.
        unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, libc::MADV_HUGEPAGE) };
    }
}

/// `KVM_PRE_FAULT_MEMORY` (Linux 6.11, Documentation/virt/kvm/api.rst, 4.143).
const KVM_PRE_FAULT_MEMORY: libc::c_ulong = 0xc040_aed5;

/// Enters what the host has of `range` in the guest's page tables at once: each page would be an exit of its own when
/// the guest touches it first. What the host lacks, or a host that cannot, costs nothing but those exits.
pub fn map_ahead(vcpu: &kvm_ioctls::VcpuFd, range: std::ops::Range<u64>) {
    use std::os::fd::AsRawFd;
    const PAGE: u64 = 4096;
    let gpa = range.start / PAGE * PAGE;
    let mut request = kvm_bindings::kvm_pre_fault_memory {
        gpa,
        size: (range.end - gpa).next_multiple_of(PAGE),
        ..Default::default()
    };
    // KVM stops at signals and says how far it came; a refusal ends it.
    while request.size > 0 {
        let before = request.size;
        // SAFETY: the call reads and writes one structure of this type.
        let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_PRE_FAULT_MEMORY, &raw mut request) };
        if result != 0 || request.size == before {
            break;
        }
    }
}

/// Makes all of the memory what it was at first: zeroes that cost nothing.
pub fn clear(memory: &Memory) -> Result<(), Error> {
    // Mapped anew rather than given up page by page: parts of it may be mappings of a kernel's file.
    for region in memory.iter() {
        let (start, bytes) = (region.as_ptr(), region.len());
        // SAFETY: the region is a live mapping of this length that this process made for the guest; MAP_FIXED replaces
        // exactly it, and no Rust reference points into guest RAM.
        let mapped = unsafe {
            libc::mmap(
                start.cast(),
                bytes as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            let source = std::io::Error::last_os_error();
            return Err(Error::Clear { bytes, source });
        }
    }
    Ok(())
}

/// Gives the memory to the VM, one slot a region.
pub fn register(vm: &kvm_ioctls::VmFd, memory: &Memory) -> Result<(), Error> {
    use vm_memory::Address;
    for (slot, region) in memory.iter().enumerate() {
        let (address, bytes) = (region.start_addr().raw_value(), region.len());
        let kvm_region = kvm_bindings::kvm_userspace_memory_region {
            slot: slot as u32,
            guest_phys_addr: address,
            memory_size: bytes,
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the region is a live mapping of `bytes` bytes; it outlives the VM, because the process ends
        // without unmapping it, and nothing else of this process lies in it.
        unsafe { vm.set_user_memory_region(kvm_region) }.map_err(|source| Error::Region {
            address,
            bytes,
            source,
        })?;
    }
    Ok(())
}

/// Whether all of `bytes` at `address` is RAM.
pub fn contains(memory: &Memory, address: GuestAddress, bytes: u64) -> bool {
    usize::try_from(bytes).is_ok_and(|bytes| memory.check_range(address, bytes))
}

/// Gives a range of RAM back to the host, region by region, as [`discard`] does. Fails where it is not all RAM.
pub fn discard_range(memory: &Memory, address: GuestAddress, bytes: u64) -> std::io::Result<()> {
    let bytes = usize::try_from(bytes).map_err(std::io::Error::other)?;
    for slice in memory.get_slices(address, bytes) {
        discard(&slice.map_err(std::io::Error::other)?)?;
    }
    Ok(())
}

/// Gives the whole pages of a piece of guest memory back to the host: the next touch finds what the mapping has beneath,
/// zeroes or a file's bytes. Returns how many bytes that were.
pub fn discard(slice: &VolatileSlice) -> std::io::Result<u64> {
    let start = slice.ptr_guard_mut();
    let address = start.as_ptr() as usize;
    let skipped = address.next_multiple_of(HOST_PAGE) - address;
    let bytes = slice.len().saturating_sub(skipped) / HOST_PAGE * HOST_PAGE;
    if bytes == 0 {
        return Ok(0);
    }
    // SAFETY: whole pages inside the slice, which is mapped memory that no Rust reference points into; the mapping
    // stays, only its contents go.
    let result = unsafe {
        libc::madvise(
            start.as_ptr().wrapping_add(skipped).cast(),
            bytes,
            libc::MADV_DONTNEED,
        )
    };
    match result {
        0 => Ok(bytes as u64),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn only_whole_pages_of_a_range_are_given_back() {
        let memory = create(16 << 20).unwrap();
        memory
            .write_slice(&[7; 4 * 4096], GuestAddress(0x10_0000))
            .unwrap();
        discard_range(&memory, GuestAddress(0x10_0001), 3 * 4096).unwrap();
        let mut seen = vec![0; 4 * 4096];
        memory.read_slice(&mut seen, GuestAddress(0x10_0000)).unwrap();
        assert_eq!(seen[..4096], [7; 4096]);
        assert_eq!(seen[4096..3 * 4096], [0; 2 * 4096]);
        assert_eq!(seen[3 * 4096..], [7; 4096]);
        assert!(discard_range(&memory, GuestAddress((16 << 20) - 4096), 8192).is_err());
    }

    #[test]
    fn a_range_over_adjacent_regions_is_given_back_whole() {
        let parts = [(GuestAddress(0), 8192), (GuestAddress(8192), 8192)];
        let memory = Memory::from_ranges(&parts).unwrap();
        memory.write_slice(&[7; 4 * 4096], GuestAddress(0)).unwrap();
        assert!(contains(&memory, GuestAddress(4096), 8192));
        discard_range(&memory, GuestAddress(4096), 8192).unwrap();
        let mut seen = vec![0; 4 * 4096];
        memory.read_slice(&mut seen, GuestAddress(0)).unwrap();
        assert_eq!(seen[4096..3 * 4096], [0; 2 * 4096]);
        assert_eq!((seen[0], seen[3 * 4096]), (7, 7));
        assert!(!contains(&memory, GuestAddress(4096), 4 * 4096));
    }

    #[test]
    fn memory_goes_round_the_hole() {
        assert_eq!(ranges(128 << 20), vec![(GuestAddress(0), 128 << 20)]);
        assert_eq!(ranges(MMIO_HOLE), vec![(GuestAddress(0), MMIO_HOLE as usize)]);
        assert_eq!(
            ranges(MMIO_HOLE + 4096),
            vec![
                (GuestAddress(0), MMIO_HOLE as usize),
                (GuestAddress(RAM_ABOVE_HOLE), 4096)
            ]
        );
    }
}
