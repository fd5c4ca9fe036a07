//! The running monitor: the event loop, requests of the control socket, signals, and the end.
//!
//! ```text
//!            start                 Pause                    Resume
//! (built) ----------> Running -------------> Paused --------------------> Running
//!                      ^ |                     |
//!                      | +---- exit latch -----+--> state file, console flushed, exit status
//!                      |           |
//!                      +- reset <--+ the guest reboots, and lived for a second at least
//! ```
//!
//! How a running VM becomes parked and wakes is drawn in [`sleep`].

mod console;
mod control;
pub mod sleep;

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use mandoline_api::monitor::{ExitReason, InstanceState, RunState};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::{Slot, Subscription};
use crate::exit::Exit;
use crate::machine::Machine;
use crate::metrics::{self, Recorder};
use crate::monitor::console::ConsoleEvents;
use crate::monitor::control::ControlEvents;
use crate::state::{Phases, Since, StateFile};
use crate::vcpu;

/// The event loop failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused something.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The event manager failed.
    #[error("event loop: {0}")]
    Loop(event_manager::Error),
    /// A vCPU could not be started.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
}

/// Something to be done at the devices, in the event loop: what it says is the answer.
pub type Work = Box<dyn FnOnce(&[Arc<Slot>]) -> Result<serde_json::Value, String> + Send>;

/// What the control socket asks of the event loop.
pub enum Request {
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
    /// Stand still and give memory back, if the guest sleeps.
    Park,
    /// Only look.
    Look,
    /// Say what was counted.
    Metrics,
    /// Write a line of metrics.
    FlushMetrics,
    /// Do this at the devices.
    Work(Work),
}

/// What the event loop knows, for the control socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Whether the vCPUs run.
    pub state: InstanceState,
    /// Bytes of console output that were lost.
    pub console_lost: u64,
    /// What parking did, where there is such.
    pub sleep: Option<sleep::Counters>,
    /// What [`Request::Work`] said, or what was counted; null otherwise.
    pub said: serde_json::Value,
}

/// A request and where its answer, or why it was refused, goes.
pub type Call = (Request, Sender<Result<Report, String>>);

/// The event loop's end of the control socket.
pub struct Calls {
    /// Requests.
    pub receiver: Receiver<Call>,
    /// Signalled with each.
    pub event: Arc<EventFd>,
}

/// What the console is connected to.
#[derive(Default)]
pub struct Terminal {
    /// The guest's input; non-blocking.
    pub input: Option<File>,
    /// The guest's output; non-blocking, or a regular file.
    pub output: Option<File>,
}

/// Blocks the signals that end a VM (SIGTERM and, if `interrupt`, SIGINT), in this thread and those it starts, and
/// returns a descriptor of them.
pub fn signals(interrupt: bool) -> Result<OwnedFd, Error> {
    // SAFETY: the set is initialised by sigemptyset before it is used; the descriptor is new and owned here.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        if interrupt {
            libc::sigaddset(&mut set, libc::SIGINT);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        match libc::signalfd(-1, &set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) {
            fd @ 0.. => Ok(OwnedFd::from_raw_fd(fd)),
            _ => Err(Error::Host {
                what: "signalfd",
                source: io::Error::last_os_error(),
            }),
        }
    }
}

/// Everything that the event loop needs beside the machine.
pub struct Parts {
    /// Where the console goes.
    pub terminal: Terminal,
    /// Where states and phases go.
    pub state: StateFile,
    /// Phases.
    pub phases: Arc<Phases>,
    /// From [`signals`].
    pub signals: OwnedFd,
    /// The control socket's requests.
    pub calls: Option<Calls>,
    /// Puts the event loop's thread under its filter, after the vCPUs were started.
    pub confine: Box<dyn FnOnce() -> Result<(), String>>,
    /// Puts a vCPU's thread under its filter.
    pub confine_vcpu: fn() -> Result<(), String>,
    /// Since when the boot timer counts.
    pub boot_timer_from: Since,
    /// Where the metrics go.
    pub metrics: metrics::Options,
    /// A guest that reboots after it lived for this long starts again in this process; `None`: never.
    pub restart_after: Option<Duration>,
}

/// A guest that reboots sooner than this after its start is left to the caller, who knows how often it tried.
pub const LEAST_LIFE: Duration = Duration::from_secs(1);

type Loop = EventManager<Box<dyn MutEventSubscriber>>;

/// Runs the machine to its end and returns why it ended; the state file has it too.
pub fn run(mut machine: Machine, parts: Parts) -> Result<Exit, Error> {
    let mut events: Loop = EventManager::new_with_capacity(64).map_err(Error::Loop)?;
    for slot in &machine.slots {
        events.add_subscriber(Box::new(Subscription(slot.clone())));
    }
    let terminal = ConsoleEvents {
        console: machine.console.clone(),
        uart: machine.uart.clone(),
        input: parts.terminal.input,
        output: parts.terminal.output,
    };
    let terminal = Rc::new(RefCell::new(terminal));
    events.add_subscriber(Box::new(Shared(terminal.clone())));

    vcpu::install_signal()?;
    let mut handles = Vec::new();
    for (cpu, vcpu) in std::mem::take(&mut machine.vcpus).into_iter().enumerate() {
        handles.push(vcpu::start(
            cpu as u8,
            vcpu,
            machine.shared.clone(),
            parts.confine_vcpu,
        )?);
    }
    let recorder = Recorder::new(parts.metrics, machine.shared.exits.clone(), parts.phases.clone());
    let recorder = recorder.map_err(|source| Error::Host {
        what: "timer of the metrics",
        source,
    })?;
    let control = Rc::new(RefCell::new(ControlEvents {
        slots: machine.slots.clone(),
        console: machine.console.clone(),
        handles,
        instance: InstanceState::Running,
        state: parts.state,
        phases: parts.phases,
        signals: parts.signals,
        exit: machine.shared.exit.clone(),
        marked: machine.control.clone(),
        calls: parts.calls,
        boot_timer_from: parts.boot_timer_from,
        recorder,
        sleeper: machine.sleeper.take(),
    }));
    control.borrow_mut().state.state(RunState::Running, None, None);
    events.add_subscriber(Box::new(Shared(control.clone())));

    let exit = machine.shared.exit.clone();
    if let Err(error) = (parts.confine)() {
        exit.close(ExitReason::Error, Some(error));
    }
    loop {
        while !exit.is_closed() {
            if let Err(error) = events.run()
                && !matches!(&error, event_manager::Error::Epoll(errno) if errno.errno() == libc::EINTR)
            {
                exit.close(ExitReason::Error, Some(format!("event loop: {error}")));
            }
        }
        match parts.restart_after {
            Some(least) if control.borrow_mut().restart(&machine, least) => {}
            _ => break,
        }
    }
    let mut control = control.borrow_mut();
    for handle in &control.handles {
        handle.stop();
    }
    terminal.borrow_mut().hand_on();
    control.flush_metrics();
    // The latch is closed, so there is a reason.
    let exit = exit.get().unwrap_or(Exit {
        reason: ExitReason::Error,
        detail: None,
    });
    let ControlEvents { state, phases, .. } = &mut *control;
    state.phases(phases);
    state.state(RunState::Exited, Some(exit.reason), exit.detail.clone());
    tracing::info!(reason = ?exit.reason, detail = exit.detail, "the VM ended");
    // KVM's VM is left to the end of the process: closing it here would only make the caller wait.
    std::mem::forget(machine);
    Ok(exit)
}

/// A subscriber that its owner keeps a hand on.
struct Shared<T>(Rc<RefCell<T>>);

impl<T: MutEventSubscriber> MutEventSubscriber for Shared<T> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.0.borrow_mut().init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        self.0.borrow_mut().process(events, ops);
    }
}

fn watch(ops: &mut EventOps<'_>, events: Events) {
    if let Err(error) = ops.add(events) {
        tracing::error!(%error, "a descriptor cannot be watched");
    }
}
