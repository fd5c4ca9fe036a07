//! What the stream sockets count.

use serde::Serialize;

/// Packets and bytes of data since the start, in both directions: rx to the guest, tx from it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Metrics {
    /// Packets to the guest.
    pub(super) rx_packets_count: u64,
    /// Bytes of data in them.
    pub(super) rx_bytes_count: u64,
    /// Packets from the guest.
    pub(super) tx_packets_count: u64,
    /// Bytes of data in them.
    pub(super) tx_bytes_count: u64,
    /// Streams that began: inwards with their greeting, outwards with a service that took them.
    pub(super) conns_added: u64,
    /// Streams that ended.
    pub(super) conns_removed: u64,
    /// Packets that ended a stream or refused one, to the guest.
    pub(super) rx_resets: u64,
    /// The same from the guest.
    pub(super) tx_resets: u64,
    /// Resets that found no room to wait in.
    pub(super) resets_dropped: u64,
}
