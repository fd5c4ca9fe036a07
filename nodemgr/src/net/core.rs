//! The network's work, on the thread that holds its netlink connections.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use mandoline_limits::Rate;
use mandoline_limits::netlink::link::{self, Link, LinkChange};
use mandoline_limits::netlink::{Connection, Request};
use mandoline_limits::shaper::{Bandwidth, PacketRate, SLOTS, Tree, TreeConfig};
use mandoline_limits::sysctl;
use mandoline_limits::tap::{self, TapOptions};

use super::elements::{self, Entry, Owner, Set};
use super::flows::FlowTable;
use super::plan::{GATEWAY6, Plan, SliverNet, index_of_tap, link_local, tap_name};
use super::shaping::{self, Shaping};
use super::sustained::{Clock, Counted, Held, Ledger, Spent};
use super::tables::{self, Tables};
use super::{NetError, NetworkConfig, NodeCounters, SliverCounters, ruleset, setup};

pub(super) type Result<T> = std::result::Result<T, NetError>;

/// The node's network, for one thread.
#[derive(Debug)]
pub struct Core {
    pub(super) plan: Plan,
    node_address: Ipv4Addr,
    /// Flows of a sliver that has no limit of its own.
    share: u32,
    mtu: u32,
    pub(super) shaping: Shaping,
    pub(super) slivers: BTreeMap<u16, SliverNet>,
    pub(super) ledger: Ledger,
    /// Marks of the slivers that are held to their sustained rate.
    held: BTreeSet<u32>,
    pub(super) clock: Clock,
    pub(super) route: Connection,
    pub(super) filter: Connection,
}

impl Core {
    /// Sets the network up in the network namespace of this thread, or takes over what is there.
    pub fn start(config: NetworkConfig) -> Result<Self> {
        let plan = config.plan()?;
        let mut route = Connection::route()?;
        let (uplinks, node_address) = setup::outside(&mut route, &config)?;

        let tree = TreeConfig {
            alarms: Some(PacketRate::per_second(config.alarms)?),
            ..TreeConfig::new(&config.shaper, config.node_rate)?
        };
        let tree = Tree::ensure(&mut route, tree)?;
        // The gateway's address stands on the IFB: the node answers for it on every tap.
        route.execute(&[link::add_address(tree.link, plan.gateway().into(), 32)])?;
        setup::load(&config, &ruleset::text(&plan, &config.shaper, &uplinks)?)?;
        let flows = FlowTable::of_node(&config)?;
        flows.install()?;
        setup::tracking(&plan)?;
        setup::forwarding(&plan, &uplinks)?;
        let filter = Connection::netfilter()?;
        Ok(Self {
            plan,
            node_address,
            share: flows.share,
            mtu: config.mtu,
            shaping: Shaping::new(tree),
            slivers: BTreeMap::new(),
            ledger: Ledger::new(setup::boot()?),
            held: BTreeSet::new(),
            clock: config.clock,
            route,
            filter,
        })
    }

    /// Makes a sliver's tap and lets it through.
    pub fn add_sliver(&mut self, sliver: &SliverNet) -> Result<OwnedFd> {
        // Everything that can be refused is, before anything is made.
        self.check(sliver)?;
        let mut changes: Vec<Request> = self.elements(sliver)?.iter().map(|(set, e)| set.add(e)).collect();
        changes.extend(tables::chain(&sliver.tap));
        let tap = tap::open(&TapOptions {
            name: sliver.tap.clone(),
            ..Default::default()
        })?;
        let made = self.wire(sliver, &changes);
        if let Err(error) = made {
            // The tap goes when its descriptor is dropped here; its chain must go first.
            if let Err(second) = self.remove_sliver(sliver.index, sliver.mark) {
                tracing::warn!(sliver = sliver.index, error = %second, "traces of a failed sliver are left");
            }
            return Err(error);
        }
        self.slivers.insert(sliver.index, sliver.clone());
        Ok(tap)
    }

    /// Refuses what the kernel could not keep, or would not notice: of two intervals it sees only
    /// whether the new one's ends lie in the old one.
    fn check(&self, sliver: &SliverNet) -> Result<()> {
        shaping::check(&sliver.wants.bandwidth)?;
        let owner = |other: &&SliverNet| {
            other.index != sliver.index && other.wants.ports.overlaps(&sliver.wants.ports)
        };
        match self.slivers.values().find(owner) {
            Some(owner) => Err(NetError::Config {
                what: "owned ports",
                value: sliver.wants.ports.to_string(),
                allowed: format!(
                    "ports other than those of {}: {}",
                    owner.wants.slice, owner.wants.ports
                ),
            }),
            None => Ok(()),
        }
    }

    fn wire(&mut self, sliver: &SliverNet, changes: &[Request]) -> Result<()> {
        // Here its day begins, if it has none.
        self.ledger
            .count(&sliver.wants.slice, sliver.mark, 0, self.clock.now());
        let mut requests = self.shaping.set(sliver.index, self.bandwidth(sliver))?;
        let device = self.route.require_link(&sliver.tap)?;
        // Before it is up, or the node would greet its routers on it.
        let conf = format!("ipv6/conf/{}", sliver.tap);
        if sliver.address6.is_none() {
            sysctl::set_if_there(&format!("{conf}/disable_ipv6"), "1")?;
        } else {
            // The node has one address on it, the gateway's, and believes no router there.
            sysctl::set(&format!("{conf}/addr_gen_mode"), "1")?;
            sysctl::set(&format!("{conf}/accept_ra"), "0")?;
            sysctl::set(&format!("{conf}/disable_ipv6"), "0")?;
        }
        self.filter.commit(changes)?;
        requests.extend(self.link_requests(sliver, device.index));
        Ok(self.route.execute(&requests)?)
    }

    pub(super) fn link_requests(&self, sliver: &SliverNet, index: u32) -> Vec<Request> {
        let up = LinkChange {
            up: Some(true),
            mtu: Some(self.mtu),
            mac: None,
        };
        let mut requests = vec![
            link::change(index, &sliver.tap, up),
            link::add_neighbour(index, sliver.address.into(), sliver.mac),
            link::add_route(sliver.address.into(), index, Some(self.plan.gateway().into())),
        ];
        if let Some(address6) = sliver.address6 {
            requests.extend([
                link::add_address(index, GATEWAY6.into(), 128),
                link::add_neighbour(index, address6.into(), sliver.mac),
                link::add_neighbour(index, link_local(sliver.mac).into(), sliver.mac),
                link::add_route(address6.into(), index, None),
            ]);
        }
        requests
    }

    /// What a sliver is in the packet filter.
    pub(super) fn elements(&self, sliver: &SliverNet) -> Result<BTreeSet<Entry>> {
        let elements = elements::elements(sliver, self.node_address, self.share)?;
        Ok(elements.into_iter().collect())
    }

    /// Brings a living sliver to changed attributes: bandwidth, flow limit, owned ports. What of
    /// it is as it should be is not touched.
    pub fn update_sliver(&mut self, sliver: &SliverNet) -> Result<()> {
        if !self.slivers.contains_key(&sliver.index) {
            return Err(mandoline_limits::Error::NotFound {
                what: format!("the network of sliver {}", sliver.index),
            }
            .into());
        }
        self.check(sliver)?;
        let there = Tables::read(&mut self.filter)?.of(&sliver.tap);
        let changes = tables::difference(&there, &self.elements(sliver)?);
        self.filter.commit(&changes)?;
        let requests = self.shaping.set(sliver.index, self.bandwidth(sliver))?;
        self.route.execute(&requests)?;
        self.slivers.insert(sliver.index, sliver.clone());
        Ok(())
    }

    /// Removes a sliver's traces and ends its flows.
    pub fn remove_sliver(&mut self, index: u16, mark: u32) -> Result<()> {
        let tap = tap_name(index);
        // A monitor that still holds the tap falls silent before the checks on it go. The routes
        // go with this, or went with the tap.
        if let Some(device) = self.route.link(&tap)? {
            self.route.execute(&[mute(&device)])?;
        }
        let tables = Tables::read(&mut self.filter)?;
        self.filter.commit(&tables.removals(&tap))?;
        // Nothing can be sent any more: what the class says now is the last word.
        self.count_classes()?;
        let requests = self.shaping.remove(index)?;
        self.route.execute(&requests)?;
        if let Some(sliver) = self.slivers.remove(&index) {
            self.ledger.close(&sliver.wants.slice);
        }
        // An address is used again: nobody shall inherit flows.
        Ok(self.filter.end_flows(mark)?)
    }

    /// Changes what all slivers together may send.
    pub fn set_node_rate(&mut self, rate: Rate) -> Result<()> {
        let requests = self.shaping.set_rate(rate)?;
        Ok(self.route.execute(&requests)?)
    }

    /// Takes over what slices had sent in their days when it was last kept.
    pub fn remember(&mut self, spent: BTreeMap<String, Spent>) {
        self.ledger.remember(spent);
    }

    /// What slices have sent in their days, as last counted.
    pub fn spent(&self) -> BTreeMap<String, Spent> {
        self.ledger.all().clone()
    }

    /// Counts what slices have sent, and holds those to their sustained rate that have used up
    /// their day.
    pub fn count(&mut self) -> Result<Counted> {
        self.count_classes()?;
        let present = self.slivers.values().map(|s| s.wants.slice.as_str()).collect();
        self.ledger.turn(self.clock.now(), &present);
        let (mut changed, mut held) = (Vec::new(), BTreeMap::new());
        for (index, sliver) in &self.slivers {
            let bandwidth = self.bandwidth(sliver);
            if self.shaping.bandwidth(*index) != Some(bandwidth) {
                changed.push((*index, bandwidth));
            }
            if let Some((rate, until_ns)) = self.held(sliver) {
                held.insert(sliver.mark, Held { rate, until_ns });
            }
        }
        let mut requests = Vec::new();
        for (index, bandwidth) in changed {
            requests.extend(self.shaping.set(index, bandwidth)?);
        }
        self.route.execute(&requests)?;
        let marks: BTreeSet<u32> = held.keys().copied().collect();
        let switched = marks.symmetric_difference(&self.held);
        let counted = Counted {
            switched: switched.map(|mark| (*mark, held.get(mark).copied())).collect(),
            changes: self.ledger.changes(),
        };
        self.held = marks;
        Ok(counted)
    }

    fn count_classes(&mut self) -> Result<()> {
        let now = self.clock.now();
        let slots = self.shaping.slots(&mut self.route)?;
        for (index, sliver) in &self.slivers {
            if let Some(slot) = slots.get(index) {
                let sent = slot.class.stats.bytes;
                self.ledger.count(&sliver.wants.slice, sliver.mark, sent, now);
            }
        }
        Ok(())
    }

    /// What a sliver may send now: after the day's bytes no more than its sustained rate.
    pub(super) fn bandwidth(&self, sliver: &SliverNet) -> Bandwidth {
        let bandwidth = sliver.wants.bandwidth;
        let Some((ceiling, _)) = self.held(sliver) else {
            return bandwidth;
        };
        Bandwidth {
            peak: Some(bandwidth.peak.map_or(ceiling, |peak| peak.min(ceiling))),
            ..bandwidth
        }
    }

    /// The rate that a sliver is held to and until when (ns since 1970), if its slice has used up
    /// its day. A guarantee stays one: it was paid for.
    fn held(&self, sliver: &SliverNet) -> Option<(Rate, u64)> {
        let wants = &sliver.wants;
        let (sustained, spent) = (wants.sustained?, self.ledger.spent(&wants.slice)?);
        let rate = sustained.max(wants.bandwidth.guarantee);
        spent.is_all_of(sustained).then(|| (rate, spent.until_ns()))
    }

    /// What slivers have sent and received.
    pub fn counters(&mut self) -> Result<BTreeMap<u16, SliverCounters>> {
        let tables = Tables::read(&mut self.filter)?;
        let mut counters: BTreeMap<u16, SliverCounters> = BTreeMap::new();
        for (index, slot) in self.shaping.slots(&mut self.route)? {
            let one = counters.entry(index).or_default();
            one.sent = slot.stats();
            one.alarms = slot.alarms.map(|class| class.stats).unwrap_or_default();
        }
        for (set, element, counter) in tables.all() {
            let Some(Owner::Tap(tap)) = set.owner(element) else {
                continue;
            };
            let (Some(index), Some(counter)) = (index_of_tap(&tap), counter) else {
                continue;
            };
            let one = counters.entry(index).or_default();
            match set {
                Set::Spoofed => one.spoofed = counter,
                Set::Received => one.received = counter,
                Set::NewFlows | Set::Flows => {
                    one.refused_flows.packets += counter.packets;
                    one.refused_flows.bytes += counter.bytes;
                }
                _ => {}
            }
        }
        Ok(counters)
    }

    /// What the node's packet filter has dropped.
    pub fn node_counters(&mut self) -> Result<NodeCounters> {
        let mut drops = self.filter.named_counters(&ruleset::frames())?;
        drops.extend(self.filter.named_counters(&ruleset::packets())?);
        Ok(NodeCounters {
            drops,
            strays: self.shaping.strays(&mut self.route)?,
        })
    }

    pub(super) fn taps(&mut self) -> Result<BTreeMap<u16, Link>> {
        let links = self.route.links()?;
        Ok(links
            .into_iter()
            .filter_map(|l| Some((index_of_tap(&l.name).filter(|i| *i < SLOTS)?, l)))
            .collect())
    }
}

/// Takes a link down: it neither sends nor receives, and its routes go.
pub(super) fn mute(device: &Link) -> Request {
    let down = LinkChange {
        up: Some(false),
        ..Default::default()
    };
    link::change(device.index, &device.name, down).tolerate(libc::ENODEV)
}
