//! Links, addresses, routes and neighbours: requests to make them, and one list to read them back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::Parseable;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteProtocol, RouteScope};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, RouteMessageBuilder};

use super::{CREATE, Connection, EXCL, REPLACE, Request, decode};
use crate::error::{Error, Result};
use crate::tap::check_name;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// A link as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Interface index, unique in its namespace and not used again soon.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Administratively up.
    pub up: bool,
    /// A reader or a cable is attached: for a tap, some process has it open.
    pub carrier: bool,
    /// Largest packet, in bytes.
    pub mtu: u32,
    /// Ethernet address, for links that have one.
    pub mac: Option<Mac>,
    /// `ifb`, `veth`, `tun` …; empty for hardware.
    pub kind: String,
}

/// What to change about a link.
#[derive(Debug, Clone, Copy, Default)]
pub struct LinkChange {
    /// Bring it up (`Some(true)`) or down.
    pub up: Option<bool>,
    /// Largest packet, in bytes.
    pub mtu: Option<u32>,
    /// Ethernet address.
    pub mac: Option<Mac>,
}

/// Changes a link.
pub fn change(index: u32, name: &str, change: LinkChange) -> Request {
    let mut link = LinkUnspec::new_with_index(index);
    if let Some(mac) = change.mac {
        link = link.address(mac.to_vec());
    }
    if let Some(mtu) = change.mtu {
        link = link.mtu(mtu);
    }
    link = match change.up {
        Some(true) => link.up(),
        Some(false) => link.down(),
        None => link,
    };
    Request::route(
        format!("change link {name}"),
        0,
        &RouteNetlinkMessage::SetLink(link.build()),
    )
}

/// Makes an IFB device.
pub fn add_ifb(name: &str) -> Result<Request> {
    check_name(name)?;
    let link = LinkMessageBuilder::<LinkUnspec>::new_with_info_kind(InfoKind::Ifb)
        .name(name)
        .build();
    Ok(Request::route(
        format!("make ifb {name}"),
        CREATE | EXCL,
        &RouteNetlinkMessage::NewLink(link),
    ))
}

/// Deletes a link.
pub fn delete(index: u32, name: &str) -> Request {
    let link = LinkUnspec::new_with_index(index).build();
    Request::route(
        format!("delete link {name}"),
        0,
        &RouteNetlinkMessage::DelLink(link),
    )
    .tolerate(libc::ENODEV)
}

/// Gives a link an address; one that it has is kept. An IPv6 address is not looked for on the
/// link first: who asks for one here knows that nobody else has it.
pub fn add_address(index: u32, address: IpAddr, prefix_len: u8) -> Request {
    let mut message = AddressMessage::default();
    message.header.family = family(address);
    message.header.index = index;
    message.header.prefix_len = prefix_len;
    message.header.scope = AddressScope::Universe;
    if address.is_ipv6() {
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    message.attributes = vec![
        AddressAttribute::Local(address),
        AddressAttribute::Address(address),
    ];
    let what = format!("add address {address}/{prefix_len} to link {index}");
    Request::route(what, CREATE | REPLACE, &RouteNetlinkMessage::NewAddress(message))
}

/// Routes one address to a link, sent from `source` when the node itself speaks.
pub fn add_route(destination: IpAddr, index: u32, source: Option<IpAddr>) -> Request {
    let what = format!("route {destination} to link {index}");
    let mut message = match destination {
        IpAddr::V4(v4) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(v4, 32)
            .output_interface(index)
            .scope(RouteScope::Link)
            .protocol(RouteProtocol::Static)
            .build(),
        // IPv6 knows no scopes of routes.
        IpAddr::V6(v6) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(v6, 128)
            .output_interface(index)
            .protocol(RouteProtocol::Static)
            .build(),
    };
    message.attributes.extend(source.map(|source| {
        RouteAttribute::PrefSource(match source {
            IpAddr::V4(v4) => RouteAddress::Inet(v4),
            IpAddr::V6(v6) => RouteAddress::Inet6(v6),
        })
    }));
    Request::route(what, CREATE | REPLACE, &RouteNetlinkMessage::NewRoute(message))
}

/// Fixes the Ethernet address behind an address: nothing is asked, nothing can be pretended.
pub fn add_neighbour(index: u32, address: IpAddr, mac: Mac) -> Request {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    let destination = match address {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    };
    message.attributes = vec![
        NeighbourAttribute::Destination(destination),
        NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
    ];
    let what = format!("fix the neighbour {address} on link {index}");
    Request::route(
        what,
        CREATE | REPLACE,
        &RouteNetlinkMessage::NewNeighbour(message),
    )
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

impl Connection {
    /// All links of the namespace.
    pub fn links(&mut self) -> Result<Vec<Link>> {
        let request = Request::route(
            "list links",
            0,
            &RouteNetlinkMessage::GetLink(LinkMessage::default()),
        );
        let answers = self.dump(&request)?;
        answers.iter().map(|(_, payload)| read_link(payload)).collect()
    }

    /// The link of this name.
    pub fn link(&mut self, name: &str) -> Result<Option<Link>> {
        check_name(name)?;
        let what = format!("look up link {name}");
        let query = LinkMessageBuilder::<LinkUnspec>::new().name(name).build();
        let request = Request::route(what, 0, &RouteNetlinkMessage::GetLink(query)).tolerate(libc::ENODEV);
        let answers = self.get(&request)?;
        answers.first().map(|(_, payload)| read_link(payload)).transpose()
    }

    /// The link of this name, which must be there.
    pub fn require_link(&mut self, name: &str) -> Result<Link> {
        self.link(name)?.ok_or_else(|| Error::NotFound {
            what: format!("link {name}"),
        })
    }

    /// The IPv4 addresses of a link with their prefix lengths, primary ones first.
    pub fn addresses(&mut self, index: u32) -> Result<Vec<(Ipv4Addr, u8)>> {
        let mut query = AddressMessage::default();
        query.header.family = AddressFamily::Inet;
        let request = Request::route("list addresses", 0, &RouteNetlinkMessage::GetAddress(query));
        let mut found = Vec::new();
        for (_, payload) in self.dump(&request)? {
            let message = AddressMessage::parse(&payload).map_err(|e| decode("addresses", e))?;
            let local = message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Local(IpAddr::V4(v4)) => Some(*v4),
                _ => None,
            });
            if let (true, Some(local)) = (message.header.index == index, local) {
                found.push((local, message.header.prefix_len));
            }
        }
        Ok(found)
    }

    /// The host routes (`/32`, `/128`) of the main table: destination and interface index.
    pub fn host_routes(&mut self) -> Result<Vec<(IpAddr, u32)>> {
        let mut found = Vec::new();
        for query in [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ] {
            let request = Request::route("list routes", 0, &RouteNetlinkMessage::GetRoute(query));
            for (_, payload) in self.dump(&request)? {
                let message = rtnetlink::packet_route::route::RouteMessage::parse(&payload)
                    .map_err(|e| decode("routes", e))?;
                found.extend(host_route(&message));
            }
        }
        Ok(found)
    }

    /// The link that the default route of the main table leaves by, the preferred one if several.
    pub fn default_route(&mut self) -> Result<Option<u32>> {
        let query = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let request = Request::route("list routes", 0, &RouteNetlinkMessage::GetRoute(query));
        let mut best: Option<(u32, u32)> = None;
        for (_, payload) in self.dump(&request)? {
            let message = rtnetlink::packet_route::route::RouteMessage::parse(&payload)
                .map_err(|e| decode("routes", e))?;
            if message.header.destination_prefix_length != 0 || message.header.table != 254 {
                continue;
            }
            let (mut priority, mut link) = (0, None);
            for attribute in &message.attributes {
                match attribute {
                    RouteAttribute::Priority(p) => priority = *p,
                    RouteAttribute::Oif(index) => link = Some(*index),
                    _ => {}
                }
            }
            if let Some(link) = link
                && best.is_none_or(|(p, _)| priority < p)
            {
                best = Some((priority, link));
            }
        }
        Ok(best.map(|(_, link)| link))
    }
}

fn host_route(message: &rtnetlink::packet_route::route::RouteMessage) -> Option<(IpAddr, u32)> {
    let whole = match message.header.address_family {
        AddressFamily::Inet6 => 128,
        _ => 32,
    };
    // Table 254 is "main"; the local table repeats every address of the node.
    if message.header.destination_prefix_length != whole || message.header.table != 254 {
        return None;
    }
    let (mut destination, mut link) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(a)) => destination = Some(IpAddr::V4(*a)),
            RouteAttribute::Destination(RouteAddress::Inet6(a)) => destination = Some(IpAddr::V6(*a)),
            RouteAttribute::Oif(index) => link = Some(*index),
            _ => {}
        }
    }
    Some((destination?, link?))
}

fn read_link(payload: &[u8]) -> Result<Link> {
    let message = LinkMessage::parse(payload).map_err(|e| decode("links", e))?;
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        up: flags.contains(LinkFlags::Up),
        carrier: flags.contains(LinkFlags::LowerUp),
        mtu: 0,
        mac: None,
        kind: String::new(),
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Address(address) => link.mac = address.try_into().ok(),
            LinkAttribute::LinkInfo(info) => {
                for item in info {
                    if let LinkInfo::Kind(kind) = item {
                        link.kind = kind.to_string();
                    }
                }
            }
            _ => {}
        }
    }
    Ok(link)
}
