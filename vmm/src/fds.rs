//! Descriptors by name: what the monitor inherited, and paths where paths are allowed.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
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
            None => {
                let mut known: Vec<&str> = self.0.keys().map(String::as_str).collect();
                known.sort_unstable();
                let known = if known.is_empty() {
                    "none".to_owned()
                } else {
                    known.join(", ")
                };
                Err(Error::Unknown {
                    what: what.to_owned(),
                    name: name.to_owned(),
                    known,
                })
            }
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

    /// Opens `source` for appending, making it if need be.
    pub fn sink(&mut self, what: &str, source: &str) -> Result<File, Error> {
        match self.named(what, source)? {
            Some(fd) => Ok(fd.into()),
            None => File::options()
                .append(true)
                .create(true)
                .open(source)
                .map_err(|error| open_error(what, Path::new(source), error)),
        }
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
