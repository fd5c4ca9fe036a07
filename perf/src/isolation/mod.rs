//! Whether limits hold: the CPU time of busy slivers by their shares, a guarantee among many that have none, a cap on
//! an idle node, and what three flooding slivers send by their base rates under the node's own.
//!
//! What is measured is what the node manager tells of each sliver (`/v1/usage`): the kernel's own counters.

pub(crate) mod node;

use std::path::Path;

use anyhow::Result;

use crate::managed::Managed;
use crate::report::{Report, Row, Target};
use node::Sample;

#[derive(Debug, clap::Args)]
pub(crate) struct IsolationArgs {
    /// How long each look lasts, in s.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(5..=600))]
    pub window_s: u32,
    /// How many looks at each thing.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=50))]
    pub runs: u32,
    /// Busy slivers without a guarantee beside the one that has it.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub spinners: u32,
}

pub(crate) fn run(args: &IsolationArgs, out: &Path) -> Result<()> {
    // Each spinner is a sliver of 64 MiB with its monitor.
    let node = Managed::start("isolation", 2048 + 128 * args.spinners)?;
    let samples: Vec<Sample> = node.run(
        "isolation",
        &[
            ("--window-s", args.window_s),
            ("--runs", args.runs),
            ("--spinners", args.spinners),
        ],
    )?;
    let rows = samples
        .iter()
        .filter_map(|sample| Row::of(&sample.subject, &sample.measure, &sample.unit, &sample.values))
        .collect();
    Report {
        name: "isolation".into(),
        when: jiff::Timestamp::now().to_string(),
        machine: node.machine.clone(),
        targets: targets(args, &samples),
        rows,
    }
    .publish(out)
}

/// How far a value may be from what a sliver is entitled to: of that, or in points of the whole.
enum Within {
    Points(f64),
    Part(f64),
}

fn targets(args: &IsolationArgs, samples: &[Sample]) -> Vec<Target> {
    let seconds = args.window_s;
    samples
        .iter()
        .filter_map(|sample| {
            let wanted = sample.wanted?;
            let within = match sample.measure.as_str() {
                node::CPU_BY_SHARE => Within::Points(3.0),
                node::CPU_CAPPED => Within::Points(0.5),
                // A floor: more is no harm.
                node::CPU_GUARANTEED => Within::Part(0.05),
                node::EXCESS => Within::Part(0.1),
                node::GUARANTEED_RATE => Within::Part(0.05),
                node::NODE_RATE => Within::Part(0.02),
                _ => return None,
            };
            let row = Row::of(&sample.subject, &sample.measure, &sample.unit, &sample.values)?;
            let got = row.p50;
            let floor = matches!(
                sample.measure.as_str(),
                node::CPU_GUARANTEED | node::GUARANTEED_RATE
            );
            let ceiling = sample.measure == node::NODE_RATE;
            let (slack, words) = match within {
                Within::Points(points) => (points, format!("± {points} points")),
                Within::Part(part) => (wanted * part, format!("± {:.0} %", part * 100.0)),
            };
            let met = (ceiling || got >= wanted - slack) && (floor || got <= wanted + slack);
            let sign = match (floor, ceiling) {
                (true, _) => "≥ ",
                (_, true) => "≤ ",
                _ => "",
            };
            Some(Target {
                measure: format!("{}: {}", sample.subject, sample.measure),
                want: format!("{sign}{wanted:.2} {} {words}", sample.unit),
                got: format!("{got:.2} {}", sample.unit),
                met,
                note: format!("median of {} looks of {seconds} s", row.n),
            })
        })
        .collect()
}
