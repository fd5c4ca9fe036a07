//! What a sliver is in the packet filter: elements of sets and maps.

use std::net::{IpAddr, Ipv4Addr};

use mandoline_limits::netlink::Request;
use mandoline_limits::netlink::nft::{Element, Limit, Table, device_field, device_of_field, field};
use mandoline_limits::shaper::Tree;
use mandoline_rspec::Protocol;

use super::NetError;
use super::plan::{SliverNet, link_local};
use super::ruleset::{frames, packets};

/// A set or map that slivers are elements of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Set {
    /// tap . MAC . IPv4 address: what may come in by a tap.
    Sources,
    /// tap . MAC . IPv6 address: the same.
    Sources6,
    /// tap . MAC . IPv6 address: who may ask for the gateway.
    Neighbours,
    /// tap: counts what was in none of these.
    Spoofed,
    /// tap → handle of the class for ordinary traffic.
    Classes,
    /// tap → handle of the class for what alarms the world.
    Alarms,
    /// tap → connection mark.
    Marks,
    /// tap: counts what goes to the sliver.
    Received,
    /// tap: how many flows may be opened in a second; counts what is above.
    NewFlows,
    /// tap: how many flows there may be; counts what is above.
    Flows,
    /// address → node's address and port block.
    Ports,
    /// protocol . port → address of who owns it.
    Owned,
    /// address . protocol . port → node's address and the same port, for owned ports.
    Kept,
    /// address . ICMP identifier → node's address and the same identifier.
    Identifiers,
}

impl Set {
    pub(super) const ALL: [Set; 14] = [
        Set::Sources,
        Set::Sources6,
        Set::Neighbours,
        Set::Spoofed,
        Set::Classes,
        Set::Alarms,
        Set::Marks,
        Set::Received,
        Set::NewFlows,
        Set::Flows,
        Set::Ports,
        Set::Owned,
        Set::Kept,
        Set::Identifiers,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Set::Sources => "sources",
            Set::Sources6 => "sources6",
            Set::Neighbours => "neighbours",
            Set::Spoofed => "spoofed",
            Set::Classes => "classes",
            Set::Alarms => "alarms",
            Set::Marks => "marks",
            Set::Received => "received",
            Set::NewFlows => "new_flows",
            Set::Flows => "flows",
            Set::Ports => "ports",
            Set::Owned => "owned",
            Set::Kept => "kept",
            Set::Identifiers => "identifiers",
        }
    }

    pub(super) fn table(self) -> Table {
        match self {
            Set::Sources | Set::Sources6 | Set::Neighbours | Set::Spoofed | Set::Classes | Set::Alarms => {
                frames()
            }
            _ => packets(),
        }
    }

    pub(super) fn add(self, element: &Element) -> Request {
        self.table().add_element(self.name(), element)
    }

    pub(super) fn delete(self, element: &Element) -> Request {
        self.table().delete_element(self.name(), element)
    }

    /// The sliver that an element belongs to: by tap, or by address where there is no tap in it.
    pub(super) fn owner(self, element: &Element) -> Option<Owner> {
        let address = |bytes: &[u8]| {
            let octets: [u8; 4] = bytes.get(..4)?.try_into().ok()?;
            Some(Owner::Address(octets.into()))
        };
        match self {
            Set::Ports | Set::Kept | Set::Identifiers => address(&element.key),
            Set::Owned => address(element.data.as_deref()?),
            _ => device_of_field(&element.key).map(Owner::Tap),
        }
    }
}

/// Whom an element belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Owner {
    Tap(String),
    Address(Ipv4Addr),
}

/// An element and where it belongs.
pub(super) type Entry = (Set, Element);

/// The elements that make a sliver. `share` is the flow limit of who has none of its own.
pub(super) fn elements(sliver: &SliverNet, node: Ipv4Addr, share: u32) -> Result<Vec<Entry>, NetError> {
    let tap = device_field(&sliver.tap);
    let address = sliver.address.octets().to_vec();
    let of_tap = |data: u32| Element::new(tap.clone()).with(data.to_ne_bytes().to_vec());
    let from = |source: IpAddr| {
        let octets = match source {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        Element::new([tap.clone(), field(&sliver.mac), octets].concat())
    };
    // Data that is an interval: lowest address and port, highest address and port.
    let outside = |first: u16, last: u16| {
        [first, last]
            .map(|p| [node.octets().to_vec(), number(p)].concat())
            .concat()
    };
    let flows = sliver.wants.flow_limit.unwrap_or(share);

    let mut all = vec![
        (Set::Sources, from(sliver.address.into())),
        (Set::Spoofed, Element::new(tap.clone())),
        (Set::Classes, of_tap(Tree::priority(sliver.index)?)),
        (Set::Alarms, of_tap(Tree::alarm_priority(sliver.index)?)),
        (Set::Marks, of_tap(sliver.mark)),
        (Set::Received, Element::new(tap.clone())),
        (
            Set::NewFlows,
            Element::new(tap.clone()).over(Limit::PerSecond(new_flows(flows))),
        ),
        (Set::Flows, Element::new(tap.clone()).over(Limit::Flows(flows))),
        (
            Set::Ports,
            Element::new(address.clone()).with(outside(*sliver.ports.start(), *sliver.ports.end())),
        ),
    ];
    if let Some(address6) = sliver.address6 {
        all.push((Set::Sources6, from(address6.into())));
        all.push((Set::Neighbours, from(address6.into())));
        all.push((Set::Neighbours, from(link_local(sliver.mac).into())));
    }
    for (protocol, range) in sliver.wants.ports.iter() {
        let kind = field(&[protocol_number(protocol)]);
        let key = |port| [kind.clone(), number(port)].concat();
        let (first, last) = (range.first, range.last);
        let owned = Element::new(key(first)).up_to(key(last)).with(address.clone());
        all.push((Set::Owned, owned));
        let key = |port| [address.clone(), kind.clone(), number(port)].concat();
        let kept = Element::new(key(first))
            .up_to(key(last))
            .with(outside(first, last));
        all.push((Set::Kept, kept));
        // Who owns a UDP port owns the identifier of the same number: pings and probes of one
        // program often use one for both.
        if protocol == Protocol::Udp {
            let key = |id| [address.clone(), number(id)].concat();
            let identifiers = Element::new(key(first))
                .up_to(key(last))
                .with(outside(first, last));
            all.push((Set::Identifiers, identifiers));
        }
    }
    Ok(all)
}

/// How many flows may be opened in a second by who may have `flows`: all of them in ten seconds.
///
/// What has ended holds its place in the node's table for a while, but the kernel's count of
/// living flows leaves it out: see [`super::flows`].
fn new_flows(flows: u32) -> u32 {
    (flows / 10).max(16)
}

/// A port or an identifier as a field: network order.
fn number(port: u16) -> Vec<u8> {
    field(&port.to_be_bytes())
}

fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
    }
}
