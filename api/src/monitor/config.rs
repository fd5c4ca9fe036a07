//! What a VM is made of: the configuration file and the bodies of the requests that configure.

use serde::{Deserialize, Serialize};

#[allow(unused_imports, reason = "for the documentation")]
use super::{FD_PREFIX, VSOCK_OUT_FD};
use super::{Logger, Metrics, Serial};

/// The configuration file (`--config-file`), Firecracker's shape.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Kernel and command line.
    #[serde(rename = "boot-source")]
    pub boot_source: BootSource,
    /// CPUs and memory.
    #[serde(rename = "machine-config", default)]
    pub machine_config: MachineConfig,
    /// Block devices: the guest sees them as vda, vdb, ... in this order.
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// Network interfaces: the guest sees them as eth0, eth1, ... in this order.
    #[serde(rename = "network-interfaces", default)]
    pub network_interfaces: Vec<NetworkInterface>,
    /// The stream socket device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// The entropy device; absent means none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    /// The memory balloon; absent means none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// Persistent memory devices: the guest sees them as pmem0, pmem1, ... in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pmem: Vec<Pmem>,
    /// How an idle VM gives its memory back (ours).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub park: Option<Park>,
    /// Where the log goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    /// Where the metrics go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    /// Where the console's output goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
}

/// What to boot.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// Path of an ELF `vmlinux` or a `bzImage`, or `fd:NAME`.
    pub kernel_image_path: String,
    /// Kernel command line; the monitor appends a `virtio_mmio.device=` for each device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
    /// Path of an initial RAM disk, or `fd:NAME`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<String>,
}

/// CPUs and memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpu_count: u8,
    /// Guest memory in MiB.
    pub mem_size_mib: u64,
    /// Simultaneous multithreading shown to the guest: only `false` is supported.
    #[serde(default)]
    pub smt: bool,
    /// Log the pages that the guest dirties: only `false` is supported.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// The pages that back guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// How the guest is told of its hardware (ours).
    #[serde(default)]
    pub hardware: Hardware,
    /// Accepted for Firecracker's clients: only `None` is supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
}

/// `PATCH /machine-config`: what is absent stays.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct MachineConfigPatch {
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpu_count: Option<u8>,
    /// Guest memory in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_size_mib: Option<u64>,
    /// Simultaneous multithreading shown to the guest: only `false` is supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smt: Option<bool>,
    /// Log the pages that the guest dirties: only `false` is supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
    /// The pages that back guest memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<HugePages>,
    /// How the guest is told of its hardware (ours).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hardware: Option<Hardware>,
    /// Accepted for Firecracker's clients: only `None` is supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
}

impl MachineConfigPatch {
    /// Changes `config` where this has something to say.
    pub fn apply(&self, config: &mut MachineConfig) {
        fn set<T: Clone>(to: &mut T, from: Option<&T>) {
            if let Some(from) = from {
                to.clone_from(from);
            }
        }
        set(&mut config.vcpu_count, self.vcpu_count.as_ref());
        set(&mut config.mem_size_mib, self.mem_size_mib.as_ref());
        set(&mut config.smt, self.smt.as_ref());
        set(&mut config.track_dirty_pages, self.track_dirty_pages.as_ref());
        set(&mut config.huge_pages, self.huge_pages.as_ref());
        set(&mut config.hardware, self.hardware.as_ref());
        config.cpu_template = self.cpu_template.or(config.cpu_template);
    }
}

/// The CPU that the guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
pub enum CpuTemplate {
    /// The host's, less what a VM cannot have.
    None,
}

/// The pages that back guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
pub enum HugePages {
    /// Pages of 4 KiB (the default: a small sliver touches little).
    #[default]
    None,
    /// Huge pages where the host's kernel finds some (`MADV_HUGEPAGE`).
    Transparent,
}

/// How the guest is told of its hardware (ours).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Hardware {
    /// An MP table and a `virtio_mmio.device=` for each device on the command line: the fastest start.
    #[default]
    MpTable,
    /// ACPI tables (hardware-reduced): for kernels without `CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES`.
    Acpi,
}

/// Most vCPUs that one VM may have.
pub const MAX_VCPUS: u8 = 32;
/// Least guest memory, in MiB.
pub const MIN_MEM_MIB: u64 = 16;
/// Most guest memory, in MiB (1 TiB).
pub const MAX_MEM_MIB: u64 = 1 << 20;

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            track_dirty_pages: false,
            huge_pages: HugePages::default(),
            hardware: Hardware::default(),
            cpu_template: None,
        }
    }
}

/// One block device.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Name of the drive; its first 20 bytes are the serial number that the guest sees.
    pub drive_id: String,
    /// Path of a raw file or block device, or `fd:NAME`.
    pub path_on_host: String,
    /// Whether the guest's root is here. The monitor adds no `root=` of its own when `boot_args` has one.
    pub is_root_device: bool,
    /// Whether the guest may only read.
    #[serde(default)]
    pub is_read_only: bool,
    /// What a guest's flush does: `Writeback` syncs to stable storage, `Unsafe` does nothing.
    #[serde(default)]
    pub cache_type: CacheType,
    /// How requests are executed; absent lets the monitor choose what its benchmark favours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_engine: Option<IoEngine>,
    /// How much the guest may read and write in a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// Unique id of the partition that is the root, when it is not the whole drive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
}

/// `PATCH /drives/{drive_id}`: what changes while the guest runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct DrivePatch {
    /// Which drive.
    pub drive_id: String,
    /// Another file for it, or the same one after it grew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<String>,
    /// Another limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// What a flush request of the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
pub enum CacheType {
    /// Flush requests are not offered to the guest.
    Unsafe,
    /// Flush requests sync the file (the default: a sliver's data survives the node).
    #[default]
    Writeback,
}

/// How block requests are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
pub enum IoEngine {
    /// `preadv`/`pwritev` in the device thread.
    #[default]
    Sync,
    /// Many requests at once by io_uring.
    Async,
}

/// Limits in bytes and in operations; a bucket that is absent does not limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Operations (requests, frames).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// A token bucket: `size` tokens come back in `refill_time` ms, evenly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Most tokens that it holds. 0 with a `refill_time` of 0 takes the limit away (in a PATCH).
    pub size: u64,
    /// Tokens beside `size` that are there at the start and do not come back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Time in ms in which an empty bucket becomes full.
    pub refill_time: u64,
}

/// One network interface.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Name of the interface.
    pub iface_id: String,
    /// Name of a tap that exists, or `fd:NAME` for an open tap descriptor (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`).
    pub host_dev_name: String,
    /// The guest's MAC address; absent lets the guest choose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    /// The interface's MTU in bytes as told to the guest, 68 to 65535.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// What comes to the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// What the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
    /// Path of `/dev/vhost-net`, or `fd:NAME`: the host's kernel moves the frames. Not together with rate limiters (ours).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost: Option<String>,
}

/// `PATCH /network-interfaces/{iface_id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfacePatch {
    /// Which interface.
    pub iface_id: String,
    /// What comes to the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// What the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// The stream socket device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context id, 3 or more.
    pub guest_cid: u32,
    /// Unix socket on which the host connects inwards (`CONNECT port\n`), or `fd:NAME` for a listening one.
    /// Outward streams go to `<uds_path>_<port>`, or to [`VSOCK_OUT_FD`] when that was inherited.
    pub uds_path: String,
    /// Accepted for Firecracker's clients; unused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
}

/// The entropy device.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// How many bytes the guest may take in a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// The memory balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Guest memory that the balloon shall take, in MiB.
    pub amount_mib: u32,
    /// The guest takes memory back out of the balloon rather than end a program for want of it.
    pub deflate_on_oom: bool,
    /// Time between statistics in s; 0 means none, and is for good.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// The guest names its free pages when asked to (free page hinting): only `false` is supported.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// The guest gives its free pages back by itself (free page reporting).
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// `PATCH /balloon`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct BalloonPatch {
    /// Guest memory that the balloon shall take, in MiB.
    pub amount_mib: u32,
}

/// `PATCH /balloon/statistics`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct BalloonStatsPatch {
    /// Time between statistics in s, 1 or more.
    pub stats_polling_interval_s: u16,
}

/// `GET /balloon/statistics`: what the guest said last; bytes or counts, absent where it says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(default)]
#[allow(missing_docs, reason = "virtio 1.2, 5.5.6.3, by the same names")]
pub struct BalloonStats {
    /// Pages that the balloon shall have (4 KiB).
    pub target_pages: u32,
    /// Pages that it has.
    pub actual_pages: u32,
    pub target_mib: u32,
    pub actual_mib: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_kill: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alloc_stall: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_scan: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_scan: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_reclaim: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_reclaim: Option<u64>,
}

/// One persistent memory device: a file in the guest's address space.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    /// Name of the device.
    pub id: String,
    /// Path of the file, or `fd:NAME`.
    pub path_on_host: String,
    /// Whether the guest's root is here.
    #[serde(default)]
    pub root_device: bool,
    /// The guest may only read; all VMs with the same file share its pages.
    #[serde(default)]
    pub read_only: bool,
    /// How often the guest may flush.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// `PATCH /pmem/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct PmemPatch {
    /// Which device.
    pub id: String,
    /// Another limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// How an idle VM gives its memory back (ours).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "monitor-schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Park {
    /// Path of a file that takes guest memory while the VM is parked, or `fd:NAME`. It holds everything that the guest
    /// has in memory: whoever makes it, makes it readable by nobody else.
    pub mem_file_path: String,
    /// Park by itself after the guest was idle for this long, in ms; absent: when asked to only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_ms: Option<u64>,
}
