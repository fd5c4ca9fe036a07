//! Many requests at once, and what becomes of them when the device stops.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use super::*;
use crate::devices::virtio::queue::WorkQueue;

#[test]
fn many_requests_are_each_answered_once() {
    for engine in ENGINES {
        let mut bench = bench(engine, 64, false);
        for round in 0..20u64 {
            // Fifteen of the table's sixteen descriptors: all are out together.
            let mut heads: Vec<u16> = (0..4u64)
                .map(|n| bench.offer(n, 0, (round + 7 * n) % 60, 1024, true))
                .collect();
            bench.ring.put(DATA + 0x4000, &[round as u8; 512]);
            heads.push(bench.offer(4, 1, 63, 512, false));
            bench.kick();
            for _ in 0..5 {
                let (head, bytes) = bench.used();
                let n = heads.iter().position(|other| *other == head).unwrap();
                heads[n] = u16::MAX;
                assert_eq!(
                    (bench.status(n as u64), bytes),
                    (0, if n == 4 { 1 } else { 1025 })
                );
                if n < 4 {
                    let sector = ((round + 7 * n as u64) % 60) as u8;
                    let expected = [[sector + 1; 512], [sector + 2; 512]].concat();
                    assert_eq!(bench.ring.get(DATA + 0x1000 * n as u64, 1024), expected);
                }
            }
            assert_eq!(bench.ring.used(), None);
            assert_eq!(bench.contents()[63 * 512..], [round as u8; 512]);
        }
        let metrics = bench.blk.metrics();
        assert_eq!(
            (&metrics["read_count"], &metrics["write_bytes"]),
            (&80.into(), &10240.into())
        );
        assert_eq!(metrics["inflight"], 0);
    }
}

#[test]
fn scattered_buffers_are_moved_in_order() {
    for engine in ENGINES {
        let mut bench = bench(engine, 8, false);
        bench.header(1, 2);
        for n in 0..4u64 {
            bench.ring.put(DATA + 0x1000 * n, &[0x40 + n as u8; 512]);
        }
        let pieces: Vec<_> = [(HEADER, 16, false)]
            .into_iter()
            .chain(
                [(0, 100), (1, 412), (2, 511), (3, 1)].map(|(n, length)| (DATA + 0x1000 * n, length, false)),
            )
            .chain([(STATUS, 1, true)])
            .collect();
        bench.ring.offer(&pieces);
        bench.kick();
        bench.used();
        assert_eq!(bench.status(0), 0);
        let expected: Vec<u8> = [(0x40, 100), (0x41, 412), (0x42, 511), (0x43, 1)]
            .iter()
            .flat_map(|(byte, count)| vec![*byte; *count])
            .collect();
        assert_eq!(bench.contents()[1024..2048], expected);
    }
}

#[test]
fn a_head_that_is_out_cannot_come_again() {
    let mut bench = bench(IoEngine::Async, 8, false);
    // Reads of an empty pipe stay out as long as the test likes.
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    bench.blk.engine = Engine::new(File::from(reader), IoEngine::Async, "pipe");
    if bench.blk.engine.kind() == IoEngine::Sync {
        return; // no io_uring here: nothing is ever out between two events
    }
    let head = bench.offer(0, 0, 0, 512, true);
    bench.kick();
    assert_eq!(bench.blk.metrics()["inflight"], 1);
    bench.ring.offer_head(head);
    assert!(matches!(
        bench.blk.handle(Event::Kick(0)),
        Err(DeviceError::Ring { .. })
    ));
    // The event loop resets a device that fails; that waits for what is out.
    let feeder = std::thread::spawn(move || rustix::io::write(&writer, &[7; 512]).unwrap());
    bench.blk.reset();
    feeder.join().unwrap();
    assert_eq!(bench.blk.metrics()["inflight"], 0);
    assert_eq!(bench.status(0), 0xee, "nobody is answered after a reset");
    assert_eq!(bench.ring.used(), None);
}

#[test]
fn a_pause_ends_what_is_in_flight_and_its_answers_are_there() {
    for engine in ENGINES {
        let mut bench = bench(engine, 64, false);
        for n in 0..5 {
            bench.offer(n, 0, n, 512, true);
        }
        bench.kick();
        bench.blk.pause().unwrap();
        let progress = bench.blk.progress().remove(0).unwrap();
        assert!(progress.held.is_empty());
        assert_eq!((progress.next_available, progress.next_used), (5, 5));
        for _ in 0..5 {
            assert!(bench.ring.used().is_some());
        }
    }
}

#[test]
fn a_flood_is_served_a_ring_at_a_time_and_comes_back_by_itself() {
    let mut bench = bench(IoEngine::Sync, 1, false);
    bench.offer(0, 0, 0, 0, false);
    bench.kick();
    assert!(bench.kick.read().is_err(), "nothing left: no kick of its own");
    // As many bytes as a turn has, in requests whose buffers overlap: the rest waits for its turn.
    let mut bench = bench_on(disk(0), &options(IoEngine::Sync));
    bench.file.set_len(32 << 20).unwrap();
    bench.blk.grow().unwrap();
    for n in 0..3 {
        bench.offer(n, 1, 0, (ROUND_BYTES / 2) as u32, false);
    }
    bench.kick();
    assert!(bench.ring.used().is_some() && bench.ring.used().is_some());
    assert_eq!(bench.ring.used(), None);
    assert!(bench.kick.read().is_ok());
    bench.kick();
    assert!(bench.ring.used().is_some());
}

/// The driver's queue as a VM that comes back has it.
fn queue_again(bench: &Bench, progress: &Progress) -> WorkQueue {
    let mut queue = bench.ring.queue(0, &bench.interrupt, &bench.kick);
    queue.advance_to(progress);
    queue
}

#[test]
fn a_full_disk_makes_writes_wait_and_nothing_else() {
    for engine in ENGINES {
        // Every write fails with ENOSPC; reads give zeroes.
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        let mut bench = bench_on(full, &options(engine));
        bench.blk.set_sectors(64);
        let waiting = bench.offer(0, 1, 3, 512, false);
        bench.ring.put(DATA, &[0xaa; 512]);
        bench.offer(1, 0, 0, 512, true);
        bench.kick();
        bench.used();
        assert_eq!((bench.status(0), bench.status(1)), (0xee, 0));
        bench.blk.pause().unwrap();
        assert_eq!(bench.blk.metrics()["waiting_for_space"], 1);
        assert_eq!(bench.blk.progress()[0].as_ref().unwrap().held, [waiting]);
        // Still none.
        bench.blk.handle(Event::Host(SPACE, EventSet::IN)).unwrap();
        bench.blk.pause().unwrap();
        assert_eq!(bench.ring.used(), None);
        assert_eq!(bench.blk.metrics()["waiting_for_space"], 1);
        assert_eq!(bench.blk.metrics()["host_full_count"], 2);

        // The VM is saved, and comes back where there is space.
        let (saved, progress) = (bench.blk.save(), bench.blk.progress().remove(0).unwrap());
        let file = disk(64);
        let mut blk = Blk::new(file.try_clone().unwrap(), &options(engine)).unwrap();
        blk.restore(&saved).unwrap();
        let activation = Activation {
            memory: bench.ring.memory.clone(),
            queues: vec![Some(queue_again(&bench, &progress))],
            features: bench.blk.disk.features,
            interrupt: bench.interrupt.clone(),
            kicks: vec![bench.kick.clone()],
        };
        blk.activate(activation).unwrap();
        (bench.blk, bench.file) = (blk, file);
        bench.blk.handle(Event::Host(SPACE, EventSet::IN)).unwrap();
        assert_eq!(bench.used(), (waiting, 1));
        assert_eq!(bench.status(0), 0);
        assert_eq!(bench.contents()[3 * 512..4 * 512], [0xaa; 512]);
        assert_eq!(bench.blk.metrics()["waiting_for_space"], 0);
    }
}

#[test]
fn a_full_disk_is_an_error_where_it_is_to_be_one() {
    for engine in ENGINES {
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        let on_full = OnFull::Report;
        let mut bench = bench_on(
            full,
            &Options {
                on_full,
                ..options(engine)
            },
        );
        bench.blk.set_sectors(8);
        assert_eq!(bench.request(1, 0, 512, false), (1, 1));
        assert_eq!(bench.blk.metrics()["execute_fails"], 1);
    }
}

#[test]
fn a_reset_forgets_what_waits() {
    for engine in ENGINES {
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        let mut bench = bench_on(full, &options(engine));
        bench.blk.set_sectors(8);
        bench.offer(0, 1, 0, 512, false);
        bench.kick();
        bench.blk.pause().unwrap();
        assert_eq!(bench.blk.metrics()["waiting_for_space"], 1);
        bench.blk.reset();
        assert_eq!(bench.blk.metrics()["waiting_for_space"], 0);
        bench.blk.handle(Event::Host(SPACE, EventSet::IN)).unwrap();
        assert_eq!((bench.status(0), bench.ring.used()), (0xee, None));
    }
}

/// A file system of one MiB that is mounted nowhere; `None` without the privilege.
fn small_file_system() -> Option<OwnedFd> {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string};
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).ok()?;
    fsconfig_set_string(context.as_fd(), "size", "1m").ok()?;
    fsconfig_create(context.as_fd()).ok()?;
    rustix::mount::fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
    .ok()
}

/// The host's real answer, to a write that fits in part; then there is room. Needs root for its file system.
#[test]
fn a_write_goes_on_where_it_found_no_space() {
    for engine in ENGINES {
        let Some(mount) = small_file_system() else { return };
        let open = |name: &str| {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
            File::from(rustix::fs::openat(&mount, name, flags, Mode::RUSR | Mode::WUSR).unwrap())
        };
        let (mut ballast, file) = (open("ballast"), open("disk"));
        ballast.write_all(&vec![1; 768 << 10]).unwrap();
        file.set_len(512 << 10).unwrap();
        let mut bench = bench_on(file, &options(engine));
        // A disk's worth, of which half fits.
        let bytes: Vec<u8> = (0..512u32 << 10).map(|n| (n / 509) as u8).collect();
        bench.ring.put(0x50_0000, &bytes);
        bench.header(1, 0);
        let pieces = [
            (HEADER, 16, false),
            (0x50_0000, 512 << 10, false),
            (STATUS, 1, true),
        ];
        let head = bench.ring.offer(&pieces);
        bench.kick();
        bench.blk.pause().unwrap();
        assert_eq!(bench.blk.metrics()["waiting_for_space"], 1);
        assert_eq!(bench.ring.used(), None);
        ballast.set_len(0).unwrap();
        bench.blk.handle(Event::Host(SPACE, EventSet::IN)).unwrap();
        assert_eq!((bench.used(), bench.ring.get(STATUS, 1)[0]), ((head, 1), 0));
        assert!(bench.contents() == bytes);
    }
}

#[test]
fn without_io_uring_requests_go_on_by_ordinary_calls() {
    // A file that is only a name cannot be registered: so it is on a host without io_uring, up to the reason.
    let name = std::env::temp_dir();
    let name = rustix::fs::open(&name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let mut bench = bench(IoEngine::Sync, 8, false);
    bench.blk.engine = Engine::new(File::from(name), IoEngine::Async, "name");
    let reason = bench.blk.metrics()["io_engine_fallback"].clone();
    assert!(reason.is_string(), "{reason}");
    assert_eq!(bench.blk.metrics()["io_engine"], "Sync");
    bench.blk.engine.replace(bench.file.try_clone().unwrap());
    assert_eq!(bench.request(0, 3, 512, true), (0, 513));
    assert_eq!(bench.ring.get(DATA, 512), [4; 512]);
    assert_eq!(bench.blk.metrics()["io_engine_fallback"], reason);
}

#[test]
fn a_chain_of_a_saved_vm_passes_the_checks_of_any() {
    for (held, address) in [(0, 1 << 50), (0, 0x7000_0000), (9, DATA)] {
        let mut bench = bench(IoEngine::Sync, 8, false);
        bench.header(1, 0);
        let pieces = [(HEADER, 16, false), (address, 512, false), (STATUS, 1, true)];
        bench.ring.offer(&pieces);
        let progress = Progress {
            next_available: 1,
            next_used: 0,
            held: vec![held],
        };
        let activation = Activation {
            memory: bench.ring.memory.clone(),
            queues: vec![Some(queue_again(&bench, &progress))],
            features: bench.blk.disk.features,
            interrupt: bench.interrupt.clone(),
            kicks: vec![bench.kick.clone()],
        };
        bench.blk.reset();
        let result = bench.blk.activate(activation);
        assert!(
            matches!(result, Err(DeviceError::Chain { .. })),
            "head {held}, buffer {address:#x}"
        );
    }
}
