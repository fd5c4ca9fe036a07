//! A node manager for tests: real state, real sockets, and a backend whose VMs exist in memory only.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mandoline_api::nodemgr::{ErrorBody, Events, NodeManager, SliverEvent, SliverState, VmId, VmTypeInfo};
use mandoline_nodemgr::caller::Caller;
use mandoline_nodemgr::config::{Config, ServiceConfig, SiteAdminConfig};
use mandoline_nodemgr::core::{Clock, Core};
use mandoline_nodemgr::daemon::{self, Sockets};
use mandoline_nodemgr::ops::Operation;
use mandoline_nodemgr::store::Outcome;
use mandoline_nodemgr::usage::Meter;
use mandoline_nodemgr::vm_type::{
    Exit, Failure, Registry, Report, Reports, Resized, SliverSpec, Stats, VmType, Work,
};
use mandoline_rspec::{AuthorityName, Rspec, SliceName};
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// The backend's name in `vm_type`.
pub const TEST_VM: &str = "test-vm";

/// What the backend's VMs are up to; shared between a node manager and its successor, like a node.
#[derive(Default)]
pub struct World {
    pub running: BTreeMap<VmId, (SliverSpec, Reports)>,
    pub disks: BTreeSet<VmId>,
    pub starts: u32,
    pub resizes: Vec<Rspec>,
    pub stops_with_grace: u32,
    pub next_starts_fail: Vec<Failure>,
    pub stats: Stats,
    pub capabilities: Vec<String>,
    pub stats_of: BTreeMap<VmId, Stats>,
    pub paused: BTreeSet<VmId>,
}

/// The backend.
#[derive(Clone, Default)]
pub struct TestBackend(pub Arc<Mutex<World>>);

impl TestBackend {
    pub fn world(&self) -> std::sync::MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }

    /// Ends a VM from inside.
    pub fn exit(&self, vm_id: VmId, exit: Exit) {
        let (_, reports) = self.world().running.remove(&vm_id).unwrap();
        reports.tell(Report::Exited(exit));
    }
}

fn done<T: Send + 'static>(result: Result<T, Failure>) -> Work<'static, T> {
    Box::pin(std::future::ready(result))
}

impl VmType for TestBackend {
    fn name(&self) -> &'static str {
        TEST_VM
    }

    fn info(&self) -> VmTypeInfo {
        VmTypeInfo {
            name: TEST_VM.into(),
            available: true,
            detail: None,
            capabilities: self.world().capabilities.clone(),
        }
    }

    fn address(&self, sliver: &SliverSpec) -> Option<IpAddr> {
        Some([10, 128, 0, sliver.index as u8 + 2].into())
    }

    fn create<'a>(&'a self, sliver: &'a SliverSpec, reports: &'a Reports) -> Work<'a, ()> {
        self.world().disks.insert(sliver.vm_id);
        reports.phase("disk");
        done(Ok(()))
    }

    fn start<'a>(&'a self, sliver: &'a SliverSpec, reports: &'a Reports) -> Work<'a, ()> {
        let mut world = self.world();
        world.starts += 1;
        if let Some(failure) = world.next_starts_fail.pop() {
            return done(Err(failure));
        }
        assert!(!world.running.contains_key(&sliver.vm_id), "started twice");
        world
            .running
            .insert(sliver.vm_id, (sliver.clone(), reports.clone()));
        reports.tell(Report::Up);
        reports.tell(Report::Reachable(vec![format!(
            "ssh-ed25519 HOST{}",
            sliver.vm_id
        )]));
        done(Ok(()))
    }

    fn adopt<'a>(&'a self, sliver: &'a SliverSpec, reports: &'a Reports) -> Work<'a, bool> {
        let mut world = self.world();
        let Some(vm) = world.running.get_mut(&sliver.vm_id) else {
            return done(Ok(false));
        };
        vm.1 = reports.clone();
        reports.tell(Report::Reachable(vec![format!(
            "ssh-ed25519 HOST{}",
            sliver.vm_id
        )]));
        done(Ok(true))
    }

    fn stop(&self, sliver: &SliverSpec, grace: Duration) -> Work<'_, ()> {
        let mut world = self.world();
        world.stops_with_grace += u32::from(!grace.is_zero());
        world.running.remove(&sliver.vm_id);
        done(Ok(()))
    }

    fn pause(&self, vm_id: VmId) -> Work<'_, ()> {
        self.world().paused.insert(vm_id);
        done(Ok(()))
    }

    fn resume(&self, vm_id: VmId) -> Work<'_, ()> {
        self.world().paused.remove(&vm_id);
        done(Ok(()))
    }

    fn resize<'a>(&'a self, sliver: &'a SliverSpec) -> Work<'a, Resized> {
        self.world().resizes.push(sliver.rspec.clone());
        done(Ok(Resized::default()))
    }

    fn stats(&self, vm_id: VmId) -> Work<'_, Stats> {
        let world = self.world();
        let stats = world.stats_of.get(&vm_id).copied();
        done(Ok(stats.unwrap_or(world.stats)))
    }

    fn snapshot<'a>(&'a self, _: VmId, _: &'a Path) -> Work<'a, ()> {
        done(Err(Failure::fatal("no snapshot")))
    }

    fn destroy(&self, vm_id: VmId, _: Option<u16>) -> Work<'_, ()> {
        let mut world = self.world();
        world.running.remove(&vm_id);
        world.disks.remove(&vm_id);
        done(Ok(()))
    }

    fn channel(&self, _: VmId, _: u32) -> Work<'_, UnixStream> {
        done(Err(Failure::fatal("no channel")))
    }

    fn present(&self) -> Work<'_, BTreeSet<VmId>> {
        let present = self.world().disks.clone();
        done(Ok(present))
    }
}

/// A running node manager.
pub struct Node {
    pub core: Arc<Core>,
    pub backend: TestBackend,
    /// The owner's view.
    pub owner: NodeManager,
    /// The view of the service that the test's user is.
    pub scs: NodeManager,
    stop: watch::Sender<bool>,
    server: Option<JoinHandle<()>>,
    /// Its own, so that all its tasks end with it, as those of a process do.
    runtime: Option<Runtime>,
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// What a test node has.
pub fn capacity() -> Rspec {
    rspec(json!({
        "cpu_guarantee": 1000, "mem_limit": "4 GiB", "mem_reserve": "4 GiB", "disk_quota": "100 GB",
        "disk_reserve": "100 GB", "base_rate": "100 Mbit/s", "burst_rate": "100 Mbit/s", "vcpus": 4,
        "ports": ["tcp/1-9999"],
    }))
}

pub fn rspec(json: Value) -> Rspec {
    Rspec::from_json(&json).unwrap()
}

/// The configuration of a node whose files are in `dir`; the test's own user is the service `pl_conf`.
pub fn config(dir: &Path) -> Config {
    let service = ServiceConfig {
        user: None,
        uid: Some(rustix::process::getuid().as_raw()),
        authorities: vec![AuthorityName::new("plc").unwrap()],
        ..ServiceConfig::default()
    };
    Config {
        state_dir: dir.join("state"),
        run_dir: dir.join("run"),
        log_dir: dir.join("log"),
        owner_script: dir.join("owner"),
        site_admin: SiteAdminConfig {
            keys: dir.join("site_admin.keys"),
            ..SiteAdminConfig::default()
        },
        services: BTreeMap::from([(SliceName::new("pl_conf").unwrap(), service)]),
        vm_type_names: BTreeMap::from([("linux_vserver".to_owned(), TEST_VM.to_owned())]),
        ..Config::default()
    }
}

impl Node {
    /// Starts a node manager over the files in `dir` and the VMs of `backend`.
    pub async fn start(dir: &Path, backend: &TestBackend) -> Self {
        Self::start_with(config(dir), backend).await
    }

    pub async fn start_with(config: Config, backend: &TestBackend) -> Self {
        Self::start_at(config, backend, Arc::new(jiff::Timestamp::now)).await
    }

    /// With a clock of the test's own; the owner's script is applied as at each boot.
    pub async fn start_at(config: Config, backend: &TestBackend, clock: Clock) -> Self {
        daemon::make_directories(&config).unwrap();
        let mut registry = Registry::default();
        registry.add(Arc::new(backend.clone()));
        let core = daemon::open_core_at(&config, capacity(), registry, 100, clock).unwrap();
        daemon::apply_script(&core, &config.owner_script);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (stop, stopped) = watch::channel(false);
        let meter = Arc::new(Meter::new(Arc::clone(&core), &config, None, None));
        let (run_dir, served) = (config.run_dir.clone(), Arc::clone(&core));
        let (bound, ready) = tokio::sync::oneshot::channel();
        let server = runtime.spawn(async move {
            let sockets = Sockets::bind(&run_dir).await.unwrap();
            for vm_id in served.recorded() {
                served.wake(vm_id, None);
            }
            bound.send(()).unwrap();
            daemon::serve(meter, sockets, stopped).await.unwrap();
        });
        ready.await.unwrap();
        Self {
            core,
            backend: backend.clone(),
            owner: NodeManager::new(config.run_dir.join("owner.sock")),
            scs: NodeManager::new(config.run_dir.join("nm.sock")),
            stop,
            server: Some(server),
            runtime: Some(runtime),
        }
    }

    /// Ends it. Its VMs go on.
    pub async fn stop(mut self) {
        self.stop.send(true).unwrap();
        self.server.take().unwrap().await.unwrap();
        let runtime = self.runtime.take().unwrap();
        tokio::task::spawn_blocking(move || runtime.shutdown_timeout(Duration::from_secs(20)))
            .await
            .unwrap();
    }

    /// Does an operation as the owner.
    pub async fn owner_does(&self, operation: Operation) -> Result<Outcome, ErrorBody> {
        self.does(Caller::Owner, operation).await
    }

    /// On the node's own runtime, so that what it starts ends with the node.
    async fn does(&self, caller: Caller, operation: Operation) -> Result<Outcome, ErrorBody> {
        let core = Arc::clone(&self.core);
        let work = async move { core.execute(caller, operation, None).await };
        self.runtime.as_ref().unwrap().spawn(work).await.unwrap()
    }

    /// Does an operation as the sliver of a slice.
    pub async fn slice_does(&self, slice: &str, operation: Operation) -> Result<Outcome, ErrorBody> {
        let caller = Caller::Slice(self.core.rules.slice(slice).unwrap());
        self.does(caller, operation).await
    }

    /// What a slice's living sliver has.
    pub async fn has(&self, slice: &str) -> Rspec {
        let list = self.owner.list().await.unwrap();
        let found = list.slivers.iter().find(|sliver| sliver.event.slice == slice);
        found.unwrap().rspec.clone()
    }

    /// Makes a root pool for the test's service and fetches its rcap.
    pub async fn root_pool(&self) -> mandoline_rspec::Rcap {
        let pool = json!({"cpu_guarantee": 500, "mem_reserve": "1 GiB", "base_rate": "10 Mbit/s", "ports": "tcp/80-89"});
        self.owner
            .create_root_pool(&rspec(pool), "pl_conf", None)
            .await
            .unwrap();
        self.scs.get_rcap().await.unwrap()
    }

    /// Splits a pool with `extra` attributes off and binds it. Gives its rcap and the VM.
    pub async fn sliver(
        &self,
        pool: &mandoline_rspec::Rcap,
        slice: &str,
        extra: Value,
    ) -> (mandoline_rspec::Rcap, VmId) {
        let mut want = json!({"vm_type": TEST_VM});
        for (name, value) in extra.as_object().unwrap() {
            want[name] = value.clone();
        }
        let rcap = self.scs.split_pool(pool, &rspec(want), None).await.unwrap();
        let vm_id = self.scs.bind(&rcap, slice, None).await.unwrap();
        (rcap, vm_id)
    }
}

/// Reads events until one of this VM is as wanted.
pub async fn until(events: &mut Events, vm_id: VmId, want: impl Fn(&SliverEvent) -> bool) -> SliverEvent {
    let wait = async {
        loop {
            let event = events.next().await.unwrap().expect("the event stream has ended");
            if event.vm_id == vm_id && want(&event) {
                return event;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait)
        .await
        .expect("no such event came")
}

/// Reads events until this VM is in that state.
pub async fn until_state(events: &mut Events, vm_id: VmId, state: SliverState) -> SliverEvent {
    until(events, vm_id, |event| event.state == state).await
}
