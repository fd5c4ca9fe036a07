//! One HTB tree for everything that taps send.
//!
//! What a tap sends arrives on the host as *ingress*, which cannot be queued. So each tap has an
//! nftables ingress chain that sets the packet's priority to its class's handle and forwards it
//! to one IFB device; HTB on that device picks the class from the priority, without a filter,
//! and the packet then goes on as if it had just come in by its tap. Traffic between two taps of
//! a node is shaped like any other, and no VM can choose its class.
//!
//! ```text
//!  tap 0 ─ ingress chain ─┐                 1:  HTB, default 1:2
//!  tap 1 ─ ingress chain ─┼─▶ IFB ─▶        └─ 1:1  the node's rate
//!  tap n ─ ingress chain ─┘                    ├─ 1:2      what no class claims: a trickle
//!        ▲                                     ├─ 1:100    slot 0: rate = guarantee, ceil = peak
//!        └────── back to where it was ◀─────── └─ 1:100+n  slot n
//! ```
//!
//! IFB with `fwd` from nftables works on Debian's cloud kernel (6.1 and later) and wherever
//! `nft_fwd_netdev`, `ifb` and `sch_htb` are; `act_mirred`, `skbedit` and filters are not needed.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::netlink::tc::{self, Class, ClassParameters};
use crate::netlink::{Connection, Request, link};
use crate::rate::Rate;
use crate::sysctl;

/// Minor number of the class that carries the node's own rate.
const NODE_CLASS: u16 = 1;
/// Minor number of the class for packets whose class is gone.
const STRAY_CLASS: u16 = 2;
/// Minor number of slot 0. The numbers between are for classes of the node's own.
const FIRST_SLOT: u16 = 0x100;
/// Slots of a tree: HTB handles have 16 bits.
pub const SLOTS: u16 = 0xfe00;
/// The largest ratio of weights. Beyond it one class's turn takes so long that the others starve.
pub const MAX_WEIGHT: u64 = 64;

/// What one VM may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bandwidth {
    /// Guaranteed, and in proportion to it (1 to 64 units) the share of what others leave.
    pub guarantee: Rate,
    /// Never exceeded; `None` = the tree's rate.
    pub peak: Option<Rate>,
}

/// How a tree is made.
#[derive(Debug, Clone)]
pub struct TreeConfig {
    /// Name of its IFB device.
    pub device: String,
    /// What all VMs together may send.
    pub rate: Rate,
    /// The guarantee that weighs 1; smaller ones weigh the same, larger ones in proportion, up to
    /// 64 times as much.
    pub unit: Rate,
    /// Largest packet that can arrive, in bytes. HTB divides by turns of at least one packet, so
    /// a turn must not be shorter than this, or who sends the largest packets gets the most. A
    /// guest may send segments of 64 KiB, whatever it was offered.
    pub max_packet: u32,
}

impl TreeConfig {
    /// A node's tree: weights reach from a 64th of the node's rate to all of it.
    pub fn new(device: impl Into<String>, rate: Rate) -> Result<Self> {
        let unit = Rate::from_bits_per_second(
            (rate.bits_per_second() / MAX_WEIGHT).max(Rate::MIN.bits_per_second()),
        )?;
        Ok(Self {
            device: device.into(),
            rate,
            unit,
            max_packet: 65_536 + 14,
        })
    }

    /// Parameters of a class that may send `bandwidth`.
    pub fn parameters(&self, bandwidth: &Bandwidth) -> Result<ClassParameters> {
        let peak = bandwidth.peak.unwrap_or(self.rate).min(self.rate);
        if bandwidth.guarantee > self.rate {
            return Err(Error::out_of_range(
                "guaranteed rate",
                bandwidth.guarantee,
                format!("at most the node's rate, {}", self.rate),
            ));
        }
        if bandwidth.guarantee > peak {
            return Err(Error::out_of_range(
                "guaranteed rate",
                bandwidth.guarantee,
                format!("at most the peak rate, {peak}"),
            ));
        }
        let bits = u128::from(bandwidth.guarantee.bits_per_second());
        let unit = u128::from(self.unit.bits_per_second());
        let quantum = (bits * u128::from(self.max_packet) / unit).clamp(
            u128::from(self.max_packet),
            u128::from(self.max_packet) * u128::from(MAX_WEIGHT),
        );
        Ok(ClassParameters {
            rate: bandwidth.guarantee,
            ceil: peak,
            burst: bucket(bandwidth.guarantee),
            cburst: bucket(peak),
            quantum: u32::try_from(quantum).unwrap_or(u32::MAX),
        })
    }
}

/// A bucket of 10 ms at the rate: long enough that a late timer loses nothing, and short enough
/// that it adds 0.1 % to what passes in ten seconds. At least two full frames.
fn bucket(rate: Rate) -> u32 {
    u32::try_from(rate.bytes_per_second() / 100)
        .unwrap_or(u32::MAX)
        .max(2 * 1514)
}

/// A queue of 100 ms at the peak rate: long enough for a window of TCP, short enough that a
/// flooding guest delays itself and holds little of the node's memory. In bytes, since one
/// "packet" may be 64 KiB; at least two of those.
fn queue(peak: Rate) -> u32 {
    u32::try_from(peak.bytes_per_second() / 10)
        .unwrap_or(u32::MAX)
        .clamp(128 * 1024, 4 * 1024 * 1024)
}

/// A tree that is there.
#[derive(Debug, Clone)]
pub struct Tree {
    /// Interface index of its IFB device.
    pub link: u32,
    /// How it was made.
    pub config: TreeConfig,
}

impl Tree {
    /// Makes the tree, or adopts the one that is there with all its classes and what waits in them.
    pub fn ensure(connection: &mut Connection, config: TreeConfig) -> Result<Self> {
        let device = match connection.link(&config.device)? {
            Some(found) if found.kind == "ifb" => found,
            Some(found) => {
                return Err(Error::out_of_range(
                    "shaping device",
                    format!("{} of kind \"{}\"", config.device, found.kind),
                    "an ifb device, or none of that name",
                ));
            }
            None => {
                connection.execute(&[link::add_ifb(&config.device)?])?;
                connection.require_link(&config.device)?
            }
        };
        let tree = Self {
            link: device.index,
            config,
        };
        // Before it is up: the node's own IPv6 greetings would go through the tree as strays.
        sysctl::set_if_there(&format!("ipv6/conf/{}/disable_ipv6", tree.config.device), "1")?;
        let up = link::LinkChange {
            up: Some(true),
            ..Default::default()
        };
        let mut requests = vec![link::change(tree.link, &tree.config.device, up)];
        if !connection.has_htb(tree.link)? {
            requests.push(tc::add_htb(tree.link, STRAY_CLASS));
        }
        requests.push(tc::set_class(
            tree.link,
            0,
            NODE_CLASS,
            &tree.config.parameters(&Bandwidth {
                guarantee: tree.config.rate,
                peak: None,
            })?,
        ));
        let trickle = Bandwidth {
            guarantee: Rate::MIN,
            peak: Some(Rate::from_bits_per_second(8_000)?.min(tree.config.rate)),
        };
        requests.push(tc::set_class(
            tree.link,
            NODE_CLASS,
            STRAY_CLASS,
            &tree.config.parameters(&trickle)?,
        ));
        connection.execute(&requests)?;
        Ok(tree)
    }

    /// The packet priority that picks the class of a slot.
    pub fn priority(slot: u16) -> Result<u32> {
        Ok(u32::from(tc::MAJOR) << 16 | u32::from(minor(slot)?))
    }

    /// Makes or changes the class of a slot, and its queue.
    pub fn set(&self, slot: u16, bandwidth: &Bandwidth) -> Result<[Request; 2]> {
        let (minor, parameters) = (minor(slot)?, self.config.parameters(bandwidth)?);
        Ok([
            tc::set_class(self.link, NODE_CLASS, minor, &parameters),
            tc::set_queue(self.link, minor, queue(parameters.ceil)),
        ])
    }

    /// Deletes the class of a slot, if it is there.
    pub fn remove(&self, slot: u16) -> Result<Request> {
        Ok(tc::delete_class(self.link, minor(slot)?))
    }

    /// The classes that there are, by slot, with their parameters and counters.
    pub fn slots(&self, connection: &mut Connection) -> Result<BTreeMap<u16, Class>> {
        let classes = connection.classes(self.link)?;
        Ok(classes
            .into_iter()
            .filter_map(|c| c.minor.checked_sub(FIRST_SLOT).map(|slot| (slot, c)))
            .collect())
    }

    /// What became of packets that no class claimed: more than a few mean that something is wrong.
    pub fn strays(&self, connection: &mut Connection) -> Result<tc::ClassStats> {
        let classes = connection.classes(self.link)?;
        Ok(classes
            .iter()
            .find(|c| c.minor == STRAY_CLASS)
            .map(|c| c.stats)
            .unwrap_or_default())
    }
}

fn minor(slot: u16) -> Result<u16> {
    if slot < SLOTS {
        Ok(FIRST_SLOT + slot)
    } else {
        Err(Error::out_of_range(
            "slot of the HTB tree",
            slot,
            format!("0 to {}", SLOTS - 1),
        ))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rate(bits: u64) -> Rate {
        Rate::from_bits_per_second(bits).unwrap()
    }

    #[test]
    fn more_than_the_node_has_is_refused() {
        let config = TreeConfig::new("x", rate(100_000_000)).unwrap();
        let over = config
            .parameters(&Bandwidth {
                guarantee: rate(100_000_001),
                peak: None,
            })
            .unwrap_err()
            .to_string();
        assert!(over.contains("100 Mbit/s"), "{over}");
        assert!(
            config
                .parameters(&Bandwidth {
                    guarantee: rate(2_000_000),
                    peak: Some(rate(1_000_000))
                })
                .is_err()
        );
    }

    #[test]
    fn slots_have_handles_of_their_own() {
        assert_eq!(Tree::priority(0).unwrap(), 0x1_0100);
        assert_eq!(Tree::priority(SLOTS - 1).unwrap(), 0x1_feff);
        assert!(Tree::priority(SLOTS).is_err());
    }

    proptest! {
        #[test]
        fn weights_are_in_proportion_and_bounded(a in 8u64..100_000_000, b in 8u64..100_000_000) {
            let config = TreeConfig::new("x", rate(100_000_000)).unwrap();
            let quantum = |bits| u64::from(config.parameters(&Bandwidth { guarantee: rate(bits), peak: None }).unwrap().quantum);
            let (qa, qb) = (quantum(a), quantum(b));
            let packet = u64::from(config.max_packet);
            prop_assert!((packet..=packet * MAX_WEIGHT).contains(&qa));
            let unit = config.unit.bits_per_second();
            if a >= unit && b >= unit {
                let (x, y) = (u128::from(qa) * u128::from(b), u128::from(qb) * u128::from(a));
                prop_assert!(x.abs_diff(y) * 1000 <= x.max(y), "{} {}", qa, qb);
            }
        }
    }
}
