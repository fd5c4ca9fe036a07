//! The small things that `run` holds: descriptors for its child, the vsock socket, the terminal, files in memory.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

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

/// The vsock socket: where the caller wants it, or in a directory of its own that goes with it.
pub(super) struct PrivateSocket {
    pub(super) listener: UnixListener,
    pub(super) path: PathBuf,
    directory: Option<PathBuf>,
}

impl PrivateSocket {
    pub(super) fn new(wanted: Option<&Path>) -> Result<Self, Error> {
        let (path, directory) = match wanted {
            Some(path) => (path.to_owned(), None),
            None => {
                let directory = std::env::temp_dir().join(format!("mandoline-run-{}", std::process::id()));
                std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700)
                    .create(&directory)
                    .map_err(host(format!("making {}", directory.display())))?;
                (directory.join("vsock"), Some(directory))
            }
        };
        let listener =
            UnixListener::bind(&path).map_err(host(format!("vsock: making {}", path.display())))?;
        Ok(Self {
            listener,
            path,
            directory,
        })
    }
}

impl Drop for PrivateSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        if let Some(directory) = &self.directory {
            let _ = std::fs::remove_dir(directory);
        }
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
