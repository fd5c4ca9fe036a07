//! The boot benchmark: our monitor and QEMU's `microvm` machine start the same sliver (same kernel, root,
//! disk, tap and memory) in the same lab node, taking turns.

pub(crate) mod kernels;
pub(crate) mod node;
pub(crate) mod subject;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use mandoline_lab::{Lab, NodeSpec};

use crate::plot::{self, Bar};
use crate::report::{Kvm, Machine, Report, Row, Target};
use node::{KernelSample, Line, PhasesSample, Sample, SetUpSample};
use subject::Subject;

#[derive(Debug, clap::Args)]
pub(crate) struct BootArgs {
    /// Starts of each subject.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=200))]
    pub runs: u32,
    /// Memory of the sliver, MiB.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(32..=2048))]
    pub mem_mib: u32,
    /// Starts of each kernel in the comparison with Debian's cloud kernel, which takes its time.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=50))]
    pub kernel_runs: u32,
}

/// A sample's value for one measure.
type Measure = (&'static str, fn(&Sample) -> f64);

/// The measures, in the order in which they happen.
const MEASURES: [Measure; 6] = [
    ("start to first user instruction", |s| s.start_to_mark),
    ("  of which on the guest's clock", |s| s.guest_clock_at_mark),
    ("first user instruction to up", |s| s.mark_to_up),
    ("up to reachable", |s| s.up_to_reachable),
    ("  of which the join in the guest", |s| s.join_in_guest),
    ("start to reachable", |s| s.start_to_reachable),
];

pub(crate) fn run(args: &BootArgs, out: &Path) -> Result<()> {
    mandoline_lab::clean_up_on_signals();
    let mut lab = Lab::new().context("preparing the lab")?;
    eprintln!("boot: starting a lab node ({})", lab.accel().words);
    let mut spec = NodeSpec::named("perf").with_mandoline()?;
    spec.extra_programs.push(std::env::current_exe()?);
    spec.peer = Some(mandoline_lab::images::peer()?);
    let kvm = kvm_of(&lab);
    let node = lab.start(spec)?;
    eprintln!("boot: node up after {} ms", node.info().boot_ms);

    let machine = describe(&node.shell(DESCRIBE)?, kvm)?;
    node.shell(
        "modprobe vhost_vsock && /usr/lib/mandoline/make-disk /var/lib/mandoline/template 5000000000",
    )?;
    node.copy_in(
        &mandoline_lab::Images::find()?.node.join("vmlinux"),
        "/var/lib/mandoline/vmlinux-debian",
    )?;
    let (runs, kernel_runs) = (args.runs.to_string(), args.kernel_runs.to_string());
    let mem = args.mem_mib.to_string();
    let argv = [
        "/usr/lib/mandoline/bin/mandoline-perf",
        "in-node",
        "boot",
        "--kernel",
        "/usr/share/mandoline/images/vmlinux-up",
        "--root",
        "/usr/share/mandoline/images/root.erofs",
        "--disk-template",
        "/var/lib/mandoline/template",
        "--vmm",
        "/usr/lib/mandoline/bin/mandoline-vmm",
        "--debian-kernel",
        "/var/lib/mandoline/vmlinux-debian",
        "--mem-mib",
        &mem,
        "--runs",
        &runs,
        "--kernel-runs",
        &kernel_runs,
    ];
    let mut child = node
        .command(&argv)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let stdout = child.stdout.take().context("the command has no stdout")?;
    let mut samples = Samples::default();
    for line in std::io::BufRead::lines(std::io::BufReader::new(stdout)) {
        match serde_json::from_str(&line?).context("reading a sample")? {
            Line::Start(s) => {
                eprintln!(
                    "boot: {:>2}/{} {:<14} mark {:>6.0} ms, reachable {:>6.0} ms",
                    s.run, args.runs, s.subject, s.start_to_mark, s.start_to_reachable
                );
                samples.starts.push(s);
            }
            Line::SetUp(s) => samples.set_ups.push(s),
            Line::Phases(p) => samples.phases.push(p),
            Line::Kernel(k) => {
                eprintln!(
                    "boot: {:>2}/{} kernel {:<12} mark {:>6.0} ms",
                    k.run, args.kernel_runs, k.kernel, k.start_to_mark
                );
                samples.kernels.push(k);
            }
        }
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("the benchmark failed inside the node ({status}); its reason is above");
    }

    let report = report(machine, args, &samples, node.info().boot_ms);
    println!("{}", report.tables());
    let json = report.write(out)?;
    let svg = out.join("boot.svg");
    plot::stacked(&svg, "Sliver start, by phase", &bars(&report))?;
    println!("written: {} and {}", json.display(), svg.display());
    Ok(())
}

/// What stands behind `/dev/kvm` in a lab's nodes.
pub(crate) fn kvm_of(lab: &Lab) -> Kvm {
    if lab.accel().accel.kvm_kind() == "hardware" {
        Kvm::Hardware
    } else {
        Kvm::NestedTcg
    }
}

/// A shell's words for a machine, which [`describe`] reads.
pub(crate) const DESCRIBE: &str = "sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n1; nproc; \
     sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; uname -r";

/// The machine that said this.
pub(crate) fn describe(said: &str, kvm: Kvm) -> Result<Machine> {
    let lines: Vec<&str> = said.lines().collect();
    let [cpu, cores, memory, kernel] = lines[..] else {
        bail!("the machine described itself as {said:?}")
    };
    Ok(Machine {
        cpu: cpu.into(),
        cores: cores.parse()?,
        memory: memory.parse::<u64>()? << 10,
        kernel: kernel.into(),
        kvm,
    })
}

/// What the node measured.
#[derive(Default)]
struct Samples {
    starts: Vec<Sample>,
    set_ups: Vec<SetUpSample>,
    phases: Vec<PhasesSample>,
    kernels: Vec<KernelSample>,
}

/// Measure: process start to the first instruction of a guest that does nothing else.
const SET_UP: &str = "set-up: start to guest entry";

fn report(machine: Machine, args: &BootArgs, samples: &Samples, node_boot_ms: u64) -> Report {
    let mut by_subject: BTreeMap<&str, Vec<&Sample>> = BTreeMap::new();
    for sample in &samples.starts {
        by_subject.entry(&sample.subject).or_default().push(sample);
    }
    let mut rows: Vec<Row> = Vec::new();
    for (subject, samples) in &by_subject {
        for (measure, value) in MEASURES {
            let values: Vec<f64> = samples.iter().map(|s| value(s)).collect();
            rows.extend(Row::of(subject, measure.trim_start(), "ms", &values));
        }
    }
    for subject in Subject::ALL {
        let values: Vec<f64> = samples
            .set_ups
            .iter()
            .filter(|s| s.subject == subject.name())
            .map(|s| s.start_to_entry)
            .collect();
        rows.extend(Row::of(subject.name(), SET_UP, "ms", &values));
    }
    rows.extend(phase_rows(&samples.phases));
    let kernel_name = |kernel: &str| format!("kernel {kernel} under qemu-microvm");
    for kernel in [node::ENTRY, "up", "debian-cloud"] {
        let values: Vec<f64> = samples
            .kernels
            .iter()
            .filter(|k| k.kernel == kernel)
            .map(|k| k.start_to_mark)
            .collect();
        rows.extend(Row::of(
            &kernel_name(kernel),
            "start to first user instruction",
            "ms",
            &values,
        ));
    }
    rows.extend(Row::of(
        "lab node",
        "QEMU start to ssh login",
        "ms",
        &[node_boot_ms as f64],
    ));
    let mut report = Report {
        name: "boot".into(),
        when: jiff::Timestamp::now().to_string(),
        machine,
        rows,
        targets: Vec::new(),
    };
    let p50 = |subject: Subject, measure: &str| report.row(subject.name(), measure).map(|r| r.p50);
    let mut targets = Vec::new();
    for (measure, want) in [
        ("start to first user instruction", 0.45),
        (SET_UP, 1.0 / 3.0),
        ("start to reachable", 1.0),
    ] {
        if let (Some(ours), Some(peer)) = (
            p50(Subject::Mandoline, measure),
            p50(Subject::QemuMicrovm, measure),
        ) {
            targets.push(Target {
                measure: format!("{measure}, against QEMU microvm"),
                want: format!("ratio of medians ≤ {want:.2}"),
                got: format!("{:.2} ({ours:.0} ms / {peer:.0} ms)", ours / peer),
                met: ours <= peer * want,
                note: format!("n={} each, taking turns, {} MiB", args.runs, args.mem_mib),
            });
        }
    }
    let kernel_p50 = |kernel: &str| {
        report
            .row(&kernel_name(kernel), "start to first user instruction")
            .map(|r| r.p50)
    };
    if let (Some(entry), Some(up), Some(debian)) = (
        kernel_p50(node::ENTRY),
        kernel_p50("up"),
        kernel_p50("debian-cloud"),
    ) {
        let (up, debian) = (up - entry, debian - entry);
        targets.push(Target {
            measure: "kernel up against Debian's cloud kernel, kernel entry to /init".into(),
            want: "≤ 1/8".into(),
            got: format!("1/{:.1} ({up:.0} ms / {debian:.0} ms)", debian / up),
            met: up * 8.0 <= debian,
            note: format!(
                "n={} each, under QEMU microvm, whose own start (kernel entry) is taken off both",
                args.kernel_runs
            ),
        });
    }
    targets.push(Target {
        measure: "lab node up".into(),
        want: "≤ 10000 ms".into(),
        got: format!("{node_boot_ms} ms"),
        met: node_boot_ms <= 10_000,
        note: "QEMU start to ssh login, n=1, without the services".into(),
    });
    report.targets = targets;
    report
}

/// Each phase of our monitor's starts, in the order in which they come.
fn phase_rows(samples: &[PhasesSample]) -> Vec<Row> {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in samples.iter().flat_map(|sample| &sample.phases) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let row = |name: &&str| {
        let values: Vec<f64> = samples
            .iter()
            .flat_map(|sample| &sample.phases)
            .filter(|(other, _)| other == *name)
            .map(|(_, ms)| *ms)
            .collect();
        Row::of(
            Subject::Mandoline.name(),
            &format!("phase: to {name}"),
            "ms",
            &values,
        )
    };
    names.iter().filter_map(row).collect()
}

fn bars(report: &Report) -> Vec<Bar> {
    Subject::ALL
        .iter()
        .map(|subject| Bar {
            label: subject.name().into(),
            phases: [
                "start to first user instruction",
                "first user instruction to up",
                "up to reachable",
            ]
            .iter()
            .filter_map(|m| report.row(subject.name(), m).map(|r| ((*m).to_owned(), r.p50)))
            .collect(),
        })
        .collect()
}
