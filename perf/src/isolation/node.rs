//! The part of the isolation benchmark that runs inside the lab node, as its owner.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use mandoline_api::nodemgr::{OWNER_SOCKET, Usage};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::calls::{call, get, wait_for_node_manager};

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct NodeArgs {
    #[arg(long)]
    pub window_s: u32,
    #[arg(long)]
    pub runs: u32,
    #[arg(long)]
    pub spinners: u32,
}

/// One measure of one sliver (or of the node), with all its values.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub subject: String,
    pub measure: String,
    pub unit: String,
    pub values: Vec<f64>,
    /// What it is entitled to.
    pub wanted: Option<f64>,
}

pub(crate) const CPU_BY_SHARE: &str = "part of the CPU time of all four";
pub(crate) const CPU_GUARANTEED: &str = "part of the node's CPU time, guaranteed";
pub(crate) const CPU_CAPPED: &str = "part of the node's CPU time, capped";
pub(crate) const EXCESS: &str = "part of the excess of the node's rate";
pub(crate) const GUARANTEED_RATE: &str = "sent, guaranteed";
pub(crate) const NODE_RATE: &str = "sent by all, in 10 s";

/// Keeps a processor busy.
const SPIN: &str = "while :; do :; done";
/// Sends datagrams as fast as it can to an address outside the node, where nobody listens.
const FLOOD: &str = "exec perl -MSocket -e '
socket(my $s, PF_INET, SOCK_DGRAM, 0) or die;
my ($to, $data) = (sockaddr_in(9, inet_aton(q(10.0.2.2))), q(x) x 1400);
while (1) { send($s, $data, 0, $to) or select(undef, undef, undef, 0.001) }'";
/// The node's rate while three slivers flood, in bit/s: what an emulated node carries with ease.
const NODE_BPS: u32 = 10_500_000;
/// The base rate of the first of them; the others have twice and four times as much. Together a third of the node's.
const BASE_BPS: u32 = 500_000;
/// Until slivers that were just made are busy.
const SETTLE: Duration = Duration::from_secs(5);
/// What a sliver has to boot in while the others are still quiet.
const BOOT: Duration = Duration::from_secs(4);
/// A sliver that is not reachable by then does not come.
const PATIENCE: Duration = Duration::from_secs(300);

pub(crate) fn run(args: &NodeArgs) -> Result<()> {
    wait_for_node_manager()?;
    let mut samples = shares(args)?;
    samples.extend(guarantee(args)?);
    samples.extend(cap(args)?);
    samples.extend(floods(args)?);
    serde_json::to_writer(std::io::stdout().lock(), &samples)?;
    Ok(())
}

/// Slivers that run until this is dropped; then the node is empty again.
struct Slivers(Vec<(u64, Value)>);

impl Slivers {
    /// One for each rspec, all doing the same, which they begin together once they have booted; they do it when this
    /// returns.
    fn start(what: &str, work: &str, rspecs: &[Value]) -> Result<Self> {
        let mut made = Self(Vec::new());
        let begin = SystemTime::now() + SETTLE + BOOT * u32::try_from(rspecs.len())?;
        let second = begin.duration_since(UNIX_EPOCH)?.as_secs();
        let script = format!("#!/bin/sh\nwhile [ $(date +%s) -lt {second} ]; do sleep 0.5; done\n{work}\n");
        for (n, rspec) in rspecs.iter().enumerate() {
            let mut whole = json!({"vm_type": "kvm-microvm", "mem_limit": "64 MiB", "disk_quota": "64 MiB", "initscript": script});
            for (name, value) in rspec.as_object().into_iter().flatten() {
                whole[name] = value.clone();
            }
            let slice = format!("plc.x_{what}{n}");
            let pool = json!({"slice_name": slice, "rspec": whole});
            let rcap = call(OWNER_SOCKET, "create_root_pool", &pool)?["rcap"].clone();
            let bound = call(OWNER_SOCKET, "bind", &json!({"rcap": rcap, "slice_name": slice}))?;
            made.0
                .push((bound["vm_id"].as_u64().context("bind gave no vm_id")?, rcap));
        }
        let began = Instant::now();
        loop {
            let list = call(OWNER_SOCKET, "list", &json!({}))?;
            let slivers = list["slivers"].as_array().cloned().unwrap_or_default();
            let reachable = |id: &u64| {
                slivers
                    .iter()
                    .any(|sliver| sliver["vm_id"] == *id && sliver["state"] == "reachable")
            };
            if made.0.iter().all(|(id, _)| reachable(id)) {
                break;
            }
            if began.elapsed() > PATIENCE {
                bail!("{what}: not all slivers became reachable: {list}");
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        eprintln!(
            "isolation: {what}: {} slivers are up after {} s",
            made.0.len(),
            began.elapsed().as_secs()
        );
        std::thread::sleep(begin.duration_since(SystemTime::now()).unwrap_or_default() + SETTLE);
        Ok(made)
    }

    fn ids(&self) -> Vec<u64> {
        self.0.iter().map(|(id, _)| *id).collect()
    }
}

impl Drop for Slivers {
    fn drop(&mut self) {
        for (_, rcap) in &self.0 {
            let _ = call(OWNER_SOCKET, "destroy", &json!({"rcap": rcap}));
        }
        let began = Instant::now();
        let empty = || {
            call(OWNER_SOCKET, "list", &json!({}))
                .is_ok_and(|list| list["slivers"].as_array().is_none_or(Vec::is_empty))
        };
        while !empty() && began.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// What each sliver used between two looks.
struct Used {
    seconds: f64,
    cpus: f64,
    /// CPU time in s, by sliver.
    cpu: BTreeMap<u64, f64>,
    /// Sent, in bit/s, by sliver.
    bps: BTreeMap<u64, f64>,
}

fn look() -> Result<Usage> {
    Ok(serde_json::from_value(get(OWNER_SOCKET, "usage")?)?)
}

fn used(window: Duration) -> Result<Used> {
    let before = look()?;
    std::thread::sleep(window);
    let after = look()?;
    let seconds = after.unix_ns.saturating_sub(before.unix_ns) as f64 / 1e9;
    let mut used = Used {
        seconds,
        cpus: after.node.cpus as f64,
        cpu: BTreeMap::new(),
        bps: BTreeMap::new(),
    };
    for sliver in &after.slivers {
        let Some(then) = before.slivers.iter().find(|then| then.vm_id == sliver.vm_id) else {
            continue;
        };
        let id = u64::from(sliver.vm_id);
        used.cpu
            .insert(id, sliver.cpu_us.saturating_sub(then.cpu_us) as f64 / 1e6);
        let bits = sliver.sent_bytes.saturating_sub(then.sent_bytes) as f64 * 8.0;
        used.bps.insert(id, bits / seconds);
    }
    Ok(used)
}

fn sample(subject: String, measure: &str, unit: &str, values: Vec<f64>, wanted: Option<f64>) -> Sample {
    Sample {
        subject,
        measure: measure.into(),
        unit: unit.into(),
        values,
        wanted,
    }
}

fn looks(args: &NodeArgs, window: Duration) -> Result<Vec<Used>> {
    (0..args.runs).map(|_| used(window)).collect()
}

fn window(args: &NodeArgs) -> Duration {
    Duration::from_secs(args.window_s.into())
}

/// Four busy slivers with shares 10, 10, 10 and 20 (NSDI'04, section 4.2.2: 10 of 50 is 20 %).
fn shares(args: &NodeArgs) -> Result<Vec<Sample>> {
    const SHARES: [u32; 4] = [10, 10, 10, 20];
    let rspecs = SHARES.map(|share| json!({"cpu_share": share}));
    let slivers = Slivers::start("share", SPIN, &rspecs)?;
    let looks = looks(args, window(args))?;
    let all: u32 = SHARES.iter().sum();
    let of = |id: &u64| {
        let part = |used: &Used| 100.0 * used.cpu.get(id).unwrap_or(&0.0) / used.cpu.values().sum::<f64>();
        looks.iter().map(part).collect()
    };
    Ok(slivers
        .ids()
        .iter()
        .zip(SHARES)
        .enumerate()
        .map(|(n, (id, share))| {
            let wanted = 100.0 * f64::from(share) / f64::from(all);
            sample(
                format!("sliver {} of 4, share {share}", n + 1),
                CPU_BY_SHARE,
                "%",
                of(id),
                Some(wanted),
            )
        })
        .collect())
}

/// One with a guarantee of 500, among many that have none.
fn guarantee(args: &NodeArgs) -> Result<Vec<Sample>> {
    let mut rspecs = vec![json!({"cpu_guarantee": 500})];
    rspecs.resize(1 + args.spinners as usize, json!({}));
    let slivers = Slivers::start("guarantee", SPIN, &rspecs)?;
    let id = slivers.ids()[0];
    let part = |used: &Used| 100.0 * used.cpu.get(&id).unwrap_or(&0.0) / (used.seconds * used.cpus);
    let values: Vec<f64> = looks(args, window(args))?.iter().map(part).collect();
    let subject = format!("500 of 1000, among {} spinners", args.spinners);
    Ok(vec![sample(subject, CPU_GUARANTEED, "%", values, Some(50.0))])
}

/// One that is capped at 10 of 1000, on a node where nobody else wants anything.
fn cap(args: &NodeArgs) -> Result<Vec<Sample>> {
    let rspec = json!({"cpu_guarantee": 10, "cpu_capped": true});
    // It boots under its cap too, which takes a while.
    let slivers = Slivers::start("cap", SPIN, &[rspec])?;
    let id = slivers.ids()[0];
    let part = |used: &Used| 100.0 * used.cpu.get(&id).unwrap_or(&0.0) / (used.seconds * used.cpus);
    let values = looks(args, window(args))?.iter().map(part).collect();
    Ok(vec![sample(
        "10 of 1000, capped".into(),
        CPU_CAPPED,
        "%",
        values,
        Some(1.0),
    )])
}

/// Three that flood, with base rates of 1 : 2 : 4, a third of what the node may send.
fn floods(args: &NodeArgs) -> Result<Vec<Sample>> {
    const WEIGHTS: [u32; 3] = [1, 2, 4];
    call(
        OWNER_SOCKET,
        "set_node_limit",
        &json!({"rspec": {"burst_rate": NODE_BPS}}),
    )?;
    let rspecs = WEIGHTS.map(|weight| json!({"base_rate": weight * BASE_BPS}));
    let slivers = Slivers::start("flood", FLOOD, &rspecs)?;
    let ids = slivers.ids();
    let looks = looks(args, Duration::from_secs(10))?;
    let weights = f64::from(WEIGHTS.iter().sum::<u32>());
    let guaranteed = weights * f64::from(BASE_BPS);
    let mut samples = Vec::new();
    for (id, weight) in ids.iter().zip(WEIGHTS) {
        let base = f64::from(weight * BASE_BPS);
        let sent = |used: &Used| used.bps.get(id).copied().unwrap_or(0.0);
        let excess = |used: &Used| {
            let all = used.bps.values().sum::<f64>() - guaranteed;
            100.0 * (sent(used) - base) / all
        };
        let subject = format!("base rate {:.1} Mbit/s", base / 1e6);
        samples.push(sample(
            subject.clone(),
            GUARANTEED_RATE,
            "Mbit/s",
            looks.iter().map(|used| sent(used) / 1e6).collect(),
            Some(base / 1e6),
        ));
        samples.push(sample(
            subject,
            EXCESS,
            "%",
            looks.iter().map(excess).collect(),
            Some(100.0 * f64::from(weight) / weights),
        ));
    }
    let all = |used: &Used| used.bps.values().sum::<f64>() / 1e6;
    samples.push(sample(
        "the node".into(),
        NODE_RATE,
        "Mbit/s",
        looks.iter().map(all).collect(),
        Some(f64::from(NODE_BPS) / 1e6),
    ));
    Ok(samples)
}
