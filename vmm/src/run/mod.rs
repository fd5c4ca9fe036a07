//! `mandoline-vmm run`: boots a sliver by hand.
//!
//! ```text
//! run (stays root, outside the limits)                     monitor (its child, jailed, in the cgroup)
//!   limits: cgroup, tap, HTB      ----- descriptors ----->   `mandoline-vmm vm --config-file fd:config ...`
//!   joins the agent over vsock    <------- streams ------>   the guest
//!   waits; undoes everything      <----- exit status -----
//! ```
//!
//! It is a node manager for one VM: what it starts is what a node manager starts, by the same means.

pub mod agent;
pub mod options;
mod parts;
pub mod supervise;

pub use options::RunArgs;
pub use supervise::run;
