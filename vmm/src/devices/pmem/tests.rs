//! Tests of persistent memory's flush queue.

use std::io::Write;

use proptest::prelude::*;

use super::*;
use crate::devices::virtio::testing::{Ring, rings};

const REQUEST: u64 = 0x10_0000;
const RESULT: u64 = 0x20_0000;
/// What a result is before the device writes it.
const UNTOUCHED: u32 = 0xaaaa_aaaa;
const WINDOW: Range<u64> = 0x1_0000_0000..0x1_0040_0000;

struct Bench {
    pmem: Pmem,
    ring: Ring,
}

fn bench_of(file: File, read_only: bool, limit: Option<&api::RateLimiter>) -> Bench {
    let mut pmem = Pmem::new(file, WINDOW, read_only, limit).unwrap();
    let (mut rings, activation, _) = rings(1, 16, pmem.features());
    pmem.activate(activation).unwrap();
    Bench {
        pmem,
        ring: rings.remove(0),
    }
}

fn bench() -> Bench {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[1; 4096]).unwrap();
    bench_of(file, false, None)
}

/// Something that `fdatasync` refuses.
fn unsyncable() -> File {
    let (reader, _) = std::io::pipe().unwrap();
    File::from(std::os::fd::OwnedFd::from(reader))
}

fn ops(size: u64, refill_time: u64) -> api::RateLimiter {
    api::RateLimiter {
        bandwidth: None,
        ops: Some(api::TokenBucket {
            size,
            one_time_burst: None,
            refill_time,
        }),
    }
}

impl Bench {
    fn offer(&mut self, kind: u32) {
        self.ring.put(REQUEST, &kind.to_le_bytes());
        self.ring.put(RESULT, &UNTOUCHED.to_le_bytes());
        self.ring.offer(&[(REQUEST, 4, false), (RESULT, 4, true)]);
    }

    fn kick(&mut self) {
        self.pmem.handle(Event::Kick(0)).unwrap();
    }

    fn result(&self) -> u32 {
        u32::from_le_bytes(self.ring.get(RESULT, 4).try_into().unwrap())
    }
}

#[test]
fn the_guest_is_told_where_it_is() {
    let config = bench().pmem.config().to_vec();
    assert_eq!(config[..8], 0x1_0000_0000u64.to_le_bytes());
    assert_eq!(config[8..], 0x40_0000u64.to_le_bytes());
}

#[test]
fn flushes_that_wait_together_share_one_sync() {
    let mut bench = bench();
    for _ in 0..3 {
        bench.offer(FLUSH);
    }
    bench.kick();
    let used: Vec<_> = std::iter::from_fn(|| bench.ring.used()).collect();
    assert_eq!(used, [(0, 4), (2, 4), (4, 4)]);
    assert_eq!(bench.result(), OK);
    assert_eq!(bench.pmem.metrics()["flush_count"], 3);
    assert_eq!(bench.pmem.metrics()["sync_count"], 1);
}

#[test]
fn a_host_that_cannot_sync_and_requests_that_nobody_knows_are_errors_of_the_request() {
    let mut failing = bench_of(unsyncable(), false, None);
    failing.offer(FLUSH);
    failing.kick();
    assert_eq!((failing.ring.used(), failing.result()), (Some((0, 4)), EIO));
    let mut unknown = bench();
    unknown.offer(1);
    unknown.kick();
    assert_eq!((unknown.ring.used(), unknown.result()), (Some((0, 4)), EIO));
    assert_eq!(unknown.pmem.metrics()["sync_count"], 0);
}

#[test]
fn read_only_memory_has_nothing_to_sync() {
    let mut bench = bench_of(unsyncable(), true, Some(&ops(1, 3_600_000)));
    for _ in 0..2 {
        bench.offer(FLUSH);
        bench.kick();
        assert_eq!(bench.result(), OK);
    }
    assert_eq!(bench.pmem.metrics()["sync_count"], 0);
}

#[test]
fn malformed_requests_break_the_device() {
    for pieces in [
        &[(REQUEST, 4, false)][..],
        &[(REQUEST, 4, false), (RESULT, 3, true)],
        &[(REQUEST, 3, false), (RESULT, 4, true)],
        &[(RESULT, 4, true)],
        &[(WINDOW.start, 4, false), (RESULT, 4, true)],
    ] {
        let mut bench = bench();
        bench.ring.offer(pieces);
        assert!(bench.pmem.handle(Event::Kick(0)).is_err(), "{pieces:x?}");
    }
}

#[test]
fn flushes_wait_for_the_limiter_and_go_on_with_another() {
    let mut bench = bench_of(bench().pmem.file, false, Some(&ops(1, 3_600_000)));
    bench.offer(FLUSH);
    bench.kick();
    assert_eq!(bench.ring.used(), Some((0, 4)));
    bench.offer(FLUSH);
    bench.offer(FLUSH);
    bench.kick();
    assert_eq!((bench.ring.used(), bench.result()), (None, UNTOUCHED));
    assert_eq!(bench.pmem.metrics()["throttled"], 1);
    assert!(bench.pmem.progress()[0].as_ref().unwrap().held.is_empty());

    bench.pmem.set_rate_limiter(&ops(0, 0));
    let source = bench.pmem.sources()[0];
    bench
        .pmem
        .handle(Event::Host(source.token, EventSet::IN))
        .unwrap();
    assert_eq!(bench.ring.used(), Some((2, 4)));
    assert_eq!(bench.ring.used(), Some((4, 4)));
    assert_eq!(bench.pmem.metrics()["sync_count"], 2);
}

#[test]
fn a_saved_device_comes_back_to_the_same_window_only() {
    let mut spent = bench_of(bench().pmem.file, false, Some(&ops(1, 3_600_000)));
    spent.offer(FLUSH);
    spent.kick();
    let saved = spent.pmem.save();
    let mut same = bench();
    same.pmem.restore(&saved).unwrap();
    // The limit came along, and so did its emptiness.
    same.offer(FLUSH);
    same.kick();
    assert_eq!(same.ring.used(), None);

    let message = |window, read_only| {
        let mut other = Pmem::new(bench().pmem.file, window, read_only, None).unwrap();
        other.restore(&saved).unwrap_err().to_string()
    };
    assert!(message(WINDOW.start..WINDOW.end + (2 << 20), false).contains("size"));
    assert!(message(WINDOW.start + (2 << 20)..WINDOW.end + (2 << 20), false).contains("start"));
    assert!(message(WINDOW, true).contains("read_only"));
}

proptest! {
    /// Any request of any form: refused, or answered once.
    #[test]
    fn any_request_is_survived(kind in any::<u32>(), readable in 1u32..16, writable in 0u32..16) {
        let mut bench = bench();
        bench.ring.put(REQUEST, &kind.to_le_bytes());
        let mut pieces = vec![(REQUEST, readable, false)];
        if writable > 0 {
            pieces.push((RESULT, writable, true));
        }
        bench.ring.offer(&pieces);
        let result = bench.pmem.handle(Event::Kick(0));
        prop_assert_eq!(result.is_ok(), readable >= 4 && writable >= 4);
        prop_assert_eq!(bench.ring.used(), result.is_ok().then_some((0, 4)));
        prop_assert_eq!(bench.ring.used(), None);
    }
}
