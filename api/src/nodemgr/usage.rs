//! What the node and its slivers use, against what they may: `GET /v1/usage`.

use serde::{Deserialize, Serialize};

use super::{SliverState, VmId};

/// What is used at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// When, in ns since 1970.
    pub unix_ns: u64,
    /// The node as a whole.
    pub node: NodeUse,
    /// The slivers that the caller may see, by vm_id.
    pub slivers: Vec<SliverUse>,
}

/// The node as a whole. What could not be found out is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeUse {
    /// CPUs.
    pub cpus: u64,
    /// Load average over 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// Seconds since the node booted.
    pub uptime_s: u64,
    /// Memory, in bytes.
    pub memory_total: u64,
    /// Memory that programs could still have, in bytes.
    pub memory_available: u64,
    /// Size of the file system that holds the slivers' disks, in bytes.
    pub disk_total: u64,
    /// Free on it, in bytes.
    pub disk_free: u64,
}

/// One sliver. What its backend or the network cannot tell, since it does not run, is 0; so is what an older node
/// manager does not know.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SliverUse {
    /// The VM.
    pub vm_id: VmId,
    /// The slice.
    pub slice: String,
    /// Its `vm_type`.
    pub vm_type: String,
    /// Its state.
    pub state: SliverState,
    /// CPU time of its present run, in microseconds.
    pub cpu_us: u64,
    /// Its `cpu_share`.
    pub cpu_share: u64,
    /// Its `cpu_guarantee`, of 1000.
    pub cpu_guarantee: u64,
    /// Memory with its monitor, in bytes.
    pub memory: u64,
    /// Its `mem_limit`, in bytes.
    pub mem_limit: u64,
    /// Allocated blocks of its disk, in bytes.
    pub disk: u64,
    /// Its `disk_quota`, in bytes.
    pub disk_quota: u64,
    /// Sent, in bytes.
    pub sent_bytes: u64,
    /// Sent packets.
    pub sent_packets: u64,
    /// Packets that it sent faster than it may, and that were dropped.
    pub dropped_packets: u64,
    /// Received, in bytes.
    pub received_bytes: u64,
    /// Received packets.
    pub received_packets: u64,
    /// Frames dropped since their source was not the sliver's.
    pub spoofed_frames: u64,
    /// First packets of flows refused above its flow limit.
    pub refused_flows: u64,
    /// Sent by its slice since the slice's day began, in bytes.
    pub day_bytes: u64,
    /// What its slice may send in a day before its `sustained_rate` holds, in bytes; 0 = any amount.
    pub day_budget: u64,
    /// Its `base_rate`, in bit/s.
    pub base_rate: u64,
    /// Its `burst_rate`, in bit/s; 0 = the node's.
    pub burst_rate: u64,
}
