//! Guest to tap.
//!
//! ```text
//!  TX chain --limiter--> writev --> tap
//!      ^        |           |
//!      |        |           +-- tap full: the chain goes back, EPOLLOUT goes on
//!      +--------+-- throttled: the chain goes back, the limiter's timer goes on
//! ```
//!
//! A frame goes to the tap straight from guest memory. A chain that went back is the next one again: nothing that
//! the guest handed over is lost.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::devices::net::MAX_FRAME;
use crate::devices::net::tap::HEADER_BYTES;
use crate::devices::virtio::DeviceError;
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::queue::WorkQueue;
use crate::devices::virtio::rate_limiter::RateLimiter;

/// See the module.
pub(super) struct Transmit {
    pub(super) limiter: RateLimiter,
    /// Frames that the tap took, and their bytes.
    pub(super) frames: u64,
    pub(super) bytes: u64,
    /// Frames that the tap refused (a bad offload request, an interface that is down).
    pub(super) dropped: u64,
    /// Bytes of the chain that the limiter let pass and that went back since the tap was full.
    passed: Option<u64>,
    chain: Chain,
}

impl Transmit {
    pub(super) fn new(limiter: RateLimiter) -> Self {
        Self {
            limiter,
            frames: 0,
            bytes: 0,
            dropped: 0,
            passed: None,
            chain: Chain::default(),
        }
    }

    /// Forgets the chain that went back.
    pub(super) fn reset(&mut self) {
        self.passed = None;
    }

    /// Moves what is there, as far as tap and limiter go.
    pub(super) fn run(&mut self, tap: &File, tx: &mut WorkQueue) -> Result<(), DeviceError> {
        if self.limiter.is_throttled() {
            return Ok(());
        }
        tx.no_kicks()?;
        let mut stopped = false;
        for _ in 0..tx.round() {
            if !tx.pop(&mut self.chain)? {
                break;
            }
            let chain = &self.chain;
            chain.only_readable().map_err(|error| tx.refuse(error))?;
            let bytes = chain.readable.bytes();
            let (least, most) = (HEADER_BYTES as u64 + 1, MAX_FRAME as u64);
            if bytes < least || bytes > most {
                return Err(tx.refuse(chain.wrong_length("frame", bytes, least, most)));
            }
            let bytes = bytes - HEADER_BYTES as u64;
            // A driver that put another chain in its place pays for that one too.
            if self.passed.take() != Some(bytes) && !self.limiter.consume(bytes, 1) {
                tx.unpop(chain);
                stopped = true;
                break;
            }
            match write_frame(tap, chain) {
                Ok(()) => {
                    self.frames += 1;
                    self.bytes += bytes;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.passed = Some(bytes);
                    tx.unpop(chain);
                    stopped = true;
                    break;
                }
                Err(_) => self.dropped += 1,
            }
            tx.used(chain.head, 0)?;
        }
        tx.announce()?;
        // Full tap and limiter say themselves when to go on.
        if !stopped && tx.want_kicks()? {
            tx.again();
        }
        Ok(())
    }
}

fn write_frame(tap: &File, chain: &Chain) -> io::Result<()> {
    let pieces = chain.readable.pieces();
    loop {
        // SAFETY: the pieces are guest memory (see `Buffers`), at most UIO_MAXIOV of them.
        let done = unsafe { libc::writev(tap.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) };
        if done >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
