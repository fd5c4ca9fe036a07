//! The sustained rate, with a clock that runs as fast as the test wants.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

const DAY: u64 = 24 * 3600 * 1_000_000_000;

/// A sliver that may send 8 kbit/s in the mean, which is 86.4 MB a day, and 20 Mbit/s until then.
fn frugal(lab: &Lab, index: u16) -> SliverNet {
    let mut net = lab.sliver(index);
    net.wants.bandwidth.guarantee = Rate::from_bits_per_second(1_000).unwrap();
    net.wants.sustained = Some(Rate::from_bits_per_second(8_000).unwrap());
    net
}

fn clocked(test: impl FnOnce(Lab, Arc<AtomicU64>) + Send + 'static) {
    let time = Arc::new(AtomicU64::new(DAY));
    let tells = Arc::clone(&time);
    let config = NetworkConfig {
        clock: Clock::new(move || tells.load(Ordering::Relaxed)),
        ..config()
    };
    in_namespace_with(config, move |lab| test(lab, time));
}

/// Sends so many bytes to the outside, and waits until they have passed the class.
fn send(lab: &mut Lab, guest: &Guest, bytes: usize) {
    let before = lab.core.counters().unwrap()[&guest.net.index].sent.bytes;
    let mut frame = guest.udp(5_000, FAR).frame(guest.net.mac, guest.gateway);
    let want: usize = 1_400;
    frame.resize(want, 0);
    let length = (want as u16 - 14).to_be_bytes();
    frame[16..18].copy_from_slice(&length);
    frame[24..26].fill(0);
    let sum = checksum(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame[38..40].copy_from_slice(&(want as u16 - 34).to_be_bytes());
    for _ in 0..bytes.div_ceil(want) {
        guest.send_frame(&frame);
    }
    let after = before + (bytes.div_ceil(want) * want) as u64;
    lab.until(guest.net.index, |c| c.sent.bytes >= after);
}

fn ceiling(lab: &mut Lab, index: u16) -> u64 {
    let installed = lab.core.list().unwrap()[&index].class.unwrap();
    installed.ceil.bits_per_second()
}

#[test]
fn after_the_days_bytes_the_ceiling_falls_and_the_next_day_it_rises() {
    clocked(|mut lab, time| {
        let net = frugal(&lab, 1);
        let guest = lab.add_net(net);
        let day = lab.core.spent()["plc.test_1"].clone();
        assert_eq!(
            (day.since_ns, day.bytes),
            (DAY, 0),
            "the day begins with the first start"
        );
        // 8 bit/s are 86,400 bytes a day: no more has to be sent here.
        let mut slower = guest.net.clone();
        slower.wants.sustained = Some(Rate::MIN);
        lab.core.update_sliver(&slower).unwrap();

        send(&mut lab, &guest, 80_000);
        lab.core.count().unwrap();
        assert_eq!(ceiling(&mut lab, 1), 20_000_000, "86,400 bytes are not used up");
        send(&mut lab, &guest, 7_000);
        let Counted {
            changes: kept,
            switched,
        } = lab.core.count().unwrap();
        let held = Held {
            rate: Rate::from_bits_per_second(1_000).unwrap(),
            until_ns: 2 * DAY,
        };
        assert_eq!(switched, [(0x1001, Some(held))]);
        assert_eq!(lab.core.count().unwrap().switched, [], "told once");
        assert_eq!(
            ceiling(&mut lab, 1),
            1_000,
            "down to the guarantee, which is more than 8 bit/s"
        );
        let (slice, Some(spent)) = &kept[0] else {
            panic!("{kept:?}")
        };
        assert!(
            slice == "plc.test_1" && (87_000..90_000).contains(&spent.bytes),
            "{spent:?}"
        );

        // A larger sustained rate lets it go on; the smaller one holds again.
        lab.core.update_sliver(&guest.net).unwrap();
        assert_eq!(ceiling(&mut lab, 1), 20_000_000);
        lab.core.update_sliver(&slower).unwrap();
        assert_eq!(ceiling(&mut lab, 1), 1_000);

        time.store(2 * DAY - 1, Ordering::Relaxed);
        lab.core.count().unwrap();
        assert_eq!(ceiling(&mut lab, 1), 1_000);
        time.store(2 * DAY, Ordering::Relaxed);
        assert_eq!(lab.core.count().unwrap().switched, [(0x1001, None)]);
        assert_eq!(ceiling(&mut lab, 1), 20_000_000);
        assert_eq!(lab.core.spent()["plc.test_1"].bytes, 0);
    });
}

#[test]
fn neither_a_new_sliver_nor_a_new_node_manager_forgets() {
    clocked(|mut lab, time| {
        let mut net = frugal(&lab, 1);
        net.wants.sustained = Some(Rate::MIN);
        let guest = lab.add_net(net.clone());
        send(&mut lab, &guest, 50_000);
        let mut kept: std::collections::BTreeMap<String, Option<Spent>> = Default::default();
        kept.extend(lab.core.count().unwrap().changes);
        send(&mut lab, &guest, 10_000);

        // Another node manager, which knows what was kept, finds the living class.
        lab.core = Core::start(lab.config.clone()).unwrap();
        lab.core.remember(
            kept.into_iter()
                .filter_map(|(slice, spent)| Some((slice, spent?)))
                .collect(),
        );
        assert_eq!(lab.core.reconcile(&[net.clone()]).unwrap().intact, [1]);
        let sent = lab.core.counters().unwrap()[&1].sent.bytes;
        assert_eq!(
            lab.core.spent()["plc.test_1"].bytes,
            sent,
            "nothing twice, nothing lost"
        );

        // The sliver goes and comes back under another id and another number.
        send(&mut lab, &guest, 10_000);
        lab.core.remove_sliver(1, net.mark).unwrap();
        drop(guest);
        let mut again = lab
            .config
            .plan()
            .unwrap()
            .sliver(4, 77, net.wants.clone())
            .unwrap();
        let guest = lab.add_net(again.clone());
        send(&mut lab, &guest, 17_000);
        lab.core.count().unwrap();
        assert_eq!(ceiling(&mut lab, 4), 1_000, "60,000 + 10,000 + 17,000");
        // Made anew once more it starts where it was.
        lab.core.remove_sliver(4, 77).unwrap();
        drop(guest);
        again.mark = 78;
        let _guest = lab.add_net(again);
        assert_eq!(ceiling(&mut lab, 4), 1_000);
        // Gone for the rest of the day, it is forgotten.
        lab.core.remove_sliver(4, 78).unwrap();
        lab.core.count().unwrap();
        time.store(2 * DAY, Ordering::Relaxed);
        assert_eq!(
            lab.core.count().unwrap().changes,
            [("plc.test_1".to_owned(), None)]
        );
    });
}
