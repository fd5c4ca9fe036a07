//! The log: to a descriptor, in one line a record, and never faster than a guest may provoke.

use std::fs::File;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lets `burst` messages pass an interval, and counts what it held back.
#[derive(Debug)]
pub struct RateLimit {
    burst: u32,
    interval: Duration,
    window: Mutex<Window>,
}

#[derive(Debug)]
struct Window {
    since: Option<Instant>,
    passed: u32,
    held: u64,
}

impl RateLimit {
    /// `burst` messages each `interval`.
    pub const fn new(burst: u32, interval: Duration) -> Self {
        Self {
            burst,
            interval,
            window: Mutex::new(Window {
                since: None,
                passed: 0,
                held: 0,
            }),
        }
    }

    /// Whether a message may pass now: then the number of those held back since the last that passed.
    pub fn pass(&self) -> Option<u64> {
        self.pass_at(Instant::now())
    }

    fn pass_at(&self, now: Instant) -> Option<u64> {
        let mut window = self
            .window
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if window
            .since
            .is_none_or(|since| now.duration_since(since) >= self.interval)
        {
            window.since = Some(now);
            window.passed = 0;
        }
        if window.passed == self.burst {
            window.held += 1;
            return None;
        }
        window.passed += 1;
        Some(std::mem::take(&mut window.held))
    }
}

/// Sends the log to `file`. What the libraries beneath say about rings (`virtio_queue`) is left out: devices
/// report the same errors themselves, under a limit.
pub fn start(file: File) {
    use tracing_subscriber::filter::{LevelFilter, Targets};
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;
    let layer = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_writer(Mutex::new(file));
    let targets = Targets::new()
        .with_default(LevelFilter::INFO)
        .with_target("virtio_queue", LevelFilter::OFF);
    // Fails only when a log was started already: then that one stays.
    let _ = tracing_subscriber::registry()
        .with(layer)
        .with(targets)
        .try_init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_the_rest_is_counted() {
        let limit = RateLimit::new(2, Duration::from_secs(1));
        let start = Instant::now();
        assert_eq!(limit.pass_at(start), Some(0));
        assert_eq!(limit.pass_at(start), Some(0));
        assert_eq!(limit.pass_at(start), None);
        assert_eq!(limit.pass_at(start + Duration::from_millis(999)), None);
        assert_eq!(limit.pass_at(start + Duration::from_secs(1)), Some(2));
    }
}
