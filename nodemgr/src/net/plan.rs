//! Who gets which address, port block, MAC and tap: arithmetic on a sliver's index, no state.
//!
//! Deterministic blocks (RFC 7422): from an outside port and the recorded index of a sliver, who
//! sent a packet is known even when every log of flows was lost.

use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

use ipnet::Ipv4Net;
use mandoline_limits::netlink::link::Mac;
use mandoline_limits::shaper::{Bandwidth, SLOTS};

use super::NetError;

/// What taps are called: this and the sliver's index.
pub const TAP_PREFIX: &str = "mtap";

/// The node's addresses and ports for its slivers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    net: Ipv4Net,
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
    /// Its source ports (and ICMP identifiers) on the node's address.
    pub ports: RangeInclusive<u16>,
    /// The mark of its connections: its vm_id, never 0.
    pub mark: u32,
    /// What it may send.
    pub bandwidth: Bandwidth,
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
            first_port,
            block,
        })
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
    pub fn sliver(&self, index: u16, mark: u32, bandwidth: Bandwidth) -> Result<SliverNet, NetError> {
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
        let address = self.nth(u32::from(index) + 2);
        // Both fit: index < capacity bounds the block's end by 65535.
        let first = (u32::from(self.first_port) + u32::from(index) * u32::from(self.block)) as u16;
        let ports = first..=first + (self.block - 1);
        Ok(SliverNet {
            index,
            tap: tap_name(index),
            mac: mac_of(address),
            address,
            ports,
            mark,
            bandwidth,
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
    use proptest::prelude::*;

    use super::*;

    const BANDWIDTH: fn() -> Bandwidth = || Bandwidth {
        guarantee: Rate::MIN,
        peak: None,
    };

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
            plan.sliver(711, 1, BANDWIDTH())
                .unwrap_err()
                .to_string()
                .contains("710")
        );
        assert!(plan.sliver(0, 0, BANDWIDTH()).is_err());
        assert_eq!(index_of_tap("mtap007"), None);
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
            let slivers: Vec<_> = indexes.iter().map(|i| plan.sliver(*i, 1, BANDWIDTH()).unwrap()).collect();
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
