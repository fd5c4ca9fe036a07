//! The node's network against the real kernel. What a test needs is in [`lab`].

#![allow(clippy::unwrap_used)]

mod flows;
mod ipv6;
mod lab;
mod ports;
mod shaping;
mod sustained;

use mandoline_limits::netlink::Connection;
use mandoline_limits::netlink::nft::{Element, device_field};

use super::elements::Set;
use super::*;
use lab::*;

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
        let mut net = guest.net.clone();
        net.wants.bandwidth = Bandwidth {
            guarantee: slow,
            peak: Some(slow),
        };
        lab.core.update_sliver(&net).unwrap();
        let class = lab.core.list().unwrap()[&0].class.unwrap();
        assert_eq!((class.rate, class.ceil), (slow, slow));
        // 5000 frames of 51 bytes at once: the bucket lets about 3 kB through, the queue holds 128 KiB.
        for _ in 0..5_000 {
            guest.send(guest.udp(7, FAR));
        }
        lab.leaves();
        let stats = lab.core.counters().unwrap()[&0].sent;
        assert!(stats.drops > 2_000 && stats.overlimits > 0, "{stats:?}");
        net.index = 5;
        assert!(lab.core.update_sliver(&net).is_err(), "not there");
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
            .commit(&[Set::Marks.delete(&Element::new(device_field("mtap2")))])
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
        greedy.wants.bandwidth.guarantee = Rate::from_bits_per_second(1_000_000_000).unwrap();
        assert!(
            lab.core
                .add_sliver(&greedy)
                .unwrap_err()
                .to_string()
                .contains("20 Mbit/s")
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
            .commit(&[Set::Ports.delete(&Element::new(guest.net.address.octets().to_vec()))])
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
                let mut changed = net.clone();
                changed.wants.bandwidth.peak = None;
                network.update_sliver(changed).await.unwrap();
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
