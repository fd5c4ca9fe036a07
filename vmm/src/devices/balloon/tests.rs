//! Tests of the balloon: what memory goes back to the host, and what no driver may do.

use std::collections::BTreeSet;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;
use crate::devices::virtio::interrupt::CONFIG_CHANGED;
use crate::devices::virtio::testing::{Ring, rings};

/// Where tests put requests; guest memory is 16 MiB.
const LIST: u64 = 0x8_0000;
/// The first of the pages that tests give away.
const FIRST: u32 = 0x400;
const MIB: u64 = 1 << 20;

fn options() -> api::Balloon {
    api::Balloon {
        amount_mib: 4,
        deflate_on_oom: true,
        stats_polling_interval_s: 3600,
        free_page_hinting: false,
        free_page_reporting: true,
    }
}

struct Bench {
    balloon: Balloon,
    rings: Vec<Ring>,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    kicks: Vec<Arc<vmm_sys_util::eventfd::EventFd>>,
}

fn bench_of(options: &api::Balloon, features: u64) -> Bench {
    let mut balloon = Balloon::new(options, 16 * MIB).unwrap();
    let (rings, activation, kicks) = rings(QUEUES, QUEUE_SIZE, features);
    let (memory, interrupt) = (activation.memory.clone(), activation.interrupt.clone());
    balloon.activate(activation).unwrap();
    Bench {
        balloon,
        rings,
        memory,
        interrupt,
        kicks,
    }
}

fn bench() -> Bench {
    bench_of(&options(), FEATURE_STATS | FEATURE_REPORTING)
}

impl Bench {
    /// Writes a byte to `count` pages from [`FIRST`] on.
    fn fill(&self, count: u32) {
        for page in 0..count {
            self.memory.write_obj(7u8, address(page)).unwrap();
        }
    }

    /// Which of the pages from [`FIRST`] on are empty.
    fn empty(&self, count: u32) -> Vec<u32> {
        let empty = |page: &u32| self.memory.read_obj::<u8>(address(*page)).unwrap() == 0;
        (0..count).filter(empty).collect()
    }

    fn list(&self, pages: impl IntoIterator<Item = u32>) -> u32 {
        let bytes: Vec<u8> = pages.into_iter().flat_map(u32::to_le_bytes).collect();
        self.rings[0].put(LIST, &bytes);
        bytes.len() as u32
    }

    fn inflate(&mut self, pages: &[u32]) -> Result<(), DeviceError> {
        let bytes = self.list(pages.iter().copied());
        self.rings[0].offer(&[(LIST, bytes, false)]);
        self.balloon.handle(Event::Kick(0))
    }

    /// Sends statistics as the driver would: (tag, value).
    fn send_stats(&mut self, entries: &[(u16, u64)]) -> Result<(), DeviceError> {
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat())
            .collect();
        self.rings[2].put(LIST, &bytes);
        self.rings[2].offer(&[(LIST, bytes.len() as u32, false)]);
        self.balloon.handle(Event::Kick(2))
    }

    fn stats_due(&mut self) {
        self.balloon.ask_for_statistics().unwrap();
    }
}

fn address(page: u32) -> GuestAddress {
    GuestAddress(u64::from(FIRST + page) * PAGE)
}

#[test]
fn pages_in_the_balloon_are_the_hosts() {
    let mut bench = bench();
    bench.fill(16);
    // As Linux has them: from the top, in pieces.
    bench
        .inflate(&[FIRST + 9, FIRST + 8, FIRST + 7, FIRST + 3, FIRST + 3])
        .unwrap();
    assert_eq!(bench.rings[0].used(), Some((0, 0)));
    assert_eq!(bench.empty(16), [3, 7, 8, 9]);
    assert_eq!(bench.balloon.host.metrics.inflate_count, 5);
}

#[test]
fn a_list_of_pages_may_lie_in_many_buffers() {
    let mut bench = bench();
    bench.fill(8);
    bench.list([FIRST + 1, FIRST + 2, FIRST + 5]);
    // Cut within a number.
    bench.rings[0].offer(&[(LIST, 3, false), (LIST + 3, 6, false), (LIST + 9, 3, false)]);
    bench.balloon.handle(Event::Kick(0)).unwrap();
    assert_eq!(bench.empty(8), [1, 2, 5]);
}

#[test]
fn pages_outside_memory_break_the_device_and_take_nothing() {
    for outside in [16 * MIB / PAGE, u64::from(u32::MAX), 0xc_0000] {
        let mut bench = bench();
        bench.fill(4);
        let error = bench.inflate(&[FIRST, outside as u32, FIRST + 1]).unwrap_err();
        assert!(error.to_string().contains("not all guest memory"), "{error}");
        assert_eq!(bench.empty(4), Vec::<u32>::new(), "{outside:#x}");
        assert_eq!(bench.rings[0].used(), None);
    }
}

#[test]
fn lists_have_whole_numbers_and_a_bounded_length() {
    let list = |bytes: u32, write| {
        let mut bench = bench();
        bench.rings[0].offer(&[(LIST, bytes, write)]);
        bench.balloon.handle(Event::Kick(0))
    };
    assert!(list(5, false).is_err());
    assert!(list(8, true).is_err());
    assert!(list(MAX_PAGES as u32 * 4 + 4, false).is_err());
    assert!(list(MAX_PAGES as u32 * 4, false).is_ok());
}

#[test]
fn deflating_is_a_courtesy() {
    let mut bench = bench();
    bench.fill(4);
    let bytes = bench.list([FIRST, FIRST + 1]);
    bench.rings[1].offer(&[(LIST, bytes, false)]);
    bench.balloon.handle(Event::Kick(1)).unwrap();
    assert_eq!(bench.rings[1].used(), Some((0, 0)));
    assert_eq!(bench.empty(4), Vec::<u32>::new());
    assert_eq!(bench.balloon.host.metrics.deflate_count, 2);
}

#[test]
fn an_event_takes_a_bounded_amount_and_comes_back_for_the_rest() {
    let mut bench = bench();
    // Each report names 15 MiB of the 16: after 18 of them the round is over.
    let (start, bytes) = (MIB, 15 * MIB as u32);
    for _ in 0..40 {
        bench.rings[4].offer(&[(start, bytes, true)]);
    }
    let mut seen = Vec::new();
    bench.balloon.handle(Event::Kick(4)).unwrap();
    while bench.kicks[4].read().is_ok() {
        seen.push(std::iter::from_fn(|| bench.rings[4].used()).count());
        bench.balloon.handle(Event::Kick(4)).unwrap();
    }
    seen.push(std::iter::from_fn(|| bench.rings[4].used()).count());
    assert_eq!(seen, [18, 18, 4]);
}

#[test]
fn reported_pages_go_back_wherever_the_driver_has_its_queue() {
    let all = FEATURE_STATS | FEATURE_REPORTING;
    // The specification's number, Linux's with statistics, Linux's without.
    for (queue, features) in [(4, all), (3, all), (4, FEATURE_REPORTING), (2, FEATURE_REPORTING)] {
        let mut bench = bench_of(&options(), features);
        bench.fill(8);
        let base = address(0).0;
        bench.rings[queue].offer(&[
            (base + PAGE, 2 * PAGE as u32, true),
            (base + 5 * PAGE, 4096, true),
        ]);
        bench.balloon.handle(Event::Kick(queue)).unwrap();
        assert_eq!(bench.rings[queue].used(), Some((0, 0)), "queue {queue}");
        assert_eq!(bench.empty(8), [1, 2, 5], "queue {queue}");
        let metrics = bench.balloon.metrics();
        assert_eq!(metrics["free_page_report_freed"], 3 * PAGE);
    }
}

#[test]
fn reports_of_what_is_no_memory_or_not_the_devices_to_write_break_it() {
    for piece in [
        (15 * MIB, 2 * MIB as u32, true),
        (u64::MAX - 4095, 4096, true),
        (MIB, 4096, false),
    ] {
        let mut bench = bench();
        bench.rings[4].offer(&[piece]);
        assert!(bench.balloon.handle(Event::Kick(4)).is_err(), "{piece:x?}");
    }
    // Not negotiated: nobody looks at it.
    let mut bench = bench_of(&options(), 0);
    bench.fill(1);
    bench.rings[4].offer(&[(address(0).0, 4096, true)]);
    bench.balloon.handle(Event::Kick(4)).unwrap();
    assert_eq!(bench.empty(1), Vec::<u32>::new());
}

#[test]
fn pages_that_lie_on_a_file_become_the_files_again() {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    let mut bench = bench();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[9; 2 * PAGE as usize]).unwrap();
    let target = bench
        .memory
        .get_slices(address(0), 2 * PAGE as usize)
        .next()
        .unwrap()
        .unwrap();
    // SAFETY: replaces two pages of guest memory, as the loader does with a kernel's.
    let mapped = unsafe {
        libc::mmap(
            target.ptr_guard_mut().as_ptr().cast(),
            2 * PAGE as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED,
            file.as_raw_fd(),
            0,
        )
    };
    assert_ne!(mapped, libc::MAP_FAILED);
    bench.fill(2);
    bench.inflate(&[FIRST]).unwrap();
    assert_eq!(bench.memory.read_obj::<u8>(address(0)).unwrap(), 9);
    assert_eq!(bench.memory.read_obj::<u8>(address(1)).unwrap(), 7);
}

#[test]
fn the_target_is_bounded_and_the_guest_hears_of_it() {
    let mut bench = bench();
    assert_eq!(bench.balloon.config()[..8], [0, 4, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bench.interrupt.status() & CONFIG_CHANGED, 0);
    bench.balloon.set_target(16).unwrap();
    assert_eq!(bench.interrupt.status() & CONFIG_CHANGED, CONFIG_CHANGED);
    assert_eq!(bench.balloon.config()[..4], 4096u32.to_le_bytes());
    assert_eq!(bench.balloon.options().amount_mib, 16);
    assert_eq!(
        bench.balloon.set_target(17).unwrap_err().to_string(),
        "amount_mib is 17; allowed: up to 16, the guest's memory"
    );
    assert!(bench.balloon.set_target(u32::MAX).is_err());
    assert!(
        Balloon::new(
            &api::Balloon {
                amount_mib: 17,
                ..options()
            },
            16 * MIB
        )
        .is_err()
    );
}

#[test]
fn the_driver_writes_actual_and_nothing_else() {
    let mut balloon = bench().balloon;
    let before = balloon.config().to_vec();
    balloon.write_config(0, &[0xff; 4]);
    balloon.write_config(8, &[0xff; 8]);
    balloon.write_config(u64::MAX - 1, &[0xff; 4]);
    assert_eq!(balloon.config(), before);
    balloon.write_config(4, &512u32.to_le_bytes());
    assert_eq!(balloon.statistics().unwrap().actual_mib, 2);
    // From the last byte of the target on.
    balloon.write_config(3, &[0xff, 1, 0, 0, 0]);
    assert_eq!(balloon.config()[..8], [0, 4, 0, 0, 1, 0, 0, 0]);
    balloon.reset();
    assert_eq!(balloon.statistics().unwrap().actual_pages, 0);
    assert_eq!(balloon.statistics().unwrap().target_mib, 4);
}

#[test]
fn statistics_are_held_until_the_next_are_due() {
    let mut bench = bench();
    bench.stats_due();
    bench.send_stats(&[(4, 1 << 40), (1000, 5), (0, 3)]).unwrap();
    assert_eq!(bench.rings[2].used(), None);
    let stats = bench.balloon.statistics().unwrap();
    assert_eq!((stats.free_memory, stats.swap_in), (Some(1 << 40), Some(3)));
    assert_eq!((stats.target_pages, stats.target_mib), (1024, 4));
    // One more than the driver may offer waits.
    bench.send_stats(&[(4, 2)]).unwrap();
    assert_eq!(bench.balloon.statistics().unwrap().free_memory, Some(1 << 40));
    bench.stats_due();
    assert_eq!(bench.rings[2].used(), Some((0, 0)));
    assert_eq!(bench.rings[2].used(), None);
    assert_eq!(bench.balloon.statistics().unwrap().free_memory, Some(2));
    assert_eq!(bench.balloon.progress()[2].as_ref().unwrap().held, [1]);
}

#[test]
fn a_buffer_offered_before_the_driver_is_ready_is_found() {
    let mut balloon = Balloon::new(&options(), 16 * MIB).unwrap();
    let (mut rings, activation, kicks) = rings(QUEUES, QUEUE_SIZE, FEATURE_STATS);
    rings[2].put(LIST, &[4, 0, 77, 0, 0, 0, 0, 0, 0, 0]);
    rings[2].offer(&[(LIST, 10, false)]);
    balloon.handle(Event::Kick(2)).unwrap();
    balloon.activate(activation).unwrap();
    assert_eq!(kicks[2].read().unwrap(), 1);
    balloon.handle(Event::Kick(2)).unwrap();
    assert_eq!(balloon.statistics().unwrap().free_memory, Some(77));
}

#[test]
fn the_driver_is_asked_to_kick_for_each_answer() {
    let features = FEATURE_STATS | crate::devices::virtio::FEATURE_EVENT_INDEX;
    let mut bench = bench_of(&options(), features);
    for free in 0..4 {
        let bytes = [4, 0, free, 0, 0, 0, 0, 0, 0, 0];
        bench.rings[2].put(LIST, &bytes);
        bench.rings[2].offer(&[(LIST, 10, false)]);
        assert!(bench.rings[2].wants_kick(), "answer {free}");
        bench.balloon.handle(Event::Kick(2)).unwrap();
        assert_eq!(bench.balloon.statistics().unwrap().free_memory, Some(free.into()));
        bench.stats_due();
    }
}

#[test]
fn the_timer_asks() {
    let mut bench = bench();
    bench.send_stats(&[(4, 2)]).unwrap();
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 1,
    };
    let spec = Itimerspec {
        it_interval: now,
        it_value: now,
    };
    timerfd_settime(&bench.balloon.timer, TimerfdTimerFlags::empty(), &spec).unwrap();
    let source = bench.balloon.sources()[0];
    let mut poll = libc::pollfd {
        fd: source.fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one descriptor, in a structure that lives through the call.
    assert_eq!(unsafe { libc::poll(&mut poll, 1, -1) }, 1);
    bench
        .balloon
        .handle(Event::Host(source.token, EventSet::IN))
        .unwrap();
    assert_eq!(bench.rings[2].used(), Some((0, 0)));
}

#[test]
fn statistics_are_bounded_and_the_devices_to_read() {
    let mut bench = bench();
    bench.rings[2].offer(&[(LIST, 2570, false)]);
    assert!(bench.balloon.handle(Event::Kick(2)).is_err());
    let mut bench = self::bench();
    bench.rings[2].offer(&[(LIST, 160, true)]);
    assert!(bench.balloon.handle(Event::Kick(2)).is_err());
}

#[test]
fn statistics_cannot_be_switched_on_or_off() {
    let mut with = bench().balloon;
    assert_eq!(with.set_statistics_interval(0), Err(UpdateError::Interval));
    assert_eq!(with.set_statistics_interval(2), Ok(()));
    assert_eq!(with.options().stats_polling_interval_s, 2);
    let without = api::Balloon {
        stats_polling_interval_s: 0,
        ..options()
    };
    let mut without = Balloon::new(&without, 16 * MIB).unwrap();
    assert_eq!(without.features() & FEATURE_STATS, 0);
    assert_eq!(without.set_statistics_interval(2), Err(UpdateError::NoStatistics));
    assert!(without.statistics().is_err());
}

#[test]
fn features_are_those_asked_for() {
    let offered =
        |options: &api::Balloon| Balloon::new(options, MIB * 16).unwrap().features() & !COMMON_FEATURES;
    assert_eq!(
        offered(&options()),
        FEATURE_STATS | FEATURE_DEFLATE_ON_OOM | FEATURE_REPORTING
    );
    let none = api::Balloon {
        deflate_on_oom: false,
        stats_polling_interval_s: 0,
        free_page_reporting: false,
        ..options()
    };
    assert_eq!(offered(&none), 0);
}

#[test]
fn a_saved_balloon_comes_back_with_its_buffer() {
    let mut bench = bench();
    bench.balloon.set_target(6).unwrap();
    bench.balloon.write_config(4, &512u32.to_le_bytes());
    bench.send_stats(&[(4, 99)]).unwrap();
    let (saved, progress) = (bench.balloon.save(), bench.balloon.progress());
    let before = bench.balloon.statistics().unwrap();

    let mut balloon = Balloon::new(&options(), 16 * MIB).unwrap();
    balloon.restore(&saved).unwrap();
    assert_eq!(balloon.statistics().unwrap(), before);
    let features = FEATURE_STATS | FEATURE_REPORTING;
    let queues = bench.rings.iter().zip(&bench.kicks).zip(&progress).enumerate();
    let queues = queues.map(|(index, ((ring, kick), progress))| {
        let mut queue = ring.queue(index, &bench.interrupt, kick);
        queue.advance_to(progress.as_ref().unwrap());
        Some(queue)
    });
    let activation = Activation {
        memory: bench.memory.clone(),
        queues: queues.collect(),
        features,
        interrupt: bench.interrupt.clone(),
        kicks: bench.kicks.clone(),
    };
    balloon.activate(activation).unwrap();
    assert_eq!(balloon.progress(), progress);
    balloon.ask_for_statistics().unwrap();
    assert_eq!(bench.rings[2].used(), Some((0, 0)));
}

#[test]
fn states_that_cannot_be_are_refused() {
    let good = bench().balloon.save();
    let refused = |change: &dyn Fn(&mut Saved)| {
        let mut saved = good.clone();
        change(&mut saved);
        bench().balloon.restore(&saved).unwrap_err().to_string()
    };
    assert!(refused(&|saved| saved.version = 9).contains("version 9"));
    assert!(refused(&|saved| saved.state["target_pages"] = 4097.into()).contains("up to 4096"));
    assert!(refused(&|saved| saved.state["stats_polling_interval_s"] = 0.into()).contains("1 or more"));
    assert!(refused(&|saved| saved.state["more"] = 0.into()).contains("more"));
}

proptest! {
    /// Whatever is listed, exactly the listed pages go.
    #[test]
    fn exactly_the_listed_pages_go(pages in prop::collection::vec(0u32..64, 0..100)) {
        let mut bench = bench();
        bench.fill(64);
        if !pages.is_empty() {
            let list: Vec<u32> = pages.iter().map(|page| FIRST + page).collect();
            bench.inflate(&list).unwrap();
        }
        let listed: BTreeSet<u32> = pages.into_iter().collect();
        prop_assert_eq!(bench.empty(64), listed.into_iter().collect::<Vec<_>>());
    }

    /// Any bytes in any queue, in either direction: refused or served, and every chain comes back at most once.
    #[test]
    fn any_bytes_are_survived(
        queue in 0usize..QUEUES,
        bytes in prop::collection::vec(any::<u8>(), 1..300),
        write in any::<bool>(),
    ) {
        let mut bench = bench();
        bench.rings[queue].put(LIST, &bytes);
        bench.rings[queue].offer(&[(LIST, bytes.len() as u32, write)]);
        let result = bench.balloon.handle(Event::Kick(queue));
        let held = queue == 2;
        prop_assert_eq!(bench.rings[queue].used().is_some(), result.is_ok() && !held);
        prop_assert_eq!(bench.rings[queue].used(), None);
    }
}
