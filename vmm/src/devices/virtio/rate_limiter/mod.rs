//! Rate limits: token buckets for bytes and operations, and a timer that says when to go on.
//!
//! ```text
//!               consume: true                     consume: false, timer set
//!  (tokens) <------------------- device's work -----------------------------> (throttled)
//!      ^                                                                          |
//!      +-------- timer -> the device's source -> woken(), work again -------------+
//! ```
//!
//! A request passes both buckets or takes from neither. One that is larger than a bucket passes when the bucket is
//! full, and leaves it in debt: so every request passes in the end, and in the long run the rate holds. In any
//! window of time `t`, with no request larger than the bucket, at most `size + one_time_burst + t * size / refill_time`
//! tokens pass.

mod bucket;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use mandoline_api::monitor::{self as api, TokenBucket};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;

use crate::devices::virtio::Source;
use crate::devices::virtio::rate_limiter::bucket::Bucket;

const NS_IN_S: u64 = 1_000_000_000;

/// A clock in ns that never goes back.
type Clock = Box<dyn Fn() -> u64 + Send>;

/// See the module.
pub struct RateLimiter {
    bandwidth: Option<Bucket>,
    ops: Option<Bucket>,
    clock: Clock,
    timer: OwnedFd,
    /// When the timer fires, if it is set.
    wake: Option<u64>,
    throttled: u64,
}

/// A limiter's saved state. No time passes in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedRateLimiter {
    /// Bytes.
    pub bandwidth: Option<SavedBucket>,
    /// Operations.
    pub ops: Option<SavedBucket>,
}

/// A bucket's saved state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedBucket {
    /// What it was made from; of the burst, what is left.
    pub bucket: TokenBucket,
    /// Tokens that it holds; negative: a debt.
    pub tokens: i64,
}

impl RateLimiter {
    /// A limiter with full buckets; a bucket that is absent, or whose size or refill time is 0, does not limit.
    /// Fails when the host has no timer to give.
    pub fn new(config: &api::RateLimiter) -> io::Result<Self> {
        let start = Instant::now();
        // 584 years fit.
        Self::with_clock(config, Box::new(move || start.elapsed().as_nanos() as u64))
    }

    /// The same where nothing is said of a limit.
    pub fn of(config: Option<&api::RateLimiter>) -> io::Result<Self> {
        Self::new(&config.copied().unwrap_or_default())
    }

    /// The same on a clock of the caller's, for tests. The timer runs on the host's in any case.
    pub fn with_clock(config: &api::RateLimiter, clock: Clock) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let now = clock();
        Ok(Self {
            bandwidth: config.bandwidth.and_then(|bucket| Bucket::new(&bucket, now)),
            ops: config.ops.and_then(|bucket| Bucket::new(&bucket, now)),
            clock,
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            wake: None,
            throttled: 0,
        })
    }

    /// Whether a request may pass now. False: nothing was taken, and the limiter's source will be ready when it is worth
    /// trying again.
    pub fn consume(&mut self, bytes: u64, ops: u64) -> bool {
        if self.bandwidth.is_none() && self.ops.is_none() {
            return true;
        }
        let now = (self.clock)();
        let mut demands = [(&mut self.bandwidth, bytes), (&mut self.ops, ops)];
        let mut wait = 0;
        for (bucket, tokens) in &mut demands {
            if let Some(bucket) = bucket {
                bucket.refill(now);
                wait = wait.max(bucket.wait(*tokens));
            }
        }
        if wait > 0 {
            self.throttle(now, wait);
            return false;
        }
        for (bucket, tokens) in demands {
            if let Some(bucket) = bucket {
                bucket.take(tokens);
            }
        }
        true
    }

    fn throttle(&mut self, now: u64, wait: u64) {
        let wake = now.saturating_add(wait);
        match self.wake {
            // It is set already, and asking again then is soon enough.
            Some(set) if set <= wake && set > now => {}
            set => {
                self.throttled += u64::from(set.is_none());
                self.wake = Some(wake);
                self.set_timer(wait);
            }
        }
    }

    fn set_timer(&self, ns: u64) {
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let value = Timespec {
            tv_sec: i64::try_from(ns / NS_IN_S).unwrap_or(i64::MAX),
            tv_nsec: (ns % NS_IN_S) as i64,
        };
        let spec = Itimerspec {
            it_interval: zero,
            it_value: value,
        };
        // Cannot fail: the descriptor is a timer, and the time is a valid one.
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec) {
            tracing::error!(%error, "the timer of a rate limiter cannot be set");
        }
    }

    /// Whether a request was refused and the time to try again has not come ([`RateLimiter::woken`]).
    pub fn is_throttled(&self) -> bool {
        self.wake.is_some()
    }

    /// The descriptor that is ready (edge-triggered) when it is worth trying again.
    pub fn source(&self, token: u32) -> Source {
        Source {
            fd: self.timer.as_raw_fd(),
            // While the VM is paused, what comes is left lying, and a resume looks anyway.
            events: EventSet::IN | EventSet::EDGE_TRIGGERED,
            token,
        }
    }

    /// To be called on the source's event, before trying again. Calling it at other times does no harm.
    pub fn woken(&mut self) {
        // Never blocks; nothing to read means that it did not fire, and who is refused again sets it again.
        let _ = rustix::io::read(&self.timer, &mut [0u8; 8]);
        self.wake = None;
    }

    /// Replaces what `config` names by full buckets, as Firecracker does: an absent bucket stays as it is, one of size or
    /// refill time 0 goes. Who waits is woken.
    pub fn update(&mut self, config: &api::RateLimiter) {
        let now = (self.clock)();
        if let Some(bucket) = &config.bandwidth {
            self.bandwidth = Bucket::new(bucket, now);
        }
        if let Some(bucket) = &config.ops {
            self.ops = Bucket::new(bucket, now);
        }
        if self.wake.is_some() {
            self.wake = Some(now);
            self.set_timer(1);
        }
    }

    /// What it limits now, with what is left of bursts.
    pub fn config(&self) -> api::RateLimiter {
        api::RateLimiter {
            bandwidth: self.bandwidth.as_ref().map(Bucket::config),
            ops: self.ops.as_ref().map(Bucket::config),
        }
    }

    /// How often it stopped the device.
    pub fn throttled(&self) -> u64 {
        self.throttled
    }

    /// Its state, to be saved.
    pub fn save(&self) -> SavedRateLimiter {
        let now = (self.clock)();
        let save = |bucket: &Option<Bucket>| {
            bucket.clone().map(|mut bucket| {
                bucket.refill(now);
                SavedBucket {
                    bucket: bucket.config(),
                    tokens: bucket.tokens(),
                }
            })
        };
        SavedRateLimiter {
            bandwidth: save(&self.bandwidth),
            ops: save(&self.ops),
        }
    }

    /// Takes back what [`RateLimiter::save`] gave. Any state is possible: a bucket never holds more than its size.
    pub fn restore(&mut self, saved: &SavedRateLimiter) {
        let now = (self.clock)();
        let restore = |saved: &Option<SavedBucket>| {
            let saved = saved.as_ref()?;
            let mut bucket = Bucket::new(&saved.bucket, now)?;
            bucket.set_tokens(saved.tokens);
            Some(bucket)
        };
        self.bandwidth = restore(&saved.bandwidth);
        self.ops = restore(&saved.ops);
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
