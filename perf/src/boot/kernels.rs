//! The sliver kernel `up` beside Debian's cloud kernel, both under QEMU `microvm` with the same initrd, whose
//! `/init` is the guest agent: process start → its first byte on the serial port. A third "kernel" that writes
//! that byte as its first instruction tells what of this is QEMU's own start, before any kernel is entered.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use cpio::newc;
use mandoline_api::agent::SERIAL_MARK;

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

/// A PVH kernel (Xen's `x86/HVM direct boot ABI`) that writes [`SERIAL_MARK`] to COM1 and halts.
pub(crate) fn make_entry_kernel(out: &Path) -> Result<()> {
    const LOAD_AT: u32 = 0x10_0000;
    const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
    // mov dx, 0x3f8; mov al, SERIAL_MARK; out dx, al; hlt; jmp to the hlt
    let code = [0x66, 0xba, 0xf8, 0x03, 0xb0, SERIAL_MARK, 0xee, 0xf4, 0xeb, 0xfd];
    let (headers, note_len) = (64 + 2 * 56_u64, 24_u64);
    let code_at = headers + note_len;

    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0"); // 64 bit, little endian, version 1
    elf.extend([2_u16, 62].map(u16::to_le_bytes).concat()); // executable, x86-64
    elf.extend(1_u32.to_le_bytes());
    elf.extend([u64::from(LOAD_AT), 64, 0].map(u64::to_le_bytes).concat()); // entry, program headers, no sections
    elf.extend(0_u32.to_le_bytes());
    elf.extend([64_u16, 56, 2, 64, 0, 0].map(u16::to_le_bytes).concat());
    let code_len = code.len() as u64;
    for (kind, flags, at, address, len, align) in [
        (1_u32, 5_u32, code_at, LOAD_AT, code_len, 1_u64),
        (4, 4, headers, 0, note_len, 4),
    ] {
        elf.extend([kind, flags].map(u32::to_le_bytes).concat());
        let address = u64::from(address);
        elf.extend(
            [at, address, address, len, len, align]
                .map(u64::to_le_bytes)
                .concat(),
        );
    }
    elf.extend(
        [4_u32, 8, XEN_ELFNOTE_PHYS32_ENTRY]
            .map(u32::to_le_bytes)
            .concat(),
    );
    elf.extend(b"Xen\0");
    elf.extend(u64::from(LOAD_AT).to_le_bytes());
    elf.extend(code);
    std::fs::write(out, elf).with_context(|| format!("making {}", out.display()))
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
