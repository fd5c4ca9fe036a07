//! The real kernel, in a network namespace of each test's own: taps that frames are written to,
//! and a veth pair as the uplink. Needs root and the kernel's IFB, HTB and nf_tables; without
//! them a test says so and passes.

#![allow(clippy::unwrap_used)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use mandoline_limits::Rate;
use mandoline_limits::netlink::link::{Mac, add_address, add_neighbour, change};
use mandoline_limits::netlink::{CREATE, EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::{LinkVeth, RouteMessageBuilder};
use rustix::event::{PollFd, PollFlags, poll};

use super::*;
use mandoline_limits::netlink::link::LinkChange;
use mandoline_limits::netlink::{Connection, Request};
use mandoline_limits::tap::VNET_HDR_LEN;

const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const FAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 9);
const UDP: u8 = 17;
const ICMP: u8 = 1;
/// For experiments (RFC 3692): nothing in it that NAT could tell apart.
const PORTLESS: u8 = 253;

/// Runs a test in a network namespace that ends with it.
fn in_namespace(test: impl FnOnce(Lab) + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: needs root for a network namespace");
    }
    let thread = std::thread::spawn(move || {
        // SAFETY: unshare touches no memory; only this thread changes its network namespace.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return eprintln!(
                "skipped: no network namespaces here: {}",
                io::Error::last_os_error()
            );
        }
        if !std::path::Path::new("/usr/sbin/nft").exists() {
            return eprintln!("skipped: needs /usr/sbin/nft (apt-get install nftables)");
        }
        test(Lab::new());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A node with an uplink whose far end is ours.
struct Lab {
    core: Core,
    route: Connection,
    far: OwnedFd,
    far_mac: Mac,
    uplink_mac: Mac,
}

fn config() -> NetworkConfig {
    NetworkConfig::default()
}

impl Lab {
    fn new() -> Self {
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
                add_address(near.index, NODE, 24),
                add_neighbour(near.index, FAR, far_mac),
                Request::route(
                    "set the default route",
                    CREATE,
                    &RouteNetlinkMessage::NewRoute(
                        RouteMessageBuilder::<Ipv4Addr>::new().gateway(FAR).build(),
                    ),
                ),
            ])
            .unwrap();
        let core = Core::start(config()).unwrap();
        Self {
            core,
            route,
            far: packet_socket(far.index),
            far_mac,
            uplink_mac: near.mac.unwrap(),
        }
    }

    fn sliver(&self, index: u16) -> SliverNet {
        let mbit = |n: u64| Rate::from_bits_per_second(n * 1_000_000).unwrap();
        let bandwidth = Bandwidth {
            guarantee: mbit(2),
            peak: Some(mbit(20)),
        };
        Plan::new(config().net, 20_000, 64)
            .unwrap()
            .sliver(index, 0x1000 + u32::from(index), bandwidth)
            .unwrap()
    }

    fn add(&mut self, index: u16) -> Guest {
        let net = self.sliver(index);
        let tap = self.core.add_sliver(&net).unwrap();
        let gateway = self.route.require_link(&net.tap).unwrap().mac.unwrap();
        Guest { net, tap, gateway }
    }

    /// The next IPv4 packet that leaves by the uplink.
    fn leaves(&self) -> Packet {
        loop {
            if let Some(packet) = Packet::read(&receive(&self.far)).filter(|p| p.to_mac == self.far_mac) {
                return packet;
            }
        }
    }

    /// Sends a packet to the node from outside.
    fn arrives(&self, packet: Datagram) {
        write(&self.far, &packet.frame(self.far_mac, self.uplink_mac));
    }
}

/// A sliver's side of its tap.
struct Guest {
    net: SliverNet,
    tap: OwnedFd,
    gateway: Mac,
}

impl Guest {
    fn send(&self, packet: Datagram) {
        self.send_as(self.net.mac, packet);
    }

    fn send_as(&self, mac: Mac, packet: Datagram) {
        self.send_frame(&packet.frame(mac, self.gateway));
    }

    fn send_frame(&self, frame: &[u8]) {
        write(&self.tap, &[&[0; VNET_HDR_LEN as usize], frame].concat());
    }

    fn udp(&self, port: u16, to: Ipv4Addr) -> Datagram {
        Datagram {
            protocol: UDP,
            from: self.net.address,
            port,
            to,
            to_port: 9,
        }
    }

    /// The next IPv4 packet that the sliver gets.
    fn gets(&self) -> Packet {
        loop {
            if let Some(packet) = Packet::read(&receive(&self.tap)[VNET_HDR_LEN as usize..]) {
                return packet;
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Datagram {
    protocol: u8,
    from: Ipv4Addr,
    port: u16,
    to: Ipv4Addr,
    to_port: u16,
}

impl Datagram {
    fn frame(self, from: Mac, to: Mac) -> Vec<u8> {
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

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0)));
    let sum = words.sum::<u32>();
    !((sum & 0xffff) + (sum >> 16)) as u16
}

#[derive(Debug, PartialEq)]
struct Packet {
    to_mac: Mac,
    protocol: u8,
    from: Ipv4Addr,
    /// Source port, or the identifier of an echo.
    port: u16,
    to: Ipv4Addr,
}

impl Packet {
    fn read(frame: &[u8]) -> Option<Self> {
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
        })
    }
}

fn packet_socket(link: u32) -> OwnedFd {
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

fn write(fd: &OwnedFd, bytes: &[u8]) {
    assert_eq!(rustix::io::write(fd, bytes).unwrap(), bytes.len());
}

/// The next frame; the timeout only ends a test that has failed.
fn receive(fd: &OwnedFd) -> Vec<u8> {
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
fn flows() -> Option<String> {
    std::fs::read_to_string("/proc/thread-self/net/nf_conntrack").ok()
}

#[test]
fn what_leaves_has_the_nodes_address_and_a_port_of_the_slivers_block() {
    in_namespace(|mut lab| {
        let guest = lab.add(3);
        assert_eq!(guest.net.ports, 20_192..=20_255);
        for (protocol, port) in [(UDP, 5_000), (UDP, 20_200), (ICMP, 77)] {
            guest.send(Datagram {
                protocol,
                ..guest.udp(port, FAR)
            });
            let packet = lab.leaves();
            assert_eq!((packet.from, packet.to, packet.protocol), (NODE, FAR, protocol));
            assert!(guest.net.ports.contains(&packet.port), "{packet:?}");
            if port == 20_200 {
                assert_eq!(packet.port, port, "an own port keeps its number");
            }
        }
        let stats = lab.core.counters().unwrap()[&3];
        assert_eq!((stats.sent.packets, stats.spoofed.packets), (3, 0));
        match flows() {
            Some(flows) => assert_eq!(
                flows
                    .lines()
                    .filter(|l| l.contains(&format!("mark={}", 0x1003)))
                    .count(),
                3,
                "{flows}"
            ),
            None => eprintln!("not checked: the mark (no /proc/net/nf_conntrack)"),
        }
    });
}

#[test]
fn answers_come_back_and_nothing_else_comes_in() {
    in_namespace(|mut lab| {
        let guest = lab.add(0);
        guest.send(guest.udp(5_000, FAR));
        let port = lab.leaves().port;
        // A stranger's packet to another port of the block, then the answer: only that arrives.
        lab.arrives(Datagram {
            protocol: UDP,
            from: FAR,
            port: 9,
            to: NODE,
            to_port: port + 1,
        });
        lab.arrives(Datagram {
            protocol: UDP,
            from: FAR,
            port: 8,
            to: guest.net.address,
            to_port: 5_000,
        });
        lab.arrives(Datagram {
            protocol: UDP,
            from: FAR,
            port: 9,
            to: NODE,
            to_port: port,
        });
        let packet = guest.gets();
        assert_eq!((packet.from, packet.port, packet.to), (FAR, 9, guest.net.address));
        assert_eq!(packet.to_mac, guest.net.mac);
        assert_eq!(lab.core.counters().unwrap()[&0].received.packets, 1);
    });
}

#[test]
fn spoofed_frames_are_dropped_and_counted() {
    in_namespace(|mut lab| {
        let (guest, other) = (lab.add(1), lab.add(2));
        guest.send(Datagram {
            from: other.net.address,
            ..guest.udp(1, FAR)
        });
        guest.send(Datagram {
            from: FAR,
            ..guest.udp(2, FAR)
        });
        guest.send_as(other.net.mac, guest.udp(3, FAR));
        // "10.128.0.4 is at my MAC", the neighbour's address: an ARP reply.
        let arp = [
            &guest.gateway[..],
            &guest.net.mac,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2],
            &guest.net.mac,
            &other.net.address.octets(),
            &guest.gateway,
            &[10, 128, 0, 1],
        ];
        guest.send_frame(&arp.concat());
        // IPv6, which slivers do not have yet, is dropped too but is no forgery.
        guest.send_frame(&[&guest.gateway[..], &guest.net.mac, &[0x86, 0xdd], &[0x60; 40]].concat());
        guest.send(guest.udp(4, FAR));
        assert_eq!(lab.leaves().from, NODE);
        let counters = lab.core.counters().unwrap();
        assert_eq!(
            (counters[&1].spoofed.packets, counters[&2].spoofed.packets),
            (4, 0)
        );
        assert_eq!(
            counters[&1].sent.packets, 1,
            "only what was checked uses the sliver's bandwidth"
        );
        let node = lab.core.node_counters().unwrap();
        assert_eq!(node.drops["other_frames"].packets, 1);
        assert_eq!(node.strays.packets, 0);
    });
}

#[test]
fn slivers_reach_each_other_by_address_but_not_the_node_nor_empty_places() {
    in_namespace(|mut lab| {
        let (guest, other) = (lab.add(1), lab.add(2));
        let nowhere = lab.sliver(700).address;
        guest.send(guest.udp(1, NODE));
        guest.send(guest.udp(2, nowhere));
        guest.send(Datagram {
            protocol: PORTLESS,
            ..guest.udp(3, FAR)
        });
        guest.send(guest.udp(4, other.net.address));
        let packet = other.gets();
        assert_eq!((packet.from, packet.port), (guest.net.address, 4));
        assert_eq!(
            lab.core.counters().unwrap()[&1].sent.packets,
            4,
            "traffic between slivers is shaped too"
        );
        let drops = lab.core.node_counters().unwrap().drops;
        assert_eq!((drops["to_node"].packets, drops["refused"].packets), (1, 2));
    });
}

#[test]
fn a_flood_is_held_to_the_peak_rate() {
    in_namespace(|mut lab| {
        let guest = lab.add(0);
        let slow = Rate::from_bits_per_second(80_000).unwrap();
        lab.core
            .set_rate(
                0,
                &Bandwidth {
                    guarantee: slow,
                    peak: Some(slow),
                },
            )
            .unwrap();
        let class = lab.core.list().unwrap()[&0].class.unwrap();
        assert_eq!((class.rate, class.ceil), (slow, slow));
        // 5000 frames of 51 bytes at once: the bucket lets about 3 kB through, the queue holds 128 KiB.
        for _ in 0..5_000 {
            guest.send(guest.udp(7, FAR));
        }
        lab.leaves();
        let stats = lab.core.counters().unwrap()[&0].sent;
        assert!(stats.drops > 2_000 && stats.overlimits > 0, "{stats:?}");
        assert!(
            lab.core
                .set_rate(
                    5,
                    &Bandwidth {
                        guarantee: slow,
                        peak: None
                    }
                )
                .is_err()
        );
    });
}

#[test]
fn a_restart_disturbs_nothing_and_repairs_what_is_broken() {
    in_namespace(|mut lab| {
        let (guest, other, third) = (lab.add(1), lab.add(2), lab.add(3));
        guest.send(guest.udp(5_000, FAR));
        let port = lab.leaves().port;
        let recorded = [guest.net.clone(), other.net.clone(), third.net.clone()];

        // The node manager comes back; meanwhile one monitor died and one element was lost.
        lab.core = Core::start(config()).unwrap();
        drop(third.tap);
        let mut filter = Connection::netfilter().unwrap();
        filter
            .commit(&[ruleset::Set::Marks.delete(&mandoline_limits::netlink::nft::device_field("mtap2"))])
            .unwrap();
        let report = lab.core.reconcile(&recorded).unwrap();
        assert_eq!(
            report,
            Reconciled {
                intact: vec![1],
                repaired: vec![2],
                dead: vec![3],
                unknown: vec![]
            }
        );
        let again = lab.core.reconcile(&recorded[..2]).unwrap();
        assert_eq!(
            again,
            Reconciled {
                intact: vec![1, 2],
                ..Default::default()
            }
        );

        // The flow from before still gets its answers, and has kept its port.
        lab.arrives(Datagram {
            protocol: UDP,
            from: FAR,
            port: 9,
            to: NODE,
            to_port: port,
        });
        assert_eq!(guest.gets().from, FAR);
        guest.send(guest.udp(5_000, FAR));
        assert_eq!(lab.leaves().port, port);

        // What is recorded nowhere goes, its tap goes down.
        let report = lab.core.reconcile(&recorded[1..2]).unwrap();
        assert_eq!((report.intact, report.unknown), (vec![2], vec![1]));
        assert!(!lab.route.require_link("mtap1").unwrap().up);
    });
}

#[test]
fn removal_leaves_no_trace_and_the_place_is_free_again() {
    in_namespace(|mut lab| {
        for round in 0..3 {
            let guest = lab.add(4);
            guest.send(guest.udp(5_000, FAR));
            lab.leaves();
            // The monitor may have gone before or go after: both happen.
            let net = guest.net.clone();
            let kept = if round == 0 {
                drop(guest);
                None
            } else {
                Some(guest)
            };
            lab.core.remove_sliver(4, net.mark).unwrap();
            if let Some(flows) = flows() {
                assert!(!flows.contains(&format!("mark={}", net.mark)), "{flows}");
            }
            drop(kept);
            assert_eq!(lab.core.list().unwrap(), Default::default());
            lab.core.remove_sliver(4, net.mark).unwrap();
        }
    });
}

#[test]
fn what_cannot_be_leaves_nothing_behind() {
    in_namespace(|mut lab| {
        let guest = lab.add(0);
        let twice = lab.core.add_sliver(&guest.net).unwrap_err().to_string();
        assert!(twice.contains("mtap0"), "{twice}");
        let mut greedy = lab.sliver(1);
        greedy.bandwidth.guarantee = Rate::from_bits_per_second(1_000_000_000).unwrap();
        assert!(
            lab.core
                .add_sliver(&greedy)
                .unwrap_err()
                .to_string()
                .contains("100 Mbit/s")
        );
        assert_eq!(lab.core.list().unwrap().into_keys().collect::<Vec<_>>(), [0]);
        guest.send(guest.udp(1, FAR));
        lab.leaves();
    });
}

#[test]
fn without_a_port_block_nothing_leaves() {
    in_namespace(|mut lab| {
        let (guest, other) = (lab.add(1), lab.add(2));
        let mut filter = Connection::netfilter().unwrap();
        filter
            .commit(&[ruleset::Set::Ports.delete(&guest.net.address.octets())])
            .unwrap();
        guest.send(guest.udp(1, FAR));
        other.send(other.udp(2, FAR));
        let packet = lab.leaves();
        assert!(other.net.ports.contains(&packet.port), "{packet:?}");
        assert_eq!(lab.core.node_counters().unwrap().drops["foreign"].packets, 1);
    });
}

#[test]
fn the_handle_does_what_the_thread_does() {
    in_namespace(|lab| {
        let net = lab.sliver(9);
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(async {
                let network = Network::start(config()).await.unwrap();
                let tap = network.add_sliver(net.clone()).await.unwrap();
                assert_eq!(network.plan().capacity(), 711);
                let installed = network.list().await.unwrap().remove(&9).unwrap();
                assert!(installed.tap && installed.routed);
                assert_eq!(
                    (installed.address, installed.mark),
                    (Some(net.address), Some(net.mark))
                );
                network
                    .set_rate(
                        9,
                        Bandwidth {
                            peak: None,
                            ..net.bandwidth
                        },
                    )
                    .await
                    .unwrap();
                assert_eq!(
                    network.reconcile(vec![net.clone()]).await.unwrap().repaired,
                    [9],
                    "the recorded rate is back"
                );
                network.remove_sliver(9, net.mark).await.unwrap();
                assert!(
                    !network.list().await.unwrap()[&9].routed,
                    "held by its monitor, but mute"
                );
                drop(tap);
                assert_eq!(network.list().await.unwrap(), Default::default());
            });
    });
}

#[test]
fn names_of_uplinks_cannot_carry_rules() {
    let plan = Plan::new(config().net, 20_000, 64).unwrap();
    for bad in ["a b", "x\"y", "mtap1", ""] {
        assert!(
            ruleset::text(&plan, "mifb", &[bad.to_owned()]).is_err(),
            "{bad:?}"
        );
    }
}
