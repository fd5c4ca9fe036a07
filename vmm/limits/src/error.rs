//! What can go wrong when a limit is set: the thing, the value, and what was allowed.

use std::io;
use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value that the kernel, or the meaning of the limit, does not allow.
    #[error("{what} {value} is refused: allowed is {allowed}")]
    OutOfRange {
        /// Which limit.
        what: &'static str,
        /// The value that was asked for.
        value: String,
        /// What would have been accepted.
        allowed: String,
    },
    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The root that was given is not a cgroup v2 directory.
    #[error(
        "{} is not in a cgroup v2 tree (no cgroup.controllers file): mount one with `mount -t cgroup2 -o favordynmods none {}`",
        path.display(), path.display()
    )]
    NotCgroup2 {
        /// The directory that was looked at.
        path: PathBuf,
    },
    /// A controller that a limit needs cannot be had there.
    #[error("cgroup controller {controller} is not available in {} (it has: {available})", path.display())]
    NoController {
        /// Name of the controller.
        controller: String,
        /// The directory that lacks it.
        path: PathBuf,
        /// What the directory offers.
        available: String,
    },
    /// Processes of a cgroup did not end.
    #[error("{} still has processes {waited_ms} ms after they were killed", path.display())]
    StillPopulated {
        /// The cgroup.
        path: PathBuf,
        /// How long was waited, in milliseconds.
        waited_ms: u128,
    },
    /// A file of the kernel's did not read as documented.
    #[error("{} does not read as expected: {detail}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What was wrong with it.
        detail: String,
    },
    /// A system call on a device failed.
    #[error("{call} on {device}: {source}")]
    Device {
        /// The call.
        call: &'static str,
        /// The device.
        device: String,
        /// Why not.
        source: io::Error,
    },
    /// The kernel refused a netlink request.
    #[error("cannot {what}: {source}{}", if detail.is_empty() { String::new() } else { format!(" ({detail})") })]
    Netlink {
        /// What was attempted.
        what: String,
        /// The kernel's error code.
        source: io::Error,
        /// The kernel's own words, where it has some.
        detail: String,
    },
    /// A netlink answer did not read as documented.
    #[error("cannot read the kernel's answer about {what}: {detail}")]
    Decode {
        /// What was asked for.
        what: String,
        /// What was wrong with the answer.
        detail: String,
    },
    /// Something that should be there is not.
    #[error("{what} does not exist")]
    NotFound {
        /// What was looked for.
        what: String,
    },
    /// Every place of a table is taken.
    #[error("no free {what}: all {capacity} are taken")]
    Exhausted {
        /// What there is none left of.
        what: &'static str,
        /// How many there are.
        capacity: usize,
    },
}

/// Shorthand of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The kernel's error number, where the error came from the kernel.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::File { source, .. } | Self::Device { source, .. } | Self::Netlink { source, .. } => {
                source.raw_os_error()
            }
            _ => None,
        }
    }

    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }

    pub(crate) fn out_of_range(what: &'static str, value: impl ToString, allowed: impl ToString) -> Self {
        Self::OutOfRange {
            what,
            value: value.to_string(),
            allowed: allowed.to_string(),
        }
    }
}
