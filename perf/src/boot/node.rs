//! The part of the boot benchmark that runs inside the lab node: starts the subjects in turn and prints one
//! JSON line for each start.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use mandoline_api::agent::{
    Bytes, Event, HelloReply, Interface, Join, JoinReply, Request, decode_reply, frame, read_frame,
    write_frame,
};
use mandoline_api::monitor::StateLine;
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
    SetUp(SetUpSample),
    Phases(PhasesSample),
    Kernel(KernelSample),
}

/// One start of one subject with a kernel that only writes the mark: what comes before any guest.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SetUpSample {
    pub subject: String,
    pub run: u32,
    /// Process start → the guest's first instruction, milliseconds.
    pub start_to_entry: f64,
}

/// What our monitor wrote down of one start: each phase and how long it took, in milliseconds.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PhasesSample {
    pub run: u32,
    pub phases: Vec<(String, f64)>,
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
    make_tap(TAP, "10.200.0.1/32", "10.200.0.2/32")?;
    let entry = tempfile::NamedTempFile::new()?;
    kernels::make_entry_kernel(entry.path())?;
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
                work: None,
                mem_mib: args.mem_mib,
                vhost: false,
                tap: TAP.into(),
                mac: MAC.into(),
                park: false,
                dir: dir.path().into(),
            };
            let cid = 100 + round * 4 + 2 * i as u32;
            let (sample, phases) = start(subject, &machine, &args.vmm, cid, round)
                .with_context(|| format!("{} run {round}", subject.name()))?;
            // A directory of its own: the sockets of the start above are still in that one.
            let bare_dir = tempfile::tempdir().context("making a directory")?;
            let bare = Machine {
                kernel: entry.path().into(),
                dir: bare_dir.path().into(),
                ..machine
            };
            let start_to_entry = start_to_entry(subject, &bare, &args.vmm, cid + 1)
                .with_context(|| format!("{} set-up {round}", subject.name()))?;
            if round > 0 {
                print(&Line::Start(sample))?;
                print(&Line::SetUp(SetUpSample {
                    subject: subject.name().into(),
                    run: round,
                    start_to_entry,
                }))?;
                if !phases.is_empty() {
                    print(&Line::Phases(PhasesSample { run: round, phases }))?;
                }
            }
        }
    }
    let initrd = tempfile::NamedTempFile::new()?;
    kernels::make_initrd(&args.root, initrd.path())?;
    // Debian's kernel finds its CPU's interrupt controllers by ACPI, ours by the MP table.
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

/// Start → first instruction of a guest that only writes the mark, with every device that a sliver has.
fn start_to_entry(subject: Subject, machine: &Machine, vmm: &Path, cid: u32) -> Result<f64> {
    let mut running = subject.start(machine, vmm, cid)?;
    let mark = running.wait_mark()?;
    Ok((mark - running.began).as_secs_f64() * 1e3)
}

/// The phases that a state file tells, each from the one before it.
fn phases(state: &Path) -> Result<Vec<(String, f64)>> {
    let Ok(text) = std::fs::read_to_string(state) else {
        return Ok(Vec::new());
    };
    let mut marks = Vec::new();
    for line in text.lines() {
        if let StateLine::Phase(mark) = serde_json::from_str(line).context("reading the state file")? {
            marks.push(mark);
        }
    }
    let pairs = marks.windows(2).map(|pair| {
        let name =
            serde_json::to_value(pair[1].phase).map(|name| name.as_str().unwrap_or_default().to_owned());
        let ns = pair[1].monotonic_ns.saturating_sub(pair[0].monotonic_ns);
        Ok((name?, ns as f64 / 1e6))
    });
    pairs.collect()
}

/// Starts a subject and joins its guest.
fn start(
    subject: Subject,
    machine: &Machine,
    vmm: &Path,
    cid: u32,
    run: u32,
) -> Result<(Sample, Vec<(String, f64)>)> {
    let mut running = subject.start(machine, vmm, cid)?;
    let began = running.began;
    let mark = running.wait_mark()?;
    let (hello, up, reply) = joined(&mut running, machine)?;
    let reachable = Instant::now();
    let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
    let sample = Sample {
        subject: subject.name().into(),
        run,
        start_to_mark: ms(began, mark),
        mark_to_up: ms(mark, up),
        up_to_reachable: ms(up, reachable),
        join_in_guest: reply.timings_us.total as f64 / 1e3,
        start_to_reachable: ms(began, reachable),
        guest_clock_at_mark: hello.mark_ns as f64 / 1e6,
    };
    Ok((sample, phases(&machine.dir.join("state"))?))
}

/// Waits until the agent is up and joins it; also says when it was up.
pub(crate) fn joined(running: &mut Running, machine: &Machine) -> Result<(HelloReply, Instant, JoinReply)> {
    let mut events = running.wait_up()?;
    let body = read_frame(&mut events)?.context("the agent closed its event stream")?;
    let Event::Up(hello) = frame::decode(&body)? else {
        bail!("the agent's first event is not `up`")
    };
    let up = Instant::now();
    Ok((hello, up, join(running, machine)?))
}

fn join(running: &Running, machine: &Machine) -> Result<JoinReply> {
    let mut entropy = vec![0; 64];
    std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut entropy)?;
    // The taps' names end in the number of their network.
    let net = machine.tap.trim_start_matches(|c: char| !c.is_ascii_digit());
    let request = Request::Join(Box::new(Join {
        entropy: Bytes(entropy),
        slice: "perf_boot".into(),
        hostname: "perf-boot".into(),
        time_unix_ns: Some(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64),
        interface: Some(Interface {
            mac: Some(machine.mac.clone()),
            addresses: vec![format!("10.200.{net}.2/32").parse()?],
            gateway: Some(format!("10.200.{net}.1").parse()?),
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

/// A tap whose guest has the address `guest`.
pub(crate) fn make_tap(tap: &str, host: &str, guest: &str) -> Result<()> {
    ip(&["tuntap", "add", "dev", tap, "mode", "tap", "vnet_hdr"])?;
    ip(&["link", "set", tap, "up"])?;
    ip(&["addr", "add", host, "dev", tap])?;
    ip(&["route", "add", guest, "dev", tap])
}

fn ip(args: &[&str]) -> Result<()> {
    kernels::run(Command::new("ip").args(args))
}

pub(crate) fn sparse_copy(from: &Path, to: &Path) -> Result<()> {
    kernels::run(Command::new("cp").arg("--sparse=always").arg(from).arg(to))
}
