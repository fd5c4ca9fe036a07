//! A balloon's saved state: what was asked of the guest and what it said.

use mandoline_api::monitor::BalloonStats;
use serde::{Deserialize, Serialize};

use crate::devices::balloon::Balloon;
use crate::devices::virtio::persist::{RestoreError, Saved};

const VERSION: u16 = 1;
const DEVICE: &str = "balloon";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// Pages that the balloon shall have.
    target_pages: u32,
    /// Pages that it has.
    actual_pages: u32,
    /// Time between statistics in s.
    stats_polling_interval_s: u16,
    /// What the guest said last.
    stats: BalloonStats,
}

pub(super) fn save(balloon: &Balloon) -> Saved {
    Saved::new(
        VERSION,
        &State {
            target_pages: balloon.target_pages(),
            actual_pages: balloon.actual_pages(),
            stats_polling_interval_s: balloon.options.stats_polling_interval_s,
            stats: balloon.stats,
        },
    )
}

/// What the guest has in its balloon comes back with its memory; so the target does, too.
pub(super) fn restore(balloon: &mut Balloon, saved: &Saved) -> Result<(), RestoreError> {
    let state: State = saved.read(DEVICE, VERSION)?;
    let refused = |name, value: String, allowed: String| RestoreError::Value {
        device: DEVICE,
        name,
        value,
        allowed,
    };
    if u64::from(state.target_pages) > balloon.memory_pages {
        let allowed = format!("up to {}, what the guest has", balloon.memory_pages);
        return Err(refused("target_pages", state.target_pages.to_string(), allowed));
    }
    let interval = state.stats_polling_interval_s;
    if (interval == 0) != (balloon.options.stats_polling_interval_s == 0) {
        let allowed = if interval == 0 { "1 or more" } else { "0" };
        return Err(refused(
            "stats_polling_interval_s",
            interval.to_string(),
            allowed.to_owned(),
        ));
    }
    balloon.set_target_pages(state.target_pages);
    balloon.set_actual_pages(state.actual_pages);
    balloon.set_interval(interval);
    balloon.stats = state.stats;
    Ok(())
}
