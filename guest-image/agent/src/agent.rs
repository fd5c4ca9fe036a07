//! The agent's state, shared by the main loop and the threads that serve streams.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mandoline_api::agent::{
    Event, HelloReply, Initscript, Join, JoinReply, Phase, ShutdownMode, StatusReply, VERSION,
};
use rustix::event::EventfdFlags;

use crate::children::{Children, Kind};
use crate::link::Events;
use crate::mark::boot_ns;

/// What threads ask of the main loop.
pub(crate) enum Command {
    /// Serve sshd's port.
    Ssh(std::net::TcpListener),
    /// Serve these ways to services of the node.
    Services(Vec<crate::services::Listener>),
    /// Shut the sliver down.
    Shutdown {
        /// Whether it should run again.
        mode: ShutdownMode,
        /// Milliseconds between SIGTERM and SIGKILL.
        grace_ms: u32,
    },
}

/// How far joining has come. Its lock is held while a join is done.
#[derive(Default)]
pub(crate) struct Life {
    /// The disk that the root is on, once it is.
    pub(crate) root: Option<Option<String>>,
    /// sshd's port listens.
    pub(crate) listening: bool,
    /// The join that was done, and its answer.
    pub(crate) joined: Option<(Box<Join>, JoinReply)>,
}

/// The agent.
pub(crate) struct Agent {
    /// Processes.
    pub(crate) children: Arc<Children>,
    /// How far joining has come.
    pub(crate) life: Mutex<Life>,
    events: Events,
    phase: Mutex<Phase>,
    initscript: Mutex<Initscript>,
    ssh_listening: AtomicBool,
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
    mark_ns: u64,
    listen_ns: u64,
}

/// The main loop's end of [`Agent::ask`].
pub(crate) struct Asked {
    /// What is asked.
    pub(crate) commands: Receiver<Command>,
    /// Readable when something is.
    pub(crate) wake: Arc<OwnedFd>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Agent {
    /// An agent that is up. `mark_ns`: guest time of the first byte on the serial port.
    pub(crate) fn new(events: Events, mark_ns: u64) -> std::io::Result<(Agent, Asked)> {
        let wake = Arc::new(rustix::event::eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?);
        let (sender, commands) = channel();
        let agent = Agent {
            children: Arc::default(),
            life: Mutex::default(),
            events,
            phase: Mutex::new(Phase::Up),
            initscript: Mutex::default(),
            ssh_listening: AtomicBool::new(false),
            commands: sender,
            wake: Arc::clone(&wake),
            mark_ns,
            listen_ns: boot_ns(),
        };
        Ok((agent, Asked { commands, wake }))
    }

    /// Asks something of the main loop.
    pub(crate) fn ask(&self, command: Command) {
        if matches!(command, Command::Ssh(_)) {
            self.ssh_listening.store(true, Ordering::Relaxed);
        }
        // The main loop holds the receiver for as long as the machine runs.
        let _ = self.commands.send(command);
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }

    /// Where the agent is in its life.
    pub(crate) fn phase(&self) -> Phase {
        *lock(&self.phase)
    }

    /// Goes on to `phase`; nothing leads out of `Stopping`.
    pub(crate) fn enter(&self, phase: Phase) {
        let mut now = lock(&self.phase);
        if *now != Phase::Stopping {
            *now = phase;
        }
    }

    /// The boot script's state.
    pub(crate) fn set_initscript(&self, state: Initscript) {
        *lock(&self.initscript) = state;
    }

    /// Tells the host that the agent listens.
    pub(crate) fn tell_up(&self) {
        self.events.up(self.hello());
    }

    /// Tells the host something.
    pub(crate) fn tell(&self, event: &Event) {
        self.events.send(self.hello(), event);
    }

    /// Who this is.
    pub(crate) fn hello(&self) -> HelloReply {
        HelloReply {
            version: VERSION,
            agent: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            phase: self.phase(),
            mark_ns: self.mark_ns,
            listen_ns: self.listen_ns,
        }
    }

    /// How the sliver does.
    pub(crate) fn status(&self) -> StatusReply {
        let info = rustix::system::sysinfo();
        let unit = u64::from(info.mem_unit.max(1));
        StatusReply {
            phase: self.phase(),
            initscript: *lock(&self.initscript),
            uptime_ns: boot_ns(),
            ssh_listening: self.ssh_listening.load(Ordering::Relaxed),
            ssh_connections: self.children.count(Kind::Ssh),
            execs: self.children.count(Kind::Exec),
            memory_total: info.totalram.saturating_mul(unit),
            memory_free: info.freeram.saturating_mul(unit),
            tasks: u32::from(info.procs),
        }
    }
}
