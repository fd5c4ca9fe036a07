//! What other monitors fell for, as scripts for ours: each device booted, and restored after each step.
//!
//! docs/hostile-guests.md says which incident each stands for.

use crate::devices::virtio::testing::{INDIRECT, NEXT, WRITE};
use crate::fuzzing::bench::Bench;
use crate::fuzzing::script::Step;
use crate::fuzzing::subject::{KINDS, Kind};

/// A script, and whether it leaves the device in need of a reset.
struct Incident {
    name: &'static str,
    kind: Kind,
    steps: Vec<Step>,
    breaks: bool,
}

fn descriptor(queue: u8, index: u8, place: u8, length: u16, flags: u16, next: u8) -> Step {
    let flags = flags as u8;
    Step::Descriptor {
        queue,
        index,
        place,
        length,
        flags,
        next,
    }
}

fn offer(queue: u8, head: u8) -> Step {
    Step::Offer { queue, head }
}

fn kick(queue: u8) -> Step {
    Step::Kick { queue }
}

fn write(place: u8, bytes: &[u8]) -> Step {
    Step::Write {
        place,
        bytes: bytes.to_vec(),
    }
}

fn register(offset: u8, value: u32) -> Step {
    let offset = offset / 4;
    Step::Register { offset, value }
}

/// A block request: its header in place 0, data in 1 and 2, its status in 4.
fn request(kind: u32, sector: u64, data: u16, flags: u16) -> Vec<Step> {
    vec![
        write(
            0,
            &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat(),
        ),
        descriptor(0, 0, 0, 16, NEXT, 1),
        descriptor(0, 1, 1, data, NEXT | flags, 2),
        descriptor(0, 2, 4, 1, WRITE, 0),
    ]
}

/// The queue that a kick alone makes a device look at.
fn kicked(kind: Kind) -> u8 {
    match kind {
        Kind::Net | Kind::Vsock => 1,
        _ => 0,
    }
}

fn incidents() -> Vec<Incident> {
    let mut all = Vec::new();
    let mut add = |name, kind, breaks, steps: Vec<Step>| {
        all.push(Incident {
            name,
            kind,
            steps,
            breaks,
        });
    };
    for kind in KINDS {
        let queue = kicked(kind);
        let flag = if kind == Kind::Rng { WRITE } else { 0 };
        // 1: registers after the start.
        let late = [0x38, 0x44, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0x20];
        let steps = late.map(|offset| register(offset, 0xffff_0003));
        add(
            "registers-after-start",
            kind,
            false,
            [&[register(0x30, 0)][..], &steps, &[kick(queue)]].concat(),
        );
        // 3: the index jumps, or goes back.
        add(
            "index-jumps",
            kind,
            true,
            vec![Step::Index { queue, index: 17 }, kick(queue)],
        );
        add(
            "index-goes-back",
            kind,
            true,
            vec![Step::Index { queue, index: 0xffff }, kick(queue)],
        );
        // 4, 5: chains.
        let chains: [(&str, Vec<Step>); 7] = [
            ("loop", vec![descriptor(queue, 0, 0, 16, flag | NEXT, 0)]),
            (
                "indirect-in-itself",
                vec![descriptor(queue, 0, 0xf1 + 3 * queue, 16, INDIRECT, 0)],
            ),
            ("partly-outside", vec![descriptor(queue, 0, 0xf7, 16, flag, 0)]),
            ("wraps-around", vec![descriptor(queue, 0, 0xfa, 16, flag, 0)]),
            ("where-devices-are", vec![descriptor(queue, 0, 0xf9, 16, flag, 0)]),
            ("no-bytes", vec![descriptor(queue, 0, 0, 0, flag, 0)]),
            ("4-gib", vec![descriptor(queue, 0, 0, 0xffff, flag, 0)]),
        ];
        for (name, steps) in chains {
            add(
                name,
                kind,
                true,
                [steps, vec![offer(queue, 0), kick(queue)]].concat(),
            );
        }
        // 19: resets in the middle, one after the other.
        let steps = [
            offer(queue, 0),
            register(0x70, 0),
            register(0x70, 15),
            kick(queue),
            Step::Up,
            Step::Pause,
            Step::Up,
        ];
        add("resets", kind, false, steps.to_vec());
    }
    for kind in [Kind::BlkSync, Kind::BlkAsync] {
        // 2: the same head twice, as an empty ring has it; a device that is done with the first before it takes the second
        // may take it.
        let both = Step::Index { queue: 0, index: 2 };
        let twice = [request(0, 0, 512, WRITE), vec![both, kick(0)]].concat();
        add("same-head-twice", kind, kind == Kind::BlkAsync, twice);
        // 12: sectors whose bytes are more than any number; ranges likewise; a status that is no byte.
        for (name, sector) in [
            ("sector-overflow", u64::MAX),
            ("sector-times-512", 1 << 55),
            ("negative-offset", 1 << 54),
        ] {
            add(
                name,
                kind,
                false,
                [request(1, sector, 512, 0), vec![offer(0, 0), kick(0)]].concat(),
            );
        }
        for (name, operation) in [("discard-overflow", 11), ("write-zeroes-overflow", 13)] {
            let range = write(1, &[&u64::MAX.to_le_bytes()[..], &[0xff; 4], &[0; 4]].concat());
            add(
                name,
                kind,
                false,
                [request(operation, 0, 16, 0), vec![range, offer(0, 0), kick(0)]].concat(),
            );
        }
        let many = [request(13, 0, 16 * 17, 0), vec![offer(0, 0), kick(0)]].concat();
        add("too-many-ranges", kind, false, many);
        add(
            "no-status",
            kind,
            true,
            vec![descriptor(0, 0, 0, 16, 0, 0), offer(0, 0), kick(0)],
        );
    }
    // 7: buffers that overlap, far more than there is memory.
    let mut steps: Vec<Step> = (0..15)
        .map(|n| descriptor(0, n, 0xf0, 0xfffe, WRITE | NEXT, n + 1))
        .collect();
    steps.extend([descriptor(0, 15, 0xf0, 0xfffe, WRITE, 0), offer(0, 0), kick(0)]);
    add("overlapping-buffers", Kind::Rng, false, steps);
    // 8: statistics without end, pages that are none, lists in pieces.
    let stats = vec![descriptor(2, 0, 0, 2570, 0, 0), offer(2, 0), kick(2)];
    add("endless-statistics", Kind::Balloon, true, stats);
    let page = |bytes: &[u8]| {
        vec![
            write(0, bytes),
            descriptor(0, 0, 0, 4, 0, 0),
            offer(0, 0),
            kick(0),
        ]
    };
    add(
        "page-outside",
        Kind::Balloon,
        true,
        page(&0x1000u32.to_le_bytes()),
    );
    add("last-page-number", Kind::Balloon, true, page(&[0xff; 4]));
    add(
        "ring-is-ballooned",
        Kind::Balloon,
        true,
        page(&0x14u32.to_le_bytes()),
    );
    let pieces = vec![
        write(0, &[0, 9, 0]),
        write(1, &[0, 1, 9, 0, 0]),
        descriptor(0, 0, 0, 3, NEXT, 1),
        descriptor(0, 1, 1, 5, 0, 0),
    ];
    add(
        "list-in-pieces",
        Kind::Balloon,
        false,
        [pieces, vec![offer(0, 0), kick(0)]].concat(),
    );
    let report = vec![descriptor(4, 0, 0xf0, 0xfffe, 0, 0), offer(4, 0), kick(4)];
    add("report-of-readable", Kind::Balloon, true, report);
    // 9: lengths that lie, a receive buffer with no room for data, streams without end.
    let packet = |operation, host_port, guest_port, length| Step::Packet {
        operation,
        host_port,
        guest_port,
        length,
        flags: 0,
        credit: 1000,
        forwarded: 0,
    };
    add("length-lies", Kind::Vsock, true, vec![packet(5, 3, 1, 0xffff)]);
    let inward = Step::Host {
        bytes: b"\x01CONNECT 9\ndata".to_vec(),
    };
    let buffer = |index, length| {
        vec![
            descriptor(0, index, 0x10 + index, length, WRITE, 0),
            offer(0, index),
            kick(0),
        ]
    };
    let starved = [
        vec![inward.clone()],
        buffer(0, 256),
        vec![packet(2, 0, 9, 0)],
        buffer(1, 44),
    ]
    .concat();
    add("no-room-for-data", Kind::Vsock, true, starved);
    let mut steps = Vec::new();
    for port in 0..20 {
        steps.extend([packet(1, 3, port, 0), packet(3, 3, port, 0)]);
    }
    add("streams-come-and-go", Kind::Vsock, false, steps);
    let steps = vec![
        inward,
        packet(2, 0, 9, 0),
        packet(4, 0, 9, 0),
        packet(5, 0, 9, 64),
        Step::Close,
    ];
    add("data-after-the-end", Kind::Vsock, false, steps);
    // 10: the tap is full, and so is the guest.
    let frame = Step::Host { bytes: vec![0; 64] };
    let mut steps = vec![frame; 40];
    steps.extend([descriptor(0, 0, 0, 2048, WRITE, 0), offer(0, 0), kick(0)]);
    add("nobody-receives", Kind::Net, false, steps);
    // What is no frame stands before one that is.
    let short = Step::Host { bytes: vec![0; 5] };
    let steps = vec![register(0x70, 0), short.clone(), short.clone(), short];
    add("frames-too-short", Kind::Net, false, steps);
    add(
        "a-frame-too-long",
        Kind::Net,
        true,
        vec![descriptor(1, 0, 0, 0xfffe, 0, 0), offer(1, 0), kick(1)],
    );
    // 18: flushes without end.
    let mut steps = vec![descriptor(0, 0, 0, 4, NEXT, 1), descriptor(0, 1, 1, 4, WRITE, 0)];
    for _ in 0..8 {
        steps.extend([offer(0, 0), kick(0)]);
    }
    add("flush-flood", Kind::Pmem, false, steps);
    all
}

/// The target of a device.
fn target(kind: Kind) -> &'static str {
    match kind {
        Kind::BlkSync => "blk",
        Kind::BlkAsync => "blk-async",
        Kind::Net => "net",
        Kind::Vsock => "vsock",
        Kind::Rng => "rng",
        Kind::Balloon => "balloon",
        Kind::Pmem => "pmem",
    }
}

/// All as seeds; those of chains for their target, too.
pub(super) fn seeds() -> Vec<(String, String, Vec<u8>)> {
    let mut seeds = Vec::new();
    for incident in incidents() {
        let mut script = Vec::new();
        for step in &incident.steps {
            step.write(&mut script);
        }
        if incident.kind == Kind::Rng {
            seeds.push(("chain".to_owned(), incident.name.to_owned(), script.clone()));
        }
        let bytes = [&[0][..], &script].concat();
        seeds.push((target(incident.kind).to_owned(), incident.name.to_owned(), bytes));
    }
    seeds
}

/// Runs `steps`, with the device saved and restored before step `twin`.
fn run(incident: &Incident, twin: Option<usize>) {
    let Incident {
        name, kind, steps, ..
    } = incident;
    let _ = tracing_subscriber::fmt().with_test_writer().try_init();
    let mut bench = Bench::new(*kind, false);
    for (n, step) in steps.iter().enumerate() {
        if twin == Some(n) {
            bench.step(&Step::Twin);
        }
        bench.step(step);
    }
    let broken = bench.is_broken();
    // Streams do not come along, so what they would have led to does not either.
    if *kind != Kind::Vsock || twin.is_none() {
        assert_eq!(
            broken, incident.breaks,
            "{kind:?} {name}, restored before {twin:?}"
        );
    }
    bench.must_work_after_a_reset();
}

#[test]
fn devices_as_they_boot() {
    for incident in incidents() {
        eprintln!("{:?} {}", incident.kind, incident.name);
        run(&incident, None);
    }
}

#[test]
fn devices_as_they_are_restored() {
    for incident in incidents() {
        eprintln!("{:?} {}", incident.kind, incident.name);
        // Long scripts repeat themselves.
        for twin in (0..incident.steps.len()).take(6) {
            run(&incident, Some(twin));
        }
    }
}

#[test]
fn scripts_are_read_as_they_are_written() {
    for incident in incidents() {
        let mut bytes = Vec::new();
        for step in &incident.steps {
            step.write(&mut bytes);
        }
        let mut input = crate::fuzzing::input::Input::new(&bytes);
        let read: Vec<Step> = std::iter::from_fn(|| Step::read(&mut input)).collect();
        assert_eq!(read, incident.steps, "{}", incident.name);
    }
}
