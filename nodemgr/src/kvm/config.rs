//! Settings of the `kvm-microvm` backend, and where it keeps things.

use std::path::{Path, PathBuf};

use mandoline_api::nodemgr::VmId;
use serde::Deserialize;

/// Settings of the `kvm-microvm` backend.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KvmConfig {
    /// The monitor.
    pub monitor: PathBuf,
    /// The slivers' kernel: an uncompressed `vmlinux`.
    pub kernel: PathBuf,
    /// The slivers' root image, shared read-only.
    pub root: PathBuf,
    /// The program that makes an empty disk: `make-disk FILE BYTES`.
    pub make_disk: PathBuf,
    /// Where cgroup v2 is mounted.
    pub cgroup_root: PathBuf,
    /// Below it, the parent of the slivers' cgroups.
    pub cgroup: PathBuf,
    /// User and group id of the monitor of the sliver with index 0.
    pub first_uid: u32,
    /// The kernel's command line; the monitor appends its devices.
    pub boot_args: String,
    /// What a monitor may use beside the guest's memory, in MiB.
    pub overhead_mib: u64,
    /// How long a sliver may take from its monitor's start until its agent answers, in seconds.
    pub boot_timeout_s: u64,
    /// How long a join may take, in seconds.
    pub join_timeout_s: u64,
    /// How long the console and the log of a sliver may grow, in KiB each; their last part is kept.
    pub log_kib: u64,
}

impl Default for KvmConfig {
    fn default() -> Self {
        Self {
            monitor: "/usr/lib/mandoline/bin/mandoline-vmm".into(),
            kernel: "/usr/share/mandoline/images/vmlinux-up".into(),
            root: "/usr/share/mandoline/images/root.erofs".into(),
            make_disk: "/usr/lib/mandoline/make-disk".into(),
            cgroup_root: "/sys/fs/cgroup".into(),
            cgroup: "mandoline/slivers".into(),
            first_uid: 100_000,
            // Quiet, since each character on the serial port is an exit; a panic resets at once, through the
            // keyboard controller, which is what the monitor has.
            boot_args:
                "console=ttyS0 quiet loglevel=1 reboot=k panic=1 nomodule root=/dev/vda rootfstype=erofs \
                        ro init=/sbin/mandoline-agent"
                    .into(),
            overhead_mib: 48,
            // Emulated nodes under load take a minute; hardware takes a tenth of a second.
            boot_timeout_s: 120,
            join_timeout_s: 60,
            log_kib: 1024,
        }
    }
}

/// Where things of slivers are.
#[derive(Debug, Clone)]
pub(super) struct Places {
    /// Disks.
    pub(super) disks: PathBuf,
    /// Templates of disks.
    pub(super) templates: PathBuf,
    /// Sockets and state of running slivers; empty after a reboot.
    pub(super) run: PathBuf,
    /// Logs and consoles.
    pub(super) logs: PathBuf,
}

impl Places {
    pub(super) fn new(state_dir: &Path, run_dir: &Path, log_dir: &Path) -> Self {
        Self {
            disks: state_dir.join("disks"),
            templates: state_dir.join("templates"),
            run: run_dir.join("slivers"),
            logs: log_dir.join("slivers"),
        }
    }

    pub(super) fn disk(&self, vm_id: VmId) -> PathBuf {
        self.disks.join(format!("{vm_id}.img"))
    }

    pub(super) fn run(&self, vm_id: VmId) -> PathBuf {
        self.run.join(vm_id.to_string())
    }

    pub(super) fn logs(&self, vm_id: VmId) -> PathBuf {
        self.logs.join(vm_id.to_string())
    }

    /// The socket on which the sliver's vsock streams are opened inwards.
    pub(super) fn vsock(&self, vm_id: VmId) -> PathBuf {
        self.run(vm_id).join("vsock.sock")
    }

    /// The monitor's control socket.
    pub(super) fn api(&self, vm_id: VmId) -> PathBuf {
        self.run(vm_id).join("api.sock")
    }

    /// QEMU's control socket.
    pub(super) fn qmp(&self, vm_id: VmId) -> PathBuf {
        self.run(vm_id).join("qmp.sock")
    }

    /// What the monitor tells of its state.
    pub(super) fn state(&self, vm_id: VmId) -> PathBuf {
        self.run(vm_id).join("state")
    }

    /// What a later node manager has to know of the monitor.
    pub(super) fn handover(&self, vm_id: VmId) -> PathBuf {
        self.run(vm_id).join("handover.json")
    }
}
