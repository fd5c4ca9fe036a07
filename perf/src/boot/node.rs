//! The part of the boot benchmark that runs inside the lab node: starts the subjects in turn and prints one
//! JSON line for each start.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use mandoline_api::agent::{
    Bytes, Event, Interface, Join, JoinReply, Request, decode_reply, frame, read_frame, write_frame,
};
use serde::{Deserialize, Serialize};

use super::kernels;
use super::subject::{Machine, Running, Subject};

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
    #[arg(long, default_value_t = 128)]
    pub mem_mib: u32,
    #[arg(long, default_value_t = 15)]
    pub runs: u32,
    /// Debian's cloud kernel, to compare `--kernel` with.
    #[arg(long)]
    pub debian_kernel: PathBuf,
    #[arg(long, default_value_t = 3)]
    pub kernel_runs: u32,
}

/// A line of the in-node part's output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Line {
    Start(Sample),
    Kernel(KernelSample),
}

/// One start of a kernel under QEMU `microvm`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct KernelSample {
    pub kernel: String,
    pub run: u32,
    /// Process start → first user instruction, milliseconds.
    pub start_to_mark: f64,
}

/// One start of one subject; times in milliseconds on the node's monotonic clock.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub subject: String,
    pub run: u32,
    /// Process start → first user instruction (the agent's mark on the serial port).
    pub start_to_mark: f64,
    /// Mark → the agent says that it listens.
    pub mark_to_up: f64,
    /// Up → join answered: name, addresses, disk, keys, sshd listening.
    pub up_to_reachable: f64,
    /// What of `up_to_reachable` the guest's agent spent on the join, on the guest's clock.
    pub join_in_guest: f64,
    /// Process start → reachable.
    pub start_to_reachable: f64,
    /// Guest clock at the mark: what of `start_to_mark` the guest kernel saw.
    pub guest_clock_at_mark: f64,
}

/// The kernel that does nothing but write the mark: QEMU's own start.
pub(crate) const ENTRY: &str = "entry";

const TAP: &str = "perf0";
const MAC: &str = "02:00:0a:c8:00:02";

pub(crate) fn run(args: &NodeArgs) -> Result<()> {
    ip(&["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"])?;
    ip(&["link", "set", TAP, "up"])?;
    ip(&["addr", "add", "10.200.0.1/32", "dev", TAP])?;
    ip(&["route", "add", "10.200.0.2/32", "dev", TAP])?;
    // Round 0 warms the page cache for every subject alike and is not counted.
    for round in 0..=args.runs {
        for (i, subject) in Subject::ALL.into_iter().enumerate() {
            let dir = tempfile::tempdir().context("making a directory")?;
            let disk = dir.path().join("disk");
            sparse_copy(&args.disk_template, &disk)?;
            let machine = Machine {
                kernel: args.kernel.clone(),
                root: args.root.clone(),
                disk,
                mem_mib: args.mem_mib,
                tap: TAP.into(),
                mac: MAC.into(),
                dir: dir.path().into(),
            };
            let cid = 100 + round * 4 + i as u32;
            let sample = start(subject, &machine, &args.vmm, cid, round)
                .with_context(|| format!("{} run {round}", subject.name()))?;
            if round > 0 {
                print(&Line::Start(sample))?;
            }
        }
    }
    let initrd = tempfile::NamedTempFile::new()?;
    kernels::make_initrd(&args.root, initrd.path())?;
    // Debian's kernel finds its CPU's interrupt controllers by ACPI, ours by the MP table.
    let entry = tempfile::NamedTempFile::new()?;
    kernels::make_entry_kernel(entry.path())?;
    let kernels = [
        (ENTRY, entry.path(), false),
        ("up", args.kernel.as_path(), false),
        ("debian-cloud", args.debian_kernel.as_path(), true),
    ];
    for run in 1..=args.kernel_runs {
        for (name, kernel, acpi) in kernels {
            let dir = tempfile::tempdir()?;
            // Below 256 MiB the cloud kernel has no room for its initrd.
            let ms = kernels::start_to_mark(kernel, initrd.path(), acpi, args.mem_mib.max(256), dir.path())
                .with_context(|| format!("kernel {name} run {run}"))?;
            print(&Line::Kernel(KernelSample {
                kernel: name.into(),
                run,
                start_to_mark: ms,
            }))?;
        }
    }
    Ok(())
}

fn print(line: &Line) -> Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, line)?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

fn start(subject: Subject, machine: &Machine, vmm: &Path, cid: u32, run: u32) -> Result<Sample> {
    let mut running = subject.start(machine, vmm, cid)?;
    let began = running.began;
    let mark = running.wait_mark()?;
    let mut events = running.wait_up()?;
    let body = read_frame(&mut events)?.context("the agent closed its event stream")?;
    let Event::Up(hello) = frame::decode(&body)? else {
        bail!("the agent's first event is not `up`")
    };
    let up = Instant::now();
    let joined = join(&running)?;
    let reachable = Instant::now();
    let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
    Ok(Sample {
        subject: subject.name().into(),
        run,
        start_to_mark: ms(began, mark),
        mark_to_up: ms(mark, up),
        up_to_reachable: ms(up, reachable),
        join_in_guest: joined.timings_us.total as f64 / 1e3,
        start_to_reachable: ms(began, reachable),
        guest_clock_at_mark: hello.mark_ns as f64 / 1e6,
    })
}

fn join(running: &Running) -> Result<JoinReply> {
    let mut entropy = vec![0; 64];
    std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut entropy)?;
    let request = Request::Join(Box::new(Join {
        entropy: Bytes(entropy),
        slice: "perf_boot".into(),
        hostname: "perf-boot".into(),
        time_unix_ns: Some(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64),
        interface: Some(Interface {
            mac: Some(MAC.into()),
            addresses: vec!["10.200.0.2/32".parse()?],
            gateway: Some("10.200.0.1".parse()?),
            gateway6: None,
            mtu: None,
        }),
        dns: Vec::new(),
        disk: Some("/dev/vdb".into()),
        keys: Vec::new(),
        initscript: None,
    }));
    let mut stream = running.connect_agent()?;
    write_frame(&mut stream, &request)?;
    let body = read_frame(&mut stream)?.context("the agent closed the stream")?;
    Ok(decode_reply(&body)?)
}

fn ip(args: &[&str]) -> Result<()> {
    kernels::run(Command::new("ip").args(args))
}

fn sparse_copy(from: &Path, to: &Path) -> Result<()> {
    kernels::run(Command::new("cp").arg("--sparse=always").arg(from).arg(to))
}
