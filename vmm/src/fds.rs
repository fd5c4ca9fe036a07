//! Descriptors by name: what the monitor inherited, and paths where paths are allowed.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use mandoline_api::monitor::FD_PREFIX;

/// A descriptor or path cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `--fd` is not `NAME=N`.
    #[error("--fd {0:?}: NAME=N is needed, N the number of an open descriptor from 0")]
    Syntax(String),
    /// The number is not open.
    #[error("--fd {name}={number}: {source}")]
    NotOpen {
        /// Its name.
        name: String,
        /// Its number.
        number: RawFd,
        /// What the host said.
        source: std::io::Error,
    },
    /// Twice the same name or number.
    #[error("--fd {name}={number}: the name or the number is taken already")]
    Taken {
        /// Its name.
        name: String,
        /// Its number.
        number: RawFd,
    },
    /// `fd:NAME` of a name that was not given, or was used already.
    #[error("{what}: descriptor {name:?} was not inherited, or is used already (inherited: {known})")]
    Unknown {
        /// What wanted it.
        what: String,
        /// Its name.
        name: String,
        /// The names that are left.
        known: String,
    },
    /// Twice the same name.
    #[error("descriptor {name:?}: the name is empty, has a colon, or is taken already")]
    Name {
        /// The name.
        name: String,
    },
    /// A path where none can be opened.
    #[error(
        "{what} is {path:?}; allowed: fd:NAME of a descriptor that comes with the request, since this monitor is jailed"
    )]
    Jailed {
        /// What wanted it.
        what: String,
        /// The path.
        path: String,
    },
    /// A descriptor cannot be duplicated.
    #[error("duplicating descriptor {name:?}: {source}")]
    Duplicate {
        /// Its name.
        name: String,
        /// What the host said.
        source: std::io::Error,
    },
    /// A path cannot be opened.
    #[error("{what}: opening {path}: {source}")]
    Open {
        /// What wanted it.
        what: String,
        /// The path.
        path: String,
        /// What the host said.
        source: std::io::Error,
    },
}

/// One `--fd NAME=N`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// Its name.
    pub name: String,
    /// Its number.
    pub number: RawFd,
}

impl std::str::FromStr for Named {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let error = || Error::Syntax(text.to_owned());
        let (name, number) = text.split_once('=').ok_or_else(error)?;
        let number = number
            .parse()
            .ok()
            .filter(|number: &RawFd| *number >= 0)
            .ok_or_else(error)?;
        if name.is_empty() || name.contains(':') {
            return Err(error());
        }
        Ok(Self {
            name: name.to_owned(),
            number,
        })
    }
}

/// Whether a request may name paths: not once the monitor stands in an empty root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paths {
    /// They are opened as ever.
    Allowed,
    /// There are none.
    Jailed,
}

impl Paths {
    /// Refuses `source` if it is a path and there are none.
    pub fn check(self, what: &str, source: &str) -> Result<(), Error> {
        if self == Self::Jailed && !source.starts_with(FD_PREFIX) {
            return Err(Error::Jailed {
                what: what.to_owned(),
                path: source.to_owned(),
            });
        }
        Ok(())
    }
}

/// The inherited descriptors that are not used yet.
#[derive(Debug, Default)]
pub struct Inherited(HashMap<String, OwnedFd>);

impl Inherited {
    /// Takes ownership of the named descriptors, and closes every other one from 3 up: what a caller left
    /// open by mistake is no business of a sliver's.
    pub fn adopt(named: &[Named]) -> Result<Self, Error> {
        let mut numbers: Vec<RawFd> = named.iter().map(|fd| fd.number).collect();
        numbers.sort_unstable();
        let mut from = 3;
        for number in numbers
            .iter()
            .copied()
            .filter(|number| *number >= 3)
            .chain([RawFd::MAX])
        {
            if number > from {
                // SAFETY: nothing was opened yet, so no object of this process owns a descriptor in the range.
                unsafe { libc::syscall(libc::SYS_close_range, from, number - 1, 0) };
            }
            from = number.saturating_add(1);
        }
        let mut inherited = HashMap::new();
        for (index, Named { name, number }) in named.iter().enumerate() {
            let (name, number) = (name.clone(), *number);
            if inherited.contains_key(&name) || named[..index].iter().any(|other| other.number == number) {
                return Err(Error::Taken { name, number });
            }
            // SAFETY: only asks for flags; the borrowed descriptor lives no longer than this call.
            let open = rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) });
            open.map_err(|source| Error::NotOpen {
                name: name.clone(),
                number,
                source: source.into(),
            })?;
            // SAFETY: open (just checked), named once, and given to this process to own.
            inherited.insert(name, unsafe { OwnedFd::from_raw_fd(number) });
        }
        Ok(Self(inherited))
    }

    /// Adds a descriptor that came later.
    pub fn insert(&mut self, name: &str, fd: OwnedFd) -> Result<(), Error> {
        if name.is_empty() || name.contains(':') || self.0.contains_key(name) {
            return Err(Error::Name {
                name: name.to_owned(),
            });
        }
        self.0.insert(name.to_owned(), fd);
        Ok(())
    }

    /// Adds all of `more`, or none of it if a name is taken already.
    pub fn adopt_all(&mut self, more: Inherited) -> Result<(), Error> {
        if let Some(name) = more.0.keys().find(|name| self.0.contains_key(*name)) {
            return Err(Error::Name { name: name.clone() });
        }
        self.0.extend(more.0);
        Ok(())
    }

    /// The same descriptors once more, for an attempt that may fail half-way.
    pub fn try_clone(&self) -> Result<Self, Error> {
        let mut copy = HashMap::new();
        for (name, fd) in &self.0 {
            let fd = fd.try_clone().map_err(|source| Error::Duplicate {
                name: name.clone(),
                source,
            })?;
            copy.insert(name.clone(), fd);
        }
        Ok(Self(copy))
    }

    /// Whether `source` is a path, or names a descriptor that is here.
    pub fn known(&self, what: &str, source: &str) -> Result<(), Error> {
        match source.strip_prefix(FD_PREFIX) {
            Some(name) if !self.0.contains_key(name) => Err(self.unknown(what, name)),
            _ => Ok(()),
        }
    }

    fn unknown(&self, what: &str, name: &str) -> Error {
        let mut known: Vec<&str> = self.0.keys().map(String::as_str).collect();
        known.sort_unstable();
        let known = if known.is_empty() {
            "none".to_owned()
        } else {
            known.join(", ")
        };
        Error::Unknown {
            what: what.to_owned(),
            name: name.to_owned(),
            known,
        }
    }

    /// Takes the descriptor `name`, if it was inherited.
    pub fn take(&mut self, name: &str) -> Option<OwnedFd> {
        self.0.remove(name)
    }

    /// Takes what `source` names if it is `fd:NAME`; `None` if it is a path.
    pub fn named(&mut self, what: &str, source: &str) -> Result<Option<OwnedFd>, Error> {
        let Some(name) = source.strip_prefix(FD_PREFIX) else {
            return Ok(None);
        };
        match self.take(name) {
            Some(fd) => Ok(Some(fd)),
            None => Err(self.unknown(what, name)),
        }
    }

    /// Opens `source`, a path or `fd:NAME`, for reading and, with `write`, for writing.
    pub fn file(&mut self, what: &str, source: &str, write: bool) -> Result<File, Error> {
        match self.named(what, source)? {
            Some(fd) => Ok(fd.into()),
            None => File::options()
                .read(true)
                .write(write)
                .open(source)
                .map_err(|error| open_error(what, Path::new(source), error)),
        }
    }

    /// Opens `source` for appending, making it if need be. A named pipe is opened so that neither the open nor a write
    /// ever waits for its reader.
    pub fn sink(&mut self, what: &str, source: &str) -> Result<File, Error> {
        if let Some(fd) = self.named(what, source)? {
            return Ok(fd.into());
        }
        let mut options = File::options();
        options
            .append(true)
            .create(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let opened = options.open(source).or_else(|error| match error.raw_os_error() {
            // A pipe that nobody reads yet: with an end of our own for reading it can be opened.
            Some(libc::ENXIO) => options.read(true).open(source),
            _ => Err(error),
        });
        opened.map_err(|error| open_error(what, Path::new(source), error))
    }
}

/// An error about a path.
pub fn open_error(what: &str, path: &Path, source: std::io::Error) -> Error {
    Error::Open {
        what: what.to_owned(),
        path: path.display().to_string(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        let named: Named = "tap0=7".parse().unwrap();
        assert_eq!(
            named,
            Named {
                name: "tap0".into(),
                number: 7
            }
        );
        for text in ["tap0", "tap0=", "=3", "tap0=-1", "a:b=3", "tap0=x"] {
            assert!(text.parse::<Named>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_pipe_without_a_reader_is_opened_and_never_waits() {
        use std::io::{ErrorKind, Write};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
        let mut sink = Inherited::default().sink("log", path.to_str().unwrap()).unwrap();
        while let Ok(1..) = sink.write(&[b'x'; 4096]) {}
        assert_eq!(sink.write(b"x").unwrap_err().kind(), ErrorKind::WouldBlock);
    }

    #[test]
    fn descriptors_that_come_later_take_no_name_twice() {
        let file = || -> OwnedFd { tempfile::tempfile().unwrap().into() };
        let mut inherited = Inherited::default();
        inherited.insert("disk", file()).unwrap();
        assert!(inherited.insert("disk", file()).is_err());
        assert!(inherited.insert("a:b", file()).is_err());
        let mut more = Inherited::default();
        more.insert("other", file()).unwrap();
        more.insert("disk", file()).unwrap();
        assert!(inherited.adopt_all(more).is_err());
        assert!(inherited.known("x", "fd:other").is_err(), "all or none");
        let mut copy = inherited.try_clone().unwrap();
        assert!(copy.take("disk").is_some() && inherited.known("x", "fd:disk").is_ok());
    }

    #[test]
    fn what_is_not_there_is_named() {
        let mut inherited = Inherited::default();
        let file = tempfile::tempfile().unwrap();
        inherited.0.insert("kernel".into(), file.into());
        let message = inherited
            .file("root drive", "fd:root", false)
            .unwrap_err()
            .to_string();
        assert!(message.contains("root drive") && message.contains("\"root\"") && message.contains("kernel"));
        assert!(inherited.file("kernel", "fd:kernel", false).is_ok());
        assert!(inherited.file("kernel", "fd:kernel", false).is_err(), "used up");
        let message = inherited
            .file("disk", "/nowhere/at/all", true)
            .unwrap_err()
            .to_string();
        assert!(message.contains("disk") && message.contains("/nowhere/at/all"));
    }
}
