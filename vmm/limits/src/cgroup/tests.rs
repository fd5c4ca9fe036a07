//! Against a tree of ordinary files, which shows what would be written where; the real kernel is
//! met in the lab.

use std::fs;

use proptest::prelude::*;

use super::*;

const FILES: [&str; 11] = [
    "cpu.weight",
    "cpu.max",
    "memory.max",
    "memory.high",
    "memory.min",
    "memory.oom.group",
    "pids.max",
    "cgroup.procs",
    "cgroup.freeze",
    "cgroup.kill",
    "cpu.stat",
];

/// Fills a directory as the kernel would.
fn furnish(dir: &Path, controllers: &str, enabled: &str) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("cgroup.controllers"), controllers).unwrap();
    fs::write(dir.join("cgroup.subtree_control"), enabled).unwrap();
    fs::write(dir.join("cgroup.events"), "populated 0\nfrozen 0\n").unwrap();
    for file in FILES {
        fs::write(dir.join(file), "").unwrap();
    }
}

fn tree() -> (tempfile::TempDir, Cgroup) {
    let root = tempfile::tempdir().unwrap();
    furnish(root.path(), "cpu io memory pids\n", "cpu memory pids\n");
    furnish(
        &root.path().join("slivers"),
        "cpu memory pids\n",
        "cpu memory pids\n",
    );
    furnish(&root.path().join("slivers/7"), "cpu memory pids\n", "");
    let cgroup = Cgroup::create(root.path(), Path::new("slivers/7")).unwrap();
    (root, cgroup)
}

#[test]
fn limits_go_to_their_files() {
    let (_root, cgroup) = tree();
    cgroup.set_cpu_share(CpuShare::new(25).unwrap()).unwrap();
    cgroup.set_cpu_max(Some(CpuMax::of_one_cpu(10).unwrap())).unwrap();
    cgroup
        .set_memory(&MemoryLimits {
            max: Some(1 << 28),
            oom_group: Some(true),
            ..Default::default()
        })
        .unwrap();
    cgroup.set_pids_max(64).unwrap();
    cgroup.add_process(4711).unwrap();
    for (file, want) in [
        ("cpu.weight", "250"),
        ("cpu.max", "2000 200000"),
        ("memory.max", "268435456"),
        ("memory.oom.group", "1"),
        ("memory.high", ""),
        ("pids.max", "64"),
    ] {
        assert_eq!(cgroup.read(file).unwrap(), want, "{file}");
    }
    assert_eq!(cgroup.processes().unwrap(), [4711]);
    cgroup.set_cpu_max(None).unwrap();
    assert_eq!(cgroup.read("cpu.max").unwrap(), "max");
}

#[test]
fn a_tree_that_is_not_v2_is_named() {
    let root = tempfile::tempdir().unwrap();
    let error = Cgroup::create(root.path(), Path::new("a")).unwrap_err();
    assert!(matches!(error, Error::NotCgroup2 { .. }), "{error}");
}

#[test]
fn a_missing_controller_is_named() {
    let root = tempfile::tempdir().unwrap();
    furnish(root.path(), "cpu memory\n", "cpu memory\n");
    let error = Cgroup::create(root.path(), Path::new("a"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("pids") && error.contains("cpu memory"), "{error}");
}

#[test]
fn names_stay_below_the_root() {
    let (root, _) = tree();
    for bad in ["", "..", "a/../b", "/etc", "./a"] {
        assert!(Cgroup::create(root.path(), Path::new(bad)).is_err(), "{bad:?}");
    }
}

#[test]
fn a_populated_group_that_does_not_empty_is_an_error() {
    let (root, cgroup) = tree();
    fs::write(
        root.path().join("slivers/7/cgroup.events"),
        "populated 1\nfrozen 0\n",
    )
    .unwrap();
    let error = cgroup.kill(Duration::from_millis(1)).unwrap_err();
    assert!(matches!(error, Error::StillPopulated { .. }), "{error}");
    assert_eq!(cgroup.read("cgroup.kill").unwrap(), "1");
}

#[test]
fn memory_bounds_are_checked_before_anything_is_written() {
    let (_root, cgroup) = tree();
    let wrong = [
        MemoryLimits {
            max: Some(0),
            ..Default::default()
        },
        MemoryLimits {
            max: Some(1 << 20),
            min: Some(1 << 21),
            ..Default::default()
        },
    ];
    for limits in wrong {
        assert!(cgroup.set_memory(&limits).is_err());
        assert_eq!(cgroup.read("memory.max").unwrap(), "");
    }
}

#[test]
fn caps_too_small_are_refused_with_the_bound() {
    let error = CpuMax::of_one_cpu(1).unwrap_err().to_string();
    assert!(error.contains("1/1000") && error.contains("2/1000"), "{error}");
    assert!(CpuMax::new(1_999, 100_000).is_err());
    assert!(CpuShare::new(0).is_err() && CpuShare::new(1001).is_err());
}

#[test]
fn stats_read_what_the_kernel_writes_and_refuse_the_rest() {
    let cpu = CpuStats::parse("usage_usec 12\nuser_usec 7\nsystem_usec 5\nnice_usec 0\nnr_periods 3\nnr_throttled 1\nthrottled_usec 99\n").unwrap();
    assert_eq!((cpu.usage_us, cpu.throttled_us), (12, 99));
    assert!(CpuStats::parse("usage_usec many\n").is_err());
    assert!(Events::parse("frozen 0\n").is_err());
    assert_eq!(
        MemoryEvents::parse("low 0\nhigh 0\nmax 4\noom 1\noom_kill 1\noom_group_kill 1\n")
            .unwrap()
            .oom_kill,
        1
    );
}

proptest! {
    #[test]
    fn caps_keep_their_ratio_and_their_least_quota(thousandths in 2u32..64_000) {
        let max = CpuMax::of_one_cpu(thousandths).unwrap();
        prop_assert!(max.quota_us() >= CpuMax::MIN_QUOTA_US);
        prop_assert!(max.period_us() <= CpuMax::MAX_PERIOD_US);
        // Within one part in a thousand of what was asked for, never above it.
        let (got, want) = (max.quota_us() * 1000, u64::from(thousandths) * max.period_us());
        prop_assert!(got <= want && want - got < 1000);
    }
}
