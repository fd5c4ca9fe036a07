//! What changes of a drive while its guest runs: its limits, its size, its file.

use std::fs::File;
use std::io;

use mandoline_api::monitor as api;
use rustix::fs::OFlags;

use crate::devices::blk::{Blk, sectors};
use crate::devices::virtio::{Device, DeviceError};

/// Why a drive stays as it is.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// The guest would lose what lies behind the new end.
    #[error("the file has {got} sectors of 512 bytes; allowed: {least} or more, what the guest sees")]
    Smaller {
        /// The file's.
        got: u64,
        /// The drive's.
        least: u64,
    },
    /// The file is not open for what the guest may do.
    #[error("the file is not open for {wanted}")]
    Access {
        /// What it must be open for.
        wanted: &'static str,
    },
    /// The host refused.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// What was in flight could not be ended.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

fn host(what: &'static str) -> impl Fn(io::Error) -> UpdateError {
    move |source| UpdateError::Host { what, source }
}

impl Blk {
    /// Replaces the limits that `config` names.
    pub fn set_rate_limiter(&mut self, config: &api::RateLimiter) {
        self.limiter.update(config);
    }

    /// Shows the guest what its file has become since it was opened; returns the sectors of 512 bytes. A file that became
    /// smaller is refused.
    pub fn grow(&mut self) -> Result<u64, UpdateError> {
        let got = sectors(&mut self.engine.file).map_err(host("finding the file's size"))?;
        let least = self.disk.sectors;
        if got < least {
            return Err(UpdateError::Smaller { got, least });
        }
        self.show(got);
        Ok(got)
    }

    /// Goes on with another file, as Firecracker's `PATCH /drives` does: what was in flight ends on the old one, and the
    /// guest sees the new one's size. A smaller one is taken only if `may_shrink`: the guest may have a file system
    /// there. Where it is the file that the drive has already, the drive keeps its engine; with any other, `Async`
    /// becomes `Sync`, since a ring knows no other file than that of the start.
    pub fn replace_file(&mut self, mut file: File, may_shrink: bool) -> Result<u64, UpdateError> {
        let mode = rustix::fs::fcntl_getfl(&file).map_err(|error| host("the file's mode")(error.into()))?;
        let wanted = if self.disk.read_only {
            "reading"
        } else {
            "reading and writing"
        };
        let access = mode & OFlags::ACCMODE;
        let fits = access == OFlags::RDWR || self.disk.read_only && access == OFlags::RDONLY;
        // What only names a file (O_PATH) reads as read-only.
        if !fits || mode.contains(OFlags::PATH) {
            return Err(UpdateError::Access { wanted });
        }
        let got = sectors(&mut file).map_err(host("finding the file's size"))?;
        let least = self.disk.sectors;
        if got < least && !may_shrink {
            return Err(UpdateError::Smaller { got, least });
        }
        let stat = |file: &File| rustix::fs::fstat(file).map_err(|error| host("fstat")(error.into()));
        let (old, new) = (stat(&self.engine.file)?, stat(&file)?);
        if let Err(error) = self.drain() {
            // As in the event loop: the device is broken until its driver resets it.
            let interrupt = self.interrupt.clone();
            self.reset();
            if let Some(interrupt) = interrupt {
                interrupt.needs_reset();
            }
            return Err(error.into());
        }
        if (old.st_dev, old.st_ino) != (new.st_dev, new.st_ino) {
            self.engine.replace(file);
        }
        self.show(got);
        Ok(got)
    }

    /// Tells the guest of a new size.
    fn show(&mut self, sectors: u64) {
        if sectors != self.disk.sectors {
            self.set_sectors(sectors);
            if let Some(interrupt) = &self.interrupt {
                interrupt.config_changed();
            }
        }
    }
}
