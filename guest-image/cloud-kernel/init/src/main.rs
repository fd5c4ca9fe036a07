//! The first program of a sliver that boots Debian's own kernel, whose drivers are modules: it loads those that
//! the initial RAM disk brings, mounts the root that the command line names, and hands over to the init there.
//!
//! ```text
//!   /dev (devtmpfs) ─► modules, in the order of /modules/list ─► wait for root=
//!                                                                     ▼
//!   exec init= ◄─ chroot ◄─ move root to / ◄─ move /dev ◄─ mount root=, of rootfstype=
//! ```
//!
//! What it leaves is what a kernel with built-in drivers leaves: a root, and devtmpfs on `/dev`. It reads `root=`,
//! `rootfstype=`, `rootflags=`, `ro`, `rw` and `init=` with the kernel's own meaning. When it fails it says why on the
//! console and ends, which is a kernel panic.

mod cmdline;
mod modules;
mod root;

use std::ffi::CString;
use std::io;
use std::process::ExitCode;

use crate::cmdline::CommandLine;

/// What can go wrong before there is a root.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// A system call that failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried, on what.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Nobody said where the root is.
    #[error("the command line has no root=; a block device such as root=/dev/vda is wanted")]
    NoRoot,
    /// The root's device never came.
    #[error("root={device} is not there after {seconds} s; the kernel's block devices are: {present}")]
    RootMissing {
        /// As the command line has it.
        device: String,
        /// How long it was waited for.
        seconds: u64,
        /// What is there instead.
        present: String,
    },
    /// Nothing could mount it.
    #[error("no file system of {tried} mounts root={device}: {source}")]
    RootUnknown {
        /// As the command line has it.
        device: String,
        /// File systems, in order.
        tried: String,
        /// What the last one said.
        source: io::Error,
    },
    /// A name with a zero byte.
    #[error("{0:?} has a zero byte")]
    ZeroByte(String),
}

impl Error {
    /// Names what was tried when a system call failed.
    fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let what = what.into();
        move |source| Error::System { what, source }
    }
}

fn c_string(text: &str) -> Result<CString, Error> {
    CString::new(text).map_err(|_| Error::ZeroByte(text.to_owned()))
}

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("mandoline-initrd-init: this is the first program of an initial RAM disk, not a command");
        return ExitCode::FAILURE;
    }
    let error = run();
    eprintln!("mandoline-initrd-init: {error}");
    ExitCode::FAILURE
}

/// Everything up to the root's init. It comes back only with an error.
fn run() -> Error {
    let steps = || -> Result<CommandLine, Error> {
        root::mount_devices()?;
        let line = CommandLine::of_kernel()?;
        modules::load("/modules".as_ref())?;
        root::mount_root(&line)?;
        root::enter()?;
        Ok(line)
    };
    match steps() {
        Ok(line) => root::exec(&line.init),
        Err(error) => error,
    }
}
