//! What a drive counts.

use serde::Serialize;

/// Requests, bytes and refusals since the start.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Metrics {
    /// Reads.
    pub(super) read_count: u64,
    /// Bytes read.
    pub(super) read_bytes: u64,
    /// Writes.
    pub(super) write_count: u64,
    /// Bytes written.
    pub(super) write_bytes: u64,
    /// Flushes.
    pub(super) flush_count: u64,
    /// Discards and write-zeroes.
    pub(super) discard_count: u64,
    /// Requests that ended with an error.
    pub(super) execute_fails: u64,
}
