//! Plans: what is wanted against what is there.

use mandoline_api::authority::{DesiredSliver, Instantiation};
use mandoline_api::nodemgr::{FailureClass, Initscript, SliverEvent, SliverInfo, SliverState};
use mandoline_rspec::{KVM_MICROVM, Rcap, Rspec};
use proptest::prelude::*;
use serde_json::json;

use super::plan::*;

const NOW: i64 = 1_000;

fn want(slice: &str, rspec: serde_json::Value) -> DesiredSliver {
    DesiredSliver {
        slice_id: format!("id-of-{slice}"),
        slice: slice.into(),
        rspec: rspec.as_object().cloned().unwrap(),
        keys: vec!["ssh-ed25519 AAAA a".into()],
        initscript: None,
        expires: NOW + 100,
        instantiation: Instantiation::PlcInstantiated,
        enabled: true,
    }
}

/// The sliver as the node manager has it after `create`.
fn made(rspec: &Rspec, number: u8) -> SliverInfo {
    SliverInfo {
        parent: None,
        rcap: Rcap::from_bytes([number; 16]),
        rspec: rspec.clone(),
        account: Tag::of(rspec).unwrap().slice,
        event: SliverEvent {
            seq: 1,
            vm_id: number.into(),
            slice: format!("plc.{}", Tag::of(rspec).unwrap().slice),
            vm_type: KVM_MICROVM.into(),
            state: SliverState::Reachable,
            reason: None,
            class: None,
            initscript: Initscript::None,
            address: None,
            ssh_host_keys: vec![],
            phases_us: Default::default(),
            unix_ns: 0,
        },
    }
}

fn created(wanted: &DesiredSliver) -> SliverInfo {
    match plan(std::slice::from_ref(wanted), &[], NOW).actions.as_slice() {
        [Action::Create { rspec, .. }] => made(rspec, 1),
        other => panic!("{other:?}"),
    }
}

/// Carries an update out as the node manager does.
fn updated(sliver: &SliverInfo, wanted: &DesiredSliver) -> SliverInfo {
    let mut sliver = sliver.clone();
    for action in plan(std::slice::from_ref(wanted), std::slice::from_ref(&sliver), NOW).actions {
        match action {
            Action::Update { more, .. } => sliver.rspec.add(&more).unwrap(),
            other => panic!("{other:?}"),
        }
    }
    sliver
}

#[test]
fn a_new_sliver_has_its_type_its_keys_its_tag_and_nothing_of_the_authoritys() {
    let wanted = want(
        "a_b",
        json!({"mem_limit": "128 MiB", "x-authority-site": 3, "x-other": 4}),
    );
    let sliver = created(&wanted);
    assert_eq!(sliver.rspec.vm_type(), Some(KVM_MICROVM));
    assert_eq!(sliver.rspec.number("mem_limit"), Some(128 << 20));
    assert_eq!(sliver.rspec.keys(), wanted.keys);
    assert!(sliver.rspec.get("x-authority-site").is_none());
    assert!(sliver.rspec.get("x-other").is_some());
    let tag = Tag::of(&sliver.rspec).unwrap();
    assert_eq!(
        (tag.slice.as_str(), tag.id.as_str(), tag.expires),
        ("a_b", "id-of-a_b", NOW + 100)
    );
}

#[test]
fn what_is_as_wanted_is_left_alone() {
    let wanted = want(
        "a_b",
        json!({"mem_limit": "128 MiB", "ports": ["tcp/80"], "cpu_share": 5}),
    );
    let out = plan(std::slice::from_ref(&wanted), &[created(&wanted)], NOW);
    assert_eq!(
        out,
        Plan {
            next_expiry: Some(NOW + 100),
            ..Plan::default()
        }
    );
}

#[test]
fn more_is_added_and_labels_are_replaced() {
    let before = want(
        "a_b",
        json!({"mem_limit": "128 MiB", "cpu_share": 5, "ports": ["tcp/80"]}),
    );
    let mut after = want(
        "a_b",
        json!({"mem_limit": "192 MiB", "cpu_share": 5, "ports": ["tcp/80", "tcp/81"]}),
    );
    after.keys = vec!["ssh-ed25519 BBBB b".into()];
    after.expires += 50;
    let sliver = updated(&created(&before), &after);
    assert_eq!(sliver.rspec.number("mem_limit"), Some(192 << 20));
    assert_eq!(sliver.rspec.number("cpu_share"), Some(5));
    assert_eq!(sliver.rspec.ports().len(), 2);
    assert_eq!(sliver.rspec.keys(), after.keys);
    let tag = Tag::of(&sliver.rspec).unwrap();
    assert_eq!((tag.expires, tag.rev), (after.expires, 1));
    assert!(
        plan(&[after], &[sliver], NOW).actions.is_empty(),
        "one update is enough"
    );
}

#[test]
fn going_back_to_an_earlier_state_is_another_update() {
    let first = want("a_b", json!({}));
    let second = DesiredSliver {
        keys: vec!["ssh-ed25519 BBBB b".into()],
        ..first.clone()
    };
    let once = updated(&created(&first), &second);
    let twice = updated(&once, &first);
    assert_eq!(twice.rspec.keys(), first.keys);
    assert_eq!(Tag::of(&twice.rspec).unwrap().rev, 2);
}

#[test]
fn what_a_living_sliver_cannot_become_is_said_and_the_rest_is_done() {
    let before = want("a_b", json!({"mem_limit": "128 MiB", "cpu_share": 5}));
    let after = want(
        "a_b",
        json!({"mem_limit": "64 MiB", "cpu_share": 6, "vm_type": "other"}),
    );
    let sliver = created(&before);
    let out = plan(std::slice::from_ref(&after), std::slice::from_ref(&sliver), NOW);
    let [failure] = out.failures.as_slice() else {
        panic!("{out:?}")
    };
    assert_eq!(failure.class, FailureClass::Continuable);
    assert_eq!(failure.state, Some(SliverState::Reachable));
    assert!(
        failure.reason.contains("mem_limit") && failure.reason.contains("vm_type"),
        "{}",
        failure.reason
    );
    assert_eq!(updated(&sliver, &after).rspec.number("cpu_share"), Some(6));
}

#[test]
fn enabling_and_disabling() {
    let on = want("a_b", json!({}));
    let off = DesiredSliver {
        enabled: false,
        ..on.clone()
    };
    let power = |wanted: &DesiredSliver, sliver: &SliverInfo| match plan(
        std::slice::from_ref(wanted),
        std::slice::from_ref(sliver),
        NOW,
    )
    .actions
    .as_slice()
    {
        [Action::Update { power, .. }] => *power,
        [] => None,
        other => panic!("{other:?}"),
    };
    let sliver = created(&on);
    assert_eq!(power(&off, &sliver), Some(Power::Stop));
    let stopped = updated(&sliver, &off);
    assert_eq!(power(&off, &stopped), None);
    assert_eq!(power(&on, &stopped), Some(Power::Start));
    assert!(
        plan(&[off], &[], NOW).actions.is_empty(),
        "what is not to run is not made"
    );
}

#[test]
fn what_is_not_wanted_goes_and_goes_first() {
    let (old, new) = (want("a_old", json!({})), want("a_new", json!({})));
    let out = plan(std::slice::from_ref(&new), &[created(&old)], NOW);
    assert!(
        matches!(
            out.actions.as_slice(),
            [Action::Destroy { .. }, Action::Create { .. }]
        ),
        "{out:?}"
    );

    let again = DesiredSliver {
        slice_id: "another".into(),
        ..old.clone()
    };
    let out = plan(&[again], &[created(&old)], NOW);
    assert!(
        matches!(
            out.actions.as_slice(),
            [Action::Destroy { .. }, Action::Create { .. }]
        ),
        "{out:?}"
    );
}

#[test]
fn who_else_makes_slivers_is_left_alone() {
    let mut other = created(&want("a_b", json!({})));
    other.rspec.remove(TAG);
    assert!(plan(&[], &[other], NOW).actions.is_empty());

    let delegated = DesiredSliver {
        instantiation: Instantiation::Delegated,
        ..want("a_b", json!({}))
    };
    assert!(plan(&[delegated], &[], NOW).actions.is_empty());
    let none = DesiredSliver {
        instantiation: Instantiation::NotInstantiated,
        ..want("a_b", json!({}))
    };
    assert!(plan(std::slice::from_ref(&none), &[], NOW).actions.is_empty());
    let sliver = created(&want("a_b", json!({})));
    assert!(matches!(
        plan(&[none], &[sliver], NOW).actions.as_slice(),
        [Action::Destroy { .. }]
    ));
}

#[test]
fn slivers_end_with_their_slices_even_alone() {
    let wanted = want("a_b", json!({}));
    let sliver = created(&wanted);
    let late = NOW + 100;
    assert!(matches!(
        plan(&[wanted], std::slice::from_ref(&sliver), late)
            .actions
            .as_slice(),
        [Action::Destroy { .. }]
    ));
    assert!(matches!(
        expired(std::slice::from_ref(&sliver), late).actions.as_slice(),
        [Action::Destroy { .. }]
    ));
    assert_eq!(
        expired(&[sliver], NOW),
        Plan {
            next_expiry: Some(NOW + 100),
            ..Plan::default()
        }
    );
}

#[test]
fn an_rspec_that_cannot_be_read_is_a_failure_and_destroys_nothing() {
    let wanted = want("a_b", json!({}));
    let bad = DesiredSliver {
        rspec: json!({"mem": 1}).as_object().cloned().unwrap(),
        ..wanted.clone()
    };
    let out = plan(std::slice::from_ref(&bad), &[created(&wanted)], NOW);
    assert!(out.actions.is_empty());
    assert_eq!(out.failures[0].class, FailureClass::Continuable);
    let out = plan(&[bad], &[], NOW);
    assert_eq!(out.failures[0].class, FailureClass::Fatal);
    assert!(
        out.failures[0].reason.contains("`mem`"),
        "{}",
        out.failures[0].reason
    );
}

proptest! {
    /// However the wanted memory and share go up, the sum of what was bound is what is wanted; and a plan that
    /// was carried out leaves nothing to do.
    #[test]
    fn updates_converge(steps in proptest::collection::vec((0u64..8, 0u64..8, any::<bool>()), 1..8)) {
        let (mut mem, mut share) = (64u64 << 20, 1u64);
        let at = |mem: u64, share: u64, key: bool| {
            let mut wanted = want("a_b", json!({"mem_limit": mem, "cpu_share": share}));
            if key { wanted.keys.push("ssh-ed25519 BBBB b".into()); }
            wanted
        };
        let mut sliver = created(&at(mem, share, false));
        for (more_mem, more_share, key) in steps {
            // A further pool is never smaller than the least that the table allows.
            mem += more_mem * (32 << 20);
            share += more_share;
            let wanted = at(mem, share, key);
            sliver = updated(&sliver, &wanted);
            prop_assert_eq!(sliver.rspec.number("mem_limit"), Some(mem));
            prop_assert_eq!(sliver.rspec.number("cpu_share"), Some(share));
            let rest = plan(std::slice::from_ref(&wanted), std::slice::from_ref(&sliver), NOW);
            prop_assert!(rest.actions.is_empty() && rest.failures.is_empty(), "{:?}", rest);
        }
    }
}
