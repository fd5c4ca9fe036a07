//! The part of the monitor benchmark that runs inside the lab node: slivers of both subjects, looked at while
//! they are idle.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::boot::node::{joined, make_tap, sparse_copy};
use crate::boot::subject::{Machine, Running, Subject};
use crate::proc;

/// What to measure, and with what.
#[derive(Debug, clap::Args)]
pub(crate) struct NodeArgs {
    #[arg(long)]
    pub kernel: PathBuf,
    #[arg(long)]
    pub root: PathBuf,
    /// Sparse ext4 that each start gets a copy of.
    #[arg(long)]
    pub disk_template: PathBuf,
    #[arg(long)]
    pub vmm: PathBuf,
    #[arg(long)]
    pub runs: u32,
    #[arg(long)]
    pub idle_s: u32,
}

/// A line of the in-node part's output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Line {
    Sample(Sample),
}

/// One idle sliver of one subject.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub subject: String,
    pub run: u32,
    /// Memory that the monitor alone has, guest memory left out.
    pub private_kib: f64,
    /// What of it is program text and read-only data of files.
    pub private_text_kib: f64,
    /// Memory that it shares with others (its program, libraries).
    pub shared_kib: f64,
    pub idle_ms_per_s: f64,
    /// Ours only.
    pub parked_ms_per_s: Option<f64>,
    pub parked_guest_kib: Option<f64>,
}

/// Memory of each sliver, MiB; a size that no other mapping has.
const MEM_MIB: u32 = 128;
/// What a guest does after its join is over by then.
const SETTLE: Duration = Duration::from_secs(2);

pub(crate) fn run(args: &NodeArgs) -> Result<()> {
    make_tap("perf0", "10.200.0.1/32", "10.200.0.2/32")?;
    make_tap("perf1", "10.200.1.1/32", "10.200.1.2/32")?;
    for run in 1..=args.runs {
        for (i, subject) in Subject::ALL.into_iter().enumerate() {
            let sample = look(args, subject, run, 3 + run * 8 + 2 * i as u32)
                .with_context(|| format!("{} run {run}", subject.name()))?;
            let mut out = std::io::stdout().lock();
            serde_json::to_writer(&mut out, &Line::Sample(sample))?;
            out.write_all(b"\n")?;
            out.flush()?;
        }
    }
    Ok(())
}

fn look(args: &NodeArgs, subject: Subject, run: u32, cid: u32) -> Result<Sample> {
    // A second one beside it: what two share is not private.
    let (first, second) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let watched = start(args, subject, first.path(), "perf0", cid)?;
    let _other = start(args, subject, second.path(), "perf1", cid + 1)?;
    std::thread::sleep(SETTLE);
    let pid = watched.pid();
    let mut sample = Sample {
        subject: subject.name().into(),
        run,
        private_kib: 0.0,
        private_text_kib: 0.0,
        shared_kib: 0.0,
        idle_ms_per_s: idle(pid, args.idle_s)?,
        parked_ms_per_s: None,
        parked_guest_kib: None,
    };
    for mapping in proc::mappings(pid)? {
        if is_guest(&mapping) {
            continue;
        }
        sample.private_kib += mapping.private as f64;
        sample.shared_kib += mapping.shared as f64;
        if mapping.path.starts_with('/') && mapping.text {
            sample.private_text_kib += mapping.private as f64;
        }
    }
    if subject == Subject::Mandoline {
        park(&first.path().join("api.sock"))?;
        std::thread::sleep(SETTLE);
        sample.parked_ms_per_s = Some(idle(pid, args.idle_s)?);
        let guest = proc::mappings(pid)?;
        let left = guest.iter().filter(|mapping| is_guest(mapping));
        sample.parked_guest_kib = Some(left.map(|mapping| mapping.private as f64).sum());
    }
    Ok(sample)
}

fn start(args: &NodeArgs, subject: Subject, dir: &Path, tap: &str, cid: u32) -> Result<Running> {
    let disk = dir.join("disk");
    sparse_copy(&args.disk_template, &disk)?;
    let machine = Machine {
        kernel: args.kernel.clone(),
        root: args.root.clone(),
        disk,
        work: None,
        mem_mib: MEM_MIB,
        vhost: false,
        tap: tap.into(),
        mac: format!("02:00:0a:c8:0{}:02", &tap[4..]),
        park: true,
        dir: dir.into(),
    };
    let mut running = subject.start(&machine, &args.vmm, cid)?;
    running.wait_mark()?;
    joined(&mut running, &machine)?;
    Ok(running)
}

/// Guest memory: ours is mapped without reserve, QEMU's is one mapping of its size.
fn is_guest(mapping: &proc::Mapping) -> bool {
    mapping.no_reserve || mapping.size == u64::from(MEM_MIB) << 10
}

fn idle(pid: u32, seconds: u32) -> Result<f64> {
    let (before, began) = (proc::cpu_ns(pid)?, Instant::now());
    std::thread::sleep(Duration::from_secs(seconds.into()));
    let used = proc::cpu_ns(pid)?.saturating_sub(before);
    Ok(used as f64 / 1e6 / began.elapsed().as_secs_f64())
}

/// Parks our monitor's guest; it may be busy for a moment.
fn park(socket: &Path) -> Result<()> {
    let body = r#"{"state":"Parked"}"#;
    let mut last = String::new();
    for _ in 0..50 {
        let mut stream = UnixStream::connect(socket).with_context(|| format!("{}", socket.display()))?;
        write!(
            stream,
            "PATCH /vm HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        last.clear();
        stream.read_to_string(&mut last)?;
        if last.starts_with("HTTP/1.1 204") {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    bail!("the guest could not be parked: {last}")
}
