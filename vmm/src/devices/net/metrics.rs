//! What an interface counts.

use serde::Serialize;

/// What went by.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Frames to the guest.
    pub rx_frames: u64,
    /// Their bytes, without the virtio-net header.
    pub rx_bytes: u64,
    /// Frames that were too long for the guest's buffers.
    pub rx_dropped: u64,
    /// How often the limiter stopped what comes to the guest.
    pub rx_throttled: u64,
    /// Frames from the guest.
    pub tx_frames: u64,
    /// Their bytes, without the virtio-net header.
    pub tx_bytes: u64,
    /// Frames from the guest that the tap refused (a bad offload request, an interface that is down).
    pub tx_dropped: u64,
    /// How often the limiter stopped what the guest sends.
    pub tx_throttled: u64,
}
