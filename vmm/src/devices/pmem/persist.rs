//! The saved state of persistent memory: where the guest has it, which must still be true. What is in it is in its file.

use serde::{Deserialize, Serialize};

use crate::devices::pmem::Pmem;
use crate::devices::virtio::persist::{RestoreError, Saved};
use crate::devices::virtio::rate_limiter::SavedRateLimiter;

const VERSION: u16 = 1;
const DEVICE: &str = "pmem";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// Where the guest was told that it begins.
    start: u64,
    /// How many bytes the guest was told of.
    size: u64,
    read_only: bool,
    limiter: SavedRateLimiter,
}

pub(super) fn save(pmem: &Pmem) -> Saved {
    Saved::new(
        VERSION,
        &State {
            start: pmem.window.start,
            size: pmem.window.end - pmem.window.start,
            read_only: pmem.read_only,
            limiter: pmem.limiter.save(),
        },
    )
}

/// The guest has the window in its page tables: the device must have the same.
pub(super) fn restore(pmem: &mut Pmem, saved: &Saved) -> Result<(), RestoreError> {
    let state: State = saved.read(DEVICE, VERSION)?;
    let same = |name, value: u64, here: u64| {
        if value == here {
            return Ok(());
        }
        Err(RestoreError::Value {
            device: DEVICE,
            name,
            value: value.to_string(),
            allowed: here.to_string(),
        })
    };
    same("start", state.start, pmem.window.start)?;
    same("size", state.size, pmem.window.end - pmem.window.start)?;
    same("read_only", u64::from(state.read_only), u64::from(pmem.read_only))?;
    pmem.limiter.restore(&state.limiter);
    Ok(())
}
