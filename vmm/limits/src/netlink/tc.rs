//! Traffic control: HTB queueing disciplines and classes, made, changed and read back.
//!
//! netlink-packet-route knows nothing of HTB, so its options are bytes here
//! (`struct tc_htb_glob`, `struct tc_htb_opt` and `struct tc_ratespec` of linux/pkt_sched.h).

use netlink_packet_core::{DefaultNla, Nla, Parseable};
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcHeader, TcMessage, TcOption, TcStats2};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{CREATE, Connection, EXCL, REPLACE, Request, attributes, decode};
use crate::error::Result;
use crate::rate::Rate;

const TCA_OPTIONS: u16 = 2;
const TCA_HTB_PARMS: u16 = 1;
const TCA_HTB_INIT: u16 = 2;
const TCA_HTB_RATE64: u16 = 6;
const TCA_HTB_CEIL64: u16 = 7;
const TCA_STATS_PKT64: u16 = 8;
const TC_LINKLAYER_ETHERNET: u8 = 1;
/// `sizeof(struct tc_htb_opt)`: two rate specifications of 12 bytes and five numbers.
const HTB_OPT_LEN: usize = 44;

/// The kernel's scheduler tick is 64 ns on every architecture (`PSCHED_SHIFT` = 6, also shown in
/// /proc/net/psched); bucket sizes travel as the time that they take at the rate, in ticks.
const TICK_NS: u128 = 64;

/// The major number of the one tree that a device has here.
pub const MAJOR: u16 = 1;

/// Parameters of an HTB class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClassParameters {
    /// Guaranteed rate.
    pub rate: Rate,
    /// Rate never exceeded, with what is borrowed.
    pub ceil: Rate,
    /// Bucket of the guaranteed rate, in bytes: what may go at once.
    pub burst: u32,
    /// Bucket of the ceiling, in bytes.
    pub cburst: u32,
    /// Weight for what is left over: bytes per turn.
    pub quantum: u32,
    /// Every packet counts as at least so many bytes; 0 = as many as it has. As large as the
    /// largest packet, it makes a class count packets.
    pub mpu: u16,
}

/// Counters of an HTB class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClassStats {
    /// Bytes sent.
    pub bytes: u64,
    /// Packets sent. A segment larger than the MTU, which a guest may hand over whole, counts as
    /// none: the kernel does not trust what such a segment says of itself. Its bytes count.
    pub packets: u64,
    /// Packets dropped for want of room in the queue.
    pub drops: u64,
    /// Times that a packet had to wait.
    pub overlimits: u64,
    /// Packets waiting, a large segment as one.
    pub queued_packets: u32,
    /// Bytes waiting.
    pub queued_bytes: u32,
}

/// An HTB class as the kernel lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Class {
    /// Minor number: the class is `1:minor`.
    pub minor: u16,
    /// Its parent's; 0 = the root of the tree.
    pub parent: u16,
    /// Parameters.
    pub parameters: ClassParameters,
    /// Counters.
    pub stats: ClassStats,
}

/// Puts an HTB tree at the root of a device. What no class claims goes to `default_minor`.
pub fn add_htb(link: u32, default_minor: u16) -> Request {
    // tc_htb_glob: version, rate2quantum (not used: every class brings its quantum), defcls, debug, direct_pkts
    let glob: Vec<u8> = [3u32, 10, u32::from(default_minor), 0, 0]
        .iter()
        .flat_map(|v| v.to_ne_bytes())
        .collect();
    let message = message(
        link,
        TcHandle {
            major: MAJOR,
            minor: 0,
        },
        TcHandle::ROOT,
        vec![DefaultNla::new(TCA_HTB_INIT, glob)],
    );
    Request::route(
        format!("make the HTB tree of link {link}"),
        CREATE | EXCL,
        &RouteNetlinkMessage::NewQueueDiscipline(message),
    )
}

/// Makes or changes the class `1:minor`.
pub fn set_class(link: u32, parent: u16, minor: u16, parameters: &ClassParameters) -> Request {
    let what = format!("set HTB class {MAJOR}:{minor:x} of link {link}");
    Request::route(
        what,
        CREATE | REPLACE,
        &RouteNetlinkMessage::NewTrafficClass(class(link, parent, minor, parameters)),
    )
}

/// Makes the class `1:minor`, which must not be there.
pub fn add_class(link: u32, parent: u16, minor: u16, parameters: &ClassParameters) -> Request {
    let what = format!("make HTB class {MAJOR}:{minor:x} of link {link}");
    Request::route(
        what,
        CREATE | EXCL,
        &RouteNetlinkMessage::NewTrafficClass(class(link, parent, minor, parameters)),
    )
}

/// How much may wait in a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// So many bytes.
    Bytes(u32),
    /// So many packets, of any size.
    Packets(u32),
}

/// Gives the class `1:minor` a queue; one that it has is changed, and keeps what waits in it as
/// far as that fits.
pub fn set_queue(link: u32, minor: u16, queue: Queue) -> Request {
    let mut message = message(
        link,
        TcHandle::UNSPEC,
        TcHandle { major: MAJOR, minor },
        Vec::new(),
    );
    let (kind, limit) = match queue {
        Queue::Bytes(limit) => ("bfifo", limit),
        Queue::Packets(limit) => ("pfifo", limit),
    };
    // struct tc_fifo_qopt is the whole of the options, not an attribute among them.
    message.attributes = vec![
        TcAttribute::Kind(kind.to_owned()),
        TcAttribute::Other(DefaultNla::new(TCA_OPTIONS, limit.to_ne_bytes().to_vec())),
    ];
    let what = format!("set the queue of HTB class {MAJOR}:{minor:x} of link {link}");
    let message = RouteNetlinkMessage::NewQueueDiscipline(message);
    Request::route(what, CREATE | REPLACE, &message)
}

/// Deletes the class `1:minor`; what waits in it is lost.
pub fn delete_class(link: u32, minor: u16) -> Request {
    let message = message(
        link,
        TcHandle { major: MAJOR, minor },
        TcHandle::UNSPEC,
        Vec::new(),
    );
    let what = format!("delete HTB class {MAJOR}:{minor:x} of link {link}");
    Request::route(what, 0, &RouteNetlinkMessage::DelTrafficClass(message))
        .tolerate(libc::ENOENT)
        .tolerate(libc::ENODEV)
}

fn class(link: u32, parent: u16, minor: u16, p: &ClassParameters) -> TcMessage {
    let mut opt = Vec::with_capacity(HTB_OPT_LEN);
    opt.extend_from_slice(&rate_specification(p.rate, p.mpu));
    opt.extend_from_slice(&rate_specification(p.ceil, p.mpu));
    // level and prio stay 0: the kernel computes the one, and the guarantee needs no other.
    for value in [ticks(p.burst, p.rate), ticks(p.cburst, p.ceil), p.quantum, 0, 0] {
        opt.extend_from_slice(&value.to_ne_bytes());
    }
    let mut options = vec![DefaultNla::new(TCA_HTB_PARMS, opt)];
    for (kind, rate) in [(TCA_HTB_RATE64, p.rate), (TCA_HTB_CEIL64, p.ceil)] {
        if rate.bytes_per_second() > u64::from(u32::MAX) {
            options.push(DefaultNla::new(
                kind,
                rate.bytes_per_second().to_ne_bytes().to_vec(),
            ));
        }
    }
    message(
        link,
        TcHandle { major: MAJOR, minor },
        TcHandle {
            major: MAJOR,
            minor: parent,
        },
        options,
    )
}

fn message(link: u32, handle: TcHandle, parent: TcHandle, options: Vec<DefaultNla>) -> TcMessage {
    let header = TcHeader {
        family: AddressFamily::Unspec,
        index: link as i32,
        handle,
        parent,
        info: 0,
    };
    let options = options.into_iter().map(TcOption::Other).collect();
    TcMessage::from_parts(
        header,
        vec![TcAttribute::Kind("htb".to_owned()), TcAttribute::Options(options)],
    )
}

/// `struct tc_ratespec`: cell_log, linklayer, overhead, cell_align, mpu, rate in bytes a second.
fn rate_specification(rate: Rate, mpu: u16) -> [u8; 12] {
    let mut spec = [0; 12];
    spec[1] = TC_LINKLAYER_ETHERNET;
    spec[6..8].copy_from_slice(&mpu.to_ne_bytes());
    let bytes = u32::try_from(rate.bytes_per_second()).unwrap_or(u32::MAX);
    spec[8..].copy_from_slice(&bytes.to_ne_bytes());
    spec
}

fn ticks(bytes: u32, rate: Rate) -> u32 {
    let ns = u128::from(bytes) * 1_000_000_000 / u128::from(rate.bytes_per_second().max(1));
    u32::try_from(ns / TICK_NS).unwrap_or(u32::MAX)
}

fn bytes_of_ticks(ticks: u32, rate: Rate) -> u32 {
    let bytes = u128::from(ticks) * TICK_NS * u128::from(rate.bytes_per_second());
    u32::try_from(bytes.div_ceil(1_000_000_000)).unwrap_or(u32::MAX)
}

impl Connection {
    /// The HTB classes of a device.
    pub fn classes(&mut self, link: u32) -> Result<Vec<Class>> {
        let query = TcMessage::with_index(link as i32);
        let request = Request::route(
            format!("list the classes of link {link}"),
            0,
            &RouteNetlinkMessage::GetTrafficClass(query),
        );
        let mut classes = Vec::new();
        for (_, payload) in self.dump(&request)? {
            let message = TcMessage::parse(&payload).map_err(|e| decode("classes", e))?;
            classes.extend(read_class(&message)?);
        }
        Ok(classes)
    }

    /// Whether the root of a device is our HTB tree.
    pub fn has_htb(&mut self, link: u32) -> Result<bool> {
        let query = TcMessage::with_index(link as i32);
        let request = Request::route(
            format!("list the queues of link {link}"),
            0,
            &RouteNetlinkMessage::GetQueueDiscipline(query),
        );
        for (_, payload) in self.dump(&request)? {
            let message = TcMessage::parse(&payload).map_err(|e| decode("queueing disciplines", e))?;
            let htb = message
                .attributes
                .iter()
                .any(|a| matches!(a, TcAttribute::Kind(kind) if kind == "htb"));
            if htb && message.header.index == link as i32 && message.header.handle.major == MAJOR {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// `None` for a class of another kind.
fn read_class(message: &TcMessage) -> Result<Option<Class>> {
    let mut parameters = None;
    let mut stats = ClassStats::default();
    let mut htb = false;
    for attribute in &message.attributes {
        match attribute {
            TcAttribute::Kind(kind) => htb = kind == "htb",
            // For a kind that the library does not know this is one attribute with all the bytes.
            TcAttribute::Options(options) => {
                for option in options {
                    if let TcOption::Other(all) = option {
                        let mut bytes = vec![0; all.value_len()];
                        all.emit_value(&mut bytes);
                        parameters = read_parameters(&bytes)?;
                    }
                }
            }
            TcAttribute::Stats2(items) => {
                for item in items {
                    read_stats(item, &mut stats);
                }
            }
            _ => {}
        }
    }
    let header = &message.header;
    let parent = if header.parent == TcHandle::ROOT {
        0
    } else {
        header.parent.minor
    };
    Ok(parameters.filter(|_| htb).map(|parameters| Class {
        minor: header.handle.minor,
        parent,
        parameters,
        stats,
    }))
}

fn read_parameters(options: &[u8]) -> Result<Option<ClassParameters>> {
    let attributes = attributes(options)?;
    let Some(opt) = attributes
        .get(&TCA_HTB_PARMS)
        .filter(|opt| opt.len() >= HTB_OPT_LEN)
    else {
        return Ok(None);
    };
    let wide = |kind| -> Result<Option<u64>> {
        let number = |v: &&[u8]| {
            (*v).try_into()
                .map(u64::from_ne_bytes)
                .map_err(|e| decode("a 64-bit class rate", e))
        };
        attributes.get(&kind).map(number).transpose()
    };
    let word = |at: usize| u32::from_ne_bytes([opt[at], opt[at + 1], opt[at + 2], opt[at + 3]]);
    let rate = Rate::from_kernel_bytes(wide(TCA_HTB_RATE64)?.unwrap_or(u64::from(word(8))));
    let ceil = Rate::from_kernel_bytes(wide(TCA_HTB_CEIL64)?.unwrap_or(u64::from(word(20))));
    Ok(Some(ClassParameters {
        rate,
        ceil,
        burst: bytes_of_ticks(word(24), rate),
        cburst: bytes_of_ticks(word(28), ceil),
        quantum: word(32),
        mpu: u16::from_ne_bytes([opt[18], opt[19]]),
    }))
}

fn read_stats(item: &TcStats2, stats: &mut ClassStats) {
    match item {
        TcStats2::Basic(basic) => {
            stats.bytes = basic.bytes;
            stats.packets = stats.packets.max(u64::from(basic.packets));
        }
        TcStats2::Queue(queue) => {
            stats.drops = u64::from(queue.drops);
            stats.overlimits = u64::from(queue.overlimits);
            stats.queued_packets = queue.qlen;
            stats.queued_bytes = queue.backlog;
        }
        // The 32-bit packet counter wraps; kernels since 5.6 send this one too.
        TcStats2::Other(other) if other.kind() == TCA_STATS_PKT64 => {
            let mut bytes = vec![0; other.value_len()];
            other.emit_value(&mut bytes);
            if let Ok(packets) = bytes.try_into().map(u64::from_ne_bytes) {
                stats.packets = packets;
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::Emitable;
    use proptest::prelude::*;

    use super::*;

    /// What the kernel would say about the class that `message` asks for: the options come back
    /// as they went in, the library reads them as one attribute.
    fn echo(parameters: &ClassParameters) -> Class {
        let asked = class(5, 1, 0x105, parameters);
        let mut bytes = vec![0; asked.buffer_len()];
        asked.emit(&mut bytes);
        read_class(&TcMessage::parse(&bytes).unwrap()).unwrap().unwrap()
    }

    #[test]
    fn the_options_are_as_long_as_the_kernels_structure() {
        let mbit = Rate::from_bits_per_second(1_000_000).unwrap();
        let parameters = ClassParameters {
            rate: mbit,
            ceil: mbit,
            burst: 1600,
            cburst: 1600,
            quantum: 1514,
            mpu: 0,
        };
        let TcAttribute::Options(options) = &class(5, 1, 2, &parameters).attributes[1] else {
            panic!("no options")
        };
        assert_eq!(options[0].value_len(), HTB_OPT_LEN);
    }

    proptest! {
        #[test]
        fn what_is_asked_reads_back(
            rate in 8u64..=10_000_000_000_000, more in 0u64..1_000_000_000, burst in 1600u32..10_000_000, quantum in 1514u32..10_000_000, mpu: u16,
        ) {
            let rate = Rate::from_bits_per_second(rate / 8 * 8).unwrap();
            let ceil = Rate::from_bits_per_second(((rate.bits_per_second() + more) / 8 * 8).min(Rate::MAX.bits_per_second())).unwrap();
            // A bucket that takes more than 274 s to fill does not fit the kernel's 32 bits of ticks.
            prop_assume!(u64::from(burst) / rate.bytes_per_second() < 200);
            let class = echo(&ClassParameters { rate, ceil, burst, cburst: burst, quantum, mpu });
            prop_assert_eq!(class.parameters.mpu, mpu);
            prop_assert_eq!((class.minor, class.parent), (0x105, 1));
            prop_assert_eq!((class.parameters.rate, class.parameters.ceil, class.parameters.quantum), (rate, ceil, quantum));
            // A bucket is rounded to ticks of 64 ns.
            let tick = u64::from(burst).abs_diff(u64::from(class.parameters.burst));
            prop_assert!(tick <= rate.bytes_per_second() * 64 / 1_000_000_000 + 1);
        }
    }
}
