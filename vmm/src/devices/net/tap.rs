//! What the monitor does to a tap: it takes one that is there, sets its header and its offloads.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
};

/// `struct virtio_net_hdr_v1`: what stands before each frame on both sides.
pub const HEADER_BYTES: usize = 12;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
/// Sets what the tap may hand over unfinished; the filter of the vCPU threads lets it through.
const TUNSETOFFLOAD: libc::c_ulong = crate::jail::seccomp::ioctl::TUNSETOFFLOAD.number;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUN_F_CSUM: libc::c_ulong = 1;
const TUN_F_TSO4: libc::c_ulong = 2;
const TUN_F_TSO6: libc::c_ulong = 4;
const TUN_F_USO4: libc::c_ulong = 0x20;
const TUN_F_USO6: libc::c_ulong = 0x40;

/// A tap cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("tap {name}: {what}: {source}")]
pub struct Error {
    name: String,
    what: &'static str,
    source: io::Error,
}

/// Opens the existing tap `name` (needs to own it or `CAP_NET_ADMIN`).
pub fn open(name: &str) -> Result<File, Error> {
    let failed = |what| {
        move |source| Error {
            name: name.to_owned(),
            what,
            source,
        }
    };
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.len() >= libc::IFNAMSIZ || bytes.contains(&0) {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "a name has 1 to 15 bytes");
        return Err(failed("its name")(source));
    }
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(failed("opening /dev/net/tun"))?;
    // SAFETY: zeroes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &mut request) } < 0 {
        return Err(failed("attaching to it")(io::Error::last_os_error()));
    }
    Ok(file)
}

/// Checks that `tap` is one, of the kind that is needed, and makes it ready.
pub fn prepare(tap: &File, name: &str) -> Result<(), Error> {
    let failed = |what| {
        move |source| Error {
            name: name.to_owned(),
            what,
            source,
        }
    };
    // SAFETY: zeroes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes one ifreq.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNGETIFF, &mut request) } < 0 {
        return Err(failed("asking what it is (not a tap descriptor?)")(
            io::Error::last_os_error(),
        ));
    }
    // SAFETY: TUNGETIFF has set the flags.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if flags & wanted != wanted {
        let text = format!("flags are {flags:#x}, but IFF_TAP | IFF_NO_PI | IFF_VNET_HDR are needed");
        return Err(failed("its kind")(io::Error::new(
            io::ErrorKind::InvalidInput,
            text,
        )));
    }
    let size: libc::c_int = HEADER_BYTES as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &size) } < 0 {
        return Err(failed("setting its header's size")(io::Error::last_os_error()));
    }
    rustix::io::ioctl_fionbio(tap, true).map_err(|error| failed("making it non-blocking")(error.into()))
}

/// Whether the host's kernel segments UDP for taps (Linux 6.2); leaves the tap without offloads.
pub fn has_udp_segmentation(tap: &File) -> bool {
    let all = TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6;
    offload(tap, all).is_ok() && offload(tap, 0).is_ok()
}

/// Lets the tap hand over unfinished what the guest agreed to finish.
pub fn set_offload(tap: &File, features: u64) -> io::Result<()> {
    let mut flags = 0;
    for (feature, flag) in [
        (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
        (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
        (VIRTIO_NET_F_GUEST_USO4, TUN_F_USO4),
        (VIRTIO_NET_F_GUEST_USO6, TUN_F_USO6),
    ] {
        if features & 1 << feature != 0 {
            flags |= flag;
        }
    }
    // Segmentation without checksums does not exist: the tap would refuse it.
    if flags & TUN_F_CSUM == 0 {
        flags = 0;
    }
    // The kernel has UDP segmentation for both families or none.
    if flags & (TUN_F_USO4 | TUN_F_USO6) != TUN_F_USO4 | TUN_F_USO6 {
        flags &= !(TUN_F_USO4 | TUN_F_USO6);
    }
    match offload(tap, flags) {
        // What stands in for a tap in tests (a socket) has no offloads.
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => Ok(()),
        result => result,
    }
}

fn offload(tap: &File, flags: libc::c_ulong) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    match unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD, flags) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
