//! Own IPv6 addresses: what a sliver may send, and what reaches it.

use std::net::Ipv6Addr;

use mandoline_limits::netlink::link::{Mac, add_address, add_neighbour};

use super::*;
use crate::net::plan::{GATEWAY6, link_local};

const IPV6: [u8; 2] = [0x86, 0xdd];
const FAR6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 9);
const ICMP6: u8 = 58;

fn with_ipv6(test: impl FnOnce(Lab) + Send + 'static) {
    let config = NetworkConfig {
        net6: Some("2001:db8:5::/64".parse().unwrap()),
        ..config()
    };
    in_namespace_with(config, |mut lab| {
        let near = lab.route.require_link("up0").unwrap().index;
        let node = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
        lab.route
            .execute(&[
                add_address(near, node.into(), 64),
                add_neighbour(near, FAR6.into(), lab.far_mac),
            ])
            .unwrap();
        test(lab);
    });
}

/// An IPv6 packet of one protocol, with the checksum at this place of the payload.
fn packet(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, mut payload: Vec<u8>, sum_at: usize) -> Vec<u8> {
    let length = (payload.len() as u16).to_be_bytes();
    let pseudo = [
        &from.octets()[..],
        &to.octets(),
        &[0, 0],
        &length,
        &[0, 0, 0, protocol],
        &payload,
    ]
    .concat();
    let sum = checksum(&pseudo).to_be_bytes();
    payload[sum_at..sum_at + 2].copy_from_slice(&sum);
    let header = [&[0x60, 0, 0, 0], &length[..], &[protocol, 255]].concat();
    [&header[..], &from.octets(), &to.octets(), &payload].concat()
}

fn udp(from: Ipv6Addr, to: Ipv6Addr, port: u16) -> Vec<u8> {
    let payload = [&port.to_be_bytes()[..], &[0, 9, 0, 17, 0, 0], b"mandoline"].concat();
    packet(from, to, 17, payload, 6)
}

/// A message of neighbour discovery about `target`, with the sender's Ethernet address.
fn discovery(kind: u8, from: Ipv6Addr, to: Ipv6Addr, target: Ipv6Addr, mac: Mac) -> Vec<u8> {
    let payload = [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &target.octets(), &[1, 1], &mac].concat();
    packet(from, to, ICMP6, payload, 2)
}

fn frame(to: Mac, from: Mac, packet: &[u8]) -> Vec<u8> {
    [&to[..], &from, &IPV6, packet].concat()
}

fn address_at(frame: &[u8], at: usize) -> Ipv6Addr {
    Ipv6Addr::from(<[u8; 16]>::try_from(&frame[at..at + 16]).unwrap())
}

/// The kernel takes a moment until it listens to questions for a new address.
fn wait_for_gateway(guest: &Guest) {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        // Index, device, group, users, flags, timer.
        let text = std::fs::read_to_string("/proc/thread-self/net/igmp6").unwrap();
        let mut lines = text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>());
        if lines.any(|l| l[1] == guest.net.tap && l[2] == "ff0200000000000000000001ff000001") {
            return;
        }
        assert!(std::time::Instant::now() < end, "{text}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

impl Guest {
    fn sends6(&self, packet: &[u8]) {
        self.send_frame(&frame(self.gateway, self.net.mac, packet));
    }

    fn address6(&self) -> Ipv6Addr {
        self.net.address6.unwrap()
    }
}

#[test]
fn slivers_have_addresses_of_their_own_in_both_directions() {
    with_ipv6(|mut lab| {
        let (guest, other) = (lab.add(1), lab.add(2));
        assert_eq!(guest.address6(), "2001:db8:5::3".parse::<Ipv6Addr>().unwrap());
        guest.sends6(&udp(guest.address6(), FAR6, 5_000));
        let left = lab.leaves_frame(IPV6);
        assert_eq!(
            (address_at(&left, 22), address_at(&left, 38)),
            (guest.address6(), FAR6)
        );
        assert_eq!(
            left[54..56],
            5_000u16.to_be_bytes(),
            "no address or port is translated"
        );

        // A stranger reaches it, and nobody where there is no sliver.
        let absent = "2001:db8:5::99".parse().unwrap();
        for to in [absent, guest.address6()] {
            lab.arrives_frame(&frame(lab.uplink_mac, lab.far_mac, &udp(FAR6, to, 7)));
        }
        let got = guest.gets_frame(IPV6);
        assert_eq!(
            (got[..6].to_vec(), address_at(&got, 22)),
            (guest.net.mac.to_vec(), FAR6)
        );
        // So does a neighbour.
        other.sends6(&udp(other.address6(), guest.address6(), 8));
        assert_eq!(address_at(&guest.gets_frame(IPV6), 22), other.address6());

        let counters = lab.core.counters().unwrap();
        assert_eq!((counters[&1].sent.packets, counters[&1].received.packets), (1, 2));
        match flows() {
            Some(flows) => assert_eq!(flows.matches(&format!("mark={} ", 0x1001)).count(), 2, "{flows}"),
            None => eprintln!("not checked: the mark (no /proc/net/nf_conntrack)"),
        }
        let recorded = [guest.net.clone(), other.net.clone()];
        lab.core = Core::start(lab.config.clone()).unwrap();
        assert_eq!(lab.core.reconcile(&recorded).unwrap().intact, [1, 2]);
    });
}

#[test]
fn forged_packets_and_forged_neighbours_are_dropped_and_counted() {
    with_ipv6(|mut lab| {
        let (guest, other) = (lab.add(1), lab.add(2));
        let (mine, theirs, mac) = (guest.address6(), other.address6(), guest.net.mac);
        let all_nodes = "ff02::1".parse().unwrap();
        // Addresses of others, the gateway's, and its own from a link where it has no business.
        for from in [theirs, FAR6, GATEWAY6, link_local(mac)] {
            guest.sends6(&udp(from, FAR6, 1));
        }
        guest.send_frame(&frame(guest.gateway, other.net.mac, &udp(mine, FAR6, 2)));
        // It is no router, redirects nobody, and answers for nobody; nor does it ask in another's name.
        for (kind, from) in [
            (134, link_local(mac)),
            (137, GATEWAY6),
            (136, mine),
            (135, theirs),
            (135, GATEWAY6),
        ] {
            guest.sends6(&discovery(kind, from, all_nodes, theirs, mac));
        }
        // No forgeries, but nobody listens: who are you, router; who has this address of my own.
        guest.sends6(&discovery(133, link_local(mac), all_nodes, mine, mac));
        guest.sends6(&discovery(135, Ipv6Addr::UNSPECIFIED, all_nodes, mine, mac));
        guest.sends6(&discovery(135, mine, all_nodes, theirs, mac));
        guest.sends6(&udp(mine, FAR6, 3));
        let left = lab.leaves_frame(IPV6);
        assert_eq!(left[54..56], 3u16.to_be_bytes());
        let counters = lab.core.counters().unwrap();
        assert_eq!(
            (counters[&1].spoofed.packets, counters[&2].spoofed.packets),
            (10, 0)
        );
        assert_eq!(counters[&1].sent.packets, 1);
        assert_eq!(lab.core.node_counters().unwrap().drops["other_frames"].packets, 3);
    });
}

#[test]
fn the_gateway_answers_and_echoes_alarm() {
    with_ipv6(|mut lab| {
        let guest = lab.add(1);
        wait_for_gateway(&guest);
        let to = "ff02::1:ff00:1".parse().unwrap();
        for from in [guest.address6(), link_local(guest.net.mac)] {
            guest.sends6(&discovery(135, from, to, GATEWAY6, guest.net.mac));
            let answer = guest.gets_frame(IPV6);
            assert_eq!(
                (answer[54], address_at(&answer, 62)),
                (136, GATEWAY6),
                "an advertisement"
            );
            assert_eq!(answer[80..86], guest.gateway);
        }
        let echo = |id: u8| packet(guest.address6(), FAR6, ICMP6, vec![128, 0, 0, 0, 0, id, 0, 1], 2);
        guest.sends6(&echo(1));
        assert_eq!(lab.leaves_frame(IPV6)[54], 128);
        // With a hop-by-hop option, which routers everywhere have to look at.
        let mut options = udp(guest.address6(), FAR6, 4);
        options[5] += 8;
        options[6] = 0;
        options.splice(40..40, [17, 0, 1, 4, 0, 0, 0, 0]);
        guest.sends6(&options);
        lab.leaves_frame(IPV6);
        let counters = lab.core.counters().unwrap()[&1];
        assert_eq!((counters.sent.packets, counters.alarms.packets), (4, 2));
    });
}
