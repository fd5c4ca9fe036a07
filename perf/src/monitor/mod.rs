//! What a monitor costs: CPU time until its guest's first instruction, private memory, and what an idle
//! guest takes.
//!
//! The first is measured with a guest of five instructions on this machine's own `/dev/kvm`, which need not be
//! able to run Linux; the others with a whole sliver in a lab node, QEMU's `microvm` beside ours.

pub(crate) mod node;
mod payload;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use mandoline_lab::{Lab, NodeSpec};

use crate::boot::{describe, kvm_of};
use crate::report::{Kvm, Machine, Report, Row, Target};
use node::{Line, Sample};

#[derive(Debug, clap::Args)]
pub(crate) struct MonitorArgs {
    /// Starts of the payload for each size of memory.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub payload_runs: u32,
    /// Slivers of each subject that are looked at in the lab.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub runs: u32,
    /// Time for which an idle sliver is watched, in s.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub idle_s: u32,
    /// Leave the lab out: only what the host's own `/dev/kvm` can show.
    #[arg(long)]
    pub payload_only: bool,
}

pub(crate) fn run(args: &MonitorArgs, out: &Path) -> Result<()> {
    mandoline_lab::clean_up_on_signals();
    let mut rows = payload::rows(args.payload_runs)?;
    let mut targets = payload::targets(&rows);
    let machine = if args.payload_only {
        host()?
    } else {
        let (machine, samples) = in_lab(args)?;
        rows.extend(lab_rows(&samples));
        targets.extend(lab_targets(&rows));
        machine
    };
    let report = Report {
        name: "monitor".into(),
        when: jiff::Timestamp::now().to_string(),
        machine,
        rows,
        targets,
    };
    report.publish(out)
}

/// The machine as it describes itself, where no lab is needed.
fn host() -> Result<Machine> {
    let output = std::process::Command::new("sh")
        .args(["-c", crate::boot::DESCRIBE])
        .output()
        .context("asking the machine what it is")?;
    describe(&String::from_utf8_lossy(&output.stdout), Kvm::PayloadOnly)
}

fn in_lab(args: &MonitorArgs) -> Result<(Machine, Vec<Sample>)> {
    let mut lab = Lab::new().context("preparing the lab")?;
    eprintln!("monitor: starting a lab node ({})", lab.accel().words);
    let mut spec = NodeSpec::named("perf").with_mandoline()?;
    spec.extra_programs.push(std::env::current_exe()?);
    spec.peer = Some(mandoline_lab::images::peer()?);
    let kvm = kvm_of(&lab);
    let node = lab.start(spec)?;
    let machine = describe(&node.shell(crate::boot::DESCRIBE)?, kvm)?;
    node.shell(
        "modprobe vhost_vsock && /usr/lib/mandoline/make-disk /var/lib/mandoline/template 5000000000",
    )?;
    let (runs, idle) = (args.runs.to_string(), args.idle_s.to_string());
    let argv = [
        "/usr/lib/mandoline/bin/mandoline-perf",
        "in-node",
        "monitor",
        "--kernel",
        "/usr/share/mandoline/images/vmlinux-up",
        "--root",
        "/usr/share/mandoline/images/root.erofs",
        "--disk-template",
        "/var/lib/mandoline/template",
        "--vmm",
        "/usr/lib/mandoline/bin/mandoline-vmm",
        "--runs",
        &runs,
        "--idle-s",
        &idle,
    ];
    let mut child = node
        .command(&argv)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let stdout = child.stdout.take().context("the command has no stdout")?;
    let mut samples = Vec::new();
    for line in std::io::BufRead::lines(std::io::BufReader::new(stdout)) {
        let Line::Sample(sample) = serde_json::from_str(&line?).context("reading a sample")?;
        eprintln!(
            "monitor: {:>2}/{} {:<14} private {:>6.0} KiB, idle {:>6.2} ms/s",
            sample.run, args.runs, sample.subject, sample.private_kib, sample.idle_ms_per_s
        );
        samples.push(sample);
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("the benchmark failed inside the node ({status}); its reason is above");
    }
    Ok((machine, samples))
}

const PRIVATE: &str = "private memory without the guest's";
const TEXT: &str = "  of which program text";
const SHARED: &str = "memory shared with other monitors";
const IDLE: &str = "CPU of an idle sliver";
const PARKED: &str = "CPU of a parked sliver";

fn lab_rows(samples: &[Sample]) -> Vec<Row> {
    type Value = fn(&Sample) -> Option<f64>;
    let measures: [(&str, &str, Value); 6] = [
        (PRIVATE, "KiB", |s| Some(s.private_kib)),
        (TEXT, "KiB", |s| Some(s.private_text_kib)),
        (SHARED, "KiB", |s| Some(s.shared_kib)),
        (IDLE, "ms/s", |s| Some(s.idle_ms_per_s)),
        (PARKED, "ms/s", |s| s.parked_ms_per_s),
        ("guest memory left in RAM when parked", "KiB", |s| {
            s.parked_guest_kib
        }),
    ];
    let mut by_subject: BTreeMap<&str, Vec<&Sample>> = BTreeMap::new();
    for sample in samples {
        by_subject.entry(&sample.subject).or_default().push(sample);
    }
    let mut rows = Vec::new();
    for (subject, samples) in by_subject {
        for (measure, unit, value) in measures {
            let values: Vec<f64> = samples.iter().filter_map(|sample| value(sample)).collect();
            rows.extend(Row::of(subject, measure.trim_start(), unit, &values));
        }
    }
    rows
}

fn lab_targets(rows: &[Row]) -> Vec<Target> {
    let row = |subject: &str, measure: &str| {
        rows.iter()
            .find(|row| row.subject == subject && row.measure == measure)
    };
    let mut targets = Vec::new();
    if let Some(ours) = row("mandoline-vmm", PRIVATE) {
        let peer =
            row("qemu-microvm", PRIVATE).map_or(String::new(), |row| format!("; QEMU {:.0} KiB", row.p50));
        targets.push(Target {
            measure: "private memory of the monitor with blk, net and vsock".into(),
            want: "≤ 2048 KiB, aim 1536".into(),
            got: format!("{:.0} KiB{peer}", ours.p50),
            met: ours.p50 <= 2048.0,
            note: format!(
                "n={}, median; smaps, guest memory left out, a second monitor running",
                ours.n
            ),
        });
    }
    if let (Some(parked), Some(idle)) = (row("mandoline-vmm", PARKED), row("mandoline-vmm", IDLE)) {
        targets.push(Target {
            measure: "CPU of a parked sliver".into(),
            want: "~0 (≤ 0.5 ms/s)".into(),
            got: format!("{:.2} ms/s (idle {:.2} ms/s)", parked.p50, idle.p50),
            met: parked.p50 <= 0.5,
            note: format!("n={}, median", parked.n),
        });
    }
    targets
}
