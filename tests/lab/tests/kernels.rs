//! Real kernels under the monitor, by every way that it can start one: PVH and the 64-bit Linux protocol, `vmlinux` and
//! `bzImage`, told of their hardware by an MP table and by ACPI; how they see their machine, and how they end.
//!
//! Each guest has a shell for its init, on the serial port. It gets one line for each of its starts: to say what it sees,
//! and to end.

use mandoline_lab::{Lab, Node, NodeSpec, images};
use std::collections::BTreeMap;
use std::path::Path;

type Tested = Result<(), Box<dyn std::error::Error>>;

const IMAGES: &str = "/usr/share/mandoline/images";

/// Starts the guest of directory $1, with $2 for what a reboot does, gives it the line of `commands.N` at its Nth prompt, waits
/// for its end: 200 s at most, then the status is that of a SIGKILL.
const RUN: &str = r#"
cd "/run/kernels/$1" && rm -f in && mkfifo in && : >out || exit 1
timeout -k 1 -s KILL 200 \
    /usr/lib/mandoline/bin/mandoline-vmm vm --id "$1" --no-api --config-file config.json --state-file state --log log \
    --on-reboot "$2" --jail-uid 60000 --jail-gid 60000 <in >out 2>>log &
monitor=$!
exec 3>in
for commands in commands.*; do
    until [ "$(grep -a -c '^# ' out)" -ge "${commands#commands.}" ]; do
        kill -0 $monitor 2>/dev/null || break 2
        sleep 0.1
    done
    cat "$commands" >&3
done
wait $monitor
"#;

/// Tries for a guest: the emulator that a lab node may run on breaks a guest now and then (see `scripts/lab-tests`).
const TRIES: usize = 3;

/// What a guest is asked: each answer a line `@name=value`.
const LOOK: &str = "mount -t proc proc /proc; mount -t sysfs sysfs /sys; \
    echo @cpus=$(nproc); \
    echo @mib=$(($(sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo) / 1024)); \
    echo @clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource); \
    echo @core=$(cat /sys/devices/system/cpu/cpu0/topology/core_cpus_list); \
    echo @package=$(cat /sys/devices/system/cpu/cpu0/topology/package_cpus_list); \
    echo @virtio=$(ls /sys/bus/virtio/devices | wc -l); \
    echo @generation=$(ls -d /sys/bus/platform/drivers/vmgenid/*:* 2>/dev/null | wc -l); \
    echo @calibrated=$(dmesg | grep -c -e 'TSC calibration' -e 'Calibrating delay loop\\.'); ";

// reboot(2) with LINUX_REBOOT_CMD_POWER_OFF and _RESTART, once the serial port has sent everything.
const POWER_OFF: &str =
    "exec perl -MPOSIX -e 'tcdrain(1); syscall(169, 0xfee1dead, 672274793, 0x4321fedc, 0)'";
const RESTART: &str = "exec perl -MPOSIX -e 'tcdrain(1); syscall(169, 0xfee1dead, 672274793, 0x01234567, 0)'";

/// A guest and what is expected of it.
struct Guest<'a> {
    name: &'a str,
    kernel: &'a str,
    initrd: Option<&'a str>,
    /// More of the command line.
    append: &'a str,
    vcpus: u8,
    mem_mib: u32,
    hardware: &'a str,
    /// How it ends each of its starts; all but the last are reboots.
    ends: &'a [&'a str],
    /// What a reboot does.
    on_reboot: &'a str,
    /// Exit status and reason of the monitor.
    status: i32,
    reason: &'a str,
}

impl Guest<'_> {
    /// The smallest sliver; with an MP table a kernel knows a reset only.
    const UP: Guest<'static> = Guest {
        name: "up",
        kernel: "/usr/share/mandoline/images/vmlinux-up",
        initrd: None,
        append: "init=/bin/sh reboot=k",
        vcpus: 1,
        mem_mib: 32,
        hardware: "mp-table",
        ends: &[RESTART],
        on_reboot: "exit",
        status: 64,
        reason: "reboot",
    };
    /// One that ACPI tells how to do both: it starts again in its place, then ends.
    const ACPI: Guest<'static> = Guest {
        append: "init=/bin/sh",
        mem_mib: 256,
        hardware: "acpi",
        ends: &[RESTART, POWER_OFF],
        on_reboot: "restart",
        status: 0,
        reason: "shutdown",
        ..Guest::UP
    };

    /// Runs it to its end, which must be the expected one; what it said last of all that it was asked.
    fn run(&self, node: &Node) -> Result<BTreeMap<String, String>, Box<dyn std::error::Error>> {
        let mut tries = Vec::new();
        while tries.len() < TRIES {
            let began = std::time::Instant::now();
            let run = self.run_once(node)?;
            let as_expected = self.ended_as_expected(&run);
            eprintln!(
                "{}: {} ms{}",
                self.name,
                began.elapsed().as_millis(),
                if as_expected { "" } else { ": not as expected" }
            );
            if as_expected {
                return Ok(run
                    .console
                    .lines()
                    .filter_map(|line| line.trim_end().strip_prefix('@')?.split_once('='))
                    .map(|(name, value)| (name.to_owned(), value.to_owned()))
                    .collect());
            }
            tries.push(run);
        }
        panic!("{} did not end as expected: {tries:#?}", self.name)
    }

    fn run_once(&self, node: &Node) -> Result<Run, Box<dyn std::error::Error>> {
        let dir = format!("/run/kernels/{}", self.name);
        let config = serde_json::json!({
            "boot-source": {
                "kernel_image_path": self.kernel,
                "initrd_path": self.initrd,
                "boot_args": format!(
                    "console=ttyS0 quiet loglevel=1 panic=1 root=/dev/vda rootfstype=erofs ro {}",
                    self.append
                ),
            },
            "machine-config": {
                "vcpu_count": self.vcpus, "mem_size_mib": self.mem_mib, "hardware": self.hardware
            },
            "drives": [{
                "drive_id": "root", "path_on_host": format!("{IMAGES}/root.erofs"),
                "is_root_device": true, "is_read_only": true
            }],
            "entropy": {},
        });
        put(node, &format!("{dir}/config.json"), &config.to_string())?;
        for (n, end) in self.ends.iter().enumerate() {
            put(
                node,
                &format!("{dir}/commands.{}", n + 1),
                &format!("{LOOK}{end}\n"),
            )?;
        }
        node.shell(&format!("rm -f {dir}/state {dir}/log"))?;
        let status = node
            .exec(&["sh", "-c", RUN, "run", self.name, self.on_reboot])?
            .status;
        let read = |file: &str| node.shell(&format!("cat {dir}/{file}"));
        Ok(Run {
            status,
            console: read("out")?,
            state: read("state")?,
            log: read("log").unwrap_or_default(),
        })
    }

    fn ended_as_expected(&self, run: &Run) -> bool {
        let last = run.state.lines().last().unwrap_or_default();
        let reboots = run.state.matches(r#""state":"rebooting""#).count();
        run.status == self.status
            && last.contains(&format!(r#""reason":"{}""#, self.reason))
            && reboots == self.ends.len().saturating_sub(1)
    }

    /// Runs it and checks that it sees the machine that it was given.
    fn check(&self, node: &Node) -> Tested {
        let said = self.run(node)?;
        let said = |name: &str| said.get(name).map(String::as_str).unwrap_or_default();
        let number = |name: &str| said(name).parse::<u32>().unwrap_or(u32::MAX);
        let name = self.name;
        assert_eq!(number("cpus"), u32::from(self.vcpus), "{name}");
        // What the kernel has for itself is not in the sum; under 32 MiB it is a half.
        let mib = number("mib");
        assert!(
            (self.mem_mib * 2 / 5..=self.mem_mib).contains(&mib),
            "{name}: {mib} MiB"
        );
        assert_eq!(said("clock"), "kvm-clock", "{name}");
        assert_eq!(number("calibrated"), 0, "{name}: a clock was measured");
        assert_eq!(said("core"), "0", "{name}: one thread a core");
        let package = match self.vcpus {
            1 => "0".to_owned(),
            count => format!("0-{}", count - 1),
        };
        assert_eq!(said("package"), package, "{name}");
        assert_eq!(
            number("virtio"),
            2,
            "{name}: drive and entropy, each of them once"
        );
        if self.kernel.starts_with("/run/smp") {
            let generation = u32::from(self.hardware == "acpi");
            assert_eq!(number("generation"), generation, "{name}: VM generation id");
        }
        Ok(())
    }
}

/// What is left of a guest's run.
#[derive(Debug)]
#[allow(dead_code, reason = "shown when a guest did not end as expected")]
struct Run {
    status: i32,
    console: String,
    state: String,
    log: String,
}

fn put(node: &Node, path: &str, text: &str) -> Tested {
    let script = r#"mkdir -p "$(dirname "$1")" && cat >"$1""#;
    node.exec_with_input(&["sh", "-c", script, "put", path], text.as_bytes())?;
    Ok(())
}

/// The same kernel without its notes, so without a PVH entry: the 64-bit Linux protocol is left.
fn without_notes(vmlinux: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    const PT_NOTE: u32 = 4;
    let mut image = std::fs::read(vmlinux)?;
    // ELF-64: program headers of 56 bytes from e_phoff (behind the header, at 64), e_phnum of them (at 56).
    let count = u16::from_le_bytes([image[56], image[57]]);
    for header in image[64..].chunks_exact_mut(56).take(count.into()) {
        if header[..4] == PT_NOTE.to_le_bytes() {
            header[..4].fill(0);
        }
    }
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), image)?;
    Ok(file)
}

#[test]
#[ignore = "lab"]
fn kernels_start_by_every_protocol_and_end_as_they_say() -> Tested {
    let mut lab = Lab::new()?;
    let mut spec = NodeSpec::named("kernels").with_mandoline()?;
    // QEMU's emulation, threaded, may run code that another processor has just patched: an `int3` of a static branch that
    // was there for a moment stops the kernel, the node's or a guest's with many processors. With one thread it cannot.
    spec.cpus = 1;
    let node = lab.start(spec)?;
    let (smp, cloud) = (images::kernel("smp")?, images::cloud_kernel()?);
    let bare = without_notes(&images::kernel("up")?.join("vmlinux"))?;
    for (from, to) in [
        (bare.path(), "/run/up-without-notes"),
        (&smp.join("vmlinux"), "/run/smp-vmlinux"),
        (&smp.join("bzImage"), "/run/smp-bzImage"),
        (&cloud.join("bzImage"), "/run/cloud-bzImage"),
        (&cloud.join("initrd"), "/run/cloud-initrd"),
    ] {
        node.copy_in(from, to)?;
    }

    // The smallest sliver, by PVH; the same kernel by the 64-bit protocol; and how it ends when it cannot go on.
    Guest::UP.check(&node)?;
    Guest {
        name: "up-linux64",
        kernel: "/run/up-without-notes",
        ..Guest::UP
    }
    .check(&node)?;
    Guest {
        name: "panic",
        append: "init=/missing reboot=k",
        ends: &[],
        status: 65,
        reason: "panic",
        ..Guest::UP
    }
    .run(&node)?;

    // Many processors, and memory on both sides of the hole.
    let many = |name, kernel, mem_mib, base| Guest {
        name,
        kernel,
        mem_mib,
        vcpus: 8,
        ..base
    };
    for guest in [
        many("smp-vmlinux-mp-table", "/run/smp-vmlinux", 5120, Guest::UP),
        many("smp-bzimage-mp-table", "/run/smp-bzImage", 256, Guest::UP),
        Guest {
            ends: &[POWER_OFF],
            ..many("smp-vmlinux-acpi", "/run/smp-vmlinux", 256, Guest::ACPI)
        },
        many("smp-bzimage-acpi", "/run/smp-bzImage", 5120, Guest::ACPI),
    ] {
        guest.check(&node)?;
    }

    // A kernel that is not ours, with its drivers in an initial RAM disk.
    Guest {
        name: "cloud",
        kernel: "/run/cloud-bzImage",
        initrd: Some("/run/cloud-initrd"),
        vcpus: 2,
        ends: &[POWER_OFF],
        ..Guest::ACPI
    }
    .check(&node)?;
    node.power_off()?;
    Ok(())
}
