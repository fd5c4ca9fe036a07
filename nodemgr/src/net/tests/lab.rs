//! The real kernel, in a network namespace of each test's own: taps that frames are written to,
//! and a veth pair as the uplink. Needs root and the kernel's IFB, HTB and nf_tables; without
//! them a test says so and passes.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use mandoline_limits::Rate;
use mandoline_limits::netlink::link::{Mac, add_address, add_neighbour, change};
use mandoline_limits::netlink::{CREATE, EXCL};
use mandoline_rspec::PortSet;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::{LinkVeth, RouteMessageBuilder};
use rustix::event::{PollFd, PollFlags, poll};

use crate::net::*;
use mandoline_limits::netlink::link::LinkChange;
use mandoline_limits::netlink::{Connection, Request};
use mandoline_limits::tap::VNET_HDR_LEN;

pub(super) const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub(super) const FAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 9);
pub(super) const UDP: u8 = 17;
pub(super) const ICMP: u8 = 1;
/// For experiments (RFC 3692): nothing in it that NAT could tell apart.
pub(super) const PORTLESS: u8 = 253;

/// Runs a test in a network namespace that ends with it.
pub(super) fn in_namespace(test: impl FnOnce(Lab) + Send + 'static) {
    in_namespace_with(config(), test);
}

/// The same, with a configuration of the test's own.
pub(super) fn in_namespace_with(config: NetworkConfig, test: impl FnOnce(Lab) + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: needs root for a network namespace");
    }
    let thread = std::thread::spawn(move || {
        // SAFETY: unshare touches no memory; only this thread changes its namespaces.
        if unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) } != 0 {
            return eprintln!(
                "skipped: no network namespaces here: {}",
                io::Error::last_os_error()
            );
        }
        hide_names();
        if !std::path::Path::new("/usr/sbin/nft").exists() {
            return eprintln!("skipped: needs /usr/sbin/nft (apt-get install nftables)");
        }
        test(Lab::new(config));
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A small node has neither names of protocols nor of services: the ruleset must do without. What
/// is mounted here ends with the thread's mount namespace.
fn hide_names() {
    let mount = |source: &std::ffi::CStr, target: &std::ffi::CStr, flags| {
        // SAFETY: both strings end with a zero and outlive the call; the rest may be null.
        let status = unsafe {
            libc::mount(
                source.as_ptr(),
                target.as_ptr(),
                std::ptr::null(),
                flags,
                std::ptr::null(),
            )
        };
        assert_eq!(status, 0, "{target:?}: {}", io::Error::last_os_error());
    };
    mount(c"none", c"/", libc::MS_REC | libc::MS_PRIVATE);
    for (path, name) in [
        ("/etc/protocols", c"/etc/protocols"),
        ("/etc/services", c"/etc/services"),
    ] {
        if std::path::Path::new(path).exists() {
            mount(c"/dev/null", name, libc::MS_BIND);
        }
    }
}

/// A node with an uplink whose far end is ours.
pub(super) struct Lab {
    pub(super) config: NetworkConfig,
    pub(super) core: Core,
    pub(super) route: Connection,
    pub(super) far: OwnedFd,
    pub(super) far_mac: Mac,
    pub(super) uplink_mac: Mac,
}

/// The usual one; a table of flows that does not depend on this machine's memory.
pub(super) fn config() -> NetworkConfig {
    NetworkConfig {
        flows: Some(1 << 20),
        ..NetworkConfig::default()
    }
}

impl Lab {
    fn new(config: NetworkConfig) -> Self {
        let mut route = Connection::route().unwrap();
        let veth = RouteNetlinkMessage::NewLink(LinkVeth::new("up0", "up1").build());
        route
            .execute(&[Request::route("make the uplink", CREATE | EXCL, &veth)])
            .unwrap();
        let (near, far) = (
            route.require_link("up0").unwrap(),
            route.require_link("up1").unwrap(),
        );
        let up = LinkChange {
            up: Some(true),
            ..Default::default()
        };
        let far_mac = far.mac.unwrap();
        route
            .execute(&[
                change(near.index, "up0", up),
                change(far.index, "up1", up),
                add_address(near.index, NODE.into(), 24),
                add_neighbour(near.index, FAR.into(), far_mac),
                Request::route(
                    "set the default route",
                    CREATE,
                    &RouteNetlinkMessage::NewRoute(
                        RouteMessageBuilder::<Ipv4Addr>::new().gateway(FAR).build(),
                    ),
                ),
            ])
            .unwrap();
        let core = Core::start(config.clone()).unwrap();
        Self {
            config,
            core,
            route,
            far: packet_socket(far.index),
            far_mac,
            uplink_mac: near.mac.unwrap(),
        }
    }

    pub(super) fn sliver(&self, index: u16) -> SliverNet {
        let mbit = |n: u64| Rate::from_bits_per_second(n * 1_000_000).unwrap();
        let wants = Wants {
            slice: format!("plc.test_{index}"),
            bandwidth: Bandwidth {
                guarantee: mbit(2),
                peak: Some(mbit(20)),
            },
            sustained: None,
            flow_limit: None,
            ports: PortSet::default(),
        };
        self.config
            .plan()
            .unwrap()
            .sliver(index, 0x1000 + u32::from(index), wants)
            .unwrap()
    }

    pub(super) fn add(&mut self, index: u16) -> Guest {
        let net = self.sliver(index);
        self.add_net(net)
    }

    pub(super) fn add_net(&mut self, net: SliverNet) -> Guest {
        let tap = self.core.add_sliver(&net).unwrap();
        let gateway = self.route.require_link(&net.tap).unwrap().mac.unwrap();
        Guest { net, tap, gateway }
    }

    /// The next IPv4 packet that leaves by the uplink.
    pub(super) fn leaves(&self) -> Packet {
        loop {
            if let Some(packet) = Packet::read(&receive(&self.far)).filter(|p| p.to_mac == self.far_mac) {
                return packet;
            }
        }
    }

    /// Waits until a sliver's counters are as they should be; the time only ends a test that has
    /// failed.
    pub(super) fn until(&mut self, index: u16, right: impl Fn(&SliverCounters) -> bool) -> SliverCounters {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        loop {
            let counters = self.core.counters().unwrap()[&index];
            if right(&counters) {
                return counters;
            }
            assert!(std::time::Instant::now() < end, "{counters:?}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// The uplink's next frame of this type.
    pub(super) fn leaves_frame(&self, ethertype: [u8; 2]) -> Vec<u8> {
        loop {
            let frame = receive(&self.far);
            if frame[..6] == self.far_mac && frame[12..14] == ethertype {
                return frame;
            }
        }
    }

    /// Sends a frame to the node from outside.
    pub(super) fn arrives_frame(&self, frame: &[u8]) {
        write(&self.far, frame);
    }

    /// Sends a packet to the node from outside.
    pub(super) fn arrives(&self, packet: Datagram) {
        write(&self.far, &packet.frame(self.far_mac, self.uplink_mac));
    }
}

/// A sliver's side of its tap.
pub(super) struct Guest {
    pub(super) net: SliverNet,
    pub(super) tap: OwnedFd,
    pub(super) gateway: Mac,
}

impl Guest {
    pub(super) fn send(&self, packet: Datagram) {
        self.send_as(self.net.mac, packet);
    }

    pub(super) fn send_as(&self, mac: Mac, packet: Datagram) {
        self.send_frame(&packet.frame(mac, self.gateway));
    }

    pub(super) fn send_frame(&self, frame: &[u8]) {
        write(&self.tap, &[&[0; VNET_HDR_LEN as usize], frame].concat());
    }

    pub(super) fn udp(&self, port: u16, to: Ipv4Addr) -> Datagram {
        Datagram {
            protocol: UDP,
            from: self.net.address,
            port,
            to,
            to_port: 9,
        }
    }

    /// The next frame of this type that is sent to the sliver alone.
    pub(super) fn gets_frame(&self, ethertype: [u8; 2]) -> Vec<u8> {
        loop {
            let frame = receive(&self.tap).split_off(VNET_HDR_LEN as usize);
            if frame[..6] == self.net.mac && frame[12..14] == ethertype {
                return frame;
            }
        }
    }

    /// The next IPv4 packet that the sliver gets.
    pub(super) fn gets(&self) -> Packet {
        loop {
            if let Some(packet) = Packet::read(&receive(&self.tap)[VNET_HDR_LEN as usize..]) {
                return packet;
            }
        }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Datagram {
    pub(super) protocol: u8,
    pub(super) from: Ipv4Addr,
    pub(super) port: u16,
    pub(super) to: Ipv4Addr,
    pub(super) to_port: u16,
}

impl Datagram {
    pub(super) fn frame(self, from: Mac, to: Mac) -> Vec<u8> {
        let mut payload = match self.protocol {
            // Echo request: type, code, checksum, identifier, sequence.
            ICMP => [&[8, 0, 0, 0], &self.port.to_be_bytes()[..], &[0, 1], b"mandoline"].concat(),
            // Source, destination, length, no checksum.
            _ => [
                &self.port.to_be_bytes()[..],
                &self.to_port.to_be_bytes(),
                &[0, 17, 0, 0],
                b"mandoline",
            ]
            .concat(),
        };
        if self.protocol == ICMP {
            let sum = checksum(&payload);
            payload[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        let length = (20 + payload.len()) as u16;
        let mut header = vec![0x45, 0];
        header.extend_from_slice(&length.to_be_bytes());
        header.extend_from_slice(&[0, 0, 0, 0, 64, self.protocol, 0, 0]);
        header.extend_from_slice(&self.from.octets());
        header.extend_from_slice(&self.to.octets());
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        [&to[..], &from, &[8, 0], &header, &payload].concat()
    }
}

pub(super) fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0)));
    let sum = words.sum::<u32>();
    !((sum & 0xffff) + (sum >> 16)) as u16
}

#[derive(Debug, PartialEq)]
pub(super) struct Packet {
    pub(super) to_mac: Mac,
    pub(super) protocol: u8,
    pub(super) from: Ipv4Addr,
    /// Source port, or the identifier of an echo.
    pub(super) port: u16,
    pub(super) to: Ipv4Addr,
    /// Destination port.
    pub(super) to_port: u16,
}

impl Packet {
    pub(super) fn read(frame: &[u8]) -> Option<Self> {
        if frame.get(12..14)? != [8, 0] {
            return None;
        }
        let ip = &frame[14..];
        let address = |at: usize| <[u8; 4]>::try_from(&ip[at..at + 4]).map(Ipv4Addr::from).ok();
        let at = if ip[9] == ICMP { 24 } else { 20 };
        Some(Self {
            to_mac: frame[..6].try_into().ok()?,
            protocol: ip[9],
            from: address(12)?,
            port: u16::from_be_bytes([ip[at], ip[at + 1]]),
            to: address(16)?,
            to_port: u16::from_be_bytes([ip[22], ip[23]]),
        })
    }
}

pub(super) fn packet_socket(link: u32) -> OwnedFd {
    let all = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: socket touches no memory of ours.
    let fd = unsafe {
        libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            i32::from(all),
        )
    };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: sockaddr_ll is plain old data, for which all zeroes is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = all;
    address.sll_ifindex = link as i32;
    // SAFETY: the address is a whole sockaddr_ll that outlives the call.
    let status = unsafe { libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as u32) };
    assert_eq!(status, 0, "{}", io::Error::last_os_error());
    socket
}

pub(super) fn write(fd: &OwnedFd, bytes: &[u8]) {
    assert_eq!(rustix::io::write(fd, bytes).unwrap(), bytes.len());
}

/// The next frame; the timeout only ends a test that has failed.
pub(super) fn receive(fd: &OwnedFd) -> Vec<u8> {
    let mut buffer = vec![0; 70_000];
    let timeout = rustix::time::Timespec {
        tv_sec: 10,
        tv_nsec: 0,
    };
    assert_eq!(
        poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout)).unwrap(),
        1,
        "nothing came"
    );
    let length = rustix::io::read(fd, &mut buffer).unwrap();
    buffer.truncate(length);
    buffer
}

/// The tracked flows of this thread's namespace; `None` where the kernel has no such file.
pub(super) fn flows() -> Option<String> {
    std::fs::read_to_string("/proc/thread-self/net/nf_conntrack").ok()
}
