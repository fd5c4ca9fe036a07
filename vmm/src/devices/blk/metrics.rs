//! What a drive counts.

use serde::Serialize;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::devices::blk::request::Status;

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
    /// Times that a request found the host's disk full.
    pub(super) host_full_count: u64,
}

impl Metrics {
    /// Counts a request of type `kind` with `bytes` of data.
    pub(super) fn count(&mut self, kind: u32, status: Status, bytes: u64) {
        match (status, kind) {
            (Status::Error | Status::Unsupported, _) => self.execute_fails += 1,
            (Status::Ok, VIRTIO_BLK_T_IN) => {
                self.read_count += 1;
                self.read_bytes += bytes;
            }
            (Status::Ok, VIRTIO_BLK_T_OUT) => {
                self.write_count += 1;
                self.write_bytes += bytes;
            }
            (Status::Ok, VIRTIO_BLK_T_FLUSH) => self.flush_count += 1,
            (Status::Ok, VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => self.discard_count += 1,
            (Status::Ok, _) => {}
        }
    }
}

/// What `GET /metrics` shows of a drive.
#[derive(Debug, Serialize)]
pub(super) struct Shown {
    #[serde(flatten)]
    pub(super) counts: Metrics,
    /// How requests are executed: `Sync` or `Async`.
    pub(super) io_engine: &'static str,
    /// Why they are executed by `Sync` although `Async` was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) io_engine_fallback: Option<String>,
    /// Requests that the host is executing now.
    pub(super) inflight: usize,
    /// Requests that wait for space on the host's disk now.
    pub(super) waiting_for_space: usize,
    /// Times that the rate limiter stopped the drive.
    pub(super) throttled: u64,
}
