//! How a node, its pools and its slivers are shown.

use std::collections::BTreeMap;

use mandoline_api::nodemgr::{
    ListAnswer, NodeInfo, NodeUse, PoolInfo, SliverInfo, SliverState, SliverUse, Usage,
};
use mandoline_rspec::{ATTRIBUTES, Kind, Rspec, format_bytes};

use crate::output::table;
use crate::rspec_args::people;

/// The node at a glance.
pub(super) fn status(node: &NodeInfo, usage: &Usage, list: &ListAnswer) -> String {
    let mut text = head(&usage.node);
    for vm_type in &node.vm_types {
        let state = match (&vm_type.detail, vm_type.available) {
            (_, true) => "available".to_owned(),
            (detail, false) => format!(
                "NOT AVAILABLE: {}",
                detail.as_deref().unwrap_or("no reason given")
            ),
        };
        text.push_str(&format!("vm_type   {}: {state}\n", vm_type.name));
    }
    let most = node.limits.get("slivers").copied().unwrap_or(0);
    text.push_str(&format!(
        "slivers   {} of {most}{}\n",
        list.slivers.len(),
        by_state(&usage.slivers)
    ));
    text.push_str(&format!("pools     {}\n\n", list.pools.len()));
    text.push_str(&capacity(node));
    for sliver in failed(list) {
        let reason = sliver.event.reason.as_deref().unwrap_or("no reason given");
        text.push_str(&format!(
            "\n\n{} (vm_id {}) has failed: {reason}",
            sliver.account, sliver.event.vm_id
        ));
        text.push_str(&format!(
            "\n  mandoline node logs {0}; mandoline node console {0}",
            sliver.account
        ));
    }
    text
}

/// The node's own use, in three lines.
pub(super) fn head(node: &NodeUse) -> String {
    let [one, five, fifteen] = node.load;
    format!(
        "up {}, {} CPUs, load {one:.2} {five:.2} {fifteen:.2}\nmemory    {} of {} available\ndisk      {} of {} free\n",
        duration(node.uptime_s),
        node.cpus,
        format_bytes(round(node.memory_available)),
        format_bytes(round(node.memory_total)),
        format_bytes(round(node.disk_free)),
        format_bytes(round(node.disk_total)),
    )
}

fn failed(list: &ListAnswer) -> impl Iterator<Item = &SliverInfo> {
    list.slivers
        .iter()
        .filter(|sliver| sliver.event.state == SliverState::Failed)
}

fn by_state(slivers: &[SliverUse]) -> String {
    let mut states = BTreeMap::<String, usize>::new();
    for sliver in slivers {
        *states.entry(word(sliver.state)).or_default() += 1;
    }
    let words: Vec<_> = states
        .iter()
        .map(|(state, count)| format!("{count} {state}"))
        .collect();
    match words.is_empty() {
        true => String::new(),
        false => format!(": {}", words.join(", ")),
    }
}

/// A state's name.
pub(super) fn word(state: SliverState) -> String {
    let json = serde_json::to_value(state).unwrap_or_default();
    json.as_str().unwrap_or_default().to_owned()
}

/// What is conserved: the node's, and what no root pool has.
fn capacity(node: &NodeInfo) -> String {
    let of = |rspec: &Rspec, name: &str| -> String {
        let json = rspec.to_json();
        let Some(value) = json.get(name) else {
            return "-".to_owned();
        };
        let one = serde_json::Map::from_iter([(name.to_owned(), value.clone())]);
        let shown = people(&one);
        shown
            .split_once(" = ")
            .map_or(shown.clone(), |(_, value)| value.to_owned())
    };
    let rows = ATTRIBUTES.iter().filter_map(|attribute| {
        node.capacity.get(attribute.name)?;
        let unassigned = match attribute.kind {
            Kind::Reservation | Kind::Set => of(&node.available, attribute.name),
            _ => "(limit)".to_owned(),
        };
        Some([
            attribute.name.to_owned(),
            of(&node.capacity, attribute.name),
            unassigned,
        ])
    });
    table(
        ["ATTRIBUTE", "NODE", "UNASSIGNED"],
        rows,
        "the node has nothing to give",
    )
}

/// A pool for programs: who reads this over a shoulder should not get the pool.
pub(super) fn without_rcap(pool: &PoolInfo) -> serde_json::Value {
    let mut json = serde_json::to_value(pool).unwrap_or_default();
    if let Some(fields) = json.as_object_mut() {
        fields.remove("rcap");
    }
    json
}

/// The pools as a tree.
pub(super) fn pools(node: &NodeInfo, list: &ListAnswer) -> String {
    let mut text = format!("node  {}\n", left(&node.available));
    branch(list, None, "", &mut text);
    if list.pools.is_empty() && list.slivers.is_empty() {
        text.push_str("no root pool: the owner's script (owner.json) or create_root_pool makes one\n");
    }
    text.trim_end().to_owned()
}

fn branch(list: &ListAnswer, parent: Option<u64>, indent: &str, text: &mut String) {
    let pools: Vec<_> = list.pools.iter().filter(|pool| pool.parent == parent).collect();
    let slivers: Vec<_> = list
        .slivers
        .iter()
        .filter(|sliver| sliver.parent == parent)
        .collect();
    let count = pools.len() + slivers.len();
    let joint = |place: usize| match place + 1 == count {
        true => ("└─ ", "   "),
        false => ("├─ ", "│  "),
    };
    for (place, pool) in pools.iter().enumerate() {
        let (mark, more) = joint(place);
        let retired = if pool.retired { ", withdrawn" } else { "" };
        text.push_str(&format!(
            "{indent}{mark}pool {} of {}{retired}: {}\n",
            pool.id,
            pool.holder,
            left(&pool.rspec)
        ));
        branch(list, Some(pool.id), &format!("{indent}{more}"), text);
    }
    for (place, sliver) in slivers.iter().enumerate() {
        let (mark, _) = joint(pools.len() + place);
        let event = &sliver.event;
        text.push_str(&format!(
            "{indent}{mark}sliver {} of {} ({}, {}): {}\n",
            event.vm_id,
            event.slice,
            event.vm_type,
            word(event.state),
            left(&sliver.rspec)
        ));
    }
}

/// The numbers of an rspec; labels such as keys would fill the screen.
fn left(rspec: &Rspec) -> String {
    let json = rspec.to_json();
    let numbers = ATTRIBUTES
        .iter()
        .filter(|attribute| !matches!(attribute.kind, Kind::Label | Kind::Interval))
        .filter_map(|attribute| Some((attribute.name.to_owned(), json.get(attribute.name)?.clone())));
    let numbers: serde_json::Map<_, _> = numbers.collect();
    match numbers.is_empty() {
        true => "nothing of its own".to_owned(),
        false => people(&numbers),
    }
}

/// What slivers use against what they may.
pub(super) fn slivers(slivers: &[SliverUse]) -> String {
    let rows = slivers.iter().map(|of| {
        [
            of.slice.clone(),
            of.vm_id.to_string(),
            word(of.state),
            format!("{:.1} s", of.cpu_us as f64 / 1e6),
            against(of.memory, of.mem_limit),
            against(of.disk, of.disk_quota),
            format_bytes(round(of.sent_bytes)),
            format_bytes(round(of.received_bytes)),
        ]
    });
    let head = [
        "SLICE", "VM_ID", "STATE", "CPU TIME", "MEMORY", "DISK", "SENT", "RECEIVED",
    ];
    table(head, rows, "no slivers")
}

/// `use of limit`.
pub(super) fn against(used: u64, limit: u64) -> String {
    format!("{} of {}", format_bytes(round(used)), format_bytes(limit))
}

/// Rounded so that it reads well: three digits in its unit are enough for people.
pub(super) fn round(bytes: u64) -> u64 {
    let unit = match bytes {
        0..0x40_0000 => 1 << 10,
        0x40_0000..0x1_0000_0000 => 1 << 20,
        _ => 1 << 30,
    };
    bytes / unit * unit
}

fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes} min"),
        (0, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mandoline_rspec::Rcap;
    use serde_json::json;

    fn rspec(json: serde_json::Value) -> Rspec {
        Rspec::from_json(&json).unwrap()
    }

    fn pool(id: u64, parent: Option<u64>) -> PoolInfo {
        PoolInfo {
            id,
            parent,
            rcap: Rcap::from_hex(&"ab".repeat(16)).unwrap(),
            holder: "pl_conf".to_owned(),
            granted: rspec(json!({"cpu_guarantee": 500})),
            rspec: rspec(json!({"cpu_guarantee": 400, "keys": ["ssh-ed25519 A me"]})),
            children: 0,
            retired: false,
        }
    }

    #[test]
    fn pools_are_a_tree_and_give_no_rcap_away() {
        let list = ListAnswer {
            pools: vec![pool(1, None), pool(2, Some(1)), pool(5, None), pool(3, Some(2))],
            slivers: Vec::new(),
        };
        let node: NodeInfo = serde_json::from_value(json!({
            "vm_types": [], "attribute_table_version": 1, "limits": {},
            "capacity": {"cpu_guarantee": 900}, "available": {"cpu_guarantee": 100}
        }))
        .unwrap();
        let text = pools(&node, &list);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("node  cpu_guarantee = 100"), "{text}");
        assert!(
            lines[1].starts_with("├─ pool 1 of pl_conf: cpu_guarantee = 400"),
            "{text}"
        );
        assert!(lines[2].starts_with("│  └─ pool 2"), "{text}");
        assert!(lines[3].starts_with("│     └─ pool 3"), "{text}");
        assert!(lines[4].starts_with("└─ pool 5"), "{text}");
        assert!(!text.contains("ssh-ed25519") && !text.contains("abab"), "{text}");
        assert!(without_rcap(&list.pools[0]).get("rcap").is_none());
        let shown = capacity(&node);
        assert!(shown.contains("cpu_guarantee  900"), "{shown}");
    }

    #[test]
    fn numbers_are_for_people() {
        assert_eq!(duration(59), "0 min");
        assert_eq!(duration(3 * 86400 + 7200), "3 d 2 h");
        assert_eq!(against(100_000_000, 128 << 20), "95 MiB of 128 MiB");
        let of = SliverUse {
            slice: "plc.a_b".to_owned(),
            vm_id: 7,
            cpu_us: 1_500_000,
            ..SliverUse::default()
        };
        let text = slivers(&[of]);
        assert!(text.contains("plc.a_b") && text.contains("1.5 s"), "{text}");
        assert_eq!(slivers(&[]), "no slivers");
    }
}
