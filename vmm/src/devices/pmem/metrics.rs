//! What a persistent memory device counts.

use serde::Serialize;

/// Requests since the start.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Metrics {
    /// Flushes that the guest asked for.
    pub(super) flush_count: u64,
    /// Times that the file was synced for them: those that come together share one.
    pub(super) sync_count: u64,
    /// Requests that ended with an error.
    pub(super) execute_fails: u64,
}
