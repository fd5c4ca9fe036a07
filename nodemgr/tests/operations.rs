//! The operations over real Unix sockets: what they do, what they refuse, who may call them.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;

use mandoline_api::nodemgr::{ClientError, ErrorBody, ErrorKind, SliverState};
use mandoline_api::unix::Client;
use mandoline_nodemgr::config::Config;
use mandoline_rspec::Rcap;
use serde_json::{Value, json};
use support::{Node, TEST_VM, TestBackend, config, rspec, until_state};

fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ErrorBody {
    match result {
        Err(ClientError::Refused(body)) => body,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn the_papers_five_operations() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &TestBackend::default()).await;
    let error = refusal(node.scs.get_rcap().await);
    assert_eq!(error.kind, ErrorKind::NotFound);

    let pool = node.root_pool().await;
    assert_eq!(
        node.scs
            .get_rspec(&pool)
            .await
            .unwrap()
            .rspec
            .number("cpu_guarantee"),
        Some(500)
    );
    let mut events = node.scs.events(None).await.unwrap();
    let want =
        json!({"vm_type": TEST_VM, "cpu_guarantee": 100, "ports": "tcp/80", "keys": ["ssh-ed25519 A me"]});
    let rcap = node.scs.split_pool(&pool, &rspec(want), None).await.unwrap();
    let rest = node.scs.get_rspec(&pool).await.unwrap().rspec;
    assert_eq!(rest.number("cpu_guarantee"), Some(400));
    assert_eq!(rest.ports().to_string(), "tcp/81-89");

    let vm_id = node.scs.bind(&rcap, "princeton_codeen", None).await.unwrap();
    let event = until_state(&mut events, vm_id, SliverState::Reachable).await;
    assert_eq!(event.slice, "plc.princeton_codeen");
    assert_eq!(event.ssh_host_keys, [format!("ssh-ed25519 HOST{vm_id}")]);
    assert!(
        event.phases_us.contains_key("recorded") && event.phases_us.contains_key("disk"),
        "{event:?}"
    );
    let bound = node.scs.get_rspec(&rcap).await.unwrap();
    assert_eq!(
        (bound.vm_id, bound.slice.as_deref()),
        (Some(vm_id), Some("plc.princeton_codeen"))
    );
    // What the table gives a sliver that names nothing, within its pools.
    assert_eq!(bound.rspec.number("mem_limit"), Some(256 << 20));
    assert_eq!(bound.rspec.number("burst_rate"), Some(100_000_000));
    assert_eq!(
        node.scs
            .ssh_keys("princeton_codeen")
            .await
            .unwrap()
            .lines()
            .count(),
        1
    );

    let list = node.scs.list().await.unwrap();
    assert_eq!(list.slivers.len(), 1);
    assert_eq!(list.slivers[0].rcap, rcap);
    assert_eq!(list.slivers[0].account, "princeton_codeen");
    assert_eq!(list.pools[0].children, 1);

    node.scs.destroy(&rcap, None).await.unwrap();
    until_state(&mut events, vm_id, SliverState::Gone).await;
    assert_eq!(
        node.scs
            .get_rspec(&pool)
            .await
            .unwrap()
            .rspec
            .number("cpu_guarantee"),
        Some(500)
    );
    assert_eq!(refusal(node.scs.get_rspec(&rcap).await).kind, ErrorKind::NotFound);
    assert!(node.backend.world().running.is_empty() && node.backend.world().disks.is_empty());
    node.stop().await;
}

#[tokio::test]
async fn a_further_pool_adds_to_a_living_sliver_and_can_be_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &TestBackend::default()).await;
    let pool = node.root_pool().await;
    let mut events = node.scs.events(None).await.unwrap();
    let (sliver, vm_id) = node
        .sliver(&pool, "a_b", json!({"cpu_share": 5, "keys": ["ssh-ed25519 A"]}))
        .await;
    until_state(&mut events, vm_id, SliverState::Reachable).await;

    let more = json!({"cpu_share": 20, "cpu_guarantee": 50, "keys": ["ssh-ed25519 B"]});
    let more = node.scs.acquire(&rspec(more), None).await.unwrap();
    assert_eq!(node.scs.bind(&more, "plc.a_b", None).await.unwrap(), vm_id);
    let has = node.scs.get_rspec(&sliver).await.unwrap().rspec;
    assert_eq!(
        (has.number("cpu_share"), has.number("cpu_guarantee")),
        (Some(25), Some(50))
    );
    assert_eq!(has.keys(), ["ssh-ed25519 B"]);
    // The added pool does not stand for the sliver.
    assert_eq!(
        refusal(node.scs.destroy(&more, None).await).kind,
        ErrorKind::Forbidden
    );
    assert_eq!(
        refusal(node.scs.release(&sliver, None).await).kind,
        ErrorKind::Conflict
    );

    node.scs.release(&more, None).await.unwrap();
    let has = node.scs.get_rspec(&sliver).await.unwrap().rspec;
    assert_eq!(
        (has.number("cpu_share"), has.keys()),
        (Some(5), ["ssh-ed25519 A".to_owned()].as_slice())
    );
    // The supervisor has brought both changes, or their sum, to the backend before the sliver stops.
    node.scs.stop(&sliver).await.unwrap();
    until_state(&mut events, vm_id, SliverState::Stopped).await;
    let world = node.backend.world();
    assert_eq!(world.starts, 1);
    assert_eq!(world.stops_with_grace, 1);
}

#[tokio::test]
async fn every_refusal_has_kind_attribute_value_and_what_is_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &TestBackend::default()).await;
    let pool = node.root_pool().await;
    let raw = Client::new(dir.path().join("run/nm.sock"));
    let post = |operation: &'static str, body: Value| {
        let raw = raw.clone();
        async move {
            let answer = raw.post(&format!("/v1/{operation}"), &body, &[]).await.unwrap();
            let error: Value = serde_json::from_slice(&answer.body).unwrap();
            (answer.status, error["error"].clone())
        }
    };
    let rcap = pool.to_hex();
    let unbound = node
        .scs
        .split_pool(&pool, &rspec(json!({"cpu_share": 1})), None)
        .await
        .unwrap();
    let strange = node
        .scs
        .split_pool(&pool, &rspec(json!({"vm_type": "chroot"})), None)
        .await
        .unwrap();
    for (operation, body, status, kind, attribute) in [
        (
            "split_pool",
            json!({"rcap": rcap, "rspec": {"cpu_shares": 1}}),
            400,
            "invalid_rspec",
            "cpu_shares",
        ),
        (
            "split_pool",
            json!({"rcap": rcap, "rspec": {"mem_limit": -1}}),
            400,
            "invalid_rspec",
            "mem_limit",
        ),
        (
            "split_pool",
            json!({"rcap": rcap, "rspec": {"cpu_guarantee": 501}}),
            409,
            "insufficient",
            "cpu_guarantee",
        ),
        (
            "split_pool",
            json!({"rcap": rcap, "rspec": {"ports": "tcp/90"}}),
            409,
            "insufficient",
            "ports",
        ),
        // A limit of the node's, far above the pool.
        (
            "split_pool",
            json!({"rcap": rcap, "rspec": {"burst_rate": "1 Gbit/s"}}),
            409,
            "insufficient",
            "burst_rate",
        ),
        (
            "split_pool",
            json!({"rcap": rcap, "rspec": []}),
            400,
            "invalid_rspec",
            "",
        ),
        ("split_pool", json!({"rcap": rcap}), 400, "bad_request", "rspec"),
        (
            "split_pool",
            json!({"rcap": rcap, "rspec": {}, "really": true}),
            400,
            "bad_request",
            "really",
        ),
        (
            "split_pool",
            json!({"rcap": "x", "rspec": {}}),
            400,
            "bad_request",
            "rcap",
        ),
        ("get_rspec", json!({"rcap": "0".repeat(32)}), 404, "not_found", ""),
        (
            "bind",
            json!({"rcap": unbound.to_hex(), "slice_name": "a_b"}),
            400,
            "invalid_rspec",
            "vm_type",
        ),
        (
            "bind",
            json!({"rcap": strange.to_hex(), "slice_name": "a_b"}),
            400,
            "unknown_vm_type",
            "vm_type",
        ),
        (
            "bind",
            json!({"rcap": strange.to_hex(), "slice_name": "Not a slice"}),
            400,
            "invalid_name",
            "slice_name",
        ),
        (
            "bind",
            json!({"rcap": strange.to_hex(), "slice_name": "ple.a_b"}),
            403,
            "forbidden",
            "",
        ),
        (
            "bind",
            json!({"rcap": strange.to_hex(), "slice_name": "site_admin"}),
            403,
            "forbidden",
            "",
        ),
        ("start", json!({"rcap": rcap}), 409, "conflict", ""),
        ("release", json!({"rcap": rcap}), 409, "conflict", ""),
        (
            "create_root_pool",
            json!({"rspec": {}, "slice_name": "a_b"}),
            403,
            "forbidden",
            "",
        ),
        ("get_rcap", json!({"rcap": rcap}), 400, "bad_request", "rcap"),
        ("fly", json!({}), 404, "not_found", ""),
    ] {
        let (got, error) = post(operation, body.clone()).await;
        assert_eq!(
            (got, error["kind"].as_str()),
            (status, Some(kind)),
            "{operation} {body}: {error}"
        );
        assert_eq!(
            error["attribute"].as_str().unwrap_or(""),
            attribute,
            "{operation} {body}: {error}"
        );
        assert!(
            !error["message"].as_str().unwrap().contains(&rcap),
            "an rcap in a message: {error}"
        );
    }
    let (_, error) = post("bind", json!({"rcap": strange.to_hex(), "slice_name": "a_b"})).await;
    assert_eq!(
        (error["value"].as_str(), error["allowed"].as_str()),
        (Some("chroot"), Some("linux_vserver, test-vm"))
    );
    // None of it changed anything.
    let list = node.scs.list().await.unwrap();
    assert_eq!((list.slivers.len(), list.pools.len()), (0, 3));
    // The papers' name works where it is mapped.
    let paper = node
        .scs
        .split_pool(&pool, &rspec(json!({"vm_type": "linux_vserver"})), None)
        .await
        .unwrap();
    node.scs.bind(&paper, "a_b", None).await.unwrap();
    assert_eq!(
        refusal(node.scs.bind(&paper, "a_b", None).await).kind,
        ErrorKind::Conflict
    );
}

#[tokio::test]
async fn memory_is_overbooked_only_as_far_as_the_owner_lets() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &TestBackend::default()).await;
    let pool = node.root_pool().await;
    node.sliver(&pool, "a_b", json!({"mem_limit": "4 GiB"})).await;
    node.sliver(&pool, "a_c", json!({"mem_limit": "3900 MiB"})).await;
    let third = rspec(json!({"vm_type": TEST_VM, "mem_limit": "1 GiB"}));
    let third = node.scs.split_pool(&pool, &third, None).await.unwrap();
    let error = refusal(node.scs.bind(&third, "a_d", None).await);
    assert_eq!(
        (error.kind, error.attribute.as_deref()),
        (ErrorKind::Insufficient, Some("mem_limit"))
    );
    assert!(error.allowed.unwrap().contains("8 GiB"));
}

#[tokio::test]
async fn callers_are_known_by_their_channel() {
    let dir = tempfile::tempdir().unwrap();
    let mode = |name: &str| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::metadata(dir.path().join("run").join(name))
            .unwrap()
            .permissions()
            .mode()
            & 0o777
    };
    // The test's user is no service here.
    let strangers = Config {
        services: BTreeMap::new(),
        ..config(dir.path())
    };
    let node = Node::start_with(strangers, &TestBackend::default()).await;
    assert_eq!((mode("owner.sock"), mode("nm.sock")), (0o600, 0o666));
    let rcap = node
        .owner
        .create_root_pool(&rspec(json!({"cpu_guarantee": 1})), "pl_conf", None)
        .await
        .unwrap();
    // Even a true rcap is of no use to a stranger.
    assert_eq!(refusal(node.scs.get_rcap().await).kind, ErrorKind::Forbidden);
    assert_eq!(
        refusal(node.scs.get_rspec(&rcap).await).kind,
        ErrorKind::Forbidden
    );
    assert_eq!(
        refusal(node.scs.split_pool(&rcap, &rspec(json!({})), None).await).kind,
        ErrorKind::Forbidden
    );
    assert_eq!(refusal(node.scs.list().await).kind, ErrorKind::Forbidden);
    assert_eq!(refusal(node.scs.events(None).await).kind, ErrorKind::Forbidden);
    // What sshd asks for is public.
    assert_eq!(refusal(node.scs.ssh_keys("a_b").await).kind, ErrorKind::NotFound);
    node.scs.node().await.unwrap();
    // The owner holds no pool itself, and sees them all.
    assert_eq!(refusal(node.owner.get_rcap().await).kind, ErrorKind::NotFound);
    assert_eq!(node.owner.list().await.unwrap().pools[0].holder, "pl_conf");
    node.owner.release(&rcap, None).await.unwrap();
}

#[tokio::test]
async fn a_repeated_key_gives_the_stored_answer_once() {
    let dir = tempfile::tempdir().unwrap();
    let backend = TestBackend::default();
    let node = Node::start(dir.path(), &backend).await;
    let pool = node.root_pool().await;
    let want = rspec(json!({"vm_type": TEST_VM, "cpu_guarantee": 100}));
    let first = node.scs.split_pool(&pool, &want, Some("k1")).await.unwrap();
    assert_eq!(
        node.scs.split_pool(&pool, &want, Some("k1")).await.unwrap(),
        first
    );
    assert_ne!(node.scs.split_pool(&pool, &want, None).await.unwrap(), first);
    assert_eq!(
        node.scs
            .get_rspec(&pool)
            .await
            .unwrap()
            .rspec
            .number("cpu_guarantee"),
        Some(300)
    );
    let other = rspec(json!({"cpu_guarantee": 1}));
    assert_eq!(
        refusal(node.scs.split_pool(&pool, &other, Some("k1")).await).kind,
        ErrorKind::KeyReused
    );
    // A key is the caller's own.
    node.owner.split_pool(&pool, &other, Some("k1")).await.unwrap();
    // What failed is not remembered: it may succeed later.
    let much = rspec(json!({"cpu_guarantee": 300}));
    assert_eq!(
        refusal(node.scs.split_pool(&pool, &much, Some("k2")).await).kind,
        ErrorKind::Insufficient
    );
    let vm_id = node.scs.bind(&first, "a_b", Some("k3")).await.unwrap();
    node.stop().await;

    let node = Node::start(dir.path(), &backend).await;
    assert_eq!(
        node.scs.split_pool(&pool, &want, Some("k1")).await.unwrap(),
        first
    );
    assert_eq!(node.scs.bind(&first, "a_b", Some("k3")).await.unwrap(), vm_id);
    let mut events = node.scs.events(Some(0)).await.unwrap();
    node.scs.destroy(&first, Some("k4")).await.unwrap();
    until_state(&mut events, vm_id, SliverState::Gone).await;
    // The sliver is gone, but its destruction can still be repeated with its key.
    node.scs.destroy(&first, Some("k4")).await.unwrap();
    assert_eq!(
        refusal(node.scs.destroy(&first, None).await).kind,
        ErrorKind::NotFound
    );
}

#[tokio::test]
async fn what_is_on_disk_gives_no_rcap_away() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &TestBackend::default()).await;
    let pool = node.root_pool().await;
    let child = node
        .scs
        .split_pool(&pool, &rspec(json!({"cpu_guarantee": 1})), Some("key"))
        .await
        .unwrap();
    let bytes = std::fs::read(dir.path().join("state/nodemgr.redb")).unwrap();
    let contains = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
    assert!(contains(b"cpu_guarantee"), "this is not the state file");
    for rcap in [&pool, &child] {
        assert!(!contains(rcap.as_bytes()) && !contains(rcap.to_hex().as_bytes()));
    }
    assert_ne!(child, Rcap::from_bytes([0; 16]));
}
