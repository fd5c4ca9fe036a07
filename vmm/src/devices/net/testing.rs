//! For tests of interfaces: frames, and a real tap with somebody at its other end.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::devices::net::tap::{self, HEADER_BYTES};

/// Sent by nobody but tests (IEEE 802, local experimental).
const ETHERTYPE: u16 = 0x88b5;
const ETHERNET_BYTES: usize = 14;
/// After this a test that waits has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// A frame of [`ETHERTYPE`] and of `length` bytes, if it is long enough for that, after an empty virtio-net header.
pub(crate) fn frame(length: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..length).map(|n| n as u8).collect();
    if length >= ETHERNET_BYTES {
        frame[..12].fill(0xff);
        frame[12..14].copy_from_slice(&ETHERTYPE.to_be_bytes());
    }
    [vec![0; HEADER_BYTES], frame].concat()
}

/// Waits until there is something.
pub(crate) fn until<T>(mut what: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(got) = what() {
            return got;
        }
        assert!(begun.elapsed() < PATIENCE, "it never came");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A tap in a network namespace of its own, and the host's side of it.
pub(crate) struct Wire {
    pub(crate) tap: File,
    pub(crate) packets: Packets,
}

/// A packet socket on the tap's interface.
pub(crate) struct Packets(OwnedFd);

impl Packets {
    pub(crate) fn receive(&self) -> Vec<u8> {
        let mut frame = vec![0; 70_000];
        let length = until(|| rustix::io::read(&self.0, &mut frame).ok());
        frame.truncate(length);
        frame
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        assert_eq!(rustix::io::write(&self.0, frame).unwrap(), frame.len());
    }
}

/// Needs root; without it says so, and there is none.
pub(crate) fn wire() -> Option<Wire> {
    // The namespace is the thread's, and lives on with what was made in it.
    let made = std::thread::spawn(make_wire).join().unwrap();
    made.inspect_err(|error| eprintln!("skipped: a tap in a network namespace: {error}"))
        .ok()
}

fn make_wire() -> io::Result<Wire> {
    const NAME: &[u8] = b"test0";
    let check = |result: libc::c_int| match result {
        0.. => Ok(result),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: concerns this thread only, which ends soon.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
    // The host would say things of its own on the tap. A host without IPv6 has no such file.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let name = str::from_utf8(NAME).unwrap();
    let tap = tap::open(name).map_err(io::Error::other)?;
    tap::prepare(&tap, name).map_err(io::Error::other)?;
    let any = libc::c_int::from((libc::ETH_P_ALL as u16).to_be());
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK;
    // SAFETY: a new descriptor, owned here.
    let socket = unsafe { OwnedFd::from_raw_fd(check(libc::socket(libc::AF_PACKET, kind, any))?) };
    // SAFETY: zeroes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME) {
        *to = *from as libc::c_char;
    }
    // SAFETY: both requests read or write one ifreq; SIOCGIFINDEX sets the index that is read; zeroes are a valid address.
    unsafe {
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request))?;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX, &mut request))?;
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = any as u16;
        address.sll_ifindex = request.ifr_ifru.ifru_ifindex;
        let size = std::mem::size_of_val(&address) as libc::socklen_t;
        check(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size))?;
    }
    Ok(Wire {
        tap,
        packets: Packets(socket),
    })
}
