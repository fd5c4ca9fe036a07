//! `mandoline-vmm vm`: from the command line to the guest's end, in the order that the jail demands: open
//! everything, build the machine, give everything up, run.
//!
//! ```text
//!  --config-file ---------------------------> build ----> boot (jail, threads) ----> the guest's end
//!  --api-sock alone --> configure --------->    |
//!                           ^   InstanceStart   |
//!                           +--- it failed -----+
//! ```

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;

use mandoline_api::monitor::{ExitReason, Phase, RunState, VSOCK_OUT_KEPT_FD, VmConfig};
use rustix::fs::OFlags;
use vmm_sys_util::eventfd::EventFd;

use crate::api::configuring::Configuring;
use crate::api::http::Response;
use crate::api::running::Running;
use crate::api::server::{Left, Server, Waiting};
use crate::cli::{OnReboot, VmArgs};
use crate::devices::vsock::outward::Outward;
use crate::exit::{Exit, ExitLatch};
use crate::fds::{self, Inherited, Paths};
use crate::jail::seccomp::Role;
use crate::jail::{self, Identity, seccomp};
use crate::machine::Machine;
use crate::metrics::{ApiCounts, Startup};
use crate::monitor::{Calls, Parts, Terminal};
use crate::state::{Phases, Since, StateFile};
use crate::{config, log, machine, metrics, monitor};

/// The monitor could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No configuration and no control socket.
    #[error("there is neither a configuration file nor a control socket")]
    Nothing,
    /// A descriptor or path.
    #[error(transparent)]
    Fd(#[from] fds::Error),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// The jail.
    #[error(transparent)]
    Jail(#[from] jail::Error),
    /// A filter.
    #[error(transparent)]
    Seccomp(#[from] seccomp::Error),
    /// The event loop.
    #[error(transparent)]
    Monitor(#[from] monitor::Error),
    /// The host.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
}

fn host(what: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Host { what, source }
}

/// Runs the VM; the reason why it ended is in the state file, too.
pub fn run(args: &VmArgs) -> Exit {
    let phases = Arc::new(Phases::default());
    phases.mark(Phase::Main);
    if let Some(ns) = args.started() {
        phases.mark_at(Phase::ProcessStart, ns);
    }
    // The state file comes first, so that whatever fails afterwards is in it.
    let opened = Inherited::adopt(&args.fds).and_then(|mut inherited| {
        let file = args
            .state_file
            .as_deref()
            .map(|path| inherited.sink("state file", path))
            .transpose()?;
        let log = match args.log.as_deref() {
            Some(path) => inherited.sink("log", path)?,
            None => duplicate(std::io::stderr().lock())?,
        };
        Ok((inherited, file, log))
    });
    let (inherited, state_file, log) = match opened {
        Ok(opened) => opened,
        Err(error) => return failed(&error.into(), &mut StateFile::default()),
    };
    let log_fd = log.as_raw_fd();
    log::start(log);
    // Kept apart from the one that moves into the event loop: a failure before that still needs one.
    let mut state = StateFile::new(state_file.as_ref().and_then(|file| file.try_clone().ok()));
    match start(args, inherited, StateFile::new(state_file), &phases, log_fd) {
        Ok(exit) => exit,
        Err(error) => failed(&error, &mut state),
    }
}

fn failed(error: &Error, state: &mut StateFile) -> Exit {
    let text = error.to_string();
    eprintln!("mandoline-vmm: {text}");
    state.state(RunState::Exited, Some(ExitReason::Error), Some(text.clone()));
    Exit {
        reason: ExitReason::Error,
        detail: Some(text),
    }
}

fn start(
    args: &VmArgs,
    mut inherited: Inherited,
    state: StateFile,
    phases: &Arc<Phases>,
    log_fd: i32,
) -> Result<Exit, Error> {
    log::change(&args.logger(), &mut inherited)?;
    // `run` deals with Ctrl-C itself, and the terminal sends it to both.
    let signals = monitor::signals(!args.die_with_parent)?;
    let server = args
        .api_sock
        .as_deref()
        .map(|path| control_socket(path, &mut inherited))
        .transpose()?;
    let startup = metrics::startup(args.started(), args.start_time_cpu_us, args.parent_cpu_time_us);
    match (&args.config_file, server) {
        (Some(path), server) => {
            let config = read_config(path, &mut inherited)?;
            if let Some(logger) = &config.logger {
                log::change(logger, &mut inherited)?;
            }
            let built = build(args, config, inherited, phases.clone())?;
            let from = Since {
                monotonic_ns: args.started().or(phases.reached(Phase::Main)).unwrap_or(0),
                cpu_ns: args.start_time_cpu_us.unwrap_or(0).saturating_mul(1000),
            };
            let told = Told {
                state,
                signals,
                log_fd,
                startup,
                counts: Arc::default(),
                boot_timer_from: from,
            };
            boot(args, built, server.map(|server| (server, None)), told)
        }
        (None, Some(server)) => {
            let told = Told {
                state,
                signals,
                log_fd,
                startup,
                counts: Arc::default(),
                boot_timer_from: Since::default(),
            };
            configure(args, server, inherited, phases, told)
        }
        (None, None) => Err(Error::Nothing),
    }
}

/// Serves the control socket until it says that the VM shall start, and it can.
fn configure(
    args: &VmArgs,
    mut server: Server,
    inherited: Inherited,
    phases: &Arc<Phases>,
    mut told: Told,
) -> Result<Exit, Error> {
    if args.die_with_parent {
        jail::die_with_parent()?;
    }
    let mut configuring = Configuring {
        id: args.id.clone(),
        config: VmConfig::default(),
        fds: inherited,
        counts: told.counts.clone(),
    };
    loop {
        let left = server
            .serve(Some(told.signals.as_fd()), &mut |request, fds| {
                configuring.answer(request, fds)
            })
            .map_err(host("control socket"))?;
        let Left::Waiting(waiting) = left else {
            let detail = Some("a signal, before boot".to_owned());
            told.state
                .state(RunState::Exited, Some(ExitReason::Killed), detail.clone());
            return Ok(Exit {
                reason: ExitReason::Killed,
                detail,
            });
        };
        told.boot_timer_from = Since::now();
        // Whatever the attempt takes and marks is its own: if it fails, all is as before.
        let attempt = configuring.fds.try_clone().map_err(Error::from).and_then(|fds| {
            let config = configuring.config.clone();
            build(args, config, fds, Arc::new(phases.anew()))
        });
        match attempt {
            Ok(built) => {
                drop(configuring);
                return boot(args, built, Some((server, Some(waiting))), told);
            }
            Err(error) => {
                tracing::error!("InstanceStart: {error}");
                server.answer(&waiting, &Response::fault(400, error.to_string()));
            }
        }
    }
}

/// What the start hands on to the running monitor.
struct Told {
    state: StateFile,
    signals: OwnedFd,
    log_fd: i32,
    startup: Startup,
    counts: Arc<ApiCounts>,
    boot_timer_from: Since,
}

/// Everything open, and the machine built of it.
struct Built {
    config: VmConfig,
    inherited: Inherited,
    phases: Arc<Phases>,
    terminal: Terminal,
    metrics: Option<File>,
    machine: Machine,
    /// The role of the event loop's thread.
    devices: Role,
}

fn build(
    args: &VmArgs,
    config: VmConfig,
    mut inherited: Inherited,
    phases: Arc<Phases>,
) -> Result<Built, Error> {
    let terminal = terminal(args, &config, &mut inherited)?;
    let metrics = metrics_file(args, &config, &mut inherited)?;
    let socket = config.vsock.as_ref().map(|vsock| Path::new(&vsock.uds_path));
    let made = socket.filter(|path| !path.exists());
    let opened = config::open(&config, &mut inherited)
        .map_err(Error::from)
        .and_then(|spec| {
            let by_path = spec
                .vsock
                .as_ref()
                .is_some_and(|vsock| matches!(vsock.outward, Outward::Path(_)));
            phases.mark(Phase::ConfigRead);
            let kvm = machine::open_kvm(inherited.take("kvm"))?;
            Ok((by_path, machine::build(&kvm, spec, &phases, args.boot_timer)?))
        });
    let (by_path, machine) = opened.inspect_err(|_| {
        // The stream socket device's socket was made by this attempt: the next makes it again.
        if let Some(path) = made {
            let _ = std::fs::remove_file(path);
        }
    })?;
    Ok(Built {
        config,
        inherited,
        phases,
        terminal,
        metrics,
        machine,
        devices: if by_path {
            Role::DevicesByPath
        } else {
            Role::Devices
        },
    })
}

/// Gives everything up and runs the machine. `api`: the control socket, and the request that waits for the start.
fn boot(
    args: &VmArgs,
    built: Built,
    api: Option<(Server, Option<Waiting>)>,
    told: Told,
) -> Result<Exit, Error> {
    let Built {
        config,
        mut inherited,
        phases,
        terminal,
        metrics,
        machine,
        devices,
    } = built;
    end_on_panic(machine.shared.exit.clone());

    let identity = args
        .jail_uid
        .zip(args.jail_gid)
        .map(|(uid, gid)| Identity { uid, gid });
    let filters = args.filters();
    let paths = if identity.is_some() || args.no_paths {
        Paths::Jailed
    } else {
        Paths::Allowed
    };
    // In an empty root nothing can be needed by path.
    let needs = jail::landlock::Needs {
        files: paths == Paths::Allowed && api.is_some(),
        sockets: identity.is_none() && devices == Role::DevicesByPath,
    };
    jail::enter(identity, filters.then_some(needs))?;
    if args.die_with_parent {
        jail::die_with_parent()?;
    }
    if filters {
        seccomp::install_handler(told.log_fd).map_err(host("handler of forbidden calls"))?;
    } else {
        tracing::warn!("no seccomp, no Landlock: this monitor may make any system call; for debugging only");
    }
    phases.mark(Phase::Jailed);

    let calls = match api {
        None => None,
        Some((mut server, waiting)) => {
            // All that could fail has not. Not later, since a guest may end before anybody could answer.
            if let Some(waiting) = waiting {
                server.answer(&waiting, &Response::done());
            }
            let (calls, receiver) = channel();
            let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host("eventfd"))?;
            let event = Arc::new(event);
            let running = Running {
                id: args.id.clone(),
                config,
                calls,
                event: event.clone(),
                counts: told.counts.clone(),
                paths,
            };
            start_api(server, running, filters)?;
            Some(Calls { receiver, event })
        }
    };
    let parts = Parts {
        terminal,
        state: told.state,
        phases,
        signals: told.signals,
        calls,
        confine: if filters {
            Box::new(move || confine(devices))
        } else {
            Box::new(|| Ok(()))
        },
        confine_vcpu: if filters {
            || confine(Role::Vcpu)
        } else {
            || Ok(())
        },
        boot_timer_from: told.boot_timer_from,
        metrics: metrics::Options {
            id: args.id.clone(),
            file: metrics,
            filters,
            api: told.counts,
            startup: told.startup,
        },
        restart_after: (args.on_reboot == OnReboot::Restart).then_some(monitor::LEAST_LIFE),
    };
    // For the node manager that comes after this one; see `VSOCK_OUT_KEPT_FD`.
    let kept = inherited.take(VSOCK_OUT_KEPT_FD);
    // What nothing took is closed before the guest runs.
    drop(inherited);
    let exit = monitor::run(machine, parts)?;
    drop(kept);
    Ok(exit)
}

fn confine(role: Role) -> Result<(), String> {
    seccomp::confine(role).map_err(|error| error.to_string())
}

fn read_config(path: &str, inherited: &mut Inherited) -> Result<VmConfig, Error> {
    let mut text = String::new();
    let mut file = inherited.file("configuration file", path, false)?;
    // An inherited file may stand where its writer left it; a pipe cannot be rewound, and need not be.
    let _ = file.rewind();
    file.read_to_string(&mut text)
        .map_err(host("reading the configuration file"))?;
    Ok(config::parse(&text)?)
}

fn duplicate(fd: impl std::os::fd::AsFd) -> Result<File, fds::Error> {
    let fd = fd.as_fd().try_clone_to_owned();
    fd.map(File::from)
        .map_err(|source| fds::open_error("log", "standard error".as_ref(), source))
}

/// Connects the console. Descriptors that were handed over become non-blocking; standard input and output,
/// which belong to others too (a terminal's do), are opened anew for that.
fn terminal(args: &VmArgs, config: &VmConfig, inherited: &mut Inherited) -> Result<Terminal, Error> {
    let configured = config
        .serial
        .as_ref()
        .and_then(|serial| serial.serial_out_path.as_deref());
    match args.serial.as_deref().or(configured) {
        Some(path) => {
            let output = inherited.sink("serial", path)?;
            nonblocking(&output)?;
            Ok(Terminal {
                input: None,
                output: Some(output),
            })
        }
        None => Ok(Terminal {
            input: reopen(0, OFlags::RDONLY),
            output: reopen(1, OFlags::WRONLY),
        }),
    }
}

/// Opens where the metrics go.
fn metrics_file(args: &VmArgs, config: &VmConfig, inherited: &mut Inherited) -> Result<Option<File>, Error> {
    let configured = config.metrics.as_ref().map(|metrics| &metrics.metrics_path);
    let Some(path) = args.metrics_path.as_ref().or(configured) else {
        return Ok(None);
    };
    let file = inherited.sink("metrics_path", path)?;
    nonblocking(&file)?;
    Ok(Some(file))
}

fn reopen(number: i32, access: OFlags) -> Option<File> {
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::APPEND;
    let path = format!("/proc/self/fd/{number}");
    if let Ok(fd) = rustix::fs::open(path, flags, rustix::fs::Mode::empty()) {
        return Some(fd.into());
    }
    // A socket cannot be opened by its name: share it.
    // SAFETY: only borrowed for the call; if it is closed, the call fails.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
    let file = File::from(rustix::io::dup(borrowed).ok()?);
    nonblocking(&file).ok()?;
    Some(file)
}

fn nonblocking(file: &File) -> Result<(), Error> {
    let failed = |error: rustix::io::Errno| host("serial or metrics: O_NONBLOCK")(error.into());
    let flags = rustix::fs::fcntl_getfl(file).map_err(failed)?;
    rustix::fs::fcntl_setfl(file, flags | OFlags::NONBLOCK).map_err(failed)
}

fn control_socket(path: &str, inherited: &mut Inherited) -> Result<Server, Error> {
    let listener = match inherited.named("control socket", path)? {
        Some(fd) => fd.into(),
        None => UnixListener::bind(path)
            .map_err(|source| fds::open_error("control socket", path.as_ref(), source))?,
    };
    Server::new(listener).map_err(host("control socket"))
}

fn start_api(mut server: Server, mut running: Running, filters: bool) -> Result<(), Error> {
    let role = match running.paths {
        Paths::Allowed => Role::ApiByPath,
        Paths::Jailed => Role::Api,
    };
    std::thread::Builder::new()
        .name("api".to_owned())
        .stack_size(256 << 10)
        .spawn(move || {
            if filters && let Err(error) = confine(role) {
                tracing::error!("no control socket: {error}");
                return;
            }
            if let Err(error) = server.serve(None, &mut |request, fds| running.answer(request, fds)) {
                tracing::error!(%error, "the control socket ended");
            }
        })
        .map_err(host("starting the thread of the control socket"))?;
    Ok(())
}

/// A panic in any thread ends the VM: half a monitor must not go on.
fn end_on_panic(exit: Arc<ExitLatch>) {
    std::panic::set_hook(Box::new(move |panic| {
        let text = format!("the monitor panicked: {panic}");
        tracing::error!("{text}");
        exit.close(ExitReason::Error, Some(text));
    }));
}
