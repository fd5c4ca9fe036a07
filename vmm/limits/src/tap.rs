//! Tap devices: made by ioctl (the kernel refuses RTM_NEWLINK for them), used by descriptor.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::error::{Error, Result};

/// Length of the virtio-net header that goes before each frame: `virtio_net_hdr_v1`, whose
/// `num_buffers` is always there (virtio 1.2, section 5.1.6).
pub const VNET_HDR_LEN: i32 = 12;

// linux/if_tun.h; libc has the ioctl numbers only for some targets.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNSETOWNER: libc::c_ulong = 0x4004_54cc;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

/// What the reader of a tap can digest (`TUN_F_*`): large segments are then handed over whole.
/// None by default: the monitor asks for what its guest negotiated, with [`set_offloads`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Unfinished checksums (`TUN_F_CSUM`); needed by the other two.
    pub checksum: bool,
    /// TCP segments over IPv4 larger than the MTU (`TUN_F_TSO4`).
    pub tso4: bool,
    /// TCP segments over IPv6 larger than the MTU (`TUN_F_TSO6`).
    pub tso6: bool,
}

/// How a tap is made.
#[derive(Debug, Clone, Default)]
pub struct TapOptions {
    /// Interface name, 1 to 15 bytes, no `/`, no space.
    pub name: String,
    /// User id that may attach to it later; meaningless for a tap that dies with its descriptor.
    pub owner: Option<u32>,
    /// Whether the interface stays when the last descriptor is closed. Off by default: then a
    /// dead monitor leaves no tap behind.
    pub persist: bool,
    /// What its reader can digest.
    pub offloads: Offloads,
}

/// Whether `name` can be an interface's name.
pub fn check_name(name: &str) -> Result<()> {
    let good = (1..libc::IFNAMSIZ).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_graphic() && b != b'/' && b != b':' && b != b'%')
        && name != "."
        && name != "..";
    if good {
        Ok(())
    } else {
        Err(Error::out_of_range(
            "interface name",
            format!("\"{name}\""),
            "1 to 15 printable characters without / : %",
        ))
    }
}

/// Makes (or, if it persists, attaches to) a tap in the network namespace of the calling thread.
///
/// The descriptor is non-blocking and close-on-exec; frames carry a [`VNET_HDR_LEN`] header.
/// Needs `CAP_NET_ADMIN`, or to be the owner of a persistent tap.
pub fn open(options: &TapOptions) -> Result<OwnedFd> {
    check_name(&options.name)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(Error::file("open", "/dev/net/tun"))?;

    // SAFETY: ifreq is plain old data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(options.name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the descriptor is open and the argument points to an ifreq that outlives the call.
    let status = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, &mut request) };
    check(status, "TUNSETIFF", &options.name)?;

    let fd: OwnedFd = file.into();
    let length: libc::c_int = VNET_HDR_LEN;
    // SAFETY: the descriptor is open and the argument points to a c_int that outlives the call.
    let status = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ as _, &length) };
    check(status, "TUNSETVNETHDRSZ", &options.name)?;
    set_offloads(&fd, options.offloads)?;
    if let Some(owner) = options.owner {
        set_value(
            &fd,
            TUNSETOWNER,
            "TUNSETOWNER",
            libc::c_ulong::from(owner),
            &options.name,
        )?;
    }
    set_value(
        &fd,
        TUNSETPERSIST,
        "TUNSETPERSIST",
        libc::c_ulong::from(options.persist),
        &options.name,
    )?;
    Ok(fd)
}

/// Says what the reader of this tap can digest.
pub fn set_offloads(tap: &OwnedFd, offloads: Offloads) -> Result<()> {
    let Offloads { checksum, tso4, tso6 } = offloads;
    let bits = [
        (checksum, libc::TUN_F_CSUM),
        (tso4, libc::TUN_F_TSO4),
        (tso6, libc::TUN_F_TSO6),
    ];
    let flags = bits
        .iter()
        .filter(|(on, _)| *on)
        .fold(0, |all, (_, bit)| all | bit);
    set_value(
        tap,
        TUNSETOFFLOAD,
        "TUNSETOFFLOAD",
        libc::c_ulong::from(flags),
        "tap",
    )
}

fn set_value(
    fd: &OwnedFd,
    request: libc::c_ulong,
    call: &'static str,
    value: libc::c_ulong,
    device: &str,
) -> Result<()> {
    // SAFETY: the descriptor is open; these requests take their argument by value, no pointer.
    let status = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, value) };
    check(status, call, device)
}

fn check(status: libc::c_int, call: &'static str, device: &str) -> Result<()> {
    if status < 0 {
        Err(Error::Device {
            call,
            device: device.to_owned(),
            source: io::Error::last_os_error(),
        })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_before_the_kernel_sees_them() {
        for bad in ["", "a/b", "sixteen-letters-", "a b", ".", "..", "tap%d", "a:1"] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_name("mtap65535").is_ok());
    }
}
