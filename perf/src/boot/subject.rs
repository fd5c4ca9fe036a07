//! What is compared: our monitor and QEMU's `microvm` machine, given the same kernel, root, disk, tap and
//! memory. A subject is started, and tells two things: when the agent's mark came out of the serial port
//! and how to open streams to and from the guest.

use std::fs::File;
use std::io::{IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mandoline_api::agent::{AGENT_PORT, HOST_EVENT_PORT, SERIAL_MARK};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType, recvmsg,
    socketpair,
};
use vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

/// Debian's QEMU, on the lab node's disk for peers (`guest-image/node/peer`).
const QEMU: &str = "/opt/peer/qemu-system-x86_64";

/// Nothing in the lab takes longer; a subject that does has failed, and its log says why.
const PATIENCE: Duration = Duration::from_secs(120);

/// The virtual machine that every subject gets.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub kernel: PathBuf,
    pub root: PathBuf,
    pub disk: PathBuf,
    /// A third disk, read-only.
    pub work: Option<PathBuf>,
    pub mem_mib: u32,
    pub tap: String,
    /// The host's kernel moves the frames.
    pub vhost: bool,
    pub mac: String,
    /// Ours can be parked, and has a control socket for that.
    pub park: bool,
    /// Where this run's sockets and logs go.
    pub dir: PathBuf,
}

/// Kernel command line; the monitors append their devices. The same for every subject.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=1 reboot=k panic=1 root=/dev/vda rootfstype=erofs ro init=/sbin/mandoline-agent";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    Mandoline,
    QemuMicrovm,
}

impl Subject {
    pub(crate) const ALL: [Self; 2] = [Self::Mandoline, Self::QemuMicrovm];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Mandoline => "mandoline-vmm",
            Self::QemuMicrovm => "qemu-microvm",
        }
    }

    /// Starts the machine. The clock starts just before the process is made.
    pub(crate) fn start(self, machine: &Machine, vmm: &Path, cid: u32) -> Result<Running> {
        let (serial, serial_out) = std::io::pipe().context("making the serial pipe")?;
        let log = File::create(machine.dir.join("log")).context("making the log")?;
        let mut broker = None;
        let (events, agent) = match self {
            Self::Mandoline => {
                let (ours, monitors) = socketpair(
                    AddressFamily::UNIX,
                    SocketType::SEQPACKET,
                    SocketFlags::CLOEXEC,
                    None,
                )
                .context("making the socket for the guest's outward streams")?;
                broker = Some(monitors);
                (Events::Broker(ours), AgentAddr::Unix(machine.dir.join("v.sock")))
            }
            Self::QemuMicrovm => {
                let events = VsockListener::bind(&VsockAddr::new(VMADDR_CID_ANY, HOST_EVENT_PORT))
                    .context("listening on AF_VSOCK (is vhost_vsock loaded?)")?;
                (Events::Vsock(events), AgentAddr::Vsock(cid))
            }
        };
        let mut command = match self {
            Self::Mandoline => mandoline(machine, vmm, cid, broker.as_ref())?,
            Self::QemuMicrovm => qemu(machine, cid),
        };
        command
            .stdin(Stdio::null())
            .stdout(OwnedFd::from(serial_out))
            .stderr(log);
        let began = Instant::now();
        let child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        drop(command); // holds the pipe's writing end
        drop(broker);
        Ok(Running {
            child,
            mark: Mark::new(serial.into(), machine.dir.join("log")),
            events,
            agent,
            began,
        })
    }
}

fn mandoline(m: &Machine, vmm: &Path, cid: u32, broker: Option<&OwnedFd>) -> Result<Command> {
    let mut config = serde_json::json!({
        "boot-source": {"kernel_image_path": m.kernel, "boot_args": CMDLINE},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": m.mem_mib},
        "drives": [
            {"drive_id": "root", "path_on_host": m.root, "is_root_device": true, "is_read_only": true},
            {"drive_id": "disk", "path_on_host": m.disk, "is_root_device": false, "is_read_only": false},
        ],
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": m.tap, "guest_mac": m.mac}],
        "vsock": {"guest_cid": cid, "uds_path": m.dir.join("v.sock")},
    });
    if let (Some(work), Some(drives)) = (&m.work, config["drives"].as_array_mut()) {
        drives.push(serde_json::json!(
            {"drive_id": "work", "path_on_host": work, "is_root_device": false, "is_read_only": true}
        ));
    }
    if m.vhost {
        config["network-interfaces"][0]["vhost"] = "/dev/vhost-net".into();
    }
    if m.park {
        config["park"] = serde_json::json!({"mem_file_path": m.dir.join("park")});
    }
    let path = m.dir.join("config.json");
    std::fs::write(&path, serde_json::to_vec_pretty(&config)?).context("writing the configuration")?;
    let started = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let started = started.tv_sec as u64 * 1_000_000_000 + started.tv_nsec as u64;
    let mut command = Command::new(vmm);
    command
        .arg("--state-file")
        .arg(m.dir.join("state"))
        .arg(format!("--start-time-ns={started}"))
        .args([
            "--id",
            "perf",
            "--boot-timer",
            "--jail-uid",
            "60000",
            "--jail-gid",
            "60000",
        ])
        .arg("--config-file")
        .arg(&path)
        .args(["--serial", "fd:serial", "--fd", "serial=1"]);
    if m.park {
        command.arg("--api-sock").arg(m.dir.join("api.sock"));
    } else {
        command.arg("--no-api");
    }
    if let Some(broker) = broker {
        // Kept over exec: the jailed monitor can open no path, so it asks here for the guest's outward streams.
        rustix::io::fcntl_setfd(broker, rustix::io::FdFlags::empty())?;
        command
            .arg("--fd")
            .arg(format!("vsock-out={}", broker.as_raw_fd()));
    }
    Ok(command)
}

/// QEMU's `microvm` machine with nothing but a serial port.
pub(super) fn qemu_base(acpi: bool, mem_mib: u32) -> Command {
    let mut command = Command::new(QEMU);
    let acpi = if acpi { "on" } else { "off" };
    command.arg("-M").arg(format!(
        "microvm,acpi={acpi},pic=off,pit=off,rtc=off,isa-serial=on,accel=kvm"
    ));
    // PKU: nested in TCG its XSAVE leaf is inconsistent, and the guest kernel would print about it.
    command
        .args(["-cpu", "host,-pku", "-smp", "1", "-m"])
        .arg(mem_mib.to_string());
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-serial",
        "stdio",
    ]);
    command
}

fn qemu(m: &Machine, cid: u32) -> Command {
    let mut command = qemu_base(false, m.mem_mib);
    let mut arg = |a: &str, b: String| {
        command.arg(a).arg(b);
    };
    arg("-kernel", m.kernel.display().to_string());
    arg("-append", CMDLINE.into());
    arg(
        "-drive",
        format!("id=root,file={},format=raw,if=none,readonly=on", m.root.display()),
    );
    arg("-device", "virtio-blk-device,drive=root".into());
    arg(
        "-drive",
        format!("id=disk,file={},format=raw,if=none", m.disk.display()),
    );
    arg("-device", "virtio-blk-device,drive=disk".into());
    if let Some(work) = &m.work {
        let drive = format!("id=work,file={},format=raw,if=none,readonly=on", work.display());
        arg("-drive", drive);
        arg("-device", "virtio-blk-device,drive=work".into());
    }
    let vhost = if m.vhost { ",vhost=on" } else { "" };
    arg(
        "-netdev",
        format!("tap,id=net,ifname={},script=no,downscript=no{vhost}", m.tap),
    );
    arg("-device", format!("virtio-net-device,netdev=net,mac={}", m.mac));
    arg("-device", format!("vhost-vsock-device,guest-cid={cid}"));
    command
}

enum Events {
    /// The monitor sends `{"port": …}` with one end of a new stream.
    Broker(OwnedFd),
    Vsock(VsockListener),
}

enum AgentAddr {
    Unix(PathBuf),
    Vsock(u32),
}

/// A stream to or from the guest.
pub(crate) trait Stream: Read + std::io::Write {}
impl<T: Read + std::io::Write> Stream for T {}

/// Waits for the agent's mark on a serial port.
pub(super) struct Mark {
    serial: File,
    log: PathBuf,
}

impl Mark {
    pub(super) fn new(serial: OwnedFd, log: PathBuf) -> Self {
        Self {
            serial: serial.into(),
            log,
        }
    }

    /// When the first user instruction was seen.
    pub(super) fn wait(&mut self) -> Result<Instant> {
        let mut seen = Vec::new();
        loop {
            self.wait_readable(self.serial.as_fd(), "mark on the serial port", &seen)?;
            let mut buffer = [0; 4096];
            let n = self.serial.read(&mut buffer)?;
            let now = Instant::now();
            if n == 0 {
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                bail!(
                    "the monitor ended before the mark; serial: {}; log: {log}",
                    String::from_utf8_lossy(&seen)
                );
            }
            if buffer[..n].contains(&SERIAL_MARK) {
                return Ok(now);
            }
            seen.extend_from_slice(&buffer[..n]);
        }
    }

    fn wait_readable(&self, fd: BorrowedFd<'_>, what: &str, seen: &[u8]) -> Result<()> {
        let mut poll = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        let timeout = rustix::event::Timespec {
            tv_sec: PATIENCE.as_secs() as i64,
            tv_nsec: 0,
        };
        if rustix::event::poll(&mut poll, Some(&timeout))? == 0 {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            bail!(
                "no {what} within {PATIENCE:?}; serial: {}; log: {log}",
                String::from_utf8_lossy(seen)
            );
        }
        Ok(())
    }
}

/// A machine that was started; killed and reaped when dropped.
pub(crate) struct Running {
    child: Child,
    mark: Mark,
    events: Events,
    agent: AgentAddr,
    pub began: Instant,
}

impl Running {
    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the agent's mark on the serial port: the first user instruction.
    pub(crate) fn wait_mark(&mut self) -> Result<Instant> {
        self.mark.wait()
    }

    /// Waits for the stream that the agent opens when it listens.
    pub(crate) fn wait_up(&mut self) -> Result<Box<dyn Stream>> {
        let fd = match &self.events {
            Events::Broker(socket) => socket.as_fd(),
            Events::Vsock(l) => l.as_fd(),
        };
        self.mark.wait_readable(fd, "event stream of the agent", &[])?;
        Ok(match &self.events {
            Events::Broker(socket) => Box::new(receive_stream(socket)?),
            Events::Vsock(l) => Box::new(l.accept()?.0),
        })
    }

    /// Opens a stream to the agent.
    pub(crate) fn connect_agent(&self) -> Result<Box<dyn Stream>> {
        match &self.agent {
            AgentAddr::Vsock(cid) => {
                let stream = VsockStream::connect(&VsockAddr::new(*cid, AGENT_PORT))?;
                stream.set_read_timeout(Some(PATIENCE))?;
                Ok(Box::new(stream))
            }
            AgentAddr::Unix(path) => {
                let mut stream =
                    UnixStream::connect(path).with_context(|| format!("connecting {}", path.display()))?;
                stream.set_read_timeout(Some(PATIENCE))?;
                std::io::Write::write_all(&mut stream, format!("CONNECT {AGENT_PORT}\n").as_bytes())?;
                let mut answer = Vec::new();
                let mut byte = [0];
                while answer.len() < 32 && byte != *b"\n" {
                    stream
                        .read_exact(&mut byte)
                        .context("the monitor closed the stream")?;
                    answer.extend_from_slice(&byte);
                }
                if !answer.starts_with(b"OK ") {
                    bail!(
                        "the monitor answered {:?} to CONNECT",
                        String::from_utf8_lossy(&answer)
                    );
                }
                Ok(Box::new(stream))
            }
        }
    }
}

/// Takes the stream that the guest opened to [`HOST_EVENT_PORT`].
fn receive_stream(broker: &OwnedFd) -> Result<UnixStream> {
    let mut text = [0; 256];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(
        broker,
        &mut [IoSliceMut::new(&mut text)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let asked: serde_json::Value =
        serde_json::from_slice(&text[..got.bytes]).context("the monitor's message")?;
    if asked["port"] != HOST_EVENT_PORT {
        bail!(
            "the guest opened a stream to port {}, not {HOST_EVENT_PORT}",
            asked["port"]
        );
    }
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message
            && let Some(fd) = fds.next()
        {
            return Ok(fd.into());
        }
    }
    bail!("the monitor's message came without a descriptor")
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
