//! Against a tree of ordinary files, which shows what would be written where; the real kernel is met in the lab.

use super::*;

const MIB: u64 = 1 << 20;

/// Fills a directory as the kernel would.
fn furnish(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    for (file, text) in [
        ("cgroup.controllers", "cpu memory pids\n"),
        ("cgroup.subtree_control", "cpu memory pids\n"),
        ("cgroup.events", "populated 0\nfrozen 0\n"),
        ("memory.current", "0\n"),
        ("cpu.stat", "usage_usec 5\nuser_usec 3\nsystem_usec 2\n"),
    ] {
        fs::write(dir.join(file), text).unwrap();
    }
    for file in [
        "cgroup.procs",
        "cpu.weight",
        "cpu.max",
        "memory.max",
        "memory.min",
        "memory.oom.group",
        "pids.max",
    ] {
        fs::write(dir.join(file), "").unwrap();
    }
}

fn tree(slivers: &[&str]) -> (tempfile::TempDir, Tree) {
    let root = tempfile::tempdir().unwrap();
    for dir in ["", "m", "m/slivers", "m/slivers/best-effort"] {
        furnish(&root.path().join(dir));
    }
    for sliver in slivers {
        furnish(&root.path().join("m/slivers").join(sliver));
    }
    let tree = Tree::new(root.path(), Path::new("m/slivers"), 100);
    (root, tree)
}

fn limits(share: u32, guarantee: u32) -> Limits {
    Limits {
        claim: Claim { share, guarantee },
        cpu_max: None,
        memory_max: 256 * MIB,
        memory_min: 100 * MIB,
        pids_max: 33,
    }
}

fn read(root: &tempfile::TempDir, file: &str) -> String {
    fs::read_to_string(root.path().join("m/slivers").join(file)).unwrap()
}

#[test]
fn guaranteed_slivers_stand_beside_the_parent_of_the_others() {
    let (root, tree) = tree(&["1", "best-effort/2"]);
    tree.create(1, &limits(1, 300)).unwrap();
    tree.create(2, &limits(20, 0)).unwrap();
    assert_eq!(read(&root, "best-effort/2/cpu.weight"), "200");
    // 600 of 1000 are left: a 21st of it belongs to sliver 1 as well.
    assert_eq!(read(&root, "1/cpu.weight"), (3000 + 6000 / 21).to_string());
    assert_eq!(
        read(&root, "best-effort/cpu.weight"),
        (6000 - 6000 / 21).to_string()
    );
    assert_eq!(read(&root, "cpu.weight"), weight_above(100, 2).to_string());
    assert_eq!(read(&root, "1/memory.max"), (256 * MIB).to_string());
    assert_eq!(read(&root, "1/memory.oom.group"), "1");
    assert_eq!(tree.present(), BTreeSet::from([1, 2]));
    assert_eq!(tree.used(2).unwrap().unwrap().cpu_us, 5);
    assert_eq!(tree.used(3).unwrap(), None);
    assert!(tree.change(3, &limits(1, 0)).is_err());
}

#[test]
fn a_guarantee_gained_while_it_runs_moves_it_and_bounds_both_places_together() {
    let (root, tree) = tree(&["7", "best-effort/7"]);
    let place = |file: &str| root.path().join("m/slivers").join(file);
    tree.create(7, &limits(10, 0)).unwrap();
    fs::write(place("best-effort/7/cgroup.procs"), "4711\n").unwrap();
    fs::write(place("best-effort/7/memory.current"), (200 * MIB).to_string()).unwrap();
    assert_eq!(tree.home(7).unwrap(), place("best-effort/7"));

    tree.change(7, &limits(10, 50)).unwrap();
    assert_eq!(read(&root, "7/cgroup.procs"), "4711");
    // The kernel would have emptied the old one.
    fs::write(place("best-effort/7/cgroup.procs"), "").unwrap();
    assert_eq!(tree.home(7).unwrap(), place("7"));
    assert_eq!(read(&root, "7/memory.max"), (56 * MIB).to_string());
    assert_eq!(read(&root, "7/memory.min"), "0");
    assert_eq!(read(&root, "best-effort/7/memory.min"), (100 * MIB).to_string());

    // As memory leaves the old place, the new one may have more.
    fs::write(place("best-effort/7/memory.current"), (20 * MIB).to_string()).unwrap();
    tree.settle();
    assert_eq!(read(&root, "7/memory.max"), (236 * MIB).to_string());
    assert_eq!(read(&root, "7/memory.min"), (80 * MIB).to_string());
}

#[test]
fn what_runs_already_has_its_claim_before_anything_is_started() {
    let (root, tree) = tree(&["1", "best-effort/2"]);
    let guaranteed = Rspec::from_json(&serde_json::json!({"cpu_guarantee": 500})).unwrap();
    let gone = Rspec::from_json(&serde_json::json!({"cpu_guarantee": 300})).unwrap();
    tree.take_over([(1, &guaranteed), (9, &gone)].into_iter());
    tree.create(2, &limits(1, 0)).unwrap();
    assert_eq!(read(&root, "best-effort/cpu.weight"), "2000");
    assert_eq!(read(&root, "1/cpu.weight"), "7000");
}

#[test]
fn limits_come_from_the_rspec() {
    let rspec = serde_json::json!({"mem_limit": "64 MiB", "mem_reserve": "32 MiB", "cpu_share": 7, "cpu_guarantee": 10,
        "cpu_capped": true});
    let rspec = Rspec::from_json(&rspec).unwrap();
    let limits = Limits::of(&rspec, 48 * MIB, 33).unwrap();
    assert_eq!((limits.memory_max, limits.memory_min), (112 * MIB, 32 * MIB));
    assert_eq!(
        limits.claim,
        Claim {
            share: 7,
            guarantee: 10
        }
    );
    // 10 of 1000 is 1 % of the node (NSDI'04 paper, section 4.2.2).
    let cap = limits.cpu_max.unwrap();
    let part = cap.quota_us() as f64 / cap.period_us() as f64;
    assert!((part - 0.01 * processors() as f64).abs() < 1e-9, "{part}");
    // A cap of nothing cannot be.
    let capped = Rspec::from_json(&serde_json::json!({"cpu_capped": true})).unwrap();
    let failure = Limits::of(&capped, 0, 1).unwrap_err();
    assert!(failure.reason.contains("or more"), "{failure}");
}
