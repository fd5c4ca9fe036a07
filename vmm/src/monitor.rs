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

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use mandoline_api::monitor::{ExitReason, InstanceState, Phase, RunState};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::serial::{Console, Uart};
use crate::devices::virtio::{Slot, Subscription};
use crate::exit::Exit;
use crate::machine::Machine;
use crate::state::{self, Phases, StateFile};
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
    /// Only look.
    Look,
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
    /// What [`Request::Work`] said; null otherwise.
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
    /// Since when the boot timer counts (`CLOCK_MONOTONIC` ns).
    pub boot_timer_from: u64,
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

const CONSOLE_OUTPUT: u32 = 0;
const CONSOLE_ROOM: u32 = 1;
const CONSOLE_SINK: u32 = 2;
const CONSOLE_SOURCE: u32 = 3;

/// The console's host side.
struct ConsoleEvents {
    console: Arc<Console>,
    uart: Arc<Uart>,
    input: Option<File>,
    output: Option<File>,
}

impl ConsoleEvents {
    fn hand_on(&mut self) {
        let result = match &mut self.output {
            Some(output) => self.console.drain(output),
            None => Err(io::ErrorKind::NotFound.into()),
        };
        match result {
            Ok(()) => {}
            // Edge-triggered writability goes on.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.console.discard(),
        }
    }

    fn feed(&mut self) {
        if let Some(input) = &mut self.input
            && let Err(error) = self.uart.feed(input)
        {
            tracing::info!(%error, "console: no more input");
        }
    }
}

impl MutEventSubscriber for ConsoleEvents {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(
            ops,
            Events::with_data(&self.console.output, CONSOLE_OUTPUT, EventSet::IN),
        );
        watch(
            ops,
            Events::with_data(&self.console.room, CONSOLE_ROOM, EventSet::IN),
        );
        // A regular file cannot be watched, and need not be: it never blocks.
        if let Some(output) = &self.output {
            let _ = ops.add(Events::with_data(
                output,
                CONSOLE_SINK,
                EventSet::OUT | EventSet::EDGE_TRIGGERED,
            ));
        }
        if let Some(input) = &self.input {
            let _ = ops.add(Events::with_data(
                input,
                CONSOLE_SOURCE,
                EventSet::IN | EventSet::EDGE_TRIGGERED,
            ));
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        match events.data() {
            CONSOLE_OUTPUT => {
                let _ = self.console.output.read();
                self.hand_on();
            }
            CONSOLE_ROOM => {
                let _ = self.console.room.read();
                self.feed();
            }
            CONSOLE_SINK => self.hand_on(),
            _ => self.feed(),
        }
    }
}

const CONTROL_EXIT: u32 = 0;
const CONTROL_MARKED: u32 = 1;
const CONTROL_SIGNAL: u32 = 2;
const CONTROL_CALL: u32 = 3;

/// Requests, signals, marks.
struct ControlEvents {
    slots: Vec<Arc<Slot>>,
    console: Arc<Console>,
    handles: Vec<vcpu::Handle>,
    instance: InstanceState,
    state: StateFile,
    phases: Arc<Phases>,
    signals: OwnedFd,
    exit: Arc<crate::exit::ExitLatch>,
    marked: Arc<crate::devices::control::Control>,
    calls: Option<Calls>,
    boot_timer_from: u64,
}

impl ControlEvents {
    fn pause(&mut self) {
        if self.instance == InstanceState::Running {
            for handle in &self.handles {
                handle.pause();
            }
            for slot in &self.slots {
                slot.pause();
            }
            self.instance = InstanceState::Paused;
            self.state.state(RunState::Paused, None, None);
        }
    }

    fn resume(&mut self) {
        if self.instance == InstanceState::Paused {
            for slot in &self.slots {
                slot.resume();
            }
            for handle in &self.handles {
                handle.resume();
            }
            self.instance = InstanceState::Running;
            self.state.state(RunState::Running, None, None);
        }
    }

    /// Starts a guest that rebooted anew; false when the VM ends.
    fn restart(&mut self, machine: &Machine, least: Duration) -> bool {
        let now = state::monotonic_ns();
        let lived = |since: u64| u128::from(now.saturating_sub(since)) >= least.as_nanos();
        let rebooted = self
            .exit
            .get()
            .is_some_and(|exit| exit.reason == ExitReason::Reboot);
        if !rebooted || !self.phases.reached(Phase::FirstRun).is_some_and(lived) {
            return false;
        }
        tracing::info!("the guest reboots");
        self.state.phases(&self.phases);
        self.state.state(RunState::Rebooting, None, None);
        for handle in &self.handles {
            handle.pause();
        }
        for slot in &self.slots {
            slot.pause();
        }
        if let Err(error) = machine.reset(&self.handles) {
            // The latch holds the reboot; a restart that fails is an error of its own.
            self.exit.reopen();
            self.exit
                .close(ExitReason::Error, Some(format!("reboot: {error}")));
            return false;
        }
        self.phases.guest_restarts();
        self.boot_timer_from = state::monotonic_ns();
        self.exit.reopen();
        self.instance = InstanceState::Paused;
        self.resume();
        true
    }

    fn calls(&mut self) {
        let Some(calls) = &self.calls else { return };
        let _ = calls.event.read();
        let pending: Vec<Call> = calls.receiver.try_iter().collect();
        for (request, answer) in pending {
            let mut said = Ok(serde_json::Value::Null);
            match request {
                Request::Pause => self.pause(),
                Request::Resume => self.resume(),
                Request::Look => {}
                Request::Work(work) => said = work(&self.slots),
            }
            let report = said.map(|said| Report {
                state: self.instance,
                console_lost: self.console.lost(),
                said,
            });
            // The asker may have left.
            let _ = answer.send(report);
        }
    }

    fn marked(&mut self) {
        let _ = self.marked.marked().read();
        if let Some(at) = self.phases.reached(Phase::BootTimer) {
            let us = at.saturating_sub(self.boot_timer_from) / 1000;
            // Firecracker's line, which benchmarks look for.
            tracing::info!("Guest-boot-time = {us:>6} us {} ms", us / 1000);
        }
        self.state.phases(&self.phases);
    }

    fn signal(&mut self) {
        // SAFETY: zeroes are a valid signalfd_siginfo, which read fills in.
        let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
        let size = std::mem::size_of_val(&info);
        // SAFETY: reads at most `size` bytes into a structure of that size.
        let got = unsafe { libc::read(self.signals.as_raw_fd(), (&raw mut info).cast(), size) };
        if got == size as isize {
            let detail = format!("signal {} from pid {}", info.ssi_signo, info.ssi_pid);
            self.exit.close(ExitReason::Killed, Some(detail));
        }
    }
}

impl MutEventSubscriber for ControlEvents {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(
            ops,
            Events::with_data(self.exit.event(), CONTROL_EXIT, EventSet::IN),
        );
        watch(
            ops,
            Events::with_data(self.marked.marked(), CONTROL_MARKED, EventSet::IN),
        );
        watch(
            ops,
            Events::with_data(&self.signals, CONTROL_SIGNAL, EventSet::IN),
        );
        if let Some(calls) = &self.calls {
            watch(
                ops,
                Events::with_data(calls.event.as_ref(), CONTROL_CALL, EventSet::IN),
            );
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        match events.data() {
            CONTROL_MARKED => self.marked(),
            CONTROL_SIGNAL => self.signal(),
            CONTROL_CALL => self.calls(),
            _ => {}
        }
    }
}

fn watch(ops: &mut EventOps<'_>, events: Events) {
    if let Err(error) = ops.add(events) {
        tracing::error!(%error, "a descriptor cannot be watched");
    }
}
