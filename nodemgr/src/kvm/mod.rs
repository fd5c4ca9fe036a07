//! The `kvm-microvm` backend: one monitor process, one tap, one cgroup, one disk for each sliver.
//!
//! ```text
//!  create   disk (sparse copy of a template) ───────────────── durable
//!  start    tap + class + filter  ┐
//!           cgroup + limits       ├─► monitor (descriptors only) ─► watch
//!           sockets, files        ┘                                   │
//!                         Event::Up (guest opens port 1024) ◄─────────┤
//!                              │ join: entropy, identity, keys        │
//!                              ▼                                      ▼
//!                          reachable                           exit: state file, reason
//! ```

mod agent;
mod boot;
mod config;
mod control;
mod disk;
mod host;
mod monitor;
mod outward;
mod resize;
mod session;
mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mandoline_api::agent::{Request, ShutdownMode, ShutdownReply};
use mandoline_api::nodemgr::{VmId, VmTypeInfo};
use mandoline_rspec::{KVM_MICROVM, Rspec};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

pub use config::KvmConfig;

use crate::cgroup::{Limits, Tree};
use crate::net::{Network, SliverNet, Wants};
use crate::qemu::{self, Hub, QEMU_MICROVM, QemuConfig};
use crate::services::{Dispatcher, Who};
use crate::vm_type::{Failure, Reports, Resized, SliverSpec, Stats, VmType, Work, blocking};
use agent::Door;
use config::Places;
use control::Control;
use monitor::Booted;
use outward::{Outward, Source};

/// How long a killed monitor may take to be gone: closing a VM takes up to 70 ms, emulated and loaded more.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// What can be done to a VM of ours, and to one of QEMU's: what it could do beside these, nobody asks of it.
const CAPABILITIES: [&str; 15] = [
    "pause",
    "channel",
    "resize:cpu_share",
    "resize:cpu_guarantee",
    "resize:cpu_capped",
    "resize:base_rate",
    "resize:burst_rate",
    "resize:sustained_rate",
    "resize:flow_limit",
    "resize:ports",
    "resize:mem_limit",
    "resize:mem_reserve",
    "resize:disk_quota",
    "resize:keys",
    "stats",
];

/// A VM that runs.
struct Vm {
    pidfd: Arc<AsyncFd<OwnedFd>>,
    session: JoinHandle<()>,
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.session.abort();
    }
}

/// QEMU in the place of our monitor.
struct Qemu {
    config: QemuConfig,
    hub: Hub,
}

/// Threads of our monitor beside its vCPUs, with room.
const MONITOR_THREADS: u32 = 32;
/// Threads of QEMU beside its vCPUs: those that read and write files are up to 64.
const QEMU_THREADS: u32 = 128;

/// The backend: with our monitor, or with QEMU.
pub struct Kvm {
    config: KvmConfig,
    places: Places,
    tree: Arc<Tree>,
    network: Network,
    services: Arc<Dispatcher>,
    dns: Vec<IpAddr>,
    mtu: u32,
    running: Mutex<BTreeMap<VmId, Vm>>,
    /// Held while a template is made.
    templates: Arc<tokio::sync::Mutex<()>>,
    qemu: Option<Qemu>,
}

impl Kvm {
    /// The backend over a network that is set up; `services` get what guests open by themselves.
    pub fn new(
        config: KvmConfig,
        network: Network,
        tree: Arc<Tree>,
        services: Arc<Dispatcher>,
        directories: [&Path; 3],
        dns: Vec<IpAddr>,
        mtu: u32,
    ) -> Self {
        let [state_dir, run_dir, log_dir] = directories;
        let places = Places::new(state_dir, run_dir, log_dir);
        Self {
            config,
            places,
            tree,
            network,
            services,
            dns,
            mtu,
            running: Mutex::default(),
            templates: Arc::default(),
            qemu: None,
        }
    }

    /// The backend that runs QEMU, beside this one: over the same network, cgroups, disks and images.
    pub fn with_qemu(&self, config: QemuConfig) -> Self {
        Self {
            config: self.config.clone(),
            places: self.places.clone(),
            tree: Arc::clone(&self.tree),
            network: self.network.clone(),
            services: Arc::clone(&self.services),
            dns: self.dns.clone(),
            mtu: self.mtu,
            running: Mutex::default(),
            templates: Arc::clone(&self.templates),
            qemu: Some(Qemu {
                config,
                hub: Hub::default(),
            }),
        }
    }

    /// How the ports of a guest are reached.
    fn door(&self, vm_id: VmId) -> Door {
        match &self.qemu {
            Some(_) => Door::Vsock(qemu::cid(vm_id)),
            None => Door::Monitor(self.places.vsock(vm_id)),
        }
    }

    /// How a running VM is changed.
    fn control(&self, vm_id: VmId) -> Control {
        match &self.qemu {
            Some(_) => Control::Qemu(self.places.qmp(vm_id)),
            None => Control::Monitor(self.places.api(vm_id)),
        }
    }

    /// What a monitor may use beside the guest's memory, in MiB.
    fn overhead_mib(&self) -> u64 {
        let of_qemu = self.qemu.as_ref().map(|qemu| qemu.config.overhead_mib);
        of_qemu.unwrap_or(self.config.overhead_mib)
    }

    fn limits(&self, rspec: &Rspec) -> Result<Limits, Failure> {
        let threads = match &self.qemu {
            Some(_) => QEMU_THREADS,
            None => MONITOR_THREADS,
        };
        values::limits(self.overhead_mib(), threads, rspec)
    }

    fn check(&self) -> Result<(), String> {
        host::check(
            &self.config,
            self.qemu.as_ref().map(|qemu| &qemu.config),
            &self.tree,
        )
    }

    /// Brings the network's tables to what is recorded, before anything is started: what an earlier node
    /// manager left behind goes, what living slivers need is put right.
    pub async fn reconcile_network<'a>(
        &self,
        recorded: impl Iterator<Item = &'a SliverSpec>,
    ) -> Result<(), Failure> {
        let slivers = recorded
            .map(|spec| self.net(spec))
            .collect::<Result<Vec<_>, _>>()?;
        let found = self
            .network
            .reconcile(slivers)
            .await
            .map_err(|e| Failure::retryable(e.to_string()))?;
        tracing::info!(?found, "network reconciled");
        Ok(())
    }

    /// Makes the template of the usual disk ahead of the first sliver that wants it.
    pub async fn prepare(&self) {
        let rspec = Rspec::new().with_defaults(&Rspec::new());
        if let Err(failure) = self.template(&rspec).await {
            tracing::error!(%failure, "no template for disks");
        }
    }

    /// Keeps logs and consoles of slivers from growing without end.
    pub fn bound_logs(&self) {
        host::bound_logs(&self.places.logs, self.config.log_kib << 10);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmId, Vm>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn net(&self, sliver: &SliverSpec) -> Result<SliverNet, Failure> {
        let wants = Wants::of(&sliver.slice, &sliver.rspec);
        wants
            .and_then(|wants| self.network.plan().sliver(sliver.index, sliver.vm_id, wants))
            .map_err(|e| Failure::fatal(e.to_string()))
    }

    /// Starts watching a monitor: its end is reported, its streams are taken, its guest is joined.
    fn watch(
        self: &Kvm,
        sliver: &SliverSpec,
        pidfd: OwnedFd,
        outward: Option<OwnedFd>,
        adopted: bool,
        reports: &Reports,
    ) -> Result<(), Failure> {
        let watch = |e| Failure::retryable(format!("the monitor cannot be watched: {e}"));
        let pidfd = Arc::new(monitor::watch(pidfd).map_err(watch)?);
        let source = match &self.qemu {
            Some(qemu) => Some(Source::Vsock(
                qemu.hub.streams(qemu::cid(sliver.vm_id)).map_err(watch)?,
            )),
            None => outward
                .map(monitor::watch)
                .transpose()
                .map_err(watch)?
                .map(Source::Monitor),
        };
        let who = Who {
            slice: sliver.slice.clone(),
            vm_id: sliver.vm_id,
        };
        let outward = source.map(|source| Outward::start(source, Arc::clone(&self.services), who));
        let session = session::Session {
            door: self.door(sliver.vm_id),
            notes_end: self.qemu.is_some(),
            state: self.places.state(sliver.vm_id),
            disk: self.places.disk(sliver.vm_id),
            join: self.join(sliver)?,
            pidfd: Arc::clone(&pidfd),
            outward,
            adopted,
            boot_timeout: Duration::from_secs(self.config.boot_timeout_s),
            join_timeout: Duration::from_secs(self.config.join_timeout_s),
            reports: reports.clone(),
        };
        let session = tokio::spawn(session.run());
        self.lock().insert(sliver.vm_id, Vm { pidfd, session });
        Ok(())
    }

    fn join(&self, sliver: &SliverSpec) -> Result<session::Identity, Failure> {
        let net = self.net(sliver)?;
        Ok(session::Identity {
            slice: sliver.slice.to_string(),
            hostname: values::host_name(&sliver.account),
            net,
            gateway: self.network.plan().gateway(),
            mtu: self.mtu,
            dns: self.dns.clone(),
            keys: sliver.rspec.keys().to_vec(),
            initscript: sliver.rspec.text("initscript").map(str::to_owned),
        })
    }

    async fn make_disk(&self, sliver: &SliverSpec) -> Result<(), Failure> {
        for label in ["image", "kernel"] {
            if let Some(name) = sliver.rspec.text(label).filter(|name| *name != "base") {
                return Err(Failure::fatal(format!(
                    "{label} {name} is not on this node; allowed: base, or none"
                )));
            }
        }
        let disk = self.places.disk(sliver.vm_id);
        let template = self.template(&sliver.rspec).await?;
        let wanted = disk::size_of(sliver.rspec.number("disk_quota").unwrap_or(0));
        blocking(move || {
            disk::make(&template, &disk)?;
            // Its quota may have risen since it was made.
            disk::grow(&disk, wanted).map(drop)
        })
        .await
    }

    async fn template(&self, rspec: &Rspec) -> Result<std::path::PathBuf, Failure> {
        let bytes = disk::size_of(rspec.number("disk_quota").unwrap_or(0));
        let templates = self.places.templates.clone();
        let program = self.config.make_disk.clone();
        let _one_at_a_time = self.templates.lock().await;
        blocking(move || disk::make_template(&templates, &program, bytes)).await
    }

    async fn launch(&self, sliver: &SliverSpec, reports: &Reports) -> Result<(), Failure> {
        // What an earlier run has left would be in the way.
        self.clear(sliver.vm_id, Some(sliver.index)).await?;
        let net = self.net(sliver)?;
        let limits = self.limits(&sliver.rspec)?;
        let tap = self
            .network
            .add_sliver(net.clone())
            .await
            .map_err(|e| Failure::retryable(e.to_string()))?;
        reports.phase("network");
        let started = host::Start {
            config: self.config.clone(),
            places: self.places.clone(),
            vm: boot::config(&self.config, &sliver.rspec, &net),
            vm_id: sliver.vm_id,
            booted: Booted {
                mem_mib: sliver.rspec.number("mem_limit").unwrap_or(0) >> 20,
                vcpus: sliver.rspec.number("vcpus").unwrap_or(1),
            },
            uid: self.config.first_uid + u32::from(sliver.index),
            limits,
            qemu: self.qemu.as_ref().map(|qemu| qemu.config.clone()),
            tree: Arc::clone(&self.tree),
            tap,
            reports: reports.clone(),
        };
        let (pidfd, outward) = blocking(move || started.run()).await?;
        self.watch(sliver, pidfd, outward, false, reports)
    }

    /// Ends what runs of a sliver and takes away what only a running VM needs.
    async fn clear(&self, vm_id: VmId, index: Option<u16>) -> Result<(), Failure> {
        let vm = self.lock().remove(&vm_id);
        let (places, tree) = (self.places.clone(), Arc::clone(&self.tree));
        blocking(move || host::clear(&places, &tree, vm_id, KILL_TIMEOUT)).await?;
        if let Some(vm) = vm {
            // The kernel says that the cgroup is empty: the monitor has ended and wants reaping.
            host::reap(vm.pidfd.get_ref());
        }
        if let Some(index) = index {
            self.network
                .remove_sliver(index, vm_id)
                .await
                .map_err(|e| Failure::retryable(format!("network of sliver {vm_id}: {e}")))?;
        }
        Ok(())
    }

    /// Asks the sliver's own system to stop, and waits for it.
    async fn shut_down(&self, vm_id: VmId, grace: Duration) {
        let Some(pidfd) = self.lock().get(&vm_id).map(|vm| Arc::clone(&vm.pidfd)) else {
            return;
        };
        let half = u32::try_from(grace.as_millis() / 2).unwrap_or(u32::MAX);
        let request = Request::Shutdown {
            mode: ShutdownMode::Poweroff,
            grace_ms: Some(half),
        };
        let door = self.door(vm_id);
        let work = async {
            agent::ask::<ShutdownReply>(&door, &request).await?;
            Ok::<_, agent::AgentError>(monitor::wait(&pidfd, &self.places.state(vm_id)).await)
        };
        match tokio::time::timeout(grace, work).await {
            Ok(Ok(exit)) => tracing::debug!(vm_id, ?exit, "shut down"),
            Ok(Err(error)) => tracing::info!(vm_id, %error, "no orderly shutdown"),
            Err(_) => tracing::info!(vm_id, ?grace, "did not shut down in time"),
        }
    }
}

impl VmType for Kvm {
    fn name(&self) -> &'static str {
        match &self.qemu {
            Some(_) => QEMU_MICROVM,
            None => KVM_MICROVM,
        }
    }

    fn info(&self) -> VmTypeInfo {
        let detail = self.check().err();
        VmTypeInfo {
            name: self.name().to_owned(),
            available: detail.is_none(),
            detail,
            capabilities: CAPABILITIES.map(str::to_owned).into(),
        }
    }

    fn address(&self, sliver: &SliverSpec) -> Option<IpAddr> {
        self.net(sliver).ok().map(|net| net.address.into())
    }

    fn create<'a>(&'a self, sliver: &'a SliverSpec, reports: &'a Reports) -> Work<'a, ()> {
        Box::pin(async move {
            self.make_disk(sliver).await?;
            reports.phase("disk");
            Ok(())
        })
    }

    fn start<'a>(&'a self, sliver: &'a SliverSpec, reports: &'a Reports) -> Work<'a, ()> {
        Box::pin(async move {
            self.check().map_err(Failure::fatal)?;
            self.launch(sliver, reports).await?;
            if let Some(lack) = values::unusable_guarantee(&sliver.rspec) {
                reports.tell(crate::vm_type::Report::Lacks(lack));
            }
            Ok(())
        })
    }

    fn adopt<'a>(&'a self, sliver: &'a SliverSpec, reports: &'a Reports) -> Work<'a, bool> {
        Box::pin(async move {
            let Some(cgroup) = self.tree.home(sliver.vm_id) else {
                return Ok(false);
            };
            let handover = self.places.handover(sliver.vm_id);
            let is_qemu = self.qemu.is_some();
            let found = blocking(move || host::adopt(&cgroup, &handover, is_qemu)).await?;
            let Some((pidfd, outward)) = found else {
                return Ok(false);
            };
            self.watch(sliver, pidfd, outward, true, reports)?;
            Ok(true)
        })
    }

    fn stop(&self, sliver: &SliverSpec, grace: Duration) -> Work<'_, ()> {
        let (vm_id, index) = (sliver.vm_id, sliver.index);
        Box::pin(async move {
            if !grace.is_zero() {
                self.shut_down(vm_id, grace).await;
            }
            self.clear(vm_id, Some(index)).await
        })
    }

    fn pause(&self, vm_id: VmId) -> Work<'_, ()> {
        Box::pin(async move { self.control(vm_id).pause().await })
    }

    fn resume(&self, vm_id: VmId) -> Work<'_, ()> {
        Box::pin(async move { self.control(vm_id).resume().await })
    }

    fn resize<'a>(&'a self, sliver: &'a SliverSpec) -> Work<'a, Resized> {
        Box::pin(self.resize_live(sliver))
    }

    fn stats(&self, vm_id: VmId) -> Work<'_, Stats> {
        let (tree, disk) = (Arc::clone(&self.tree), self.places.disk(vm_id));
        Box::pin(blocking(move || host::stats(&tree, vm_id, &disk)))
    }

    fn snapshot<'a>(&'a self, vm_id: VmId, _directory: &'a Path) -> Work<'a, ()> {
        let reason = format!(
            "sliver {vm_id}: {} cannot snapshot; it can: {}",
            self.name(),
            CAPABILITIES.join(", ")
        );
        Box::pin(std::future::ready(Err(Failure::fatal(reason))))
    }

    fn destroy(&self, vm_id: VmId, index: Option<u16>) -> Work<'_, ()> {
        Box::pin(async move {
            self.clear(vm_id, index).await?;
            let places = self.places.clone();
            blocking(move || host::destroy(&places, vm_id)).await
        })
    }

    fn channel(&self, vm_id: VmId, port: u32) -> Work<'_, UnixStream> {
        Box::pin(async move {
            agent::connect(&self.door(vm_id), port)
                .await
                .map_err(|e| Failure::retryable(e.to_string()))
        })
    }

    fn present(&self) -> Work<'_, BTreeSet<VmId>> {
        let (places, tree) = (self.places.clone(), Arc::clone(&self.tree));
        Box::pin(blocking(move || Ok(host::present(&places, &tree))))
    }
}
