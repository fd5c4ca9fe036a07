//! Processes and directories that must not outlive us, however we end.
//!
//! ```text
//!   we end by        QEMU, ssh                       the directory
//!   Drop, return     killed by `Child`               removed by `WorkDir`
//!   Ctrl-C, TERM     killed by the signal thread     removed by the signal thread
//!   kill -9, crash   killed by the kernel (pdeathsig) swept at the next start: its lock is free
//! ```

use crate::{LabError, Result};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};

type Request = (Command, Sender<std::io::Result<std::process::Child>>);

/// What to take down when a signal ends us.
#[derive(Default)]
struct Registry {
    pids: Vec<u32>,
    directories: Vec<PathBuf>,
}

static REGISTRY: Mutex<Registry> = Mutex::new(Registry {
    pids: Vec::new(),
    directories: Vec::new(),
});

fn registry() -> std::sync::MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says that `directory` is to be removed if a signal ends us.
pub(crate) fn register_directory(directory: PathBuf) {
    registry().directories.push(directory);
}

/// Says that `directory` is gone.
pub(crate) fn forget_directory(directory: &std::path::Path) {
    registry().directories.retain(|d| d != directory);
}

/// A child process that dies with us: killed when dropped, and by the kernel should we be killed.
#[derive(Debug)]
pub(crate) struct Child {
    child: std::process::Child,
    reaped: Option<ExitStatus>,
}

impl Child {
    /// Starts `command`.
    pub(crate) fn spawn(mut command: Command, program: &'static str, package: &'static str) -> Result<Child> {
        let parent = std::process::id();
        // Its own process group: Ctrl-C is for us to handle, in order.
        command.process_group(0);
        // SAFETY: between fork and exec the closure makes two system calls (prctl, getppid), both
        // async-signal-safe, and touches no memory that another thread could hold a lock on.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
                // We may have died before the line above took effect.
                let now = rustix::process::getppid().map_or(0, |p| p.as_raw_nonzero().get());
                if now.cast_unsigned() != parent {
                    return Err(std::io::ErrorKind::NotConnected.into());
                }
                Ok(())
            });
        }
        match spawn_on_lasting_thread(command) {
            Ok(child) => {
                registry().pids.push(child.id());
                Ok(Child { child, reaped: None })
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                Err(LabError::MissingProgram { program, package })
            }
            Err(source) => Err(LabError::File {
                what: "start",
                path: program.into(),
                source,
            }),
        }
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub(crate) fn exited(&mut self) -> Option<ExitStatus> {
        if self.reaped.is_none()
            && let Ok(Some(status)) = self.child.try_wait()
        {
            self.note(status);
        }
        self.reaped
    }

    /// Waits until it ends by itself.
    pub(crate) fn wait(&mut self) -> Option<ExitStatus> {
        if self.reaped.is_none()
            && let Ok(status) = self.child.wait()
        {
            self.note(status);
        }
        self.reaped
    }

    fn note(&mut self, status: ExitStatus) {
        self.reaped = Some(status);
        // From here on the number may be another process's.
        let id = self.child.id();
        registry().pids.retain(|p| *p != id);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.exited().is_none() {
            // An error means that it ended just now: waiting shows it.
            let _ = self.child.kill();
            self.wait();
        }
    }
}

/// The kernel's "parent" for the death signal is the *thread* that forked. So all children are started by one thread
/// that lasts as long as the process, and not by whichever thread wanted them.
fn spawn_on_lasting_thread(command: Command) -> std::io::Result<std::process::Child> {
    static SPAWNER: OnceLock<Mutex<Sender<Request>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (requests, inbox) = channel::<Request>();
        std::thread::spawn(move || {
            for (mut command, answer) in inbox {
                // Nobody waits for the answer any more only if the process is ending.
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(requests)
    });
    let (answer, child) = channel();
    let gone = |_| std::io::Error::other("the thread that starts programs has ended");
    spawner
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send((command, answer))
        .map_err(|e| gone(e.to_string()))?;
    child.recv().map_err(|e| gone(e.to_string()))?
}

/// From here on SIGINT, SIGTERM and SIGHUP take labs down before they end the process, with the usual exit status.
/// Call it first in `main`, before there are other threads.
pub fn clean_up_on_signals() {
    const SIGNALS: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];
    // SAFETY: an all-zero sigset_t is a valid place for sigemptyset to fill; the other calls get that initialised
    // set, and null for the old mask, which is allowed.
    let set = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in SIGNALS {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        set
    };
    std::thread::spawn(move || {
        let mut signal = 0;
        // SAFETY: `set` is initialised and `signal` is a valid place for the number.
        while unsafe { libc::sigwait(&raw const set, &raw mut signal) } != 0 {}
        let mut registry = registry();
        for pid in registry.pids.drain(..) {
            if let Some(pid) = rustix::process::Pid::from_raw(pid.cast_signed()) {
                // Not reaped yet, so the number is still our child's.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
            }
        }
        for directory in registry.directories.drain(..) {
            let _ = std::fs::remove_dir_all(directory);
        }
        // SAFETY: _exit has no preconditions. Not `exit`: destructors of other threads' data must not run under them.
        unsafe { libc::_exit(128 + signal) }
    });
}
