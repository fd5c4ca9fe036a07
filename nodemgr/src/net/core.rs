//! The network's work, on the thread that holds its netlink connections.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use mandoline_limits::Rate;
use mandoline_limits::netlink::link::{self, Link, LinkChange};
use mandoline_limits::netlink::nft::{Element, Step, device_of_field};
use mandoline_limits::netlink::{Connection, Request};
use mandoline_limits::shaper::{Bandwidth, PacketRate, SLOTS, Tree, TreeConfig};
use mandoline_limits::sysctl;
use mandoline_limits::tap::{self, TapOptions};

use super::plan::{Plan, SliverNet, index_of_tap, tap_name};
use super::ruleset::{self, Owner, Set};
use super::shaping::{self, Shaping};
use super::{Installed, NetError, NetworkConfig, NodeCounters, Reconciled, SliverCounters};

type Result<T> = std::result::Result<T, NetError>;

/// The node's network, for one thread.
#[derive(Debug)]
pub struct Core {
    plan: Plan,
    node_address: Ipv4Addr,
    mtu: u32,
    shaping: Shaping,
    route: Connection,
    filter: Connection,
}

impl Core {
    /// Sets the network up in the network namespace of this thread, or takes over what is there.
    pub fn start(config: NetworkConfig) -> Result<Self> {
        let plan = Plan::new(config.net, config.first_port, config.ports)?;
        let mut route = Connection::route()?;
        let (uplinks, node_address) = outside(&mut route, &config)?;

        let tree = TreeConfig {
            alarms: Some(PacketRate::per_second(config.alarms)?),
            ..TreeConfig::new(&config.shaper, config.node_rate)?
        };
        let tree = Tree::ensure(&mut route, tree)?;
        // The gateway's address stands on the IFB: the node answers for it on every tap.
        route.execute(&[link::add_address(tree.link, plan.gateway(), 32)])?;
        load(&config, &ruleset::text(&plan, &config.shaper, &uplinks)?)?;
        // These exist once the ruleset has brought connection tracking in; they must be on before
        // the first flow, which otherwise would never be counted.
        sysctl::set("netfilter/nf_conntrack_acct", "1")?;
        sysctl::set_if_there("netfilter/nf_conntrack_timestamp", "1")?;
        // The node's own connections stay out of the slivers' blocks.
        let last = plan.first_port() - 1;
        sysctl::set(
            "ipv4/ip_local_port_range",
            &format!("{} {last}", (last / 2 + 1).max(1024)),
        )?;
        // Last: nothing is forwarded before the rules are there.
        sysctl::set("ipv4/ip_forward", "1")?;
        let filter = Connection::netfilter()?;
        Ok(Self {
            plan,
            node_address,
            mtu: config.mtu,
            shaping: Shaping::new(tree),
            route,
            filter,
        })
    }

    /// Makes a sliver's tap and lets it through.
    pub fn add_sliver(&mut self, sliver: &SliverNet) -> Result<OwnedFd> {
        // Everything that can be refused is, before anything is made.
        shaping::check(&sliver.bandwidth)?;
        let changes = self.additions(sliver)?;
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
        Ok(tap)
    }

    fn wire(&mut self, sliver: &SliverNet, changes: &[Request]) -> Result<()> {
        let mut requests = self.shaping.set(sliver.index, sliver.bandwidth)?;
        let device = self.route.require_link(&sliver.tap)?;
        // Before it is up, or the node would greet its routers on it.
        sysctl::set_if_there(&format!("ipv6/conf/{}/disable_ipv6", sliver.tap), "1")?;
        self.filter.commit(changes)?;
        requests.extend(self.link_requests(sliver, device.index));
        Ok(self.route.execute(&requests)?)
    }

    fn link_requests(&self, sliver: &SliverNet, index: u32) -> [Request; 3] {
        let up = LinkChange {
            up: Some(true),
            mtu: Some(self.mtu),
            mac: None,
        };
        [
            link::change(index, &sliver.tap, up),
            link::add_neighbour(index, sliver.address, sliver.mac),
            link::add_route(sliver.address, index, Some(self.plan.gateway())),
        ]
    }

    /// Changes of the packet filter that let a sliver through.
    fn additions(&self, sliver: &SliverNet) -> Result<Vec<Request>> {
        let elements = ruleset::elements(sliver, self.node_address)?;
        let mut changes: Vec<_> = elements
            .iter()
            .map(|(set, key, data)| set.add(key, data.as_deref()))
            .collect();
        changes.extend(chain(&sliver.tap));
        Ok(changes)
    }

    /// Removes a sliver's traces and ends its flows.
    pub fn remove_sliver(&mut self, index: u16, mark: u32) -> Result<()> {
        let tap = tap_name(index);
        // A monitor that still holds the tap falls silent before the checks on it go. The route
        // goes with this, or went with the tap.
        if let Some(device) = self.route.link(&tap)? {
            self.route.execute(&[mute(&device)])?;
        }
        let tables = self.read_tables()?;
        self.filter
            .commit(&tables.removals(&tap, tables.address_of(&tap)))?;
        let requests = self.shaping.remove(index)?;
        self.route.execute(&requests)?;
        // An address is used again: nobody shall inherit flows.
        Ok(self.filter.end_flows(mark)?)
    }

    /// Changes what a sliver may send.
    pub fn set_bandwidth(&mut self, index: u16, bandwidth: &Bandwidth) -> Result<()> {
        if !self.shaping.has(index) {
            return Err(mandoline_limits::Error::NotFound {
                what: format!("the HTB class of sliver {index}"),
            }
            .into());
        }
        let requests = self.shaping.set(index, *bandwidth)?;
        Ok(self.route.execute(&requests)?)
    }

    /// Changes what all slivers together may send.
    pub fn set_node_rate(&mut self, rate: Rate) -> Result<()> {
        let requests = self.shaping.set_rate(rate)?;
        Ok(self.route.execute(&requests)?)
    }

    /// What is in the kernel's tables.
    pub fn list(&mut self) -> Result<BTreeMap<u16, Installed>> {
        let tables = self.read_tables()?;
        let routes = self.route.host_routes()?;
        let links = self.taps()?;
        let mut found: BTreeMap<u16, Installed> = BTreeMap::new();
        for (index, slot) in self.shaping.slots(&mut self.route)? {
            found.entry(index).or_default().class = Some(slot.class.parameters);
        }
        for (index, device) in &links {
            let one = found.entry(*index).or_default();
            one.tap = true;
            one.routed = routes.iter().any(|(_, to)| *to == device.index);
        }
        for (set, element) in tables.all() {
            let Some(Owner::Tap(tap)) = set.owner(element) else {
                continue;
            };
            let Some(index) = index_of_tap(&tap) else { continue };
            let one = found.entry(index).or_default();
            match set {
                Set::Sources => one.address = address_of_source(element),
                Set::Marks => {
                    one.mark = element
                        .data
                        .as_deref()
                        .and_then(|d| d.try_into().ok())
                        .map(u32::from_ne_bytes)
                }
                _ => {}
            }
        }
        Ok(found)
    }

    /// Makes the kernel's tables what is recorded.
    pub fn reconcile(&mut self, recorded: &[SliverNet]) -> Result<Reconciled> {
        let mut report = Reconciled::default();
        let tables = self.read_tables()?;
        let links = self.taps()?;
        let routes: BTreeSet<_> = self.route.host_routes()?.into_iter().collect();
        let classes = self.shaping.slots(&mut self.route)?;
        let alive: BTreeMap<u16, &SliverNet> = recorded
            .iter()
            .filter(|s| links.contains_key(&s.index))
            .map(|s| (s.index, s))
            .collect();
        self.shaping
            .know(alive.values().map(|s| (s.index, s.bandwidth)))?;

        let mut wanted: BTreeSet<ruleset::Entry> = BTreeSet::new();
        for sliver in alive.values() {
            wanted.extend(ruleset::elements(sliver, self.node_address)?);
        }
        let there: BTreeSet<_> = tables
            .all()
            .map(|(set, e)| (set, e.key.clone(), e.data.clone()))
            .collect();
        // Elements that go come first in the transaction: a key may come back with other data.
        let mut changes: Vec<Request> = there
            .difference(&wanted)
            .map(|(set, key, _)| set.delete(key))
            .collect();
        changes.extend(
            wanted
                .difference(&there)
                .map(|(set, key, data)| set.add(key, data.as_deref())),
        );
        for name in tables
            .chains
            .iter()
            .filter(|name| index_of_tap(name).is_some_and(|i| !alive.contains_key(&i)))
        {
            changes.push(ruleset::frames().delete_chain(name));
        }
        let unchained = |sliver: &&SliverNet| !tables.chains.contains(&sliver.tap);
        changes.extend(
            alive
                .values()
                .copied()
                .filter(unchained)
                .flat_map(|s| chain(&s.tap)),
        );

        let (mut silenced, mut requests) = (Vec::new(), Vec::new());
        for (index, sliver) in &alive {
            let device = &links[index];
            let class = self.shaping.wanted(*index)?;
            let shaped = class.is_some_and(|class| classes.get(index).is_some_and(|slot| slot.is(&class)));
            let linked = device.up && routes.contains(&(sliver.address, device.index));
            if !shaped {
                requests.extend(self.shaping.again(*index)?);
            }
            if !linked {
                requests.extend(self.link_requests(sliver, device.index));
            }
            let elements = ruleset::elements(sliver, self.node_address)?;
            let whole = elements.iter().all(|e| there.contains(e)) && !unchained(sliver);
            if shaped && linked && whole {
                report.intact.push(*index)
            } else {
                report.repaired.push(*index)
            }
        }
        let mut gone: BTreeSet<u16> = classes.keys().chain(links.keys()).copied().collect();
        gone.extend(tables.taps().filter_map(|tap| index_of_tap(&tap)));
        gone.extend(recorded.iter().map(|s| s.index));
        for index in gone.into_iter().filter(|index| !alive.contains_key(index)) {
            requests.extend(self.shaping.remove(index)?);
            // Some process may hold the tap still, though nobody should.
            silenced.extend(links.get(&index).map(mute));
            let known = recorded.iter().any(|s| s.index == index);
            if known {
                report.dead.push(index)
            } else {
                report.unknown.push(index)
            }
        }
        self.route.execute(&silenced)?;
        self.filter.commit(&changes)?;
        self.route.execute(&requests)?;
        for dead in recorded.iter().filter(|s| report.dead.contains(&s.index)) {
            self.filter.end_flows(dead.mark)?;
        }
        Ok(report)
    }

    /// What slivers have sent and received.
    pub fn counters(&mut self) -> Result<BTreeMap<u16, SliverCounters>> {
        let tables = self.read_tables()?;
        let mut counters: BTreeMap<u16, SliverCounters> = BTreeMap::new();
        for (index, slot) in self.shaping.slots(&mut self.route)? {
            let one = counters.entry(index).or_default();
            one.sent = slot.stats();
            one.alarms = slot.alarms.map(|class| class.stats).unwrap_or_default();
        }
        let index_of_address: BTreeMap<Ipv4Addr, u16> = tables
            .of(Set::Sources)
            .filter_map(|e| Some((address_of_source(e)?, index_of_tap(&device_of_field(&e.key)?)?)))
            .collect();
        for (set, element) in tables.all() {
            let index = match set.owner(element) {
                Some(Owner::Tap(tap)) => index_of_tap(&tap),
                Some(Owner::Address(address)) => index_of_address.get(&address).copied(),
                None => None,
            };
            let (Some(index), Some(counter)) = (index, element.counter) else {
                continue;
            };
            let one = counters.entry(index).or_default();
            match set {
                Set::Spoofed => one.spoofed = counter,
                Set::Received => one.received = counter,
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

    fn read_tables(&mut self) -> Result<Tables> {
        let mut elements = BTreeMap::new();
        for set in Set::ALL {
            elements.insert(set, self.filter.elements(&set.table(), set.name())?);
        }
        Ok(Tables {
            elements,
            chains: self.filter.chains(&ruleset::frames())?,
        })
    }

    fn taps(&mut self) -> Result<BTreeMap<u16, Link>> {
        let links = self.route.links()?;
        Ok(links
            .into_iter()
            .filter_map(|l| Some((index_of_tap(&l.name).filter(|i| *i < SLOTS)?, l)))
            .collect())
    }
}

/// What the packet filter's sets hold.
struct Tables {
    elements: BTreeMap<Set, Vec<Element>>,
    chains: Vec<String>,
}

impl Tables {
    fn of(&self, set: Set) -> impl Iterator<Item = &Element> {
        self.elements.get(&set).into_iter().flatten()
    }

    fn all(&self) -> impl Iterator<Item = (Set, &Element)> {
        self.elements
            .iter()
            .flat_map(|(set, elements)| elements.iter().map(|e| (*set, e)))
    }

    /// Names of the taps that anything here belongs to.
    fn taps(&self) -> impl Iterator<Item = String> {
        let keyed = self.all().filter_map(|(set, e)| match set.owner(e) {
            Some(Owner::Tap(tap)) => Some(tap),
            _ => None,
        });
        keyed.chain(self.chains.iter().cloned())
    }

    fn address_of(&self, tap: &str) -> Option<Ipv4Addr> {
        self.of(Set::Sources)
            .find(|e| device_of_field(&e.key).as_deref() == Some(tap))
            .and_then(address_of_source)
    }

    fn removals(&self, tap: &str, address: Option<Ipv4Addr>) -> Vec<Request> {
        let owners = [Some(Owner::Tap(tap.to_owned())), address.map(Owner::Address)];
        let owned = self
            .all()
            .filter(|(set, e)| set.owner(e).is_some_and(|o| owners.contains(&Some(o))));
        let mut changes: Vec<_> = owned.map(|(set, e)| set.delete(&e.key)).collect();
        // Older kernels delete a chain with its device; then there is nothing left to delete.
        if self.chains.iter().any(|name| name == tap) {
            changes.push(ruleset::frames().delete_chain(tap));
        }
        changes
    }
}

/// The ingress chain of a tap: everything to the common checks, and what comes back is dropped.
fn chain(tap: &str) -> [Request; 2] {
    let table = ruleset::frames();
    [
        table.add_ingress_chain(tap, tap),
        table.add_rule(tap, &[Step::Goto("from_tap".to_owned())]),
    ]
}

/// Takes a link down: it neither sends nor receives, and its routes go.
fn mute(device: &Link) -> Request {
    let down = LinkChange {
        up: Some(false),
        ..Default::default()
    };
    link::change(device.index, &device.name, down).tolerate(libc::ENODEV)
}

fn address_of_source(element: &Element) -> Option<Ipv4Addr> {
    // ifname (16), Ethernet address (6, padded to 8), IPv4 address
    let octets: [u8; 4] = element.key.get(24..28)?.try_into().ok()?;
    Some(octets.into())
}

/// The links to the outside and the address that slivers' flows get there.
fn outside(route: &mut Connection, config: &NetworkConfig) -> Result<(Vec<String>, Ipv4Addr)> {
    let mut links = Vec::new();
    if config.uplinks.is_empty() {
        let index = route.default_route()?;
        links.extend(route.links()?.into_iter().filter(|l| Some(l.index) == index));
    }
    for name in &config.uplinks {
        links.push(route.require_link(name)?);
    }
    let Some(first) = links.first() else {
        return Err(NetError::NoUplink {
            what: "there is no default route to find the uplink by".to_owned(),
            setting: "uplinks",
        });
    };
    let address = match config.node_address {
        Some(address) => Some(address),
        None => route.addresses(first.index)?.first().map(|(address, _)| *address),
    };
    let what = || format!("uplink {} has no IPv4 address", first.name);
    let address = address.ok_or_else(|| NetError::NoUplink {
        what: what(),
        setting: "node_address",
    })?;
    Ok((links.into_iter().map(|l| l.name).collect(), address))
}

/// Loads the ruleset: once, at start. From then on all changes go by netlink.
fn load(config: &NetworkConfig, text: &str) -> Result<()> {
    let failed = |detail: String| NetError::Ruleset {
        program: config.nft.clone(),
        detail,
    };
    let mut child = Command::new(&config.nft)
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| failed(e.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin
            .write_all(text.as_bytes())
            .map_err(|e| failed(e.to_string()))?;
    }
    let output = child.wait_with_output().map_err(|e| failed(e.to_string()))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}
