//! The system calls that each thread role may make, and what happens when it tries another.
//!
//! [`table`] is the list; the filters are made of it. A forbidden call traps: the handler writes one line that
//! names the thread's role, the call and its arguments to the log, and the process ends with
//! [`EXIT_SECCOMP`](mandoline_api::monitor::EXIT_SECCOMP). A guest that has taken over a thread gets no second try.

mod filter;
mod handler;
pub mod ioctl;
pub mod table;
#[cfg(test)]
mod tests;

use std::fmt;

use seccompiler::{BpfProgram, apply_filter};

pub use handler::install_handler;
use table::{Limit, Rule};

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs a vCPU.
    Vcpu,
    /// The event loop: devices, signals, the end.
    Devices,
    /// The same where streams of the guest go to sockets by path, as no node manager has it: it may make
    /// sockets and connect them. In an empty root it finds none.
    DevicesByPath,
    /// The control socket.
    Api,
    /// The same where the monitor stands in no empty root: it may open what a request names.
    ApiByPath,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 5] = [
        Role::Vcpu,
        Role::Devices,
        Role::DevicesByPath,
        Role::Api,
        Role::ApiByPath,
    ];

    /// Its name, in the log and in [`describe`].
    pub const fn name(self) -> &'static str {
        match self {
            Role::Vcpu => "vcpu",
            Role::Devices => "devices",
            Role::DevicesByPath => "devices by path",
            Role::Api => "api",
            Role::ApiByPath => "api by path",
        }
    }
}

/// A filter could not be put up.
#[derive(Debug, thiserror::Error)]
#[error("seccomp filter of the {} thread: {source}", role.name())]
pub struct Error {
    role: Role,
    source: seccompiler::Error,
}

/// The filter of a role, for this process.
pub fn program(role: Role) -> BpfProgram {
    filter::compile(role, std::process::id())
}

/// Puts the calling thread under the filter of `role`, for good.
pub fn confine(role: Role) -> Result<(), Error> {
    handler::set_role(role);
    apply_filter(&program(role)).map_err(|source| Error { role, source })
}

/// The table for people: role, call, limit, reason.
pub fn describe() -> String {
    use fmt::Write;
    let mut text = String::new();
    for role in Role::ALL {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{} ({} calls)", role.name(), table::rules(role).count());
        for Rule { call, limit, why } in table::rules(role) {
            let _ = writeln!(text, "  {:<16} {why}", call.name());
            if *limit != Limit::Free {
                let _ = writeln!(text, "  {:<16}   only {limit}", "");
            }
        }
        text.push('\n');
    }
    text
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |values: &[table::Value]| {
            let names: Vec<_> = values.iter().map(|value| value.name).collect();
            names.join(", ")
        };
        match self {
            Limit::Free => write!(f, "(anything)"),
            Limit::OneOf(argument, values) => write!(f, "with argument {argument} one of {}", names(values)),
            Limit::OneOfBeside(argument, beside, values) => {
                write!(
                    f,
                    "with argument {argument} one of {} (with or without {})",
                    names(values),
                    beside.name
                )
            }
            Limit::Without(argument, bits) => write!(f, "without {} in argument {argument}", bits.name),
            Limit::OwnProcess(argument) => write!(f, "with this process as argument {argument}"),
        }
    }
}
