//! PID 1's loop: signals, streams, ssh connections, the end.
//!
//! ```text
//!   ┌─► sleep in poll() ──┬─ SIGCHLD: reap ────────────────┐
//!   │   (no timer)        ├─ a stream of the host: thread ─┤
//!   │                     ├─ an ssh connection: sshd -i ───┤
//!   │                     ├─ one to a service: thread ─────┤
//!   └─────────────────────┼────────────────────────────────┘
//!                         └─ shutdown asked, SIGTERM, SIGINT (Ctrl-Alt-Del), SIGUSR1/2, SIGPWR
//!                                 ▼
//!     SIGTERM to all ─► all gone or grace over ─► SIGKILL to all ─► all gone or 2 s
//!                                 ▼
//!     sync, remount read-only ─► exit register ─► reset
//! ```

use std::net::TcpListener;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mandoline_api::agent::{EXIT_REBOOT, EXIT_SHUTDOWN, Event, Initscript, Phase, ShutdownMode};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::system::{RebootCommand, reboot};

use crate::agent::{Agent, Asked, Command};
use crate::children::Kind;
use crate::link::Listener;
use crate::log::{info, warning};
use crate::{mark, root, server, services, sshd};

/// How long processes may take to die of SIGKILL (of what hangs in the kernel nobody can wait for the end).
const KILL_GRACE: Duration = Duration::from_secs(2);

/// How long the loop leaves its listeners alone after one of them failed.
const PAUSE: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// What PID 1 hears of: children, Ctrl-Alt-Del (SIGINT), and the signals by which `poweroff` and `reboot`
/// speak to it, those of busybox and sysvinit.
const SIGNALS: [libc::c_int; 6] = [
    libc::SIGCHLD,
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGPWR,
];

/// Blocks PID 1's signals, in this thread and all that it starts, and answers a descriptor on which they
/// arrive.
pub(crate) fn signals() -> std::io::Result<OwnedFd> {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set that the other calls use; all pointers live through the calls.
    let fd = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in SIGNALS {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        if libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: signalfd just made this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// PID 1.
pub(crate) struct Init {
    /// The agent.
    pub(crate) agent: Arc<Agent>,
    /// What its threads ask.
    pub(crate) asked: Asked,
    /// [`signals`].
    pub(crate) signals: OwnedFd,
    /// The host's streams; a guest without vsock has none.
    pub(crate) listener: Option<Listener>,
    /// Whether this is a machine, with an exit register, and no test.
    pub(crate) machine: bool,
}

/// What a joined sliver listens on.
#[derive(Default)]
struct Doors {
    ssh: Option<TcpListener>,
    services: Vec<services::Listener>,
}

/// A wish that ends the loop.
struct End {
    mode: ShutdownMode,
    grace: Duration,
}

impl Init {
    /// Serves until the machine ends. Whatever one turn of the loop does, there is a next: the end of PID 1
    /// would be a kernel panic.
    pub(crate) fn run(mut self) -> ! {
        let mut doors = Doors::default();
        let mut paused = false;
        // What ended before its signal could be heard.
        self.reap();
        let end = loop {
            match catch_unwind(AssertUnwindSafe(|| self.turn(&mut doors, &mut paused))) {
                Ok(Some(end)) => break end,
                Ok(None) => {}
                Err(_) => {
                    warning!("a turn of the main loop panicked");
                    paused = true;
                }
            }
        };
        drop(doors);
        self.listener = None;
        let mode = end.mode;
        if catch_unwind(AssertUnwindSafe(|| self.stop(end))).is_err() {
            warning!("the shutdown panicked");
        }
        self.reset(mode)
    }

    /// One turn: sleep until something happens, see to it.
    fn turn(&self, doors: &mut Doors, paused: &mut bool) -> Option<End> {
        let mut fds = vec![
            PollFd::new(&self.signals, PollFlags::IN),
            PollFd::new(&*self.asked.wake, PollFlags::IN),
        ];
        let wait = if std::mem::take(paused) {
            Some(PAUSE)
        } else {
            // Absent listeners leave their places to the descriptor before them, which is never acted on twice.
            fds.extend(
                self.listener
                    .as_ref()
                    .map(|l| PollFd::from_borrowed_fd(l.as_fd(), PollFlags::IN)),
            );
            fds.extend(
                doors
                    .ssh
                    .as_ref()
                    .map(|l| PollFd::from_borrowed_fd(l.as_fd(), PollFlags::IN)),
            );
            let services = doors.services.iter();
            fds.extend(services.map(|l| PollFd::from_borrowed_fd(l.as_fd(), PollFlags::IN)));
            None
        };
        if let Err(e) = poll(&mut fds, wait.as_ref()) {
            if e != rustix::io::Errno::INTR {
                warning!("poll: {e}");
                *paused = true;
            }
            return None;
        }
        let ready: Vec<i32> = fds
            .iter()
            .filter(|fd| !fd.revents().is_empty())
            .map(|fd| fd.as_fd().as_raw_fd())
            .collect();
        drop(fds);

        if ready.contains(&self.signals.as_raw_fd())
            && let Some(end) = self.hear()
        {
            return Some(end);
        }
        if ready.contains(&self.asked.wake.as_raw_fd()) {
            let _ = rustix::io::read(&*self.asked.wake, &mut [0u8; 8]);
            for command in self.asked.commands.try_iter() {
                match command {
                    Command::Ssh(listener) => doors.ssh = Some(listener),
                    Command::Services(listeners) => doors.services = listeners,
                    Command::Shutdown { mode, grace_ms } => {
                        return Some(End {
                            mode,
                            grace: Duration::from_millis(grace_ms.into()),
                        });
                    }
                }
            }
        }
        if let Some(listener) = self
            .listener
            .as_ref()
            .filter(|l| ready.contains(&l.as_fd().as_raw_fd()))
        {
            match listener.accept() {
                Ok(Some(stream)) => server::serve(&self.agent, stream),
                Ok(None) => {}
                Err(e) => {
                    warning!("accepting a stream: {e}");
                    *paused = true;
                }
            }
        }
        if let Some(listener) = doors.ssh.as_ref().filter(|l| ready.contains(&l.as_raw_fd()))
            && let Err(e) = sshd::accept(listener, &self.agent.children)
        {
            warning!("accepting an ssh connection: {e}");
            *paused = true;
        }
        for listener in &doors.services {
            if ready.contains(&listener.as_fd().as_raw_fd())
                && let Err(e) = services::accept(listener)
            {
                warning!("accepting a connection to a service: {e}");
                *paused = true;
            }
        }
        None
    }

    /// Takes in the signals that wait.
    fn hear(&self) -> Option<End> {
        let mut end = None;
        let mut info = [0u8; 128];
        while let Ok(bytes) = rustix::io::read(&self.signals, &mut info[..]) {
            let number = info.get(..bytes).and_then(|info| info.first_chunk::<4>());
            let mode = match number.map(|number| i32::from_ne_bytes(*number)) {
                Some(libc::SIGCHLD) => {
                    self.reap();
                    continue;
                }
                Some(libc::SIGINT | libc::SIGTERM) => ShutdownMode::Reboot,
                Some(_) => ShutdownMode::Poweroff,
                None => break,
            };
            end = Some(End {
                mode,
                grace: Duration::from_secs(5),
            });
        }
        end
    }

    /// Reaps; `true`: no other process is left.
    fn reap(&self) -> bool {
        let (ended, alone) = self.agent.children.reap();
        for (kind, status) in ended {
            if kind == Kind::Initscript {
                let ok = status.code == Some(0);
                let state = if ok {
                    Initscript::Ok
                } else {
                    Initscript::Failed(status)
                };
                let agent = Arc::clone(&self.agent);
                // Telling the host may have to wait for it; PID 1 must not.
                let told = std::thread::Builder::new()
                    .stack_size(128 * 1024)
                    .spawn(move || agent.initscript_done(state));
                if told.is_err() {
                    self.agent.set_initscript(state);
                }
            }
        }
        alone
    }

    fn stop(&self, end: End) {
        self.agent.enter(Phase::Stopping);
        info!("shutting down ({:?})", end.mode);
        let agent = Arc::clone(&self.agent);
        let mode = end.mode;
        let _ = std::thread::Builder::new()
            .stack_size(128 * 1024)
            .spawn(move || agent.tell(&Event::Stopping { mode }));
        for (signal, grace) in [(libc::SIGTERM, end.grace), (libc::SIGKILL, KILL_GRACE)] {
            // SAFETY: no memory is involved; -1 means every process but PID 1 itself, which this is.
            unsafe {
                libc::kill(-1, signal);
                // What was stopped must run to end.
                libc::kill(-1, libc::SIGCONT);
            }
            if self.wait_alone(grace) {
                break;
            }
        }
        root::settle();
    }

    /// Waits until no other process is left, or `grace` is over; `true`: none is.
    fn wait_alone(&self, grace: Duration) -> bool {
        let began = Instant::now();
        loop {
            if self.reap() {
                return true;
            }
            let Some(left) = grace.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) else {
                return false;
            };
            let left = Timespec::try_from(left).unwrap_or(PAUSE);
            let _ = poll(&mut [PollFd::new(&self.signals, PollFlags::IN)], Some(&left));
            while rustix::io::read(&self.signals, &mut [0u8; 128]).is_ok() {}
        }
    }

    /// Ends the machine. A sliver has no power button (no ACPI): the exit register tells the monitor whether
    /// the reset means the end or a new start.
    fn reset(&self, mode: ShutdownMode) -> ! {
        if self.machine {
            let reason = match mode {
                ShutdownMode::Poweroff => EXIT_SHUTDOWN,
                ShutdownMode::Reboot => EXIT_REBOOT,
            };
            if let Err(e) = mark::exit_register(reason) {
                warning!("exit register: {e}");
            }
        }
        // In a test, in a pid namespace of its own, these end the namespace.
        let command = match mode {
            ShutdownMode::Poweroff if !self.machine => RebootCommand::PowerOff,
            _ => RebootCommand::Restart,
        };
        if let Err(e) = reboot(command) {
            warning!("reboot: {e}");
        }
        loop {
            std::thread::park();
        }
    }
}
