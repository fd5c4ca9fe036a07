//! `mandoline-vmm run`: boots a sliver by hand.
//!
//! ```text
//! run (stays root, outside the limits)                     monitor (its child, jailed, in the cgroup)
//!   limits: cgroup, tap, HTB      ----- descriptors ----->   `mandoline-vmm vm --config-file fd:config ...`
//!   joins the agent over vsock    <------- streams ------>   the guest
//!   `set`: other limits           <--- control socket --->
//!   waits; undoes everything      <----- exit status -----
//! ```
//!
//! It is a node manager for one VM: what it starts is what a node manager starts, by the same means.

pub mod agent;
pub mod control;
pub mod limits;
pub mod options;
mod parts;
pub mod place;
pub mod set;
pub mod supervise;

pub use options::RunArgs;
pub use set::{SetArgs, set};
pub use supervise::run;
