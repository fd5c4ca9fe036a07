//! Start → first guest instruction in CPU time, with a guest that only says that it runs.
//!
//! The process's CPU clock is read when the byte arrives: it counts every thread, user and kernel. How the sum
//! parts into the two is known to the kernel only by its tick, so that part is an average over all runs.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use mandoline_api::agent::SERIAL_MARK;

use crate::boot::kernels::make_entry_kernel;
use crate::report::{Row, Target};

const SUBJECT: &str = "mandoline-vmm (payload)";
/// Sizes of guest memory, MiB.
const SIZES: [u32; 3] = [128, 1024, 4096];

fn cpu(mib: u32) -> String {
    format!("CPU to first guest instruction, {mib} MiB")
}

fn user(mib: u32) -> String {
    format!("user part of it (average), {mib} MiB")
}

/// Starts the payload `runs` times for each size, taking turns.
pub(super) fn rows(runs: u32) -> Result<Vec<Row>> {
    if std::fs::File::open("/dev/kvm").is_err() {
        eprintln!("monitor: no /dev/kvm on this machine: the payload is left out");
        return Ok(Vec::new());
    }
    let dir = tempfile::tempdir()?;
    let kernel = dir.path().join("entry");
    make_entry_kernel(&kernel)?;
    let vmm = beside_us()?;
    let mut samples = [const { Vec::new() }; SIZES.len()];
    for round in 0..=runs {
        for (size, samples) in SIZES.iter().zip(&mut samples) {
            let sample = start(&vmm, &kernel, *size, dir.path())
                .with_context(|| format!("{} with {size} MiB", vmm.display()))?;
            // Round 0 warms the caches.
            if round > 0 {
                samples.push(sample);
            }
        }
    }
    let mut rows = Vec::new();
    for (size, samples) in SIZES.into_iter().zip(&samples) {
        let total: Vec<f64> = samples.iter().map(|sample| sample.total).collect();
        rows.extend(Row::of(SUBJECT, &cpu(size), "ms", &total));
        let (user_ticks, system_ticks) = samples.iter().fold((0, 0), |(user, system), sample| {
            (user + sample.ticks.0, system + sample.ticks.1)
        });
        let mean = total.iter().sum::<f64>() / total.len() as f64;
        let user_ms = mean * user_ticks as f64 / (user_ticks + system_ticks).max(1) as f64;
        rows.extend(Row::of(SUBJECT, &user(size), "ms", &[user_ms]));
    }
    Ok(rows)
}

pub(super) fn targets(rows: &[Row]) -> Vec<Target> {
    let p50 = |measure: &str| {
        rows.iter()
            .find(|row| row.measure == measure)
            .map(|row| (row.p50, row.n))
    };
    let mut targets = Vec::new();
    if let (Some((small, n)), Some((large, _))) = (p50(&cpu(SIZES[0])), p50(&cpu(SIZES[2]))) {
        let gib = f64::from(SIZES[2] - SIZES[0]) / 1024.0;
        targets.push(Target {
            measure: "CPU from start to the first guest instruction, 128 MiB".into(),
            want: "≤ 3 ms".into(),
            got: format!("{small:.2} ms"),
            met: small <= 3.0,
            note: format!("n={n}, median, this machine's /dev/kvm"),
        });
        let parts = (p50(&user(SIZES[0])), p50(&user(SIZES[2])));
        if let (Some((user_small, _)), Some((user_large, _))) = parts {
            targets.push(Target {
                measure: "its user part does not depend on memory".into(),
                want: "128 MiB and 4 GiB within 0.5 ms".into(),
                got: format!("{user_small:.2} and {user_large:.2} ms"),
                met: (user_small - user_large).abs() <= 0.5,
                note: format!(
                    "all of it grows by {:.3} ms per GiB, which is the kernel's",
                    (large - small) / gib
                ),
            });
        }
    }
    targets
}

struct Sample {
    /// ms.
    total: f64,
    /// User and kernel, in ticks: mostly none or one, but right in the sum over many starts.
    ticks: (u64, u64),
}

fn start(vmm: &Path, kernel: &Path, mib: u32, dir: &Path) -> Result<Sample> {
    let config = serde_json::json!({
        "boot-source": {"kernel_image_path": kernel, "boot_args": ""},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": mib},
    });
    let path = dir.join("config.json");
    std::fs::write(&path, serde_json::to_vec(&config)?)?;
    let (mut serial, serial_out) = std::io::pipe()?;
    let mut child = Command::new(vmm)
        .args([
            "--no-api",
            "--serial",
            "fd:serial",
            "--fd",
            "serial=1",
            "--config-file",
        ])
        .arg(&path)
        .stdin(Stdio::null())
        .stdout(OwnedFd::from(serial_out))
        .spawn()?;
    let mut byte = [0];
    let seen = serial.read_exact(&mut byte);
    let used = crate::proc::cpu_ns(child.id());
    let ticks = crate::proc::user_and_system_ticks(child.id());
    child.kill()?;
    child.wait()?;
    seen.context("it ended without a word")?;
    if byte != [SERIAL_MARK] {
        bail!("its guest said {byte:?}");
    }
    Ok(Sample {
        total: used? as f64 / 1e6,
        ticks: ticks?,
    })
}

/// The monitor that was built together with this program.
fn beside_us() -> Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name("mandoline-vmm");
    if !path.exists() {
        bail!(
            "{} is not there: build the workspace in the same profile",
            path.display()
        );
    }
    Ok(path)
}
