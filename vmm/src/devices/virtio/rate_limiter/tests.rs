//! Tests of the limiter on a clock of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;

const MS: u64 = 1_000_000;

fn bucket(size: u64, burst: u64, refill_time: u64) -> TokenBucket {
    TokenBucket {
        size,
        one_time_burst: Some(burst),
        refill_time,
    }
}

fn on_clock(bandwidth: Option<TokenBucket>, ops: Option<TokenBucket>) -> (RateLimiter, Arc<AtomicU64>) {
    let time = Arc::new(AtomicU64::new(7));
    let clock = time.clone();
    let config = api::RateLimiter { bandwidth, ops };
    let clock = Box::new(move || clock.load(Ordering::Relaxed));
    (RateLimiter::with_clock(&config, clock).unwrap(), time)
}

#[test]
fn without_buckets_all_passes() {
    let (mut limiter, _) = on_clock(None, Some(bucket(0, 0, 5)));
    for _ in 0..1000 {
        assert!(limiter.consume(u64::MAX, u64::MAX));
    }
    assert_eq!(limiter.throttled(), 0);
}

#[test]
fn a_request_takes_from_both_buckets_or_from_neither() {
    let (mut limiter, time) = on_clock(Some(bucket(1000, 0, 1000)), Some(bucket(2, 0, 1000)));
    assert!(limiter.consume(100, 1));
    assert!(!limiter.consume(1000, 1), "bytes");
    assert!(limiter.consume(900, 1), "the operation was not taken");
    assert!(!limiter.consume(0, 1), "operations");
    assert_eq!(limiter.throttled(), 1, "it was not woken between");
    time.fetch_add(500 * MS, Ordering::Relaxed);
    limiter.woken();
    assert!(limiter.consume(500, 1));
    assert!(!limiter.consume(1, 0));
    assert_eq!(limiter.throttled(), 2);
}

#[test]
fn the_burst_goes_first_and_does_not_come_back() {
    let (mut limiter, time) = on_clock(Some(bucket(10, 5, 1000)), None);
    assert!(limiter.consume(15, 1));
    assert!(!limiter.consume(1, 1));
    time.fetch_add(1_000_000 * MS, Ordering::Relaxed);
    assert!(limiter.consume(10, 1));
    assert!(!limiter.consume(1, 1));
}

#[test]
fn what_is_larger_than_the_bucket_passes_when_it_is_full_and_leaves_a_debt() {
    let (mut limiter, time) = on_clock(Some(bucket(10, 0, 10)), None);
    assert!(limiter.consume(1, 1));
    assert!(!limiter.consume(35, 1), "not full");
    time.fetch_add(MS, Ordering::Relaxed);
    assert!(limiter.consume(35, 1));
    assert_eq!(limiter.save().bandwidth.unwrap().tokens, -25);
    time.fetch_add(25 * MS, Ordering::Relaxed);
    assert!(!limiter.consume(1, 1), "the debt is paid, and no more");
    assert!(limiter.consume(0, 1), "what costs nothing passes");
    time.fetch_add(MS, Ordering::Relaxed);
    assert!(limiter.consume(1, 1));
}

#[test]
fn an_update_replaces_what_it_names_and_wakes() {
    let (mut limiter, _) = on_clock(Some(bucket(1, 0, 3_600_000)), Some(bucket(1, 0, 3_600_000)));
    assert!(limiter.consume(1, 1));
    assert!(!limiter.consume(1, 1));
    assert!(limiter.is_throttled());
    limiter.update(&api::RateLimiter {
        bandwidth: Some(bucket(0, 0, 0)),
        ops: None,
    });
    // The timer fires now, not in an hour.
    let mut ready = [rustix::event::PollFd::new(
        &limiter.timer,
        rustix::event::PollFlags::IN,
    )];
    assert_eq!(rustix::event::poll(&mut ready, None).unwrap(), 1);
    limiter.woken();
    assert!(!limiter.is_throttled());
    assert!(!limiter.consume(1, 1), "operations are as they were");
    limiter.update(&api::RateLimiter {
        bandwidth: None,
        ops: Some(bucket(2, 0, 3_600_000)),
    });
    assert!(limiter.consume(1 << 40, 2));
    assert!(!limiter.consume(0, 1));
    assert_eq!(limiter.config().bandwidth, None);
}

#[test]
fn saved_state_comes_back_without_a_gain() {
    let (mut limiter, _) = on_clock(Some(bucket(100, 7, 10)), None);
    assert!(limiter.consume(50, 1));
    let saved = limiter.save();
    let text = serde_json::to_string(&saved).unwrap();
    let (mut other, time) = on_clock(None, Some(bucket(1, 0, 1)));
    time.store(1 << 60, Ordering::Relaxed);
    other.restore(&serde_json::from_str(&text).unwrap());
    assert_eq!(other.save(), saved);
    assert!(!other.consume(58, 9));
    assert!(other.consume(57, 9));
    // A state that nobody wrote.
    let tokens = i64::MAX;
    let forged = SavedBucket {
        bucket: bucket(3, 0, 1),
        tokens,
    };
    other.restore(&SavedRateLimiter {
        bandwidth: Some(forged),
        ops: None,
    });
    assert_eq!(other.save().bandwidth.unwrap().tokens, 3);
}

#[test]
fn extremes_neither_overflow_nor_hang() {
    let extreme = bucket(u64::MAX, u64::MAX, u64::MAX);
    let (mut limiter, time) = on_clock(Some(extreme), Some(bucket(1, 0, u64::MAX)));
    for _ in 0..4 {
        let _ = limiter.consume(u64::MAX, 1);
        limiter.woken();
    }
    time.store(u64::MAX, Ordering::Relaxed);
    assert!(limiter.consume(1, 1));
    let mut saved = limiter.save();
    if let Some(ops) = &mut saved.ops {
        ops.tokens = i64::MIN;
    }
    limiter.restore(&saved);
    assert!(!limiter.consume(1, u64::MAX));
}

fn sizes() -> impl Strategy<Value = u64> {
    prop_oneof![1u64..20, 1u64..1_000_000, Just(u64::from(u32::MAX))]
}

proptest! {
    /// In no window does more pass than the promise says.
    #[test]
    fn no_window_passes_more_than_promised(
        size in sizes(),
        burst in 0u64..100,
        refill in 1u64..5000,
        steps in prop::collection::vec((0u64..3_000_000_000, 1u64..=100), 1..60),
    ) {
        let (mut limiter, time) = on_clock(Some(bucket(size, burst, refill)), None);
        let mut passed: Vec<(u64, u64)> = Vec::new();
        for (step, percent) in steps {
            let now = time.fetch_add(step, Ordering::Relaxed) + step;
            // Up to the bucket's size.
            let tokens = (u128::from(size) * u128::from(percent) / 100).max(1) as u64;
            while limiter.consume(tokens, 1) {
                passed.push((now, tokens));
            }
        }
        for first in 0..passed.len() {
            let mut sum = 0u128;
            for (at, tokens) in &passed[first..] {
                sum += u128::from(*tokens);
                let window = u128::from(at - passed[first].0);
                // Multiplied out, so that the check rounds nothing either.
                let refill = u128::from(refill * MS);
                let allowed = u128::from(size + burst) * refill + window * u128::from(size);
                prop_assert!(sum * refill <= allowed, "{sum} in {window} ns");
            }
        }
    }

    /// Whoever comes back when the limiter says so passes, and nothing was lost by waiting: the rate is reached.
    #[test]
    fn the_wait_is_long_enough_and_costs_nothing(
        size in sizes(),
        refill in 1u64..5000,
        requests in prop::collection::vec(1u64..=300, 1..40),
    ) {
        let (mut limiter, time) = on_clock(None, Some(bucket(size, 0, refill)));
        let start = time.load(Ordering::Relaxed);
        let mut sum = 0u128;
        for percent in requests {
            let tokens = (u128::from(size) * u128::from(percent) / 100).max(1) as u64;
            if !limiter.consume(0, tokens) {
                let wake = limiter.wake.unwrap();
                time.store(wake, Ordering::Relaxed);
                limiter.woken();
                prop_assert!(limiter.consume(0, tokens), "woken too early");
            }
            sum += u128::from(tokens);
            let elapsed = u128::from(time.load(Ordering::Relaxed) - start);
            // Never later than a limiter without timers would have let it pass, but for patience and rounding.
            let (refill, size) = (u128::from(refill * MS), u128::from(size));
            let over = u128::from(tokens).max(size);
            let needed = (sum + over) * refill / size + u128::from(MS) + 1;
            prop_assert!(elapsed <= needed, "{elapsed} ns, {needed} would do");
        }
    }

    /// Refilling in many steps gives exactly what refilling in one gives.
    #[test]
    fn steps_do_not_drift(
        size in sizes(),
        refill in 1u64..100_000,
        steps in prop::collection::vec(0u64..50_000, 1..200),
    ) {
        let empty = || {
            let mut new = Bucket::new(&bucket(size, 0, refill), 0).unwrap();
            new.take(size);
            new
        };
        let (mut slow, mut fast) = (empty(), empty());
        let mut now = 0;
        for step in steps {
            now += step;
            slow.refill(now);
        }
        fast.refill(now);
        prop_assert_eq!(slow, fast);
    }
}
