//! What the engines cost, to choose the default by. Nothing is asserted: run it with
//! `cargo test --release -p mandoline-vmm --lib -- --ignored --nocapture blk::tests::speed`.

use std::time::Instant;

use super::*;

const BLOCK: u32 = 4096;
const FILE_BYTES: u64 = 256 << 20;
const REQUESTS: u64 = 40_000;
const ROUNDS: usize = 7;

/// Offsets in blocks (xorshift; Marsaglia 2003).
fn next_block(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state % (FILE_BYTES / u64::from(BLOCK))
}

/// Mean ns a request, `depth` of them at once.
fn measure(bench: &mut Bench, kind: u32, depth: u64, requests: u64, state: &mut u64) -> u64 {
    let start = Instant::now();
    for _ in 0..requests / depth {
        for n in 0..depth {
            let sector = next_block(state) * u64::from(BLOCK) / SECTOR;
            bench.offer(n, kind, sector, BLOCK, kind == 0);
        }
        bench.kick();
        for _ in 0..depth {
            bench.used();
        }
    }
    start.elapsed().as_nanos() as u64 / (requests / depth * depth)
}

fn forget_cache(file: &File) {
    file.sync_all().unwrap();
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

#[test]
#[ignore = "a measurement"]
fn engines() {
    // Beside the build, since a temporary directory may be in memory.
    let directory = std::env::current_exe().unwrap();
    let mut file = tempfile::tempfile_in(directory.parent().unwrap()).unwrap();
    let chunk = vec![0x5a; 1 << 20];
    for _ in 0..FILE_BYTES >> 20 {
        file.write_all(&chunk).unwrap();
    }
    println!("ns a request of 4 KiB at a random place; medians of {ROUNDS}, interleaved");
    println!("{:<24}{:>6}{:>10}{:>10}", "", "depth", "Sync", "Async");
    let mut state = 0x9e37_79b9_7f4a_7c15;
    for (what, kind, cached, requests) in [
        ("read, cached", 0, true, REQUESTS),
        ("write, cached", 1, true, REQUESTS),
        ("read, not cached", 0, false, 1024),
    ] {
        for depth in [1, 8, 32] {
            let mut results = [const { Vec::new() }; 2];
            for _ in 0..ROUNDS {
                for (engine, results) in ENGINES.into_iter().zip(&mut results) {
                    let blk = Blk::new(file.try_clone().unwrap(), &options(engine)).unwrap();
                    let (mut rings, activation, mut kicks) = rings(1, 128, blk.features());
                    let mut bench = Bench {
                        blk,
                        ring: rings.remove(0),
                        kick: kicks.remove(0),
                        interrupt: activation.interrupt.clone(),
                        file: file.try_clone().unwrap(),
                    };
                    bench.blk.activate(activation).unwrap();
                    assert_eq!(bench.blk.engine.kind(), engine);
                    if !cached {
                        forget_cache(&file);
                    }
                    results.push(measure(&mut bench, kind, depth, requests, &mut state));
                }
            }
            let median = |results: &mut Vec<u64>| {
                results.sort_unstable();
                results[ROUNDS / 2]
            };
            let [sync, ring] = &mut results;
            println!("{what:<24}{depth:>6}{:>10}{:>10}", median(sync), median(ring));
        }
    }
}
