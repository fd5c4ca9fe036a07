//! The `qemu-microvm` backend: QEMU's `microvm` machine in the place of our monitor, so that operators have a choice.
//! Kernel, root image, disk, tap, cgroup, uid and agent are those of [`crate::kvm`], which runs both; here is what
//! differs: the command line, the control protocol (QMP), and vsock, which is the kernel's (`vhost_vsock`).
//!
//! QEMU opens what it needs as root and then becomes the sliver's user. Its guest's streams come to a port of the host
//! that all guests share; the context id that the kernel puts on each says whose it is ([`Hub`]).

mod hub;
mod qmp;

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use mandoline_api::nodemgr::VmId;
use serde::Deserialize;

pub use hub::Hub;
pub(crate) use hub::connect;
pub(crate) use qmp::Qmp;

/// The name in `vm_type`.
pub const QEMU_MICROVM: &str = "qemu-microvm";

/// Context ids of guests start here; those below 3 are the kernel's, and people's own VMs use small ones.
const FIRST_CID: u32 = 1 << 16;

/// Settings of the `qemu-microvm` backend. What is not here is as in `[kvm]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QemuConfig {
    /// QEMU for x86-64, 7.2 or later.
    pub program: PathBuf,
    /// The processor that guests see.
    pub cpu: String,
    /// What QEMU may use beside the guest's memory, in MiB.
    pub overhead_mib: u64,
}

impl Default for QemuConfig {
    fn default() -> Self {
        Self {
            program: "/usr/bin/qemu-system-x86_64".into(),
            // Without protection keys: on an emulated node their state has no place in the guest's XSAVE area.
            cpu: "host,-pku".to_owned(),
            overhead_mib: 128,
        }
    }
}

/// The context id of a sliver on vsock. Ids of slivers are never used twice, so neither are these.
pub(crate) fn cid(vm_id: VmId) -> u32 {
    FIRST_CID.saturating_add(vm_id)
}

/// QEMU's version, major and minor; asked for once for each program.
fn version(program: &Path) -> Result<(u32, u32), String> {
    static KNOWN: OnceLock<(PathBuf, (u32, u32))> = OnceLock::new();
    if let Some((_, version)) = KNOWN.get().filter(|(known, _)| known == program) {
        return Ok(*version);
    }
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("QEMU {}: {e}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let found =
        parse_version(&text).ok_or_else(|| format!("{}: no version in {text:?}", program.display()))?;
    let _ = KNOWN.set((program.to_owned(), found));
    Ok(found)
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let (_, rest) = text.split_once("version ")?;
    let mut numbers = rest.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Whether QEMU can be used here; if not, what is missing.
pub(crate) fn check(config: &QemuConfig) -> Result<(), String> {
    let found = version(&config.program)?;
    if found < (7, 2) {
        return Err(format!(
            "QEMU {} is version {}.{}; allowed: 7.2 or later",
            config.program.display(),
            found.0,
            found.1
        ));
    }
    match Path::new("/dev/vhost-vsock").exists() && Path::new("/sys/module/vhost_vsock").exists() {
        true => Ok(()),
        false => Err("there is no /dev/vhost-vsock: load the module vhost_vsock".to_owned()),
    }
}

/// What a machine is made of.
pub(crate) struct Machine<'a> {
    pub(crate) vm_id: VmId,
    pub(crate) uid: u32,
    pub(crate) vcpus: u64,
    pub(crate) mem_mib: u64,
    pub(crate) kernel: &'a Path,
    pub(crate) boot_args: &'a str,
    pub(crate) root: &'a Path,
    pub(crate) disk: &'a Path,
    pub(crate) console: &'a Path,
    pub(crate) qmp: &'a Path,
    pub(crate) mac: String,
    pub(crate) tap: RawFd,
}

/// QEMU's command line. A guest that resets ends QEMU, which the node manager takes as the sliver's word for it.
pub(crate) fn arguments(config: &QemuConfig, machine: &Machine<'_>) -> Result<Vec<String>, String> {
    // The name of the option changed; the later one came before the earlier one went.
    let user = match version(&config.program)? >= (9, 1) {
        true => ["-run-with".to_owned(), format!("user={0}:{0}", machine.uid)],
        false => ["-runas".to_owned(), format!("{0}:{0}", machine.uid)],
    };
    let path = |path: &Path| path.display().to_string().replace(',', ",,");
    // There is no keyboard controller; a triple fault resets.
    let boot_args = machine.boot_args.replace("reboot=k", "reboot=t");
    let mut arguments: Vec<String> = [
        "-M",
        "microvm,acpi=off,pic=off,pit=off,rtc=off,isa-serial=on,accel=kvm",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-sandbox",
        "on,obsolete=deny,spawn=deny,resourcecontrol=deny",
    ]
    .map(str::to_owned)
    .into();
    arguments.extend(user);
    let pairs = [
        ("-name", format!("sliver-{},debug-threads=on", machine.vm_id)),
        ("-cpu", config.cpu.clone()),
        ("-smp", machine.vcpus.to_string()),
        ("-m", format!("{}M", machine.mem_mib)),
        ("-kernel", machine.kernel.display().to_string()),
        ("-append", boot_args),
        (
            "-chardev",
            format!("file,id=console,path={},append=on", path(machine.console)),
        ),
        ("-serial", "chardev:console".to_owned()),
        ("-qmp", format!("unix:{},server=on,wait=off", path(machine.qmp))),
        (
            "-drive",
            format!(
                "id=root,file={},format=raw,if=none,readonly=on",
                path(machine.root)
            ),
        ),
        ("-device", "virtio-blk-device,drive=root".to_owned()),
        (
            "-drive",
            // A full disk of the node stops the guest until there is room: it never sees an error.
            format!(
                "id=disk,file={},format=raw,if=none,discard=unmap,werror=enospc",
                path(machine.disk)
            ),
        ),
        ("-device", "virtio-blk-device,drive=disk".to_owned()),
        ("-netdev", format!("tap,id=eth0,fd={}", machine.tap)),
        (
            "-device",
            format!("virtio-net-device,netdev=eth0,mac={}", machine.mac),
        ),
        (
            "-device",
            format!("vhost-vsock-device,guest-cid={}", cid(machine.vm_id)),
        ),
        ("-object", "rng-random,id=rng,filename=/dev/urandom".to_owned()),
        ("-device", "virtio-rng-device,rng=rng".to_owned()),
        ("-device", "virtio-balloon-device,id=balloon".to_owned()),
    ];
    for (option, value) in pairs {
        arguments.extend([option.to_owned(), value]);
    }
    Ok(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_distributions_write_them() {
        assert_eq!(
            parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)"),
            Some((7, 2))
        );
        assert_eq!(parse_version("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert_eq!(parse_version("something else"), None);
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let config = QemuConfig {
            program: "/nonexistent/qemu".into(),
            ..QemuConfig::default()
        };
        assert!(check(&config).unwrap_err().contains("/nonexistent/qemu"));
    }

    #[test]
    fn no_two_slivers_have_one_context_id() {
        assert_ne!(cid(1), cid(2));
        assert!(cid(0) > 2);
    }
}
