//! Processes: PID 1 reaps everybody's, and must still tell each of its own children's ends to who started it.
//!
//! One lock is held while a child is started and while children are reaped. So no child can be reaped before
//! it is in the table, and no pid that is in the table can have been given to another process: signals to
//! it hit the right one. (It also keeps `std`'s own wait for a child whose `exec` failed from losing to ours.)

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use mandoline_api::agent::ExitStatus;
use rustix::event::EventfdFlags;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

/// Who started a child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The host, by `exec`.
    Exec,
    /// A connection to sshd's port.
    Ssh,
    /// The boot script.
    Initscript,
}

/// The end of a child: a descriptor that becomes readable, and then its status.
#[derive(Debug)]
pub(crate) struct Exit {
    status: OnceLock<ExitStatus>,
    event: OwnedFd,
}

impl Exit {
    /// How it ended, if it has.
    pub(crate) fn status(&self) -> Option<ExitStatus> {
        self.status.get().copied()
    }
}

impl AsFd for Exit {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[derive(Debug)]
struct Slot {
    kind: Kind,
    exit: Arc<Exit>,
}

/// The children that somebody waits for.
#[derive(Debug, Default)]
pub(crate) struct Children {
    table: Mutex<HashMap<i32, Slot>>,
}

/// A child just started.
pub(crate) struct Started {
    /// Its pipes. Never to be waited for: the reaper does.
    pub(crate) child: Child,
    /// Its pid, process group and session.
    pub(crate) pid: Pid,
    /// Its end.
    pub(crate) exit: Arc<Exit>,
}

/// Why a child was not started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpawnError {
    /// Too many of its kind run.
    #[error("{0} of this kind run already")]
    Full(usize),
    /// The system refused.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Children {
    fn table(&self) -> MutexGuard<'_, HashMap<i32, Slot>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts `command` in a session of its own, unless `most` of its kind run.
    pub(crate) fn spawn(
        &self,
        kind: Kind,
        most: usize,
        command: &mut Command,
    ) -> Result<Started, SpawnError> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(io::Error::from)?;
        // SAFETY: the closure only makes system calls: it allocates nothing and takes no lock.
        unsafe { command.pre_exec(become_program) };
        let mut table = self.table();
        if table.values().filter(|slot| slot.kind == kind).count() >= most {
            return Err(SpawnError::Full(most));
        }
        let child = command.spawn()?;
        let raw = i32::try_from(child.id()).unwrap_or(0);
        let pid = Pid::from_raw(raw)
            .ok_or(io::ErrorKind::Other)
            .map_err(io::Error::from)?;
        let exit = Arc::new(Exit {
            status: OnceLock::new(),
            event,
        });
        table.insert(
            raw,
            Slot {
                kind,
                exit: Arc::clone(&exit),
            },
        );
        Ok(Started { child, pid, exit })
    }

    /// Reaps all that have ended and answers those that were in the table. `true`: no child is left, which
    /// for PID 1 means no other process.
    pub(crate) fn reap(&self) -> (Vec<(Kind, ExitStatus)>, bool) {
        let mut ended = Vec::new();
        let mut table = self.table();
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let Some(status) = exit_status(status) else {
                        continue;
                    };
                    if let Some(slot) = table.remove(&pid.as_raw_nonzero().get()) {
                        let _ = slot.exit.status.set(status);
                        let _ = rustix::io::write(&slot.exit.event, &1u64.to_ne_bytes());
                        ended.push((slot.kind, status));
                    }
                }
                Ok(None) => return (ended, false),
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return (ended, true),
            }
        }
    }

    /// Sends a signal to the process group of a child that has not been reaped; does nothing otherwise.
    pub(crate) fn signal_group(&self, pid: Pid, signal: Signal) {
        let table = self.table();
        if table.contains_key(&pid.as_raw_nonzero().get()) {
            let _ = rustix::process::kill_process_group(pid, signal);
        }
    }

    /// How many of a kind run.
    pub(crate) fn count(&self, kind: Kind) -> u32 {
        let count = self.table().values().filter(|slot| slot.kind == kind).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }
}

/// Between fork and exec: a session of its own, and no signal blocked (PID 1 blocks those that it reads from
/// its signalfd, and blocked signals are inherited).
fn become_program() -> io::Result<()> {
    let mut none = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set that pthread_sigmask reads; both are async-signal-safe.
    let failed = unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut())
    };
    if failed != 0 {
        return Err(io::Error::from_raw_os_error(failed));
    }
    rustix::process::setsid()?;
    Ok(())
}

fn exit_status(status: WaitStatus) -> Option<ExitStatus> {
    match (status.exit_status(), status.terminating_signal()) {
        (None, None) => None,
        (code, signal) => Some(ExitStatus { code, signal }),
    }
}
