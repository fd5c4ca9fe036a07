//! Starting a monitor, watching it, and finding it again after a restart of the node manager.
//!
//! A monitor outlives the node manager: it is in a session of its own, in its sliver's cgroup, and what it
//! needs it has as descriptors. Everything is found again by cgroup and pidfd. The socket on which the guest's
//! outward streams arrive has no name; the monitor holds *both* ends (it never uses ours), and a restarted
//! node manager fetches its end with `pidfd_getfd`. Until then streams wait in the socket.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use mandoline_api::agent::ShutdownMode;
use mandoline_api::monitor::{ExitReason, PhaseMark, RunState, StateChange, StateLine};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

pub(super) use crate::vm_type::watch;
use crate::vm_type::{Exit, Failure};

/// Name of the descriptor that a monitor keeps for the node manager.
pub(super) const KEPT_FD: &str = mandoline_api::monitor::VSOCK_OUT_KEPT_FD;

/// What a later node manager has to know of a monitor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Handover {
    /// Number of our end of the outward socket, in the monitor.
    pub(super) kept_fd: RawFd,
    /// What the VM was booted with; absent in what an earlier version has written.
    #[serde(default)]
    pub(super) booted: Option<Booted>,
}

/// What a VM was booted with, and cannot grow beyond.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Booted {
    /// Guest memory in MiB.
    pub(super) mem_mib: u64,
    /// Virtual CPUs.
    pub(super) vcpus: u64,
}

/// A descriptor for the monitor, with its name there.
pub(super) struct Passed<'a> {
    pub(super) name: &'static str,
    pub(super) fd: BorrowedFd<'a>,
}

/// What it takes to start a monitor.
pub(super) struct Launch<'a> {
    pub(super) program: &'a Path,
    pub(super) arguments: Vec<String>,
    pub(super) passed: Vec<Passed<'a>>,
    /// Whether the program takes `--fd NAME=N`; QEMU has the numbers among its arguments.
    pub(super) names: bool,
    /// The directory of the sliver's cgroup.
    pub(super) cgroup: &'a Path,
    /// Where words go that are said before the log is open.
    pub(super) log: File,
}

/// Starts a monitor. Returns a descriptor of its process.
pub(super) fn launch(launch: Launch<'_>) -> Result<OwnedFd, Failure> {
    let procs_path = launch.cgroup.join("cgroup.procs");
    let procs = fs::OpenOptions::new()
        .write(true)
        .open(&procs_path)
        .map_err(|e| Failure::retryable(format!("cannot open {}: {e}", procs_path.display())))?;
    let mut command = Command::new(launch.program);
    command.args(&launch.arguments);
    for passed in launch.passed.iter().filter(|_| launch.names) {
        command
            .arg("--fd")
            .arg(format!("{}={}", passed.name, passed.fd.as_raw_fd()));
    }
    let errors = launch
        .log
        .try_clone()
        .map_err(|e| Failure::retryable(format!("log: {e}")))?;
    command
        .stdin(Stdio::null())
        .stdout(launch.log)
        .stderr(errors)
        .env_clear()
        .current_dir("/");
    let numbers: Vec<RawFd> = launch.passed.iter().map(|passed| passed.fd.as_raw_fd()).collect();
    let procs_number = procs.as_raw_fd();
    let prepare = move || {
        // SAFETY: the descriptor is open, the buffer is one byte of static memory.
        if unsafe { libc::write(procs_number, b"0".as_ptr().cast(), 1) } != 1 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: takes no memory of ours.
        if unsafe { libc::setsid() } < 0 {
            return Err(io::Error::last_os_error());
        }
        for number in &numbers {
            // Descriptors keep their numbers; only these survive the exec.
            // SAFETY: changes a flag of a descriptor of this new process.
            if unsafe { libc::fcntl(*number, libc::F_SETFD, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only: it takes no lock and no memory.
    unsafe { command.pre_exec(prepare) };
    let child = command.spawn().map_err(|error| {
        let reason = format!("cannot start {}: {error}", launch.program.display());
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => Failure::fatal(reason),
            _ => Failure::retryable(reason),
        }
    })?;
    // It is our child and nobody has waited for it: the number cannot mean another process.
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| Failure::retryable("the monitor has no process id"))?;
    rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)
        .map_err(|e| Failure::retryable(format!("cannot watch the monitor: {e}")))
}

/// Finds the monitor that runs in a cgroup.
pub(super) fn find(cgroup: &Path) -> io::Result<Option<OwnedFd>> {
    let procs = cgroup.join("cgroup.procs");
    let read = || match fs::read_to_string(&procs) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error),
    };
    let Some(pid) = read()?.lines().next().and_then(|line| line.parse::<i32>().ok()) else {
        return Ok(None);
    };
    let Some(pid) = Pid::from_raw(pid) else {
        return Ok(None);
    };
    let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Ok(pidfd) => pidfd,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    // The number may have passed to another process between reading and opening: if it is still in the
    // cgroup, the descriptor is that of a process of this sliver.
    let still = read()?
        .lines()
        .any(|line| line == pid.as_raw_nonzero().to_string());
    Ok(still.then_some(pidfd))
}

/// Fetches our end of the outward socket back from a monitor.
pub(super) fn fetch_kept(pidfd: BorrowedFd<'_>, handover: &Handover) -> io::Result<OwnedFd> {
    let fd = rustix::process::pidfd_getfd(pidfd, handover.kept_fd, PidfdGetfdFlags::empty())?;
    let kind = rustix::net::sockopt::socket_type(&fd)?;
    match kind {
        rustix::net::SocketType::SEQPACKET => Ok(fd),
        _ => Err(io::Error::other("the kept descriptor is not the outward socket")),
    }
}

/// Waits for the end of a monitor, and says how it came.
pub(super) async fn wait(pidfd: &AsyncFd<OwnedFd>, state: &Path) -> Exit {
    loop {
        match pidfd.readable().await {
            Ok(mut ready) => {
                if has_ended(pidfd.get_ref().as_fd()) {
                    break;
                }
                ready.clear_ready();
            }
            Err(error) => return Exit::Died(format!("the monitor cannot be watched: {error}")),
        }
    }
    // Ours to reap if we started it; else PID 1 does.
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let status = rustix::process::waitid(WaitId::PidFd(pidfd.get_ref().as_fd()), options)
        .ok()
        .flatten();
    let told = fs::read_to_string(state).unwrap_or_default();
    let last = last_state(&told).filter(|change| change.state == RunState::Exited);
    match last.and_then(|change| change.reason.map(|reason| (reason, change.detail))) {
        Some((ExitReason::Shutdown, _)) => Exit::Shutdown,
        Some((ExitReason::Reboot, _)) => Exit::Reboot,
        Some((reason, detail)) => Exit::Died(describe(reason, detail.as_deref())),
        None => Exit::Died(match status {
            Some(status) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => format!("the monitor ended with status {code} and left no reason"),
                (_, Some(signal)) => format!("the monitor was killed by signal {signal}"),
                _ => "the monitor ended and left no reason".to_owned(),
            },
            None => "the monitor was killed, or ended and left no reason".to_owned(),
        }),
    }
}

fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut fds = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(poll(&mut fds, Some(&now)), Ok(1))
}

fn describe(reason: ExitReason, detail: Option<&str>) -> String {
    let what = match reason {
        ExitReason::Panic => "its kernel panicked",
        ExitReason::TripleFault => "its CPU took a triple fault",
        ExitReason::Killed => "its monitor was told to end",
        ExitReason::Error => "its monitor could not go on",
        ExitReason::Shutdown => "it shut down",
        ExitReason::Reboot => "it rebooted",
    };
    match detail {
        Some(detail) => format!("{what}: {}", detail.trim()),
        None => what.to_owned(),
    }
}

/// Writes down how a guest said that it ends, as our monitor does by itself.
pub(super) fn note_end(state: &Path, mode: ShutdownMode) -> io::Result<()> {
    let change = StateChange {
        state: RunState::Exited,
        reason: Some(match mode {
            ShutdownMode::Poweroff => ExitReason::Shutdown,
            ShutdownMode::Reboot => ExitReason::Reboot,
        }),
        detail: None,
        unix_ns: crate::core::unix_ns(),
    };
    let mut line = serde_json::to_vec(&change)?;
    line.push(b'\n');
    let mut file = fs::OpenOptions::new().append(true).create(true).open(state)?;
    file.write_all(&line)
}

/// The last state that a monitor has written down.
fn last_state(text: &str) -> Option<StateChange> {
    text.lines()
        .rev()
        .find_map(|line| match serde_json::from_str(line) {
            Ok(StateLine::State(change)) => Some(change),
            _ => None,
        })
}

/// The phases of its start that a monitor has written down.
pub(super) fn phases(state: &Path) -> Vec<PhaseMark> {
    let text = fs::read_to_string(state).unwrap_or_default();
    let marks = text.lines().filter_map(|line| match serde_json::from_str(line) {
        Ok(StateLine::Phase(mark)) => Some(mark),
        _ => None,
    });
    marks.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// A directory that stands for a cgroup: its `cgroup.procs` is a plain file.
    fn cgroup() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.procs"), "").unwrap();
        dir
    }

    fn start(dir: &Path, script: &str, passed: Vec<Passed<'_>>) -> OwnedFd {
        let log = File::create(dir.join("log")).unwrap();
        let arguments = vec!["-c".to_owned(), script.to_owned()];
        launch(Launch {
            program: Path::new("/bin/sh"),
            arguments,
            passed,
            names: false,
            cgroup: dir,
            log,
        })
        .unwrap()
    }

    async fn end_of(pidfd: OwnedFd, state: &Path) -> Exit {
        let pidfd = watch(pidfd).unwrap();
        tokio::time::timeout(Duration::from_secs(20), wait(&pidfd, state))
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn the_state_file_says_how_it_ended() {
        let dir = cgroup();
        let state = dir.path().join("state");
        for (line, want) in [
            (
                r#"{"state":"exited","reason":"shutdown","unix_ns":1}"#,
                Exit::Shutdown,
            ),
            (
                r#"{"state":"exited","reason":"reboot","unix_ns":1}"#,
                Exit::Reboot,
            ),
            (
                r#"{"state":"exited","reason":"panic","detail":"Kernel panic - x","unix_ns":1}"#,
                Exit::Died("its kernel panicked: Kernel panic - x".to_owned()),
            ),
        ] {
            fs::write(
                &state,
                format!("{{\"state\":\"running\",\"unix_ns\":0}}\n{line}\n"),
            )
            .unwrap();
            assert_eq!(end_of(start(dir.path(), "exit 0", vec![]), &state).await, want);
        }
        fs::write(&state, "{\"state\":\"running\",\"unix_ns\":0}\n").unwrap();
        let exit = end_of(start(dir.path(), "exit 148", vec![]), &state).await;
        assert!(matches!(exit, Exit::Died(reason) if reason.contains("148")));
        let exit = end_of(start(dir.path(), "kill -9 $$", vec![]), &state).await;
        assert!(matches!(exit, Exit::Died(reason) if reason.contains("signal 9")));
    }

    #[tokio::test]
    async fn only_named_descriptors_are_inherited_and_one_is_fetched_back() {
        let dir = cgroup();
        let (ours, theirs) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let secret = File::open("/dev/null").unwrap();
        let passed = vec![
            Passed {
                name: "vsock-out",
                fd: theirs.as_fd(),
            },
            Passed {
                name: KEPT_FD,
                fd: ours.as_fd(),
            },
        ];
        let script = format!(
            "ls -l /proc/self/fd > {0}/fds; test -e /proc/self/fd/{1} && echo leaked >> {0}/fds; read wait < {0}/gate",
            dir.path().display(),
            secret.as_raw_fd(),
        );
        let gate = dir.path().join("gate");
        assert!(Command::new("mkfifo").arg(&gate).status().unwrap().success());
        let pidfd = start(dir.path(), &script, passed);
        let handover = Handover {
            kept_fd: ours.as_raw_fd(),
            booted: None,
        };
        drop(ours);
        // The gate opens for writing once the script has come that far.
        let gate = tokio::task::spawn_blocking(move || File::create(gate))
            .await
            .unwrap()
            .unwrap();
        assert!(
            !fs::read_to_string(dir.path().join("fds"))
                .unwrap()
                .contains("leaked")
        );
        let again = fetch_kept(pidfd.as_fd(), &handover).unwrap();
        rustix::io::write(&theirs, b"a stream").unwrap();
        let mut buffer = [0; 16];
        assert_eq!(rustix::io::read(&again, &mut buffer).unwrap(), 8);
        drop(gate);
        end_of(pidfd, &dir.path().join("state")).await;
    }

    #[tokio::test]
    async fn what_a_guest_said_of_its_end_is_how_it_ended() {
        let dir = cgroup();
        let state = dir.path().join("state");
        for (mode, want) in [
            (ShutdownMode::Reboot, Exit::Reboot),
            (ShutdownMode::Poweroff, Exit::Shutdown),
        ] {
            note_end(&state, mode).unwrap();
            assert_eq!(end_of(start(dir.path(), "exit 0", vec![]), &state).await, want);
        }
    }

    #[test]
    fn an_empty_or_missing_cgroup_has_no_monitor() {
        let dir = cgroup();
        assert!(find(dir.path()).unwrap().is_none());
        assert!(find(&dir.path().join("none")).unwrap().is_none());
    }
}
