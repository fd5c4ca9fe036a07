//! What a slice has sent in its day, and the rate that holds once the day's bytes are used up.
//!
//! ```text
//!          bytes >= sustained_rate x 24 h
//!   full ─────────────────────────────────▶ sustained (the ceiling is the sustained rate)
//!    ▲                                           │
//!    └──────── the day of the slice ends ◀───────┘
//! ```
//!
//! A day has 24 hours from the slice's first start on the node, and the next one follows. At
//! 1.5 Mbit/s that is 16.2 GB at any speed (architecture paper, section 5.1.3). Bytes are the
//! slice's, not the sliver's: one that is deleted and made again goes on where it was, until its
//! day is over.
//!
//! The kernel counts what a class has sent; here is how much of that was counted already
//! ([`Reading`]), and all of it is kept in the node manager's state. What is lost by a power cut
//! is what was sent since the last look, and no restart counts anything twice.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use mandoline_limits::Rate;
use serde::{Deserialize, Serialize};

/// A day, in seconds and in nanoseconds.
const DAY_S: u64 = 24 * 3600;
const DAY_NS: u64 = DAY_S * 1_000_000_000;

/// Tells the time, in ns since 1970: wall-clock time, since days outlast a reboot.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> u64 + Send + Sync>);

impl Clock {
    /// A clock that asks this function.
    pub fn new(now: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    pub(super) fn now(&self) -> u64 {
        (self.0)()
    }
}

impl Default for Clock {
    /// The system's clock.
    fn default() -> Self {
        Self::new(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        })
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

/// What a slice has sent in its day.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    /// When its day began, ns since 1970.
    pub since_ns: u64,
    /// What it has sent since, in bytes.
    pub bytes: u64,
    /// How much of its sliver's class is in this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reading: Option<Reading>,
}

impl Spent {
    /// When its day ends, ns since 1970.
    pub fn until_ns(&self) -> u64 {
        self.since_ns.saturating_add(DAY_NS)
    }

    /// Whether a day's bytes at this rate are used up.
    pub fn is_all_of(&self, sustained: Rate) -> bool {
        self.bytes >= budget(sustained)
    }
}

/// What a class had sent when it was last looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// The boot of the node: its classes end with it.
    pub boot: String,
    /// The sliver's vm_id, never used twice.
    pub mark: u32,
    /// What its class had sent, in bytes.
    pub bytes: u64,
}

/// What came of counting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counted {
    /// What is to be kept by slice; none for a slice of which nothing is.
    pub changes: Vec<(String, Option<Spent>)>,
    /// Slivers, by vm_id, that are held to their sustained rate from now on, or no more.
    pub switched: Vec<(u32, Option<Held>)>,
}

/// A sliver is held to its sustained rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// The rate: the sustained one, or the guarantee if that is more.
    pub rate: Rate,
    /// Until then, ns since 1970.
    pub until_ns: u64,
}

/// A day's bytes at a rate.
pub fn budget(sustained: Rate) -> u64 {
    sustained.bytes_per_second().saturating_mul(DAY_S)
}

/// What all slices of the node have sent.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    boot: String,
    slices: BTreeMap<String, Spent>,
    changed: BTreeSet<String>,
}

impl Ledger {
    /// An empty ledger in this boot of the node.
    pub(super) fn new(boot: String) -> Self {
        Self {
            boot,
            ..Self::default()
        }
    }

    /// Takes over what was kept.
    pub(super) fn remember(&mut self, slices: BTreeMap<String, Spent>) {
        self.slices = slices;
        self.changed.clear();
    }

    /// What a slice has sent.
    pub(super) fn spent(&self, slice: &str) -> Option<&Spent> {
        self.slices.get(slice)
    }

    /// All of them.
    pub(super) fn all(&self) -> &BTreeMap<String, Spent> {
        &self.slices
    }

    /// Counts what the class of a slice's sliver has sent by now; its first word begins the day.
    pub(super) fn count(&mut self, slice: &str, mark: u32, sent: u64, now: u64) {
        let boot = &self.boot;
        let entry = self.slices.entry(slice.to_owned()).or_insert_with(|| {
            self.changed.insert(slice.to_owned());
            Spent {
                since_ns: now,
                bytes: 0,
                reading: None,
            }
        });
        let mut changed = turn(entry, now);
        let same = |r: &&Reading| r.boot == *boot && r.mark == mark && r.bytes <= sent;
        let counted = entry.reading.as_ref().filter(same).map_or(0, |r| r.bytes);
        if sent > counted || entry.reading.is_none() {
            entry.bytes = entry.bytes.saturating_add(sent - counted);
            entry.reading = Some(Reading {
                boot: boot.clone(),
                mark,
                bytes: sent,
            });
            changed = true;
        }
        if changed {
            self.changed.insert(slice.to_owned());
        }
    }

    /// The class of a slice's sliver is gone: the next one begins at nothing.
    pub(super) fn close(&mut self, slice: &str) {
        if let Some(entry) = self.slices.get_mut(slice)
            && entry.reading.take().is_some()
        {
            self.changed.insert(slice.to_owned());
        }
    }

    /// Ends the days that are over. Of a slice that has no sliver, nothing is kept then.
    pub(super) fn turn(&mut self, now: u64, present: &BTreeSet<&str>) {
        let mut over = Vec::new();
        for (slice, entry) in &mut self.slices {
            if turn(entry, now) {
                self.changed.insert(slice.clone());
                if !present.contains(slice.as_str()) {
                    over.push(slice.clone());
                }
            }
        }
        for slice in over {
            self.slices.remove(&slice);
        }
    }

    /// What has changed since this was last asked; none for a slice of which nothing is kept.
    pub(super) fn changes(&mut self) -> Vec<(String, Option<Spent>)> {
        let changed = std::mem::take(&mut self.changed);
        changed
            .into_iter()
            .map(|slice| {
                let spent = self.slices.get(&slice).cloned();
                (slice, spent)
            })
            .collect()
    }
}

/// Begins a new day if the old one is over. True: it has.
fn turn(spent: &mut Spent, now: u64) -> bool {
    // A clock that was ahead when the day began, and was put right since: the day begins now, or
    // it would never end.
    if spent.since_ns > now.saturating_add(DAY_NS) {
        spent.since_ns = now;
        return true;
    }
    let days = now.saturating_sub(spent.since_ns) / DAY_NS;
    if days == 0 {
        return false;
    }
    spent.since_ns += days * DAY_NS;
    spent.bytes = 0;
    true
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    const HOUR: u64 = 3600 * 1_000_000_000;

    fn ledger() -> Ledger {
        Ledger::new("boot-1".to_owned())
    }

    fn bytes(ledger: &Ledger) -> u64 {
        ledger.spent("a.b").map_or(0, |s| s.bytes)
    }

    #[test]
    fn the_papers_day_has_16_2_gigabytes() {
        let rate = Rate::from_bits_per_second(1_500_000).unwrap();
        assert_eq!(budget(rate), 16_200_000_000);
        let spent = |bytes| Spent {
            since_ns: 0,
            bytes,
            reading: None,
        };
        assert!(!spent(16_199_999_999).is_all_of(rate) && spent(16_200_000_000).is_all_of(rate));
    }

    #[test]
    fn a_day_has_24_hours_from_the_first_start() {
        let mut ledger = ledger();
        let start = 7 * HOUR;
        ledger.count("a.b", 1, 0, start);
        ledger.count("a.b", 1, 500, start + 23 * HOUR);
        assert_eq!(bytes(&ledger), 500);
        // What is seen first in the new day counts there; what was counted is not counted again.
        ledger.count("a.b", 1, 600, start + 24 * HOUR);
        let spent = ledger.spent("a.b").unwrap();
        assert_eq!((spent.bytes, spent.since_ns), (100, start + 24 * HOUR));
        // Days in which nobody looked are over too, and the day keeps its hour.
        ledger.count("a.b", 1, 700, start + 100 * HOUR);
        assert_eq!(ledger.spent("a.b").unwrap().since_ns, start + 96 * HOUR);
    }

    #[test]
    fn a_deleted_sliver_takes_nothing_back_until_the_day_is_over() {
        let mut ledger = ledger();
        ledger.count("a.b", 1, 500, 0);
        ledger.close("a.b");
        ledger.turn(23 * HOUR, &BTreeSet::new());
        ledger.count("a.b", 2, 30, 23 * HOUR);
        assert_eq!(bytes(&ledger), 530);
        ledger.close("a.b");
        ledger.changes();
        ledger.turn(24 * HOUR, &BTreeSet::new());
        assert_eq!(ledger.changes(), [("a.b".to_owned(), None)]);
        // One that is there all the time only turns.
        ledger.count("c.d", 3, 30, 24 * HOUR);
        ledger.turn(48 * HOUR, &BTreeSet::from(["c.d"]));
        assert_eq!(ledger.spent("c.d").unwrap().bytes, 0);
    }

    #[test]
    fn a_restart_counts_nothing_twice_and_a_reboot_loses_no_budget() {
        let mut first = ledger();
        first.count("a.b", 1, 500, 0);
        let kept: BTreeMap<_, _> = first
            .changes()
            .into_iter()
            .filter_map(|(k, v)| Some((k, v?)))
            .collect();
        let json = serde_json::to_string(&kept).unwrap();
        let mut second = ledger();
        second.remember(serde_json::from_str(&json).unwrap());
        second.count("a.b", 1, 700, HOUR);
        assert_eq!(bytes(&second), 700);
        // After a reboot the class begins at nothing, though its number may have grown past the old.
        let mut third = Ledger::new("boot-2".to_owned());
        third.remember(serde_json::from_str(&json).unwrap());
        third.count("a.b", 1, 600, HOUR);
        assert_eq!(bytes(&third), 1_100);
    }

    #[test]
    fn a_clock_that_was_wrong_does_no_lasting_harm() {
        let mut ledger = ledger();
        let future = 1_000_000 * HOUR;
        ledger.count("a.b", 1, 500, future);
        ledger.count("a.b", 1, 600, HOUR);
        assert_eq!(
            (bytes(&ledger), ledger.spent("a.b").unwrap().since_ns),
            (600, HOUR)
        );
        // Back by a moment: the day goes on.
        ledger.count("a.b", 1, 700, HOUR - 1);
        assert_eq!(
            (bytes(&ledger), ledger.spent("a.b").unwrap().since_ns),
            (700, HOUR)
        );
        ledger.count("a.b", 1, 800, 25 * HOUR);
        assert_eq!(bytes(&ledger), 100);
    }

    proptest! {
        /// However often it is looked, restarted and made anew within a day: the sum is what was sent.
        #[test]
        fn the_sum_is_what_was_sent(steps in proptest::collection::vec((0u8..4, 0u64..10_000), 1..60)) {
            let (mut ledger, mut mark, mut class, mut total) = (ledger(), 1, 0, 0);
            for (n, (what, amount)) in steps.into_iter().enumerate() {
                let now = n as u64;
                match what {
                    0 | 1 => {
                        class += amount;
                        total += amount;
                        ledger.count("a.b", mark, class, now);
                    }
                    2 => {
                        // The node manager is killed and started: all changes were kept.
                        let kept = ledger.all().clone();
                        ledger = Ledger::new("boot-1".to_owned());
                        ledger.remember(kept);
                    }
                    _ => {
                        ledger.close("a.b");
                        class = 0;
                        mark += u32::from(amount % 2 == 0);
                    }
                }
                prop_assert_eq!(bytes(&ledger), total);
            }
        }
    }
}
