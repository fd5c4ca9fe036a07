//! Links, addresses, routes and neighbours: requests to make them, and one list to read them back.

use std::net::Ipv4Addr;

use netlink_packet_core::Parseable;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{RouteAttribute, RouteProtocol, RouteScope};
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

/// Gives a link an IPv4 address; one that it has is kept.
pub fn add_address(index: u32, address: Ipv4Addr, prefix_len: u8) -> Request {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.index = index;
    message.header.prefix_len = prefix_len;
    message.header.scope = AddressScope::Universe;
    message.attributes = vec![
        AddressAttribute::Local(address.into()),
        AddressAttribute::Address(address.into()),
    ];
    let what = format!("add address {address}/{prefix_len} to link {index}");
    Request::route(what, CREATE | REPLACE, &RouteNetlinkMessage::NewAddress(message))
}

/// Routes one IPv4 address to a link, sent from `source` when the node itself speaks.
pub fn add_route(destination: Ipv4Addr, index: u32, source: Option<Ipv4Addr>) -> Request {
    let what = format!("route {destination} to link {index}");
    Request::route(
        what,
        CREATE | REPLACE,
        &RouteNetlinkMessage::NewRoute(route(destination, index, source)),
    )
}

/// Takes such a route away.
pub fn delete_route(destination: Ipv4Addr, index: u32) -> Request {
    let what = format!("unroute {destination} from link {index}");
    Request::route(
        what,
        0,
        &RouteNetlinkMessage::DelRoute(route(destination, index, None)),
    )
    .tolerate(libc::ESRCH)
}

fn route(
    destination: Ipv4Addr,
    index: u32,
    source: Option<Ipv4Addr>,
) -> rtnetlink::packet_route::route::RouteMessage {
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(destination, 32)
        .output_interface(index)
        .scope(RouteScope::Link)
        .protocol(RouteProtocol::Static);
    match source {
        Some(source) => route.pref_source(source).build(),
        None => route.build(),
    }
}

/// Fixes the Ethernet address behind an IPv4 address: nothing is asked, nothing can be pretended.
pub fn add_neighbour(index: u32, address: Ipv4Addr, mac: Mac) -> Request {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
        NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
    ];
    let what = format!("fix the neighbour {address} on link {index}");
    Request::route(
        what,
        CREATE | REPLACE,
        &RouteNetlinkMessage::NewNeighbour(message),
    )
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
                AddressAttribute::Local(std::net::IpAddr::V4(v4)) => Some(*v4),
                _ => None,
            });
            if let (true, Some(local)) = (message.header.index == index, local) {
                found.push((local, message.header.prefix_len));
            }
        }
        Ok(found)
    }

    /// The host routes (`/32`) of the main table: destination and interface index.
    pub fn host_routes(&mut self) -> Result<Vec<(Ipv4Addr, u32)>> {
        let query = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let request = Request::route("list routes", 0, &RouteNetlinkMessage::GetRoute(query));
        let mut found = Vec::new();
        for (_, payload) in self.dump(&request)? {
            let message = rtnetlink::packet_route::route::RouteMessage::parse(&payload)
                .map_err(|e| decode("routes", e))?;
            // Table 254 is "main"; the local table repeats every address of the node as a /32.
            if message.header.destination_prefix_length != 32 || message.header.table != 254 {
                continue;
            }
            let mut pair = (None, None);
            for attribute in &message.attributes {
                match attribute {
                    RouteAttribute::Destination(rtnetlink::packet_route::route::RouteAddress::Inet(a)) => {
                        pair.0 = Some(*a)
                    }
                    RouteAttribute::Oif(index) => pair.1 = Some(*index),
                    _ => {}
                }
            }
            if let (Some(destination), Some(index)) = pair {
                found.push((destination, index));
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
