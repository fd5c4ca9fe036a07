//! What the node manager costs: the calls that make a sliver, and its own CPU on a node with many pools and slivers.
//!
//! The slivers are recorded and not started (their `start_time` is far off), so that only the node manager is
//! measured, not what it starts.

pub(crate) mod node;

use std::path::Path;

use anyhow::Result;

use crate::managed::Managed;
use crate::report::{Report, Row, Target};
use node::Sample;

#[derive(Debug, clap::Args)]
pub(crate) struct NodemgrArgs {
    /// Pools in all.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub pools: u32,
    /// Slivers, each bound to one of the pools.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=500))]
    pub slivers: u32,
    /// How often each call is made.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Time for which the node manager is watched at rest, in s: a reconcile comes every 30 s.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(30..=600))]
    pub rest_s: u32,
}

const SUBJECT: &str = "mandoline-nodemgr";

pub(crate) fn run(args: &NodemgrArgs, out: &Path) -> Result<()> {
    let node = Managed::start("nodemgr", 0)?;
    let samples: Vec<Sample> = node.run(
        "nodemgr",
        &[
            ("--pools", args.pools),
            ("--slivers", args.slivers),
            ("--runs", args.runs),
            ("--rest-s", args.rest_s),
        ],
    )?;
    let rows: Vec<Row> = samples
        .iter()
        .filter_map(|sample| Row::of(SUBJECT, &sample.measure, &sample.unit, &sample.values))
        .collect();
    let targets = targets(args, &rows);
    Report {
        name: "nodemgr".into(),
        when: jiff::Timestamp::now().to_string(),
        machine: node.machine.clone(),
        rows,
        targets,
    }
    .publish(out)
}

fn targets(args: &NodemgrArgs, rows: &[Row]) -> Vec<Target> {
    let loaded = format!("{} pools, {} slivers", args.pools, args.slivers);
    let wanted = [
        (
            node::CREATE,
            25.0,
            "an empty node; the paper's steps 1 to 3 took 150 ms".to_owned(),
        ),
        (node::STATUS_CPU, 100.0, loaded.clone()),
        (
            node::REST_CPU,
            100.0,
            format!("{loaded}; one reconcile and six looks at time bounds"),
        ),
    ];
    let target = |(measure, most, note): (&str, f64, String)| {
        let row = rows.iter().find(|row| row.measure == measure)?;
        Some(Target {
            measure: measure.to_owned(),
            want: format!("≤ {most} ms"),
            got: format!("{:.1} ms", row.p50),
            met: row.p50 <= most,
            note: format!("n={}, median; {note}", row.n),
        })
    };
    wanted.into_iter().filter_map(target).collect()
}
