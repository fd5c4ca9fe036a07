//! Every seed, and numbers that are the same each time, through every target: what once was found stays found.
//!
//! `MANDOLINE_WRITE_SEEDS=1 cargo test -p mandoline-vmm seeds` writes the seeds anew.

use std::path::{Path, PathBuf};

use crate::boot::{bzimage, elf};
use crate::fuzzing::bench::Bench;
use crate::fuzzing::subject::KINDS;
use crate::fuzzing::{TARGETS, incidents, target};

/// Inputs made of numbers, for each target.
const INPUTS: u64 = 20;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds")
}

fn seeds_of(name: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory().join(name)).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

#[test]
fn every_seed_passes() {
    for (name, run) in TARGETS {
        let seeds = seeds_of(name);
        assert!(!seeds.is_empty(), "{name}");
        for path in seeds {
            eprintln!("{}", path.display());
            run(&std::fs::read(path).unwrap());
        }
    }
}

#[test]
fn any_bytes_pass() {
    let mut state = 0x5eed_u64;
    let mut next = || {
        // xorshift64 (Marsaglia 2003)
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for (name, run) in TARGETS {
        let seeds: Vec<Vec<u8>> = seeds_of(name)
            .iter()
            .map(|path| std::fs::read(path).unwrap())
            .collect();
        for n in 0..INPUTS {
            // Half of them seeds with a few bytes changed.
            let mut bytes = if n % 2 == 0 {
                (0..next() % 300).map(|_| next() as u8).collect()
            } else {
                seeds[next() as usize % seeds.len()].clone()
            };
            for _ in 0..next() % 4 {
                if !bytes.is_empty() {
                    let at = next() as usize % bytes.len();
                    bytes[at] = next() as u8;
                }
            }
            eprintln!("{name} {n}");
            run(&bytes);
        }
    }
}

/// What is written by `MANDOLINE_WRITE_SEEDS`: (target, name, bytes).
fn seeds() -> Vec<(String, String, Vec<u8>)> {
    let mut seeds = incidents::seeds();
    let mut add = |target: &str, name: &str, bytes: Vec<u8>| seeds.push((target.into(), name.into(), bytes));
    let code = [0xf4, 0xeb, 0xfd];
    add("kernel", "elf-pvh", elf::tiny(&code, 0x10_0000));
    add("kernel", "elf-linux64", elf::tiny_linux64(&code, 0x20_0000));
    add("kernel", "bzimage", bzimage::tiny(&code, 0x20_0000));
    add(
        "config",
        "whole",
        br#"{"boot-source":{"kernel_image_path":"/k","boot_args":"quiet"},"drives":[{"drive_id":"rootfs","path_on_host":"/r","is_root_device":true,"is_read_only":true}],"network-interfaces":[{"iface_id":"eth0","host_dev_name":"tap0"}],"machine-config":{"vcpu_count":2,"mem_size_mib":128},"vsock":{"guest_cid":3,"uds_path":"/v"},"entropy":{},"balloon":{"amount_mib":1,"deflate_on_oom":true,"stats_polling_interval_s":1}}"#.to_vec(),
    );
    for (name, line, body) in [
        (
            "machine",
            "PUT /machine-config",
            r#"{"vcpu_count":1,"mem_size_mib":128}"#,
        ),
        (
            "drive",
            "PUT /drives/a",
            r#"{"drive_id":"a","path_on_host":"/d","is_root_device":false}"#,
        ),
        ("patch", "PATCH /vm", r#"{"state":"Paused"}"#),
        ("action", "PUT /actions", r#"{"action_type":"InstanceStart"}"#),
        (
            "balloon",
            "PATCH /balloon/statistics",
            r#"{"stats_polling_interval_s":1}"#,
        ),
    ] {
        let head = format!("{line} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        add(
            "api",
            name,
            (head + "GET /vm/config HTTP/1.1\r\n\r\n").into_bytes(),
        );
    }
    for (number, kind) in (0u8..).zip(KINDS) {
        let mut bench = Bench::new(kind, false);
        bench.honest();
        let text = serde_json::to_vec(&bench.saved()).unwrap();
        add(
            "restore",
            &format!("{kind:?}").to_lowercase(),
            [&[number][..], &text].concat(),
        );
    }
    // Size, burst and refill time with their shifts, twice; then steps.
    let bucket = |shift: u8| [&[0xff; 8][..], &[shift], &[0; 9], &[0xff; 8], &[shift]].concat();
    for shift in [0, 40, 55] {
        let mut bytes = [bucket(shift), bucket(shift)].concat();
        for step in [0u8, 3, 5, 1, 6, 0, 7, 3, 0] {
            bytes.extend([&[step][..], &[0xff; 8], &[50], &[1]].concat());
        }
        add("rate-limiter", &format!("shift-{shift}"), bytes);
    }
    add(
        "serial",
        "loop-and-feed",
        [
            [1, 4, 0x18].repeat(3),
            [0, 0, b'x'].repeat(70),
            vec![3, 3, 1, 2, 3, 2, 0, 5, 4, 9, 0],
        ]
        .concat(),
    );
    seeds
}

#[test]
fn seeds_of_incidents_are_as_they_are_written_here() {
    if std::env::var_os("MANDOLINE_WRITE_SEEDS").is_some() {
        for (target, name, bytes) in seeds() {
            let directory = directory().join(target);
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(directory.join(name), bytes).unwrap();
        }
    }
    for (name, seed, bytes) in incidents::seeds() {
        assert!(target(&name).is_some(), "{name}");
        assert_eq!(
            std::fs::read(directory().join(&name).join(&seed)).unwrap(),
            bytes,
            "{name}/{seed}"
        );
    }
}
