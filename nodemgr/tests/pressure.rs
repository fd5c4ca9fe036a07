//! A node that runs short: who is reset, who waits, and that their slices hear why.

mod support;

use std::collections::BTreeSet;

use mandoline_api::nodemgr::{FailureClass, SliverState};
use mandoline_nodemgr::pressure::{Memory, PressureConfig, hold, relieve_memory};
use mandoline_nodemgr::vm_type::Stats;
use serde_json::json;
use support::{Node, TestBackend, until, until_state};

const GIB: u64 = 1 << 30;

fn uses(memory: u64, disk: u64) -> Stats {
    Stats {
        memory,
        disk,
        ..Stats::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_largest_user_of_memory_is_reset_and_told_why() {
    let dir = tempfile::tempdir().unwrap();
    let backend = TestBackend::default();
    let node = Node::start(dir.path(), &backend).await;
    let pool = node.root_pool().await;
    let mut events = node.scs.events(Some(0)).await.unwrap();
    let (_, modest) = node.sliver(&pool, "plc.x_modest", json!({})).await;
    let (_, reserved) = node
        .sliver(
            &pool,
            "plc.x_reserved",
            json!({"mem_reserve": "300 MiB", "mem_limit": "400 MiB"}),
        )
        .await;
    let (_, greedy) = node.sliver(&pool, "plc.x_greedy", json!({})).await;
    for vm_id in [modest, reserved, greedy] {
        until_state(&mut events, vm_id, SliverState::Reachable).await;
    }
    backend.world().stats_of.extend([
        (modest, uses(100 << 20, 0)),
        (reserved, uses(390 << 20, 0)),
        (greedy, uses(200 << 20, 0)),
    ]);
    let bounds = PressureConfig::default();
    let mut memory = Memory {
        total: 4 * GIB,
        available: GIB,
        swap_total: 10 * GIB,
        swap_free: 2 * GIB,
    };
    assert!(!relieve_memory(&node.core, &memory, &bounds).await);
    memory.swap_free = GIB;
    assert!(relieve_memory(&node.core, &memory, &bounds).await);
    let told = until_state(&mut events, greedy, SliverState::Failed).await;
    assert_eq!(told.class, Some(FailureClass::Retryable));
    let reason = told.reason.unwrap();
    for word in ["90 %", "200 MiB", "mem_limit 256 MiB"] {
        assert!(reason.contains(word), "{reason}");
    }
    until_state(&mut events, greedy, SliverState::Reachable).await;
    assert_eq!(backend.world().starts, 4);
    assert_eq!(backend.world().running.len(), 3);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slivers_wait_while_the_disk_is_full_and_start_after() {
    let dir = tempfile::tempdir().unwrap();
    let backend = TestBackend::default();
    let node = Node::start(dir.path(), &backend).await;
    let pool = node.root_pool().await;
    let mut events = node.scs.events(Some(0)).await.unwrap();
    let (_, vm_id) = node.sliver(&pool, "plc.x_writer", json!({})).await;
    until_state(&mut events, vm_id, SliverState::Reachable).await;
    let bounds = PressureConfig::default();
    let held = hold(&node.core, GIB / 2, &bounds, BTreeSet::new()).await;
    assert_eq!(held, BTreeSet::from([vm_id]));
    let told = until_state(&mut events, vm_id, SliverState::Paused).await;
    assert!(told.reason.unwrap().contains("512 MiB of the node's disk"));
    assert!(backend.world().paused.contains(&vm_id));
    // Whoever dies meanwhile does not start again before there is room.
    backend.exit(vm_id, mandoline_nodemgr::vm_type::Exit::Reboot);
    until(&mut events, vm_id, |event| {
        event.class == Some(FailureClass::Retryable)
    })
    .await;
    assert_eq!(backend.world().starts, 1);
    // Just above the bound is not enough to go on.
    let held = hold(&node.core, GIB + GIB / 8, &bounds, held).await;
    assert_eq!(held.len(), 1);
    assert!(hold(&node.core, 2 * GIB, &bounds, held).await.is_empty());
    until_state(&mut events, vm_id, SliverState::Reachable).await;
    assert_eq!(backend.world().starts, 2);
    node.stop().await;
}
