//! `mandoline-vmm run` and `set` with a payload that sleeps: every limit that they change is read back. The network's part
//! needs root, for a network namespace; CPU and memory need cgroup v2, which a lab node has (`tests/lab/tests/node.rs`).

#![allow(clippy::unwrap_used)] // a test ends where it fails

use std::collections::BTreeMap;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Output, Stdio};

use mandoline_vmm::boot::elf;
use mandoline_vmm::machine;
use mandoline_vmm::run::place;

/// `cli; hlt; jmp $-1`
const SLEEPER: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];

struct Run {
    process: Child,
    name: String,
    _dir: tempfile::TempDir,
}

impl Run {
    /// In a network namespace of its own if `network`.
    fn start(name: &str, options: &str, network: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, disk) = (dir.path().join("kernel"), dir.path().join("disk"));
        std::fs::write(&kernel, elf::tiny(SLEEPER, 0x10_0000)).unwrap();
        std::fs::write(&disk, [0; 4096]).unwrap();
        let name = format!("{name}-{}", std::process::id());
        let mut command = Command::new(env!("CARGO_BIN_EXE_mandoline-vmm"));
        command.args(["run", "--no-join", "--mem", "32MiB", "--name", &name]);
        command.arg("--kernel").arg(kernel).arg("--disk").arg(disk);
        command.arg("--serial").arg(dir.path().join("serial"));
        command.args(options.split_whitespace());
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        if network {
            // SAFETY: unshare touches no memory.
            unsafe {
                command.pre_exec(|| match libc::unshare(libc::CLONE_NEWNET) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                });
            }
        }
        Self {
            process: command.spawn().unwrap(),
            name,
            _dir: dir,
        }
    }

    fn set_raw(&self, options: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_mandoline-vmm"))
            .args(["set", &self.name])
            .args(options.split_whitespace())
            .output()
            .unwrap()
    }

    /// Waits until its supervisor answers.
    fn up(mut self) -> Self {
        while !self.set_raw("").status.success() {
            assert!(
                self.process.try_wait().unwrap().is_none(),
                "run ended: {}",
                self.error()
            );
            std::thread::yield_now();
        }
        self
    }

    fn error(&mut self) -> String {
        std::io::read_to_string(self.process.stderr.take().unwrap()).unwrap()
    }

    /// Changes limits and returns what is in force.
    fn set(&self, options: &str) -> BTreeMap<String, String> {
        let output = self.set_raw(options);
        assert!(
            output.status.success(),
            "{options}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines()
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    fn refused(&self, options: &str) -> String {
        let output = self.set_raw(options);
        assert!(!output.status.success(), "{options}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Ends the monitor as a signal does; `run` cleans up and says how it ended.
    fn end(mut self) -> String {
        let pid = self.process.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        let monitor: i32 = children.trim().parse().unwrap();
        // SAFETY: a signal to the monitor, the only child of our child.
        assert_eq!(unsafe { libc::kill(monitor, libc::SIGTERM) }, 0);
        let status = self.process.wait().unwrap();
        assert_eq!((status.code(), status.signal()), (Some(67), None));
        assert!(!place::directory(&self.name).unwrap().exists());
        self.error()
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // The monitor goes with its parent.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn kvm() -> bool {
    let there = machine::open_kvm(None);
    if let Err(error) = &there {
        eprintln!("skipped, since there is no KVM here: {error}");
    }
    there.is_ok()
}

#[test]
fn disk_and_balloon_change_while_it_runs() {
    if !kvm() {
        return;
    }
    let options = "--disk-bandwidth 1MiB/s --balloon 0 --hardware acpi --io-engine sync --on-reboot exit";
    let run = Run::start("disk", options, false).up();
    let now = run.set("");
    assert_eq!(now["disk disk bandwidth"], "1048576 bytes in 1000 ms");
    assert_eq!(now["balloon"], "0 MiB");
    assert!(!now.contains_key("disk disk ops"));

    let now = run.set("--disk-bandwidth 2MiB/s --disk-burst 8MiB --disk-ops 100 --balloon 4MiB");
    assert_eq!(now["disk disk bandwidth"], "8388608 bytes in 4000 ms");
    assert_eq!(now["disk disk ops"], "100 operations in 1000 ms");
    assert_eq!(now["balloon"], "4 MiB");
    let now = run.set("--disk-bandwidth none");
    assert!(!now.contains_key("disk disk bandwidth"), "{now:?}");
    assert_eq!(now["disk disk ops"], "100 operations in 1000 ms");

    // Found wrong by `set`, by the supervisor, by the monitor.
    assert!(run.refused("--disk-ops 0").contains("1 or more"));
    assert!(
        run.refused("--disk-bandwidth 9GiB/s --disk-burst 1")
            .contains("allowed is")
    );
    let error = run.refused("--balloon 64MiB");
    assert!(error.contains("64"), "{error}");
    assert_eq!(run.set("")["balloon"], "4 MiB");
    let error = run.refused("--rate 1Mbit/s");
    assert!(error.contains("tap"), "{error}");

    // The name is taken; and free again at the end.
    let name = run.name.rsplit_once('-').unwrap().0.to_owned();
    let mut second = Run::start(&name, "", false);
    assert_eq!(second.process.wait().unwrap().code(), Some(1));
    let error = second.error();
    assert!(error.contains("runs already"), "{error}");
    assert!(run.end().contains("ended by a signal"));
}

#[test]
fn bandwidth_changes_while_it_runs() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: needs root for a tap and a network namespace");
    }
    if !kvm() {
        return;
    }
    let run = Run::start("net", "--tap t1 --address 10.9.0.2/24 --rx-ops 1000", true).up();
    let now = run.set("");
    assert_eq!(now["eth0 rx ops"], "1000 operations in 1000 ms");
    assert!(!now.contains_key("rate"));
    assert!(run.refused("--peak 1Mbit/s").contains("--rate"));
    let in_force = |now: &BTreeMap<String, String>| (now["rate"].clone(), now["peak"].clone());
    let both = |rate: &str, peak: &str| (rate.to_owned(), peak.to_owned());
    assert_eq!(in_force(&run.set("--rate 2Mbit/s")), both("2 Mbit/s", "2 Mbit/s"));
    assert_eq!(in_force(&run.set("--rate 4Mbit/s")), both("4 Mbit/s", "4 Mbit/s"));
    assert_eq!(in_force(&run.set("--peak 8Mbit/s")), both("4 Mbit/s", "8 Mbit/s"));
    assert_eq!(in_force(&run.set("--rate 1Mbit/s")), both("1 Mbit/s", "8 Mbit/s"));
    let error = run.refused("--rate 9Mbit/s --peak 3Mbit/s");
    assert!(
        error.contains("9 Mbit/s") && error.contains("3 Mbit/s"),
        "{error}"
    );

    let now =
        run.set("--rx-bandwidth 8Mbit/s --rx-ops none --tx-bandwidth 16Mbit/s --tx-burst 500000 --tx-ops 50");
    assert_eq!(now["eth0 rx bandwidth"], "1000000 bytes in 1000 ms");
    assert!(!now.contains_key("eth0 rx ops"));
    assert_eq!(now["eth0 tx bandwidth"], "500000 bytes in 250 ms");
    assert_eq!(now["eth0 tx ops"], "50 operations in 1000 ms");
    run.end();
}

#[test]
fn options_that_cannot_be_are_refused_before_anything_is_made() {
    for (options, parts) in [
        ("--rx-ops 5", ["--rx-ops", "--tap"]),
        ("--name a/b", ["\"a/b\"", "1 to 48"]),
        ("--park-idle 100", ["--park", "required"]),
        ("--cpu-cap 1", ["1/1000", "2/1000"]),
        (
            "--tap t9 --address 10.9.0.2/24 --vhost --tx-ops 5",
            ["--vhost", "--tx-ops"],
        ),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_mandoline-vmm"))
            .args(["run", "--kernel", "/dev/null"])
            .args(options.split_whitespace())
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{options}");
        assert!(
            parts.iter().all(|part| error.contains(part)),
            "{options}: {error}"
        );
    }
    let output = Command::new(env!("CARGO_BIN_EXE_mandoline-vmm"))
        .args(["set", "nobody-has-this-name"])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("no VM \"nobody-has-this-name\""));
}
