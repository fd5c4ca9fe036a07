//! Tests of the network device, with a socket of whole messages in the tap's place.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use proptest::prelude::*;

use super::*;
use crate::devices::net::testing::{Wire, frame, until, wire};
use crate::devices::virtio::testing::{Ring, rings};

const TX_AT: u64 = 0x20_0000;
const RX_AT: u64 = 0x40_0000;

struct Bench {
    net: Net,
    rx: Ring,
    tx: Ring,
    wire: File,
    kicks: Vec<std::sync::Arc<vmm_sys_util::eventfd::EventFd>>,
}

fn bench(features: u64, size: u16) -> Bench {
    let options = Options {
        mac: Some([2, 0, 0, 0, 0, 1]),
        mtu: Some(1400),
        ..Options::default()
    };
    bench_with(features, size, &options)
}

fn bench_with(features: u64, size: u16, options: &Options) -> Bench {
    let (tap, wire) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::NONBLOCK,
        None,
    )
    .unwrap();
    let as_file = |fd: OwnedFd| File::from(fd);
    let mut net = Net::new(as_file(tap), options).unwrap();
    let (mut rings, activation, kicks) = rings(2, size, features);
    net.activate(activation).unwrap();
    let (tx, rx) = (rings.pop().unwrap(), rings.pop().unwrap());
    Bench {
        net,
        rx,
        tx,
        wire: as_file(wire),
        kicks,
    }
}

const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

#[test]
fn the_guest_is_told_its_address_and_mtu() {
    let bench = bench(0, 8);
    assert_eq!(bench.net.config()[..6], [2, 0, 0, 0, 0, 1]);
    assert_eq!(bench.net.config()[10..], 1400u16.to_le_bytes());
}

#[test]
fn frames_go_out_however_they_are_cut() {
    let mut bench = bench(0, 8);
    let frame = frame(100);
    bench.tx.put(TX_AT, &frame);
    bench.tx.offer(&[
        (TX_AT, 12, false),
        (TX_AT + 12, 1, false),
        (TX_AT + 13, 99, false),
    ]);
    bench.net.handle(Event::Kick(TX)).unwrap();
    let mut got = vec![0; 2000];
    let length = bench.wire.read(&mut got).unwrap();
    assert_eq!(got[..length], frame);
    assert_eq!(bench.tx.used(), Some((0, 0)));
    assert_eq!(bench.net.counted().tx_frames, 1);
}

#[test]
fn a_frame_comes_in_and_says_one_buffer() {
    for features in [0, MERGE] {
        let mut bench = bench(features, 8);
        bench.rx.offer(&[(RX_AT, 2048, true)]);
        bench.wire.write_all(&frame(60)).unwrap();
        bench.net.handle(Event::Host(0, EventSet::IN)).unwrap();
        assert_eq!(bench.rx.used(), Some((0, 72)));
        let got = bench.rx.get(RX_AT, 72);
        assert_eq!((&got[10..12], &got[12..]), (&[1u8, 0][..], &frame(60)[12..]));
    }
}

#[test]
fn a_long_frame_is_merged() {
    let mut bench = bench(MERGE, 8);
    for n in 0..4 {
        bench.rx.offer(&[(RX_AT + n * 0x1000, 1000, true)]);
    }
    bench.wire.write_all(&frame(2500)).unwrap();
    bench.net.handle(Event::Host(0, EventSet::IN)).unwrap();
    let used: Vec<_> = std::iter::from_fn(|| bench.rx.used()).collect();
    assert_eq!(used, [(0, 1000), (1, 1000), (2, 512)]);
    assert_eq!(bench.rx.get(RX_AT + 10, 2), 3u16.to_le_bytes());
    assert_eq!(bench.rx.get(RX_AT + 0x2000, 512), frame(2500)[2000..]);
}

#[test]
fn without_buffers_the_frame_waits_and_none_is_lost() {
    let mut bench = bench(MERGE, 8);
    bench.wire.write_all(&frame(60)).unwrap();
    bench.wire.write_all(&frame(61)).unwrap();
    bench.net.handle(Event::Host(0, EventSet::IN)).unwrap();
    assert_eq!(bench.rx.used(), None);
    bench.rx.offer(&[(RX_AT, 2048, true)]);
    bench.net.handle(Event::Kick(RX)).unwrap();
    assert_eq!(bench.rx.used(), Some((0, 72)));
    assert_eq!(bench.rx.used(), None);
    bench.rx.offer(&[(RX_AT, 2048, true)]);
    bench.net.handle(Event::Kick(RX)).unwrap();
    assert_eq!(bench.rx.used(), Some((1, 73)));
}

#[test]
fn a_frame_that_needs_more_buffers_than_there_are_takes_none() {
    let mut bench = bench(MERGE, 8);
    bench.rx.offer(&[(RX_AT, 500, true)]);
    bench.wire.write_all(&frame(800)).unwrap();
    bench.net.handle(Event::Host(0, EventSet::IN)).unwrap();
    assert_eq!(bench.rx.used(), None);
    bench.rx.offer(&[(RX_AT + 0x1000, 500, true)]);
    bench.net.handle(Event::Kick(RX)).unwrap();
    assert_eq!(
        [bench.rx.used(), bench.rx.used()],
        [Some((0, 500)), Some((1, 312))]
    );
}

#[test]
fn a_frame_too_long_for_a_guest_that_does_not_merge_is_dropped() {
    let mut bench = bench(0, 8);
    bench.rx.offer(&[(RX_AT, 500, true)]);
    bench.wire.write_all(&frame(800)).unwrap();
    bench.net.handle(Event::Host(0, EventSet::IN)).unwrap();
    assert_eq!(bench.rx.used(), Some((0, 0)));
    assert_eq!(bench.net.counted().rx_dropped, 1);
}

#[test]
fn a_full_tap_makes_the_guest_wait() {
    let mut bench = bench(0, 256);
    bench.tx.put(TX_AT, &frame(60_000));
    let mut offered = 0;
    for _ in 0..200 {
        bench.tx.offer(&[(TX_AT, 60_012, false)]);
        offered += 1;
    }
    bench.net.handle(Event::Kick(TX)).unwrap();
    let sent = bench.net.counted().tx_frames;
    assert!(sent < offered, "the socket took all {sent}");
    let mut got = vec![0; 70_000];
    let mut received = 0;
    while received < offered {
        while bench.wire.read(&mut got).is_ok() {
            received += 1;
        }
        bench.net.handle(Event::Host(0, EventSet::OUT)).unwrap();
    }
    assert_eq!(
        bench.net.counted(),
        Metrics {
            tx_frames: offered,
            tx_bytes: 60_000 * offered,
            ..Metrics::default()
        }
    );
}

#[test]
fn malformed_frames_are_errors() {
    for pieces in [
        &[(TX_AT, 12, false)][..],
        &[(TX_AT, 5, false)],
        &[(TX_AT, 100, false), (TX_AT, 100, true)],
        &[(TX_AT, 65_536, false), (TX_AT, 65_536, false)],
    ] {
        let mut bench = bench(0, 8);
        bench.tx.offer(pieces);
        assert!(bench.net.handle(Event::Kick(TX)).is_err(), "{pieces:?}");
    }
    for pieces in [&[(RX_AT, 4, true)][..], &[(RX_AT, 2000, false)]] {
        let mut bench = bench(MERGE, 8);
        bench.rx.offer(pieces);
        bench.wire.write_all(&frame(60)).unwrap();
        assert!(
            bench.net.handle(Event::Host(0, EventSet::IN)).is_err(),
            "{pieces:?}"
        );
    }
}

#[test]
fn a_reset_forgets_everything() {
    let mut bench = bench(MERGE, 8);
    bench.wire.write_all(&frame(60)).unwrap();
    bench.net.handle(Event::Host(0, EventSet::IN)).unwrap();
    assert!(bench.net.receive.waits());
    bench.net.reset();
    assert!(!bench.net.receive.waits());
    bench.net.handle(Event::Kick(TX)).unwrap();
    assert!(bench.kicks[0].read().is_err());
}

/// A bucket of `size` that comes back in a day: within a test, never.
fn scarce(size: u64) -> Option<api::TokenBucket> {
    Some(api::TokenBucket {
        size,
        one_time_burst: None,
        refill_time: 86_400_000,
    })
}

fn limit(bandwidth: Option<api::TokenBucket>, ops: Option<api::TokenBucket>) -> Option<api::RateLimiter> {
    Some(api::RateLimiter { bandwidth, ops })
}

/// Puts a frame on the wire, and one into the TX queue.
fn offer_both(bench: &mut Bench, length: usize) {
    bench.wire.write_all(&frame(length)).unwrap();
    bench.rx.offer(&[(RX_AT, 2048, true)]);
    bench.tx.put(TX_AT, &frame(length));
    bench.tx.offer(&[(TX_AT, (HEADER_BYTES + length) as u32, false)]);
}

/// Attends to everything that a loop could: what must not move, does not.
fn stir(bench: &mut Bench) {
    for event in [
        Event::Kick(RX),
        Event::Kick(TX),
        Event::Host(TAP_TOKEN, EventSet::IN | EventSet::OUT),
        Event::Host(RX_LIMITER_TOKEN, EventSet::IN),
        Event::Host(TX_LIMITER_TOKEN, EventSet::IN),
    ] {
        bench.net.handle(event).unwrap();
    }
}

/// The frames that went out, and those that came in.
fn moved(bench: &mut Bench) -> (usize, usize) {
    let mut buffer = vec![0; 70_000];
    let out = std::iter::from_fn(|| bench.wire.read(&mut buffer).ok()).count();
    (out, std::iter::from_fn(|| bench.rx.used()).count())
}

#[test]
fn a_throttled_direction_leaves_the_other_alone() {
    for bucket in [limit(None, scarce(2)), limit(scarce(200), None)] {
        for (rx, tx, expected) in [
            (None, bucket, (2, 5)),
            (bucket, None, (5, 2)),
            (bucket, bucket, (2, 2)),
        ] {
            let options = Options {
                rx_rate_limiter: rx,
                tx_rate_limiter: tx,
                ..Options::default()
            };
            let mut bench = bench_with(MERGE, 8, &options);
            let mut all = (0, 0);
            for _ in 0..5 {
                offer_both(&mut bench, 100);
                stir(&mut bench);
                let (out, came) = moved(&mut bench);
                all = (all.0 + out, all.1 + came);
            }
            assert_eq!(all, expected, "{options:?}");
            let counted = bench.net.counted();
            assert_eq!(
                (counted.tx_frames, counted.rx_frames),
                (all.0 as u64, all.1 as u64)
            );
            assert_eq!(counted.rx_throttled > 0, rx.is_some());
            assert_eq!(counted.tx_throttled > 0, tx.is_some());

            // Without limits everything that was taken on goes its way, once the timers say so.
            let free = api::TokenBucket {
                size: 0,
                one_time_burst: None,
                refill_time: 0,
            };
            let free = limit(Some(free), Some(free));
            bench.net.set_rate_limiters(free.as_ref(), free.as_ref());
            stir(&mut bench);
            let (out, came) = moved(&mut bench);
            assert_eq!((all.0 + out, all.1 + came), (5, 5));
        }
    }
}

/// The way of a stuck interface: the limiter refuses, buffers run out, and the wrong one of the two ends first.
#[test]
fn throttle_and_want_of_buffers_end_in_any_order() {
    let options = Options {
        rx_rate_limiter: limit(None, scarce(1)),
        ..Options::default()
    };
    let free = limit(None, scarce(10));
    // The limiter lets the second frame pass, but there is no buffer; then the buffer comes.
    let mut bench = bench_with(MERGE, 8, &options);
    offer_both(&mut bench, 100);
    bench.wire.write_all(&frame(101)).unwrap();
    stir(&mut bench);
    assert_eq!(bench.rx.used(), Some((0, 112)));
    bench.net.set_rate_limiters(free.as_ref(), None);
    bench
        .net
        .handle(Event::Host(RX_LIMITER_TOKEN, EventSet::IN))
        .unwrap();
    assert_eq!(bench.rx.used(), None);
    bench.rx.offer(&[(RX_AT, 2048, true)]);
    bench.net.handle(Event::Kick(RX)).unwrap();
    assert_eq!(bench.rx.used(), Some((1, 113)));
    // It paid once.
    let left = bench.net.receive.limiter.save().ops.map(|ops| ops.tokens);
    assert_eq!(left, Some(9));

    // There are buffers first, and the timer is the last.
    let mut bench = bench_with(MERGE, 8, &options);
    offer_both(&mut bench, 100);
    offer_both(&mut bench, 101);
    stir(&mut bench);
    assert_eq!(bench.rx.used(), Some((0, 112)));
    bench.net.handle(Event::Kick(RX)).unwrap();
    assert_eq!(bench.rx.used(), None);
    bench.net.set_rate_limiters(free.as_ref(), None);
    bench
        .net
        .handle(Event::Host(RX_LIMITER_TOKEN, EventSet::IN))
        .unwrap();
    assert_eq!(bench.rx.used(), Some((1, 113)));
}

#[test]
fn a_frame_pays_once_however_often_the_tap_is_full() {
    let options = Options {
        tx_rate_limiter: limit(None, scarce(1000)),
        ..Options::default()
    };
    let mut bench = bench_with(0, 256, &options);
    bench.tx.put(TX_AT, &frame(60_000));
    for _ in 0..200 {
        bench.tx.offer(&[(TX_AT, 60_012, false)]);
    }
    let tokens = |bench: &Bench| bench.net.transmit.limiter.save().ops.map(|ops| ops.tokens);
    for _ in 0..3 {
        bench.net.handle(Event::Kick(TX)).unwrap();
    }
    let sent = bench.net.counted().tx_frames as i64;
    assert!(sent < 200, "the socket took all");
    // Those that went, and the one that stands before the full tap.
    assert_eq!(tokens(&bench), Some(1000 - sent - 1));
    while bench.net.counted().tx_frames < 200 {
        moved(&mut bench);
        bench.net.handle(Event::Host(TAP_TOKEN, EventSet::OUT)).unwrap();
    }
    assert_eq!(tokens(&bench), Some(800));
}

#[test]
fn limits_are_saved_as_far_as_they_are_used() {
    let options = Options {
        mac: Some([2, 0, 0, 0, 0, 1]),
        rx_rate_limiter: limit(scarce(1000), None),
        tx_rate_limiter: limit(None, scarce(5)),
        ..Options::default()
    };
    let mut bench = bench_with(MERGE, 8, &options);
    offer_both(&mut bench, 100);
    stir(&mut bench);
    let saved = bench.net.save();
    let mut other = bench_with(MERGE, 8, &Options::default());
    other.net.restore(&saved).unwrap();
    assert_eq!(other.net.save(), saved);
    assert_eq!(other.net.config(), bench.net.config());
    let left = |bench: &Bench| {
        let (rx, tx) = (&bench.net.receive.limiter, &bench.net.transmit.limiter);
        (rx.save().bandwidth.unwrap().tokens, tx.save().ops.unwrap().tokens)
    };
    assert_eq!(left(&other), (900, 4));
    let mut wrong = saved.clone();
    wrong.version += 1;
    assert!(other.net.restore(&wrong).is_err());
    wrong = saved;
    wrong.state["config"] = serde_json::json!([1, 2, 3]);
    assert!(other.net.restore(&wrong).is_err());
}

/// On a tap, if this host lets us make one: header, offloads and frames as the kernel has them.
#[test]
fn a_real_tap_carries_frames_both_ways() {
    let Some(Wire { tap, packets }) = wire() else {
        return;
    };
    let mut net = Net::new(tap, &Options::default()).unwrap();
    let udp = 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;
    let wanted = MERGE | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4 | udp;
    let (mut rings, activation, _) = rings(2, 8, wanted & net.features());
    net.activate(activation).unwrap();
    let sent = frame(100);
    rings[TX].put(TX_AT, &sent);
    rings[TX].offer(&[(TX_AT, 112, false)]);
    net.handle(Event::Kick(TX)).unwrap();
    assert_eq!(packets.receive(), sent[HEADER_BYTES..]);
    rings[RX].offer(&[(RX_AT, 2048, true)]);
    packets.send(&sent[HEADER_BYTES..]);
    let got = until(|| {
        net.handle(Event::Host(TAP_TOKEN, EventSet::IN)).unwrap();
        rings[RX].used()
    });
    assert_eq!(got, (0, 112));
    assert_eq!(rings[RX].get(RX_AT + 12, 100), sent[HEADER_BYTES..]);
}

proptest! {
    #[test]
    fn frames_survive_any_buffers(
        length in 1usize..9000,
        buffers in prop::collection::vec(12u32..2000, 1..40),
    ) {
        let mut bench = bench(MERGE, 64);
        for (n, bytes) in buffers.iter().enumerate() {
            bench.rx.offer(&[(RX_AT + 0x1000 * n as u64, *bytes, true)]);
        }
        bench.wire.write_all(&frame(length)).unwrap();
        bench.net.handle(Event::Host(0, EventSet::IN)).unwrap();
        let room: usize = buffers.iter().map(|bytes| *bytes as usize).sum();
        let mut got = Vec::new();
        while let Some((head, bytes)) = bench.rx.used() {
            got.extend(bench.rx.get(RX_AT + 0x1000 * u64::from(head), bytes as usize));
        }
        if room >= length + HEADER_BYTES {
            prop_assert_eq!(&got[HEADER_BYTES..], &frame(length)[HEADER_BYTES..]);
        } else {
            prop_assert!(got.is_empty());
        }
    }
}
