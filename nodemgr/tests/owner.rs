//! What the owner decides, and what slices may do with what they hold: script, grants, denials, bounds of the
//! node, time, resizing, loans.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use jiff::{SignedDuration, Timestamp};
use mandoline_api::nodemgr::{Actuator, ErrorBody, ErrorKind, Grant, OwnerScript, ScriptPool, SliverState};
use mandoline_nodemgr::caller::Caller;
use mandoline_nodemgr::core::Clock;
use mandoline_nodemgr::daemon;
use mandoline_nodemgr::ops::{Operation, SliceAction};
use mandoline_nodemgr::store::Outcome;
use mandoline_nodemgr::vm_type::Stats;
use mandoline_rspec::{Rcap, Rspec};
use serde_json::json;
use support::{Node, TEST_VM, TestBackend, config, rspec, until, until_state};

const PAPERS: &str = "\
rcap10 = create_root_pool(rspec10, my_favorite_cdn)
rcap85 = create_root_pool(rspec85, pl.conf)
rcap5 = create_root_pool(rspec5, pl.conf)
bind(rcap5, pl.conf)
";

fn guarantee(n: u64) -> Rspec {
    rspec(json!({"cpu_guarantee": n}))
}

fn rcap(node: &Node, outcome: Result<Outcome, ErrorBody>) -> Rcap {
    match outcome.unwrap() {
        Outcome::Rcap { pool, epoch } => node.core.rcap(pool, epoch),
        other => panic!("{other:?} is no rcap"),
    }
}

fn script(dir: &Path, text: &str) {
    std::fs::write(dir.join("owner"), text).unwrap();
}

#[tokio::test]
async fn the_papers_script_works_as_written() {
    let dir = tempfile::tempdir().unwrap();
    let backend = TestBackend::default();
    script(dir.path(), PAPERS);
    let node = Node::start(dir.path(), &backend).await;
    // get_rcap gives the slice creation service its 85 %; its own 5 % nobody can hand out.
    let big = node.scs.get_rcap().await.unwrap();
    assert_eq!(node.scs.get_rcaps().await.unwrap(), std::slice::from_ref(&big));
    let has = node.scs.get_rspec(&big).await.unwrap().rspec;
    assert_eq!(
        (has.number("cpu_guarantee"), has.number("base_rate")),
        (Some(850), Some(85_000_000))
    );
    let list = node.owner.list().await.unwrap();
    let pool = |holder: &str, share| {
        let is_it = |pool: &&mandoline_api::nodemgr::PoolInfo| {
            pool.holder == holder && pool.granted.number("cpu_guarantee") == Some(share)
        };
        list.pools.iter().find(is_it).unwrap().rcap.clone()
    };
    let own = pool("pl_conf", 50);
    let error = node
        .slice_does("pl_conf", Operation::SplitPool(own.clone(), guarantee(1)))
        .await;
    assert_eq!(error.unwrap_err().kind, ErrorKind::Conflict);
    let cdn = Caller::Slice(node.core.rules.slice("my_favorite_cdn").unwrap());
    assert_eq!(
        node.core.oldest_rcap(&cdn).unwrap(),
        pool("plc.my_favorite_cdn", 100)
    );
    assert_eq!(node.core.node().available.number("cpu_guarantee"), Some(0));
    // A sliver of the 85 % stays, whatever is applied again.
    let (_, vm_id) = node.sliver(&big, "a_b", json!({"cpu_guarantee": 100})).await;
    node.stop().await;
    let node = Node::start(dir.path(), &backend).await;
    assert_eq!(node.scs.get_rcap().await.unwrap(), big);
    assert!(node.core.sliver(vm_id).is_some());
    assert_eq!(node.owner.list().await.unwrap().pools.len(), 3);
    // Half as much for the service: what is split off must fit, so 10 % cannot be.
    for (percent, left) in [("50", 400), ("9", 400), ("10", 0)] {
        script(dir.path(), &PAPERS.replace("rspec85", &format!("rspec{percent}")));
        daemon::apply_script(&node.core, &dir.path().join("owner"));
        let has = node.scs.get_rspec(&big).await.unwrap().rspec;
        assert_eq!(has.number("cpu_guarantee"), Some(left), "{percent}");
    }
}

#[tokio::test]
async fn a_script_over_the_socket_is_whole_or_nothing_and_stands_until_the_file_changes() {
    let dir = tempfile::tempdir().unwrap();
    let backend = TestBackend::default();
    script(dir.path(), PAPERS);
    let node = Node::start(dir.path(), &backend).await;
    let pool = |slice: &str, rspec| ScriptPool {
        slice: slice.to_owned(),
        rspec,
        bind: false,
    };
    let posted = OwnerScript {
        pools: Some(vec![pool("pl_conf", json!("50 %"))]),
        deny: Some(BTreeMap::from([("evil_corp".to_owned(), "spam".to_owned())])),
        node_limit: Some(rspec(json!({"burst_rate": "10 Mbit/s"}))),
        ..OwnerScript::default()
    };
    let Outcome::Rcaps { pools } = node
        .owner_does(Operation::OwnerScript(posted.clone()))
        .await
        .unwrap()
    else {
        panic!("no rcaps");
    };
    let scs = node.core.rcap(pools[0].0, pools[0].1);
    assert_eq!(node.scs.get_rcaps().await.unwrap(), std::slice::from_ref(&scs));
    let has = node.scs.get_rspec(&scs).await.unwrap().rspec;
    // Half of what the owner now lets the node send.
    assert_eq!(
        (has.number("cpu_guarantee"), has.number("base_rate")),
        (Some(500), Some(5_000_000))
    );
    assert_eq!(*node.core.node_rate.borrow(), Some(10_000_000));
    assert_eq!(node.owner.list().await.unwrap().pools.len(), 1);

    // One wrong part, and nothing of it is done.
    for bad in [
        OwnerScript {
            pools: Some(vec![pool("pl_conf", json!("20 %")), pool("a_b", json!("90 %"))]),
            deny: Some(BTreeMap::new()),
            ..OwnerScript::default()
        },
        OwnerScript {
            deny: Some(BTreeMap::from([("Evil".to_owned(), "spam".to_owned())])),
            pools: Some(Vec::new()),
            ..OwnerScript::default()
        },
        OwnerScript {
            node_limit: Some(rspec(json!({"cpu_guarantee": 400}))),
            pools: Some(vec![pool("pl_conf", json!({"cpu_guarantee": 500}))]),
            ..OwnerScript::default()
        },
    ] {
        let error = node
            .owner_does(Operation::OwnerScript(bad.clone()))
            .await
            .unwrap_err();
        assert!(error.attribute.is_some() && error.allowed.is_some(), "{error:?}");
        assert_eq!(node.scs.get_rspec(&scs).await.unwrap().rspec, has, "{bad:?}");
        assert_eq!(
            node.core.policy(&Caller::Owner).unwrap().denials["plc.evil_corp"],
            "spam"
        );
    }
    let refused = node
        .slice_does("a_b", Operation::OwnerScript(posted))
        .await
        .unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Forbidden);

    node.stop().await;
    let node = Node::start(dir.path(), &backend).await;
    assert_eq!(node.scs.get_rcaps().await.unwrap(), [scs]);
    node.stop().await;
    script(dir.path(), &format!("{PAPERS}# changed\n"));
    let node = Node::start(dir.path(), &backend).await;
    assert_eq!(node.owner.list().await.unwrap().pools.len(), 3);
    // Of what the script in the file says nothing, stays.
    assert!(!node.core.policy(&Caller::Owner).unwrap().denials.is_empty());
}

#[tokio::test]
async fn the_owners_own_sliver_comes_first_and_may_run_the_node() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("site_admin.keys"),
        "# contacts\nssh-ed25519 AAAA tech\n\nssh-ed25519 BBBB pi\n",
    )
    .unwrap();
    let mut config = config(dir.path());
    config.site_admin.rspec = toml::from_str("vm_type = \"test-vm\"\ncpu_guarantee = \"1 %\"").unwrap();
    script(dir.path(), PAPERS.replace("rspec85", "rspec84").as_str());
    let backend = TestBackend::default();
    let node = Node::start_with(config.clone(), &backend).await;
    let mut events = node.owner.events(Some(0)).await.unwrap();
    let vm_id = node.core.recorded()[0];
    let event = until_state(&mut events, vm_id, SliverState::Reachable).await;
    assert_eq!(event.slice, "site_admin");
    let has = node.has("site_admin").await;
    assert_eq!(has.keys(), ["ssh-ed25519 AAAA tech", "ssh-ed25519 BBBB pi"]);
    assert_eq!(has.number("cpu_guarantee"), Some(10));
    // From inside it, pools are made and slices denied; but it cannot grant.
    let made = node
        .slice_does(
            "site_admin",
            Operation::CreateRootPool(Rspec::new(), "a_b".into()),
        )
        .await;
    rcap(&node, made);
    let deny = Operation::Deny("a_b".into(), "maintenance".into());
    node.slice_does("site_admin", deny).await.unwrap();
    let grant = Operation::Grant("a_b".into(), Grant::default());
    assert_eq!(
        node.slice_does("site_admin", grant).await.unwrap_err().kind,
        ErrorKind::Forbidden
    );
    node.stop().await;

    // Other contacts: the same sliver, with other keys, brought to it while it runs.
    std::fs::write(dir.path().join("site_admin.keys"), "ssh-ed25519 CCCC new\n").unwrap();
    let node = Node::start_with(config, &backend).await;
    assert_eq!(node.core.recorded()[0], vm_id);
    assert_eq!(node.has("site_admin").await.keys(), ["ssh-ed25519 CCCC new"]);
    let starts = backend.world().starts;
    assert_eq!(starts, 1);
}

#[tokio::test]
async fn grants_say_who_may_make_slivers_for_whom_and_use_which_controls() {
    let dir = tempfile::tempdir().unwrap();
    let backend = TestBackend::default();
    let node = Node::start(dir.path(), &backend).await;
    let made = node
        .owner_does(Operation::CreateRootPool(guarantee(500), "broker_x".into()))
        .await;
    let pool = rcap(&node, made);
    let split = |n: u64| {
        Operation::SplitPool(
            pool.clone(),
            rspec(json!({"vm_type": TEST_VM, "cpu_guarantee": n})),
        )
    };
    let child = rcap(&node, node.slice_does("broker_x", split(1)).await);
    let bind = |slice: &str| Operation::Bind(child.clone(), slice.to_owned());
    let kind = |result: Result<Outcome, ErrorBody>| result.unwrap_err().kind;
    assert_eq!(
        kind(node.slice_does("broker_x", bind("princeton_y")).await),
        ErrorKind::Forbidden
    );

    let grant = |types: Option<&str>, actuators: &[Actuator]| Grant {
        authorities: BTreeSet::from(["ple".parse().unwrap()]),
        slices: BTreeSet::from(["princeton_y".parse().unwrap()]),
        vm_types: types.map(|name| BTreeSet::from([name.to_owned()])),
        actuators: actuators.iter().copied().collect(),
    };
    let give = |grant| node.owner_does(Operation::Grant("broker_x".into(), grant));
    let error = give(grant(Some("chroot"), &[])).await.unwrap_err();
    assert_eq!(
        (error.kind, error.value.as_deref()),
        (ErrorKind::UnknownVmType, Some("chroot"))
    );
    // A name that is mapped to the backend stands for it.
    give(grant(Some("linux_vserver"), &[])).await.unwrap();
    assert_eq!(
        kind(node.slice_does("broker_x", bind("plc.other_z")).await),
        ErrorKind::Forbidden
    );
    node.slice_does("broker_x", bind("princeton_y")).await.unwrap();
    let second = rcap(&node, node.slice_does("broker_x", split(1)).await);
    node.slice_does("broker_x", Operation::Bind(second, "ple.inria_a".into()))
        .await
        .unwrap();

    // Controls: without a pool of its own, `acquire` takes from what the node has left.
    let acquire = || Operation::Acquire(guarantee(10));
    assert_eq!(
        kind(node.slice_does("utah_elab", acquire()).await),
        ErrorKind::NotFound
    );
    let stop = || Operation::OnSlice(SliceAction::Stop, "ple.inria_a".into());
    assert_eq!(
        kind(node.slice_does("utah_elab", stop()).await),
        ErrorKind::Forbidden
    );
    let trusted = grant(None, &[Actuator::Acquire, Actuator::Stop]);
    node.owner_does(Operation::Grant("utah_elab".into(), trusted))
        .await
        .unwrap();
    let taken = rcap(&node, node.slice_does("utah_elab", acquire()).await);
    node.slice_does("utah_elab", stop()).await.unwrap();
    let destroy = Operation::OnSlice(SliceAction::Destroy, "ple.inria_a".into());
    assert_eq!(
        kind(node.slice_does("utah_elab", destroy).await),
        ErrorKind::Forbidden
    );
    let elab = Caller::Slice(node.core.rules.slice("utah_elab").unwrap());
    assert!(node.core.may(&elab, Actuator::Stop) && !node.core.may(&elab, Actuator::Capture));
    assert_eq!(node.core.node().available.number("cpu_guarantee"), Some(490));
    node.slice_does("utah_elab", Operation::Release(taken))
        .await
        .unwrap();

    // Grants are kept, listed and taken away, the configuration's too.
    node.stop().await;
    let node = Node::start(dir.path(), &backend).await;
    let all = node.core.policy(&Caller::Owner).unwrap().grants;
    let names: Vec<String> = all.keys().map(ToString::to_string).collect();
    assert_eq!(names, ["pl_conf", "site_admin", "plc.broker_x", "plc.utah_elab"]);
    assert_eq!(node.core.policy(&elab).unwrap_err().kind, ErrorKind::Forbidden);
    let pool = node.root_pool().await;
    node.owner_does(Operation::Revoke("pl_conf".into()))
        .await
        .unwrap();
    let want = rspec(json!({"vm_type": TEST_VM}));
    let child = node.scs.split_pool(&pool, &want, None).await.unwrap();
    assert_eq!(
        node.scs.bind(&child, "a_b", None).await.unwrap_err().kind(),
        Some(ErrorKind::Forbidden)
    );
}

#[tokio::test]
async fn a_denied_slice_stops_and_is_refused_with_the_owners_reason() {
    let dir = tempfile::tempdir().unwrap();
    let backend = TestBackend::default();
    let node = Node::start(dir.path(), &backend).await;
    let pool = node.root_pool().await;
    let mut events = node.owner.events(None).await.unwrap();
    let (one, vm_id) = node.sliver(&pool, "a_b", json!({})).await;
    let (other, stopped) = node.sliver(&pool, "a_c", json!({})).await;
    until_state(&mut events, vm_id, SliverState::Reachable).await;
    until_state(&mut events, stopped, SliverState::Reachable).await;
    node.scs.stop(&other).await.unwrap();
    until_state(&mut events, stopped, SliverState::Stopped).await;

    let deny = |who: &str| Operation::Deny(who.into(), "port scans".into());
    node.owner_does(deny("a_b")).await.unwrap();
    node.owner_does(deny("plc")).await.unwrap();
    let event = until_state(&mut events, vm_id, SliverState::Stopped).await;
    assert!(event.reason.unwrap().contains("port scans"));
    let more = node
        .scs
        .split_pool(&pool, &rspec(json!({"vm_type": TEST_VM})), None)
        .await
        .unwrap();
    for refused in [
        node.scs.start(&one).await.unwrap_err(),
        node.scs.restart(&one).await.unwrap_err(),
        node.scs.bind(&more, "a_b", None).await.unwrap_err(),
        node.scs.bind(&more, "a_new", None).await.unwrap_err(),
    ] {
        assert_eq!(refused.kind(), Some(ErrorKind::Forbidden));
        assert!(refused.to_string().contains("port scans"), "{refused}");
    }
    assert_eq!(
        node.slice_does("a_c", deny("a_d")).await.unwrap_err().kind,
        ErrorKind::Forbidden
    );
    let bad = Operation::Deny("a_b".into(), "two\nlines".into());
    assert_eq!(
        node.owner_does(bad).await.unwrap_err().attribute.as_deref(),
        Some("reason")
    );

    // Both denials must go before it runs again; what was stopped before stays so.
    node.owner_does(Operation::Allow("plc".into())).await.unwrap();
    assert_eq!(
        node.core.sliver(vm_id).unwrap().wanted,
        mandoline_nodemgr::state::Wanted::Stopped
    );
    node.owner_does(Operation::Allow("a_b".into())).await.unwrap();
    node.owner_does(Operation::Allow("a_b".into())).await.unwrap();
    until_state(&mut events, vm_id, SliverState::Reachable).await;
    assert_eq!(
        node.core.sliver(stopped).unwrap().wanted,
        mandoline_nodemgr::state::Wanted::Stopped
    );
    node.scs.bind(&more, "a_new", None).await.unwrap();
}

#[tokio::test]
async fn the_nodes_bounds_change_while_it_runs() {
    let dir = tempfile::tempdir().unwrap();
    let backend = TestBackend::default();
    let node = Node::start(dir.path(), &backend).await;
    let pool = node.root_pool().await;
    let mut events = node.owner.events(None).await.unwrap();
    let (_, vm_id) = node
        .sliver(&pool, "a_b", json!({"burst_rate": "50 Mbit/s"}))
        .await;
    until_state(&mut events, vm_id, SliverState::Reachable).await;
    let rate = node.core.node_rate.subscribe();
    let limit = |json| Operation::SetNodeLimit(rspec(json));
    // The pools hold 10 Mbit/s guaranteed, 500 shares and 1 GiB.
    for (json, attribute, allowed) in [
        (
            json!({"burst_rate": "9 Mbit/s"}),
            "base_rate",
            "at most 9 Mbit/s, what the node has",
        ),
        (
            json!({"cpu_guarantee": 499}),
            "cpu_guarantee",
            "at most 499, what the node has",
        ),
        (
            json!({"mem_reserve": "1023 MiB"}),
            "mem_reserve",
            "at most 1023 MiB, what the node has",
        ),
        (
            json!({"ports": "tcp/80-88"}),
            "ports",
            "what the node has beside other root pools: tcp/80-88",
        ),
        (
            json!({"image": "debian"}),
            "image",
            "reservations, limits, weights and ports",
        ),
    ] {
        let error = node.owner_does(limit(json)).await.unwrap_err();
        assert_eq!(
            (error.attribute.as_deref(), error.allowed.as_deref()),
            (Some(attribute), Some(allowed)),
            "{error:?}"
        );
    }
    assert!(!rate.has_changed().unwrap());
    node.owner_does(limit(json!({"burst_rate": "20 Mbit/s", "mem_limit": "1 GiB"})))
        .await
        .unwrap();
    assert_eq!(*rate.borrow(), Some(20_000_000));
    assert_eq!(node.has("plc.a_b").await.number("burst_rate"), Some(20_000_000));
    let capacity = node.core.node().capacity;
    assert_eq!(
        (capacity.number("base_rate"), capacity.number("mem_limit")),
        (Some(20_000_000), Some(1 << 30))
    );
    let much = rspec(json!({"mem_limit": "2 GiB"}));
    let error = node
        .scs
        .split_pool(&pool, &much, None)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("mem_limit"), "{error}");
    node.stop().await;
    // The bound outlives the node manager; an empty one takes it back, and the sliver has its own again.
    let node = Node::start(dir.path(), &backend).await;
    assert_eq!(*node.core.node_rate.borrow(), Some(20_000_000));
    node.owner_does(limit(json!({}))).await.unwrap();
    assert_eq!(node.has("plc.a_b").await.number("burst_rate"), Some(50_000_000));
}

/// A clock that a test sets.
fn clock() -> (Arc<Mutex<Timestamp>>, Clock) {
    let time = Arc::new(Mutex::new("2026-01-01T00:00:00Z".parse().unwrap()));
    let read = Arc::clone(&time);
    (time, Arc::new(move || *read.lock().unwrap()))
}

#[tokio::test]
async fn time_bounds_act_by_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let (time, clock) = clock();
    let backend = TestBackend::default();
    let node = Node::start_at(config(dir.path()), &backend, clock).await;
    let mut events = node.owner.events(None).await.unwrap();
    let day = |n: i8| format!("2026-01-{n:02}T00:00:00Z");
    let at = |n: i8| *time.lock().unwrap() = day(n).parse().unwrap();
    let made = node
        .owner_does(Operation::CreateRootPool(
            rspec(json!({"cpu_guarantee": 500, "end_time": day(20)})),
            "pl_conf".into(),
        ))
        .await;
    let pool = rcap(&node, made);
    // Starts on the 3rd, ends on the 5th.
    let bounds = json!({"start_time": day(3), "end_time": day(5), "cpu_guarantee": 10});
    let (sliver, vm_id) = node.sliver(&pool, "a_b", bounds).await;
    let (_, whole) = node.sliver(&pool, "a_c", json!({"cpu_guarantee": 10})).await;
    until_state(&mut events, whole, SliverState::Reachable).await;
    let boost = json!({"start_time": day(4), "end_time": day(6), "cpu_guarantee": 100});
    let boost = node.scs.split_pool(&pool, &rspec(boost), None).await.unwrap();
    node.scs.bind(&boost, "a_c", None).await.unwrap();
    node.core.expire().await;
    assert!(!backend.world().running.contains_key(&vm_id));
    at(3);
    node.core.expire().await;
    until_state(&mut events, vm_id, SliverState::Reachable).await;
    assert_eq!(node.has("plc.a_c").await.number("cpu_guarantee"), Some(10));
    at(4);
    node.core.expire().await;
    assert_eq!(node.has("plc.a_c").await.number("cpu_guarantee"), Some(110));

    // Renewal: a pool that ends on the 10th; one that would end after the root pool cannot be had.
    let late = node
        .scs
        .split_pool(&pool, &rspec(json!({"end_time": day(21)})), None)
        .await;
    assert!(late.unwrap_err().to_string().contains("not after 2026-01-20"));
    let renewal = node
        .scs
        .split_pool(&pool, &rspec(json!({"end_time": day(10)})), None)
        .await
        .unwrap();
    node.scs.bind(&renewal, "a_b", None).await.unwrap();
    at(6);
    node.core.expire().await;
    assert!(node.core.sliver(vm_id).is_some());
    assert_eq!(node.has("plc.a_c").await.number("cpu_guarantee"), Some(10));
    at(10);
    node.core.expire().await;
    let gone = until_state(&mut events, vm_id, SliverState::Gone).await;
    assert!(gone.reason.unwrap().contains("end_time"));
    assert!(node.scs.get_rspec(&sliver).await.is_err());
    // A sliver that names no end goes with the pool that it was split from.
    at(20);
    node.core.expire().await;
    until_state(&mut events, whole, SliverState::Gone).await;
    node.core.expire().await;
    assert!(node.owner.list().await.unwrap().pools.is_empty());
    // Too late to bind.
    *time.lock().unwrap() += SignedDuration::from_hours(1);
    let other = rcap(
        &node,
        node.owner_does(Operation::CreateRootPool(guarantee(9), "pl_conf".into()))
            .await,
    );
    let past = rspec(json!({"vm_type": TEST_VM, "end_time": day(19)}));
    let past = node.scs.split_pool(&other, &past, None).await.unwrap();
    let error = node.scs.bind(&past, "a_d", None).await.unwrap_err().to_string();
    assert!(error.contains("end_time"), "{error}");
}

#[tokio::test]
async fn pools_and_slivers_are_resized_within_what_there_is_and_what_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let backend = TestBackend::default();
    let node = Node::start(dir.path(), &backend).await;
    let pool = node.root_pool().await;
    let mut events = node.owner.events(None).await.unwrap();
    let (sliver, vm_id) = node
        .sliver(
            &pool,
            "a_b",
            json!({"cpu_guarantee": 100, "mem_limit": "512 MiB"}),
        )
        .await;
    until_state(&mut events, vm_id, SliverState::Reachable).await;
    backend.world().stats = Stats {
        memory: 300 << 20,
        disk: 2_000_000_000,
        ..Stats::default()
    };
    let resize = |rcap: &Rcap, json| node.slice_does("pl_conf", Operation::Resize(rcap.clone(), rspec(json)));
    resize(&sliver, json!({"cpu_guarantee": 400, "mem_limit": "1 GiB"}))
        .await
        .unwrap();
    let has = node.has("plc.a_b").await;
    assert_eq!(
        (has.number("cpu_guarantee"), has.number("mem_limit")),
        (Some(400), Some(1 << 30))
    );
    assert_eq!(
        node.scs
            .get_rspec(&pool)
            .await
            .unwrap()
            .rspec
            .number("cpu_guarantee"),
        Some(100)
    );
    for (json, attribute, allowed) in [
        (json!({"cpu_guarantee": 501}), "cpu_guarantee", "at most 500"),
        (json!({"mem_limit": "299 MiB"}), "mem_limit", "at least 300 MiB"),
        (json!({"disk_quota": "1 GB"}), "disk_quota", "at least 2 GB"),
        (json!({"mem_reserve": "1025 MiB"}), "mem_reserve", "at most 1 GiB"),
        (json!({"vm_type": "other"}), "vm_type", TEST_VM),
        (
            json!({"burst_rate": "1 Gbit/s"}),
            "burst_rate",
            "at most 100 Mbit/s",
        ),
    ] {
        let error = resize(&sliver, json.clone()).await.unwrap_err();
        assert_eq!(error.attribute.as_deref(), Some(attribute), "{json}: {error:?}");
        let found = error.allowed.unwrap();
        assert!(found.contains(allowed), "{json}: {found}");
    }
    assert_eq!(node.has("plc.a_b").await, has);
    resize(&sliver, json!({"mem_limit": "300 MiB", "disk_quota": "2 GB"}))
        .await
        .unwrap();
    // A backend that takes memory back while the VM runs needs no bound.
    backend.world().capabilities = vec!["resize:mem_limit".to_owned()];
    resize(&sliver, json!({"mem_limit": "64 MiB"})).await.unwrap();
    // The same with what was added: 2 GB are used, so the added 1 GB may go, and no more.
    let more = node
        .scs
        .split_pool(&pool, &rspec(json!({"disk_quota": "1 GB"})), None)
        .await
        .unwrap();
    node.scs.bind(&more, "a_b", None).await.unwrap();
    backend.world().stats.disk = 2_500_000_000;
    let error = node.scs.release(&more, None).await.unwrap_err();
    assert!(error.to_string().contains("disk_quota"), "{error}");
    backend.world().stats.disk = 1;
    node.scs.release(&more, None).await.unwrap();
    // Pools: never below what was split from them; a root pool is the owner's.
    let error = node
        .owner_does(Operation::Resize(pool.clone(), guarantee(399)))
        .await
        .unwrap_err();
    assert_eq!(error.attribute.as_deref(), Some("cpu_guarantee"));
    node.owner_does(Operation::Resize(pool.clone(), guarantee(400)))
        .await
        .unwrap();
    let error = resize(&pool, json!({"cpu_guarantee": 450})).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Forbidden);
    // What was recorded reaches the backend.
    node.scs.stop(&sliver).await.unwrap();
    until(&mut events, vm_id, |event| event.state == SliverState::Stopped).await;
    assert!(!backend.world().resizes.is_empty());
}

#[tokio::test]
async fn slices_lend_to_each_other_and_act_for_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let backend = TestBackend::default();
    let node = Node::start(dir.path(), &backend).await;
    let pool = node.root_pool().await;
    let mut events = node.owner.events(None).await.unwrap();
    node.sliver(
        &pool,
        "a_b",
        json!({"cpu_guarantee": 200, "cpu_share": 3, "delegations": "a_c, ple.x_y"}),
    )
    .await;
    let (_, vm_id) = node.sliver(&pool, "a_c", json!({})).await;
    let loans = |to: &str, what: &str, amount| {
        Operation::SetLoans("a_b".into(), vec![(to.into(), what.into(), amount)])
    };
    node.slice_does("a_b", loans("a_c", "cpu_pct", 5)).await.unwrap();
    assert_eq!(node.has("plc.a_c").await.number("cpu_guarantee"), Some(50));
    assert_eq!(node.has("plc.a_b").await.number("cpu_guarantee"), Some(150));
    let caller = |slice: &str| Caller::Slice(node.core.rules.slice(slice).unwrap());
    let seen = node.core.loans(&caller("a_c"), "a_b").unwrap();
    assert_eq!(seen.rspec.number("cpu_guarantee"), Some(200));
    assert_eq!((seen.loans.len(), seen.waiting.len()), (1, 0));
    // More than it has waits; the delegate may set it, a stranger may not.
    node.slice_does("ple.x_y", loans("a_c", "cpu_share", 3))
        .await
        .unwrap();
    let seen = node.core.loans(&caller("a_b"), "a_b").unwrap();
    assert_eq!(seen.waiting.len(), 1);
    assert_eq!(seen.effective, seen.rspec);
    assert_eq!(
        node.slice_does("a_d", loans("a_c", "cpu_pct", 1))
            .await
            .unwrap_err()
            .kind,
        ErrorKind::Forbidden
    );
    let error = node
        .slice_does("a_b", loans("a_c", "disk_max", 1))
        .await
        .unwrap_err();
    assert!(error.allowed.unwrap().contains("net_min_rate"));
    // Acting by name: itself, its delegate; the delegate of another it is not.
    let act = |slice: &str, action| Operation::OnSlice(action, slice.to_owned());
    node.slice_does("a_c", act("a_b", SliceAction::Restart))
        .await
        .unwrap();
    let error = node
        .slice_does("a_b", act("a_c", SliceAction::Stop))
        .await
        .unwrap_err();
    assert_eq!(error.kind, ErrorKind::Forbidden);
    node.slice_does("a_c", act("a_c", SliceAction::Destroy))
        .await
        .unwrap();
    until_state(&mut events, vm_id, SliverState::Gone).await;
    assert_eq!(
        node.slice_does("a_c", act("a_c", SliceAction::Start))
            .await
            .unwrap_err()
            .kind,
        ErrorKind::NotFound
    );
}

#[tokio::test]
async fn all_of_it_over_the_sockets() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &TestBackend::default()).await;
    let (owner, scs) = (&node.owner, &node.scs);
    let papers = OwnerScript {
        script: Some(PAPERS.to_owned()),
        ..OwnerScript::default()
    };
    let rcaps = owner.owner_script(&papers, Some("boot")).await.unwrap();
    assert_eq!(owner.owner_script(&papers, Some("boot")).await.unwrap(), rcaps);
    assert_eq!((rcaps.len(), &scs.get_rcap().await.unwrap()), (3, &rcaps[1]));
    let (sliver, _) = node.sliver(&rcaps[1], "a_b", json!({"cpu_guarantee": 10})).await;
    node.sliver(&rcaps[1], "a_c", json!({})).await;
    scs.resize(&sliver, &guarantee(20), Some("more")).await.unwrap();
    let loans = mandoline_api::nodemgr::SetLoans {
        slice_name: "a_b".to_owned(),
        loans: vec![("a_c".to_owned(), "cpu_pct".to_owned(), 1)],
    };
    owner.set_loans(&loans).await.unwrap();
    let seen = owner.loans("a_b").await.unwrap();
    assert_eq!(seen.effective.number("cpu_guarantee"), Some(10));
    scs.on_slice("stop_slice", "a_b").await.unwrap();
    owner.deny("a_c", "spam").await.unwrap();
    owner
        .set_node_limit(&rspec(json!({"burst_rate": "50 Mbit/s"})))
        .await
        .unwrap();
    let grant = Grant {
        actuators: BTreeSet::from([Actuator::Capture]),
        ..Grant::default()
    };
    owner.grant("a_b", &grant).await.unwrap();
    let policy = owner.policy().await.unwrap();
    assert_eq!(policy.denials["plc.a_c"], "spam");
    assert_eq!(policy.node_limit.number("burst_rate"), Some(50_000_000));
    assert_eq!(policy.grants[&"plc.a_b".parse().unwrap()], grant);
    owner.revoke("a_b").await.unwrap();
    owner.allow("a_c").await.unwrap();
    let policy = owner.policy().await.unwrap();
    assert!(policy.denials.is_empty() && !policy.grants.contains_key(&"plc.a_b".parse().unwrap()));
    assert_eq!(scs.policy().await.unwrap_err().kind(), Some(ErrorKind::Forbidden));
    // What a script has not is refused by name.
    let raw = mandoline_api::unix::Client::new(dir.path().join("run/owner.sock"));
    let answer = raw
        .post("/v1/owner_script", &json!({"pool": []}), &[])
        .await
        .unwrap();
    assert_eq!(answer.status, 400);
    assert!(String::from_utf8_lossy(&answer.body).contains("`pool`"));
}
