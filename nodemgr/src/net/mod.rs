//! The node's network: a routed tap a sliver, source checks, NAT by port blocks, one HTB tree.
//!
//! [`Network`] is a handle to a thread of its own that holds the netlink connections. They belong
//! to that thread's network namespace, their calls are synchronous and take microseconds, and one
//! after the other is what keeps the kernel's tables and each other in step.
//!
//! ```text
//!   start: sysctls, IFB + HTB, ruleset (nft, once) ──▶ reconcile(recorded slivers) ──▶ ready
//!   add_sliver:    tap ─▶ class ─▶ chain + elements (one transaction) ─▶ link up, neighbour, route
//!   remove_sliver: elements ─▶ route ─▶ class ─▶ its flows ended   (the tap goes with its monitor)
//! ```
//!
//! A tap that is not whole is down, or its chain drops all: there is no moment at which a sliver
//! can send unchecked. What lives in the kernel is the truth after a restart: [`Network::list`]
//! reads it back, [`Network::reconcile`] makes it what is recorded without touching what is right.

mod core;
mod elements;
mod flows;
mod plan;
mod reconcile;
mod ruleset;
mod setup;
mod shaping;
mod sustained;
mod tables;
#[cfg(test)]
mod tests;
mod wants;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use ipnet::{Ipv4Net, Ipv6Net};
use mandoline_limits::Rate;
use mandoline_limits::netlink::nft::Counter;
use mandoline_limits::netlink::tc::{ClassParameters, ClassStats};
use tokio::sync::{mpsc, oneshot};

pub use self::core::Core;
pub use self::flows::FlowTable;
pub use self::plan::{Plan, SliverNet, TAP_PREFIX, index_of_tap, mac_of, tap_name};
pub use self::sustained::{Clock, Counted, Held, Reading, Spent, budget};
pub use self::wants::Wants;
pub use mandoline_limits::shaper::Bandwidth;

/// How the node's network is set up.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Network of the slivers' addresses.
    pub net: Ipv4Net,
    /// Network of the slivers' IPv6 addresses, routed to the node; `None` = slivers have none.
    pub net6: Option<Ipv6Net>,
    /// First port of the slivers' blocks; the node's own ephemeral ports are kept below it.
    pub first_port: u16,
    /// Ports of one sliver.
    pub ports: u16,
    /// What all slivers together may send.
    pub node_rate: Rate,
    /// Packets a second that one sliver may send of those that alarm the world: ICMP, and packets
    /// with IP options.
    pub alarms: u16,
    /// Flows that the node tracks at once; `None` = as its memory allows.
    pub flows: Option<u32>,
    /// Links to the outside; empty = the one of the default route.
    pub uplinks: Vec<String>,
    /// The node's address for its slivers' flows; `None` = the first one of the first uplink.
    pub node_address: Option<Ipv4Addr>,
    /// The IFB device of the HTB tree, which also holds the gateway's address.
    pub shaper: String,
    /// The program that loads the ruleset.
    pub nft: PathBuf,
    /// Largest packet of a sliver, in bytes.
    pub mtu: u32,
    /// Tells when a slice's day is over.
    pub clock: Clock,
}

impl Default for NetworkConfig {
    /// PlanetLab's 100 Mbit/s for a node; 711 slivers with 64 ports each.
    fn default() -> Self {
        Self {
            net: Ipv4Net::new_assert(Ipv4Addr::new(10, 128, 0, 0), 16),
            net6: None,
            first_port: 20_000,
            ports: 64,
            node_rate: Rate::NODE_DEFAULT,
            // "A small number per second" (OSDI'04 section 4.2.2): a ping and a traceroute at once.
            alarms: 5,
            flows: None,
            uplinks: Vec::new(),
            node_address: None,
            shaper: "mifb".to_owned(),
            nft: PathBuf::from("/usr/sbin/nft"),
            mtu: 1500,
            clock: Clock::default(),
        }
    }
}

impl NetworkConfig {
    /// Who gets which addresses and ports.
    pub fn plan(&self) -> Result<Plan, NetError> {
        Plan::new(self.net, self.first_port, self.ports)?.with_net6(self.net6)
    }
}

/// What can go wrong with the node's network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// The kernel, or a bound of a limit.
    #[error(transparent)]
    Limits(#[from] mandoline_limits::Error),
    /// A value that cannot be.
    #[error("{what} {value} is refused: allowed is {allowed}")]
    Config {
        /// Which value.
        what: &'static str,
        /// What it was.
        value: String,
        /// What would have been accepted.
        allowed: String,
    },
    /// The ruleset could not be loaded.
    #[error("cannot load the packet filter with {}: {detail}", program.display())]
    Ruleset {
        /// The program.
        program: PathBuf,
        /// Its own words.
        detail: String,
    },
    /// There is no link to the outside, or it has no address.
    #[error("{what}: name it in the configuration (network.{setting})")]
    NoUplink {
        /// What is missing.
        what: String,
        /// The setting that would help.
        setting: &'static str,
    },
    /// The network's thread has ended.
    #[error("the network thread has ended")]
    Stopped,
}

/// A sliver as the kernel's tables show it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Installed {
    /// The tap is there: some process has it open.
    pub tap: bool,
    /// Address in the source check.
    pub address: Option<Ipv4Addr>,
    /// Mark of its connections.
    pub mark: Option<u32>,
    /// Its HTB class.
    pub class: Option<ClassParameters>,
    /// The address is routed to the tap.
    pub routed: bool,
}

/// What a sliver has sent and received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SliverCounters {
    /// Sent, through its class: bytes, packets, drops, what is waiting.
    pub sent: ClassStats,
    /// Of these, what alarms the world: ICMP, packets with IP options.
    pub alarms: ClassStats,
    /// Received.
    pub received: Counter,
    /// Frames dropped because their source was not the sliver's.
    pub spoofed: Counter,
    /// First packets of flows dropped above the sliver's flow limit.
    pub refused_flows: Counter,
}

/// Counters of the node's packet filter.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeCounters {
    /// By name: `invalid`, `refused`, `to_node`, `foreign`, `other_frames`, `unknown_tap`.
    pub drops: BTreeMap<String, Counter>,
    /// What no class claimed.
    pub strays: ClassStats,
}

/// What [`Network::reconcile`] found and did, by sliver index.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reconciled {
    /// Recorded, tap there, nothing to do.
    pub intact: Vec<u16>,
    /// Recorded, tap there, something was missing or wrong and was put right.
    pub repaired: Vec<u16>,
    /// Recorded, but the tap is gone and with it the monitor: all traces were removed.
    pub dead: Vec<u16>,
    /// Not recorded: all traces were removed (the tap, if there is one, was taken down).
    pub unknown: Vec<u16>,
}

type Job = Box<dyn FnOnce(&mut Core) + Send>;

/// A handle to the node's network; clones are the same network.
#[derive(Debug, Clone)]
pub struct Network {
    jobs: mpsc::UnboundedSender<Job>,
    plan: Plan,
}

impl Network {
    /// Sets the network up (or takes over what an earlier run has set up) in the network
    /// namespace of the calling thread. Needs root.
    pub async fn start(config: NetworkConfig) -> Result<Self, NetError> {
        let plan = config.plan()?;
        let (jobs, mut inbox) = mpsc::unbounded_channel::<Job>();
        let (ready, started) = oneshot::channel();
        std::thread::Builder::new()
            .name("network".to_owned())
            .spawn(move || {
                let mut core = match Core::start(config) {
                    Ok(core) => core,
                    Err(error) => return drop(ready.send(Err(error))),
                };
                if ready.send(Ok(())).is_ok() {
                    while let Some(job) = inbox.blocking_recv() {
                        job(&mut core);
                    }
                }
            })
            .map_err(|_| NetError::Stopped)?;
        started.await.map_err(|_| NetError::Stopped)??;
        Ok(Self { jobs, plan })
    }

    /// Who gets which address and ports.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Makes a sliver's tap and lets it through: checked, marked, shaped, routed. The descriptor
    /// is the monitor's; the interface lives as long as some process holds it.
    pub async fn add_sliver(&self, sliver: SliverNet) -> Result<OwnedFd, NetError> {
        self.call(move |core| core.add_sliver(&sliver)).await
    }

    /// Removes a sliver's traces and ends its flows. Of a sliver that is not there, nothing is
    /// removed, and that is no error. `mark` is what its connections carry.
    pub async fn remove_sliver(&self, index: u16, mark: u32) -> Result<(), NetError> {
        self.call(move |core| core.remove_sliver(index, mark)).await
    }

    /// Brings a living sliver to changed attributes, at once: bandwidth, flow limit, owned ports.
    pub async fn update_sliver(&self, sliver: SliverNet) -> Result<(), NetError> {
        self.call(move |core| core.update_sliver(&sliver)).await
    }

    /// Changes what all slivers together may send, at once. Guarantees that this rate cannot keep
    /// are kept in proportion.
    pub async fn set_node_rate(&self, rate: Rate) -> Result<(), NetError> {
        self.call(move |core| core.set_node_rate(rate)).await
    }

    /// Takes over what slices had sent in their days when it was last kept: before
    /// [`Network::reconcile`].
    pub async fn remember(&self, spent: BTreeMap<String, Spent>) -> Result<(), NetError> {
        self.call(move |core| {
            core.remember(spent);
            Ok(())
        })
        .await
    }

    /// Counts what slices have sent, and holds those to their sustained rate that have used up
    /// their day's bytes.
    pub async fn count(&self) -> Result<Counted, NetError> {
        self.call(Core::count).await
    }

    /// What slices have sent in their days, as last counted.
    pub async fn spent(&self) -> Result<BTreeMap<String, Spent>, NetError> {
        self.call(|core| Ok(core.spent())).await
    }

    /// What is in the kernel's tables, by sliver index.
    pub async fn list(&self) -> Result<BTreeMap<u16, Installed>, NetError> {
        self.call(Core::list).await
    }

    /// Makes the kernel's tables what is recorded. Slivers that are right are not touched.
    pub async fn reconcile(&self, recorded: Vec<SliverNet>) -> Result<Reconciled, NetError> {
        self.call(move |core| core.reconcile(&recorded)).await
    }

    /// What slivers have sent and received, by index.
    pub async fn counters(&self) -> Result<BTreeMap<u16, SliverCounters>, NetError> {
        self.call(Core::counters).await
    }

    /// What the node's packet filter has dropped.
    pub async fn node_counters(&self) -> Result<NodeCounters, NetError> {
        self.call(Core::node_counters).await
    }

    async fn call<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Core) -> Result<T, NetError> + Send + 'static,
    ) -> Result<T, NetError> {
        let (answer, result) = oneshot::channel();
        let job = Box::new(move |core: &mut Core| drop(answer.send(job(core))));
        self.jobs.send(job).map_err(|_| NetError::Stopped)?;
        result.await.map_err(|_| NetError::Stopped)?
    }
}
