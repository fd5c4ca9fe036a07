//! The seam between the node manager's core and what runs VMs. The core knows slivers and their resources;
//! a backend knows how one `vm_type` makes them real.
//!
//! Every method that takes something away can be called again, and when nothing is there: that is how the
//! core recovers from a death in the middle.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use mandoline_api::nodemgr::{FailureClass, Initscript, VmId, VmTypeInfo};
use mandoline_rspec::{Rspec, SliceId};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

/// What an asynchronous method of a backend returns.
pub type Work<'a, T> = Pin<Box<dyn Future<Output = Result<T, Failure>> + Send + 'a>>;

/// Why a backend could not do something, and what may help.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Failure {
    /// The thing, its value, what happened.
    pub reason: String,
    /// Whether to try again.
    pub class: FailureClass,
}

impl Failure {
    /// It may work when tried again.
    pub fn retryable(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            class: FailureClass::Retryable,
        }
    }

    /// It will not work until something is changed.
    pub fn fatal(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            class: FailureClass::Fatal,
        }
    }
}

/// All that a backend needs to know of a sliver.
#[derive(Debug, Clone, PartialEq)]
pub struct SliverSpec {
    /// Its id.
    pub vm_id: VmId,
    /// Its small number, which picks address, tap, ports and user ids.
    pub index: u16,
    /// Whose it is.
    pub slice: SliceId,
    /// The backend that runs it.
    pub vm_type: String,
    /// Its account on the node, also the first part of its host name.
    pub account: String,
    /// Its resources, with every default filled in.
    pub rspec: Rspec,
}

/// What a backend tells while a sliver runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// A phase of the start has ended, at this `CLOCK_MONOTONIC` time in ns.
    PhaseAt(&'static str, u64),
    /// A part of a phase, as measured inside the guest, in microseconds.
    Part(String, u64),
    /// Its agent answers.
    Up,
    /// Its users can log in; its sshd has these public host keys.
    Reachable(Vec<String>),
    /// The boot script's state.
    Initscript(Initscript),
    /// It runs, without something that it asked for.
    Lacks(String),
    /// It did not come up; what runs of it should be stopped.
    Failed(Failure),
    /// It runs no more.
    Exited(Exit),
}

/// How a sliver's VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// Its own system shut down.
    Shutdown,
    /// Its own system asked to be started again.
    Reboot,
    /// It died.
    Died(String),
}

/// Where a backend's reports about one start of one sliver go.
#[derive(Debug, Clone)]
pub struct Reports {
    sender: mpsc::UnboundedSender<Report>,
}

impl Reports {
    /// A pair of ends.
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Report>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self { sender }, receiver)
    }

    /// Tells; after the core has lost interest, nobody hears it.
    pub fn tell(&self, report: Report) {
        let _ = self.sender.send(report);
    }

    /// Tells that a phase ends now.
    pub fn phase(&self, name: &'static str) {
        self.tell(Report::PhaseAt(name, monotonic_ns()));
    }
}

/// `CLOCK_MONOTONIC` in ns: the clock that phases are measured by, the same for every process of the node.
pub fn monotonic_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    (time.tv_sec as u64)
        .saturating_mul(1_000_000_000)
        .saturating_add(time.tv_nsec as u64)
}

/// Use of resources by one sliver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// CPU time of the VM with its monitor, in microseconds.
    pub cpu_us: u64,
    /// Memory of the VM with its monitor, in bytes.
    pub memory: u64,
    /// Blocks of its disk that are allocated, in bytes.
    pub disk: u64,
}

/// What came of a change of resources.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resized {
    /// What a running VM cannot have, and gets at its next start.
    pub waits: Vec<String>,
}

/// A virtualisation.
pub trait VmType: Send + Sync + 'static {
    /// The name in `vm_type`.
    fn name(&self) -> &'static str;

    /// Whether a sliver that dies again and again is left alone at last, until somebody asks for it.
    fn gives_up(&self) -> bool {
        true
    }

    /// Whether it can be used on this node, and what it can do.
    fn info(&self) -> VmTypeInfo;

    /// The sliver's address.
    fn address(&self, sliver: &SliverSpec) -> Option<IpAddr>;

    /// Makes what outlasts a start: the disk. Nothing if it is there.
    fn create<'a>(&'a self, sliver: &'a SliverSpec, reports: &'a Reports) -> Work<'a, ()>;

    /// Starts the VM. Returns when its process runs; what comes after is reported, and last of all its exit.
    fn start<'a>(&'a self, sliver: &'a SliverSpec, reports: &'a Reports) -> Work<'a, ()>;

    /// Takes over a VM that runs already, after a restart of the node manager. False: there is none.
    fn adopt<'a>(&'a self, sliver: &'a SliverSpec, reports: &'a Reports) -> Work<'a, bool>;

    /// Stops the VM: its own system gets `grace` for it, then it is killed. When this returns, no process of
    /// the sliver runs and nothing that only a running VM needs is left.
    fn stop(&self, sliver: &SliverSpec, grace: Duration) -> Work<'_, ()>;

    /// Stops the CPUs of the VM.
    fn pause(&self, vm_id: VmId) -> Work<'_, ()>;

    /// Lets them run again.
    fn resume(&self, vm_id: VmId) -> Work<'_, ()>;

    /// Brings a running VM to changed resources, as far as `info` says that this can be done live, and names what
    /// waits for its next start.
    fn resize<'a>(&'a self, sliver: &'a SliverSpec) -> Work<'a, Resized>;

    /// What it uses.
    fn stats(&self, vm_id: VmId) -> Work<'_, Stats>;

    /// Writes the VM's memory and state to a directory.
    fn snapshot<'a>(&'a self, vm_id: VmId, directory: &'a std::path::Path) -> Work<'a, ()>;

    /// Removes all that the sliver has on the node.
    fn destroy(&self, vm_id: VmId, index: Option<u16>) -> Work<'_, ()>;

    /// A stream to a port of the VM: who is at the other end is certain.
    fn channel(&self, vm_id: VmId, port: u32) -> Work<'_, UnixStream>;

    /// The ids of all VMs of which anything is on the node: processes, disks, taps. What the core does not
    /// know of these is destroyed.
    fn present(&self) -> Work<'_, BTreeSet<VmId>>;
}

/// Does on a thread of its own what blocks.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Failure::retryable(format!(
            "a step of the backend failed: {error}"
        ))),
    }
}

/// Registers a descriptor of ours with the event loop.
pub(crate) fn watch(fd: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` owns its descriptor and is neither changed nor replaced while it is registered:
    // only shared references to it are ever handed out.
    Ok(unsafe { AsyncFd::register_with_interest(fd, tokio::io::Interest::READABLE) }?)
}

/// The backends of a node by name.
#[derive(Clone, Default)]
pub struct Registry(BTreeMap<&'static str, Arc<dyn VmType>>);

impl Registry {
    /// Adds a backend.
    pub fn add(&mut self, backend: Arc<dyn VmType>) {
        self.0.insert(backend.name(), backend);
    }

    /// The backend of that name.
    pub fn get(&self, name: &str) -> Option<&Arc<dyn VmType>> {
        self.0.get(name)
    }

    /// All backends.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn VmType>> {
        self.0.values()
    }
}
