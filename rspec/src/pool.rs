//! Pool arithmetic: split, give back, add, with conservation of reservations and sets.
//!
//! ```text
//!            split(want)                       merge_back(child)
//!   pool ─────────────────► pool' + child   ─────────────────────► pool
//!
//!   reservation   pool' = pool − want        limit, weight   want ≤ pool, pool' = pool
//!   set           pool' = pool \ want        interval        want within pool
//!   label         carried by the child alone
//! ```
//!
//! A reservation or set that a pool does not name is empty; a limit, weight or interval that it does not
//! name is unbounded (architecture paper, section 5.2.3: whatever the node has).

use crate::attributes::{ATTRIBUTES, Kind, attribute};
use crate::{Rspec, RspecError, Value};

impl Rspec {
    /// Checks `want` against this pool's limits, weights and intervals alone: what a bound from further up
    /// the tree of pools asks, where nothing is subtracted.
    pub fn check_within(&self, want: &Rspec) -> Result<(), RspecError> {
        for attribute in ATTRIBUTES {
            let (Some(value), Some(bound)) = (want.get(attribute.name), self.get(attribute.name)) else {
                continue;
            };
            let fits = match (attribute.kind, value, bound) {
                (Kind::Limit | Kind::Weight, Value::Number(value), Value::Number(bound)) => value <= bound,
                (Kind::Interval, Value::Time(value), Value::Time(bound)) => match attribute.name {
                    "start_time" => value >= bound,
                    _ => value <= bound,
                },
                _ => true,
            };
            if !fits {
                let relation = match (attribute.kind, attribute.name) {
                    (Kind::Interval, "start_time") => "not before",
                    (Kind::Interval, _) => "not after",
                    _ => "at most",
                };
                return Err(exceeds(
                    attribute.name,
                    value,
                    format!("{relation} {}", bound.display(attribute)),
                ));
            }
        }
        let time = |name| match want.get(name) {
            Some(Value::Time(time)) => Some(*time),
            _ => None,
        };
        if let (Some(start), Some(end)) = (time("start_time"), time("end_time"))
            && start >= end
        {
            return Err(RspecError::Invalid {
                attribute: "end_time".to_owned(),
                value: end.to_string(),
                problem: "not after start_time",
                allowed: format!("after {start}"),
            });
        }
        Ok(())
    }

    /// Splits `want` off this pool, which keeps the rest, and returns the child. On an error nothing changes.
    pub fn split(&mut self, want: &Rspec) -> Result<Rspec, RspecError> {
        self.check_within(want)?;
        for attribute in ATTRIBUTES {
            match (attribute.kind, want.get(attribute.name)) {
                (Kind::Reservation, Some(Value::Number(value))) => {
                    let have = self.number(attribute.name).unwrap_or(0);
                    if *value > have {
                        let have = Value::Number(have).display(attribute);
                        return Err(exceeds(
                            attribute.name,
                            &Value::Number(*value),
                            format!("at most {have}"),
                        ));
                    }
                }
                (Kind::Set, Some(Value::Ports(ports))) => {
                    let have = self.ports();
                    if !have.contains_all(ports) {
                        let allowed = match have.is_empty() {
                            true => "none: the pool has none left".to_owned(),
                            false => have.to_string(),
                        };
                        return Err(exceeds(attribute.name, &Value::Ports(ports.clone()), allowed));
                    }
                }
                _ => {}
            }
        }
        self.take_out(want);
        Ok(want.clone())
    }

    /// Takes a child's reservations and sets out, as far as they are there, whatever the limits say. For who
    /// knows that the child was split from this pool: the rest of a pool is what it was made with less all
    /// its children.
    pub fn take_out(&mut self, child: &Rspec) {
        for attribute in ATTRIBUTES {
            match (
                attribute.kind,
                self.get(attribute.name),
                child.get(attribute.name),
            ) {
                (Kind::Reservation, Some(Value::Number(have)), Some(Value::Number(gone))) => {
                    let left = have.saturating_sub(*gone);
                    self.put(attribute.name, Value::Number(left));
                }
                (Kind::Set, Some(Value::Ports(have)), Some(Value::Ports(gone))) => {
                    let mut left = have.clone();
                    left.subtract(gone);
                    self.put(attribute.name, Value::Ports(left));
                }
                _ => {}
            }
        }
    }

    /// Takes a child's reservations and sets back into the pool that it was split from.
    pub fn merge_back(&mut self, child: &Rspec) -> Result<(), RspecError> {
        self.combine(child, |kind| matches!(kind, Kind::Reservation | Kind::Set))
    }

    /// Adds the resources of a further pool to those that a sliver has: reservations, limits and weights add
    /// up, sets unite, labels that the further pool names replace the old ones. A limit that this rspec does
    /// not name is unbounded and stays so. Time bounds stay the sliver's own.
    pub fn add(&mut self, more: &Rspec) -> Result<(), RspecError> {
        let mut sum = self.clone();
        sum.combine(more, |kind| {
            matches!(kind, Kind::Reservation | Kind::Set | Kind::Limit | Kind::Weight)
        })?;
        for (name, value) in more.iter() {
            // What a VM is cannot change while it lives.
            if name != "vm_type" && attribute(name).is_none_or(|a| a.kind == Kind::Label) {
                sum.put(name, value.clone());
            }
        }
        *self = sum;
        Ok(())
    }

    fn combine(&mut self, other: &Rspec, takes: impl Fn(Kind) -> bool) -> Result<(), RspecError> {
        let mut sum = self.clone();
        for attribute in ATTRIBUTES.iter().filter(|a| takes(a.kind)) {
            let Some(value) = other.get(attribute.name) else {
                continue;
            };
            match (self.get(attribute.name), value) {
                (Some(Value::Number(a)), Value::Number(b)) => {
                    let total = a
                        .checked_add(*b)
                        .ok_or_else(|| too_large(attribute.name, value))?;
                    let total = match (attribute.kind, attribute.value) {
                        // Weights saturate: more than the largest share is no more than it.
                        (Kind::Weight, crate::Type::Count { max, .. }) => total.min(max),
                        _ => total,
                    };
                    sum.put(attribute.name, Value::Number(total));
                }
                (Some(Value::Ports(a)), Value::Ports(b)) => {
                    if a.overlaps(b) {
                        return Err(exceeds(attribute.name, value, format!("disjoint from {a}")));
                    }
                    let mut union = a.clone();
                    union.union(b);
                    sum.put(attribute.name, Value::Ports(union));
                }
                (None, value) if !matches!(attribute.kind, Kind::Limit) => {
                    sum.put(attribute.name, value.clone());
                }
                _ => {}
            }
        }
        *self = sum;
        Ok(())
    }
}

fn exceeds(name: &str, value: &Value, allowed: String) -> RspecError {
    let value = attribute(name).map_or_else(|| value.to_json().to_string(), |a| value.display(a));
    RspecError::Exceeds {
        attribute: name.to_owned(),
        value,
        allowed,
    }
}

fn too_large(name: &str, value: &Value) -> RspecError {
    RspecError::Invalid {
        attribute: name.to_owned(),
        value: value.to_json().to_string(),
        problem: "too large to add",
        allowed: "a sum below 2^64".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn rspec(json: serde_json::Value) -> Rspec {
        Rspec::from_json(&json).unwrap()
    }

    #[test]
    fn the_owners_example() {
        let mut node = rspec(json!({"cpu_guarantee": 1000, "burst_rate": "10 Mbit/s"}));
        let scs = node.split(&rspec(json!({"cpu_guarantee": 850}))).unwrap();
        assert_eq!(scs.number("cpu_guarantee"), Some(850));
        assert_eq!(node.number("cpu_guarantee"), Some(150));
        let error = node.split(&rspec(json!({"cpu_guarantee": 151}))).unwrap_err();
        assert_eq!(error.allowed(), Some("at most 150"));
        let error = node.split(&rspec(json!({"peak_rate": "11 Mbit/s"}))).unwrap_err();
        assert_eq!(
            (error.attribute(), error.value(), error.allowed()),
            (Some("burst_rate"), Some("11 Mbit/s"), Some("at most 10 Mbit/s"))
        );
    }

    #[test]
    fn ports_have_one_owner() {
        let mut pool = rspec(json!({"ports": ["tcp/80-90"]}));
        pool.split(&rspec(json!({"ports": "tcp/85"}))).unwrap();
        assert!(pool.split(&rspec(json!({"ports": "tcp/85"}))).is_err());
        assert!(pool.split(&rspec(json!({"ports": "udp/80"}))).is_err());
        assert_eq!(pool.ports().to_string(), "tcp/80-84,tcp/86-90");
    }

    #[test]
    fn intervals_are_contained() {
        let mut pool = rspec(json!({"end_time": "2026-12-01T00:00:00Z"}));
        assert!(
            pool.split(&rspec(json!({"end_time": "2026-12-02T00:00:00Z"})))
                .is_err()
        );
        assert!(
            pool.split(&rspec(json!({"end_time": "2026-11-30T00:00:00Z"})))
                .is_ok()
        );
        let backwards = json!({"start_time": "2026-11-02T00:00:00Z", "end_time": "2026-11-01T00:00:00Z"});
        assert!(pool.split(&rspec(backwards)).is_err());
    }

    #[test]
    fn adding_to_a_sliver() {
        let mut sliver = rspec(
            json!({"vm_type": "kvm-microvm", "cpu_share": 1, "mem_limit": "256 MiB", "keys": ["ssh-ed25519 A"]}),
        );
        let more = rspec(
            json!({"vm_type": "other", "cpu_share": 9, "mem_limit": "64 MiB", "burst_rate": "1 Mbit/s", "keys": ["ssh-ed25519 B"]}),
        );
        sliver.add(&more).unwrap();
        assert_eq!(sliver.number("cpu_share"), Some(10));
        assert_eq!(sliver.number("mem_limit"), Some(320 << 20));
        assert_eq!(sliver.number("burst_rate"), None);
        assert_eq!(sliver.vm_type(), Some("kvm-microvm"));
        assert_eq!(sliver.keys(), ["ssh-ed25519 B"]);
    }

    const RESERVED: [&str; 4] = ["cpu_guarantee", "mem_reserve", "disk_reserve", "base_rate"];

    #[derive(Debug, Clone)]
    enum Step {
        Split {
            pool: usize,
            amounts: [Option<u64>; 4],
            port: Option<u16>,
            limit: Option<u64>,
        },
        Release {
            pool: usize,
        },
    }

    fn step() -> impl Strategy<Value = Step> {
        let amount = || proptest::option::of(0u64..400);
        prop_oneof![
            3 => (any::<usize>(), [amount(), amount(), amount(), amount()],
                  proptest::option::of(1u16..50), proptest::option::of(0u64..3000))
                .prop_map(|(pool, amounts, port, limit)| Step::Split { pool, amounts, port, limit }),
            1 => any::<usize>().prop_map(|pool| Step::Release { pool }),
        ]
    }

    proptest! {
        /// Whatever is split and given back in whatever order, reservations and ports sum to what the root
        /// had, no port has two owners, and no child's limit passes its parent's.
        #[test]
        fn conservation(steps in proptest::collection::vec(step(), 0..60)) {
            let root = rspec(json!({
                "cpu_guarantee": 1000, "mem_reserve": 1000, "disk_reserve": 1000, "base_rate": 1000,
                "ports": "tcp/1-49", "burst_rate": 2000,
            }));
            // (rest, parent); a released pool leaves None behind so that indices hold.
            let mut pools: Vec<Option<(Rspec, Option<usize>)>> = vec![Some((root.clone(), None))];
            for step in steps {
                match step {
                    Step::Split { pool, amounts, port, limit } => {
                        let index = pool % pools.len();
                        let Some((rest, _)) = pools[index].as_mut() else { continue };
                        let mut want = Rspec::new();
                        for (name, amount) in RESERVED.iter().zip(amounts) {
                            if let Some(amount) = amount.map(|a| a.min(1000)) {
                                want.put(name, Value::Number(amount));
                            }
                        }
                        if let Some(port) = port {
                            want.set_json("ports", &json!(format!("tcp/{port}"))).unwrap();
                        }
                        if let Some(limit) = limit {
                            want.put("burst_rate", Value::Number(limit));
                        }
                        let before = rest.clone();
                        match rest.split(&want) {
                            Ok(child) => {
                                if let (Some(a), Some(b)) = (child.number("burst_rate"), before.number("burst_rate")) {
                                    prop_assert!(a <= b);
                                }
                                pools.push(Some((child, Some(index))));
                            }
                            Err(error) => {
                                prop_assert!(error.attribute().is_some() && error.allowed().is_some());
                                prop_assert_eq!(&*rest, &before);
                            }
                        }
                    }
                    Step::Release { pool } => {
                        let index = pool % pools.len();
                        let has_children = pools.iter().flatten().any(|(_, parent)| *parent == Some(index));
                        if index == 0 || has_children { continue; }
                        let Some((rest, Some(parent))) = pools[index].take() else { continue };
                        let Some((parent, _)) = pools[parent].as_mut() else { unreachable!() };
                        parent.merge_back(&rest).unwrap();
                    }
                }
                for name in RESERVED {
                    let sum: u64 = pools.iter().flatten().map(|(r, _)| r.number(name).unwrap_or(0)).sum();
                    prop_assert_eq!(sum, 1000, "{}", name);
                }
                let ports: usize = pools.iter().flatten().map(|(r, _)| r.ports().len()).sum();
                prop_assert_eq!(ports, 49);
                let mut union = crate::PortSet::default();
                for (r, _) in pools.iter().flatten() { union.union(&r.ports()); }
                prop_assert_eq!(union.len(), 49);
            }
        }

        #[test]
        fn no_json_makes_parsing_panic(text in "\\{(\"(cpu_share|mem_limit|ports|keys|end_time|x-a)\":(-?[0-9]{0,30}(\\.[0-9]{1,3})?|\"[a-z0-9 /.-]{0,12}\"|null|\\[\"[a-z0-9/-]{0,9}\"\\])){0,1}\\}") {
            if let Ok(json) = serde_json::from_str::<serde_json::Value>(&text)
                && let Ok(rspec) = Rspec::from_json(&json)
            {
                prop_assert_eq!(Rspec::from_json(&rspec.to_json()).unwrap(), rspec);
            }
        }
    }
}
