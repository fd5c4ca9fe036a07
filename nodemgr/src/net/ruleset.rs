//! The packet filter: text, loaded once; slivers are elements of its sets and maps.
//!
//! ```text
//!                 netdev mandoline                      inet mandoline
//!  frame ─▶ mtapN ──▶ from_tap ──▶ shape ─▶ IFB ─▶ mark ──▶ forward ──▶ nat ──▶ leave ─▶ uplink
//!                      │ source?    class     HTB   vm_id   state, to?  ports    own address?
//!                      ▼                              │
//!                    counted, dropped                 └──▶ input: the node itself (ping only)
//! ```

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use mandoline_limits::netlink::Request;
use mandoline_limits::netlink::nft::{Element, Family, Table, device_field, device_of_field, field};
use mandoline_limits::shaper::Tree;

use super::NetError;
use super::plan::{Plan, SliverNet, TAP_PREFIX};

/// Both tables are called this.
pub(super) const TABLE: &str = "mandoline";

/// A set or map that slivers are elements of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Set {
    /// tap . MAC . address: what may come in by a tap.
    Sources,
    /// tap: counts what was not in `Sources`.
    Spoofed,
    /// tap → handle of the class for ordinary traffic.
    Classes,
    /// tap → handle of the class for what alarms the world.
    Alarms,
    /// tap → connection mark.
    Marks,
    /// address → node's address and port block.
    Ports,
    /// address: counts what goes to the sliver.
    Received,
}

impl Set {
    pub(super) const ALL: [Set; 7] = [
        Set::Sources,
        Set::Spoofed,
        Set::Classes,
        Set::Alarms,
        Set::Marks,
        Set::Ports,
        Set::Received,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Set::Sources => "sources",
            Set::Spoofed => "spoofed",
            Set::Classes => "classes",
            Set::Alarms => "alarms",
            Set::Marks => "marks",
            Set::Ports => "ports",
            Set::Received => "received",
        }
    }

    pub(super) fn table(self) -> Table {
        match self {
            Set::Sources | Set::Spoofed | Set::Classes | Set::Alarms => frames(),
            Set::Marks | Set::Ports | Set::Received => packets(),
        }
    }

    pub(super) fn add(self, key: &[u8], data: Option<&[u8]>) -> Request {
        self.table().add_element(self.name(), key, data)
    }

    pub(super) fn delete(self, key: &[u8]) -> Request {
        self.table().delete_element(self.name(), key)
    }

    /// The sliver that an element belongs to: by tap, or by address where there is no tap in it.
    pub(super) fn owner(self, element: &Element) -> Option<Owner> {
        match self {
            Set::Ports | Set::Received => {
                let octets: [u8; 4] = element.key.get(..4)?.try_into().ok()?;
                Some(Owner::Address(octets.into()))
            }
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

/// The table that sees frames at taps.
pub(super) fn frames() -> Table {
    Table::new(Family::Netdev, TABLE)
}

/// The table that sees packets.
pub(super) fn packets() -> Table {
    Table::new(Family::Inet, TABLE)
}

/// An element of a set: key, and data where it is a map.
pub(super) type Entry = (Set, Vec<u8>, Option<Vec<u8>>);

/// The elements that make a sliver.
pub(super) fn elements(sliver: &SliverNet, node: Ipv4Addr) -> Result<Vec<Entry>, NetError> {
    let handle = |class: u32| Some(class.to_ne_bytes().to_vec());
    let tap = device_field(&sliver.tap);
    let address = sliver.address.octets().to_vec();
    let source = [tap.clone(), field(&sliver.mac), address.clone()].concat();
    // An interval: lowest address and port, highest address and port; ports in network order.
    let bound = |port: &u16| [node.octets().to_vec(), field(&port.to_be_bytes())].concat();
    let ports = [bound(sliver.ports.start()), bound(sliver.ports.end())].concat();
    Ok(vec![
        (Set::Sources, source, None),
        (Set::Spoofed, tap.clone(), None),
        (Set::Classes, tap.clone(), handle(Tree::priority(sliver.index)?)),
        (
            Set::Alarms,
            tap.clone(),
            handle(Tree::alarm_priority(sliver.index)?),
        ),
        (Set::Marks, tap, Some(sliver.mark.to_ne_bytes().to_vec())),
        (Set::Ports, address.clone(), Some(ports)),
        (Set::Received, address, None),
    ])
}

/// The ruleset. It may be loaded over itself: rules are replaced in one transaction, sets keep
/// their elements, named counters their counts, and no flow notices.
pub(super) fn text(plan: &Plan, shaper: &str, uplinks: &[String]) -> Result<String, NetError> {
    let mut quoted = String::new();
    for name in uplinks {
        mandoline_limits::tap::check_name(name)?;
        if name.contains('"') || name.starts_with(TAP_PREFIX) {
            return Err(NetError::Config {
                what: "uplink",
                value: name.clone(),
                allowed: format!("a link whose name does not begin with {TAP_PREFIX}"),
            });
        }
        let _ = write!(quoted, "{}\"{name}\"", if quoted.is_empty() { "" } else { ", " });
    }
    let net = plan.net();
    let taps = format!("\"{TAP_PREFIX}*\"");
    Ok(format!(
        r#"
# Declared first, so that the flushes below find them on a node that has no ruleset yet.
table netdev {TABLE} {{
  chain from_tap {{ }}
  chain shape {{ }}
}}
table inet {TABLE} {{ }}
flush chain netdev {TABLE} from_tap
flush chain netdev {TABLE} shape
flush table inet {TABLE}

table netdev {TABLE} {{
  set sources {{ type ifname . ether_addr . ipv4_addr; }}
  set spoofed {{ type ifname; counter; }}
  map classes {{ type ifname : classid; }}
  map alarms {{ type ifname : classid; }}
  counter other_frames {{ }}
  counter unknown_tap {{ }}

  # Every tap's own ingress chain ends up here, and drops what comes back.
  chain from_tap {{
    meta protocol != {{ ip, arp }} counter name other_frames drop
    meta protocol ip iifname . ether saddr . ip saddr @sources goto shape
    meta protocol arp arp htype 1 arp ptype ip iifname . arp saddr ether . arp saddr ip @sources iifname . ether saddr . arp saddr ip @sources goto shape
    iifname @spoofed drop
    counter name unknown_tap drop
  }}
  chain shape {{
    meta priority set iifname map @classes
    # What alarms the world: a few a second.
    ip protocol icmp meta priority set iifname map @alarms
    ip hdrlength > 5 meta priority set iifname map @alarms
    fwd to "{shaper}"
  }}
}}

table inet {TABLE} {{
  map marks {{ type ifname : mark; }}
  map ports {{ type ipv4_addr : interval ipv4_addr . inet_service; }}
  set received {{ type ipv4_addr; counter; }}
  counter invalid {{ }}
  counter refused {{ }}
  counter to_node {{ }}
  counter foreign {{ }}

  # After connection tracking, before the flow is confirmed: its first event carries the mark.
  chain mark_flows {{
    type filter hook prerouting priority mangle; policy accept;
    iifname {taps} ct state new ct mark set iifname map @marks
  }}

  chain node_input {{
    type filter hook input priority filter; policy accept;
    iifname != {taps} accept
    ct state invalid,untracked counter name invalid drop
    # Answers to the node's own flows: its sshd jumping to a sliver.
    ct state established,related accept
    icmp type echo-request limit rate 100/second burst 100 packets accept
    limit rate 100/second burst 100 packets counter name to_node reject with icmpx type admin-prohibited
    counter name to_node drop
  }}

  chain sliver_forward {{
    type filter hook forward priority filter; policy drop;
    ct state invalid,untracked counter name invalid drop
    iifname {taps} ct mark 0 counter name refused drop
    ct state established,related accept
    iifname {taps} oifname {taps} accept
    # A sliver that is not there: do not bother the uplink with it.
    iifname {taps} ip daddr {net} counter name refused reject with icmpx type host-unreachable
    # Only what has ports or identifiers can be told apart behind one address.
    iifname {taps} oifname {{ {quoted} }} meta l4proto {{ icmp, tcp, udp }} accept
    counter name refused drop
  }}

  chain source_nat {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname {{ {quoted} }} ip saddr {net} meta l4proto {{ icmp, tcp, udp }} snat ip to ip saddr map @ports
  }}

  # The last word: only the node's own addresses pass (and those that speak before there is one).
  chain last_word {{
    type filter hook postrouting priority srcnat + 200; policy accept;
    # Nothing but counting: what a sliver gets, from whomever.
    oifname {taps} ip daddr @received accept
    oifname != {{ {quoted} }} accept
    fib saddr type local accept
    ip saddr 0.0.0.0 udp sport 68 accept
    ip6 saddr {{ ::, fe80::/10 }} accept
    counter name foreign drop
  }}
}}
"#
    ))
}
