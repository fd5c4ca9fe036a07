//! Pauses between attempts: they double up to a bound, with jitter, so that a thousand nodes do not come back
//! to a restarted authority in the same second.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

/// Pauses that grow.
#[derive(Debug)]
pub struct Backoff {
    builder: ExponentialBuilder,
    pauses: ExponentialBackoff,
    longest: Duration,
}

/// A clone has its own pauses, from the shortest on.
impl Clone for Backoff {
    fn clone(&self) -> Self {
        Self {
            builder: self.builder,
            pauses: self.builder.build(),
            longest: self.longest,
        }
    }
}

impl Backoff {
    /// Pauses from `first` to `longest`.
    pub fn new(first: Duration, longest: Duration) -> Self {
        let builder = ExponentialBuilder::new()
            .with_min_delay(first)
            .with_max_delay(longest)
            .without_max_times()
            .with_jitter();
        Self {
            pauses: builder.build(),
            builder,
            longest,
        }
    }

    /// The next pause.
    pub fn next_pause(&mut self) -> Duration {
        self.pauses.next().unwrap_or(self.longest).min(self.longest)
    }

    /// Waits for the next pause.
    pub async fn wait(&mut self) {
        let pause = self.next_pause();
        tokio::time::sleep(pause).await;
    }

    /// Begins again with the shortest.
    pub fn reset(&mut self) {
        self.pauses = self.builder.build();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_bound_and_no_further_and_begin_again() {
        let (first, longest) = (Duration::from_millis(50), Duration::from_secs(1));
        let mut backoff = Backoff::new(first, longest);
        let pauses: Vec<_> = (0..50).map(|_| backoff.next_pause()).collect();
        assert!(pauses[0] >= first && pauses[0] <= 2 * first, "{:?}", pauses[0]);
        assert!(pauses.iter().all(|pause| *pause <= longest));
        assert_eq!(pauses[49], longest);
        backoff.reset();
        assert!(backoff.next_pause() <= 2 * first);
    }
}
