//! The lab's directory: one place for everything, short (Unix socket paths end at 107 bytes), locked while in use,
//! and swept at the next start when its owner was killed.

use crate::{LabError, Result, process};
use rustix::fs::FlockOperation;
use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

const PREFIX: &str = "lab-";
const LOCK: &str = "lock";

/// A lab's directory, removed when dropped.
#[derive(Debug)]
pub(crate) struct WorkDir {
    path: PathBuf,
    _lock: File,
}

/// Where labs live: `MANDOLINE_LAB_DIR`, else a directory of this user's below the system's temporary one.
pub(crate) fn base() -> Result<PathBuf> {
    let uid = rustix::process::getuid().as_raw();
    let base = match std::env::var_os("MANDOLINE_LAB_DIR") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => std::env::temp_dir().join(format!("mandoline-lab-{uid}")),
    };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&base)
        .map_err(LabError::file("make the directory", &base))?;
    // In /tmp anybody could have made it first, to look into our sockets.
    let owner = std::fs::metadata(&base)
        .map_err(LabError::file("look at", &base))?
        .uid();
    if owner != uid {
        return Err(LabError::Value {
            name: "the lab directory's owner",
            value: format!("uid {owner} of {}", base.display()),
            allowed: format!("uid {uid}; or set MANDOLINE_LAB_DIR to a directory of your own"),
        });
    }
    std::path::absolute(&base).map_err(LabError::file("find", &base))
}

impl WorkDir {
    pub(crate) fn new() -> Result<WorkDir> {
        let base = base()?;
        sweep_in(&base)?;
        let made = tempfile::Builder::new()
            .prefix(PREFIX)
            .rand_bytes(6)
            .tempdir_in(&base)
            .map_err(LabError::file("make a directory in", &base))?;
        let lock_path = made.path().join(LOCK);
        let lock = File::create(&lock_path).map_err(LabError::file("make", &lock_path))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|e| LabError::file("lock", &lock_path)(e.into()))?;
        let path = made.keep();
        process::register_directory(path.clone());
        Ok(WorkDir { path, _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        // What cannot be removed now is swept at the next start.
        let _ = std::fs::remove_dir_all(&self.path);
        process::forget_directory(&self.path);
    }
}

/// Removes the directories of labs whose owner is gone; gives their number.
pub fn sweep() -> Result<usize> {
    sweep_in(&base()?)
}

fn sweep_in(base: &Path) -> Result<usize> {
    let mut swept = 0;
    let entries = std::fs::read_dir(base).map_err(LabError::file("list", base))?;
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let free = match File::open(entry.path().join(LOCK)) {
            Ok(lock) => rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok(),
            // Between mkdir and lock there is a moment without one: leave the young alone.
            Err(_) => entry
                .metadata()
                .and_then(|m| m.modified())
                .is_ok_and(|t| t.elapsed().is_ok_and(|age| age.as_secs() > 60)),
        };
        if free && std::fs::remove_dir_all(entry.path()).is_ok() {
            swept += 1;
        }
    }
    Ok(swept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_dead_are_swept() {
        let base = tempfile::tempdir().expect("temporary directory");
        let dead = base.path().join("lab-dead");
        let alive = base.path().join("lab-alive");
        let young = base.path().join("lab-young");
        let other = base.path().join("something");
        for d in [&dead, &alive, &young, &other] {
            std::fs::create_dir(d).expect("mkdir");
        }
        File::create(dead.join(LOCK)).expect("lock file");
        let lock = File::create(alive.join(LOCK)).expect("lock file");
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).expect("lock");
        assert_eq!(sweep_in(base.path()).expect("sweep"), 1);
        assert!(!dead.exists());
        assert!(alive.exists() && young.exists() && other.exists());
    }
}
