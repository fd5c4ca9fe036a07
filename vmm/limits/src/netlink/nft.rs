//! nftables by netlink: elements, ingress chains and their rules, changed in one transaction.
//!
//! The ruleset itself is text, loaded once by `nft`; what changes with every VM comes through
//! here as bytes (linux/netfilter/nf_tables.h), because no program is started on a VM's path.

use std::collections::BTreeMap;

use netlink_packet_core::NlasIterator;

use super::{CREATE, Connection, EXCL, Request, attributes, decode};
use crate::error::Result;

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;

const NEWTABLE: u16 = 0;
const GETTABLE: u16 = 1;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const GETCHAIN: u16 = 4;
const DELCHAIN: u16 = 5;
const NEWRULE: u16 = 6;
const NEWSETELEM: u16 = 12;
const GETSETELEM: u16 = 13;
const DELSETELEM: u16 = 14;
const GETOBJ: u16 = 19;

const SET_ELEM_KEY: u16 = 1;
const SET_ELEM_EXPR: u16 = 7;
const SET_ELEM_KEY_END: u16 = 10;
const SET_ELEM_EXPRESSIONS: u16 = 11;

/// Set on attributes that contain attributes.
const NESTED: u16 = 0x8000;

/// The registers that rules here compute in; the numbers are the kernel's (`NFT_REG_1` …).
const REGISTER_VERDICT: u32 = 0;
const REGISTER: u32 = 1;

/// Which packets a table sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet,
    /// Frames, as a device receives them.
    Netdev,
}

impl Family {
    const fn number(self) -> u8 {
        match self {
            Family::Inet => 1,
            Family::Netdev => 5,
        }
    }
}

/// A table of nftables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Which packets it sees.
    pub family: Family,
    /// Its name.
    pub name: String,
}

/// One step of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Counts packets and bytes.
    Count,
    /// Sets the packet's priority; one that is an HTB class handle (`major << 16 | minor`) picks
    /// that class with no filter at all.
    SetPriority(u32),
    /// Hands the frame to the output of the device with this index.
    Forward(u32),
    /// Continues in another chain, for good.
    Goto(String),
}

/// An element of a set or map.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Element {
    /// The key, each field padded to four bytes: see [`field`] and [`device_field`]. Of an
    /// interval, the lowest.
    pub key: Vec<u8>,
    /// The highest key, in sets of intervals.
    pub key_end: Option<Vec<u8>>,
    /// What a map holds for it.
    pub data: Option<Vec<u8>>,
    /// A rule that looks the element up goes on only above this limit.
    pub limit: Option<Limit>,
}

impl Element {
    /// A key, and nothing about it.
    pub fn new(key: Vec<u8>) -> Self {
        Self {
            key,
            ..Self::default()
        }
    }

    /// With this as the highest key.
    #[must_use]
    pub fn up_to(mut self, key: Vec<u8>) -> Self {
        self.key_end = Some(key);
        self
    }

    /// With this data.
    #[must_use]
    pub fn with(mut self, data: Vec<u8>) -> Self {
        self.data = Some(data);
        self
    }

    /// With this limit.
    #[must_use]
    pub fn over(mut self, limit: Limit) -> Self {
        self.limit = Some(limit);
        self
    }
}

/// A limit of an element's own; what is above it is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Limit {
    /// So many tracked flows at once (`ct count over N`).
    Flows(u32),
    /// So many packets a second, and as many at once (`limit rate over N/second`).
    PerSecond(u32),
}

/// Packets and bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Counter {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Attributes being put together.
#[derive(Debug, Default)]
struct Attributes(Vec<u8>);

impl Attributes {
    fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        self.0
            .extend_from_slice(&((value.len() + 4) as u16).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    /// nftables speaks network order.
    fn number(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    fn nest(self, kind: u16, inner: Attributes) -> Self {
        self.bytes(kind | NESTED, &inner.0)
    }
}

impl Table {
    /// A table of this name.
    pub fn new(family: Family, name: impl Into<String>) -> Self {
        Self {
            family,
            name: name.into(),
        }
    }

    /// Makes the table; one that exists stays as it is.
    pub fn create(&self) -> Request {
        self.request(
            "make table",
            NEWTABLE,
            CREATE,
            Attributes::default().text(1, &self.name),
        )
    }

    /// Deletes the table with all that is in it.
    pub fn delete(&self) -> Request {
        self.request(
            "delete table",
            DELTABLE,
            0,
            Attributes::default().text(1, &self.name),
        )
    }

    /// Adds an element, which must not be there.
    pub fn add_element(&self, set: &str, element: &Element) -> Request {
        self.request(
            &format!("add an element to set {set} of"),
            NEWSETELEM,
            CREATE | EXCL,
            self.list_of(set, encode(element)),
        )
    }

    /// Deletes the element with this key, which must be there.
    pub fn delete_element(&self, set: &str, element: &Element) -> Request {
        let key = Element {
            key: element.key.clone(),
            key_end: element.key_end.clone(),
            ..Element::default()
        };
        self.request(
            &format!("delete an element from set {set} of"),
            DELSETELEM,
            0,
            self.list_of(set, encode(&key)),
        )
    }

    /// Makes a chain that sees every frame a device receives before anything else does, and
    /// drops what its rules do not send somewhere.
    pub fn add_ingress_chain(&self, chain: &str, device: &str) -> Request {
        // NFTA_HOOK_HOOKNUM = ingress (0), NFTA_HOOK_PRIORITY = 0, NFTA_HOOK_DEV
        let hook = Attributes::default().number(1, 0).number(2, 0).text(3, device);
        let attributes = Attributes::default()
            .text(1, &self.name)
            .text(3, chain)
            .nest(4, hook)
            .number(5, 0)
            .text(7, "filter");
        self.request(
            &format!("make chain {chain} of"),
            NEWCHAIN,
            CREATE | EXCL,
            attributes,
        )
    }

    /// Deletes a chain with its rules.
    pub fn delete_chain(&self, chain: &str) -> Request {
        self.request(
            &format!("delete chain {chain} of"),
            DELCHAIN,
            0,
            Attributes::default().text(1, &self.name).text(3, chain),
        )
    }

    /// Adds a rule at the end of a chain.
    pub fn add_rule(&self, chain: &str, steps: &[Step]) -> Request {
        let expressions = steps
            .iter()
            .flat_map(Step::expressions)
            .fold(Attributes::default(), |all, one| all.nest(1, one));
        let attributes = Attributes::default()
            .text(1, &self.name)
            .text(2, chain)
            .nest(4, expressions);
        const APPEND: u16 = 0x800;
        self.request(
            &format!("add a rule to chain {chain} of"),
            NEWRULE,
            CREATE | APPEND,
            attributes,
        )
    }

    fn list_of(&self, set: &str, element: Attributes) -> Attributes {
        Attributes::default()
            .text(1, &self.name)
            .text(2, set)
            .nest(3, Attributes::default().nest(1, element))
    }

    fn request(&self, what: &str, message: u16, flags: u16, attributes: Attributes) -> Request {
        let mut payload = vec![self.family.number(), 0, 0, 0];
        payload.extend_from_slice(&attributes.0);
        Request::new(
            format!("{what} table {}", self.name),
            SUBSYSTEM << 8 | message,
            flags,
            payload,
        )
    }
}

/// An element as the kernel takes it.
fn encode(element: &Element) -> Attributes {
    const DATA: u16 = 2;
    let value = |bytes: &[u8]| Attributes::default().bytes(1, bytes);
    let mut attributes = Attributes::default().nest(SET_ELEM_KEY, value(&element.key));
    if let Some(data) = &element.data {
        attributes = attributes.nest(DATA, value(data));
    }
    if let Some(limit) = element.limit {
        let counter = expression("counter", Attributes::default());
        let both = Attributes::default().nest(1, limit.expression()).nest(1, counter);
        attributes = attributes.nest(SET_ELEM_EXPRESSIONS, both);
    }
    if let Some(end) = &element.key_end {
        attributes = attributes.nest(SET_ELEM_KEY_END, value(end));
    }
    attributes
}

impl Limit {
    /// Both kinds have a flag that turns them round: what is above goes on.
    const ABOVE: u32 = 1;

    fn expression(self) -> Attributes {
        match self {
            // NFTA_CONNLIMIT_COUNT, NFTA_CONNLIMIT_FLAGS
            Limit::Flows(count) => {
                let data = Attributes::default().number(1, count).number(2, Self::ABOVE);
                expression("connlimit", data)
            }
            // NFTA_LIMIT_RATE, NFTA_LIMIT_UNIT (in seconds), NFTA_LIMIT_BURST, NFTA_LIMIT_TYPE
            // (packets), NFTA_LIMIT_FLAGS
            Limit::PerSecond(rate) => {
                let data = Attributes::default()
                    .bytes(1, &u64::from(rate).to_be_bytes())
                    .bytes(2, &1u64.to_be_bytes())
                    .number(3, rate)
                    .number(4, 0)
                    .number(5, Self::ABOVE);
                expression("limit", data)
            }
        }
    }

    /// Reads an expression back; `None` for one of another kind.
    fn read(name: &str, data: &BTreeMap<u16, &[u8]>) -> Option<Self> {
        match name {
            "connlimit" => {
                let count = data.get(&1).copied()?.try_into().ok()?;
                Some(Limit::Flows(u32::from_be_bytes(count)))
            }
            "limit" => {
                let rate = data.get(&1).copied()?.try_into().ok()?;
                u32::try_from(u64::from_be_bytes(rate)).ok().map(Limit::PerSecond)
            }
            _ => None,
        }
    }
}

fn expression(name: &str, data: Attributes) -> Attributes {
    Attributes::default().text(1, name).nest(2, data)
}

impl Step {
    fn expressions(&self) -> Vec<Attributes> {
        let load = |value: u32| {
            // A number in host order, as the packet's priority and an interface index are.
            let data = Attributes::default().bytes(1, &value.to_ne_bytes());
            expression(
                "immediate",
                Attributes::default().number(1, REGISTER).nest(2, data),
            )
        };
        match self {
            Step::Count => vec![expression("counter", Attributes::default())],
            Step::SetPriority(priority) => {
                const META_PRIORITY: u32 = 2;
                // NFTA_META_KEY, NFTA_META_SREG
                let set = Attributes::default().number(2, META_PRIORITY).number(3, REGISTER);
                vec![load(*priority), expression("meta", set)]
            }
            Step::Forward(link) => vec![
                load(*link),
                expression("fwd", Attributes::default().number(1, REGISTER)),
            ],
            Step::Goto(chain) => {
                const GOTO: i32 = -4;
                let verdict = Attributes::default().number(1, GOTO as u32).text(2, chain);
                let data = Attributes::default().nest(2, verdict);
                vec![expression(
                    "immediate",
                    Attributes::default().number(1, REGISTER_VERDICT).nest(2, data),
                )]
            }
        }
    }
}

/// A field of a key or of data: its bytes, padded to four.
pub fn field(bytes: &[u8]) -> Vec<u8> {
    let mut padded = bytes.to_vec();
    padded.resize(padded.len().next_multiple_of(4), 0);
    padded
}

/// A field that holds an interface name (`ifname`): sixteen bytes.
pub fn device_field(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(libc::IFNAMSIZ, 0);
    bytes
}

/// The name in such a field.
pub fn device_of_field(field: &[u8]) -> Option<String> {
    let name = field.get(..libc::IFNAMSIZ)?;
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    String::from_utf8(name[..end].to_vec()).ok()
}

impl Connection {
    /// Carries out all the changes, or none of them.
    pub fn commit(&mut self, changes: &[Request]) -> Result<()> {
        // The subsystem stands where other messages have a resource id, in network order.
        let frame = |kind| {
            let mut payload = vec![0, 0];
            payload.extend_from_slice(&SUBSYSTEM.to_be_bytes());
            Request::new("change the packet filter", kind, 0, payload)
        };
        self.transaction(&frame(BATCH_BEGIN), changes, &frame(BATCH_END))
    }

    /// Whether a table is there.
    pub fn has_table(&mut self, table: &Table) -> Result<bool> {
        let request = table
            .request("look up", GETTABLE, 0, Attributes::default().text(1, &table.name))
            .tolerate(libc::ENOENT);
        Ok(!self.get(&request)?.is_empty())
    }

    /// The elements of a set or map, and what they have counted where the set counts.
    pub fn elements(&mut self, table: &Table, set: &str) -> Result<Vec<(Element, Option<Counter>)>> {
        let attributes = Attributes::default().text(1, &table.name).text(2, set);
        let request = table.request(&format!("list set {set} of"), GETSETELEM, 0, attributes);
        let mut elements = Vec::new();
        for (_, payload) in self.dump(&request)? {
            let Some(list) = nested(&payload, 3)? else {
                continue;
            };
            for item in NlasIterator::new(list) {
                elements.extend(read_element(
                    item.map_err(|e| decode("set elements", e))?.value(),
                )?);
            }
        }
        Ok(elements)
    }

    /// The names of a table's chains.
    pub fn chains(&mut self, table: &Table) -> Result<Vec<String>> {
        // A dump of chains cannot be narrowed to a table: all of the family come.
        let request = table.request("list the chains of", GETCHAIN, 0, Attributes::default());
        let mut chains = Vec::new();
        for (_, payload) in self.dump(&request)? {
            let attributes = attributes(payload.get(4..).unwrap_or(&[]))?;
            if attributes.get(&1).is_some_and(|name| text(name) == table.name) {
                chains.extend(attributes.get(&3).map(|name| text(name)));
            }
        }
        Ok(chains)
    }

    /// The named counters of a table.
    pub fn named_counters(&mut self, table: &Table) -> Result<BTreeMap<String, Counter>> {
        const OBJECT_COUNTER: u32 = 1;
        let attributes_of_request = Attributes::default()
            .text(1, &table.name)
            .number(3, OBJECT_COUNTER);
        let request = table.request("list the counters of", GETOBJ, 0, attributes_of_request);
        let mut counters = BTreeMap::new();
        for (_, payload) in self.dump(&request)? {
            let object = attributes(payload.get(4..).unwrap_or(&[]))?;
            if let (Some(name), Some(data)) = (object.get(&2), object.get(&4)) {
                counters.extend(read_counts(data)?.map(|counter| (text(name), counter)));
            }
        }
        Ok(counters)
    }
}

fn read_element(bytes: &[u8]) -> Result<Option<(Element, Option<Counter>)>> {
    let element = attributes(bytes)?;
    let value = |kind| -> Result<Option<Vec<u8>>> {
        let Some(data) = element.get(&kind) else {
            return Ok(None);
        };
        Ok(attributes(data)?.get(&1).map(|v| v.to_vec()))
    };
    let Some(key) = value(SET_ELEM_KEY)? else {
        return Ok(None);
    };
    // One expression stands alone, several in a list.
    let mut expressions: Vec<Vec<u8>> = element
        .get(&SET_ELEM_EXPR)
        .map(|e| e.to_vec())
        .into_iter()
        .collect();
    for item in NlasIterator::new(element.get(&SET_ELEM_EXPRESSIONS).copied().unwrap_or_default()) {
        expressions.push(
            item.map_err(|e| decode("the expressions of an element", e))?
                .value()
                .to_vec(),
        );
    }
    let (mut limit, mut counter) = (None, None);
    for expression in expressions {
        let parts = attributes(&expression)?;
        let (Some(name), Some(data)) = (parts.get(&1).map(|n| text(n)), parts.get(&2)) else {
            continue;
        };
        if name == "counter" {
            counter = read_counts(data)?;
        } else {
            limit = limit.or(Limit::read(&name, &attributes(data)?));
        }
    }
    let element = Element {
        key,
        key_end: value(SET_ELEM_KEY_END)?,
        data: value(2)?,
        limit,
    };
    Ok(Some((element, counter)))
}

fn read_counts(data: &[u8]) -> Result<Option<Counter>> {
    let data = attributes(data)?;
    let number = |kind| {
        data.get(&kind)
            .and_then(|v| (*v).try_into().ok())
            .map(u64::from_be_bytes)
    };
    Ok(number(1)
        .zip(number(2))
        .map(|(bytes, packets)| Counter { packets, bytes }))
}

/// The value of one attribute of a message, which begins with the four bytes of its own header.
fn nested(payload: &[u8], kind: u16) -> Result<Option<&[u8]>> {
    Ok(attributes(payload.get(4..).unwrap_or(&[]))?.get(&kind).copied())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_reads_back_as_it_was_asked_for() {
        let key = [device_field("mtap5"), field(&[1, 2, 3, 4, 5, 6])].concat();
        assert_eq!(device_of_field(&key).as_deref(), Some("mtap5"));
        let plain = Element::new(key.clone()).with(vec![9; 4]);
        let interval = plain.clone().up_to(vec![0xff; 24]);
        let limited = [Limit::Flows(1_000), Limit::PerSecond(10)].map(|l| Element::new(key.clone()).over(l));
        for element in [plain, interval].iter().chain(&limited) {
            assert_eq!(key.len(), 24);
            let Attributes(bytes) = encode(element);
            let (read, _) = read_element(&bytes).unwrap().unwrap();
            assert_eq!(read, *element);
        }
    }

    #[test]
    fn attributes_cut_short_are_an_error() {
        let Attributes(bytes) = Attributes::default().text(1, "name").number(2, 7);
        assert_eq!(attributes(&bytes).unwrap()[&2], 7u32.to_be_bytes());
        assert!(attributes(&bytes[..bytes.len() - 1]).is_err());
        assert!(attributes(&[2, 0, 1, 0]).is_err());
    }
}
