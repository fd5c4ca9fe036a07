//! `/metrics`: what is used, in OpenMetrics' text form, for Prometheus.
//!
//! Labels are bounded: slices with a sliver here (at most as many as the node takes), attributes of the rspec
//! table, states, services of the configuration, reasons of the packet filter. Ids that are never used again,
//! such as vm_id, would make a new series with every sliver and are no labels.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use mandoline_api::nodemgr::{ListAnswer, NodeUse, SliverUse};
use mandoline_rspec::{ATTRIBUTES, Rspec};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::caller::Caller;
use crate::usage::Meter;

/// The media type.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels = Vec<(&'static str, String)>;
type Gauges = Family<Labels, Gauge<f64, AtomicU64>>;
type Counters = Family<Labels, Counter<f64, AtomicU64>>;

/// All metrics at this moment.
pub(crate) async fn text(meter: &Meter) -> String {
    let mut registry = Registry::with_prefix("mandoline");
    match meter.usage(&Caller::Owner).await {
        Ok(usage) => {
            node(&mut registry, &usage.node);
            slivers(&mut registry, &usage.slivers);
        }
        Err(error) => tracing::warn!(%error, "metrics without slivers"),
    }
    if let Ok(list) = meter.core.list(&Caller::Owner) {
        let node = meter.core.node();
        pools(&mut registry, &list, &node.capacity, &node.available);
    }
    services(&mut registry, meter);
    let drops = meter.node_counters().await.drops;
    counters(
        &mut registry,
        "dropped_packets",
        "Packets that the node's packet filter dropped, by reason",
        drops
            .iter()
            .map(|(reason, counter)| (vec![("reason", reason.clone())], counter.packets as f64)),
    );
    let mut text = String::new();
    // Writing to a string cannot fail.
    if let Err(error) = encode(&mut text, &registry) {
        tracing::error!(%error, "metrics");
    }
    text
}

fn gauges(registry: &mut Registry, name: &str, help: &str, rows: impl IntoIterator<Item = (Labels, f64)>) {
    let family = Gauges::default();
    for (labels, value) in rows {
        family.get_or_create(&labels).set(value);
    }
    registry.register(name, help, family);
}

fn counters(registry: &mut Registry, name: &str, help: &str, rows: impl IntoIterator<Item = (Labels, f64)>) {
    let family = Counters::default();
    for (labels, value) in rows {
        family.get_or_create(&labels).inc_by(value);
    }
    registry.register(name, help, family);
}

fn node(registry: &mut Registry, node: &NodeUse) {
    let kind = |name: &'static str, value: &str| vec![(name, value.to_owned())];
    gauges(
        registry,
        "node_cpus",
        "CPUs of the node",
        [(vec![], node.cpus as f64)],
    );
    let load = ["1", "5", "15"].into_iter().zip(node.load);
    gauges(
        registry,
        "node_load",
        "Load average by minutes",
        load.map(|(minutes, load)| (kind("minutes", minutes), load)),
    );
    gauges(
        registry,
        "node_uptime_seconds",
        "Seconds since the node booted",
        [(vec![], node.uptime_s as f64)],
    );
    gauges(
        registry,
        "node_memory_bytes",
        "Memory of the node",
        [
            (kind("kind", "total"), node.memory_total as f64),
            (kind("kind", "available"), node.memory_available as f64),
        ],
    );
    gauges(
        registry,
        "node_disk_bytes",
        "File system of the slivers' disks",
        [
            (kind("kind", "total"), node.disk_total as f64),
            (kind("kind", "free"), node.disk_free as f64),
        ],
    );
}

fn numbers(rspec: &Rspec) -> impl Iterator<Item = (&'static str, f64)> {
    ATTRIBUTES
        .iter()
        .filter_map(|attribute| Some((attribute.name, rspec.number(attribute.name)? as f64)))
}

fn pools(registry: &mut Registry, list: &ListAnswer, capacity: &Rspec, available: &Rspec) {
    gauges(
        registry,
        "pools",
        "Unbound pools",
        [(vec![], list.pools.len() as f64)],
    );
    let of = |rspec: &Rspec| -> Vec<(Labels, f64)> {
        let each = numbers(rspec).map(|(name, value)| (vec![("attribute", name.to_owned())], value));
        each.collect()
    };
    gauges(
        registry,
        "node_capacity",
        "What the node has, by attribute",
        of(capacity),
    );
    gauges(
        registry,
        "node_unassigned",
        "What no root pool has, by attribute",
        of(available),
    );
    // Pools can be many; what slices hold together is bounded.
    let (mut granted, mut left) = (BTreeMap::new(), BTreeMap::new());
    for pool in list.pools.iter().filter(|pool| pool.parent.is_none()) {
        for (sums, rspec) in [(&mut granted, &pool.granted), (&mut left, &pool.rspec)] {
            for (name, value) in numbers(rspec) {
                *sums.entry((pool.holder.clone(), name)).or_insert(0.0) += value;
            }
        }
    }
    let rows = |sums: BTreeMap<(String, &'static str), f64>| {
        sums.into_iter()
            .map(|((slice, name), value)| (vec![("slice", slice), ("attribute", name.to_owned())], value))
    };
    gauges(
        registry,
        "root_pool_granted",
        "What a slice's root pools were made with",
        rows(granted),
    );
    gauges(
        registry,
        "root_pool_left",
        "What is left in a slice's root pools",
        rows(left),
    );
}

type Column = (&'static str, &'static str, fn(&SliverUse) -> f64);

const COUNTED: [Column; 6] = [
    ("sliver_cpu_seconds", "CPU time of a sliver's present run", |s| {
        s.cpu_us as f64 / 1e6
    }),
    ("sliver_sent_bytes", "Bytes that a sliver has sent", |s| {
        s.sent_bytes as f64
    }),
    ("sliver_received_bytes", "Bytes that a sliver has received", |s| {
        s.received_bytes as f64
    }),
    (
        "sliver_dropped_packets",
        "Packets sent faster than allowed",
        |s| s.dropped_packets as f64,
    ),
    (
        "sliver_spoofed_frames",
        "Frames with a source that is not the sliver's",
        |s| s.spoofed_frames as f64,
    ),
    (
        "sliver_refused_flows",
        "Flows refused above its flow limit",
        |s| s.refused_flows as f64,
    ),
];

const MEASURED: [Column; 10] = [
    (
        "sliver_day_bytes",
        "Bytes that its slice has sent in its day",
        |s| s.day_bytes as f64,
    ),
    (
        "sliver_day_budget_bytes",
        "Bytes of a day after which its sustained_rate holds; 0 = none",
        |s| s.day_budget as f64,
    ),
    (
        "sliver_memory_bytes",
        "Memory of a sliver with its monitor",
        |s| s.memory as f64,
    ),
    ("sliver_mem_limit_bytes", "Its mem_limit", |s| s.mem_limit as f64),
    ("sliver_disk_bytes", "Allocated blocks of a sliver's disk", |s| {
        s.disk as f64
    }),
    ("sliver_disk_quota_bytes", "Its disk_quota", |s| {
        s.disk_quota as f64
    }),
    ("sliver_cpu_share", "Its cpu_share", |s| s.cpu_share as f64),
    ("sliver_cpu_guarantee", "Its cpu_guarantee, of 1000", |s| {
        s.cpu_guarantee as f64
    }),
    ("sliver_base_rate", "Its base_rate, bit/s", |s| s.base_rate as f64),
    (
        "sliver_burst_rate",
        "Its burst_rate, bit/s; 0 = the node's",
        |s| s.burst_rate as f64,
    ),
];

fn slivers(registry: &mut Registry, slivers: &[SliverUse]) {
    let labels = |of: &SliverUse| vec![("slice", of.slice.clone()), ("vm_type", of.vm_type.clone())];
    for (name, help, value) in COUNTED {
        // While a sliver is being destroyed its slice may have a new one, which comes later in the list.
        let rows: BTreeMap<_, _> = slivers.iter().map(|of| (labels(of), value(of))).collect();
        counters(registry, name, help, rows);
    }
    for (name, help, value) in MEASURED {
        gauges(
            registry,
            name,
            help,
            slivers.iter().map(|of| (labels(of), value(of))),
        );
    }
    let mut states = BTreeMap::<String, f64>::new();
    for of in slivers {
        let state = serde_json::to_value(of.state).unwrap_or_default();
        *states
            .entry(state.as_str().unwrap_or_default().to_owned())
            .or_default() += 1.0;
    }
    let rows = states
        .into_iter()
        .map(|(state, count)| (vec![("state", state)], count));
    gauges(registry, "slivers", "Slivers by state", rows);
}

fn services(registry: &mut Registry, meter: &Meter) {
    let Some(dispatcher) = &meter.services else { return };
    let service = |name: &str| vec![("service", name.to_owned())];
    let number = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64;
    let (mut streams, mut bytes) = (Vec::new(), Vec::new());
    for (name, count) in dispatcher.counts() {
        streams.push((service(name), number(&count.streams)));
        for (direction, counter) in [("in", &count.received), ("out", &count.sent)] {
            let mut labels = service(name);
            labels.push(("direction", direction.to_owned()));
            bytes.push((labels, number(counter)));
        }
    }
    counters(
        registry,
        "service_streams",
        "Streams of slivers to a service",
        streams,
    );
    counters(
        registry,
        "service_bytes",
        "Bytes of slivers' streams, from (in) and to (out) slivers",
        bytes,
    );
    let refused = dispatcher.refused() as f64;
    counters(
        registry,
        "service_refused_streams",
        "Streams that got no service",
        [(vec![], refused)],
    );
}
