//! The life of a VM that was started by hand: limits, the monitor, the join, the end.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mandoline_api::agent::{self as protocol, Event};
use mandoline_api::monitor::{
    Balloon, BootSource, Drive, Entropy, ExitReason, MachineConfig, NetworkInterface, Park, Phase, Pmem,
    StateLine, VSOCK_OUT_FD, VmConfig, Vsock,
};
use mandoline_limits::cgroup::{Cgroup, MemoryLimits};
use mandoline_limits::shaper::Bandwidth;
use mandoline_limits::vm::{self as limits, Guard, TapLimits, VmLimits};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::cli::{OnReboot, Switch};
use crate::config::DEFAULT_COMMAND_LINE;
use crate::monitor;
use crate::run::agent;
use crate::run::limits::{Bound, BurstError};
use crate::run::options::{RootAs, RunArgs};
use crate::run::parts::{Handed, RawTerminal, memory_file, reopen_for_append};
use crate::run::place::Place;
use crate::run::set;
use crate::state::monotonic_ns;

/// What the sliver's kernel is told beside [`DEFAULT_COMMAND_LINE`] when there is a root image.
const ROOT_ARGUMENTS: &str = "rootfstype=erofs init=/sbin/mandoline-agent";
/// The first user id for monitors that are given none: far above people and services.
const FIRST_UID: u32 = 0x7000_0000;
const GUEST_CID: u32 = 3;
/// Most threads of a monitor beside its vCPUs, KVM's and io_uring's workers among them.
const THREADS: u32 = 64;

/// `run` failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The limits.
    #[error(transparent)]
    Limits(#[from] mandoline_limits::Error),
    /// The monitor's own preparations.
    #[error(transparent)]
    Monitor(#[from] monitor::Error),
    /// A burst.
    #[error(transparent)]
    Burst(#[from] BurstError),
    /// A name that cannot be a directory's.
    #[error("name {0:?} is refused: allowed are 1 to 48 letters, digits and any of _-. (not first)")]
    Name(String),
    /// A name that is taken.
    #[error("name {0:?}: a VM of this name runs already; --name gives another")]
    Taken(String),
    /// A limit without the device that it limits.
    #[error("{0} needs --tap")]
    NoTap(&'static str),
    /// The host.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: String,
        /// What the host said.
        source: io::Error,
    },
}

pub(super) fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |source| Error::Host { what, source }
}

/// Boots the sliver and returns the monitor's exit status.
pub fn run(args: &RunArgs) -> Result<u8, Error> {
    let started = monotonic_ns();
    let limits = vm_limits(args)?;
    let mut place = Place::take(&args.name)?;
    let mut guard = limits::apply(&limits)?;
    let (vsock, vsock_path) = place.listen("vsock", args.vsock.as_deref())?;
    let (control, control_path) = place.listen("api", args.api_sock.as_deref())?;
    let (requests, _) = place.listen("set", None)?;
    let mut handed = Handed::default();
    let config = configuration(args, &mut guard, vsock, &mut handed)?;
    let control = handed.give("api", control)?;
    let config_text = serde_json::to_vec(&config).map_err(|error| host("configuration")(error.into()))?;
    handed.give("config", memory_file("config", &config_text)?)?;

    let mut state = match &args.state_file {
        Some(path) => File::options().read(true).append(true).create(true).open(path),
        None => Ok(memory_file("state", &[])?),
    }
    .map_err(host("state file"))?;
    // Appending, so that its descriptor here, which reads, and the monitor's do not disturb each other.
    handed.give("state", reopen_for_append(&state)?)?;
    let log = args
        .log
        .as_ref()
        .map(|path| handed.sink("log", path))
        .transpose()?;
    let serial = args
        .serial
        .as_ref()
        .map(|path| handed.sink("serial", path))
        .transpose()?;
    let (broker, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|error| host("socketpair")(error.into()))?;
    handed.give(VSOCK_OUT_FD, theirs)?;

    let mut command = Command::new(std::env::current_exe().map_err(host("finding this program"))?);
    command.args([
        "vm",
        "--id",
        &args.name,
        "--config-file",
        "fd:config",
        "--state-file",
        "fd:state",
    ]);
    let on_reboot = match args.on_reboot {
        OnReboot::Restart => "restart",
        OnReboot::Exit => "exit",
    };
    command.args(["--on-reboot", on_reboot, "--api-sock", &control, "--no-paths"]);
    command.args(["--boot-timer", "--start-time-ns", &started.to_string()]);
    command.arg("--die-with-parent");
    for (option, value) in [("--log", log), ("--serial", serial)] {
        if let Some(value) = value {
            command.args([option, &value]);
        }
    }
    if args.seccomp == Switch::Off {
        command.args(["--seccomp", "off"]);
    }
    if rustix::process::geteuid().is_root() {
        let uid = args
            .jail_uid
            .unwrap_or(FIRST_UID + std::process::id())
            .to_string();
        command.args(["--jail-uid", &uid, "--jail-gid", &uid]);
    }
    for (name, fd) in &handed.0 {
        command.arg("--fd").arg(format!("{name}={}", fd.as_raw_fd()));
    }

    let signals = monitor::signals(true)?;
    let terminal = RawTerminal::enter();
    let mut child = spawn(&mut command, &guard)?;
    drop(handed);
    let mut outside = Outside {
        requests,
        guard: &mut guard,
        control: control_path,
    };
    let status = supervise(args, &mut child, &signals, &broker, vsock_path, &mut outside);
    drop(terminal);
    let code = match status {
        Ok(code) => code,
        Err(error) => {
            // Nothing may be left behind, whatever failed here.
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
    };
    report(&mut state, started);
    guard.close()?;
    Ok(code)
}

fn vm_limits(args: &RunArgs) -> Result<VmLimits, Error> {
    let wanted = &args.limits;
    if args.tap.is_none() {
        for (option, given) in [
            ("--rate", wanted.rate.is_some()),
            ("--rx-bandwidth", wanted.rx_bandwidth.is_some()),
            ("--rx-ops", wanted.rx_ops.is_some()),
            ("--tx-bandwidth", wanted.tx_bandwidth.is_some()),
            ("--tx-ops", wanted.tx_ops.is_some()),
        ] {
            if given {
                return Err(Error::NoTap(option));
            }
        }
    }
    let mut limits = VmLimits::new(&args.name);
    limits.cpu_share = wanted.cpu_share;
    limits.cpu_max = wanted.cpu_cap.and_then(Bound::limit);
    // Also without a limit of its own: so that it can get one later.
    if rustix::process::geteuid().is_root() && Cgroup::available(&limits.cgroup_root) {
        limits.pids_max = Some(THREADS + u32::from(args.vcpus));
    }
    if let Some(max) = wanted.mem_limit.and_then(Bound::limit) {
        limits.memory = MemoryLimits {
            max: Some(max),
            oom_group: Some(true),
            ..Default::default()
        };
    }
    limits.tap = args.tap.as_ref().map(|name| TapLimits {
        name: name.clone(),
        address: args.host_address(),
        mtu: None,
        bandwidth: wanted.rate.map(|guarantee| Bandwidth {
            guarantee,
            peak: wanted.peak.or(wanted.rate),
        }),
    });
    Ok(limits)
}

fn configuration(
    args: &RunArgs,
    guard: &mut Guard,
    vsock: UnixListener,
    handed: &mut Handed,
) -> Result<VmConfig, Error> {
    let limits = &args.limits;
    let kernel = handed.file("kernel", &args.kernel, false)?;
    let (mut drives, mut pmem) = (Vec::new(), Vec::new());
    for (id, path, read_only) in [("root", &args.root, true), ("disk", &args.disk, false)] {
        let Some(path) = path else { continue };
        let path_on_host = handed.file(id, path, !read_only)?;
        let is_root_device = id == "root";
        if is_root_device && args.root_as == RootAs::Pmem {
            pmem.push(Pmem {
                id: id.to_owned(),
                path_on_host,
                root_device: true,
                read_only,
                rate_limiter: None,
            });
            continue;
        }
        drives.push(Drive {
            drive_id: id.to_owned(),
            path_on_host,
            is_root_device,
            is_read_only: read_only,
            io_engine: args.io_engine.map(Into::into),
            rate_limiter: limits.disk()?,
            ..Drive::default()
        });
    }
    let mut network_interfaces = Vec::new();
    if let Some(tap) = guard.take_tap() {
        network_interfaces.push(NetworkInterface {
            iface_id: "eth0".to_owned(),
            host_dev_name: handed.give("tap0", tap)?,
            guest_mac: args.mac(),
            vhost: args
                .vhost
                .then(|| handed.file("vhost", "/dev/vhost-net".as_ref(), true))
                .transpose()?,
            rx_rate_limiter: limits.rx()?,
            tx_rate_limiter: limits.tx()?,
            ..NetworkInterface::default()
        });
    }
    let park = args.park.as_ref().map(|path| -> Result<_, Error> {
        let mut options = File::options();
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600);
        let file = options
            .open(path)
            .map_err(host(format!("park: opening {}", path.display())))?;
        Ok(Park {
            mem_file_path: handed.give("park", file)?,
            idle_ms: args.park_idle,
        })
    });
    let park = park.transpose()?;
    let mut line = args.command_line.clone().unwrap_or_else(|| {
        let root = if args.root.is_some() { ROOT_ARGUMENTS } else { "" };
        format!("{DEFAULT_COMMAND_LINE} {root}")
    });
    line.push(' ');
    line.push_str(&args.append);
    Ok(VmConfig {
        boot_source: BootSource {
            kernel_image_path: kernel,
            boot_args: Some(line.trim().to_owned()),
            initrd_path: None,
        },
        machine_config: MachineConfig {
            vcpu_count: args.vcpus,
            mem_size_mib: args.mem >> 20,
            hardware: args.hardware.into(),
            ..Default::default()
        },
        drives,
        network_interfaces,
        vsock: Some(Vsock {
            guest_cid: GUEST_CID,
            uds_path: handed.give("vsock", vsock)?,
            vsock_id: None,
        }),
        entropy: Some(Entropy::default()),
        balloon: limits.balloon.map(|amount_mib| Balloon {
            amount_mib,
            deflate_on_oom: true,
            stats_polling_interval_s: 0,
            free_page_hinting: false,
            free_page_reporting: false,
        }),
        pmem,
        park,
        ..VmConfig::default()
    })
}

/// Starts the monitor inside its cgroup, out of the reach of the terminal's Ctrl-C.
fn spawn(command: &mut Command, guard: &Guard) -> Result<Child, Error> {
    let procs = match guard.cgroup() {
        Some(cgroup) => {
            let path = cgroup.path().join("cgroup.procs");
            Some(
                File::options()
                    .write(true)
                    .open(&path)
                    .map_err(host(path.display().to_string()))?,
            )
        }
        None => None,
    };
    // SAFETY: between fork and exec only async-signal-safe calls are made: write, sigaction and a change of the
    // signal mask.
    unsafe {
        command.pre_exec(move || {
            if let Some(procs) = &procs {
                (&*procs).write_all(b"0")?;
            }
            // The terminal sends Ctrl-C to both; the monitor leaves it to us.
            libc::signal(libc::SIGINT, libc::SIG_IGN);
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
            Ok(())
        });
    }
    command.spawn().map_err(host("starting the monitor"))
}

/// What can be changed from outside while the VM runs.
struct Outside<'a> {
    requests: UnixListener,
    guard: &'a mut Guard,
    control: PathBuf,
}

/// Waits for the monitor's end; meanwhile joins the guest when it is up, and hears Ctrl-C.
fn supervise(
    args: &RunArgs,
    child: &mut Child,
    signals: &OwnedFd,
    broker: &OwnedFd,
    vsock: PathBuf,
    outside: &mut Outside<'_>,
) -> Result<u8, Error> {
    let pid = Pid::from_child(child);
    let pidfd =
        rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|error| host("pidfd")(error.into()))?;
    let socket = Arc::new(vsock);
    let mut asked = 0;
    let mut broker = Some(broker);
    let joining = Arc::new(Mutex::new(None));
    loop {
        let mut fds = vec![
            PollFd::new(&pidfd, PollFlags::IN),
            PollFd::new(signals, PollFlags::IN),
            PollFd::new(&outside.requests, PollFlags::IN),
        ];
        fds.extend(broker.map(|broker| PollFd::new(broker, PollFlags::IN)));
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(host("poll")(error.into())),
        }
        let ready = |index: usize| {
            fds.get(index)
                .is_some_and(|fd: &PollFd<'_>| !fd.revents().is_empty())
        };
        let (ended, signalled, asked_for_limits, stream) = (ready(0), ready(1), ready(2), ready(3));
        if ended {
            let status = child.wait().map_err(host("waiting for the monitor"))?;
            return Ok(status
                .code()
                .and_then(|code| u8::try_from(code).ok())
                .unwrap_or(255));
        }
        if signalled {
            let mut info = [0u8; 128];
            let _ = rustix::io::read(signals, &mut info);
            asked += 1;
            end(asked, &pidfd, &socket);
        }
        if asked_for_limits {
            let Outside {
                requests,
                guard,
                control,
            } = outside;
            set::serve(requests, guard, control);
        }
        if stream && let Some(from) = broker {
            match receive_stream(from) {
                Ok(Some(stream)) => greet(args.clone(), stream, socket.clone(), joining.clone()),
                Ok(None) => broker = None,
                Err(error) => eprintln!("mandoline-vmm: a stream of the guest: {error}"),
            }
        }
    }
}

/// The first Ctrl-C asks the guest, the second ends the monitor.
fn end(asked: u32, pidfd: &OwnedFd, socket: &Path) {
    if asked > 1 {
        eprintln!("mandoline-vmm: ending the VM");
        let _ = rustix::process::pidfd_send_signal(pidfd, Signal::TERM);
        return;
    }
    eprintln!("mandoline-vmm: asking the guest to shut down (Ctrl-C again ends it at once)");
    let socket = socket.to_owned();
    let pidfd = pidfd.try_clone();
    // In a thread, so that the second Ctrl-C is heard meanwhile.
    std::thread::spawn(move || {
        if let Err(error) = agent::shut_down(&socket) {
            eprintln!("mandoline-vmm: {error}; ending the VM");
            if let Ok(pidfd) = pidfd {
                let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::TERM);
            }
        }
    });
}

/// Takes a stream that the guest opened; `None` when the monitor is gone.
fn receive_stream(broker: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let mut text = [0u8; 256];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = rustix::net::RecvAncillaryBuffer::new(&mut space);
    let got = rustix::net::recvmsg(
        broker,
        &mut [io::IoSliceMut::new(&mut text)],
        &mut ancillary,
        rustix::net::RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut streams = ancillary.drain().filter_map(|message| match message {
        rustix::net::RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let stream = streams.next().and_then(|mut fds| fds.next());
    match (got.bytes, stream) {
        (0, None) => Ok(None),
        (_, Some(stream)) => Ok(Some(stream)),
        (_, None) => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Hears the agent say that it is up, and joins it. In a thread of its own: the guest may be slow. `joining` is held for
/// as long as that takes; it says when the guest was greeted last.
fn greet(args: RunArgs, stream: OwnedFd, socket: Arc<PathBuf>, joining: Arc<Mutex<Option<Instant>>>) {
    let started = monotonic_ns();
    std::thread::spawn(move || {
        let mut stream = std::os::unix::net::UnixStream::from(stream);
        let frame = protocol::read_frame(&mut stream).ok().flatten();
        let event = frame.and_then(|body| serde_json::from_slice::<Event>(&body).ok());
        let Some(Event::Up(hello)) = event else { return };
        // The agent opens streams for later events too; one that has not joined asks for it: the first time, and after
        // each reboot.
        let Ok(mut greeted) = joining.try_lock() else {
            return;
        };
        if hello.phase != protocol::Phase::Up {
            return;
        }
        // A guest may say it without end: once a second it is heard, and printed without what a terminal would obey.
        if let Some(last) = *greeted {
            std::thread::sleep(Duration::from_secs(1).saturating_sub(last.elapsed()));
        }
        *greeted = Some(Instant::now());
        eprintln!("mandoline-vmm: agent {} is up\r", hello.agent.escape_debug());
        if args.no_join {
            return;
        }
        match agent::join(&args, &socket) {
            Ok(reply) => {
                let all = monotonic_ns().saturating_sub(started) / 1_000_000;
                let guest = reply.timings_us.total / 1000;
                eprintln!("mandoline-vmm: joined in {all} ms (in the guest: {guest} ms)\r");
                if let Some(address) = args.address.filter(|_| args.tap.is_some()) {
                    eprintln!("mandoline-vmm: ssh root@{}\r", address.address);
                }
            }
            Err(error) => eprintln!("mandoline-vmm: {error}\r"),
        }
    });
}

/// Says how it ended, and how long the start took.
fn report(state: &mut File, started: u64) {
    let mut text = String::new();
    if state
        .rewind()
        .and_then(|()| state.read_to_string(&mut text))
        .is_err()
    {
        return;
    }
    for line in text
        .lines()
        .filter_map(|line| serde_json::from_str::<StateLine>(line).ok())
    {
        match line {
            StateLine::Phase(mark) if mark.phase != Phase::ProcessStart && mark.monotonic_ns >= started => {
                let us = (mark.monotonic_ns - started) / 1000;
                eprintln!(
                    "mandoline-vmm: {:>9}.{:03} ms  {:?}",
                    us / 1000,
                    us % 1000,
                    mark.phase
                );
            }
            StateLine::State(change) => {
                if let Some(reason) = change.reason {
                    let detail = change.detail.map(|text| format!(": {text}")).unwrap_or_default();
                    let word = match reason {
                        ExitReason::Shutdown => "the guest powered off",
                        ExitReason::Reboot => "the guest asked for a reboot",
                        ExitReason::Panic => "the guest's kernel panicked",
                        ExitReason::TripleFault => "the guest took a triple fault",
                        ExitReason::Killed => "ended by a signal",
                        ExitReason::Error => "the monitor failed",
                    };
                    eprintln!("mandoline-vmm: {word}{detail}");
                }
            }
            StateLine::Phase(_) => {}
        }
    }
}
