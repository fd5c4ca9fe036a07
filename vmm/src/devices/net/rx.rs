//! Tap to guest.
//!
//! ```text
//!  tap --read--> frame (one, 64 KiB) --limiter--> RX chains (merged) --> used, one interrupt a round
//!                    |                   |
//!                    |                   +-- throttled: the frame waits for the limiter's timer
//!                    +-- no RX chain: the frame waits for the driver's kick
//! ```
//!
//! While a frame waits the tap is left alone, and its own queue takes and drops what comes.

use std::fs::File;
use std::io::{self, Read};

use crate::devices::net::tap::HEADER_BYTES;
use crate::devices::net::{MAX_FRAME, QUEUE_SIZE};
use crate::devices::virtio::DeviceError;
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::queue::WorkQueue;
use crate::devices::virtio::rate_limiter::RateLimiter;

/// Frames from the tap in one go, so that a flood leaves time for the other devices.
const ROUND: usize = 256;
/// Where the header counts merged buffers.
const NUM_BUFFERS_AT: usize = 10;

/// See the module.
pub(super) struct Receive {
    pub(super) limiter: RateLimiter,
    /// Frames that the guest got, and their bytes.
    pub(super) frames: u64,
    pub(super) bytes: u64,
    /// Frames that were too long for the guest's buffers.
    pub(super) dropped: u64,
    /// The frame under way.
    frame: Box<[u8]>,
    /// Its length with header; 0: none.
    waiting: usize,
    /// Whether the limiter let it pass already.
    passed: bool,
    chain: Chain,
    /// Chains that take one merged frame: (head, bytes).
    taken: Vec<(u16, u32)>,
}

enum Delivery {
    Done,
    /// Longer than all of the guest's buffers together can ever be.
    TooLong,
    NoBuffers,
}

impl Receive {
    pub(super) fn new(limiter: RateLimiter) -> Self {
        Self {
            limiter,
            frames: 0,
            bytes: 0,
            dropped: 0,
            // Zeroed by the kernel when touched: an idle interface costs a page or two of it.
            frame: vec![0; MAX_FRAME].into_boxed_slice(),
            waiting: 0,
            passed: false,
            chain: Chain::default(),
            taken: Vec::with_capacity(usize::from(QUEUE_SIZE)),
        }
    }

    /// Forgets the frame that waits.
    pub(super) fn reset(&mut self) {
        self.waiting = 0;
    }

    /// Whether a frame waits.
    #[cfg(test)]
    pub(super) fn waits(&self) -> bool {
        self.waiting != 0
    }

    /// Moves what is there, as far as buffers and limiter go.
    pub(super) fn run(&mut self, tap: &mut File, rx: &mut WorkQueue, merge: bool) -> Result<(), DeviceError> {
        if self.limiter.is_throttled() {
            return Ok(());
        }
        let mut budget = ROUND;
        loop {
            if self.waiting == 0 {
                if budget == 0 {
                    rx.again();
                    break;
                }
                budget -= 1;
                match tap.read(&mut self.frame) {
                    Ok(0) => break,
                    Ok(length) if length > HEADER_BYTES => self.waiting = length,
                    // No frame at all; what stands behind it may be one.
                    Ok(_) => {
                        self.dropped += 1;
                        continue;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    // EAGAIN: nothing more. EIO or EBADFD: the interface is down or gone; it may come back.
                    Err(_) => break,
                }
                self.passed = false;
            }
            let bytes = (self.waiting - HEADER_BYTES) as u64;
            if !self.passed && !self.limiter.consume(bytes, 1) {
                break;
            }
            self.passed = true;
            match self.deliver(rx, merge)? {
                Delivery::Done => {
                    self.frames += 1;
                    self.bytes += bytes;
                }
                Delivery::TooLong => self.dropped += 1,
                Delivery::NoBuffers => break,
            }
            self.waiting = 0;
        }
        rx.announce()
    }

    /// Puts the frame into as many chains as it takes, all or none.
    fn deliver(&mut self, rx: &mut WorkQueue, merge: bool) -> Result<Delivery, DeviceError> {
        let Self { chain, taken, .. } = self;
        let frame = &mut self.frame[..self.waiting];
        taken.clear();
        let mut done = 0;
        let mut count_at = None;
        while done < frame.len() {
            if taken.len() == rx.round() || (!merge && !taken.is_empty()) {
                // A frame that does not fit is dropped; what was popped for it is given back empty.
                for (head, _) in taken.drain(..) {
                    rx.used(head, 0)?;
                }
                return Ok(Delivery::TooLong);
            }
            if !rx.pop(chain)? {
                // Before the chains go back: the driver is to say when there is one more than these.
                if rx.want_kicks()? {
                    rx.no_kicks()?;
                    continue;
                }
                for (head, _) in taken.drain(..).rev() {
                    chain.head = head;
                    rx.unpop(chain);
                }
                return Ok(Delivery::NoBuffers);
            }
            chain.only_writable().map_err(|error| rx.refuse(error))?;
            let room = chain.writable.bytes();
            if taken.is_empty() {
                if room < HEADER_BYTES as u64 {
                    let error = chain.wrong_length("receive buffer", room, HEADER_BYTES as u64, u64::MAX);
                    return Err(rx.refuse(error));
                }
                // The number of merged buffers is known at the end only: remember where it stands.
                frame[NUM_BUFFERS_AT..HEADER_BYTES].copy_from_slice(&1u16.to_le_bytes());
                count_at = chain.writable.place_of_u16(NUM_BUFFERS_AT);
            }
            let written = chain.writable.put_front(&frame[done..]);
            done += written;
            taken.push((chain.head, written as u32));
        }
        if taken.len() > 1
            && let Some(place) = count_at
        {
            place.set(taken.len() as u16);
        }
        for (head, bytes) in taken.drain(..) {
            rx.used(head, bytes)?;
        }
        Ok(Delivery::Done)
    }
}
