//! What the packet filter holds, read back from the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use mandoline_limits::netlink::nft::{Counter, Element, Step, device_of_field};
use mandoline_limits::netlink::{Connection, Request};

use super::elements::{Entry, Owner, Set};
use super::{NetError, ruleset};

/// What the packet filter's sets hold, and the taps that have a chain.
pub(super) struct Tables {
    entries: BTreeMap<Entry, Option<Counter>>,
    pub(super) chains: Vec<String>,
}

impl Tables {
    pub(super) fn read(filter: &mut Connection) -> Result<Self, NetError> {
        let mut entries = BTreeMap::new();
        for set in Set::ALL {
            let elements = filter.elements(&set.table(), set.name())?;
            entries.extend(elements.into_iter().map(|(e, counter)| ((set, e), counter)));
        }
        Ok(Self {
            entries,
            chains: filter.chains(&ruleset::frames())?,
        })
    }

    /// Everything, with what it has counted.
    pub(super) fn all(&self) -> impl Iterator<Item = (Set, &Element, Option<Counter>)> {
        self.entries.iter().map(|((set, e), counter)| (*set, e, *counter))
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.keys()
    }

    /// Names of the taps that anything here belongs to.
    pub(super) fn taps(&self) -> impl Iterator<Item = String> {
        let keyed = self.entries().filter_map(|(set, e)| match set.owner(e) {
            Some(Owner::Tap(tap)) => Some(tap),
            _ => None,
        });
        keyed.chain(self.chains.iter().cloned())
    }

    /// All that belongs to a tap, or to the address behind it.
    pub(super) fn of(&self, tap: &str) -> BTreeSet<Entry> {
        let address = self
            .entries()
            .filter(|(set, e)| *set == Set::Sources && device_of_field(&e.key).as_deref() == Some(tap))
            .find_map(|(_, e)| address_of_source(e));
        let owners = [Some(Owner::Tap(tap.to_owned())), address.map(Owner::Address)];
        let owned = |(set, e): &&Entry| set.owner(e).is_some_and(|o| owners.contains(&Some(o)));
        self.entries().filter(owned).cloned().collect()
    }

    /// What takes away all that belongs to a tap.
    pub(super) fn removals(&self, tap: &str) -> Vec<Request> {
        let mut changes: Vec<_> = self.of(tap).iter().map(|(set, e)| set.delete(e)).collect();
        // Older kernels delete a chain with its device; then there is nothing left to delete.
        if self.chains.iter().any(|name| name == tap) {
            changes.push(ruleset::frames().delete_chain(tap));
        }
        changes
    }
}

/// What turns the elements `there` into those that are `wanted`.
pub(super) fn difference(there: &BTreeSet<Entry>, wanted: &BTreeSet<Entry>) -> Vec<Request> {
    // Elements that go come first in the transaction: a key may come back with other data.
    let gone = there.difference(wanted).map(|(set, e)| set.delete(e));
    gone.chain(wanted.difference(there).map(|(set, e)| set.add(e)))
        .collect()
}

/// The ingress chain of a tap: everything to the common checks, and what comes back is dropped.
pub(super) fn chain(tap: &str) -> [Request; 2] {
    let table = ruleset::frames();
    [
        table.add_ingress_chain(tap, tap),
        table.add_rule(tap, &[Step::Goto("from_tap".to_owned())]),
    ]
}

/// The sliver's address in an element of [`Set::Sources`].
pub(super) fn address_of_source(element: &Element) -> Option<Ipv4Addr> {
    // ifname (16), Ethernet address (6, padded to 8), IPv4 address
    let octets: [u8; 4] = element.key.get(24..28)?.try_into().ok()?;
    Some(octets.into())
}
