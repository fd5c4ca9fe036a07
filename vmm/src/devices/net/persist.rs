//! An interface's saved state: what the guest was told of it, and how far its limits are used.
//!
//! A frame that waits for the guest's buffers is not kept: networks lose frames, and its sender sends it again.

use serde::{Deserialize, Serialize};

use crate::devices::virtio::persist::{RestoreError, Saved};
use crate::devices::virtio::rate_limiter::SavedRateLimiter;

const VERSION: u16 = 1;
pub(super) const DEVICE: &str = "net";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    /// The configuration space: address, status, queue pairs, MTU.
    pub(super) config: [u8; 12],
    /// What comes to the guest.
    pub(super) rx_rate_limiter: SavedRateLimiter,
    /// What the guest sends.
    pub(super) tx_rate_limiter: SavedRateLimiter,
}

pub(super) fn save(state: &State) -> Saved {
    Saved::new(VERSION, state)
}

pub(super) fn restore(saved: &Saved) -> Result<State, RestoreError> {
    saved.read(DEVICE, VERSION)
}
