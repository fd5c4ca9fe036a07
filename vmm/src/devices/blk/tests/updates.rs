//! What changes while the guest runs, and what is saved.

use mandoline_api::monitor::TokenBucket;

use super::*;
use crate::devices::virtio::interrupt::CONFIG_CHANGED;

fn an_hour(size: u64) -> Option<TokenBucket> {
    Some(TokenBucket {
        size,
        one_time_burst: None,
        refill_time: 3_600_000,
    })
}

#[test]
fn limits_stop_requests_in_order_and_are_changed_live() {
    for engine in ENGINES {
        let rate_limiter = api::RateLimiter {
            bandwidth: an_hour(1024),
            ops: an_hour(4),
        };
        let limited = Options {
            rate_limiter,
            ..options(engine)
        };
        let mut bench = bench_on(disk(8), &limited);
        assert_eq!(bench.request(0, 0, 1024, true).0, 0);
        // No bytes are left, but operations that move none pass.
        assert_eq!(bench.request(4, 0, 0, false).0, 0);
        let first = bench.offer(0, 0, 0, 512, true);
        let second = bench.offer(1, 4, 0, 0, false);
        bench.kick();
        bench.kick();
        assert_eq!(bench.ring.used(), None, "the second stays behind the first");
        assert_eq!(bench.blk.metrics()["throttled"], 1);
        assert!(bench.blk.progress()[0].as_ref().unwrap().held.is_empty());
        bench.blk.set_rate_limiter(&api::RateLimiter {
            bandwidth: an_hour(0),
            ops: None,
        });
        bench.blk.handle(Event::Host(LIMITER, EventSet::IN)).unwrap();
        let mut done = [bench.used().0, bench.used().0];
        done.sort_unstable();
        assert_eq!(done, [first.min(second), first.max(second)]);
        // Four operations have passed.
        bench.offer(0, 4, 0, 0, false);
        bench.kick();
        assert_eq!(bench.ring.used(), None);
        assert_eq!(bench.blk.metrics()["throttled"], 2);
    }
}

#[test]
fn a_refused_request_costs_operations_and_no_bytes() {
    let rate_limiter = api::RateLimiter {
        bandwidth: an_hour(512),
        ops: None,
    };
    let limited = Options {
        rate_limiter,
        ..options(IoEngine::Sync)
    };
    let mut bench = bench_on(disk(8), &limited);
    assert_eq!(bench.request(0, 8, 1024, true).0, 1);
    assert_eq!(bench.request(0, 0, 512, true).0, 0);
}

#[test]
fn a_grown_file_is_shown_and_used() {
    for engine in ENGINES {
        let mut bench = bench(engine, 8, false);
        assert_eq!(bench.blk.grow().unwrap(), 8);
        assert_eq!(
            bench.interrupt.status() & CONFIG_CHANGED,
            0,
            "nothing has changed"
        );
        bench.file.set_len(16 * 512).unwrap();
        assert_eq!(bench.request(0, 8, 512, true).0, 1);
        assert_eq!(bench.blk.grow().unwrap(), 16);
        assert_eq!(bench.blk.config()[..8], 16u64.to_le_bytes());
        assert_ne!(bench.interrupt.status() & CONFIG_CHANGED, 0);
        assert_eq!(bench.interrupt.generation(), 1);
        assert_eq!(bench.request(0, 15, 512, true).0, 0);
        bench.file.set_len(8 * 512).unwrap();
        assert!(matches!(
            bench.blk.grow(),
            Err(UpdateError::Smaller { got: 8, least: 16 })
        ));
        // What the guest sees is as it was; what is gone is an error.
        assert_eq!(bench.request(0, 15, 512, true).0, 1);
    }
}

#[test]
fn another_file_takes_the_place_of_the_first() {
    for engine in ENGINES {
        let mut bench = bench(engine, 8, false);
        let engine_before = bench.blk.engine.kind();
        // The same file, opened again: the engine stays.
        let same = bench.file.try_clone().unwrap();
        assert_eq!(bench.blk.replace_file(same, false).unwrap(), 8);
        assert_eq!(bench.blk.engine.kind(), engine_before);

        bench.offer(0, 1, 0, 512, false);
        bench.kick();
        let mut other = tempfile::tempfile().unwrap();
        other.write_all(&[0x77; 16 * 512]).unwrap();
        let old = std::mem::replace(&mut bench.file, other.try_clone().unwrap());
        assert_eq!(bench.blk.replace_file(other, false).unwrap(), 16);
        bench.used();
        assert_eq!(bench.contents()[..512], [0x77; 512], "it was the old file's");
        assert_eq!(bench.request(0, 15, 512, true).0, 0);
        assert_eq!(bench.ring.get(DATA, 512), [0x77; 512]);
        assert_eq!(bench.blk.engine.kind(), IoEngine::Sync);
        assert_eq!(
            bench.blk.metrics()["io_engine_fallback"].is_string(),
            engine_before == IoEngine::Async
        );

        let smaller = || old.try_clone().unwrap();
        assert!(matches!(
            bench.blk.replace_file(smaller(), false),
            Err(UpdateError::Smaller { got: 8, least: 16 })
        ));
        assert_eq!(bench.blk.replace_file(smaller(), true).unwrap(), 8);
        assert_eq!(bench.request(0, 8, 512, true).0, 1);
    }
}

#[test]
fn a_file_must_be_open_for_what_the_guest_may_do() {
    let named = tempfile::NamedTempFile::new().unwrap();
    named.as_file().set_len(8 * 512).unwrap();
    let open = |write: bool| {
        File::options()
            .read(!write)
            .write(write)
            .open(named.path())
            .unwrap()
    };
    let mut writable = bench(IoEngine::Sync, 8, false);
    for write in [false, true] {
        assert!(matches!(
            writable.blk.replace_file(open(write), false),
            Err(UpdateError::Access { .. })
        ));
    }
    let mut read_only = bench(IoEngine::Sync, 8, true);
    assert_eq!(read_only.blk.replace_file(open(false), false).unwrap(), 8);
    assert!(read_only.blk.replace_file(open(true), false).is_err());
}

#[test]
fn a_saved_drive_comes_back_on_a_file_that_holds_it() {
    let limited = Options {
        rate_limiter: api::RateLimiter {
            bandwidth: an_hour(1000),
            ops: None,
        },
        ..options(IoEngine::Sync)
    };
    let mut saver = bench_on(disk(8), &limited);
    assert_eq!(saver.request(0, 0, 512, true).0, 0);
    let saved = saver.blk.save();
    let blk = |sectors, read_only| {
        let options = Options {
            read_only,
            ..options(IoEngine::Sync)
        };
        Blk::new(disk(sectors), &options).unwrap()
    };
    let mut larger = blk(16, false);
    larger.restore(&saved).unwrap();
    assert_eq!(larger.config()[..8], 8u64.to_le_bytes(), "as the guest was told");
    let tokens = larger.limiter.save().bandwidth.unwrap().tokens;
    assert_eq!(tokens, 488, "what was spent is spent");
    for (sectors, read_only, name) in [(7, false, "sectors"), (8, true, "read_only")] {
        let error = blk(sectors, read_only).restore(&saved).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
}
