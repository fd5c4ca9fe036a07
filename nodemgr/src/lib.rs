//! The node manager: pools, slivers, enforcement; and the slice creation service beside it.

pub mod net;
pub mod scs;
