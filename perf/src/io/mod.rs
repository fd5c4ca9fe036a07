//! The devices at work: random reads through blk, TCP and small UDP packets through net, with and without the
//! host kernel's help (vhost), our monitor beside QEMU's `microvm` machine in the same lab node.

pub(crate) mod guest;
pub(crate) mod node;

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use mandoline_lab::{Lab, NodeSpec};

use crate::boot::{DESCRIBE, describe, kvm_of};
use crate::report::{Report, Row, Target};
use node::{Line, SUBJECTS, Sample};

#[derive(Debug, clap::Args)]
pub(crate) struct IoArgs {
    /// Slivers of each subject.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub runs: u32,
    /// Time for each load, in ms.
    #[arg(long, default_value_t = 700, value_parser = clap::value_parser!(u32).range(100..=60_000))]
    pub load_ms: u32,
}

/// A measure, its unit, and a sample's value for it.
type Measure = (&'static str, &'static str, fn(&Sample) -> f64);

const MEASURES: [Measure; 5] = [
    ("blk 4 KiB random read, one at a time", "IOPS", |s| s.blk_iops_1),
    ("blk 4 KiB random read, eight at a time", "IOPS", |s| s.blk_iops_8),
    ("TCP guest to host", "Mbit/s", |s| s.tcp_out_mbit),
    ("TCP host to guest", "Mbit/s", |s| s.tcp_in_mbit),
    ("UDP 64 bytes guest to host, received", "packets/s", |s| {
        s.udp_out_pps
    }),
];

pub(crate) fn run(args: &IoArgs, out: &Path) -> Result<()> {
    mandoline_lab::clean_up_on_signals();
    let mut lab = Lab::new().context("preparing the lab")?;
    eprintln!("io: starting a lab node ({})", lab.accel().words);
    let mut spec = NodeSpec::named("perf").with_mandoline()?;
    spec.extra_programs.push(std::env::current_exe()?);
    spec.peer = Some(mandoline_lab::images::peer()?);
    let kvm = kvm_of(&lab);
    let node = lab.start(spec)?;
    let machine = describe(&node.shell(DESCRIBE)?, kvm)?;
    node.shell(
        "modprobe vhost_vsock && modprobe vhost_net && \
         /usr/lib/mandoline/make-disk /var/lib/mandoline/template 5000000000",
    )?;
    let (runs, load) = (args.runs.to_string(), args.load_ms.to_string());
    let argv = [
        "/usr/lib/mandoline/bin/mandoline-perf",
        "in-node",
        "io",
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
        "--load-ms",
        &load,
    ];
    let mut child = node
        .command(&argv)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let stdout = child.stdout.take().context("the command has no stdout")?;
    let mut samples = Vec::new();
    for line in std::io::BufRead::lines(std::io::BufReader::new(stdout)) {
        let Line::Sample(s) = serde_json::from_str(&line?).context("reading a sample")?;
        eprintln!(
            "io: {:>2}/{} {:<21} blk {:>6.0} and {:>6.0} IOPS, TCP {:>5.0} out {:>5.0} in Mbit/s, UDP {:>6.0} pps",
            s.run,
            args.runs,
            s.subject,
            s.blk_iops_1,
            s.blk_iops_8,
            s.tcp_out_mbit,
            s.tcp_in_mbit,
            s.udp_out_pps
        );
        samples.push(s);
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("the benchmark failed inside the node ({status}); its reason is above");
    }
    let mut rows = Vec::new();
    for (subject, ..) in SUBJECTS {
        for (measure, unit, value) in MEASURES {
            let of_subject = samples.iter().filter(|s| s.subject == subject);
            let values: Vec<f64> = of_subject.map(value).collect();
            rows.extend(Row::of(subject, measure, unit, &values));
        }
    }
    let targets = targets(&rows, args);
    let report = Report {
        name: "io".into(),
        when: jiff::Timestamp::now().to_string(),
        machine,
        rows,
        targets,
    };
    report.publish(out)
}

/// Each measure of ours against QEMU's, like with like: both with vhost or both without.
fn targets(rows: &[Row], args: &IoArgs) -> Vec<Target> {
    let p50 = |subject: &str, measure: &str| {
        rows.iter()
            .find(|row| row.subject == subject && row.measure == measure)
            .map(|row| row.p50)
    };
    let mut targets = Vec::new();
    for (ours, peer) in [
        ("mandoline-vmm", "qemu-microvm"),
        ("mandoline-vmm vhost", "qemu-microvm vhost"),
    ] {
        for (measure, unit, _) in MEASURES {
            // A disk does not care who moves frames.
            if ours.ends_with("vhost") && measure.starts_with("blk") {
                continue;
            }
            if let (Some(a), Some(b)) = (p50(ours, measure), p50(peer, measure)) {
                targets.push(Target {
                    measure: format!("{measure}: {ours} against {peer}"),
                    want: "≥ 1.00".into(),
                    got: format!("{:.2} ({a:.0} / {b:.0} {unit})", a / b),
                    met: a >= b,
                    note: format!(
                        "n={} each, medians, taking turns, {} ms a load",
                        args.runs, args.load_ms
                    ),
                });
            }
        }
    }
    targets
}
