//! The sliver kernel `up` beside Debian's cloud kernel, both under QEMU `microvm` with the same initrd, whose
//! `/init` is the guest agent: process start → its first byte on the serial port.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use cpio::newc;

use super::subject::{Mark, qemu_base};

/// `quiet` on both sides: a printed line costs about 15 ms in the lab.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=1 reboot=k panic=1 rdinit=/init";

/// Makes the initrd: the agent of the root image as `/init`, and the directories that it mounts on.
pub(super) fn make_initrd(root_image: &Path, out: &Path) -> Result<()> {
    let mounted = tempfile::tempdir()?;
    run(Command::new("mount")
        .args(["-t", "erofs", "-o", "loop,ro"])
        .arg(root_image)
        .arg(mounted.path()))?;
    let agent = std::fs::read(mounted.path().join("sbin/mandoline-agent"));
    run(Command::new("umount").arg(mounted.path()))?;
    let agent = agent.context("reading the agent from the root image")?;

    let mut archive = std::fs::File::create(out).with_context(|| format!("making {}", out.display()))?;
    for dir in ["dev", "proc", "sys", "run", "tmp"] {
        newc::Builder::new(dir)
            .mode(0o040_755)
            .nlink(2)
            .write(&mut archive, 0)
            .finish()?;
    }
    let mut init = newc::Builder::new("init")
        .mode(0o100_755)
        .nlink(1)
        .write(&mut archive, agent.len().try_into()?);
    init.write_all(&agent)?;
    init.finish()?;
    newc::trailer(&mut archive)?;
    Ok(())
}

/// Runs a program to its end; anything but success is an error.
pub(super) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("running {command:?}"))?;
    if !status.success() {
        bail!("{command:?} failed ({status})");
    }
    Ok(())
}

/// Milliseconds from process start to the first user instruction.
pub(super) fn start_to_mark(
    kernel: &Path,
    initrd: &Path,
    acpi: bool,
    mem_mib: u32,
    dir: &Path,
) -> Result<f64> {
    let (serial, serial_out) = std::io::pipe()?;
    let log = dir.join("log");
    let mut command = qemu_base(acpi, mem_mib);
    command
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", CMDLINE]);
    command
        .stdin(Stdio::null())
        .stdout(serial_out)
        .stderr(std::fs::File::create(&log)?);
    let began = std::time::Instant::now();
    let mut child = command.spawn().context("starting qemu-system-x86_64")?;
    drop(command); // holds the pipe's writing end
    let mark = Mark::new(serial.into(), log).wait();
    let _ = child.kill();
    let _ = child.wait();
    Ok((mark? - began).as_secs_f64() * 1e3)
}
