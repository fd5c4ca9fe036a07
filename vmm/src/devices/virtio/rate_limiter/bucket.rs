//! A token bucket's arithmetic: whole numbers, no rounding, no clock of its own.
//!
//! What a bucket holds is counted in tokens times its refill time: one nanosecond gives `size` of that, one token
//! costs `refill_ns`. So nothing is ever divided while tokens come and go, and nothing drifts.

use mandoline_api::monitor::TokenBucket;

/// Largest bucket. More could not be told from no limit, and `full` stays well inside an `i128`.
const MAX_SIZE: u64 = 1 << 62;
/// Longest refill time in ns: 146 years.
const MAX_REFILL_NS: u64 = 1 << 62;
const NS_IN_MS: u64 = 1_000_000;
/// A bucket that is nearly empty is not asked again before this time in ns, unless it is full sooner: it costs no
/// tokens, and bounds how often a limiter wakes.
const PATIENCE_NS: u64 = 1_000_000;

/// See the module. Times are ns of any clock that never goes back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bucket {
    size: u64,
    refill_ns: u64,
    /// Left of the tokens that do not come back.
    burst: u64,
    /// Tokens times `refill_ns`; negative: a debt.
    credit: i128,
    /// When `credit` was right.
    at: u64,
}

impl Bucket {
    /// A full one; `None` where `bucket` does not limit.
    pub(super) fn new(bucket: &TokenBucket, now: u64) -> Option<Self> {
        if bucket.size == 0 || bucket.refill_time == 0 {
            return None;
        }
        let mut new = Self {
            size: bucket.size.min(MAX_SIZE),
            refill_ns: bucket.refill_time.saturating_mul(NS_IN_MS).min(MAX_REFILL_NS),
            burst: bucket.one_time_burst.unwrap_or(0),
            credit: 0,
            at: now,
        };
        new.credit = new.full();
        Some(new)
    }

    fn full(&self) -> i128 {
        i128::from(self.size) * i128::from(self.refill_ns)
    }

    /// Tokens that a request takes from the bucket, beside the burst.
    fn beside_burst(&self, tokens: u64) -> u64 {
        tokens - tokens.min(self.burst)
    }

    /// Brings the bucket to `now`.
    pub(super) fn refill(&mut self, now: u64) {
        let elapsed = i128::from(now.saturating_sub(self.at));
        let gained = elapsed.saturating_mul(i128::from(self.size));
        self.credit = self.credit.saturating_add(gained).min(self.full());
        self.at = self.at.max(now);
    }

    /// Time in ns until a request for `tokens` is worth another try; 0: it passes now.
    pub(super) fn wait(&self, tokens: u64) -> u64 {
        let tokens = self.beside_burst(tokens);
        if tokens == 0 {
            return 0;
        }
        // What is larger than the bucket passes when the bucket is full.
        let price = (i128::from(tokens) * i128::from(self.refill_ns)).min(self.full());
        match self.time_to(price) {
            0 => 0,
            enough => enough.max(PATIENCE_NS.min(self.time_to(self.full()))),
        }
    }

    /// Time in ns until `credit` is there.
    pub(super) fn time_to(&self, credit: i128) -> u64 {
        let missing = (credit - self.credit).max(0);
        let size = i128::from(self.size);
        u64::try_from((missing + size - 1) / size).unwrap_or(u64::MAX)
    }

    /// Takes `tokens`, which [`Bucket::wait`] has let pass.
    pub(super) fn take(&mut self, tokens: u64) {
        let rest = self.beside_burst(tokens);
        self.burst -= tokens - rest;
        let price = i128::from(rest) * i128::from(self.refill_ns);
        self.credit = self.credit.saturating_sub(price);
    }

    /// Whole tokens that it holds; negative: a debt.
    pub(super) fn tokens(&self) -> i64 {
        let tokens = self.credit.div_euclid(i128::from(self.refill_ns));
        i64::try_from(tokens).unwrap_or(if tokens < 0 { i64::MIN } else { i64::MAX })
    }

    /// Holds `tokens` from now on, at most its size.
    pub(super) fn set_tokens(&mut self, tokens: i64) {
        self.credit = (i128::from(tokens) * i128::from(self.refill_ns)).min(self.full());
    }

    /// What it was made from, with what is left of the burst.
    pub(super) fn config(&self) -> TokenBucket {
        TokenBucket {
            size: self.size,
            one_time_burst: Some(self.burst),
            refill_time: self.refill_ns.div_ceil(NS_IN_MS),
        }
    }
}
