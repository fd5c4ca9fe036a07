//! Puts the node manager together and runs it until it is told to end.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mandoline_limits::Rate;
use mandoline_rspec::Rspec;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use crate::cgroup::Tree;
use crate::config::{Config, ConfigError};
use crate::core::{Clock, Core, unix_ns};
use crate::host_service::{HOST_SERVICE, HostServices};
use crate::http::{self, Channel};
use crate::kvm::Kvm;
use crate::net::{NetError, Network};
use crate::ops::Rules;
use crate::owner::ScriptError;
use crate::secret::{Secret, SecretError};
use crate::services::{Dispatcher, Streams};
use crate::store::{Store, StoreError};
use crate::usage::Meter;
use crate::vm_type::{Failure, Registry};
use crate::{accounts, capacity, pressure, sensors};

/// How often what is recorded is compared with what is there.
const RECONCILE: Duration = Duration::from_secs(30);
/// How often slices' traffic is counted and kept: at 100 Mbit/s, 125 MB may pass meanwhile, under a hundredth of
/// the usual day's bytes.
const COUNT: Duration = Duration::from_secs(10);
/// How often time bounds and logs are looked at.
const TICK: Duration = Duration::from_secs(5);

/// Why the node manager does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The node's secret.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The state file.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The owner's script.
    #[error(transparent)]
    Script(#[from] ScriptError),
    /// The network.
    #[error("network: {0}")]
    Network(#[from] NetError),
    /// A backend.
    #[error("backend: {0}")]
    Backend(#[from] Failure),
    /// Somebody listens on a socket already.
    #[error("{}: another program listens there; is a node manager running already?", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// A directory or socket.
    #[error("{}: {source}", path.display())]
    File {
        /// The path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Not root.
    #[error("the node manager must run as root: it makes virtual machines, network interfaces and cgroups")]
    NotRoot,
}

/// Opens state and secret, and makes the core with the given backends.
pub fn open_core(
    config: &Config,
    node: Rspec,
    registry: Registry,
    max_slivers: u16,
) -> Result<Arc<Core>, StartError> {
    open_core_at(
        config,
        node,
        registry,
        max_slivers,
        Arc::new(jiff::Timestamp::now),
    )
}

/// Like [`open_core`], with another clock.
pub fn open_core_at(
    config: &Config,
    node: Rspec,
    registry: Registry,
    max_slivers: u16,
    clock: Clock,
) -> Result<Arc<Core>, StartError> {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let mut vm_types: std::collections::BTreeMap<String, String> = registry
        .iter()
        .map(|b| (b.name().to_owned(), b.name().to_owned()))
        .collect();
    vm_types.extend(config.vm_type_names.clone());
    let rules = Rules {
        default_authority: config.default_authority.clone(),
        local_names: config.local_names.clone(),
        services: config.services(&passwd),
        vm_types,
        default_vm_types: (config.programs(&passwd).into_keys())
            .map(|slice| (slice, HOST_SERVICE.to_owned()))
            .collect(),
        overbook: config.overbook(),
        max_slivers,
        profile: config.profile()?,
        owner_script: config.owner_script.clone(),
        site_admin: config.site_admin()?,
    };
    let secret = Secret::open(&config.state_dir.join("secret"))?;
    let (store, loaded) = Store::open(&config.state_dir.join("nodemgr.redb"), node, unix_ns())?;
    Ok(Arc::new(Core::new(rules, registry, secret, store, loaded, clock)))
}

/// Makes the directories that the node manager needs.
pub fn make_directories(config: &Config) -> Result<(), StartError> {
    for (path, mode) in [
        (&config.state_dir, 0o711),
        (&config.run_dir, 0o711),
        (&config.log_dir, 0o755),
    ] {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(path)
            .map_err(|source| StartError::File {
                path: path.clone(),
                source,
            })?;
    }
    Ok(())
}

/// Applies the owner's script. A script that cannot be read or fulfilled changes nothing and is loud: slivers
/// that run are not to suffer from an owner's typing error.
pub fn apply_script(core: &Core, path: &Path) {
    let script = match core.script_at_start(path) {
        Ok(script) => script,
        Err(error) => return tracing::error!(%error, "owner's script not applied: nothing changed"),
    };
    if script.is_none() {
        tracing::info!(script = %path.display(), "no owner's script");
    }
    match core.apply_script(script.as_ref()) {
        Ok(pools) => tracing::info!(script = %path.display(), pools, "owner's script applied"),
        Err(error) => {
            tracing::error!(script = %path.display(), %error, "owner's script not applied: nothing changed")
        }
    }
}

/// Runs the daemon until `stop` turns true.
pub async fn run(config: Config, stop: watch::Receiver<bool>) -> Result<(), StartError> {
    if !rustix::process::geteuid().is_root() {
        return Err(StartError::NotRoot);
    }
    make_directories(&config)?;
    // Sockets first: a second node manager must not touch what the first one runs.
    let sockets = Sockets::bind(&config.run_dir).await?;
    let node = capacity::of_node(&config, &config.state_dir)?;
    let network = Network::start(config.network()?).await?;
    let max_slivers = network.plan().capacity().saturating_sub(1);
    let directories = [config.state_dir.as_path(), &config.run_dir, &config.log_dir];
    let dns = name_servers(&config);
    let tree = Arc::new(Tree::new(
        &config.kvm.cgroup_root,
        &config.kvm.cgroup,
        config.host_cpu_shares,
    ));
    let (services, nm_streams, sensor_streams) = Dispatcher::new(config.service_sockets());
    let services = Arc::new(services);
    let kvm = Arc::new(Kvm::new(
        config.kvm.clone(),
        network.clone(),
        Arc::clone(&tree),
        Arc::clone(&services),
        directories,
        dns,
        config.network.mtu,
    ));
    let mut registry = Registry::default();
    registry.add(Arc::clone(&kvm) as _);
    registry.add(Arc::new(kvm.with_qemu(config.qemu.clone())));
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    registry.add(Arc::new(HostServices::new(
        config.programs(&passwd),
        Arc::clone(&tree),
        &config.run_dir,
        &config.log_dir,
    )));
    let core = open_core(&config, node, registry, max_slivers)?;
    for backend in core.registry.iter() {
        let info = backend.info();
        match info.detail {
            None => tracing::info!(vm_type = info.name, "available"),
            Some(detail) => tracing::error!(vm_type = info.name, detail, "not available"),
        }
    }
    let meter = Arc::new(Meter::new(
        Arc::clone(&core),
        &config,
        Some(network.clone()),
        Some(services),
    ));
    apply_script(&core, &config.owner_script);
    let specs = core.specs();
    tree.take_over(specs.iter().map(|spec| (spec.vm_id, &spec.rspec)));
    network.remember(core.spent()?).await?;
    kvm.reconcile_network(specs.iter().filter(|spec| spec.vm_type != HOST_SERVICE))
        .await?;
    for vm_id in core.recorded() {
        core.wake(vm_id, None);
    }
    let tasks = [
        tokio::spawn(pressure::watch(
            Arc::clone(&core),
            config.pressure,
            config.state_dir.clone(),
        )),
        tokio::spawn(keep_accounts(Arc::clone(&core), config.accounts.clone())),
        tokio::spawn(reconcile(Arc::clone(&core))),
        tokio::spawn(tick(Arc::clone(&core), Arc::clone(&kvm), tree)),
        tokio::spawn(async move { kvm.prepare().await }),
        tokio::spawn(count_traffic(Arc::clone(&core), network.clone())),
        tokio::spawn(bound_node(Arc::clone(&core), network)),
        tokio::spawn(serve_slivers(Arc::clone(&meter), nm_streams, sensor_streams)),
        tokio::spawn(serve_sensors(Arc::clone(&meter), config.sensors.listen)),
    ];
    tracing::info!(version = env!("CARGO_PKG_VERSION"), run_dir = %config.run_dir.display(), "ready");
    let result = serve(meter, sockets, stop).await;
    for task in tasks {
        task.abort();
    }
    // Slivers go on: their monitors are not ours to end.
    result
}

/// Serves the slivers that ask for the node manager or the sensors.
async fn serve_slivers(meter: Arc<Meter>, nm: Streams, sensors: Streams) {
    let served = tokio::try_join!(
        http::serve_slivers(Arc::clone(&meter), nm),
        sensors::serve_slivers(meter, sensors)
    );
    if let Err(error) = served {
        tracing::error!(%error, "slivers cannot reach the node manager");
    }
}

/// Serves the sensors on the node's loopback. Without them the node works, so it starts all the same.
async fn serve_sensors(meter: Arc<Meter>, listen: Option<SocketAddr>) {
    let Some(address) = listen else { return };
    let served = match tokio::net::TcpListener::bind(address).await {
        Ok(listener) => sensors::serve(meter, listener).await,
        Err(error) => Err(error),
    };
    if let Err(error) = served {
        tracing::error!(%address, %error, "no sensors on the node's loopback");
    }
}

/// The two sockets, bound.
pub struct Sockets {
    owner: (PathBuf, UnixListener),
    service: (PathBuf, UnixListener),
}

impl Sockets {
    /// Binds `owner.sock` (mode 0600) and `nm.sock` (open to all local users: who they are is checked).
    pub async fn bind(run_dir: &Path) -> Result<Self, StartError> {
        Ok(Self {
            owner: bind(run_dir.join("owner.sock"), 0o600).await?,
            service: bind(run_dir.join("nm.sock"), 0o666).await?,
        })
    }
}

async fn bind(path: PathBuf, mode: u32) -> Result<(PathBuf, UnixListener), StartError> {
    if UnixStream::connect(&path).await.is_ok() {
        return Err(StartError::InUse { path });
    }
    let file = |source| StartError::File {
        path: path.clone(),
        source,
    };
    // Bound beside its place and moved there when its mode is right, so that nobody slips in before.
    let temporary = path.with_extension("new");
    let _ = fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary).map_err(file)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(mode)).map_err(file)?;
    fs::rename(&temporary, &path).map_err(file)?;
    Ok((path, listener))
}

/// Serves both sockets until `stop` turns true, then removes them.
pub async fn serve(
    meter: Arc<Meter>,
    sockets: Sockets,
    stop: watch::Receiver<bool>,
) -> Result<(), StartError> {
    let Sockets { owner, service } = sockets;
    let until = |mut stop: watch::Receiver<bool>| async move {
        let _ = stop.wait_for(|stop| *stop).await;
    };
    let serve = |listener, channel| http::serve(Arc::clone(&meter), listener, channel, until(stop.clone()));
    let work = async {
        tokio::try_join!(serve(owner.1, Channel::Owner), serve(service.1, Channel::Service)).map(|_| ())
    };
    // Event streams would hold a graceful end up for ever.
    let grace = async {
        until(stop.clone()).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        Ok(())
    };
    let result = tokio::select! { result = work => result, result = grace => result };
    for path in [&owner.0, &service.0] {
        let _ = fs::remove_file(path);
    }
    result.map_err(|source| StartError::File {
        path: owner.0,
        source,
    })
}

/// Destroys what is on the node and not recorded, now and every while.
async fn reconcile(core: Arc<Core>) {
    let mut interval = tokio::time::interval(RECONCILE);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        reconcile_once(&core).await;
    }
}

/// Destroys what is on the node and not recorded.
pub async fn reconcile_once(core: &Arc<Core>) {
    for backend in core.registry.iter() {
        // What is there is listed before what is recorded: a sliver is recorded before anything of it is made,
        // and its id is never used again.
        let present = match backend.present().await {
            Ok(present) => present,
            Err(failure) => {
                tracing::error!(vm_type = backend.name(), %failure, "cannot see what is on the node");
                continue;
            }
        };
        for vm_id in present {
            if core.sliver(vm_id).is_some() {
                continue;
            }
            tracing::warn!(
                vm_id,
                vm_type = backend.name(),
                "not recorded; destroying what is left of it"
            );
            if let Err(failure) = backend.destroy(vm_id, None).await {
                tracing::error!(vm_id, %failure, "not destroyed; trying again later");
            }
        }
    }
}

async fn tick(core: Arc<Core>, kvm: Arc<Kvm>, tree: Arc<Tree>) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        core.expire().await;
        let (kvm, tree) = (Arc::clone(&kvm), Arc::clone(&tree));
        let work = move || {
            kvm.bound_logs();
            tree.settle();
        };
        let _ = tokio::task::spawn_blocking(work).await;
    }
}

/// Brings what all slivers together may send to what the owner lets the node send.
async fn bound_node(core: Arc<Core>, network: Network) {
    let mut rates = core.node_rate.subscribe();
    rates.mark_changed();
    while rates.changed().await.is_ok() {
        let Some(bits) = *rates.borrow_and_update() else {
            continue;
        };
        let result = match Rate::from_bits_per_second(bits) {
            Ok(rate) => network
                .set_node_rate(rate)
                .await
                .map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match result {
            Ok(()) => tracing::info!(bits, "the node's rate is set"),
            Err(error) => tracing::error!(bits, error, "the node's rate is not set"),
        }
    }
}

/// Counts what slices send, and keeps it: their days outlast slivers, the node manager and the node.
async fn count_traffic(core: Arc<Core>, network: Network) {
    let mut interval = tokio::time::interval(COUNT);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut unsaved = BTreeMap::new();
    loop {
        interval.tick().await;
        match network.count().await {
            Ok(counted) => {
                unsaved.extend(counted.changes);
                for (vm_id, held) in counted.switched {
                    core.tell_held(vm_id, held);
                }
            }
            Err(error) => tracing::error!(%error, "slices' traffic not counted; trying again"),
        }
        if unsaved.is_empty() {
            continue;
        }
        match core.keep_spent(unsaved.clone()).await {
            Ok(()) => unsaved.clear(),
            Err(error) => tracing::error!(%error, "slices' traffic not kept; trying again"),
        }
    }
}

/// Writes the node's accounts whenever slivers come or go.
async fn keep_accounts(core: Arc<Core>, config: crate::config::AccountsConfig) {
    loop {
        let (mut specs, settings) = (core.specs(), config.clone());
        // Only what has an address can be logged in to; a service of the host has its user there already.
        specs.retain(|spec| {
            let backend = core.registry.get(&spec.vm_type);
            backend.is_some_and(|backend| backend.address(spec).is_some())
        });
        match tokio::task::spawn_blocking(move || accounts::write(&settings, &specs)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(directory = %config.directory.display(), %error, "accounts not written: no ssh through the node")
            }
            Err(error) => tracing::error!(%error, "accounts not written"),
        }
        core.accounts_bell.notified().await;
    }
}

/// The slivers' name servers: as configured, or the node's own, except those on its loopback.
fn name_servers(config: &Config) -> Vec<IpAddr> {
    if !config.network.dns.is_empty() {
        return config.network.dns.clone();
    }
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers = text
        .lines()
        .filter_map(|line| line.strip_prefix("nameserver")?.trim().parse::<IpAddr>().ok());
    servers.filter(|address| !address.is_loopback()).take(3).collect()
}
