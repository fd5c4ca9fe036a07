//! How 1000 CPU shares of a node become weights of the kernel (NSDI'04 paper, section 4.2.2).
//!
//! With *host* of the 1000 kept for the node's own, *g* a sliver's `cpu_guarantee`, *s* its `cpu_share`, and over all
//! slivers that have a cgroup here
//!
//! ```text
//!   L = 1000 − host − Σ g        what is left for best effort
//!   S = Σ s                      everybody's shares, guaranteed or not
//! ```
//!
//! a guaranteed sliver weighs `10 · (g + L·s/S)`: its guarantee, and its part of what is left as if it were one of the
//! best-effort slivers, so that a guarantee never makes anyone slower when all want the processor. The parent of all
//! best-effort slivers weighs the rest of `10 · L`. All weights together are `10 · (1000 − host)`, whoever comes: a
//! guarantee of *g* is at least *g*/1000 of the node, since the levels above keep `(1000 − host)/1000` for slivers.

use std::collections::BTreeMap;

use mandoline_api::nodemgr::VmId;
use mandoline_rspec::CPU_SHARES;

/// Weights for each share: `cpu.weight` has 1 to 10000 for 1 to 1000 shares.
const SCALE: u64 = 10;

/// What a group of the node's own weighs: the kernel's default.
const NODES_OWN: u64 = 100;

/// What a sliver claims of the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// `cpu_share`, 1 to 1000.
    pub share: u32,
    /// `cpu_guarantee`, 0 to 1000.
    pub guarantee: u32,
}

/// Weights of the groups directly below the slivers' parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weights {
    /// Of each guaranteed sliver.
    pub guaranteed: BTreeMap<VmId, u32>,
    /// Of the parent of all others.
    pub best_effort: u32,
}

/// The weights for these slivers, with `host` of 1000 kept for the node's own.
pub fn weights(host: u64, claims: &BTreeMap<VmId, Claim>) -> Weights {
    let sum = |of: fn(&Claim) -> u32| claims.values().map(|claim| u64::from(of(claim))).sum::<u64>();
    let given = sum(|claim| claim.guarantee);
    let spare = SCALE * CPU_SHARES.saturating_sub(host).saturating_sub(given);
    let shares = sum(|claim| claim.share).max(1);
    let mut best_effort = spare;
    let guaranteed = claims
        .iter()
        .filter(|(_, claim)| claim.guarantee > 0)
        .map(|(vm_id, claim)| {
            let part = spare * u64::from(claim.share) / shares;
            best_effort = best_effort.saturating_sub(part);
            (*vm_id, within_bounds(SCALE * u64::from(claim.guarantee) + part))
        });
    Weights {
        guaranteed: guaranteed.collect(),
        best_effort: within_bounds(best_effort),
    }
}

/// The weight of each of `levels` groups above the slivers, where one group of the node's own (the kernel's default
/// weight) competes at each: the product of all levels' parts is `(1000 − host)/1000`.
/// The kernel bounds weights by 10000, so a level never keeps more than 99 %.
pub fn weight_above(host: u64, levels: usize) -> u32 {
    let slivers = CPU_SHARES.saturating_sub(host) as f64 / CPU_SHARES as f64;
    let part = slivers.powf(1.0 / levels.max(1) as f64);
    // A part of 1, for a host that keeps nothing, is the heaviest that there is; rounded up, in the slivers' favour.
    let weight = (NODES_OWN as f64 * part / (1.0 - part)).ceil();
    within_bounds(weight.min(u32::MAX as f64) as u64)
}

/// The kernel's bounds of `cpu.weight`.
fn within_bounds(weight: u64) -> u32 {
    weight.clamp(1, 10_000) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn claims(of: &[(u32, u32)]) -> BTreeMap<VmId, Claim> {
        let claims = of.iter().map(|(share, guarantee)| Claim {
            share: *share,
            guarantee: *guarantee,
        });
        (1..).zip(claims).collect()
    }

    #[test]
    fn ten_of_fifty_active_is_a_fifth() {
        // The paper's example: all best effort, weighed inside their parent; the parent has all that is left.
        let weights = weights(100, &claims(&[(10, 0), (40, 0)]));
        assert_eq!((weights.guaranteed.len(), weights.best_effort), (0, 9000));
    }

    #[test]
    fn a_small_guarantee_is_no_loss() {
        let two_alike = weights(100, &claims(&[(1, 10), (1, 0)]));
        assert_eq!(two_alike.guaranteed[&1], 100 + 4450);
        assert_eq!(two_alike.best_effort, 4450);
    }

    #[test]
    fn levels_above_keep_the_slivers_part() {
        for host in [50, 100, 500, 900] {
            for levels in 1..4 {
                let weight = f64::from(weight_above(host, levels));
                let part = (weight / (weight + 100.0)).powi(levels as i32);
                let wanted = (1000 - host) as f64 / 1000.0;
                assert!(part >= wanted - 0.02, "{host} {levels}: {part}");
                assert!(part <= wanted + 0.01 + 0.1 * wanted, "{host} {levels}: {part}");
            }
        }
        assert_eq!(weight_above(0, 2), 10_000);
        assert_eq!(weight_above(1000, 2), 1);
    }

    proptest! {
        #[test]
        fn a_guarantee_holds_under_any_load(
            host in 0u64..=500,
            asked in proptest::collection::vec((1u32..=1000, 0u32..=400), 0..40),
            best_effort in proptest::collection::vec(1u32..=1000, 0..200),
        ) {
            // Admission: guarantees never pass what the node has.
            let mut left = 1000 - host as u32;
            let admitted = asked.into_iter().map(|(share, guarantee)| {
                let guarantee = guarantee.min(left);
                left -= guarantee;
                (share, guarantee)
            });
            let all: Vec<_> = admitted.chain(best_effort.iter().map(|share| (*share, 0))).collect();
            let claims = claims(&all);
            let weights = weights(host, &claims);
            let sum: u64 = weights.guaranteed.values().map(|w| u64::from(*w)).sum::<u64>()
                + u64::from(weights.best_effort);
            // One more than what there is: a parent of no weight cannot be.
            prop_assert!(sum <= 10 * (1000 - host) + 1, "{sum}");
            for (vm_id, claim) in &claims {
                match weights.guaranteed.get(vm_id) {
                    Some(weight) => {
                        // Everybody runs at once: this sliver's part of the slivers' part of the node.
                        let part = u64::from(*weight) * (1000 - host) * 1000;
                        prop_assert!(part >= u64::from(claim.guarantee) * 1000 * sum - 1000 * u64::from(*weight));
                    }
                    None => prop_assert_eq!(claim.guarantee, 0),
                }
            }
            // Fairness of what is left: equal shares, equal parts, guaranteed or not (to a unit of weight).
            let be_shares: u64 = claims.values().filter(|c| c.guarantee == 0).map(|c| u64::from(c.share)).sum();
            if be_shares > 0 && u64::from(weights.best_effort) > 1 {
                for (vm_id, weight) in &weights.guaranteed {
                    let claim = claims[vm_id];
                    let extra = u64::from(*weight) - 10 * u64::from(claim.guarantee);
                    let same_share = u64::from(weights.best_effort) * u64::from(claim.share) / be_shares;
                    prop_assert!(extra <= same_share + 1);
                }
            }
        }
    }
}
