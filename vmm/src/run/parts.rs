//! The small things that `run` holds: descriptors for its child, the terminal, files in memory.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::termios::{LocalModes, OptionalActions, Termios};

use crate::run::supervise::{Error, host};

/// Descriptors for the child, each under a name.
#[derive(Default)]
pub(super) struct Handed(pub(super) Vec<(String, OwnedFd)>);

impl Handed {
    pub(super) fn give(&mut self, name: &str, fd: impl Into<OwnedFd>) -> Result<String, Error> {
        let fd = fd.into();
        // The child must inherit it; nothing else is started while it is open.
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty())
            .map_err(|error| host(format!("handing over {name}"))(error.into()))?;
        self.0.push((name.to_owned(), fd));
        Ok(format!("fd:{name}"))
    }

    pub(super) fn file(&mut self, name: &str, path: &Path, write: bool) -> Result<String, Error> {
        let file = File::options().read(true).write(write).open(path);
        self.give(
            name,
            file.map_err(host(format!("{name}: opening {}", path.display())))?,
        )
    }

    pub(super) fn sink(&mut self, name: &str, path: &Path) -> Result<String, Error> {
        let file = File::options().append(true).create(true).open(path);
        self.give(
            name,
            file.map_err(host(format!("{name}: opening {}", path.display())))?,
        )
    }
}

/// A terminal whose keys go to the guest one by one, unechoed; Ctrl-C stays ours. Restored when dropped.
pub(super) struct RawTerminal(Termios);

impl RawTerminal {
    pub(super) fn enter() -> Option<Self> {
        let before = rustix::termios::tcgetattr(io::stdin()).ok()?;
        let mut raw = before.clone();
        raw.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
        rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

pub(super) fn memory_file(name: &str, bytes: &[u8]) -> Result<File, Error> {
    let fd = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|error| host(format!("memfd {name}"))(error.into()))?;
    let mut file = File::from(fd);
    file.write_all(bytes)
        .and_then(|()| file.rewind())
        .map_err(host(format!("memfd {name}")))?;
    Ok(file)
}

pub(super) fn reopen_for_append(file: &File) -> Result<File, Error> {
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    File::options()
        .append(true)
        .open(path)
        .map_err(host("state file"))
}
