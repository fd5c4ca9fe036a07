//! The HTB tree: whose packets go to which class, and what is said of it while slivers run.

use mandoline_limits::netlink::tc::Class;

use super::*;

fn rate(bits: u64) -> Rate {
    Rate::from_bits_per_second(bits).unwrap()
}

/// The kernel's classes by minor number.
fn classes(lab: &mut Lab) -> std::collections::BTreeMap<u16, Class> {
    let link = lab.route.require_link("mifb").unwrap().index;
    let classes = lab.route.classes(link).unwrap();
    classes.into_iter().map(|class| (class.minor, class)).collect()
}

#[test]
fn the_tree_has_the_nodes_rate_as_root_and_a_branch_for_each_sliver() {
    in_namespace(|mut lab| {
        let _guests = [(0, 1), (1, 2), (2, 4)].map(|(index, mbit)| {
            let mut net = lab.sliver(index);
            net.wants.bandwidth.guarantee = rate(mbit * 1_000_000);
            lab.core.add_sliver(&net).unwrap()
        });
        let tree = classes(&mut lab);
        assert_eq!(
            (
                tree[&1].parent,
                tree[&1].parameters.rate,
                tree[&1].parameters.ceil
            ),
            (0, Rate::NODE_DEFAULT, Rate::NODE_DEFAULT)
        );
        for slot in 0..3 {
            let (whole, traffic, alarms) = (
                &tree[&(0x1000 + slot)],
                &tree[&(0x5000 + slot)],
                &tree[&(0x9000 + slot)],
            );
            assert_eq!(
                (whole.parent, traffic.parent, alarms.parent),
                (1, 0x1000 + slot, 0x1000 + slot)
            );
            let guarantee = rate(1_000_000 << slot);
            assert_eq!(
                (whole.parameters.rate, whole.parameters.ceil),
                (guarantee, rate(20_000_000))
            );
            assert_eq!(
                (traffic.parameters.rate, traffic.parameters.ceil),
                (guarantee, rate(20_000_000))
            );
            assert_eq!(
                u64::from(traffic.parameters.quantum),
                u64::from(tree[&0x5000].parameters.quantum) << slot,
                "the excess is shared as the guarantees are"
            );
            // 5 packets a second, counted as full frames.
            assert_eq!(
                (alarms.parameters.ceil, alarms.parameters.mpu),
                (rate(5 * 1514 * 8), 1514)
            );
        }
    });
}

#[test]
fn the_nodes_rate_changes_while_slivers_run() {
    in_namespace(|mut lab| {
        let guest = lab.add(0);
        guest.send(guest.udp(1, FAR));
        lab.leaves();
        lab.core.set_node_rate(rate(10_000_000)).unwrap();
        let tree = classes(&mut lab);
        assert_eq!(tree[&1].parameters.ceil, rate(10_000_000));
        assert_eq!(
            tree[&0x5000].parameters.ceil,
            rate(10_000_000),
            "20 Mbit/s were allowed"
        );
        assert_eq!(tree[&0x5000].parameters.rate, rate(2_000_000));
        // Less than what is guaranteed: nobody may break the node's rate.
        lab.core.set_node_rate(rate(1_000_000)).unwrap();
        let class = classes(&mut lab)[&0x5000].parameters;
        assert_eq!((class.rate, class.ceil), (rate(1_000_000), rate(1_000_000)));
        let net = guest.net.clone();
        assert_eq!(lab.core.reconcile(&[net]).unwrap().intact, [0]);
        assert_eq!(lab.core.counters().unwrap()[&0].sent.packets, 1, "counters stay");
    });
}

#[test]
fn what_alarms_the_world_is_held_to_a_few_packets_a_second() {
    in_namespace(|mut lab| {
        let guest = lab.add(0);
        let echo = Datagram {
            protocol: ICMP,
            ..guest.udp(7, FAR)
        };
        for _ in 0..200 {
            guest.send(echo);
        }
        // A record-route option, of which a sliver may send as few.
        let mut with_options = guest.udp(8, FAR).frame(guest.net.mac, guest.gateway);
        with_options[14] = 0x46;
        with_options[17] += 4;
        with_options.splice(34..34, [7, 3, 4, 0]);
        with_options[24..26].fill(0);
        let sum = checksum(&with_options[14..38]);
        with_options[24..26].copy_from_slice(&sum.to_be_bytes());
        for _ in 0..200 {
            guest.send_frame(&with_options);
        }
        // All the others pass at once, whatever waits there.
        for _ in 0..50 {
            guest.send(guest.udp(9, FAR));
        }
        let counters = lab.core.counters().unwrap()[&0];
        // The bucket holds two seconds' worth; the rest waits or is dropped.
        assert!((10..100).contains(&counters.alarms.packets), "{counters:?}");
        assert_eq!(counters.sent.packets - counters.alarms.packets, 50);
        assert!(
            counters.alarms.drops > 200 && counters.alarms.overlimits > 0,
            "{counters:?}"
        );
        assert_eq!(counters.sent.drops, counters.alarms.drops);
        assert!(counters.alarms.queued_packets <= 10, "two seconds' worth");
    });
}
