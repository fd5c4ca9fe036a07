//! Where a VM that was started by hand is found again: a directory of its name, which nobody else may enter.
//!
//! ```text
//! /run/mandoline-run/NAME/     root's; others': $XDG_RUNTIME_DIR/mandoline-run, or /tmp/mandoline-run-UID
//!   lock    held while the VM lives: one VM a name; what a killed one left is taken over
//!   vsock   the guest, unless --vsock
//!   api     the monitor's control socket, unless --api-sock
//!   set     what `mandoline-vmm set NAME` talks to
//! ```

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::run::supervise::{Error, host};

/// Longest name of a VM: its socket's path has to fit into 107 bytes.
const MAX_NAME: usize = 48;

/// The directory of the VM `name`, whether it is there or not.
pub fn directory(name: &str) -> Result<PathBuf, Error> {
    let letters = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    if name.is_empty() || name.len() > MAX_NAME || name.starts_with('.') || !name.bytes().all(letters) {
        return Err(Error::Name(name.to_owned()));
    }
    let uid = rustix::process::geteuid();
    let parent = if uid.is_root() {
        PathBuf::from("/run/mandoline-run")
    } else if let Some(runtime) = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
        Path::new(&runtime).join("mandoline-run")
    } else {
        std::env::temp_dir().join(format!("mandoline-run-{}", uid.as_raw()))
    };
    Ok(parent.join(name))
}

/// The directory of a VM that lives.
pub(super) struct Place {
    path: PathBuf,
    /// Locked until it is closed.
    _lock: File,
    /// What was made elsewhere, and goes with it.
    elsewhere: Vec<PathBuf>,
}

impl Place {
    /// Takes the directory of `name`, unless a VM of that name lives.
    pub(super) fn take(name: &str) -> Result<Self, Error> {
        let path = directory(name)?;
        let mut make = DirBuilder::new();
        make.mode(0o700)
            .recursive(true)
            .create(&path)
            .map_err(host(format!("making {}", path.display())))?;
        // In a directory that is everybody's, somebody else may have made it.
        for ours in [path.parent(), Some(&path)].into_iter().flatten() {
            let meta = ours
                .symlink_metadata()
                .map_err(host(ours.display().to_string()))?;
            if !meta.is_dir() || meta.uid() != rustix::process::geteuid().as_raw() || meta.mode() & 0o022 != 0
            {
                let source = io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    "not a directory of this user's alone",
                );
                return Err(host(ours.display().to_string())(source));
            }
        }
        let lock_path = path.join("lock");
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path);
        let lock = lock.map_err(host(lock_path.display().to_string()))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => Error::Taken(name.to_owned()),
            error => host(lock_path.display().to_string())(error.into()),
        })?;
        Ok(Self {
            path,
            _lock: lock,
            elsewhere: Vec::new(),
        })
    }

    /// Listens on the socket `name` in the directory, or on `wanted`.
    pub(super) fn listen(
        &mut self,
        name: &str,
        wanted: Option<&Path>,
    ) -> Result<(UnixListener, PathBuf), Error> {
        let path = match wanted {
            Some(path) => path.to_owned(),
            None => {
                let path = self.path.join(name);
                // Left by one that was killed; the lock says that it lives no more.
                let _ = std::fs::remove_file(&path);
                path
            }
        };
        let listener =
            UnixListener::bind(&path).map_err(host(format!("{name}: making {}", path.display())))?;
        if wanted.is_some() {
            self.elsewhere.push(path.clone());
        }
        Ok((listener, path))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for path in &self.elsewhere {
            let _ = std::fs::remove_file(path);
        }
        for name in ["vsock", "api", "set", "lock"] {
            let _ = std::fs::remove_file(self.path.join(name));
        }
        let _ = std::fs::remove_dir(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_in_their_directory() {
        for name in ["", ".", "..", "a/b", "a b", "ä", &"x".repeat(49)] {
            let error = directory(name).unwrap_err().to_string();
            assert!(error.contains("1 to 48"), "{error}");
        }
        assert!(directory("sliver-1.a_b").unwrap().ends_with("sliver-1.a_b"));
    }

    #[test]
    fn one_vm_a_name_and_leftovers_are_taken_over() {
        let name = format!("test-{}", std::process::id());
        let mut place = Place::take(&name).unwrap();
        let (_listener, path) = place.listen("api", None).unwrap();
        assert!(matches!(Place::take(&name), Err(Error::Taken(taken)) if taken == name));
        // As after kill -9: the lock is gone, the files are not.
        let directory = place.path.clone();
        rustix::fs::flock(&place._lock, FlockOperation::Unlock).unwrap();
        std::mem::forget(place);
        assert!(path.exists());
        let mut next = Place::take(&name).unwrap();
        next.listen("api", None).unwrap();
        drop(next);
        assert!(!directory.exists());
    }
}
