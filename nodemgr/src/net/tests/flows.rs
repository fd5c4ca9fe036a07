//! Limits on flows: who opens more than its part takes nobody else's.

use super::*;

fn limited(lab: &mut Lab, flow_limit: u32) -> Guest {
    let mut net = lab.sliver(1);
    net.wants.flow_limit = Some(flow_limit);
    net.wants.bandwidth.peak = None;
    lab.add_net(net)
}

/// Takes the limit on new flows a second away, so that a test sees only the other one.
fn without_pace(guest: &Guest) {
    let element = Element::new(device_field(&guest.net.tap));
    let mut filter = Connection::netfilter().unwrap();
    filter.commit(&[Set::NewFlows.delete(&element)]).unwrap();
}

#[test]
fn flows_above_the_limit_are_refused_and_counted() {
    in_namespace(|mut lab| {
        let (guest, other) = (limited(&mut lab, 20), lab.add(2));
        without_pace(&guest);
        for port in 1_000..1_100 {
            guest.send(guest.udp(port, FAR));
        }
        lab.until(1, |c| c.sent.packets == 100 && c.refused_flows.packets == 80);
        // Flows that there are go on, and so do all others'.
        guest.send(guest.udp(1_000, FAR));
        lab.until(1, |c| c.sent.packets == 101);
        for port in 1_000..1_050 {
            other.send(other.udp(port, FAR));
        }
        lab.until(2, |c| c.sent.packets == 50);
        let counters = lab.core.counters().unwrap();
        assert_eq!(
            (
                counters[&1].refused_flows.packets,
                counters[&2].refused_flows.packets
            ),
            (80, 0)
        );

        // A place that becomes free can be used: 20 flows, now none is there.
        for _ in 0..71 {
            lab.leaves();
        }
        lab.core.filter.end_flows(guest.net.mark).unwrap();
        let mut tries = 0;
        let mut port = 2_000;
        loop {
            guest.send(guest.udp(port, FAR));
            let sent = 102 + tries;
            let refused = lab.until(1, |c| c.sent.packets == sent).refused_flows.packets;
            tries += 1;
            if refused < 80 + tries {
                break;
            }
            assert!(tries < 2_000, "no place became free");
            port += 1;
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(guest.net.ports.contains(&lab.leaves().port));
    });
}

#[test]
fn a_flood_of_new_flows_is_slowed_before_it_is_counted() {
    in_namespace(|mut lab| {
        let guest = limited(&mut lab, 1_000);
        for port in 10_000..12_000 {
            guest.send(guest.udp(port, FAR));
        }
        // A tenth of the limit at once, and so much a second.
        let counters = lab.until(1, |c| c.sent.packets + c.sent.drops == 2_000);
        assert!(counters.refused_flows.packets > 0, "{counters:?}");
        assert!(
            counters.sent.packets - counters.refused_flows.packets >= 100,
            "a burst passes: {counters:?}"
        );
        // A flow that goes on needs no leave: a hundred packets without an answer.
        let before = counters.refused_flows.packets;
        for _ in 0..100 {
            guest.send(guest.udp(10_000, FAR));
        }
        let after = lab.until(1, |c| c.sent.packets == counters.sent.packets + 100);
        assert_eq!(after.refused_flows.packets, before);
    });
}

#[test]
fn a_strangers_flows_count_as_the_slivers_they_go_to() {
    in_namespace(|mut lab| {
        let mut net = lab.sliver(1);
        net.wants.flow_limit = Some(10);
        let (protocol, range) = mandoline_rspec::PortSet::parse_item("udp/53").unwrap();
        net.wants.ports.insert(protocol, range);
        let guest = lab.add_net(net);
        without_pace(&guest);
        for port in 1_000..1_050 {
            lab.arrives(Datagram {
                protocol: UDP,
                from: FAR,
                port,
                to: NODE,
                to_port: 53,
            });
        }
        let counters = lab.until(1, |c| c.received.packets + c.refused_flows.packets == 50);
        assert_eq!(
            (counters.received.packets, counters.refused_flows.packets),
            (10, 40)
        );
        // They have used up the sliver's own part.
        guest.send(guest.udp(5_000, FAR));
        lab.until(1, |c| c.refused_flows.packets == 41);
    });
}

#[test]
fn a_changed_limit_holds_at_once() {
    in_namespace(|mut lab| {
        let guest = limited(&mut lab, 5);
        let mut net = guest.net.clone();
        net.wants.flow_limit = Some(50);
        lab.core.update_sliver(&net).unwrap();
        without_pace(&guest);
        for port in 1_000..1_060 {
            guest.send(guest.udp(port, FAR));
        }
        lab.until(1, |c| c.sent.packets == 60 && c.refused_flows.packets == 10);
    });
}
