//! What is fuzzed: one function a target, from any bytes to "nothing bad happened".
//!
//! ```text
//!  fuzz/ (libFuzzer) --\
//!                       +--> run(target, bytes) --> a device's bench, or a parser
//!  `cargo test` -------/
//!   (fuzz/seeds, incidents)
//! ```
//!
//! A target fails by a panic. The devices' targets have an opinion of their own, too: whatever the script of a driver
//! did, after a reset the device must come up and answer an honest request; and what it saves it must take back.

#![allow(clippy::unwrap_used)] // a target ends where it fails

mod bench;
#[cfg(test)]
mod incidents;
mod input;
mod parsers;
#[cfg(test)]
mod replay;
mod script;
mod subject;

use crate::fuzzing::bench::Bench;
use crate::fuzzing::input::Input;
use crate::fuzzing::script::Step;
use crate::fuzzing::subject::Kind;

/// Runs one input.
type Run = fn(&[u8]);

/// Every target by its name.
pub const TARGETS: &[(&str, Run)] = &[
    ("blk", |bytes| device(Kind::BlkSync, bytes)),
    ("blk-async", |bytes| device(Kind::BlkAsync, bytes)),
    ("net", |bytes| device(Kind::Net, bytes)),
    ("vsock", |bytes| device(Kind::Vsock, bytes)),
    ("rng", |bytes| device(Kind::Rng, bytes)),
    ("balloon", |bytes| device(Kind::Balloon, bytes)),
    ("pmem", |bytes| device(Kind::Pmem, bytes)),
    ("chain", parsers::chain),
    ("restore", bench::restore),
    ("kernel", parsers::kernel),
    ("config", parsers::config),
    ("api", parsers::api),
    ("rate-limiter", parsers::rate_limiter),
    ("serial", parsers::serial),
];

/// The target of this name.
pub fn target(name: &str) -> Option<Run> {
    TARGETS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, run)| *run)
}

/// Bytes as the script of a driver.
fn device(kind: Kind, bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let limited = input.u8() & 1 != 0;
    let mut bench = Bench::new(kind, limited);
    // More steps find nothing that these do not.
    for _ in 0..64 {
        let Some(step) = Step::read(&mut input) else {
            break;
        };
        bench.step(&step);
    }
    bench.must_work_after_a_reset();
}
