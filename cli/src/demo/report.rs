//! What the demo shows at its end.

use std::time::Duration;

use mandoline_api::authority::{Sliver, SliverState};
use serde::Serialize;

use super::limits::Limits;
use super::node::Info;
use crate::error::Result;
use crate::output::{millis, table};

/// The first PlanetLab made a vserver with a warm cache in 9.66 s (NSDI'04, section 5.2: 0.15 s of RPCs beside it).
const PLANETLAB_MS: f64 = 9660.0;

/// A moment, seen from the machine that asked.
#[derive(Debug, Serialize)]
struct Moment {
    what: String,
    /// Microseconds after the request was sent.
    us: u64,
}

/// Everything that is worth telling.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// `kvm` or `tcg-svm`, and why.
    accel: String,
    accel_words: String,
    node_boot_ms: u64,
    /// From the request on.
    seen: Vec<Moment>,
    /// On the node, from `bind` on, by the node manager's names, microseconds.
    node_phases_us: Vec<(String, u64)>,
    /// How long each step of the join took in the guest, the shortest first.
    join_steps_us: Vec<(String, u64)>,
    /// What the command in the sliver printed.
    said: String,
    limits: Limits,
    planetlab_ms: f64,
}

/// What the names of a join's steps begin with.
const JOIN_STEP: &str = "guest_join_";

impl Report {
    #[expect(
        clippy::too_many_arguments,
        reason = "each is measured in another place of the demo"
    )]
    pub(super) fn new(
        node: &Info,
        sliver: &Sliver,
        said: String,
        limits: Limits,
        created: Duration,
        reachable: Duration,
        first_command: Duration,
        history: Vec<(SliverState, Duration)>,
    ) -> Self {
        let mut seen = vec![Moment {
            what: "slice created, the authority answers".into(),
            us: micros(created),
        }];
        for (state, at) in history {
            // States may come in before the answer does; `pending` says nothing.
            if !matches!(state, SliverState::Pending | SliverState::Reachable) {
                seen.push(Moment {
                    what: format!("sliver {}", state.as_str()),
                    us: micros(at),
                });
            }
        }
        seen.push(Moment {
            what: "sliver reachable".into(),
            us: micros(reachable),
        });
        seen.push(Moment {
            what: "first command over ssh done".into(),
            us: micros(first_command),
        });
        seen.sort_by_key(|moment| moment.us);
        // The join's steps are durations on the guest's clock; all others are moments on the node's.
        let (mut join, mut phases): (Vec<_>, Vec<_>) = sliver
            .phases_us
            .iter()
            .map(|(name, us)| (name.clone(), *us))
            .partition(|(name, _)| name.starts_with(JOIN_STEP));
        phases.sort_by_key(|(_, us)| *us);
        join.sort_by_key(|(_, us)| *us);
        Self {
            accel: node.accel.clone(),
            accel_words: node.accel_words.clone(),
            node_boot_ms: node.boot_ms,
            seen,
            node_phases_us: phases,
            join_steps_us: join,
            said,
            limits,
            planetlab_ms: PLANETLAB_MS,
        }
    }

    /// Whether the limits are what was asked for.
    pub(super) fn check_limits(&self) -> Result<()> {
        self.limits.check()
    }

    pub(super) fn people(&self) -> String {
        let limits = table(
            ["LIMIT", "ASKED FOR", "IN FORCE", "READ BACK FROM"],
            self.limits.rows(),
            "",
        );
        let seen = steps(
            "SEEN FROM HERE",
            self.seen.iter().map(|moment| (moment.what.as_str(), moment.us)),
        );
        let node = steps(
            "ON THE NODE, FROM bind ON",
            self.node_phases_us.iter().map(|(name, us)| (name.as_str(), *us)),
        );
        let join = table(
            ["OF WHICH JOIN, IN THE SLIVER", "took ms"],
            self.join_steps_us.iter().map(|(name, us)| {
                let step = name.strip_prefix(JOIN_STEP).unwrap_or(name);
                [step.to_owned(), format!("{:>9}", millis(*us))]
            }),
            "",
        );
        let last = self.node_phases_us.last().map_or(0, |(_, us)| *us);
        let ours = f64::from(u32::try_from(last / 1000).unwrap_or(u32::MAX));
        let factor = if ours > 0.0 { self.planetlab_ms / ours } else { 0.0 };
        format!(
            "\nIn the sliver, over ssh: {}\n\n{limits}\n\n{seen}\n\n{node}\n\n{join}\n\nA sliver on a node, creation to login: {ours:.0} ms here, {:.0} ms on the first PlanetLab (NSDI'04,\nvserver, warm cache): {factor:.1} times as fast. Here means: {}.",
            self.said, self.planetlab_ms, self.accel_words
        )
    }
}

/// Moments with what each step took.
fn steps<'s>(head: &str, moments: impl Iterator<Item = (&'s str, u64)>) -> String {
    let mut before = 0;
    let rows = moments.map(|(what, at)| {
        let took = at - std::mem::replace(&mut before, at);
        [
            what.to_owned(),
            format!("{:>9}", millis(at)),
            format!("{:>9}", millis(took)),
        ]
    });
    table(
        [head, " after ms", "  took ms"],
        rows,
        "the node has reported no phases",
    )
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_show_what_each_took() {
        let text = steps("X", [("monitor", 20_000), ("kernel", 520_000)].into_iter());
        let rows: Vec<Vec<_>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(rows[1], ["monitor", "20.0", "20.0"]);
        assert_eq!(rows[2], ["kernel", "520.0", "500.0"]);
    }
}
