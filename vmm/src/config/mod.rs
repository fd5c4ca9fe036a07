//! From the configuration file to open descriptors and checked numbers: after this nothing is a path.
//!
//! [`parse`] reads it, [`check`] looks at its values, [`open()`] makes of it the [`Spec`] that a VM is built from.

mod command_line;
mod open;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use mandoline_api::monitor::{
    Balloon, Hardware, HugePages, MAX_MEM_MIB, MAX_VCPUS, MIN_MEM_MIB, RateLimiter, VmConfig,
};

use crate::boot::layout::MAX_DEVICES;
use crate::devices::net::tap;
use crate::devices::vsock::outward::Outward;
use crate::devices::{blk, net};
use crate::fds;

pub use command_line::DEFAULT_COMMAND_LINE;
pub use open::open;

/// A configuration that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not JSON, or not of this shape.
    #[error("configuration file: {0}")]
    Syntax(#[from] serde_json::Error),
    /// A value is out of its range.
    #[error("{name} is {value}; allowed: {allowed}")]
    Value {
        /// Which.
        name: String,
        /// Its value.
        value: String,
        /// What is allowed.
        allowed: String,
    },
    /// A descriptor or path cannot be had.
    #[error(transparent)]
    Fd(#[from] fds::Error),
    /// A tap cannot be used.
    #[error(transparent)]
    Tap(#[from] tap::Error),
}

fn value(name: impl Into<String>, value: impl ToString, allowed: impl Into<String>) -> Error {
    Error::Value {
        name: name.into(),
        value: value.to_string(),
        allowed: allowed.into(),
    }
}

/// A drive, open.
pub struct Drive {
    /// Its file.
    pub file: File,
    /// How it behaves.
    pub options: blk::Options,
}

/// A network interface, open.
pub struct Interface {
    /// Its name.
    pub id: String,
    /// Its tap.
    pub tap: File,
    /// `/dev/vhost-net`, where the kernel shall move its frames.
    pub vhost: Option<File>,
    /// How it behaves.
    pub options: net::Options,
}

/// The stream socket device, open.
pub struct Vsock {
    /// The guest's context id.
    pub guest_cid: u32,
    /// Where the host connects inwards.
    pub listener: UnixListener,
    /// Where streams of the guest go.
    pub outward: Outward,
}

/// A persistent memory device, open.
pub struct Pmem {
    /// Its name.
    pub id: String,
    /// Its file.
    pub file: File,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// How often it may flush.
    pub limit: Option<RateLimiter>,
}

/// A VM to be built: everything open, everything checked.
pub struct Spec {
    /// vCPUs.
    pub vcpus: u8,
    /// RAM in bytes.
    pub memory: u64,
    /// How the guest is told of its hardware.
    pub hardware: Hardware,
    /// What backs guest memory.
    pub huge_pages: HugePages,
    /// The kernel.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The command line, without the devices.
    pub command_line: String,
    /// Drives in order.
    pub drives: Vec<Drive>,
    /// Interfaces in order.
    pub interfaces: Vec<Interface>,
    /// The stream socket device.
    pub vsock: Option<Vsock>,
    /// The entropy device's limits; `None`: there is no such device.
    pub entropy: Option<RateLimiter>,
    /// The memory balloon.
    pub balloon: Option<Balloon>,
    /// Persistent memory in order.
    pub pmem: Vec<Pmem>,
    /// How an idle VM gives its memory back.
    pub park: Option<Park>,
}

/// How an idle VM gives its memory back.
pub struct Park {
    /// Where its memory goes.
    pub file: File,
    /// Park by itself after so long.
    pub idle: Option<Duration>,
}

/// Reads a configuration file.
pub fn parse(text: &str) -> Result<VmConfig, Error> {
    let mut config: VmConfig = serde_json::from_str(text)?;
    order_drives(&mut config.drives);
    Ok(config)
}

/// Puts the root drive first, as Firecracker does: it is `vda` wherever it was listed.
pub fn order_drives(drives: &mut [mandoline_api::monitor::Drive]) {
    drives.sort_by_key(|drive| !drive.is_root_device);
}

/// Checks what can be checked without opening anything.
pub fn check(config: &VmConfig) -> Result<(), Error> {
    let machine = &config.machine_config;
    if machine.vcpu_count == 0 || machine.vcpu_count > MAX_VCPUS {
        return Err(value(
            "vcpu_count",
            machine.vcpu_count,
            format!("1 to {MAX_VCPUS}"),
        ));
    }
    if machine.mem_size_mib < MIN_MEM_MIB || machine.mem_size_mib > MAX_MEM_MIB {
        return Err(value(
            "mem_size_mib",
            machine.mem_size_mib,
            format!("{MIN_MEM_MIB} to {MAX_MEM_MIB}"),
        ));
    }
    for (name, set) in [
        ("smt", machine.smt),
        ("track_dirty_pages", machine.track_dirty_pages),
    ] {
        if set {
            return Err(value(name, true, "false"));
        }
    }
    let devices = config.drives.len()
        + config.network_interfaces.len()
        + usize::from(config.vsock.is_some())
        + usize::from(config.entropy.is_some())
        + usize::from(config.balloon.is_some())
        + config.pmem.len();
    if devices > MAX_DEVICES {
        return Err(value(
            "number of devices",
            devices,
            format!("up to {MAX_DEVICES}"),
        ));
    }
    let roots = config.drives.iter().filter(|drive| drive.is_root_device).count()
        + config.pmem.iter().filter(|pmem| pmem.root_device).count();
    if roots > 1 {
        return Err(value("number of root devices", roots, "up to 1"));
    }
    for (index, drive) in config.drives.iter().enumerate() {
        if config.drives[..index]
            .iter()
            .any(|other| other.drive_id == drive.drive_id)
        {
            return Err(value("drive_id", &drive.drive_id, "one that no other drive has"));
        }
    }
    for interface in &config.network_interfaces {
        interface.guest_mac.as_deref().map(parse_mac).transpose()?;
        if let Some(mtu) = interface.mtu
            && mtu < 68
        {
            return Err(value("mtu", mtu, "68 to 65535"));
        }
    }
    if let Some(vsock) = &config.vsock
        && (vsock.guest_cid < 3 || vsock.guest_cid == u32::MAX)
    {
        return Err(value("guest_cid", vsock.guest_cid, "3 to 4294967294"));
    }
    if config
        .serial
        .as_ref()
        .is_some_and(|serial| serial.rate_limiter.is_some())
    {
        return Err(value("serial.rate_limiter", "there", "none"));
    }
    Ok(())
}

fn check_balloon(balloon: Option<Balloon>, memory_mib: u64) -> Result<Option<Balloon>, Error> {
    if let Some(balloon) = &balloon {
        if u64::from(balloon.amount_mib) > memory_mib {
            let allowed = format!("up to {memory_mib}, the guest's memory");
            return Err(value("amount_mib", balloon.amount_mib, allowed));
        }
        if balloon.free_page_hinting {
            return Err(value("free_page_hinting", true, "false"));
        }
    }
    Ok(balloon)
}

fn parse_mac(text: &str) -> Result<[u8; 6], Error> {
    let error = || value("guest_mac", text, "a unicast address like 02:00:0a:80:00:02");
    let mut mac = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts
            .next()
            .filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
            .ok_or_else(error)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
    }
    // Multicast and zero addresses are no host's.
    if parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] {
        return Err(error());
    }
    Ok(mac)
}
