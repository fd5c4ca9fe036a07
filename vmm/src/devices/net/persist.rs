//! An interface's saved state: what the guest was told of it.
//!
//! A frame that waits for the guest's buffers is not kept: networks lose frames, and its sender sends it again.

use serde::{Deserialize, Serialize};

use crate::devices::virtio::persist::{RestoreError, Saved};

const VERSION: u16 = 1;
const DEVICE: &str = "net";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// The configuration space: address, status, queue pairs, MTU.
    config: [u8; 12],
}

pub(super) fn save(config: &[u8; 12]) -> Saved {
    Saved::new(VERSION, &State { config: *config })
}

pub(super) fn restore(saved: &Saved) -> Result<[u8; 12], RestoreError> {
    let state: State = saved.read(DEVICE, VERSION)?;
    Ok(state.config)
}
