//! The device models.

pub mod balloon;
pub mod blk;
pub mod control;
pub mod generation;
pub mod net;
pub mod pmem;
pub mod rng;
pub mod serial;
pub mod virtio;
pub mod vsock;
