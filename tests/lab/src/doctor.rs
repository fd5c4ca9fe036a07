//! What this machine has for a lab, and what it lacks, with what to do about it.

use crate::{Result, accel, disks, workdir};
use serde::Serialize;
use std::path::PathBuf;
use std::process::Command;

/// A program that the lab needs.
#[derive(Debug, Clone, Serialize)]
pub struct Program {
    /// Its name.
    pub name: &'static str,
    /// Where it is.
    pub path: Option<PathBuf>,
    /// The Debian package that brings it.
    pub package: &'static str,
}

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Acceleration, and why.
    pub kvm: accel::KvmProbe,
    /// Programs.
    pub programs: Vec<Program>,
    /// QEMU's version line.
    pub qemu_version: Option<String>,
    /// Where labs live.
    pub lab_dir: PathBuf,
    /// Free there, in MiB.
    pub lab_dir_free_mib: u64,
    /// Memory that is available, in MiB.
    pub memory_available_mib: u64,
    /// CPUs.
    pub cpus: usize,
    /// What is in the way, each with its remedy. None: labs run here.
    pub problems: Vec<String>,
}

/// Looks around; changes nothing.
pub fn examine() -> Result<Report> {
    const NEEDED: [(&str, &str); 5] = [
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("ssh", "openssh-client"),
        ("ssh-keygen", "openssh-client"),
        ("mkfs.erofs", "erofs-utils"),
        ("mke2fs", "e2fsprogs"),
    ];
    let programs: Vec<_> = NEEDED
        .iter()
        .map(|&(name, package)| Program {
            name,
            path: disks::program(name),
            package,
        })
        .collect();
    let mut problems: Vec<_> = programs
        .iter()
        .filter(|p| p.path.is_none())
        .map(|p| {
            format!(
                "{} is missing; as root: apt-get install -y --no-install-recommends {}",
                p.name, p.package
            )
        })
        .collect();
    let qemu_version = Command::new(crate::qemu::program())
        .arg("--version")
        .output()
        .ok()
        .and_then(|o| {
            String::from_utf8_lossy(&o.stdout)
                .lines()
                .next()
                .map(str::to_owned)
        });
    if let Some(version) = &qemu_version
        && version_of(version).is_some_and(|v| v < (7, 2))
    {
        problems.push(format!(
            "{version:?} is too old: the joint network needs QEMU 7.2 (Debian 12) or newer"
        ));
    }
    let lab_dir = workdir::base()?;
    let lab_dir_free_mib = disks::free_bytes(&lab_dir)? >> 20;
    if lab_dir_free_mib < 1024 {
        problems.push(format!(
            "{} has {lab_dir_free_mib} MiB free and a node needs 1024; set MANDOLINE_LAB_DIR to a roomier place",
            lab_dir.display()
        ));
    }
    let memory_available_mib =
        available_memory(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default());
    if memory_available_mib < 3072 {
        problems.push(format!(
            "{memory_available_mib} MiB of memory are available; a node with slivers takes 3072"
        ));
    }
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(Report {
        kvm: accel::probe()?,
        programs,
        qemu_version,
        lab_dir,
        lab_dir_free_mib,
        memory_available_mib,
        cpus,
        problems,
    })
}

fn version_of(line: &str) -> Option<(u32, u32)> {
    let mut numbers = line.split("version ").nth(1)?.split(['.', ' ', '(']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn available_memory(meminfo: &str) -> u64 {
    meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))
        .and_then(|v| v.trim().trim_end_matches("kB").trim().parse::<u64>().ok())
        .map_or(0, |kib| kib >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_memory_are_read() {
        assert_eq!(
            version_of("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)"),
            Some((7, 2))
        );
        assert_eq!(version_of("QEMU"), None);
        assert_eq!(available_memory("MemTotal: 5 kB\nMemAvailable:   20480 kB\n"), 20);
    }
}
