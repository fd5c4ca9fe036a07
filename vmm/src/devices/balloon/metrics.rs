//! What a balloon counts.

use serde::Serialize;

/// Pages, bytes and refusals since the start.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Metrics {
    /// Pages (4 KiB) that the guest put into the balloon.
    pub(super) inflate_count: u64,
    /// Pages that it took out again.
    pub(super) deflate_count: u64,
    /// Statistics that it sent.
    pub(super) stats_updates_count: u64,
    /// Reports of free pages.
    pub(super) free_page_report_count: u64,
    /// Bytes in them that went back to the host.
    pub(super) free_page_report_freed: u64,
    /// Ranges that the host did not take back.
    pub(super) discard_fails: u64,
}
