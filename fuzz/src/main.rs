//! All targets of `mandoline_vmm::fuzzing` in one program; `MANDOLINE_FUZZ` says which one runs.

#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<fn(&[u8])> = OnceLock::new();

fuzz_target!(|bytes: &[u8]| {
    let run = TARGET.get_or_init(|| {
        let name = std::env::var("MANDOLINE_FUZZ").unwrap_or_default();
        mandoline_vmm::fuzzing::target(&name)
            .unwrap_or_else(|| panic!("MANDOLINE_FUZZ={name:?}: no such target"))
    });
    run(bytes);
});
