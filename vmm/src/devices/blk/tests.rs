//! Tests of the block device: what it does for an honest driver and what it does not for another.

use std::io::{Read, Seek, Write};

use proptest::prelude::*;

use super::*;
use crate::devices::virtio::testing::{INDIRECT, NEXT, Ring, WRITE, rings};

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const STATUS: u64 = 0x30_0000;

struct Bench {
    blk: Blk,
    ring: Ring,
    file: File,
}

fn bench(sectors: usize, read_only: bool) -> Bench {
    let mut file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..sectors * 512).map(|n| (n / 512) as u8 + 1).collect();
    file.write_all(&bytes).unwrap();
    let options = Options {
        id: "a-name-longer-than-twenty-bytes".into(),
        read_only,
        flush: true,
    };
    let mut blk = Blk::new(file.try_clone().unwrap(), &options).unwrap();
    let (mut rings, activation, _) = rings(1, 16, blk.features());
    blk.activate(activation).unwrap();
    Bench {
        blk,
        ring: rings.remove(0),
        file,
    }
}

impl Bench {
    fn header(&self, kind: u32, sector: u64) {
        let bytes = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.ring.put(HEADER, &bytes);
        self.ring.put(STATUS, &[0xee]);
    }

    /// One request; returns (status, bytes used).
    fn request(&mut self, kind: u32, sector: u64, length: u32, device_writes: bool) -> (u8, u32) {
        self.header(kind, sector);
        let mut pieces = vec![(HEADER, 16, false)];
        if length > 0 {
            pieces.push((DATA, length, device_writes));
        }
        pieces.push((STATUS, 1, true));
        let head = self.ring.offer(&pieces);
        self.blk.handle(Event::Kick(0)).unwrap();
        let (used, bytes) = self.ring.used().unwrap();
        assert_eq!(used, head);
        (self.ring.get(STATUS, 1)[0], bytes)
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
    let mut bench = bench(8, false);
    assert_eq!(bench.request(0, 3, 1024, true), (0, 1025));
    assert_eq!(bench.ring.get(DATA, 1024), [[4u8; 512], [5; 512]].concat());
    bench.ring.put(DATA, &[0xaa; 512]);
    assert_eq!(bench.request(1, 7, 512, false), (0, 1));
    assert_eq!(bench.contents()[7 * 512..], [0xaa; 512]);
    assert_eq!(bench.request(4, 0, 0, false), (0, 1));
}

#[test]
fn the_end_of_the_disk_is_the_end() {
    let mut bench = bench(8, false);
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

#[test]
fn a_read_only_disk_is_never_written_whatever_was_negotiated() {
    let mut bench = bench(8, true);
    assert_eq!(bench.request(1, 0, 512, false), (1, 1));
    for kind in [11, 13] {
        assert_eq!(bench.request(kind, 0, 16, false), (2, 1));
    }
    assert_eq!(bench.contents()[0], 1);
}

#[test]
fn identity_is_twenty_bytes() {
    let mut bench = bench(1, false);
    assert_eq!(bench.request(8, 0, 20, true), (0, 21));
    assert_eq!(bench.ring.get(DATA, 20), b"a-name-longer-than-t");
    assert_eq!(bench.request(8, 0, 4, true), (0, 5));
    assert_eq!(bench.request(99, 0, 0, false), (2, 1));
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
    for (kind, flags) in [(11, 0), (13, 0), (13, 1)] {
        let mut bench = bench(64, false);
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
    let mut bench = bench(64, false);
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

#[test]
fn indirect_tables_work() {
    let mut bench = bench(8, false);
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

#[test]
fn one_head_twice_is_an_error_only_while_it_is_out() {
    let mut bench = bench(8, false);
    for _ in 0..40 {
        assert_eq!(bench.request(0, 0, 512, true).0, 0);
    }
}

#[test]
fn a_flood_is_served_a_ring_at_a_time_and_comes_back_by_itself() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[1; 512]).unwrap();
    let options = Options {
        id: "d".into(),
        read_only: false,
        flush: true,
    };
    let mut blk = Blk::new(file, &options).unwrap();
    let (mut rings, activation, kicks) = rings(1, 4, blk.features());
    blk.activate(activation).unwrap();
    let ring = &mut rings[0];
    ring.put(HEADER, &[0; 16]);
    ring.descriptor(0, HEADER, 16, NEXT, 1);
    ring.descriptor(1, STATUS, 1, WRITE, 0);
    ring.offer_head(0);
    blk.handle(Event::Kick(0)).unwrap();
    assert!(kicks[0].read().is_err(), "nothing left: no kick of its own");
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
    ) {
        let mut bench = bench(8, false);
        bench.header(kind, sector);
        for (index, (address, length, flags, next)) in descriptors.iter().enumerate() {
            bench.ring.descriptor(index as u16, *address, *length, *flags, *next);
        }
        bench.ring.offer_head(head);
        let _ = bench.blk.handle(Event::Kick(0));
        prop_assert_eq!(bench.contents().len(), 8 * 512);
    }
}
