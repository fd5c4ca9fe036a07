//! Who gets which address, port block, MAC and tap: arithmetic on a sliver's index, no state.
//!
//! Deterministic blocks (RFC 7422): from an outside port and the recorded index of a sliver, who
//! sent a packet is known even when every log of flows was lost.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::{Ipv4Net, Ipv6Net};
use mandoline_limits::netlink::link::Mac;
use mandoline_limits::shaper::SLOTS;
use mandoline_rspec::{PortRange, PortSet, Protocol};

use super::{NetError, Wants};

/// What taps are called: this and the sliver's index.
pub const TAP_PREFIX: &str = "mtap";

/// The node's addresses and ports for its slivers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    net: Ipv4Net,
    net6: Option<Ipv6Net>,
    first_port: u16,
    block: u16,
}

/// A sliver's place in the network. From [`Plan::sliver`]; recorded by the node manager, so that a
/// changed plan does not move living slivers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliverNet {
    /// Index on the node; free again once the sliver is gone. Its slot in the HTB tree too.
    pub index: u16,
    /// Name of its tap.
    pub tap: String,
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its IPv4 address, routed to the tap.
    pub address: Ipv4Addr,
    /// Its IPv6 address, where the node has a prefix.
    pub address6: Option<Ipv6Addr>,
    /// Its source ports (and ICMP identifiers) on the node's address.
    pub ports: RangeInclusive<u16>,
    /// The mark of its connections: its vm_id, never 0.
    pub mark: u32,
    /// What its attributes ask for.
    pub wants: Wants,
}

impl SliverNet {
    /// Its IPv6 gateway, on its own link.
    pub fn gateway6(&self) -> Option<Ipv6Addr> {
        self.address6.map(|_| GATEWAY6)
    }

    /// All its addresses.
    pub fn addresses(&self) -> impl Iterator<Item = std::net::IpAddr> {
        let v6 = self.address6.map(std::net::IpAddr::V6);
        std::iter::once(std::net::IpAddr::V4(self.address)).chain(v6)
    }
}

impl Plan {
    /// Addresses from `net`, port blocks of `block` ports from `first_port` up.
    pub fn new(net: Ipv4Net, first_port: u16, block: u16) -> Result<Self, NetError> {
        let refuse = |what, value: String, allowed: &str| {
            Err(NetError::Config {
                what,
                value,
                allowed: allowed.to_owned(),
            })
        };
        if net.prefix_len() > 29 || net.prefix_len() < 8 {
            return refuse("sliver network", net.to_string(), "an IPv4 network of /8 to /29");
        }
        if first_port < 1024 {
            return refuse(
                "first port of the slivers",
                first_port.to_string(),
                "1024 or more",
            );
        }
        if !(16..=4096).contains(&block) || u32::from(first_port) + u32::from(block) > 65_536 {
            return refuse(
                "ports of a sliver",
                block.to_string(),
                "16 to 4096, and no more than there are above the first port",
            );
        }
        Ok(Self {
            net: net.trunc(),
            net6: None,
            first_port,
            block,
        })
    }

    /// With IPv6 addresses from `net6`, which must be routed to the node.
    pub fn with_net6(mut self, net6: Option<Ipv6Net>) -> Result<Self, NetError> {
        if let Some(net6) = net6 {
            let address = net6.network();
            let unicast =
                !address.is_multicast() && !address.is_unicast_link_local() && !address.is_loopback();
            if !(16..=112).contains(&net6.prefix_len()) || !unicast {
                return Err(NetError::Config {
                    what: "IPv6 network of the slivers",
                    value: net6.to_string(),
                    allowed: "a unicast prefix of /16 to /112 that is routed to the node".to_owned(),
                });
            }
        }
        self.net6 = net6.map(|net6| net6.trunc());
        Ok(self)
    }

    /// The network that slivers' IPv6 addresses are from.
    pub fn net6(&self) -> Option<Ipv6Net> {
        self.net6
    }

    /// The node's own ephemeral ports: the upper half of what is below the slivers' blocks.
    pub fn ephemeral(&self) -> RangeInclusive<u16> {
        let last = self.first_port - 1;
        (last / 2 + 1).max(1024)..=last
    }

    /// Ports that slivers may own: all below the node's ephemeral ones but its ssh and its DHCP
    /// client.
    pub fn ownable(&self) -> PortSet {
        let last = self.ephemeral().start() - 1;
        let mut ports = PortSet::default();
        let mut nodes = PortSet::default();
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            ports.insert(protocol, PortRange { first: 1, last });
        }
        nodes.insert(Protocol::Tcp, PortRange { first: 22, last: 22 });
        nodes.insert(Protocol::Udp, PortRange { first: 67, last: 68 });
        ports.subtract(&nodes);
        ports
    }

    /// The network that slivers' addresses are from.
    pub fn net(&self) -> Ipv4Net {
        self.net
    }

    /// The gateway that every sliver sees: the network's first address.
    pub fn gateway(&self) -> Ipv4Addr {
        self.nth(1)
    }

    /// The first port that belongs to slivers; the node's own are below it.
    pub fn first_port(&self) -> u16 {
        self.first_port
    }

    /// How many slivers there is room for, by addresses, port blocks and shaping classes.
    pub fn capacity(&self) -> u16 {
        // Network, gateway and broadcast are nobody's.
        let addresses = (1u32 << (32 - self.net.prefix_len())) - 3;
        let blocks = (65_536 - u32::from(self.first_port)) / u32::from(self.block);
        addresses.min(blocks).min(SLOTS.into()) as u16
    }

    /// The place of the sliver with this index.
    pub fn sliver(&self, index: u16, mark: u32, wants: Wants) -> Result<SliverNet, NetError> {
        let refuse = |what, value: String, allowed: String| Err(NetError::Config { what, value, allowed });
        if index >= self.capacity() {
            return refuse(
                "sliver index",
                index.to_string(),
                format!("0 to {}", self.capacity() - 1),
            );
        }
        if mark == 0 {
            return refuse(
                "connection mark",
                mark.to_string(),
                "anything but 0, which marks what is not a sliver's".to_owned(),
            );
        }
        let ownable = self.ownable();
        if !ownable.contains_all(&wants.ports) {
            return refuse("owned ports", wants.ports.to_string(), ownable.to_string());
        }
        let address = self.nth(u32::from(index) + 2);
        let address6 = self.net6.map(|net6| {
            // The prefix leaves 16 bits at least, which hold index + 2.
            Ipv6Addr::from(u128::from(net6.network()) + u128::from(index) + 2)
        });
        // Both fit: index < capacity bounds the block's end by 65535.
        let first = (u32::from(self.first_port) + u32::from(index) * u32::from(self.block)) as u16;
        let ports = first..=first + (self.block - 1);
        Ok(SliverNet {
            index,
            tap: tap_name(index),
            mac: mac_of(address),
            address,
            address6,
            ports,
            mark,
            wants,
        })
    }

    /// The index whose block an outside port belongs to, if it is any sliver's.
    pub fn index_of_port(&self, port: u16) -> Option<u16> {
        let index = port.checked_sub(self.first_port)? / self.block;
        (index < self.capacity()).then_some(index)
    }

    fn nth(&self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.net.network()) + offset)
    }
}

/// The gateway of every tap: link-local, so that no address of the prefix is lost to it.
pub(super) const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The address that a guest gives itself on its link (RFC 4291, appendix A).
pub(super) fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    let word = |high, low| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(
        0xfe80,
        0,
        0,
        0,
        word(a ^ 2, b),
        word(c, 0xff),
        word(0xfe, d),
        word(e, f),
    )
}

/// The tap of the sliver with this index.
pub fn tap_name(index: u16) -> String {
    format!("{TAP_PREFIX}{index}")
}

/// The index in such a name.
pub fn index_of_tap(name: &str) -> Option<u16> {
    let index = name.strip_prefix(TAP_PREFIX)?;
    // One spelling only: mtap007 is not ours.
    index.parse().ok().filter(|i: &u16| tap_name(*i) == name)
}

/// A locally administered Ethernet address that says which IPv4 address it belongs to.
pub fn mac_of(address: Ipv4Addr) -> Mac {
    let [a, b, c, d] = address.octets();
    [0x02, 0x00, a, b, c, d]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeSet;

    use mandoline_limits::Rate;
    use mandoline_limits::shaper::Bandwidth;
    use proptest::prelude::*;

    use super::*;

    fn wants() -> Wants {
        Wants {
            slice: "plc.a_b".to_owned(),
            bandwidth: Bandwidth {
                guarantee: Rate::MIN,
                peak: None,
            },
            sustained: None,
            flow_limit: None,
            ports: PortSet::default(),
        }
    }

    #[test]
    fn refusals_name_what_is_allowed() {
        let net: Ipv4Net = "10.128.0.0/16".parse().unwrap();
        for plan in [
            Plan::new("10.0.0.0/30".parse().unwrap(), 20_000, 64),
            Plan::new(net, 80, 64),
            Plan::new(net, 20_000, 8),
            Plan::new(net, 65_500, 64),
        ] {
            assert!(plan.unwrap_err().to_string().contains("allowed"));
        }
        let plan = Plan::new(net, 20_000, 64).unwrap();
        assert_eq!(plan.capacity(), 711);
        assert!(
            plan.sliver(711, 1, wants())
                .unwrap_err()
                .to_string()
                .contains("710")
        );
        assert!(plan.sliver(0, 0, wants()).is_err());
        assert_eq!(index_of_tap("mtap007"), None);
        for bad in ["fe80::/64", "ff00::/16", "2001:db8::/113"] {
            let refused = plan.clone().with_net6(Some(bad.parse().unwrap())).unwrap_err();
            assert!(refused.to_string().contains(bad), "{refused}");
        }
    }

    #[test]
    fn the_nodes_own_ports_are_no_slivers() {
        let plan = Plan::new("10.128.0.0/16".parse().unwrap(), 20_000, 64).unwrap();
        assert_eq!(plan.ephemeral(), 10_000..=19_999);
        assert_eq!(
            plan.ownable().to_string(),
            "tcp/1-21,tcp/23-9999,udp/1-66,udp/69-9999"
        );
        for (item, mine) in [
            ("tcp/80", true),
            ("tcp/22", false),
            ("udp/68", false),
            ("tcp/10000", false),
            ("udp/20000-20063", false),
        ] {
            let mut wants = wants();
            let (protocol, range) = PortSet::parse_item(item).unwrap();
            wants.ports.insert(protocol, range);
            let sliver = plan.sliver(0, 1, wants);
            assert_eq!(sliver.is_ok(), mine, "{item}");
            if let Err(error) = sliver {
                assert!(
                    error.to_string().contains(item) && error.to_string().contains("tcp/23-9999"),
                    "{error}"
                );
            }
        }
    }

    #[test]
    fn ipv6_addresses_are_counted_like_the_others() {
        let plan = Plan::new("10.128.0.0/16".parse().unwrap(), 20_000, 64).unwrap();
        assert_eq!(plan.sliver(5, 1, wants()).unwrap().address6, None);
        let plan = plan
            .with_net6(Some("2001:db8:0:7::/64".parse().unwrap()))
            .unwrap();
        let sliver = plan.sliver(5, 1, wants()).unwrap();
        assert_eq!(sliver.address6, Some("2001:db8:0:7::7".parse().unwrap()));
        assert_eq!(sliver.addresses().count(), 2);
        assert_eq!(
            link_local(sliver.mac),
            "fe80::aff:fe80:7".parse::<Ipv6Addr>().unwrap()
        );
    }

    proptest! {
        #[test]
        fn no_two_slivers_share_anything(prefix in 8u8..=29, first in 1024u16..60_000, block in 16u16..4096, seed in any::<u32>()) {
            let net = Ipv4Net::new(Ipv4Addr::from(seed), prefix).unwrap();
            let Ok(plan) = Plan::new(net, first, block) else { return Ok(()) };
            let capacity = plan.capacity();
            prop_assert!(capacity > 0);
            let mut indexes: BTreeSet<u16> = (0..64).map(|i| (seed.wrapping_mul(i * 2 + 1) % u32::from(capacity)) as u16).collect();
            indexes.extend([0, capacity - 1]);
            let slivers: Vec<_> = indexes.iter().map(|i| plan.sliver(*i, 1, wants()).unwrap()).collect();
            for (n, a) in slivers.iter().enumerate() {
                prop_assert!(plan.net().contains(&a.address) && a.address != plan.gateway());
                prop_assert_eq!(a.ports.len(), usize::from(block));
                prop_assert_eq!(plan.index_of_port(*a.ports.start()), Some(a.index));
                prop_assert_eq!(plan.index_of_port(*a.ports.end()), Some(a.index));
                prop_assert_eq!(index_of_tap(&a.tap), Some(a.index));
                for b in &slivers[n + 1..] {
                    prop_assert!(a.ports.end() < b.ports.start());
                    prop_assert!(a.address != b.address && a.mac != b.mac && a.tap != b.tap);
                }
            }
        }
    }
}
