//! Mandoline's benchmarks: how fast, how dense, how isolated, measured beside a peer in the same run.

mod boot;
mod calls;
mod io;
mod isolation;
mod managed;
mod monitor;
mod nodemgr;
mod plot;
mod proc;
mod report;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Runs a benchmark, shows it as a table, and writes `<out>/<name>.json` and `<out>/<name>.svg`.
#[derive(Debug, Parser)]
#[command(name = "mandoline-perf", version)]
struct Cli {
    #[command(subcommand)]
    benchmark: Benchmark,
    /// Where the JSON and the plot go.
    #[arg(long, global = true, default_value = "target/perf")]
    out: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Benchmark {
    /// Start → first user instruction → reachable, by phase: our monitor beside QEMU's microvm machine.
    Boot(boot::BootArgs),
    /// Whether limits hold: busy slivers by share, a guarantee among many, a cap, and floods by base rate.
    Isolation(isolation::IsolationArgs),
    /// Devices at work: random reads, TCP and small packets, with and without vhost, beside QEMU's microvm machine.
    Io(io::IoArgs),
    /// What a monitor costs: CPU to the first guest instruction, private memory, an idle and a parked sliver.
    Monitor(monitor::MonitorArgs),
    /// The node manager: the calls that make a sliver, and its CPU with many pools and slivers.
    Nodemgr(nodemgr::NodemgrArgs),
    /// The part of a benchmark that runs inside the lab node.
    #[command(subcommand, hide = true)]
    InNode(InNode),
    /// The part of a benchmark that runs inside a guest.
    #[command(subcommand, hide = true)]
    InGuest(io::guest::GuestWork),
}

#[derive(Debug, Subcommand)]
enum InNode {
    Boot(boot::node::NodeArgs),
    Isolation(isolation::node::NodeArgs),
    Io(io::node::NodeArgs),
    Monitor(monitor::node::NodeArgs),
    Nodemgr(nodemgr::node::NodeArgs),
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    match cli.benchmark {
        Benchmark::Boot(args) => boot::run(&args, &cli.out),
        Benchmark::Io(args) => io::run(&args, &cli.out),
        Benchmark::Isolation(args) => isolation::run(&args, &cli.out),
        Benchmark::InNode(InNode::Isolation(args)) => isolation::node::run(&args),
        Benchmark::InNode(InNode::Io(args)) => io::node::run(&args),
        Benchmark::InGuest(work) => io::guest::run(&work),
        Benchmark::Monitor(args) => monitor::run(&args, &cli.out),
        Benchmark::InNode(InNode::Monitor(args)) => monitor::node::run(&args),
        Benchmark::Nodemgr(args) => nodemgr::run(&args, &cli.out),
        Benchmark::InNode(InNode::Nodemgr(args)) => nodemgr::node::run(&args),
        Benchmark::InNode(InNode::Boot(args)) => boot::node::run(&args),
    }
}
