//! vCPU threads.
//!
//! ```text
//!            start          pause, or the latch closed          resume
//! (created) -------> Running -------------------------> Paused ---------> Running
//!                                                       |    ^
//!                                          at(): a task |    | done
//!                                                       v    |
//!                                     stop      (works in its own thread)
//!                       Running, Paused -----> Stopped (the thread ends)
//! ```
//!
//! Registers are read and written in the vCPU's own thread, by tasks ([`Handle::at`]) while it is paused. When the
//! guest ends, its vCPUs pause by themselves: the event loop decides whether they start again (reboot) or stop.
//!
//! A request sets the wanted state, then `immediate_exit` in the vCPU's shared page, then interrupts the
//! thread by a signal: a vCPU on its way into `KVM_RUN` comes straight back, so no request is ever missed.

pub mod state;

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};
use mandoline_api::monitor::{ExitReason, Phase};

use crate::bus::Bus;
use crate::exit::ExitLatch;
use crate::metrics::VcpuExits;
use crate::state::Phases;

/// What a vCPU shall do, and what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Run {
    Running,
    Paused,
    Stopped,
}

/// Something to do with a paused vCPU, in its thread.
type Task = Box<dyn FnOnce(&VcpuFd) + Send>;

struct States {
    wanted: Run,
    actual: Run,
    task: Option<Task>,
}

struct Mailbox {
    states: Mutex<States>,
    changed: Condvar,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, States> {
        self.states
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The guest has ended: pause, unless somebody wants the end already.
    fn stand_still(&self) {
        let mut states = self.lock();
        if states.wanted == Run::Running {
            states.wanted = Run::Paused;
        }
    }

    fn wait<'a>(&self, states: MutexGuard<'a, States>) -> MutexGuard<'a, States> {
        self.changed
            .wait(states)
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The byte in the vCPU's shared page that makes `KVM_RUN` return at once.
#[derive(Debug, Clone, Copy)]
struct ImmediateExit(*const AtomicU8);

// SAFETY: the byte is only ever accessed atomically, and the page it lies in stays mapped while the thread
// runs: `Vcpu` owns the mapping and moves into the thread, and `Handle` signals only before it has joined.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn set(self, value: u8) {
        // SAFETY: see the type: the page is mapped for as long as anybody can call this.
        unsafe { &*self.0 }.store(value, Ordering::SeqCst);
    }
}

/// A thread could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No thread.
    #[error("starting the thread of vCPU {cpu}: {source}")]
    Spawn {
        /// Which.
        cpu: u8,
        /// What the host said.
        source: std::io::Error,
    },
    /// The interrupting signal could not be set up.
    #[error("installing the handler of the signal that interrupts vCPUs: {0}")]
    Signal(std::io::Error),
}

/// A vCPU's thread, seen from outside.
pub struct Handle {
    mailbox: Arc<Mailbox>,
    immediate_exit: ImmediateExit,
    thread: JoinHandle<()>,
}

/// What every vCPU needs.
#[derive(Clone)]
pub struct Shared {
    /// Where its accesses go.
    pub bus: Arc<Bus>,
    /// Where it says that the VM ends.
    pub exit: Arc<ExitLatch>,
    /// Where it marks its first entry.
    pub phases: Arc<Phases>,
    /// Where each counts its exits.
    pub exits: Arc<[VcpuExits]>,
}

/// The signal that interrupts `KVM_RUN`.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Installs the signal's handler, which does nothing: that it interrupts is all.
pub fn install_signal() -> Result<(), Error> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: a zeroed sigaction is valid; the handler touches nothing.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(kick_signal(), &action, std::ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(Error::Signal(std::io::Error::last_os_error()))
    }
}

/// Starts the thread of vCPU `cpu`. `confine` runs first in it and puts it under its filter; when that fails
/// the VM ends.
pub fn start(
    cpu: u8,
    mut vcpu: VcpuFd,
    shared: Shared,
    confine: impl FnOnce() -> Result<(), String> + Send + 'static,
) -> Result<Handle, Error> {
    let mailbox = Arc::new(Mailbox {
        states: Mutex::new(States {
            wanted: Run::Running,
            actual: Run::Running,
            task: None,
        }),
        changed: Condvar::new(),
    });
    let immediate_exit = ImmediateExit((&raw const vcpu.get_kvm_run().immediate_exit).cast());
    let inside = mailbox.clone();
    let thread = std::thread::Builder::new()
        .name(format!("vcpu{cpu}"))
        // The loop below is shallow; device code on it is register accesses.
        .stack_size(128 << 10)
        .spawn(move || {
            match confine() {
                Ok(()) => run(cpu, &mut vcpu, &shared, &inside, immediate_exit),
                Err(error) => shared
                    .exit
                    .close(ExitReason::Error, Some(format!("vCPU {cpu}: {error}"))),
            }
            inside.lock().actual = Run::Stopped;
            inside.changed.notify_all();
            // The vCPU's page must stay mapped until nobody can set `immediate_exit` any more: the process
            // ends with the VM, so it is left to that.
            std::mem::forget(vcpu);
        })
        .map_err(|source| Error::Spawn { cpu, source })?;
    Ok(Handle {
        mailbox,
        immediate_exit,
        thread,
    })
}

impl Handle {
    /// Stands the vCPU still; returns when it does.
    pub fn pause(&self) {
        self.want(Run::Paused);
    }

    /// Lets it run again.
    pub fn resume(&self) {
        self.want(Run::Running);
    }

    /// Lets `work` at the vCPU, which must be paused; `None` if its thread has ended.
    pub fn at<T: Send + 'static>(&self, work: impl FnOnce(&VcpuFd) -> T + Send + 'static) -> Option<T> {
        let (sender, receiver) = std::sync::mpsc::channel();
        {
            let mut states = self.mailbox.lock();
            if states.actual != Run::Paused {
                return None;
            }
            states.task = Some(Box::new(move |vcpu| {
                // The receiver waits below.
                let _ = sender.send(work(vcpu));
            }));
            self.mailbox.changed.notify_all();
        }
        receiver.recv().ok()
    }

    /// CPU time that the thread has used.
    pub fn cpu_time(&self) -> std::time::Duration {
        use std::os::unix::thread::JoinHandleExt;
        let mut clock = 0;
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the thread is not joined (we hold its handle), so its id is valid; both calls write one value each.
        let known = unsafe {
            libc::pthread_getcpuclockid(self.thread.as_pthread_t(), &mut clock) == 0
                && libc::clock_gettime(clock, &mut time) == 0
        };
        if !known {
            return std::time::Duration::ZERO;
        }
        let (seconds, ns) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
        std::time::Duration::new(seconds.unwrap_or(0), ns.unwrap_or(0))
    }

    /// Ends the thread; returns when it is out of the guest.
    pub fn stop(&self) {
        self.want(Run::Stopped);
    }

    fn want(&self, wanted: Run) {
        let mut states = self.mailbox.lock();
        states.wanted = wanted;
        self.mailbox.changed.notify_all();
        if states.actual == Run::Running && wanted != Run::Running {
            self.immediate_exit.set(1);
            use std::os::unix::thread::JoinHandleExt;
            // SAFETY: the thread is not joined (we hold its handle), so its id is valid.
            unsafe { libc::pthread_kill(self.thread.as_pthread_t(), kick_signal()) };
        }
        while states.actual != wanted && states.actual != Run::Stopped {
            states = self.mailbox.wait(states);
        }
    }
}

/// Runs the guest until `stop` is asked for.
fn run(cpu: u8, vcpu: &mut VcpuFd, shared: &Shared, mailbox: &Mailbox, immediate_exit: ImmediateExit) {
    let Shared {
        bus,
        exit,
        phases,
        exits,
    } = shared;
    // As many as vCPUs; one without counters counts for nobody.
    let nobody = VcpuExits::default();
    let exits = exits.get(usize::from(cpu)).unwrap_or(&nobody);
    let failed = |what: String| {
        exits.fatal.count();
        exit.close(ExitReason::Error, Some(format!("vCPU {cpu}: {what}")));
    };
    loop {
        if exit.is_closed() {
            mailbox.stand_still();
            if !attend(vcpu, mailbox, immediate_exit) {
                return;
            }
        }
        phases.mark(Phase::FirstRun);
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                exits.io_out.count();
                bus.port_write(port, data);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                exits.io_in.count();
                bus.port_read(port, data);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                exits.mmio_read.count();
                bus.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                exits.mmio_write.count();
                bus.write(address, data);
            }
            Ok(VcpuExit::Shutdown) => exit.close(ExitReason::TripleFault, Some(where_it_stands(cpu, vcpu))),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
            Ok(VcpuExit::FailEntry(reason, _)) => {
                failed(format!("KVM refused to enter the guest: {reason:#x}"))
            }
            Ok(VcpuExit::InternalError) => {
                let stands = where_it_stands(cpu, vcpu);
                failed(format!("KVM cannot emulate what the guest does ({stands})"));
            }
            Ok(other) => {
                let text = format!("{other:?}");
                failed(format!("exit of KVM that the monitor does not know: {text}"));
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                exits.interrupted.count();
                if !attend(vcpu, mailbox, immediate_exit) {
                    return;
                }
            }
            Err(error) => failed(format!("KVM_RUN: {error}")),
        }
    }
}

/// Does what the mailbox asks; false when the thread shall end.
fn attend(vcpu: &VcpuFd, mailbox: &Mailbox, immediate_exit: ImmediateExit) -> bool {
    let mut states = mailbox.lock();
    immediate_exit.set(0);
    while states.wanted == Run::Paused {
        if states.actual != Run::Paused {
            states.actual = Run::Paused;
            mailbox.changed.notify_all();
            // Tells the guest's watchdogs that it was stopped; a guest without kvm-clock has none, hence no error.
            let _ = vcpu.kvmclock_ctrl();
        }
        if let Some(task) = states.task.take() {
            drop(states);
            task(vcpu);
            states = mailbox.lock();
            continue;
        }
        states = mailbox.wait(states);
    }
    states.actual = states.wanted;
    mailbox.changed.notify_all();
    states.wanted == Run::Running
}

fn where_it_stands(cpu: u8, vcpu: &VcpuFd) -> String {
    match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(regs), Ok(sregs)) => format!(
            "vCPU {cpu} at rip {:#x}, rsp {:#x}, cr0 {:#x}, cr2 {:#x}, cr3 {:#x}, cr4 {:#x}, efer {:#x}",
            regs.rip, regs.rsp, sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer
        ),
        _ => format!("vCPU {cpu}, registers unknown"),
    }
}
