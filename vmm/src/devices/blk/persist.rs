//! A drive's saved state: what the guest was told of it, which must still be true, and its limits.
//!
//! Requests that wait for space on the host's disk are not in it: their heads are in the queue's progress, and they
//! are read again from the guest's memory.

use serde::{Deserialize, Serialize};

use crate::devices::blk::Blk;
use crate::devices::virtio::persist::{RestoreError, Saved};
use crate::devices::virtio::rate_limiter::SavedRateLimiter;

const VERSION: u16 = 1;
const DEVICE: &str = "blk";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// Sectors that the guest was told of.
    sectors: u64,
    read_only: bool,
    rate_limiter: SavedRateLimiter,
}

pub(super) fn save(blk: &Blk) -> Saved {
    Saved::new(
        VERSION,
        &State {
            sectors: blk.disk.sectors,
            read_only: blk.disk.read_only,
            rate_limiter: blk.limiter.save(),
        },
    )
}

/// The drive of a restored VM may be another file, but neither shorter nor of another kind than the guest was told.
pub(super) fn restore(blk: &mut Blk, saved: &Saved) -> Result<(), RestoreError> {
    let state: State = saved.read(DEVICE, VERSION)?;
    let refused = |name, value: String, allowed: String| RestoreError::Value {
        device: DEVICE,
        name,
        value,
        allowed,
    };
    if state.sectors > blk.disk.sectors {
        let allowed = format!("up to {}, what the file has", blk.disk.sectors);
        return Err(refused("sectors", state.sectors.to_string(), allowed));
    }
    if state.read_only != blk.disk.read_only {
        let allowed = blk.disk.read_only.to_string();
        return Err(refused("read_only", state.read_only.to_string(), allowed));
    }
    blk.set_sectors(state.sectors);
    blk.limiter.restore(&state.rate_limiter);
    Ok(())
}
