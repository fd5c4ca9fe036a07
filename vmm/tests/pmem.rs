//! Persistent memory on this machine's `/dev/kvm`: a payload loads from a file and stores to it as to memory.

#![allow(clippy::unwrap_used)] // a test ends where it fails

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;

use mandoline_api::monitor::ExitReason;
use mandoline_vmm::config::Pmem;
use vm_memory::{Bytes, GuestAddress};

use common::*;

/// The window as the guest's page tables have it, and as the device says that it is.
const WINDOW_LINEAR: u32 = 0x8000_0000;
const WINDOW_START: u64 = 0x1_0000_0000;
/// Page tables of long mode: the root, four pointers, and a directory of 2 MiB pages for each.
const ROOT: u32 = 0x40_0000;
const POINTERS: u32 = 0x40_1000;
const DIRECTORIES: u32 = 0x40_2000;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;

/// Paging on, in long mode's compatible form, since code stays 32 bits wide: RAM and devices where they are, the window at
/// [`WINDOW_LINEAR`].
fn paging() -> Code {
    Code::default()
        .raw(&[0xb8, 0x20, 0, 0, 0, 0x0f, 0x22, 0xe0]) // mov eax, PAE; mov cr4, eax
        .raw(&[0xb8])
        .raw(&ROOT.to_le_bytes())
        .raw(&[0x0f, 0x22, 0xd8]) // mov cr3, eax
        .raw(&[0xb9, 0x80, 0, 0, 0xc0, 0xb8, 0, 1, 0, 0, 0x31, 0xd2, 0x0f, 0x30]) // wrmsr EFER, LME
        .raw(&[0x0f, 0x20, 0xc0, 0x0d, 0, 0, 0, 0x80, 0x0f, 0x22, 0xc0]) // or eax, PG
}

/// Runs `code` with the file as persistent memory; its output.
fn run_with(code: Code, file: &File, read_only: bool) -> Option<Vec<u8>> {
    let mut spec = spec(code);
    spec.pmem.push(Pmem {
        id: "root".into(),
        file: file.try_clone().unwrap(),
        read_only,
        limit: None,
    });
    let (machine, phases) = build(spec)?;
    let put = |at: u64, entry: u64| machine.memory.write_obj(entry, GuestAddress(at)).unwrap();
    put(ROOT.into(), u64::from(POINTERS) | PRESENT_WRITABLE);
    for directory in 0..4u64 {
        let at = u64::from(DIRECTORIES) + 0x1000 * directory;
        let pointer = u64::from(POINTERS) + 8 * directory;
        put(pointer, at | PRESENT_WRITABLE);
        for page in 0..512u64 {
            let linear = directory << 30 | page << 21;
            let target = if linear == u64::from(WINDOW_LINEAR) {
                WINDOW_START
            } else {
                linear
            };
            put(at + 8 * page, target | LARGE | PRESENT_WRITABLE);
        }
    }
    let outcome = finish(machine, phases, None);
    assert_eq!(outcome.exit.reason, ExitReason::Shutdown, "{:?}", outcome.exit);
    Some(outcome.output)
}

fn first_byte(file: &File) -> u8 {
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0).unwrap();
    byte[0]
}

#[test]
fn stores_to_read_only_memory_are_ignored_and_the_guest_goes_on() {
    let file = file(&[b'A'; 5000]);
    let code = paging()
        .load(WINDOW_LINEAR)
        .print_al()
        .store8(WINDOW_LINEAR, b'Z')
        .store(WINDOW_LINEAR + 4096, 7)
        .load(WINDOW_LINEAR)
        .print_al()
        .load(WINDOW_LINEAR + 4999)
        .print_al()
        .power_off();
    let Some(output) = run_with(code, &file, true) else {
        return;
    };
    assert_eq!(output, b"AAA");
    assert_eq!(first_byte(&file), b'A');
}

#[test]
fn stores_are_in_the_file_and_a_flush_is_answered() {
    let file = file(&[b'A'; 5000]);
    let code = paging()
        .load(WINDOW + 0x104) // the high half of where it starts
        .raw(&[0x04, b'0'])
        .print_al()
        .store8(WINDOW_LINEAR, b'Z')
        .load(WINDOW_LINEAR)
        .print_al()
        .store(BUFFER, 0)
        .store(BUFFER + 0x100, 9)
        .descriptor(0, BUFFER, 4, 1, 1)
        .descriptor(1, BUFFER + 0x100, 4, 2, 0)
        .activate()
        .offer(1, 0)
        .wait16(USED + 2, 1)
        .load(BUFFER + 0x100)
        .raw(&[0x04, b'0'])
        .print_al()
        .power_off();
    let Some(output) = run_with(code, &file, false) else {
        return;
    };
    assert_eq!(output, b"1Z0");
    assert_eq!(first_byte(&file), b'Z');
}
