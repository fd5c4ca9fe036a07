//! The jail from outside: what the kernel says of a running monitor, and what becomes of one that tries more than it
//! may. Both need `/dev/kvm`, the first needs root: where these are not, each says so and passes.

#![allow(clippy::unwrap_used)] // a test ends where it fails

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use mandoline_api::monitor::{EXIT_SECCOMP, Hardware};
use mandoline_vmm::api::http::Response;
use mandoline_vmm::api::server::{Reply, Server};
use mandoline_vmm::boot::elf;
use mandoline_vmm::boot::layout::device_window;
use mandoline_vmm::bus::Bus;
use mandoline_vmm::config::Spec;
use mandoline_vmm::devices::virtio::mmio::Transport;
use mandoline_vmm::devices::virtio::persist::{Progress, RestoreError, Saved};
use mandoline_vmm::devices::virtio::{Activation, Device, DeviceError, DeviceType, Event, Slot, Source};
use mandoline_vmm::jail::seccomp::{self, Role};
use mandoline_vmm::machine;
use mandoline_vmm::metrics;
use mandoline_vmm::monitor::{self, Parts, Terminal};
use mandoline_vmm::state::{Phases, Since, StateFile};
use serde_json::json;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

const ENTRY: u64 = 0x10_0000;
/// Nobody's.
const UID: u32 = 0x7000_1234;

/// `mov dx, 0x3f8; mov al, 'R'; out dx, al; cli; hlt; jmp $`: says that it runs, and sleeps.
const SLEEPER: &[u8] = &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'R', 0xee, 0xfa, 0xf4, 0xeb, 0xfd];

fn kvm() -> bool {
    let there = machine::open_kvm(None);
    if let Err(error) = &there {
        eprintln!("skipped, since there is no KVM here: {error}");
    }
    there.is_ok()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

/// A monitor with every privilege taken, started as a node manager starts it.
struct Jailed {
    process: Child,
    /// What it was handed, by device and inode.
    handed: BTreeSet<(u64, u64)>,
    /// Kept open without being handed over.
    stray: (u64, u64),
    log: File,
    _api: UnixStream,
}

impl Jailed {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = json!({
            "boot-source": {"kernel_image_path": "fd:kernel"},
            "machine-config": {"vcpu_count": 2, "mem_size_mib": 16},
            "drives": [{"drive_id": "root", "path_on_host": "fd:disk", "is_root_device": true,
                        "io_engine": "Async"}],
            "vsock": {"guest_cid": 3, "uds_path": "fd:vsock"},
            "entropy": {},
            "balloon": {"amount_mib": 0, "deflate_on_oom": true},
        });
        let (mut serial, serial_output) = std::io::pipe().unwrap();
        let (broker, _kept) = UnixStream::pair().unwrap();
        let log = file(b"");
        let socket = dir.path().join("api");
        let fds: Vec<(&str, OwnedFd)> = vec![
            ("config", file(config.to_string().as_bytes()).into()),
            ("kernel", file(&elf::tiny(SLEEPER, ENTRY)).into()),
            ("disk", file(&[0; 4096]).into()),
            (
                "kvm",
                File::options()
                    .read(true)
                    .write(true)
                    .open("/dev/kvm")
                    .unwrap()
                    .into(),
            ),
            (
                "vsock",
                UnixListener::bind(dir.path().join("vsock")).unwrap().into(),
            ),
            ("vsock-out", broker.into()),
            ("api", UnixListener::bind(&socket).unwrap().into()),
            ("serial", serial_output.into()),
            ("state", file(b"").into()),
            ("log", log.try_clone().unwrap().into()),
        ];
        let stray = File::open("/proc/self/cmdline").unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_mandoline-vmm"));
        command.args([
            "vm",
            "--id",
            "jailed",
            "--config-file",
            "fd:config",
            "--state-file",
            "fd:state",
        ]);
        command.args(["--log", "fd:log", "--serial", "fd:serial", "--api-sock", "fd:api"]);
        command.args(["--jail-uid", &UID.to_string(), "--jail-gid", &UID.to_string()]);
        for (name, fd) in &fds {
            command.args(["--fd", &format!("{name}={}", fd.as_raw_fd())]);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let numbers: Vec<_> = fds
            .iter()
            .map(|(_, fd)| fd.as_raw_fd())
            .chain([stray.as_raw_fd()])
            .collect();
        // SAFETY: between fork and exec only fcntl is called, on numbers made before.
        unsafe {
            command.pre_exec(move || {
                for number in &numbers {
                    libc::fcntl(*number, libc::F_SETFD, 0);
                }
                Ok(())
            });
        }
        let process = command.spawn().unwrap();
        let handed = fds.iter().map(|(_, fd)| identity(fd)).collect();
        drop(fds);
        // The event loop writes it, after it is confined.
        let mut said = [0];
        serial.read_exact(&mut said).unwrap();
        assert_eq!(said, *b"R");
        // And so is the control socket's thread when it answers.
        let mut api = UnixStream::connect(&socket).unwrap();
        api.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .unwrap();
        let mut answer = [0; 12];
        api.read_exact(&mut answer).unwrap();
        assert_eq!(answer, *b"HTTP/1.1 200");
        let stray = identity(&stray);
        Self {
            process,
            handed,
            stray,
            log,
            _api: api,
        }
    }

    fn proc(&self) -> PathBuf {
        Path::new("/proc").join(self.process.id().to_string())
    }

    /// The value of a line of a `status` file.
    fn status(of: &Path, name: &str) -> String {
        let text = fs::read_to_string(of.join("status")).unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
        line.unwrap_or_else(|| panic!("{name} in {text}")).to_owned()
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn identity(fd: &impl AsFd) -> (u64, u64) {
    let stat = rustix::fs::fstat(fd).unwrap();
    (stat.st_dev, stat.st_ino)
}

#[test]
fn the_kernel_says_that_a_running_monitor_has_nothing_left() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: only root can start a jailed monitor");
    }
    if !kvm() {
        return;
    }
    let mut monitor = Jailed::start();
    let proc = monitor.proc();

    let mut threads = Vec::new();
    for entry in fs::read_dir(proc.join("task")).unwrap() {
        let thread = entry.unwrap().path();
        let name = fs::read_to_string(thread.join("comm")).unwrap();
        // Threads of the kernel's own in this process: KVM's and io_uring's workers.
        if name.starts_with("kvm-") || name.starts_with("iou-") {
            continue;
        }
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(
                Jailed::status(&thread, set),
                "0000000000000000",
                "{set} of {name}"
            );
        }
        assert_eq!(Jailed::status(&thread, "NoNewPrivs"), "1", "{name}");
        assert_eq!(Jailed::status(&thread, "Seccomp"), "2", "{name}");
        assert_eq!(Jailed::status(&thread, "Seccomp_filters"), "1", "{name}");
        let four = [UID.to_string(), UID.to_string(), UID.to_string(), UID.to_string()].join("\t");
        assert_eq!(Jailed::status(&thread, "Uid"), four, "{name}");
        assert_eq!(Jailed::status(&thread, "Gid"), four, "{name}");
        assert_eq!(Jailed::status(&thread, "Groups").trim(), "", "{name}");
        threads.push(name.trim().to_owned());
    }
    threads.sort();
    // The first is the event loop, under the program's name.
    assert_eq!(threads, ["api", "mandoline-vmm", "vcpu0", "vcpu1"]);

    for link in ["root", "cwd"] {
        let place = fs::read_link(proc.join(link)).unwrap();
        assert!(
            place.to_str().unwrap().ends_with(" (deleted)"),
            "{link}: {place:?}"
        );
        assert_eq!(fs::read_dir(proc.join(link)).unwrap().count(), 0, "{link}");
    }
    // What is not dumpable belongs to root in /proc: its own user can neither trace nor read it.
    assert_eq!(fs::metadata(proc.join("mem")).unwrap().uid(), 0);
    let limits = fs::read_to_string(proc.join("limits")).unwrap();
    let core: Vec<_> = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max core file size"))
        .unwrap()
        .split_whitespace()
        .collect();
    assert_eq!(core, ["0", "0", "bytes"]);
    // No namespace of its own that would pin mounts; and it stays in the cgroups that it was started in.
    for same in ["ns/mnt", "ns/net", "ns/pid", "ns/user"] {
        let ours = fs::read_link(Path::new("/proc/self").join(same)).unwrap();
        assert_eq!(fs::read_link(proc.join(same)).unwrap(), ours);
    }
    assert_eq!(
        fs::read_to_string(proc.join("cgroup")).unwrap(),
        fs::read_to_string("/proc/self/cgroup").unwrap()
    );
    descriptors(&monitor);

    let mut log = String::new();
    monitor.log.rewind().unwrap();
    monitor.log.read_to_string(&mut log).unwrap();
    assert!(log.contains("Landlock against files, TCP, "), "{log}");
}

/// Only what was handed over, and what the monitor made of it.
fn descriptors(monitor: &Jailed) {
    const OWN: [&str; 7] = [
        "kvm-vm",
        "kvm-vcpu:",
        "[eventfd]",
        "[eventpoll]",
        "[signalfd]",
        "[timerfd]",
        "[io_uring]",
    ];
    let mut accepted = 0;
    for entry in fs::read_dir(monitor.proc().join("fd")).unwrap() {
        let path = entry.unwrap().path();
        let link = fs::read_link(&path).unwrap();
        let link = link.to_str().unwrap();
        let meta = fs::metadata(&path).unwrap();
        let identity = (meta.dev(), meta.ino());
        assert_ne!(
            identity, monitor.stray,
            "a descriptor that nobody named stayed open: {link}"
        );
        let own = link
            .strip_prefix("anon_inode:")
            .is_some_and(|kind| OWN.iter().any(|own| kind.starts_with(own)));
        if own || link == "/dev/null" || monitor.handed.contains(&identity) {
            continue;
        }
        assert!(link.starts_with("socket:"), "{path:?} is {link}");
        accepted += 1;
    }
    assert_eq!(accepted, 1, "our connection to the control socket");
}

/// Names the role that the child below plays.
const ROLE: &str = "MANDOLINE_TEST_ROLE";

#[test]
fn a_forbidden_call_in_any_thread_ends_the_monitor_and_is_logged_with_its_role() {
    if !kvm() {
        return;
    }
    for role in ["vcpu", "devices", "api"] {
        let output = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "monitor_with_a_forbidden_call",
                "--ignored",
                "--nocapture",
            ])
            .env(ROLE, role)
            .output()
            .unwrap();
        let log = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(EXIT_SECCOMP.into()), "{role}: {log}");
        let line =
            format!("seccomp: the {role} thread tried a forbidden system call: 257 (openat), arguments 0x");
        assert!(log.contains(&line), "{role}: {log}");
    }
}

/// Makes the call; if it passes, ends with a status of its own.
fn forbidden() {
    let opened = File::open("/dev/null");
    eprintln!("the call was made: {opened:?}");
    std::process::exit(3);
}

/// A device that is taken over: by its driver's write to its configuration (vcpu), by an event (devices).
struct TakenOver {
    vcpu: bool,
    event: EventFd,
}

impl Device for TakenOver {
    fn kind(&self) -> DeviceType {
        DeviceType::Rng
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[8]
    }
    fn features(&self) -> u64 {
        0
    }
    fn config(&self) -> &[u8] {
        &[0; 4]
    }
    fn write_config(&mut self, _: u64, _: &[u8]) {
        if self.vcpu {
            forbidden();
        }
    }
    fn activate(&mut self, _: Activation) -> Result<(), DeviceError> {
        Ok(())
    }
    fn reset(&mut self) {}
    fn sources(&self) -> Vec<Source> {
        vec![Source {
            fd: self.event.as_raw_fd(),
            events: EventSet::IN,
            token: 0,
        }]
    }
    fn handle(&mut self, _: Event) -> Result<(), DeviceError> {
        forbidden();
        Ok(())
    }
    fn progress(&self) -> Vec<Option<Progress>> {
        Vec::new()
    }
    fn save(&self) -> Saved {
        Saved {
            version: 1,
            state: serde_json::Value::Null,
        }
    }
    fn restore(&mut self, _: &Saved) -> Result<(), RestoreError> {
        Ok(())
    }
    fn metrics(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}

#[test]
#[ignore = "the child of the test above"]
fn monitor_with_a_forbidden_call() {
    let Ok(role) = std::env::var(ROLE) else { return };
    // mov byte [configuration of the first device], 1; hlt; jmp back to it
    let configuration = (device_window(0) as u32 + 0x100).to_le_bytes();
    let code = [&[0xc6, 0x05][..], &configuration, &[1, 0xf4, 0xeb, 0xfd]].concat();
    let spec = Spec {
        vcpus: 1,
        memory: 16 << 20,
        hardware: Hardware::MpTable,
        huge_pages: mandoline_api::monitor::HugePages::None,
        kernel: file(&elf::tiny(&code, ENTRY)),
        initrd: None,
        command_line: String::new(),
        drives: Vec::new(),
        interfaces: Vec::new(),
        vsock: None,
        entropy: None,
        balloon: None,
        pmem: Vec::new(),
        park: None,
    };
    let phases = Arc::new(Phases::default());
    let kvm = machine::open_kvm(None).unwrap();
    let mut machine = machine::build(&kvm, spec, &phases, false).unwrap();
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    if role == "devices" {
        event.write(1).unwrap();
    }
    let model = TakenOver {
        vcpu: role == "vcpu",
        event,
    };
    let slot = Slot::new("taken over".into(), Box::new(model), EventFd::new(0).unwrap()).unwrap();
    let transport = Transport::new(slot.clone(), machine.memory.clone());
    machine.shared.bus = Arc::new(Bus::new(
        machine.uart.clone(),
        machine.control.clone(),
        vec![transport],
        Vec::new(),
    ));
    machine.slots.push(slot);
    seccomp::install_handler(libc::STDERR_FILENO).unwrap();
    if role == "api" {
        control_socket();
    }
    let confined = |role| seccomp::confine(role).map_err(|error| error.to_string());
    let parts = Parts {
        terminal: Terminal::default(),
        state: StateFile::default(),
        phases,
        signals: monitor::signals(false).unwrap(),
        calls: None,
        confine: Box::new(move || confined(Role::Devices)),
        confine_vcpu: || seccomp::confine(Role::Vcpu).map_err(|error| error.to_string()),
        boot_timer_from: Since::default(),
        metrics: metrics::Options::default(),
        restart_after: None,
    };
    let exit = monitor::run(machine, parts).unwrap();
    eprintln!("the monitor ended: {exit:?}");
}

/// A control socket whose handler is taken over by the first request.
fn control_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    let mut server = Server::new(UnixListener::bind(&path).unwrap()).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    std::thread::spawn(move || {
        let _client = client;
        seccomp::confine(Role::Api).unwrap();
        server.serve(None, &mut |_, _| {
            forbidden();
            Reply::Now(Response::done())
        })
    });
}
