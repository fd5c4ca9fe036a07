//! The guest's statistics: 10-byte entries of tag and value (virtio 1.2, section 5.5.6.3).

use mandoline_api::monitor::BalloonStats;

use crate::devices::virtio::chain::{Buffers, Chain, ChainError};

/// Bytes of an entry: le16 tag, le64 value.
const ENTRY_BYTES: usize = 10;
/// Most entries in a buffer. There are 16 tags; one that sends thousands wants to waste our time.
const MAX_ENTRIES: u64 = 256;

/// Reads a buffer of entries into `stats`. Tags that have no name here are ignored (5.5.6.3.2), and so is what is no
/// whole entry at the end.
pub(super) fn read(chain: &mut Chain, stats: &mut BalloonStats) -> Result<(), ChainError> {
    let bytes = chain.readable.bytes();
    let most = MAX_ENTRIES * ENTRY_BYTES as u64;
    if bytes > most {
        return Err(chain.wrong_length("statistics", bytes, 0, most));
    }
    entries(&mut chain.readable, |tag, value| {
        if let Some(place) = place(stats, tag) {
            *place = Some(value);
        }
    });
    Ok(())
}

fn entries(from: &mut Buffers, mut each: impl FnMut(u16, u64)) {
    let mut entry = [0u8; ENTRY_BYTES];
    while from.take_front(&mut entry) {
        let [t0, t1, v0, v1, v2, v3, v4, v5, v6, v7] = entry;
        let value = u64::from_le_bytes([v0, v1, v2, v3, v4, v5, v6, v7]);
        each(u16::from_le_bytes([t0, t1]), value);
    }
}

/// Where the value of a tag goes: 0 to 9 of virtio 1.2 (5.5.6.4), the rest of Linux (`VIRTIO_BALLOON_S_*`).
fn place(stats: &mut BalloonStats, tag: u16) -> Option<&mut Option<u64>> {
    Some(match tag {
        0 => &mut stats.swap_in,
        1 => &mut stats.swap_out,
        2 => &mut stats.major_faults,
        3 => &mut stats.minor_faults,
        4 => &mut stats.free_memory,
        5 => &mut stats.total_memory,
        6 => &mut stats.available_memory,
        7 => &mut stats.disk_caches,
        8 => &mut stats.hugetlb_allocations,
        9 => &mut stats.hugetlb_failures,
        10 => &mut stats.oom_kill,
        11 => &mut stats.alloc_stall,
        12 => &mut stats.async_scan,
        13 => &mut stats.direct_scan,
        14 => &mut stats.async_reclaim,
        15 => &mut stats.direct_reclaim,
        _ => return None,
    })
}
