//! The demo's directory: gone when the demo ends, and when the demo was killed, gone when the next one begins.

use std::fs::{self, File};
use std::path::Path;

use tempfile::TempDir;

use crate::error::{About, Result};

const PREFIX: &str = "mandoline-demo-";
const LOCK: &str = "lock";

/// A temporary directory that is locked while its demo lives.
pub(super) struct WorkDir {
    dir: TempDir,
    _lock: File,
}

impl WorkDir {
    /// Makes one, and removes those of demos that were killed.
    pub(super) fn new() -> Result<Self> {
        let parent = std::env::temp_dir();
        sweep(&parent);
        Self::below(&parent)
    }

    fn below(parent: &Path) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(parent)
            .about(parent.display())?;
        let path = dir.path().join(LOCK);
        let lock = File::create(&path).about(path.display())?;
        lock.try_lock().about(path.display())?;
        Ok(Self { dir, _lock: lock })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Removes directories whose lock nobody holds. Others' are left alone: they cannot be locked, or not removed.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let abandoned = File::options()
            .write(true)
            .open(entry.path().join(LOCK))
            .is_ok_and(|lock| lock.try_lock().is_ok());
        if abandoned && let Err(error) = fs::remove_dir_all(entry.path()) {
            tracing::warn!(path = %entry.path().display(), %error, "cannot remove what a killed demo left");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_demo_left_is_removed_and_a_living_one_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let living = WorkDir::below(parent.path()).unwrap();
        let killed = WorkDir::below(parent.path()).unwrap();
        // As SIGKILL leaves it: the lock goes with the process, the directory stays.
        let WorkDir { dir, _lock } = killed;
        let left = dir.keep();
        drop(_lock);
        sweep(parent.path());
        assert!(living.path().exists());
        assert!(!left.exists());
        let path = living.path().to_owned();
        drop(living);
        assert!(!path.exists());
    }
}
