//! The slice creation service (`pl_conf` in the papers): an authority's point of presence on a node. An
//! unprivileged client of the node manager that holds a pool, and the only program of the node that talks to
//! the authority.
//!
//! ```text
//!                 node manager or authority does not answer: wait, longer each time
//!                  ┌────┐
//!                  ▼    │
//!   start ──► registering ──► syncing ◄───── the authority says so (event stream), poll, retry,
//!                  ▲            │ │          a slice expires, the node manager was away
//!                  │            │ └──► waiting ──┐
//!                  │            │        ▲       │
//!                  │            │        └───────┘
//!                  └────────────┘
//!        the authority does not know the node (any more)
//! ```
//!
//! Beside it run the watcher, which keeps the authority's event stream open and turns every event, and every
//! reconnection, into a sync; and the [`report`]er. A sync takes the whole set of wanted slivers, compares it
//! with the node manager's list ([`plan`]) and carries the difference out ([`apply`]). While the authority
//! cannot be asked, slivers still end when their slices expire.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod apply;
pub mod backoff;
pub mod config;
pub mod identity;
pub mod plan;
pub mod plnode;
pub mod report;

#[cfg(test)]
mod plan_tests;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use mandoline_api::authority::{
    KnownNode, NODE_EVENT_SLIVERS, NodeRegistration, RspecObject, SshEndpoint, VmType,
};
use mandoline_api::authority_client::{AuthorityClient, Caller, ClientError, ErrorClass};
use mandoline_api::nodemgr::{ClientError as NmError, FailureClass, NodeInfo, NodeManager};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;

use self::backoff::Backoff;
use self::config::Config;
use self::identity::{HmacSigner, IdentityError, KeySigner};
use self::plan::Failure;
use self::plnode::{NodeFile, NodeFileError};

/// The shortest pause between attempts. Short, because at a node's start the node manager comes up at the same time.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// Failures that wait to be reported; a node has far fewer slivers than that.
const FAILURES: usize = 4096;
/// How long a node's name may take to become an address.
const RESOLVE: Duration = Duration::from_secs(2);

/// Why the service cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The node does not know who it is.
    #[error(transparent)]
    NodeFile(#[from] NodeFileError),
    /// It has no key.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The authority's address is of no use.
    #[error(transparent)]
    Authority(#[from] ClientError),
}

/// What stops a sync.
#[derive(Debug, thiserror::Error)]
enum SyncError {
    #[error("authority: {0}")]
    Authority(#[from] ClientError),
    #[error("node manager: {0}")]
    NodeManager(#[from] NmError),
}

/// The service.
pub struct Service {
    config: Config,
    node: NodeFile,
    public_key: String,
    nm: NodeManager,
    /// Called under `NODE_KEY`.
    registrar: AuthorityClient,
    /// Called with the node's own key.
    authority: AuthorityClient,
    /// What has been reported as failed, so that it is not said at every poll.
    failed: HashMap<String, Failure>,
    /// The nodes that were published last.
    nodes: Vec<KnownNode>,
}

impl Service {
    /// Reads who the node is.
    pub fn new(config: Config) -> Result<Self, StartError> {
        let node = NodeFile::read(&config.node_file)?;
        let key = identity::load_or_create(&config.state_dir)?;
        let public_key = BASE64.encode(key.verifying_key().as_bytes());
        let node_id = node.node_id;
        let by_key = HmacSigner {
            node_id,
            node_key: node.node_key.clone(),
        };
        let registrar = AuthorityClient::new(&node.plc_url, Caller::Node(Arc::new(by_key)))?;
        let authority = registrar.with_caller(Caller::Node(Arc::new(KeySigner { node_id, key })));
        let nm = NodeManager::new(&config.nm_socket);
        Ok(Self {
            config,
            node,
            public_key,
            nm,
            registrar,
            authority,
            failed: HashMap::new(),
            nodes: Vec::new(),
        })
    }

    /// Serves until the future is dropped.
    pub async fn run(mut self) {
        let longest = Duration::from_secs(self.config.retry_max_seconds);
        let backoff = Backoff::new(FIRST_PAUSE, longest);
        let changed = Arc::new(Notify::new());
        let unknown = Arc::new(Notify::new());
        let (failures, failed) = mpsc::channel(FAILURES);
        self.register(backoff.clone()).await;

        // Dropped with this future, and with it the tasks.
        let mut tasks = JoinSet::new();
        tasks.spawn(watch(
            self.authority.clone(),
            changed.clone(),
            unknown.clone(),
            backoff.clone(),
        ));
        let reporter = report::Reporter {
            nm: self.nm.clone(),
            authority: self.authority.clone(),
            failures: failed,
            unknown: unknown.clone(),
            backoff: backoff.clone(),
        };
        tasks.spawn(reporter.run());

        let mut pause = backoff.clone();
        loop {
            let mut wait = self.poll_interval();
            match self.sync(&failures).await {
                Ok(synced) => {
                    if synced.retry {
                        wait = wait.min(pause.next_pause());
                    } else {
                        pause.reset();
                    }
                    wait = wait.min(until(synced.next_expiry));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot bring the slivers up to date");
                    if matches!(&error, SyncError::Authority(e) if e.class() == ErrorClass::Forbidden) {
                        self.register(backoff.clone()).await;
                    }
                    wait = wait.min(pause.next_pause());
                    if matches!(error, SyncError::Authority(_)) {
                        self.expire().await;
                    }
                }
            }
            tokio::select! {
                () = changed.notified() => {}
                () = tokio::time::sleep(wait) => {}
                () = unknown.notified() => self.register(backoff.clone()).await,
            }
        }
    }

    fn poll_interval(&self) -> Duration {
        let mut random = [0; 2];
        // Without random bytes the polls are merely not spread.
        let _ = getrandom::fill(&mut random);
        let spread = f64::from(u16::from_le_bytes(random)) / f64::from(u16::MAX) * 0.2 + 0.9;
        Duration::from_secs(self.config.poll_seconds).mul_f64(spread)
    }

    /// Announces the node until the authority has heard.
    async fn register(&self, mut pause: Backoff) {
        loop {
            let info = match self.nm.node().await {
                Ok(info) => info,
                Err(error) => {
                    tracing::info!(%error, "waiting for the node manager");
                    pause.wait().await;
                    continue;
                }
            };
            match self.registrar.node_register(&self.registration(&info)).await {
                Ok(answer) => {
                    tracing::info!(
                        node = answer.node_id,
                        hostname = answer.hostname,
                        boot_state = answer.boot_state,
                        "registered"
                    );
                    return;
                }
                Err(error) if matches!(error.class(), ErrorClass::Retryable) => {
                    tracing::warn!(%error, "cannot register");
                }
                Err(error) => {
                    tracing::error!(%error, node_id = self.node.node_id, "the authority refuses the node; is its pl_node.txt the newest?");
                }
            }
            pause.wait().await;
        }
    }

    fn registration(&self, info: &NodeInfo) -> NodeRegistration {
        let usable = info.vm_types.iter().filter(|vm_type| {
            if !vm_type.available {
                let detail = vm_type.detail.as_deref().unwrap_or("no reason given");
                tracing::warn!(vm_type = vm_type.name, detail, "not offered");
            }
            vm_type.available
        });
        let mut vm_types: Vec<_> = usable
            .map(|vm_type| VmType {
                name: vm_type.name.clone(),
                capabilities: vm_type.capabilities.clone(),
            })
            .collect();
        for (name, of) in &info.vm_type_names {
            if let Some(known) = vm_types.iter().find(|vm_type| vm_type.name == *of).cloned() {
                vm_types.push(VmType {
                    name: name.clone(),
                    ..known
                });
            }
        }
        let capacity = match info.capacity.to_json() {
            serde_json::Value::Object(map) => map,
            _ => RspecObject::new(),
        };
        NodeRegistration {
            ed25519_public_key: self.public_key.clone(),
            ssh_host_keys: self.host_keys(),
            ssh_endpoint: Some(SshEndpoint {
                host: self.node.ssh_endpoint.host.clone(),
                port: self.node.ssh_endpoint.port,
            }),
            vm_types,
            attribute_table_version: info.attribute_table_version,
            capacity,
        }
    }

    fn host_keys(&self) -> Vec<String> {
        let mut keys = Vec::new();
        for path in &self.config.ssh_host_keys {
            match std::fs::read_to_string(path) {
                Ok(text) => keys.extend(text.lines().filter(|line| !line.is_empty()).map(str::to_owned)),
                // Few nodes have keys of every kind.
                Err(error) => tracing::debug!(path = %path.display(), %error, "no host key"),
            }
        }
        if keys.is_empty() {
            tracing::warn!(
                "the node's ssh server has no host keys to announce: its users cannot check whom they reach"
            );
        }
        keys
    }

    /// Makes the node run what the authority wants.
    async fn sync(&mut self, failures: &mpsc::Sender<Failure>) -> Result<Synced, SyncError> {
        let desired = self.authority.node_slivers().await?;
        let have = self.nm.list().await?;
        let plan = plan::plan(&desired.slivers, &have.slivers, now());
        let mut found = plan.failures;
        let mut retry = false;
        for action in &plan.actions {
            if let Err(failure) = apply::apply(&self.nm, action).await {
                tracing::warn!(slice = failure.slice.name, class = ?failure.class, reason = failure.reason, "failed");
                retry |= failure.class == FailureClass::Retryable;
                let of = have.slivers.iter().find(|sliver| {
                    plan::Tag::of(&sliver.rspec).is_some_and(|tag| tag.id == failure.slice.id)
                });
                found.push(Failure {
                    state: of.map(|sliver| sliver.event.state),
                    ..failure
                });
            }
        }
        self.report(found, failures).await;
        // Last: names may take a while to become addresses, and slivers do not wait for that.
        self.publish_nodes(&desired.nodes).await;
        tracing::debug!(
            revision = desired.revision,
            actions = plan.actions.len(),
            "in step with the authority"
        );
        Ok(Synced {
            retry,
            next_expiry: plan.next_expiry,
        })
    }

    /// Tells the node's sensor `nodes` which nodes there are. It keeps the list when the authority is away.
    async fn publish_nodes(&mut self, nodes: &[KnownNode]) {
        if self.nodes == nodes {
            return;
        }
        let mut asked = JoinSet::new();
        for node in nodes.iter().cloned() {
            asked.spawn(async move { format!("{},{}\n", address_of(&node).await, node.hostname) });
        }
        let mut lines = asked.join_all().await;
        lines.sort();
        let table = format!("ip,name\n{}", lines.concat());
        match self.nm.publish("nodes", &table).await {
            Ok(()) => self.nodes = nodes.to_vec(),
            Err(error) => tracing::warn!(%error, "the sensor `nodes` is not up to date"),
        }
    }

    /// Reports failures that are new, or that have become others.
    async fn report(&mut self, found: Vec<Failure>, failures: &mpsc::Sender<Failure>) {
        let old = std::mem::take(&mut self.failed);
        for failure in found {
            if old.get(&failure.slice.id) != Some(&failure) && failures.send(failure.clone()).await.is_err() {
                tracing::error!("nobody reports failures any more");
            }
            self.failed.insert(failure.slice.id.clone(), failure);
        }
    }

    /// Ends what has expired, without asking anybody.
    async fn expire(&self) {
        let Ok(have) = self.nm.list().await else { return };
        for action in &plan::expired(&have.slivers, now()).actions {
            if let Err(failure) = apply::apply(&self.nm, action).await {
                tracing::warn!(
                    slice = failure.slice.name,
                    reason = failure.reason,
                    "cannot end the sliver"
                );
            }
        }
    }
}

struct Synced {
    /// Something may succeed when it is tried again.
    retry: bool,
    next_expiry: Option<i64>,
}

/// Keeps the authority's event stream open. Every event asks for a sync, and so does every reconnection:
/// what happened in between was not heard.
async fn watch(authority: AuthorityClient, changed: Arc<Notify>, unknown: Arc<Notify>, mut pause: Backoff) {
    loop {
        match authority.node_events().await {
            Ok(mut events) => {
                changed.notify_one();
                loop {
                    match events.next().await {
                        Ok(Some(event)) => {
                            pause.reset();
                            if event.event == NODE_EVENT_SLIVERS {
                                changed.notify_one();
                            }
                        }
                        Ok(None) => break,
                        Err(error) => {
                            tracing::warn!(%error, "the authority's events broke off");
                            break;
                        }
                    }
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot follow the authority's events; polling");
                if error.class() == ErrorClass::Forbidden {
                    unknown.notify_one();
                }
            }
        }
        pause.wait().await;
    }
}

/// A node's IP address; nothing, where nobody knows it.
async fn address_of(node: &KnownNode) -> String {
    let name = node.address.as_deref().unwrap_or(&node.hostname);
    if let Ok(address) = name.parse::<IpAddr>() {
        return address.to_string();
    }
    let found = tokio::time::timeout(RESOLVE, tokio::net::lookup_host((name, 0))).await;
    let first = found.ok().and_then(|found| found.ok()?.next());
    first.map_or_else(String::new, |found| found.ip().to_string())
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// How long until `expiry`; for ever, if there is none. One second more, so that it has come when we look.
fn until(expiry: Option<i64>) -> Duration {
    expiry.map_or(Duration::MAX, |at| {
        Duration::from_secs(
            u64::try_from(at.saturating_sub(now()))
                .unwrap_or(0)
                .saturating_add(1),
        )
    })
}
