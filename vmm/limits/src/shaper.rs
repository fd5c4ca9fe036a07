//! One HTB tree for everything that taps send.
//!
//! What a tap sends arrives on the host as *ingress*, which cannot be queued. So each tap has an
//! nftables ingress chain that sets the packet's priority to its class's handle and forwards it
//! to one IFB device; HTB on that device picks the class from the priority, without a filter,
//! and the packet then goes on as if it had just come in by its tap. Traffic between two taps of
//! a node is shaped like any other, and no VM can choose its class.
//!
//! ```text
//!  tap 0 ─ ingress chain ─┐        1:  HTB, default 1:2
//!  tap 1 ─ ingress chain ─┼─▶ IFB ─▶  └─ 1:1  the tree's rate
//!  tap n ─ ingress chain ─┘              ├─ 1:2  what no class claims: a trickle
//!        ▲                               └─ 1:1000+n  slot n: rate = guarantee, ceil = peak
//!        └── back to where it was ◀────────  ├─ 1:5000+n  its traffic
//!                                            └─ 1:9000+n  what alarms the world: packets a second
//! ```
//!
//! What slots do not use of their guarantees is shared by those that want more, in proportion to
//! the guarantees: a turn of a class (its quantum) is as many bytes. What alarms the world (ICMP,
//! packets with IP options) has a leaf of its own that counts packets, whatever their size, and
//! guarantees none (PlanetLab, OSDI'04 section 4.2.2).
//!
//! IFB with `fwd` from nftables works on Debian's cloud kernel (6.1 and later) and wherever
//! `nft_fwd_netdev`, `ifb` and `sch_htb` are; `act_mirred`, `skbedit` and filters are not needed.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::netlink::tc::{self, Class, ClassParameters, ClassStats, Queue};
use crate::netlink::{Connection, Request, link};
use crate::rate::Rate;
use crate::sysctl;

/// Minor number of the class that carries the node's own rate.
const NODE_CLASS: u16 = 1;
/// Minor number of the class for packets whose class is gone.
const STRAY_CLASS: u16 = 2;
/// Minor number of the class of slot 0. The numbers between are for classes of the node's own.
const FIRST_SLOT: u16 = 0x1000;
/// Minor number of slot 0's leaf for ordinary traffic.
const FIRST_TRAFFIC: u16 = 0x5000;
/// Minor number of slot 0's leaf for what alarms the world.
const FIRST_ALARMS: u16 = 0x9000;
/// Slots of a tree: the distance between two first numbers.
pub const SLOTS: u16 = 0x4000;
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

/// A rate in packets a second, of any size up to an Ethernet frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PacketRate(u16);

impl PacketRate {
    /// What a packet counts as, in bytes: a full frame.
    const FRAME: u16 = 1514;
    /// The largest packet rate: more than that is no alarm, it is traffic.
    const MAX: u16 = 10_000;

    /// A rate of so many packets a second, 1 to 10,000.
    pub fn per_second(packets: u16) -> Result<Self> {
        if (1..=Self::MAX).contains(&packets) {
            Ok(Self(packets))
        } else {
            Err(Error::out_of_range(
                "packet rate",
                format!("{packets} packets/s"),
                format!("1 to {} packets/s", Self::MAX),
            ))
        }
    }

    /// Packets a second.
    pub const fn packets(self) -> u16 {
        self.0
    }

    /// A leaf that lets so many packets pass, and two seconds' worth at once. It guarantees
    /// nothing: all that it sends is borrowed from the slot, so no sum of guarantees grows.
    fn parameters(self, tree: Rate) -> Result<ClassParameters> {
        let frame = u64::from(Self::FRAME);
        let ceil = Rate::from_bits_per_second(u64::from(self.0) * frame * 8)?.min(tree);
        Ok(ClassParameters {
            rate: Rate::MIN,
            ceil,
            burst: Self::FRAME.into(),
            cburst: u32::from(self.0) * 2 * u32::from(Self::FRAME),
            quantum: Self::FRAME.into(),
            mpu: Self::FRAME,
        })
    }

    /// The leaf's queue: two seconds' worth. Who is in a hurry to alarm the world loses packets.
    fn queue(self) -> Queue {
        Queue::Packets(u32::from(self.0) * 2)
    }
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
    /// How many alarming packets a slot may send; `None` = slots have no leaf for them.
    pub alarms: Option<PacketRate>,
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
            alarms: None,
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
            mpu: 0,
        })
    }

    /// The classes of a slot that may send `bandwidth`.
    pub fn slot(&self, bandwidth: &Bandwidth) -> Result<SlotParameters> {
        let class = self.parameters(bandwidth)?;
        let alarms = |rate: PacketRate| rate.parameters(class.ceil);
        Ok(SlotParameters {
            class,
            alarms: self.alarms.map(alarms).transpose()?,
        })
    }
}

/// The parameters of a slot's classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotParameters {
    /// Of the slot's class, and of its leaf for ordinary traffic.
    pub class: ClassParameters,
    /// Of its leaf for what alarms the world.
    pub alarms: Option<ClassParameters>,
}

/// A slot as the kernel lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// The class that bounds the slot.
    pub class: Class,
    /// Its leaf for ordinary traffic.
    pub traffic: Option<Class>,
    /// Its leaf for what alarms the world.
    pub alarms: Option<Class>,
}

impl Slot {
    /// What the slot has sent and what waits in it: an inner class counts what passes, only
    /// leaves know of queues.
    pub fn stats(&self) -> ClassStats {
        let mut sum = self.class.stats;
        for leaf in [&self.traffic, &self.alarms].into_iter().flatten() {
            sum.drops += leaf.stats.drops;
            sum.overlimits += leaf.stats.overlimits;
            sum.queued_packets = sum.queued_packets.saturating_add(leaf.stats.queued_packets);
            sum.queued_bytes = sum.queued_bytes.saturating_add(leaf.stats.queued_bytes);
        }
        sum
    }

    /// Whether the slot's classes are the wanted ones, but for the rounding of bytes and ticks.
    pub fn is(&self, wanted: &SlotParameters) -> bool {
        let same = |is: &ClassParameters, want: &ClassParameters| {
            let key = |c: &ClassParameters| {
                (
                    c.rate.bytes_per_second(),
                    c.ceil.bytes_per_second(),
                    c.quantum,
                    c.mpu,
                )
            };
            key(is) == key(want)
        };
        let alarms = match (&self.alarms, &wanted.alarms) {
            (Some(is), Some(want)) => same(&is.parameters, want),
            (is, want) => is.is_none() == want.is_none(),
        };
        let traffic = self.traffic.is_some_and(|t| same(&t.parameters, &wanted.class));
        same(&self.class.parameters, &wanted.class) && traffic && alarms
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
        requests.push(tree.root()?);
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

    /// Changes what the tree as a whole may send. Slots that may send as much as the tree have to
    /// be set again.
    pub fn set_rate(&mut self, rate: Rate) -> Result<Request> {
        self.config.rate = rate;
        self.root()
    }

    fn root(&self) -> Result<Request> {
        let whole = Bandwidth {
            guarantee: self.config.rate,
            peak: None,
        };
        let parameters = self.config.parameters(&whole)?;
        Ok(tc::set_class(self.link, 0, NODE_CLASS, &parameters))
    }

    /// The packet priority that picks a slot's leaf for ordinary traffic.
    pub fn priority(slot: u16) -> Result<u32> {
        handle(FIRST_TRAFFIC, slot)
    }

    /// The packet priority that picks a slot's leaf for what alarms the world.
    pub fn alarm_priority(slot: u16) -> Result<u32> {
        handle(FIRST_ALARMS, slot)
    }

    /// Makes or changes the classes of a slot, and their queues. What waits in them stays.
    pub fn set(&self, slot: u16, bandwidth: &Bandwidth) -> Result<Vec<Request>> {
        let SlotParameters { class, alarms } = self.config.slot(bandwidth)?;
        let (slot, link) = (checked(slot)?, self.link);
        let (parent, traffic) = (FIRST_SLOT + slot, FIRST_TRAFFIC + slot);
        let mut requests = vec![
            tc::set_class(link, NODE_CLASS, parent, &class),
            tc::set_class(link, parent, traffic, &class),
            tc::set_queue(link, traffic, Queue::Bytes(queue(class.ceil))),
        ];
        if let (Some(rate), Some(alarms)) = (self.config.alarms, alarms) {
            let leaf = FIRST_ALARMS + slot;
            requests.push(tc::set_class(link, parent, leaf, &alarms));
            requests.push(tc::set_queue(link, leaf, rate.queue()));
        }
        Ok(requests)
    }

    /// Deletes the classes of a slot, if they are there.
    pub fn remove(&self, slot: u16) -> Result<[Request; 3]> {
        let slot = checked(slot)?;
        // A class with children cannot be deleted.
        Ok([FIRST_ALARMS, FIRST_TRAFFIC, FIRST_SLOT].map(|first| tc::delete_class(self.link, first + slot)))
    }

    /// The slots that there are, with their parameters and counters.
    pub fn slots(&self, connection: &mut Connection) -> Result<BTreeMap<u16, Slot>> {
        let classes: BTreeMap<u16, Class> = connection
            .classes(self.link)?
            .into_iter()
            .map(|class| (class.minor, class))
            .collect();
        let slots = classes.range(FIRST_SLOT..FIRST_SLOT + SLOTS);
        Ok(slots
            .map(|(minor, class)| {
                let slot = minor - FIRST_SLOT;
                let leaf = |first: u16| classes.get(&(first + slot)).copied();
                let (traffic, alarms) = (leaf(FIRST_TRAFFIC), leaf(FIRST_ALARMS));
                (
                    slot,
                    Slot {
                        class: *class,
                        traffic,
                        alarms,
                    },
                )
            })
            .collect())
    }

    /// What became of packets that no class claimed: more than a few mean that something is wrong.
    pub fn strays(&self, connection: &mut Connection) -> Result<ClassStats> {
        let classes = connection.classes(self.link)?;
        Ok(classes
            .iter()
            .find(|c| c.minor == STRAY_CLASS)
            .map(|c| c.stats)
            .unwrap_or_default())
    }
}

fn handle(first: u16, slot: u16) -> Result<u32> {
    Ok(u32::from(tc::MAJOR) << 16 | u32::from(first + checked(slot)?))
}

fn checked(slot: u16) -> Result<u16> {
    if slot < SLOTS {
        Ok(slot)
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
        assert_eq!(Tree::priority(0).unwrap(), 0x1_5000);
        assert_eq!(Tree::priority(SLOTS - 1).unwrap(), 0x1_8fff);
        assert_eq!(Tree::alarm_priority(SLOTS - 1).unwrap(), 0x1_cfff);
        assert!(Tree::priority(SLOTS).is_err() && Tree::alarm_priority(SLOTS).is_err());
    }

    #[test]
    fn alarms_are_counted_in_packets_and_guarantee_nothing() {
        let five = PacketRate::per_second(5).unwrap();
        let config = TreeConfig {
            alarms: Some(five),
            ..TreeConfig::new("x", rate(100_000_000)).unwrap()
        };
        let bandwidth = |peak| Bandwidth {
            guarantee: rate(1_000),
            peak,
        };
        let alarms = config.slot(&bandwidth(None)).unwrap().alarms.unwrap();
        assert_eq!((alarms.rate, alarms.mpu), (Rate::MIN, 1514));
        assert_eq!(alarms.ceil.bytes_per_second(), 5 * 1514);
        let slow = config
            .slot(&bandwidth(Some(rate(8_000))))
            .unwrap()
            .alarms
            .unwrap();
        assert_eq!(slow.ceil, rate(8_000), "never more than the slot");
        for bad in [0, 10_001] {
            assert!(
                PacketRate::per_second(bad)
                    .unwrap_err()
                    .to_string()
                    .contains("10000")
            );
        }
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
