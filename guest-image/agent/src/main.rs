//! The guest agent: PID 1 of a sliver. It marks the first user instruction, listens for the host on vsock
//! (*up*), becomes one sliver when told to (*join*), runs programs for the host, reaps, and shuts down.
//! `docs/agent-protocol.md` has the protocol, `mandoline_api::agent` its types and the agent's states.
//!
//! It never ends and, idle, never wakes: one thread in one `poll` without a timer, and a thread for each
//! stream that the host holds open.
//!
//! In a running sliver the same program is `poweroff`, `halt` and `reboot` (by the name it's called by).

mod agent;
mod children;
mod error;
mod exec;
mod files;
mod hostkey;
mod identity;
mod init;
mod initscript;
mod join;
mod link;
mod log;
mod mark;
mod netlink;
mod network;
mod root;
mod server;
mod services;
mod sshd;
mod user;

use std::os::fd::{FromRawFd as _, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use rustix::process::Pid;

use crate::agent::Agent;
use crate::init::Init;
use crate::link::{Events, Listener};
use crate::log::warning;

fn main() -> ExitCode {
    let first = std::process::id() == 1;
    // Descriptors for tests; the kernel never starts init with these.
    let inherited = std::env::args()
        .nth(1)
        .filter(|argument| argument == "--inherited");
    match (first, inherited) {
        (true, None) => machine(),
        (true, Some(_)) => test(),
        (false, Some(_)) => {
            // Shutting down means to kill every other process.
            eprintln!("mandoline-agent: --inherited is for tests, as PID 1 of a pid namespace of their own");
            ExitCode::FAILURE
        }
        (false, None) => command(),
    }
}

/// PID 1 of a sliver.
fn machine() -> ExitCode {
    let mark_ns = mark::first_instruction();
    log::to_kernel();
    let listener = Listener::vsock().map_err(|e| warning!("vsock: {e}")).ok();
    start(Events::vsock(), listener, mark_ns, true)
}

/// Descriptors that a test leaves to the agent: the listening Unix socket and the event stream. Above those
/// that a shell or `std` uses on the way.
const INHERITED: (i32, i32) = (20, 21);

/// PID 1 of a test's namespaces.
fn test() -> ExitCode {
    // SAFETY: the test that starts this program passes these two descriptors and nothing else uses them.
    let (listener, events) = unsafe {
        (
            OwnedFd::from_raw_fd(INHERITED.0),
            OwnedFd::from_raw_fd(INHERITED.1),
        )
    };
    for fd in [&listener, &events] {
        let _ = rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC);
    }
    let listener = Listener::inherited(listener)
        .map_err(|e| warning!("descriptor {}: {e}", INHERITED.0))
        .ok();
    start(Events::inherited(Some(events)), listener, mark::boot_ns(), false)
}

fn start(events: Events, listener: Option<Listener>, mark_ns: u64, machine: bool) -> ExitCode {
    // SAFETY: sets one of malloc's numbers, before any other thread is there: one arena for all threads,
    // since the agent's memory counts in every sliver and its speed hardly does.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    let _ = rustix::process::setsid();
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let (signals, (agent, asked)) = match (init::signals(), Agent::new(events, mark_ns)) {
        (Ok(signals), Ok(agent)) => (signals, agent),
        (signals, agent) => {
            // Two descriptors are all that it takes to get here; without them nothing can be done.
            warning!("signals: {:?}, agent: {:?}", signals.err(), agent.err());
            return ExitCode::FAILURE;
        }
    };
    let agent = Arc::new(agent);
    // The host hears of the agent while the agent mounts: it's another CPU that takes the news in. Requests
    // are accepted afterwards.
    let teller = Arc::clone(&agent);
    let told = std::thread::Builder::new()
        .stack_size(128 * 1024)
        .spawn(move || teller.tell_up());
    if let Err(e) = told {
        warning!("no thread for the event stream: {e}");
    }
    root::mount_kernel();
    network::loopback();
    if machine {
        // Ctrl-Alt-Del becomes a signal to PID 1 instead of a reset at once.
        let _ = rustix::system::reboot(rustix::system::RebootCommand::CadOff);
    }
    Init {
        agent,
        asked,
        signals,
        listener,
        machine,
    }
    .run()
}

/// A command typed in a sliver.
fn command() -> ExitCode {
    let mut arguments = std::env::args();
    let called = arguments.next().unwrap_or_default();
    let called = Path::new(&called)
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let word = if called == "mandoline-agent" {
        arguments.next().unwrap_or_default()
    } else {
        called
    };
    let signal = match word.as_str() {
        "poweroff" | "halt" => rustix::process::Signal::USR2,
        "reboot" => rustix::process::Signal::TERM,
        "--version" => {
            println!(
                "mandoline-agent {} (protocol {})",
                env!("CARGO_PKG_VERSION"),
                mandoline_api::agent::VERSION
            );
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!(
                "usage: mandoline-agent poweroff|halt|reboot|--version\n\
                 The agent itself runs as PID 1 of a sliver (kernel command line: init=/sbin/mandoline-agent)."
            );
            return ExitCode::FAILURE;
        }
    };
    // Only in a sliver is PID 1 this program; another init would take the signal for something else.
    let agent = std::fs::read_to_string("/proc/1/comm").is_ok_and(|name| name.starts_with("mandoline-agent"));
    if !agent {
        eprintln!("mandoline-agent: {word}: PID 1 of this machine is not the agent");
        return ExitCode::FAILURE;
    }
    match rustix::process::kill_process(Pid::INIT, signal) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("mandoline-agent: {word}: {e}; only root may");
            ExitCode::FAILURE
        }
    }
}
