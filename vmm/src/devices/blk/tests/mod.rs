//! Tests of the block device: what it does for an honest driver and what it does not for another.

mod in_flight;
mod speed;
mod updates;

use std::io::{Read, Write};

use proptest::prelude::*;

use super::*;
use crate::devices::virtio::testing::{INDIRECT, NEXT, Ring, WRITE, rings};
use vmm_sys_util::eventfd::EventFd;

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const STATUS: u64 = 0x30_0000;

const ENGINES: [IoEngine; 2] = [IoEngine::Sync, IoEngine::Async];

struct Bench {
    blk: Blk,
    ring: Ring,
    kick: Arc<EventFd>,
    interrupt: Arc<Interrupt>,
    file: File,
}

fn options(io_engine: IoEngine) -> Options {
    Options {
        id: "a-name-longer-than-twenty-bytes".into(),
        flush: true,
        io_engine,
        ..Options::default()
    }
}

/// A file of `sectors`, each full of its number and one.
fn disk(sectors: usize) -> File {
    let mut file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..sectors * 512).map(|n| (n / 512) as u8 + 1).collect();
    file.write_all(&bytes).unwrap();
    file
}

fn bench_on(file: File, options: &Options) -> Bench {
    let mut blk = Blk::new(file.try_clone().unwrap(), options).unwrap();
    let (mut rings, activation, mut kicks) = rings(1, 16, blk.features());
    let interrupt = activation.interrupt.clone();
    blk.activate(activation).unwrap();
    Bench {
        blk,
        ring: rings.remove(0),
        kick: kicks.remove(0),
        interrupt,
        file,
    }
}

fn bench(engine: IoEngine, sectors: usize, read_only: bool) -> Bench {
    let options = Options {
        read_only,
        ..options(engine)
    };
    bench_on(disk(sectors), &options)
}

impl Bench {
    fn header(&self, kind: u32, sector: u64) {
        self.header_at(HEADER, kind, sector);
        self.ring.put(STATUS, &[0xee]);
    }

    fn header_at(&self, at: u64, kind: u32, sector: u64) {
        let bytes = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.ring.put(at, &bytes);
    }

    /// Makes a request available; `n` tells it from others.
    fn offer(&mut self, n: u64, kind: u32, sector: u64, length: u32, device_writes: bool) -> u16 {
        let at = n * 0x1000;
        self.header_at(HEADER + at, kind, sector);
        self.ring.put(STATUS + at, &[0xee]);
        let mut pieces = vec![(HEADER + at, 16, false)];
        if length > 0 {
            pieces.push((DATA + at, length, device_writes));
        }
        pieces.push((STATUS + at, 1, true));
        self.ring.offer(&pieces)
    }

    fn status(&self, n: u64) -> u8 {
        self.ring.get(STATUS + n * 0x1000, 1)[0]
    }

    fn kick(&mut self) {
        self.blk.handle(Event::Kick(0)).unwrap();
    }

    /// The next request that is done, waiting for the host where it must.
    fn used(&mut self) -> (u16, u32) {
        loop {
            if let Some(used) = self.ring.used() {
                return used;
            }
            assert!(self.blk.engine.in_flight() > 0, "nothing will come");
            let fd = self.blk.engine.descriptor().unwrap();
            // SAFETY: the ring lives as long as the device.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
            let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut fds, None).unwrap();
            self.blk.handle(Event::Host(RING, EventSet::IN)).unwrap();
        }
    }

    /// One request; returns (status, bytes used).
    fn request(&mut self, kind: u32, sector: u64, length: u32, device_writes: bool) -> (u8, u32) {
        let head = self.offer(0, kind, sector, length, device_writes);
        self.kick();
        let (used, bytes) = self.used();
        assert_eq!(used, head);
        (self.status(0), bytes)
    }

    fn contents(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.file.rewind().unwrap();
        self.file.read_to_end(&mut bytes).unwrap();
        bytes
    }
}

#[test]
fn reads_and_writes_reach_the_file() {
    for engine in ENGINES {
        let mut bench = bench(engine, 8, false);
        assert_eq!(bench.request(0, 3, 1024, true), (0, 1025));
        assert_eq!(bench.ring.get(DATA, 1024), [[4u8; 512], [5; 512]].concat());
        bench.ring.put(DATA, &[0xaa; 512]);
        assert_eq!(bench.request(1, 7, 512, false), (0, 1));
        assert_eq!(bench.contents()[7 * 512..], [0xaa; 512]);
        assert_eq!(bench.request(4, 0, 0, false), (0, 1));
    }
}

#[test]
fn the_end_of_the_disk_is_the_end() {
    for engine in ENGINES {
        let mut bench = bench(engine, 8, false);
        for (sector, length) in [
            (8, 512),
            (7, 1024),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (0, 511),
        ] {
            for (kind, write) in [(0, true), (1, false)] {
                assert_eq!(
                    bench.request(kind, sector, length, write),
                    (1, 1),
                    "{kind} {sector} {length}"
                );
            }
        }
        assert_eq!(bench.contents().len(), 8 * 512);
    }
}

#[test]
fn a_read_only_disk_is_never_written_whatever_was_negotiated() {
    for engine in ENGINES {
        let mut bench = bench(engine, 8, true);
        assert_eq!(bench.request(1, 0, 512, false), (1, 1));
        for kind in [11, 13] {
            assert_eq!(bench.request(kind, 0, 16, false), (2, 1));
        }
        assert_eq!(bench.contents()[0], 1);
    }
}

#[test]
fn identity_is_twenty_bytes() {
    for engine in ENGINES {
        let mut bench = bench(engine, 1, false);
        assert_eq!(bench.request(8, 0, 20, true), (0, 21));
        assert_eq!(bench.ring.get(DATA, 20), b"a-name-longer-than-t");
        assert_eq!(bench.request(8, 0, 4, true), (0, 5));
        assert_eq!(bench.request(99, 0, 0, false), (2, 1));
    }
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

#[test]
fn discard_and_write_zeroes_take_what_they_say_and_no_more() {
    for engine in ENGINES {
        for (kind, flags) in [(11, 0), (13, 0), (13, 1)] {
            let mut bench = bench(engine, 64, false);
            bench.ring.put(DATA, &range(8, 8, flags));
            let (status, _) = bench.request(kind, 0, 16, false);
            // A file system may lack holes; then it says so and nothing changes.
            assert!(status == 0 || status == 2, "{status}");
            let bytes = bench.contents();
            assert_eq!(
                (bytes.len(), bytes[8 * 512 - 1], bytes[16 * 512]),
                (64 * 512, 8, 17)
            );
            if status == 0 {
                assert!(bytes[8 * 512..16 * 512].iter().all(|byte| *byte == 0));
            }
        }
        let mut bench = bench(engine, 64, false);
        for (bytes, length, status) in [
            (range(60, 8, 0), 16, 1),
            (range(u64::MAX, 8, 0), 16, 1),
            (range(u64::MAX / 512, u32::MAX, 0), 16, 1),
            (range(0, 8, 2), 16, 2),
            (range(0, 8, 0), 15, 1),
            (range(0, 0, 0).repeat(17), 17 * 16, 1),
        ] {
            bench.ring.put(DATA, &bytes);
            assert_eq!(bench.request(13, 0, length, false).0, status, "{bytes:?}");
        }
        assert_eq!(bench.contents()[0], 1);
    }
}

#[test]
fn indirect_tables_work() {
    for engine in ENGINES {
        let mut bench = bench(engine, 8, false);
        bench.header(0, 2);
        let table = 0x40_0000u64;
        let entry = |address: u64, length: u32, flags: u16, next: u16| {
            [
                &address.to_le_bytes()[..],
                &length.to_le_bytes(),
                &flags.to_le_bytes(),
                &next.to_le_bytes(),
            ]
            .concat()
        };
        let entries = [
            entry(HEADER, 16, NEXT, 1),
            entry(DATA, 512, NEXT | WRITE, 2),
            entry(STATUS, 1, WRITE, 0),
        ];
        bench.ring.put(table, &entries.concat());
        bench.ring.descriptor(0, table, 48, INDIRECT, 0);
        bench.ring.offer_head(0);
        bench.blk.handle(Event::Kick(0)).unwrap();
        assert_eq!(bench.ring.used(), Some((0, 513)));
        assert_eq!(bench.ring.get(DATA, 512), [3; 512]);
    }
}

#[test]
fn one_head_twice_is_an_error_only_while_it_is_out() {
    for engine in ENGINES {
        let mut bench = bench(engine, 8, false);
        for _ in 0..40 {
            assert_eq!(bench.request(0, 0, 512, true).0, 0);
        }
    }
}

proptest! {
    /// Any descriptors at all: an error or an answer, never a panic, and never a byte outside the disk.
    #[test]
    fn any_descriptors(
        descriptors in prop::collection::vec(
            (
                prop_oneof![Just(HEADER), Just(DATA), Just(STATUS), 0u64..0x100_0100, any::<u64>()],
                prop_oneof![Just(16u32), Just(1), Just(512), 0u32..5000, any::<u32>()],
                0u16..8,
                0u16..18,
            ),
            1..8,
        ),
        head in 0u16..20,
        kind in 0u32..15,
        sector in prop_oneof![0u64..10, any::<u64>()],
        engine in prop::sample::select(&ENGINES),
    ) {
        let mut bench = bench(engine, 8, false);
        bench.header(kind, sector);
        for (index, (address, length, flags, next)) in descriptors.iter().enumerate() {
            bench.ring.descriptor(index as u16, *address, *length, *flags, *next);
        }
        bench.ring.offer_head(head);
        if bench.blk.handle(Event::Kick(0)).is_err() {
            bench.blk.reset();
        }
        bench.blk.pause().unwrap();
        prop_assert_eq!(bench.contents().len(), 8 * 512);
    }
}
