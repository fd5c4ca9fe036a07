//! Tests of the network device, with a socket of whole messages in the tap's place.

use std::io::Write;
use std::os::fd::OwnedFd;

use proptest::prelude::*;

use super::*;
use crate::devices::net::testing::frame;
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
    let (tap, wire) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::NONBLOCK,
        None,
    )
    .unwrap();
    let as_file = |fd: OwnedFd| File::from(fd);
    let mut net = Net::new(
        as_file(tap),
        &Options {
            mac: Some([2, 0, 0, 0, 0, 1]),
            mtu: Some(1400),
        },
    );
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
    assert_eq!(bench.net.metrics.tx_frames, 1);
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
    assert_eq!(bench.net.metrics.rx_dropped, 1);
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
    let sent = bench.net.metrics.tx_frames;
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
        bench.net.metrics,
        Metrics {
            tx_frames: offered,
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
    assert_ne!(bench.net.waiting, 0);
    bench.net.reset();
    assert_eq!(bench.net.waiting, 0);
    bench.net.handle(Event::Kick(TX)).unwrap();
    assert!(bench.kicks[0].read().is_err());
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
