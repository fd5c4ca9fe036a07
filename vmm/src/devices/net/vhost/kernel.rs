//! The host kernel's half: `/dev/vhost-net`.
//!
//! The requests are the `vhost` crate's; its own `Net` opens the device by path, which a jailed monitor has not, so
//! this one takes a descriptor.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::devices::net::vhost::Error;
use crate::memory::Memory;

/// A vhost-net descriptor that this process owns and that knows guest memory.
pub struct Kernel {
    file: File,
    memory: Arc<Memory>,
}

impl Kernel {
    /// Takes ownership of `file`, an open `/dev/vhost-net` that nobody else has used, and shows it `memory`.
    pub fn new(file: File, memory: &Memory) -> Result<Self, Error> {
        let kernel = Self {
            file,
            memory: Arc::new(memory.clone()),
        };
        let failed = |what| move |source| Error { what, source };
        kernel
            .set_owner()
            .map_err(failed("VHOST_SET_OWNER (is it /dev/vhost-net, and unused?)"))?;
        let regions: Vec<VhostUserMemoryRegionInfo> = memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                mmap_offset: 0,
                mmap_handle: -1,
            })
            .collect();
        kernel
            .set_mem_table(&regions)
            .map_err(failed("VHOST_SET_MEM_TABLE"))?;
        Ok(kernel)
    }
}

impl AsRawFd for Kernel {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl VhostKernBackend for Kernel {
    type AS = Arc<Memory>;

    fn mem(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Each ring as a whole in one region: the host's addresses run on within a region only (sizes: virtio 1.2, 2.7).
    fn is_valid(&self, rings: &VringConfigData) -> bool {
        let size = usize::from(rings.queue_size);
        let inside = |address, bytes| self.memory.get_slice(GuestAddress(address), bytes).is_ok();
        size.is_power_of_two()
            && rings.queue_size <= rings.queue_max_size
            && inside(rings.desc_table_addr, 16 * size)
            && inside(rings.avail_ring_addr, 6 + 2 * size)
            && inside(rings.used_ring_addr, 6 + 8 * size)
    }
}

impl vhost::net::VhostNet for Kernel {
    fn set_backend(&self, queue: usize, tap: Option<&File>) -> vhost::Result<()> {
        let backend = vhost_vring_file {
            index: queue as u32,
            fd: tap.map_or(-1, AsRawFd::as_raw_fd),
        };
        // SAFETY: VHOST_NET_SET_BACKEND reads one vhost_vring_file.
        match unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &backend) } {
            0.. => Ok(()),
            _ => Err(vhost::Error::IoctlError(std::io::Error::last_os_error())),
        }
    }
}

#[cfg(test)]
mod tests {
    use vhost::vhost_kern::vhost_binding::*;

    use crate::jail::seccomp::ioctl;

    #[test]
    fn the_filters_know_the_requests() {
        for (value, number) in [
            (ioctl::VHOST_SET_FEATURES, VHOST_SET_FEATURES()),
            (ioctl::VHOST_SET_VRING_NUM, VHOST_SET_VRING_NUM()),
            (ioctl::VHOST_SET_VRING_ADDR, VHOST_SET_VRING_ADDR()),
            (ioctl::VHOST_SET_VRING_BASE, VHOST_SET_VRING_BASE()),
            (ioctl::VHOST_GET_VRING_BASE, VHOST_GET_VRING_BASE()),
            (ioctl::VHOST_SET_VRING_KICK, VHOST_SET_VRING_KICK()),
            (ioctl::VHOST_SET_VRING_CALL, VHOST_SET_VRING_CALL()),
            (ioctl::VHOST_SET_VRING_ERR, VHOST_SET_VRING_ERR()),
            (ioctl::VHOST_NET_SET_BACKEND, VHOST_NET_SET_BACKEND()),
        ] {
            assert_eq!(value.number, number, "{}", value.name);
        }
    }
}
