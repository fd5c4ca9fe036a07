//! What is in the kernel, and bringing it to what is recorded.

use std::collections::{BTreeMap, BTreeSet};

use super::core::{Core, Result, mute};
use super::elements::{Entry, Owner, Set};
use super::plan::{SliverNet, index_of_tap};
use super::tables::{self, Tables, address_of_source};
use super::{Installed, Reconciled, ruleset};

impl Core {
    /// What is in the kernel's tables.
    pub fn list(&mut self) -> Result<BTreeMap<u16, Installed>> {
        let tables = Tables::read(&mut self.filter)?;
        let routes = self.route.host_routes()?;
        let links = self.taps()?;
        let mut found: BTreeMap<u16, Installed> = BTreeMap::new();
        for (index, slot) in self.shaping.slots(&mut self.route)? {
            found.entry(index).or_default().class = Some(slot.class.parameters);
        }
        for (index, device) in &links {
            let one = found.entry(*index).or_default();
            one.tap = true;
            one.routed = routes.iter().any(|(_, to)| *to == device.index);
        }
        for (set, element) in tables.entries() {
            let Some(Owner::Tap(tap)) = set.owner(element) else {
                continue;
            };
            let Some(index) = index_of_tap(&tap) else { continue };
            let one = found.entry(index).or_default();
            match set {
                Set::Sources => one.address = address_of_source(element),
                Set::Marks => {
                    one.mark = element
                        .data
                        .as_deref()
                        .and_then(|d| d.try_into().ok())
                        .map(u32::from_ne_bytes)
                }
                _ => {}
            }
        }
        Ok(found)
    }

    /// Makes the kernel's tables what is recorded.
    pub fn reconcile(&mut self, recorded: &[SliverNet]) -> Result<Reconciled> {
        let mut report = Reconciled::default();
        let tables = Tables::read(&mut self.filter)?;
        let links = self.taps()?;
        let routes: BTreeSet<_> = self.route.host_routes()?.into_iter().collect();
        let classes = self.shaping.slots(&mut self.route)?;
        let alive: BTreeMap<u16, &SliverNet> = recorded
            .iter()
            .filter(|s| links.contains_key(&s.index))
            .map(|s| (s.index, s))
            .collect();
        self.slivers = alive.iter().map(|(index, s)| (*index, (*s).clone())).collect();
        // A day's bytes may have been used up while nobody looked.
        let now = self.clock.now();
        for (index, sliver) in &self.slivers {
            if let Some(slot) = classes.get(index) {
                let sent = slot.class.stats.bytes;
                self.ledger.count(&sliver.wants.slice, sliver.mark, sent, now);
            }
        }
        let known: Vec<_> = self
            .slivers
            .values()
            .map(|s| (s.index, self.bandwidth(s)))
            .collect();
        self.shaping.know(known)?;

        let wanted: BTreeMap<u16, BTreeSet<Entry>> = alive
            .iter()
            .map(|(index, s)| Ok((*index, self.elements(s)?)))
            .collect::<Result<_>>()?;
        let there: BTreeSet<Entry> = tables.entries().cloned().collect();
        let mut changes = tables::difference(&there, &wanted.values().flatten().cloned().collect());
        for name in tables
            .chains
            .iter()
            .filter(|name| index_of_tap(name).is_some_and(|i| !alive.contains_key(&i)))
        {
            changes.push(ruleset::frames().delete_chain(name));
        }
        let unchained = |sliver: &&SliverNet| !tables.chains.contains(&sliver.tap);
        changes.extend(
            alive
                .values()
                .copied()
                .filter(unchained)
                .flat_map(|s| tables::chain(&s.tap)),
        );

        let (mut silenced, mut requests) = (Vec::new(), Vec::new());
        for (index, sliver) in &alive {
            let device = &links[index];
            let class = self.shaping.wanted(*index)?;
            let shaped = class.is_some_and(|class| classes.get(index).is_some_and(|slot| slot.is(&class)));
            let linked = device.up && sliver.addresses().all(|a| routes.contains(&(a, device.index)));
            if !shaped {
                requests.extend(self.shaping.again(*index)?);
            }
            if !linked {
                requests.extend(self.link_requests(sliver, device.index));
            }
            let elements = wanted.get(index).into_iter().flatten();
            let whole = elements.clone().all(|e| there.contains(e)) && !unchained(sliver);
            if shaped && linked && whole {
                report.intact.push(*index)
            } else {
                report.repaired.push(*index)
            }
        }
        let mut gone: BTreeSet<u16> = classes.keys().chain(links.keys()).copied().collect();
        gone.extend(tables.taps().filter_map(|tap| index_of_tap(&tap)));
        gone.extend(recorded.iter().map(|s| s.index));
        for index in gone.into_iter().filter(|index| !alive.contains_key(index)) {
            requests.extend(self.shaping.remove(index)?);
            // Some process may hold the tap still, though nobody should.
            silenced.extend(links.get(&index).map(mute));
            let known = recorded.iter().any(|s| s.index == index);
            if known {
                report.dead.push(index)
            } else {
                report.unknown.push(index)
            }
        }
        self.route.execute(&silenced)?;
        self.filter.commit(&changes)?;
        self.route.execute(&requests)?;
        for dead in recorded.iter().filter(|s| report.dead.contains(&s.index)) {
            self.filter.end_flows(dead.mark)?;
        }
        Ok(report)
    }
}
