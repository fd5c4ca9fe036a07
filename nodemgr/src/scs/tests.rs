//! The service against an authority and a node manager that are made for it: over real sockets, with real
//! signatures, and with what goes wrong between machines.

mod fakes;

use std::time::Duration;

use mandoline_api::authority::{DesiredSliver, Instantiation, KnownNode, SliverState};
use serde_json::json;

use self::fakes::{AuthorityState, Fakes, NmState};
use super::plan::Tag;

/// Nothing here takes long; this is for a test that would hang.
const PATIENCE: Duration = Duration::from_secs(60);

fn want(slice: &str) -> DesiredSliver {
    DesiredSliver {
        slice_id: format!("id-of-{slice}"),
        slice: slice.into(),
        rspec: json!({"mem_limit": "64 MiB"}).as_object().cloned().unwrap(),
        keys: vec!["ssh-ed25519 AAAA a".into()],
        initscript: None,
        expires: i64::MAX / 2,
        instantiation: Instantiation::PlcInstantiated,
        enabled: true,
    }
}

async fn until(fakes: &Fakes, what: &str, condition: impl Fn(&AuthorityState, &NmState) -> bool) {
    let waiting = async {
        loop {
            let changed = fakes.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if condition(&fakes.authority.lock().unwrap(), &fakes.nm.lock().unwrap()) {
                return;
            }
            changed.await;
        }
    };
    if tokio::time::timeout(PATIENCE, waiting).await.is_err() {
        panic!(
            "{what}: {:?} {:?}",
            fakes.authority.lock().unwrap(),
            fakes.nm.lock().unwrap()
        );
    }
}

fn reported(authority: &AuthorityState, slice: &str, state: SliverState) -> bool {
    authority
        .reports
        .iter()
        .any(|report| report.slice == slice && report.state == state)
}

#[tokio::test]
async fn a_sliver_is_made_at_once_and_its_states_come_back() {
    let fakes = Fakes::start().await;
    until(&fakes, "registered and listening", |authority, _| {
        authority.registered.is_some() && authority.listeners > 0
    })
    .await;
    {
        let authority = fakes.authority.lock().unwrap();
        let registration = authority.registered.as_ref().unwrap();
        assert_eq!(registration.ssh_host_keys, ["ssh-ed25519 AAAAhost root@n1"]);
        assert_eq!(registration.ssh_endpoint.as_ref().unwrap().port, 2201);
        let offered: Vec<_> = registration
            .vm_types
            .iter()
            .map(|vm_type| vm_type.name.as_str())
            .collect();
        assert_eq!(
            offered,
            ["kvm-microvm", "linux_vserver"],
            "what is not available is not offered"
        );
    }
    // The poll is an hour away: it is the event that does it.
    fakes.want([want("demo_a")]);
    until(&fakes, "made", |_, nm| nm.slivers.len() == 1).await;
    until(&fakes, "reported", |authority, _| {
        reported(authority, "demo_a", SliverState::Reachable)
    })
    .await;
    let nm = fakes.nm.lock().unwrap();
    let sliver = &nm.slivers[0];
    assert_eq!(sliver.rspec.keys(), ["ssh-ed25519 AAAA a"]);
    assert_eq!(Tag::of(&sliver.rspec).unwrap().id, "id-of-demo_a");
    let authority = fakes.authority.lock().unwrap();
    assert!(
        authority
            .reports
            .iter()
            .all(|report| report.slice_id.as_deref() == Some("id-of-demo_a"))
    );
    let seqs: Vec<_> = authority.reports.iter().map(|report| report.seq).collect();
    assert!(seqs.is_sorted(), "{seqs:?}");
}

#[tokio::test]
async fn the_nodes_of_the_authority_become_a_sensor() {
    let fakes = Fakes::start().await;
    let node = |hostname: &str, address: Option<&str>| KnownNode {
        hostname: hostname.to_owned(),
        address: address.map(str::to_owned),
    };
    // An address stays what it is; what has none, and no name that anybody knows, is listed all the same.
    fakes.authority.lock().unwrap().nodes = vec![
        node("n2.example.invalid", None),
        node("n1.example.org", Some("192.0.2.1")),
    ];
    fakes.want([want("a_1")]);
    until(&fakes, "the nodes are published", |_, nm| {
        nm.sensors.get("nodes").map(String::as_str)
            == Some("ip,name\n,n2.example.invalid\n192.0.2.1,n1.example.org\n")
    })
    .await;
}

#[tokio::test]
async fn lost_answers_make_no_second_sliver() {
    let fakes = Fakes::start().await;
    // The node manager does what it is told and dies before it has answered.
    fakes.nm.lock().unwrap().lose_answers = vec!["split_pool", "bind"];
    fakes.want([want("demo_a")]);
    until(&fakes, "in step", |_, nm| {
        nm.slivers.len() == 1 && nm.lose_answers.is_empty()
    })
    .await;
    until(&fakes, "reported", |authority, _| {
        reported(authority, "demo_a", SliverState::Reachable)
    })
    .await;
    let nm = fakes.nm.lock().unwrap();
    assert_eq!((nm.slivers.len(), nm.pools_made), (1, 1));
}

#[tokio::test]
async fn what_is_not_wanted_any_more_goes_and_may_come_back() {
    let fakes = Fakes::start().await;
    fakes.want([want("demo_a"), want("demo_b")]);
    until(&fakes, "made", |_, nm| nm.slivers.len() == 2).await;
    fakes.want([want("demo_b")]);
    until(&fakes, "gone", |authority, nm| {
        nm.slivers.len() == 1 && reported(authority, "demo_a", SliverState::Gone)
    })
    .await;
    // The same slice with the same rspec: an old answer must not be taken for a new sliver.
    fakes.want([want("demo_a"), want("demo_b")]);
    until(&fakes, "made again", |_, nm| nm.slivers.len() == 2).await;
}

#[tokio::test]
async fn changes_reach_the_living_sliver() {
    let fakes = Fakes::start().await;
    fakes.want([want("demo_a")]);
    until(&fakes, "made", |_, nm| nm.slivers.len() == 1).await;
    fakes.want([DesiredSliver {
        keys: vec!["ssh-ed25519 BBBB b".into()],
        ..want("demo_a")
    }]);
    until(&fakes, "new keys", |_, nm| {
        nm.slivers
            .iter()
            .any(|s| s.rspec.keys() == ["ssh-ed25519 BBBB b"])
    })
    .await;
    fakes.want([DesiredSliver {
        enabled: false,
        ..want("demo_a")
    }]);
    until(&fakes, "stopped", |authority, _| {
        reported(authority, "demo_a", SliverState::Stopped)
    })
    .await;
    assert_eq!(fakes.nm.lock().unwrap().slivers.len(), 1);
}

#[tokio::test]
async fn an_authority_that_goes_away_is_found_again_and_hears_what_it_missed() {
    let fakes = Fakes::start().await;
    fakes.want([want("demo_a")]);
    until(&fakes, "made", |authority, _| {
        reported(authority, "demo_a", SliverState::Reachable)
    })
    .await;
    // It is away: streams break, calls are refused. Meanwhile something happens on the node, and it is told more.
    fakes.authority.lock().unwrap().down = true;
    fakes.cut();
    fakes.nm_event("demo_a", mandoline_api::nodemgr::SliverState::Failed);
    fakes.authority.lock().unwrap().desired.push(want("demo_b"));
    until(&fakes, "tried while away", |authority, _| authority.refused > 3).await;
    fakes.authority.lock().unwrap().down = false;
    until(&fakes, "caught up", |authority, nm| {
        nm.slivers.len() == 2 && reported(authority, "demo_a", SliverState::Failed)
    })
    .await;
}

#[tokio::test]
async fn an_authority_that_forgot_the_node_gets_to_know_it_again() {
    let fakes = Fakes::start().await;
    until(&fakes, "registered", |authority, _| {
        authority.registered.is_some()
    })
    .await;
    fakes.authority.lock().unwrap().registered = None;
    fakes.cut();
    fakes.want([want("demo_a")]);
    until(&fakes, "registered and made", |authority, nm| {
        authority.registered.is_some() && nm.slivers.len() == 1
    })
    .await;
}

#[tokio::test]
async fn answers_that_are_none_destroy_nothing() {
    let fakes = Fakes::start().await;
    fakes.want([want("demo_a")]);
    until(&fakes, "made", |_, nm| nm.slivers.len() == 1).await;
    for nonsense in ["", "[]", "{\"slivers\": 7}", "<html>busy</html>"] {
        let before = {
            let mut authority = fakes.authority.lock().unwrap();
            authority.nonsense = Some(nonsense.into());
            authority.asked
        };
        fakes.tell();
        until(&fakes, "asked", |authority, _| authority.asked > before + 1).await;
        assert_eq!(fakes.nm.lock().unwrap().destroyed, 0, "{nonsense:?}");
    }
    fakes.authority.lock().unwrap().nonsense = None;
    fakes.want([want("demo_a"), want("demo_b")]);
    until(&fakes, "goes on", |_, nm| nm.slivers.len() == 2).await;
}

#[tokio::test]
async fn what_the_node_manager_refuses_is_reported_with_its_class() {
    let fakes = Fakes::start().await;
    fakes.nm.lock().unwrap().refuse_split = Some("the pool holds 1 GiB of mem_limit".into());
    fakes.want([want("demo_a")]);
    until(&fakes, "reported", |authority, _| {
        reported(authority, "demo_a", SliverState::Failed)
    })
    .await;
    {
        let authority = fakes.authority.lock().unwrap();
        let report = authority.reports.last().unwrap();
        assert_eq!(report.class, Some(mandoline_api::authority::FailureClass::Fatal));
        assert_eq!(
            report.reason.as_deref(),
            Some("the pool holds 1 GiB of mem_limit")
        );
    }
    // Once there is room, the next time it is told brings it.
    fakes.nm.lock().unwrap().refuse_split = None;
    fakes.tell();
    until(&fakes, "made", |authority, _| {
        reported(authority, "demo_a", SliverState::Reachable)
    })
    .await;
}
