//! The lab: virtual nodes, so that real slivers run where there is no VT-x, and where nobody is root.
//!
//! A lab node is a QEMU machine with the node image (`guest-image/node`), accelerated by KVM where the CPU lets
//! a guest have guests of its own, else emulated with AMD's SVM, so that `/dev/kvm` inside it is the real thing.
//!
//! ```text
//!   Lab ── directory (locked; swept at the next start should we be killed)
//!    │──── Hub: the nodes' joint network 10.99.0.0/24, on Unix sockets
//!    └──── Node ── QEMU (dies with us) ── user-mode network, restricted: forwards on 127.0.0.1 only
//!            │                     └───── guest's 10.0.2.100:80 ─► `mandoline-lab connect` ─► the authority here
//!            └──── ssh master (dies with us) ── exec, copy
//! ```
//!
//! ```no_run
//! use mandoline_lab::{Lab, NodeSpec};
//! let mut lab = Lab::new()?;
//! let node = lab.start(NodeSpec::named("node1"))?;
//! println!("{}", node.shell("uname -r")?);
//! # Ok::<(), mandoline_lab::LabError>(())
//! ```

pub mod accel;
mod boot;
mod config;
pub mod connect;
pub mod disks;
pub mod doctor;
mod error;
mod hub;
pub mod images;
mod lab;
mod node;
mod process;
mod qemu;
mod qmp;
mod spec;
mod ssh;
pub mod tiny_vm;
mod workdir;

pub use accel::Accel;
pub use error::LabError;
pub use images::{Images, SliverImages};
pub use lab::Lab;
pub use node::{Node, NodeInfo, Output, Phases};
pub use process::clean_up_on_signals;
pub use spec::NodeSpec;
pub use workdir::sweep;

/// What lab operations give.
pub type Result<T> = std::result::Result<T, LabError>;
