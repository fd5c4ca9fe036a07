//! How requests' steps are executed: one after the other in the event loop ([`sync`]), or many at once by the host's
//! kernel ([`ring`]).

pub(super) mod ring;
pub(super) mod sync;

use std::fs::File;
use std::os::fd::RawFd;

use mandoline_api::monitor::IoEngine;

use crate::devices::blk::QUEUE_SIZE;
use crate::devices::blk::engine::ring::Ring;

/// What a drive executes requests with.
pub(super) struct Engine {
    pub(super) file: File,
    /// For life, since the event loop watches its descriptor, even when it is used no more.
    ring: Option<Ring>,
    /// Why there is no ring although one was asked for, or it is used no more.
    pub(super) fallback: Option<String>,
}

impl Engine {
    /// An engine on `file`. Where the host has no io_uring for us, `Async` becomes `Sync` with a line in the log.
    pub(super) fn new(file: File, wanted: IoEngine, drive: &str) -> Self {
        let mut engine = Self {
            file,
            ring: None,
            fallback: None,
        };
        if wanted == IoEngine::Async {
            match Ring::new(&engine.file, u32::from(QUEUE_SIZE)) {
                Ok(ring) => engine.ring = Some(ring),
                Err(error) => {
                    tracing::warn!(drive, %error, "no io_uring on this host: requests are executed by Sync");
                    engine.fallback = Some(error.to_string());
                }
            }
        }
        engine
    }

    /// The ring, if requests go to it.
    pub(super) fn ring(&mut self) -> Option<&mut Ring> {
        match self.fallback {
            None => self.ring.as_mut(),
            Some(_) => None,
        }
    }

    /// The engine in use.
    pub(super) fn kind(&self) -> IoEngine {
        if self.ring.is_some() && self.fallback.is_none() {
            IoEngine::Async
        } else {
            IoEngine::Sync
        }
    }

    /// The descriptor that is ready when steps are done.
    pub(super) fn descriptor(&self) -> Option<RawFd> {
        self.ring.as_ref().map(Ring::descriptor)
    }

    /// Steps that the host is executing.
    pub(super) fn in_flight(&self) -> usize {
        self.ring.as_ref().map_or(0, Ring::in_flight)
    }

    /// Waits until the host executes nothing more; nobody hears of the results. What could not be submitted is never
    /// executed: then the ring is used no more.
    pub(super) fn quiesce(&mut self) {
        if let Some(ring) = &mut self.ring
            && !ring.quiesce()
            && self.fallback.is_none()
        {
            self.fallback = Some("steps could not be submitted".to_owned());
        }
    }

    /// Goes on with another file; nothing may be in flight. A ring knows the file that it was made with and no other: the
    /// door to change that is closed.
    pub(super) fn replace(&mut self, file: File) {
        self.file = file;
        if self.ring.is_some() && self.fallback.is_none() {
            self.fallback = Some("the file was replaced".to_owned());
        }
    }
}
