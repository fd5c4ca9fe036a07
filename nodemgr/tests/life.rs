//! Lives of slivers, and of the node manager: failures, restarts, power cuts, the owner's script.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;

use mandoline_api::nodemgr::{FailureClass, SliverState};
use mandoline_nodemgr::daemon;
use mandoline_nodemgr::vm_type::{Exit, Failure};
use serde_json::{Value, json};
use support::{Node, TEST_VM, TestBackend, rspec, until, until_state};

#[tokio::test]
async fn ends_of_a_vm_lead_where_they_should() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &TestBackend::default()).await;
    let pool = node.root_pool().await;
    let mut events = node.owner.events(Some(0)).await.unwrap();
    let (rcap, vm_id) = node.sliver(&pool, "a_b", json!({})).await;
    until_state(&mut events, vm_id, SliverState::Reachable).await;

    node.backend.exit(vm_id, Exit::Reboot);
    until_state(&mut events, vm_id, SliverState::Starting).await;
    until_state(&mut events, vm_id, SliverState::Reachable).await;

    node.backend
        .exit(vm_id, Exit::Died("its kernel panicked: oops".to_owned()));
    let failed = until_state(&mut events, vm_id, SliverState::Failed).await;
    assert_eq!(failed.class, Some(FailureClass::Retryable));
    assert!(failed.reason.unwrap().contains("oops"));
    let again = until_state(&mut events, vm_id, SliverState::Reachable).await;
    assert_eq!((again.reason, again.class), (None, None));

    node.backend.exit(vm_id, Exit::Shutdown);
    let stopped = until_state(&mut events, vm_id, SliverState::Stopped).await;
    assert!(stopped.reason.unwrap().contains("shut down"));
    node.scs.start(&rcap).await.unwrap();
    until_state(&mut events, vm_id, SliverState::Reachable).await;
    node.scs.restart(&rcap).await.unwrap();
    until_state(&mut events, vm_id, SliverState::Starting).await;
    until_state(&mut events, vm_id, SliverState::Reachable).await;
    node.scs.stop(&rcap).await.unwrap();
    until_state(&mut events, vm_id, SliverState::Stopped).await;
    assert_eq!(node.backend.world().starts, 5);
    assert!(node.backend.world().disks.contains(&vm_id));
}

#[tokio::test]
async fn a_fatal_failure_waits_for_somebody_and_a_retryable_one_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let backend = TestBackend::default();
    let node = Node::start(dir.path(), &backend).await;
    let pool = node.root_pool().await;
    let mut events = node.owner.events(None).await.unwrap();
    backend.world().next_starts_fail = vec![Failure::fatal("no such image"), Failure::retryable("disk full")];
    let (rcap, vm_id) = node.sliver(&pool, "a_b", json!({})).await;
    let first = until_state(&mut events, vm_id, SliverState::Failed).await;
    assert_eq!(
        (first.reason.as_deref(), first.class),
        (Some("disk full"), Some(FailureClass::Retryable))
    );
    let second = until(&mut events, vm_id, |e| e.class == Some(FailureClass::Fatal)).await;
    assert_eq!(second.reason.as_deref(), Some("no such image"));
    assert_eq!(backend.world().starts, 2);
    node.scs.start(&rcap).await.unwrap();
    until_state(&mut events, vm_id, SliverState::Reachable).await;
}

#[tokio::test]
async fn a_restarted_node_manager_adopts_what_runs_and_starts_what_should() {
    let dir = tempfile::tempdir().unwrap();
    let backend = TestBackend::default();
    let node = Node::start(dir.path(), &backend).await;
    let pool = node.root_pool().await;
    let mut events = node.owner.events(None).await.unwrap();
    let (_, runs) = node.sliver(&pool, "a_runs", json!({})).await;
    let (_, dies) = node.sliver(&pool, "a_dies", json!({})).await;
    let (stops, stopped) = node.sliver(&pool, "a_stops", json!({})).await;
    for vm_id in [runs, dies, stopped] {
        until_state(&mut events, vm_id, SliverState::Reachable).await;
    }
    node.scs.stop(&stops).await.unwrap();
    let last = until_state(&mut events, stopped, SliverState::Stopped).await;
    node.stop().await;
    backend.world().running.remove(&dies);
    // Something that nobody knows of.
    backend.world().disks.insert(4711);

    let node = Node::start(dir.path(), &backend).await;
    let mut events = node.owner.events(Some(last.seq)).await.unwrap();
    let adopted = until_state(&mut events, runs, SliverState::Reachable).await;
    assert!(adopted.seq > last.seq, "sequence numbers go on");
    let mut events = node.owner.events(Some(last.seq)).await.unwrap();
    until_state(&mut events, dies, SliverState::Reachable).await;
    let mut events = node.owner.events(Some(last.seq)).await.unwrap();
    until_state(&mut events, stopped, SliverState::Stopped).await;
    assert_eq!(backend.world().starts, 4, "only the dead one was started again");

    daemon::reconcile_once(&node.core).await;
    let left: Vec<_> = backend.world().disks.iter().copied().collect();
    assert_eq!(left, [runs, dies, stopped]);
}

/// Copies the state while the node manager runs: what a power cut at this moment would leave.
fn power_cut(from: &Path, to: &Path) {
    std::fs::create_dir_all(to.join("state")).unwrap();
    for file in ["nodemgr.redb", "secret"] {
        std::fs::copy(from.join("state").join(file), to.join("state").join(file)).unwrap();
    }
}

#[tokio::test]
async fn what_was_answered_survives_a_power_cut_at_any_point() {
    let dir = tempfile::tempdir().unwrap();
    let backend = TestBackend::default();
    let node = Node::start(dir.path(), &backend).await;
    let pool = node.root_pool().await;
    let mut held = Vec::new();
    for n in 0..12u64 {
        let want = rspec(json!({"vm_type": TEST_VM, "cpu_guarantee": n + 1}));
        let rcap = node
            .scs
            .split_pool(&pool, &want, Some(&format!("split-{n}")))
            .await
            .unwrap();
        match n % 3 {
            0 => held.push((rcap, n + 1)),
            1 => {
                node.scs.bind(&rcap, &format!("a_s{n}"), None).await.unwrap();
                held.push((rcap, n + 1));
            }
            _ => node.scs.release(&rcap, None).await.unwrap(),
        }
        let after = tempfile::tempdir().unwrap();
        power_cut(dir.path(), after.path());
        let other = Node::start(after.path(), &TestBackend::default()).await;
        let mut sum = 0;
        for (rcap, guarantee) in &held {
            let rspec = other.scs.get_rspec(rcap).await.unwrap().rspec;
            assert_eq!(rspec.number("cpu_guarantee"), Some(*guarantee));
            sum += guarantee;
        }
        let rest = other.scs.get_rspec(&pool).await.unwrap().rspec;
        assert_eq!(
            rest.number("cpu_guarantee"),
            Some(500 - sum),
            "nothing is counted twice"
        );
        other.stop().await;
    }
    node.stop().await;
}

fn apply(node: &Node, dir: &Path, script: &Value) {
    let path = dir.join("owner.json");
    std::fs::write(&path, script.to_string()).unwrap();
    daemon::apply_script(&node.core, &path);
}

#[tokio::test]
async fn the_owners_script_is_a_transaction_of_desired_pools() {
    let dir = tempfile::tempdir().unwrap();
    let backend = TestBackend::default();
    let node = Node::start(dir.path(), &backend).await;
    let guarantee = |n: u64| json!({"cpu_guarantee": n});
    let script = |cdn: u64, scs: u64| {
        json!([{"slice": "pl_conf", "rspec": guarantee(scs)}, {"slice": "plc.a_cdn", "rspec": guarantee(cdn)},
               {"slice": "pl_conf", "rspec": guarantee(50)}])
    };
    apply(&node, dir.path(), &script(100, 850));
    let rcaps = node.scs.get_rcaps().await.unwrap();
    assert_eq!(rcaps.len(), 2);
    let big = rcaps[0].clone();
    let child = node
        .scs
        .split_pool(&big, &rspec(guarantee(300)), None)
        .await
        .unwrap();

    // Again: nothing changes. Then: one shrinks, another grows by it; rcaps stay.
    apply(&node, dir.path(), &script(100, 850));
    apply(&node, dir.path(), &script(250, 700));
    assert_eq!(node.scs.get_rcaps().await.unwrap()[..2], rcaps);
    assert_eq!(
        node.scs
            .get_rspec(&big)
            .await
            .unwrap()
            .rspec
            .number("cpu_guarantee"),
        Some(400)
    );
    // Below what is split off, or more than the node has: the whole script is refused.
    for bad in [
        script(100, 299),
        script(900, 850),
        json!([{"slice": "No", "rspec": {}}]),
        json!({"slice": 1}),
    ] {
        apply(&node, dir.path(), &bad);
        assert_eq!(
            node.scs
                .get_rspec(&big)
                .await
                .unwrap()
                .rspec
                .number("cpu_guarantee"),
            Some(400)
        );
    }
    // Gone from the script: the empty one goes at once, the other when its last child does.
    apply(&node, dir.path(), &json!([]));
    let list = node.owner.list().await.unwrap();
    assert!(list.pools.iter().any(|pool| pool.rcap == big && pool.retired));
    assert_eq!(list.pools.len(), 2);
    assert!(
        node.scs
            .split_pool(&big, &rspec(guarantee(1)), None)
            .await
            .is_err()
    );
    assert_eq!(node.scs.get_rcap().await.unwrap(), child);
    node.scs.release(&child, None).await.unwrap();
    assert!(node.owner.list().await.unwrap().pools.is_empty());
}

#[tokio::test]
async fn what_is_past_its_end_time_returns_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &TestBackend::default()).await;
    let pool = node.root_pool().await;
    let mut events = node.owner.events(None).await.unwrap();
    let soon = jiff::Timestamp::now() + jiff::SignedDuration::from_millis(1500);
    let end = json!({"end_time": soon.to_string(), "cpu_guarantee": 10});
    let (_, vm_id) = node.sliver(&pool, "a_b", end.clone()).await;
    let (_, stays) = node.sliver(&pool, "a_c", json!({"cpu_guarantee": 1})).await;
    let more = node.scs.split_pool(&pool, &rspec(end), None).await.unwrap();
    node.scs.bind(&more, "a_c", None).await.unwrap();
    until_state(&mut events, vm_id, SliverState::Reachable).await;
    node.core.expire().await;
    assert_eq!(
        node.scs
            .get_rspec(&pool)
            .await
            .unwrap()
            .rspec
            .number("cpu_guarantee"),
        Some(479)
    );
    tokio::time::sleep_until(tokio::time::Instant::now() + std::time::Duration::from_millis(1600)).await;
    node.core.expire().await;
    let gone = until_state(&mut events, vm_id, SliverState::Gone).await;
    assert!(gone.reason.unwrap().contains("end_time"));
    assert_eq!(
        node.scs
            .get_rspec(&pool)
            .await
            .unwrap()
            .rspec
            .number("cpu_guarantee"),
        Some(499)
    );
    assert!(node.core.sliver(stays).is_some());
}

#[tokio::test]
async fn a_second_node_manager_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &TestBackend::default()).await;
    let error = daemon::Sockets::bind(&dir.path().join("run"))
        .await
        .err()
        .unwrap();
    assert!(error.to_string().contains("already"), "{error}");
    node.stop().await;
    daemon::Sockets::bind(&dir.path().join("run")).await.unwrap();
}
