//! The limits of a VM against the real kernel: network in namespaces of the tests' own, cgroups
//! where a cgroup v2 tree with controllers is mounted. What is not there is said, and skipped.

#![allow(clippy::unwrap_used)]

use std::io;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mandoline_limits::cgroup::{Cgroup, CpuMax, CpuShare, MemoryLimits};
use mandoline_limits::netlink::Connection;
use mandoline_limits::netlink::nft::{Family, Table};
use mandoline_limits::shaper::Bandwidth;
use mandoline_limits::tap::VNET_HDR_LEN;
use mandoline_limits::vm::{self, TapLimits, VmLimits};
use mandoline_limits::{Error, Rate};

fn in_namespace(test: impl FnOnce() + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: needs root for a network namespace");
    }
    let thread = std::thread::spawn(move || {
        // SAFETY: unshare touches no memory; only this thread changes its network namespace.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return eprintln!(
                "skipped: no network namespaces here: {}",
                io::Error::last_os_error()
            );
        }
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn rate(text: &str) -> Rate {
    text.parse().unwrap()
}

fn limits(tap: &str, guarantee: &str, peak: &str) -> VmLimits {
    let bandwidth = Bandwidth {
        guarantee: rate(guarantee),
        peak: Some(rate(peak)),
    };
    let address = Some((Ipv4Addr::new(10, 99, 0, 1), 24));
    VmLimits {
        tap: Some(TapLimits {
            name: tap.to_owned(),
            address,
            mtu: Some(1400),
            bandwidth: Some(bandwidth),
        }),
        ..VmLimits::new(tap)
    }
}

#[test]
fn what_a_tap_sends_goes_through_its_class() {
    in_namespace(|| {
        let mut one = vm::apply(&limits("t1", "1 Mbit/s", "2 Mbit/s")).unwrap();
        let two = vm::apply(&limits("t2", "5 Gbit/s", "40 Gbit/s")).unwrap();
        let class = one.class().unwrap().unwrap();
        assert_eq!(
            (class.parameters.rate, class.parameters.ceil),
            (rate("1 Mbit/s"), rate("2 Mbit/s"))
        );
        // Rates of 2^32 bytes a second and more travel in attributes of their own.
        let wide = two.class().unwrap().unwrap();
        assert_eq!(
            (wide.parameters.rate, wide.parameters.ceil),
            (rate("5 Gbit/s"), rate("40 Gbit/s"))
        );
        assert!(wide.parameters.quantum > class.parameters.quantum);
        assert_ne!(class.minor, wide.minor);

        let tap = one.take_tap().unwrap();
        let frame = [
            vec![0; VNET_HDR_LEN as usize],
            vec![0xff; 6],
            vec![2, 0, 0, 0, 0, 1],
            vec![0x88, 0xb5],
            vec![0; 46],
        ]
        .concat();
        for _ in 0..10 {
            assert_eq!(rustix::io::write(&tap, &frame).unwrap(), frame.len());
        }
        let stats = one.class().unwrap().unwrap().stats;
        assert_eq!((stats.packets, stats.bytes), (10, 600));
        assert_eq!(two.class().unwrap().unwrap().stats.packets, 0);

        one.set_bandwidth(&Bandwidth {
            guarantee: rate("3 Mbit/s"),
            peak: None,
        })
        .unwrap();
        assert_eq!(one.class().unwrap().unwrap().parameters.rate, rate("3 Mbit/s"));
        assert_eq!(
            one.class().unwrap().unwrap().stats.packets,
            10,
            "a change keeps the counters"
        );

        let mut connection = Connection::route().unwrap();
        let link = connection.require_link("t1").unwrap();
        assert!(link.up && link.mtu == 1400);
        assert_eq!(
            connection.addresses(link.index).unwrap(),
            [(Ipv4Addr::new(10, 99, 0, 1), 24)]
        );
        drop(tap);
        one.close().unwrap();
        two.close().unwrap();
        assert_clean();
    });
}

#[test]
fn a_tap_without_a_limit_gets_one_while_it_runs() {
    in_namespace(|| {
        let mut free = limits("t1", "1 Mbit/s", "1 Mbit/s");
        free.tap.as_mut().unwrap().bandwidth = None;
        let mut guard = vm::apply(&free).unwrap();
        assert!(guard.class().unwrap().is_none());
        let bandwidth = Bandwidth {
            guarantee: rate("3 Mbit/s"),
            peak: Some(rate("4 Mbit/s")),
        };
        guard.set_bandwidth(&bandwidth).unwrap();
        let parameters = guard.class().unwrap().unwrap().parameters;
        assert_eq!(
            (parameters.rate, parameters.ceil),
            (rate("3 Mbit/s"), rate("4 Mbit/s"))
        );
        drop(guard.take_tap());
        guard.close().unwrap();
        let mut none = vm::apply(&VmLimits::new("none")).unwrap();
        assert!(
            none.set_bandwidth(&bandwidth)
                .unwrap_err()
                .to_string()
                .contains("a tap")
        );
        assert_clean();
    });
}

#[test]
fn what_a_killed_run_left_is_taken_away_by_the_next() {
    in_namespace(|| {
        let mut killed = vm::apply(&limits("t1", "1 Mbit/s", "1 Mbit/s")).unwrap();
        let slot = killed.class().unwrap().unwrap().minor;
        // As after kill -9: descriptors closed, nothing undone.
        drop(killed.take_tap());
        std::mem::forget(killed);
        let next = vm::apply(&limits("t2", "1 Mbit/s", "1 Mbit/s")).unwrap();
        assert_eq!(next.class().unwrap().unwrap().minor, slot);
        drop(next);
        assert_clean();
    });
}

#[test]
fn a_limit_that_cannot_be_had_leaves_nothing_behind() {
    in_namespace(|| {
        let busy = vm::apply(&limits("t1", "1 Mbit/s", "1 Mbit/s")).unwrap();
        let error = vm::apply(&limits("t1", "1 Mbit/s", "1 Mbit/s")).unwrap_err();
        assert_eq!(error.errno(), Some(libc::EBUSY), "{error}");
        let error = vm::apply(&limits("t2", "2 Mbit/s", "1 Mbit/s")).unwrap_err();
        assert!(matches!(error, Error::OutOfRange { .. }), "{error}");
        assert!(Connection::route().unwrap().link("t2").unwrap().is_none());
        busy.close().unwrap();
        assert_clean();
    });
}

fn assert_clean() {
    let mut connection = Connection::route().unwrap();
    let links: Vec<_> = connection.links().unwrap().into_iter().map(|l| l.name).collect();
    assert!(!links.iter().any(|l| l.starts_with('t')), "{links:?}");
    let device = connection.require_link(vm::DEVICE).unwrap();
    let classes: Vec<_> = connection
        .classes(device.index)
        .unwrap()
        .iter()
        .map(|c| c.minor)
        .collect();
    assert_eq!(classes, [1, 2], "only the tree itself is left");
    let table = Table::new(Family::Netdev, vm::TABLE);
    assert_eq!(Connection::netfilter().unwrap().chains(&table).unwrap(), [""; 0]);
}

/// The root of a cgroup v2 tree that has the controllers.
fn cgroup_root() -> Option<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let controllers = std::fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
    let all = mandoline_limits::cgroup::CONTROLLERS
        .iter()
        .all(|c| controllers.split_whitespace().any(|h| h == *c));
    if !all || !rustix::process::geteuid().is_root() {
        eprintln!(
            "skipped: needs root and cgroup v2 at {} with {:?}",
            root.display(),
            mandoline_limits::cgroup::CONTROLLERS
        );
        return None;
    }
    Some(root.to_owned())
}

#[test]
fn a_real_cgroup_limits_freezes_kills_and_goes() {
    let Some(root) = cgroup_root() else { return };
    let name = format!("mandoline-test/{}", std::process::id());
    let cgroup = Cgroup::create(&root, Path::new(&name)).unwrap();
    cgroup.set_cpu_share(CpuShare::new(25).unwrap()).unwrap();
    cgroup.set_cpu_max(Some(CpuMax::of_one_cpu(10).unwrap())).unwrap();
    cgroup
        .set_memory(&MemoryLimits {
            max: Some(64 << 20),
            min: Some(1 << 20),
            oom_group: Some(true),
            ..Default::default()
        })
        .unwrap();
    cgroup.set_pids_max(16).unwrap();
    for (file, want) in [
        ("cpu.weight", "250"),
        ("cpu.max", "2000 200000"),
        ("memory.max", "67108864"),
        ("memory.min", "1048576"),
        ("memory.oom.group", "1"),
        ("pids.max", "16"),
    ] {
        assert_eq!(cgroup.read(file).unwrap().trim(), want, "{file}");
    }
    let procs = cgroup.path().join("cgroup.procs");
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "while :; do :; done"]);
    // SAFETY: between fork and exec only open, write and close are called, on memory made before.
    let mut child = unsafe { command.pre_exec(move || std::fs::write(&procs, "0")) }
        .spawn()
        .unwrap();
    assert_eq!(cgroup.processes().unwrap(), [child.id()]);
    cgroup.freeze(true, Duration::from_secs(10)).unwrap();
    assert!(cgroup.events().unwrap().frozen);
    cgroup.freeze(false, Duration::from_secs(10)).unwrap();
    cgroup.cpu_stats().unwrap();
    cgroup.memory_events().unwrap();
    assert!(cgroup.memory_current().unwrap() > 0);
    let path = cgroup.path().to_owned();
    cgroup.remove(Duration::from_secs(10)).unwrap();
    assert!(!path.exists());
    assert!(!child.wait().unwrap().success());
    // The parent is shared by tests that run side by side; the last one takes it along.
    let _ = std::fs::remove_dir(root.join("mandoline-test"));
}
