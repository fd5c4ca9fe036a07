//! What a monitor is told: its configuration, as a sealed file in memory, and its command line.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use mandoline_api::monitor::{
    Balloon, BootSource, Drive, Entropy, MachineConfig, NetworkInterface, VmConfig, Vsock,
};
use mandoline_rspec::Rspec;
use rustix::fs::{MemfdFlags, SealFlags};

use super::KvmConfig;
use crate::net::SliverNet;

/// Every sliver's own context id on vsock: each has a device of its own, so all may have the same.
const GUEST_CID: u32 = 3;

/// The configuration of a sliver's VM.
pub(super) fn config(kvm: &KvmConfig, rspec: &Rspec, net: &SliverNet) -> VmConfig {
    let drive = |id: &str, is_root: bool| Drive {
        drive_id: id.to_owned(),
        path_on_host: format!("fd:{id}"),
        is_root_device: is_root,
        is_read_only: is_root,
        ..Drive::default()
    };
    let [a, b, c, d, e, f] = net.mac;
    VmConfig {
        boot_source: BootSource {
            kernel_image_path: "fd:kernel".to_owned(),
            boot_args: Some(kvm.boot_args.clone()),
            initrd_path: None,
        },
        machine_config: MachineConfig {
            vcpu_count: u8::try_from(rspec.number("vcpus").unwrap_or(1)).unwrap_or(u8::MAX),
            mem_size_mib: rspec.number("mem_limit").unwrap_or(0) >> 20,
            ..MachineConfig::default()
        },
        drives: vec![drive("root", true), drive("disk", false)],
        network_interfaces: vec![NetworkInterface {
            iface_id: "eth0".to_owned(),
            host_dev_name: "fd:tap0".to_owned(),
            guest_mac: Some(format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")),
            ..NetworkInterface::default()
        }],
        vsock: Some(Vsock {
            guest_cid: GUEST_CID,
            uds_path: "fd:vsock".to_owned(),
            vsock_id: None,
        }),
        // Empty as long as the sliver has the memory that it was booted with. A guest that runs short ends a program of
        // its own rather than take back what is no longer its sliver's.
        balloon: Some(Balloon {
            amount_mib: 0,
            deflate_on_oom: false,
            // So that the monitor says how full it is. The guest's own numbers are not used: seldom.
            stats_polling_interval_s: u16::MAX,
            free_page_hinting: false,
            free_page_reporting: false,
        }),
        entropy: Some(Entropy::default()),
        ..VmConfig::default()
    }
}

/// Writes a configuration to memory that nobody can change any more.
pub(super) fn sealed(config: &VmConfig) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("vm-config", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(fd);
    serde_json::to_writer(&mut file, config)?;
    file.flush()?;
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
    rustix::fs::fcntl_add_seals(
        &file,
        SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL,
    )?;
    Ok(file.into())
}

/// The monitor's command line, without the descriptors.
pub(super) fn arguments(vm_id: u32, uid: u32, start_ns: u64) -> Vec<String> {
    [
        "--id".to_owned(),
        format!("sliver-{vm_id}"),
        "--config-file=fd:config".to_owned(),
        "--api-sock=fd:api".to_owned(),
        "--state-file=fd:state".to_owned(),
        "--log=fd:log".to_owned(),
        "--serial=fd:serial".to_owned(),
        "--boot-timer".to_owned(),
        "--on-reboot=restart".to_owned(),
        format!("--start-time-ns={start_ns}"),
        format!("--jail-uid={uid}"),
        format!("--jail-gid={uid}"),
    ]
    .into()
}
