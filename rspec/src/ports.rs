//! Sets of owned ports: `tcp/80`, `udp/5000-5010`, kept as disjoint sorted ranges.

use std::collections::BTreeMap;
use std::fmt;

/// Protocols whose ports one sliver can own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// An inclusive range of ports, 1 to 65535.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRange {
    /// First port.
    pub first: u16,
    /// Last port, not below `first`.
    pub last: u16,
}

/// A set of ports. Equal sets have equal representations: ranges are sorted, disjoint and never adjacent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PortSet(BTreeMap<Protocol, Vec<PortRange>>);

impl PortSet {
    /// Every port of both protocols: what a node starts with.
    pub fn all() -> Self {
        let all = vec![PortRange {
            first: 1,
            last: u16::MAX,
        }];
        Self(BTreeMap::from([
            (Protocol::Tcp, all.clone()),
            (Protocol::Udp, all),
        ]))
    }

    /// Reads one item: `tcp/80` or `udp/5000-5010`.
    pub fn parse_item(text: &str) -> Result<(Protocol, PortRange), &'static str> {
        let (protocol, ports) = text.trim().split_once('/').ok_or("not protocol/port")?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err("of an unknown protocol"),
        };
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        let port = |text: &str| match text.trim().parse::<u16>() {
            Ok(0) | Err(_) => Err("not a port"),
            Ok(port) => Ok(port),
        };
        let range = PortRange {
            first: port(first)?,
            last: port(last)?,
        };
        if range.first > range.last {
            return Err("a range that ends before it starts");
        }
        Ok((protocol, range))
    }

    /// Adds a range; what is there already stays once.
    pub fn insert(&mut self, protocol: Protocol, range: PortRange) {
        let ranges = self.0.entry(protocol).or_default();
        ranges.push(range);
        ranges.sort();
        let mut merged: Vec<PortRange> = Vec::with_capacity(ranges.len());
        for next in ranges.drain(..) {
            match merged.last_mut() {
                Some(last) if u32::from(next.first) <= u32::from(last.last) + 1 => {
                    last.last = last.last.max(next.last);
                }
                _ => merged.push(next),
            }
        }
        *ranges = merged;
    }

    /// True if it holds no port.
    pub fn is_empty(&self) -> bool {
        self.0.values().all(Vec::is_empty)
    }

    /// True if every port of `other` is in it.
    pub fn contains_all(&self, other: &Self) -> bool {
        other.iter().all(|(protocol, want)| {
            self.0
                .get(&protocol)
                .is_some_and(|have| have.iter().any(|r| r.first <= want.first && want.last <= r.last))
        })
    }

    /// True if the sets share a port.
    pub fn overlaps(&self, other: &Self) -> bool {
        other.iter().any(|(protocol, want)| {
            self.0
                .get(&protocol)
                .is_some_and(|have| have.iter().any(|r| r.first <= want.last && want.first <= r.last))
        })
    }

    /// Both sets together.
    pub fn union(&mut self, other: &Self) {
        for (protocol, range) in other.iter() {
            self.insert(protocol, range);
        }
    }

    /// Takes the ports of `other` out.
    pub fn subtract(&mut self, other: &Self) {
        for (protocol, cut) in other.iter() {
            let Some(ranges) = self.0.get_mut(&protocol) else {
                continue;
            };
            *ranges = ranges
                .iter()
                .flat_map(|have| {
                    let below = (have.first < cut.first).then(|| PortRange {
                        first: have.first,
                        last: have.last.min(cut.first - 1),
                    });
                    let above = (have.last > cut.last).then(|| PortRange {
                        first: have.first.max(cut.last + 1),
                        last: have.last,
                    });
                    below.into_iter().chain(above)
                })
                .collect();
            if ranges.is_empty() {
                self.0.remove(&protocol);
            }
        }
    }

    /// All ranges in order.
    pub fn iter(&self) -> impl Iterator<Item = (Protocol, PortRange)> + '_ {
        self.0
            .iter()
            .flat_map(|(protocol, ranges)| ranges.iter().map(move |range| (*protocol, *range)))
    }

    /// How many ports it holds.
    pub fn len(&self) -> usize {
        self.iter()
            .map(|(_, range)| usize::from(range.last - range.first) + 1)
            .sum()
    }

    /// Each range as text.
    pub fn items(&self) -> Vec<String> {
        self.iter()
            .map(|(protocol, range)| match range.first == range.last {
                true => format!("{}/{}", protocol.name(), range.first),
                false => format!("{}/{}-{}", protocol.name(), range.first, range.last),
            })
            .collect()
    }
}

impl fmt::Display for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.items().join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn set() -> impl Strategy<Value = (PortSet, BTreeSet<(Protocol, u16)>)> {
        let item = (any::<bool>(), prop_oneof![1u16..40, 65500u16..=65535], 0u16..12);
        proptest::collection::vec(item, 0..8).prop_map(|items| {
            let (mut ports, mut model) = (PortSet::default(), BTreeSet::new());
            for (tcp, first, more) in items {
                let protocol = if tcp { Protocol::Tcp } else { Protocol::Udp };
                let last = first.saturating_add(more);
                ports.insert(protocol, PortRange { first, last });
                model.extend((first..=last).map(|port| (protocol, port)));
            }
            (ports, model)
        })
    }

    fn model(ports: &PortSet) -> BTreeSet<(Protocol, u16)> {
        ports
            .iter()
            .flat_map(|(p, r)| (r.first..=r.last).map(move |port| (p, port)))
            .collect()
    }

    proptest! {
        #[test]
        fn ranges_behave_like_a_set_of_ports((a, ma) in set(), (b, mb) in set()) {
            prop_assert_eq!(model(&a), ma.clone());
            prop_assert_eq!(a.len(), ma.len());
            let mut union = a.clone();
            union.union(&b);
            prop_assert_eq!(model(&union), ma.union(&mb).copied().collect::<BTreeSet<_>>());
            let mut rest = a.clone();
            rest.subtract(&b);
            prop_assert_eq!(model(&rest), ma.difference(&mb).copied().collect::<BTreeSet<_>>());
            prop_assert_eq!(a.overlaps(&b), !ma.is_disjoint(&mb));
            prop_assert_eq!(a.contains_all(&b), mb.is_subset(&ma));
            prop_assert!(!rest.overlaps(&b));
        }

        #[test]
        fn text_reads_back((a, _) in set()) {
            let mut back = PortSet::default();
            for item in a.items() {
                let (protocol, range) = PortSet::parse_item(&item).unwrap();
                back.insert(protocol, range);
            }
            prop_assert_eq!(back, a);
        }
    }

    #[test]
    fn items_that_are_refused() {
        for bad in ["80", "sctp/80", "tcp/0", "tcp/65536", "tcp/9-8", "tcp/", "tcp/-1"] {
            assert!(PortSet::parse_item(bad).is_err(), "{bad}");
        }
    }
}
