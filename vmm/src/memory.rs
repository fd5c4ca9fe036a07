//! Guest memory: anonymous private mappings that cost nothing until they are touched.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::boot::layout::{MMIO_HOLE, RAM_ABOVE_HOLE};

/// Guest memory as the whole monitor uses it.
pub type Memory = GuestMemoryMmap<()>;

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

#[cfg(test)]
mod tests {
    use super::*;

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
