//! Who may send how much: the HTB tree with what is known of all slivers together.
//!
//! Two things of a class depend on the others. Its *turn* (quantum) is its guarantee over the
//! smallest one, so that excess is shared in proportion to the guarantees; ratios end at 1:64,
//! where one turn takes so long that the others starve. And when the owner lowers the node's rate
//! below the sum of the guarantees, each gets its proportion of what there is: the node's rate
//! is never passed.

use std::collections::BTreeMap;

use mandoline_limits::netlink::{Connection, Request};
use mandoline_limits::shaper::{Bandwidth, MAX_WEIGHT, Slot, SlotParameters, Tree};
use mandoline_limits::{Error, Rate};

type Result<T> = std::result::Result<T, Error>;

/// The tree and what its slivers may send.
#[derive(Debug)]
pub(super) struct Shaping {
    tree: Tree,
    slivers: BTreeMap<u16, Bandwidth>,
    common: Common,
}

/// What all classes of a tree have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Common {
    /// The node's rate.
    rate: Rate,
    /// The guarantee that weighs 1.
    unit: Rate,
    /// The sum of all guarantees, in bit/s, if it is more than the node's rate.
    oversold: Option<u64>,
}

impl Common {
    fn of(rate: Rate, slivers: &BTreeMap<u16, Bandwidth>) -> Self {
        let guarantees = || slivers.values().map(|b| b.guarantee.bits_per_second());
        let sum = guarantees().fold(0, u64::saturating_add);
        let least = guarantees().min().unwrap_or_else(|| Rate::MIN.bits_per_second());
        let most = guarantees().max().unwrap_or_default();
        let unit = Rate::from_bits_per_second(least.max(most.div_ceil(MAX_WEIGHT)));
        Self {
            rate,
            unit: unit.unwrap_or(Rate::MIN),
            oversold: (sum > rate.bits_per_second()).then_some(sum),
        }
    }

    /// A sliver's bandwidth with its guarantee as far as the node can keep it.
    fn kept(&self, bandwidth: &Bandwidth) -> Bandwidth {
        let Some(sum) = self.oversold else {
            return *bandwidth;
        };
        let share = u128::from(bandwidth.guarantee.bits_per_second())
            * u128::from(self.rate.bits_per_second())
            / u128::from(sum);
        let bits = u64::try_from(share).unwrap_or(u64::MAX);
        Bandwidth {
            guarantee: Rate::from_bits_per_second(bits).unwrap_or(Rate::MIN),
            ..*bandwidth
        }
    }
}

impl Shaping {
    /// The tree, of whose slivers nothing is known yet.
    pub(super) fn new(tree: Tree) -> Self {
        let slivers = BTreeMap::new();
        let common = Common::of(tree.config.rate, &slivers);
        Self {
            tree,
            slivers,
            common,
        }
    }

    /// What a sliver may send, as far as it is known.
    pub(super) fn bandwidth(&self, index: u16) -> Option<Bandwidth> {
        self.slivers.get(&index).copied()
    }

    /// What makes or changes a sliver's classes, and those of others as far as they depend on it.
    pub(super) fn set(&mut self, index: u16, bandwidth: Bandwidth) -> Result<Vec<Request>> {
        check(&bandwidth)?;
        self.slivers.insert(index, bandwidth);
        if self.share_out() {
            return self.all();
        }
        self.tree.set(index, &self.common.kept(&bandwidth))
    }

    /// What takes a sliver's classes away, and gives to others what it had.
    pub(super) fn remove(&mut self, index: u16) -> Result<Vec<Request>> {
        let mut requests = Vec::from(self.tree.remove(index)?);
        if self.slivers.remove(&index).is_some() && self.share_out() {
            requests.extend(self.all()?);
        }
        Ok(requests)
    }

    /// What changes the node's rate.
    pub(super) fn set_rate(&mut self, rate: Rate) -> Result<Vec<Request>> {
        let mut requests = vec![self.tree.set_rate(rate)?];
        self.share_out();
        requests.extend(self.all()?);
        Ok(requests)
    }

    /// Takes these for the slivers that there are, without a word to the kernel.
    pub(super) fn know(&mut self, slivers: impl IntoIterator<Item = (u16, Bandwidth)>) -> Result<()> {
        self.slivers.clear();
        for (index, bandwidth) in slivers {
            check(&bandwidth)?;
            self.slivers.insert(index, bandwidth);
        }
        self.share_out();
        Ok(())
    }

    /// The classes that a known sliver should have.
    pub(super) fn wanted(&self, index: u16) -> Result<Option<SlotParameters>> {
        let kept = self.slivers.get(&index).map(|b| self.common.kept(b));
        kept.map(|b| self.tree.config.slot(&b)).transpose()
    }

    /// What makes or mends the classes of a known sliver.
    pub(super) fn again(&self, index: u16) -> Result<Vec<Request>> {
        match self.slivers.get(&index) {
            Some(bandwidth) => self.tree.set(index, &self.common.kept(bandwidth)),
            None => Ok(Vec::new()),
        }
    }

    /// The kernel's classes.
    pub(super) fn slots(&self, connection: &mut Connection) -> Result<BTreeMap<u16, Slot>> {
        self.tree.slots(connection)
    }

    /// What no class claimed.
    pub(super) fn strays(
        &self,
        connection: &mut Connection,
    ) -> Result<mandoline_limits::netlink::tc::ClassStats> {
        self.tree.strays(connection)
    }

    /// Works out what all have in common. True: it has changed.
    fn share_out(&mut self) -> bool {
        let common = Common::of(self.tree.config.rate, &self.slivers);
        let changed = common != self.common;
        self.common = common;
        self.tree.config.unit = common.unit;
        changed
    }

    fn all(&self) -> Result<Vec<Request>> {
        let mut requests = Vec::new();
        for index in self.slivers.keys() {
            requests.extend(self.again(*index)?);
        }
        Ok(requests)
    }
}

/// Refuses what no node could keep.
pub(super) fn check(bandwidth: &Bandwidth) -> Result<()> {
    match bandwidth.peak {
        Some(peak) if peak < bandwidth.guarantee => Err(Error::OutOfRange {
            what: "guaranteed rate",
            value: bandwidth.guarantee.to_string(),
            allowed: format!("at most the peak rate, {peak}"),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use mandoline_limits::shaper::TreeConfig;
    use proptest::prelude::*;

    use super::*;

    fn rate(bits: u64) -> Rate {
        Rate::from_bits_per_second(bits).unwrap()
    }

    fn shaping(node: u64) -> Shaping {
        let config = TreeConfig::new("x", rate(node)).unwrap();
        Shaping::new(Tree { link: 7, config })
    }

    fn bandwidth(guarantee: u64) -> Bandwidth {
        Bandwidth {
            guarantee: rate(guarantee),
            peak: None,
        }
    }

    #[test]
    fn small_guarantees_weigh_in_proportion_too() {
        let mut shaping = shaping(100_000_000);
        for (index, bits) in [(0, 1_000), (1, 2_000), (2, 4_000)] {
            shaping.set(index, bandwidth(bits)).unwrap();
        }
        let quantum = |shaping: &Shaping, index| shaping.wanted(index).unwrap().unwrap().class.quantum;
        let one = quantum(&shaping, 0);
        assert_eq!(
            [quantum(&shaping, 1), quantum(&shaping, 2)],
            [2 * one, 4 * one],
            "as the guarantees"
        );
        // A far larger one moves the unit: the small ones weigh alike, the ratio ends at 64.
        let requests = shaping.set(3, bandwidth(10_000_000)).unwrap();
        assert_eq!(requests.len(), 4 * 3, "all four classes with leaf and queue");
        assert_eq!(quantum(&shaping, 2), one);
        assert_eq!(quantum(&shaping, 3), 64 * one);
        // It goes, and all is as before; one more of the same changes nobody else's.
        assert_eq!(shaping.remove(3).unwrap().len(), 3 + 3 * 3);
        assert_eq!(quantum(&shaping, 2), 4 * one);
        assert_eq!(shaping.set(4, bandwidth(2_000)).unwrap().len(), 3);
    }

    proptest! {
        #[test]
        fn guarantees_never_add_up_to_more_than_the_node_has(
            node in 1_000_000u64..1_000_000_000, guarantees in proptest::collection::vec(8u64..1_000_000_000, 1..40),
        ) {
            let mut shaping = shaping(1_000_000_000);
            for (index, bits) in guarantees.iter().enumerate() {
                shaping.set(index as u16, bandwidth(*bits)).unwrap();
            }
            shaping.set_rate(rate(node)).unwrap();
            let kept = |index: usize| shaping.wanted(index as u16).unwrap().unwrap().class;
            let sum: u64 = (0..guarantees.len()).map(|i| kept(i).rate.bits_per_second()).sum();
            // A rate ends at one byte a second.
            prop_assert!(sum <= node + 8 * guarantees.len() as u64);
            for (index, bits) in guarantees.iter().enumerate() {
                let class = kept(index);
                prop_assert_eq!(class.ceil.bits_per_second(), node);
                if guarantees.iter().sum::<u64>() <= node {
                    prop_assert_eq!(class.rate.bits_per_second(), *bits);
                }
            }
        }
    }
}
