//! A VM's limits on the host: cgroup v2, tap, HTB over netlink.
//!
//! Three layers. [`cgroup`], [`tap`] and [`netlink`] are the kernel's interfaces, typed.
//! [`shaper`] is one HTB tree on an IFB device through which everything goes that any tap sends.
//! [`vm`] puts them together for a monitor that is started by hand; the node manager uses the
//! parts. Everything here needs root (or the capabilities `CAP_NET_ADMIN` and write access to
//! the cgroup tree) and acts in the network namespace of the calling thread.

// A test may stop at what it did not expect.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod cgroup;
mod error;
pub mod netlink;
mod rate;
pub mod shaper;
pub mod sysctl;
pub mod tap;
pub mod vm;

pub use error::{Error, Result};
pub use rate::Rate;
