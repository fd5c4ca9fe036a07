//! The packet filter: text, loaded once; slivers are [elements](super::elements) of its sets and maps.
//!
//! ```text
//!                 netdev mandoline                      inet mandoline
//!  frame ─▶ mtapN ──▶ from_tap ──▶ shape ─▶ IFB ─▶ mark ──▶ forward ──▶ nat ──▶ leave ─▶ uplink
//!                      │ source?    class     HTB   vm_id   state, to?  ports    own address?
//!                      ▼                              │
//!                    counted, dropped                 ├──▶ input: the node itself (ping only)
//!                                                     └──▶ dropped above its sliver's flow limit
//!
//!  uplink ─▶ owned port? ─▶ its sliver's address ──▶ forward ──▶ mark, flow limit ──▶ mtapN
//! ```

use std::fmt::Write as _;

use mandoline_limits::netlink::nft::{Family, Table};

use super::NetError;
use super::plan::{GATEWAY6, Plan, TAP_PREFIX};

/// Both tables are called this.
pub(super) const TABLE: &str = "mandoline";

/// The table that sees frames at taps.
pub(super) fn frames() -> Table {
    Table::new(Family::Netdev, TABLE)
}

/// The table that sees packets.
pub(super) fn packets() -> Table {
    Table::new(Family::Inet, TABLE)
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
    let (frames6, forward6, word6) = match plan.net6() {
        None => Default::default(),
        Some(net6) => (
            FRAMES6.replace("GATEWAY", &format!("{:#x}", u128::from(GATEWAY6))),
            format!(
                r#"
    iifname {taps} ip6 daddr {net6} counter name refused reject with icmpx type host-unreachable
    iifname {taps} oifname {{ {quoted} }} ip6 saddr {net6} accept
    iifname {{ {quoted} }} oifname {taps} ip6 daddr {net6} ct state new jump flow_for_sliver"#
            ),
            format!("\n    ip6 saddr {net6} accept"),
        ),
    };
    Ok(format!(
        r#"
# Declared first, so that the flushes below find them on a node that has no ruleset yet.
table netdev {TABLE} {{
  chain from_tap {{ }}
  chain from_tap6 {{ }}
  chain shape {{ }}
}}
table inet {TABLE} {{ }}
flush chain netdev {TABLE} from_tap
flush chain netdev {TABLE} from_tap6
flush chain netdev {TABLE} shape
flush table inet {TABLE}

table netdev {TABLE} {{
  set sources {{ type ifname . ether_addr . ipv4_addr; }}
  set sources6 {{ type ifname . ether_addr . ipv6_addr; }}
  set neighbours {{ type ifname . ether_addr . ipv6_addr; }}
  set spoofed {{ type ifname; counter; }}
  map classes {{ type ifname : classid; }}
  map alarms {{ type ifname : classid; }}
  counter other_frames {{ }}
  counter unknown_tap {{ }}

  # Every tap's own ingress chain ends up here, and drops what comes back.
  chain from_tap {{
    meta protocol ip iifname . ether saddr . ip saddr @sources goto shape
    meta protocol arp arp htype 1 arp ptype ip iifname . arp saddr ether . arp saddr ip @sources iifname . ether saddr . arp saddr ip @sources goto shape
    meta protocol ip6 goto from_tap6
    meta protocol != {{ ip, arp }} counter name other_frames drop
    iifname @spoofed drop
    counter name unknown_tap drop
  }}
  chain from_tap6 {{{frames6}
    counter name other_frames drop
  }}
  # The last class that is set counts.
  chain shape {{
    meta priority set iifname map @classes
    # What alarms the world: a few a second.
    ip protocol icmp meta priority set iifname map @alarms
    ip hdrlength > 5 meta priority set iifname map @alarms
    icmpv6 type != nd-neighbor-solicit meta priority set iifname map @alarms
    # By number: a node without /etc/protocols knows no name of theirs. Hop-by-hop options, routing, destination options.
    ip6 nexthdr {{ 0, 43, 60 }} meta priority set iifname map @alarms
    fwd to "{shaper}"
  }}
}}

table inet {TABLE} {{
  map marks {{ type ifname : mark; }}
  set received {{ type ifname; counter; }}
  set new_flows {{ type ifname; limit rate over 1/second burst 1 packets; counter; }}
  set flows {{ type ifname; ct count over 1; counter; }}
  map ports {{ type ipv4_addr : interval ipv4_addr . inet_service; }}
  map owned {{ type inet_proto . inet_service : ipv4_addr; flags interval; }}
  map kept {{ type ipv4_addr . inet_proto . inet_service : interval ipv4_addr . inet_service; flags interval; }}
  map identifiers {{ typeof ip saddr . icmp id : interval ip saddr . th sport; flags interval; }}
  counter invalid {{ }}
  counter refused {{ }}
  counter to_node {{ }}
  counter foreign {{ }}

  # After connection tracking, before the flow is confirmed: its first event carries the mark.
  # Only a flow's first packet is counted: what has been confirmed is in the table already.
  chain mark_flows {{
    type filter hook prerouting priority mangle; policy accept;
    iifname != {taps} accept
    ct status ! confirmed iifname @new_flows drop
    ct status ! confirmed iifname @flows drop
    ct state new ct mark set iifname map @marks
  }}

  # Owned ports lead to their owner, from outside and from the node's other slivers.
  chain owned_ports {{
    type nat hook prerouting priority dstnat; policy accept;
    ip daddr != {net} fib daddr type local dnat ip to ip protocol . th dport map @owned
  }}

  # A stranger's flow to a sliver is the sliver's: it has its mark and counts among its flows.
  chain flow_for_sliver {{
    ct status ! confirmed oifname @new_flows drop
    ct status ! confirmed oifname @flows drop
    ct mark set oifname map @marks
    accept
  }}

  chain node_input {{
    type filter hook input priority filter; policy accept;
    iifname != {taps} accept
    # Connection tracking leaves neighbour discovery alone. The rest was checked at the tap.
    icmpv6 type nd-neighbor-solicit accept
    ct state invalid,untracked counter name invalid drop
    # Answers to the node's own flows: its sshd jumping to a sliver.
    ct state established,related accept
    icmp type echo-request limit rate 100/second burst 100 packets accept
    icmpv6 type echo-request limit rate 100/second burst 100 packets accept
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
    iifname {taps} oifname {{ {quoted} }} ip saddr {net} meta l4proto {{ icmp, tcp, udp }} accept
    iifname {{ {quoted} }} oifname {taps} ct status dnat ct state new jump flow_for_sliver{forward6}
    counter name refused drop
  }}

  chain source_nat {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname != {{ {quoted} }} accept
    # Owned ports and identifiers keep their number.
    meta l4proto {{ tcp, udp }} snat ip to ip saddr . ip protocol . th sport map @kept
    meta l4proto icmp snat ip to ip saddr . icmp id map @identifiers
    ip saddr {net} meta l4proto {{ icmp, tcp, udp }} snat ip to ip saddr map @ports
  }}

  # The last word: only the node's own addresses pass (and those that speak before there is one).
  chain last_word {{
    type filter hook postrouting priority srcnat + 200; policy accept;
    # Which groups the node is in is of no use to a sliver.
    oifname {taps} icmpv6 type mld2-listener-report drop
    # Nothing but counting: what a sliver gets, from whomever.
    oifname @received accept
    oifname != {{ {quoted} }} accept
    fib saddr type local accept{word6}
    ip saddr 0.0.0.0 udp sport 68 accept
    ip6 saddr {{ ::, fe80::/10 }} accept
    counter name foreign drop
  }}
}}
"#
    ))
}

/// What a sliver with an IPv6 address may send: packets from it, and one word of neighbour
/// discovery, the question for its gateway. The node knows its slivers' neighbours by heart, so
/// no answer of theirs is wanted; routers' words, redirects and answers are forgeries.
const FRAMES6: &str = r#"
    icmpv6 type nd-neighbor-solicit ip6 saddr :: counter name other_frames drop
    icmpv6 type nd-neighbor-solicit iifname . ether saddr . ip6 saddr @neighbours ip6 nexthdr 58 ip6 hoplimit 255 @th,64,128 GATEWAY goto shape
    icmpv6 type nd-neighbor-solicit iifname . ether saddr . ip6 saddr @neighbours counter name other_frames drop
    icmpv6 type { nd-router-solicit, mld-listener-query, mld-listener-report, mld-listener-done, mld2-listener-report } counter name other_frames drop
    icmpv6 type { nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert, nd-redirect } iifname @spoofed drop
    iifname . ether saddr . ip6 saddr @sources6 goto shape
    iifname @spoofed drop"#;
