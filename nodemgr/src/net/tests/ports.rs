//! Owned ports: they keep their number in both directions, and have one owner.

use mandoline_rspec::PortSet;

use super::*;

fn ports(items: &[&str]) -> PortSet {
    let mut set = PortSet::default();
    for item in items {
        let (protocol, range) = PortSet::parse_item(item).unwrap();
        set.insert(protocol, range);
    }
    set
}

fn owner(lab: &mut Lab, index: u16, items: &[&str]) -> Guest {
    let mut net = lab.sliver(index);
    net.wants.ports = ports(items);
    lab.add_net(net)
}

fn stranger(to_port: u16) -> Datagram {
    Datagram {
        protocol: UDP,
        from: FAR,
        port: 9,
        to: NODE,
        to_port,
    }
}

#[test]
fn owned_ports_keep_their_number_outwards() {
    in_namespace(|mut lab| {
        let guest = owner(&mut lab, 1, &["udp/53", "udp/100-200", "tcp/80"]);
        let other = lab.add(2);
        for port in [53, 100, 150, 200] {
            guest.send(guest.udp(port, FAR));
            let packet = lab.leaves();
            assert_eq!((packet.from, packet.port), (NODE, port));
        }
        // An identifier of an echo belongs to who owns the UDP port of that number.
        guest.send(Datagram {
            protocol: ICMP,
            ..guest.udp(150, FAR)
        });
        assert_eq!(lab.leaves().port, 150);
        // Not its own: 80 is only of TCP, 201 is nobody's; nor is 53 the neighbour's.
        for (guest, port) in [(&guest, 80), (&guest, 201), (&other, 53)] {
            guest.send(guest.udp(port, FAR));
            let packet = lab.leaves();
            assert!(guest.net.ports.contains(&packet.port), "{packet:?}");
        }
    });
}

#[test]
fn owned_ports_lead_to_their_owner() {
    in_namespace(|mut lab| {
        let guest = owner(&mut lab, 1, &["udp/100-200"]);
        let other = lab.add(2);
        // Neighbours of the range are nobody's: the node itself would get those.
        for to_port in [99, 201, 150] {
            lab.arrives(stranger(to_port));
        }
        let packet = guest.gets();
        assert_eq!(
            (packet.from, packet.port, packet.to, packet.to_port),
            (FAR, 9, guest.net.address, 150)
        );
        // The answer comes from where the stranger has asked.
        guest.send(guest.udp(150, FAR));
        // (Of the ports that are nobody's, the node has said so.)
        let packet = loop {
            let packet = lab.leaves();
            if packet.protocol == UDP {
                break packet;
            }
        };
        assert_eq!((packet.from, packet.port, packet.to_port), (NODE, 150, 9));
        // A neighbour reaches it by the node's address as strangers do.
        other.send(Datagram {
            to_port: 151,
            ..other.udp(7, NODE)
        });
        let packet = guest.gets();
        assert_eq!((packet.from, packet.to_port), (other.net.address, 151));
        match flows() {
            Some(flows) => {
                let of = |mark: u32| {
                    flows
                        .lines()
                        .filter(|l| l.contains(&format!("mark={mark} ")))
                        .count()
                };
                assert_eq!(
                    (of(0x1001), of(0x1002)),
                    (1, 1),
                    "a stranger's flow is the owner's: {flows}"
                );
            }
            None => eprintln!("not checked: the mark (no /proc/net/nf_conntrack)"),
        }
        assert_eq!(lab.core.counters().unwrap()[&1].received.packets, 2);
    });
}

#[test]
fn a_port_has_one_owner_and_changes_hands_while_both_run() {
    in_namespace(|mut lab| {
        let guest = owner(&mut lab, 1, &["udp/53", "tcp/80"]);
        let mut thief = lab.sliver(2);
        thief.wants.ports = ports(&["udp/50-60"]);
        let refused = lab.core.add_sliver(&thief).unwrap_err().to_string();
        assert!(
            refused.contains("udp/50-60") && refused.contains("plc.test_1"),
            "{refused}"
        );
        assert_eq!(lab.core.list().unwrap().into_keys().collect::<Vec<_>>(), [1]);

        let other = lab.add(2);
        let mut gives = guest.net.clone();
        gives.wants.ports = ports(&["tcp/80"]);
        let mut takes = other.net.clone();
        takes.wants.ports = ports(&["udp/53"]);
        lab.core.update_sliver(&takes).unwrap_err();
        lab.core.update_sliver(&gives).unwrap();
        lab.core.update_sliver(&takes).unwrap();
        lab.arrives(stranger(53));
        assert_eq!(other.gets().to, other.net.address);
        other.send(other.udp(53, FAR));
        assert_eq!(lab.leaves().port, 53);
        // What is recorded is what is there; a restart finds nothing to do.
        lab.core = Core::start(config()).unwrap();
        let report = lab.core.reconcile(&[gives, takes]).unwrap();
        assert_eq!(report.intact, [1, 2]);
        // And of a sliver that goes, nothing stays.
        lab.core.remove_sliver(2, other.net.mark).unwrap();
        assert!(
            lab.core
                .filter
                .elements(&Set::Owned.table(), "owned")
                .unwrap()
                .iter()
                .all(|(e, _)| e.data == Some(guest.net.address.octets().to_vec()))
        );
    });
}
