//! The brake on guessing passwords: failures are counted by account *and* address, so that a stranger's
//! guesses do not lock the owner out, and by address alone, so that one address cannot try many accounts.
//!
//! The counts live in this process only: several authority processes brake each by itself.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// Failures of one account from one address before it must wait.
const PER_ACCOUNT: u32 = 10;
/// Failures from one address, over all accounts.
const PER_ADDRESS: u32 = 100;
/// A failure is forgotten after this time.
const WINDOW: Duration = Duration::from_secs(300);
/// So many counters are kept; beyond, the oldest go. Bounds memory under a flood.
const MAX_COUNTERS: usize = 100_000;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Account(String, IpAddr),
    Address(IpAddr),
}

#[derive(Clone, Copy, Debug)]
struct Count {
    failures: u32,
    since: Instant,
}

/// Counts of recent failures.
#[derive(Debug, Default)]
pub struct Limiter {
    counts: Mutex<HashMap<Key, Count>>,
}

impl Limiter {
    /// Fails if this account or address has to wait.
    pub fn check(&self, account: &str, address: IpAddr) -> Result<()> {
        self.check_at(account, address, Instant::now())
    }

    /// Counts a failure.
    pub fn failed(&self, account: &str, address: IpAddr) {
        self.failed_at(account, address, Instant::now());
    }

    /// Forgets the failures of an account that has proved itself.
    pub fn succeeded(&self, account: &str, address: IpAddr) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.remove(&Key::Account(account.to_lowercase(), address));
    }

    fn check_at(&self, account: &str, address: IpAddr, now: Instant) -> Result<()> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        for (key, limit) in keys(account, address) {
            if let Some(count) = counts.get(&key)
                && count.failures >= limit
            {
                let age = now.saturating_duration_since(count.since);
                if age < WINDOW {
                    return Err(Error::RateLimited {
                        retry_after_s: (WINDOW - age).as_secs().max(1),
                    });
                }
            }
        }
        Ok(())
    }

    fn failed_at(&self, account: &str, address: IpAddr, now: Instant) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.len() >= MAX_COUNTERS {
            counts.retain(|_, count| now.saturating_duration_since(count.since) < WINDOW);
            if counts.len() >= MAX_COUNTERS {
                counts.clear();
            }
        }
        for (key, _) in keys(account, address) {
            let count = counts.entry(key).or_insert(Count {
                failures: 0,
                since: now,
            });
            if now.saturating_duration_since(count.since) >= WINDOW {
                *count = Count {
                    failures: 0,
                    since: now,
                };
            }
            count.failures = count.failures.saturating_add(1);
        }
    }
}

fn keys(account: &str, address: IpAddr) -> [(Key, u32); 2] {
    [
        (Key::Account(account.to_lowercase(), address), PER_ACCOUNT),
        (Key::Address(address), PER_ADDRESS),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
    const THERE: IpAddr = IpAddr::V6(std::net::Ipv6Addr::LOCALHOST);

    #[test]
    fn ten_failures_stop_the_account_from_that_address_only_and_for_a_while() {
        let limiter = Limiter::default();
        let start = Instant::now();
        for _ in 0..PER_ACCOUNT {
            assert!(limiter.check_at("A@b.c", HERE, start).is_ok());
            limiter.failed_at("a@B.c", HERE, start);
        }
        assert!(limiter.check_at("a@b.c", HERE, start).is_err());
        assert!(limiter.check_at("a@b.c", THERE, start).is_ok());
        assert!(limiter.check_at("x@b.c", HERE, start).is_ok());
        assert!(limiter.check_at("a@b.c", HERE, start + WINDOW).is_ok());
    }

    #[test]
    fn many_accounts_from_one_address_stop_the_address() {
        let limiter = Limiter::default();
        let start = Instant::now();
        for i in 0..PER_ADDRESS {
            limiter.failed_at(&i.to_string(), HERE, start);
        }
        assert!(limiter.check_at("new", HERE, start).is_err());
        assert!(limiter.check_at("new", THERE, start).is_ok());
    }

    #[test]
    fn success_forgets() {
        let limiter = Limiter::default();
        for _ in 0..PER_ACCOUNT {
            limiter.failed("a", HERE);
        }
        limiter.succeeded("A", HERE);
        assert!(limiter.check("a", HERE).is_ok());
    }
}
