//! Drivers that do what none may, to every device, on this machine's `/dev/kvm`: their device breaks and says so, the
//! monitor lives, another device goes on, and after a reset the broken one does, too.
//!
//! Each guest drives the device under test and one that stays honest. It waits for what must happen, so a device that
//! does not break, or does not come back, shows as a test that does not end.

#![allow(clippy::unwrap_used, unreachable_pub)] // a test ends where it fails

#[path = "../common/mod.rs"]
mod common;
mod reach;
mod subject;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mandoline_api::monitor::ExitReason;
use vm_memory::{Bytes, GuestAddress};

use common::*;
use subject::*;

/// RAM of the guests.
const RAM: u64 = 16 << 20;
/// Indirect tables that the host writes before the guest starts.
const OVER_4_GIB: u64 = 0x60_0000;
const TOO_MANY: u64 = 0x61_0000;
const NESTED: u64 = 0x62_0000;

fn piece(address: u64, length: u32, flags: u16, next: u16) -> Piece {
    Piece {
        address,
        length,
        flags,
        next,
    }
}

/// Chains that no device may take: (what, descriptors, head). `flag` is the one of an honest buffer.
fn chains(buffer: u64, table: u64, flag: u16) -> Vec<(&'static str, Vec<Piece>, u16)> {
    let one = |address, length, flags| vec![piece(address, length, flags, 0)];
    let honest = |address, length| one(address, length, flag);
    vec![
        (
            "a loop",
            vec![
                piece(buffer, 16, flag | NEXT, 1),
                piece(buffer, 16, flag | NEXT, 0),
            ],
            0,
        ),
        ("a loop of one", vec![piece(buffer, 16, flag | NEXT, 0)], 0),
        ("a head outside the table", vec![], SIZE),
        ("the last head there is", vec![], 0xffff),
        (
            "next outside the table",
            vec![piece(buffer, 16, flag | NEXT, SIZE)],
            0,
        ),
        ("outside memory", honest(0x8000_0000, 16), 0),
        ("where devices are", honest(u64::from(WINDOW), 16), 0),
        ("partly outside memory", honest(RAM - 8, 16), 0),
        ("past the end of all addresses", honest(u64::MAX - 7, 16), 0),
        ("zero bytes", honest(buffer, 0), 0),
        (
            "readable after writable",
            vec![piece(buffer, 16, WRITE | NEXT, 1), piece(buffer, 16, 0, 0)],
            0,
        ),
        ("the wrong direction", one(buffer, 64, flag ^ WRITE), 0),
        ("4 GiB at once", honest(0, u32::MAX), 0),
        ("an indirect table in itself", one(table, 16, INDIRECT), 0),
        ("an indirect table of odd size", one(OVER_4_GIB, 15, INDIRECT), 0),
        ("an empty indirect table", one(OVER_4_GIB, 0, INDIRECT), 0),
        (
            "an indirect table outside memory",
            one(0x9000_0000, 64, INDIRECT),
            0,
        ),
        ("an indirect table partly outside", one(RAM - 16, 32, INDIRECT), 0),
        ("an indirect table in another", one(NESTED, 16, INDIRECT), 0),
        (
            "over 4 GiB of the same bytes",
            one(OVER_4_GIB, 257 * 16, INDIRECT),
            0,
        ),
        ("too many buffers", one(TOO_MANY, 1025 * 16, INDIRECT), 0),
    ]
}

/// Indirect tables for [`chains`].
fn write_tables(machine: &mandoline_vmm::machine::Machine, flag: u16) {
    let write = |table: u64, n: u64, address: u64, length: u32, flags: u16| {
        let bytes = [
            &address.to_le_bytes()[..],
            &length.to_le_bytes(),
            &flags.to_le_bytes(),
            &(n as u16 + 1).to_le_bytes(),
        ]
        .concat();
        let at = GuestAddress(table + 16 * n);
        machine.memory.write_slice(&bytes, at).unwrap();
    };
    for n in 0..257 {
        let next = if n < 256 { NEXT } else { 0 };
        write(OVER_4_GIB, n, 0, RAM as u32, flag | next);
    }
    for n in 0..1025 {
        let next = if n < 1024 { NEXT } else { 0 };
        write(TOO_MANY, n, 0x80_0000, 1, flag | next);
    }
    write(NESTED, 0, TOO_MANY, 16, INDIRECT);
}

#[test]
fn every_malformed_chain_breaks_its_device_and_nothing_else() {
    for kind in KINDS {
        for (queue, flag) in (0..).zip(kind.queues()) {
            let (driver, other) = kind.drivers();
            let chains = chains(
                u64::from(driver.buffer()),
                u64::from(driver.descriptors(queue)),
                *flag,
            );
            let mut code = other.up(Code::default());
            for (n, (_, pieces, head)) in (1..).zip(&chains) {
                code = driver.up(code);
                for (index, piece) in (0..).zip(pieces) {
                    code = driver.descriptor(code, queue, index, piece);
                }
                code = driver.offer(code, queue, 1, *head);
                code = driver.broken(driver.provoke(code, queue));
                code = other.good(code, n);
            }
            // The other way in: an index that jumps further than the ring is long.
            code = driver.up(code).store16(driver.available(queue) + 2, SIZE + 1);
            code = driver.register(code, NOTIFY, queue);
            code = driver.broken(driver.provoke(code, queue));
            code = driver.good(driver.up(code), 1).power_off();
            let Some((machine, phases)) = build(kind.spec(code)) else {
                return;
            };
            write_tables(&machine, *flag);
            let outcome = finish(machine, phases, None);
            let expected = other.kind.answer().repeat(chains.len()) + kind.answer();
            assert_eq!(
                outcome.exit.reason,
                ExitReason::Shutdown,
                "{kind:?}: {:?}",
                outcome.exit
            );
            assert_eq!(
                String::from_utf8_lossy(&outcome.output),
                expected,
                "{kind:?} queue {queue}"
            );
        }
    }
}

#[test]
fn queues_that_cannot_be_break_their_device_when_it_comes_up() {
    const WRONG: &[&[(u32, u32)]] = &[
        &[(0x38, 0)],
        &[(0x38, 3)],
        &[(0x38, 0x8000)],
        &[(0x38, 0x1_0000)],
        &[(0x38, 0x1_0008)],
        &[(0x38, 0x8000_0000)],
        &[(0x80, 0x20_0001)],
        &[(0x90, 0x20_1001)],
        &[(0xa0, 0x20_2002)],
        &[(0x80, 0x100_0000 - 16)],
        &[(0x90, 0x100_0000 - 2)],
        &[(0xa0, 0xc000_1000)],
        &[(0x84, 1)],
        &[(0x94, 0xffff_ffff)],
        &[(0xa4, 0xffff_ffff)],
        &[(0x90, 0)],
    ];
    for kind in KINDS {
        let (driver, other) = kind.drivers();
        let mut code = other.up(Code::default());
        for (n, wrong) in (1..).zip(WRONG) {
            code = driver.queue(driver.negotiate(code), 0);
            // Once more, with one value wrong.
            code = driver.register(code, 0x44, 0);
            code = driver.registers(code, wrong);
            code = driver.registers(code, &[(0x44, 1), (STATUS, 15), (NOTIFY, 0)]);
            code = other.good(driver.broken(code), n);
        }
        let code = driver.good(driver.up(code), 1).power_off();
        let Some(outcome) = run(kind.spec(code)) else {
            return;
        };
        let expected = other.kind.answer().repeat(WRONG.len()) + kind.answer();
        assert_eq!(String::from_utf8_lossy(&outcome.output), expected, "{kind:?}");
    }
}

#[test]
fn what_a_driver_writes_after_the_start_changes_nothing() {
    for kind in KINDS {
        let (driver, _) = kind.drivers();
        let mut code = driver.up(Code::default());
        for queue in 0..kind.queues().len() as u32 {
            let mut steps = vec![(0x30, queue), (0x44, 0)];
            steps.extend((0x80..=0xa4).step_by(4).map(|offset| (offset, 0xffff_fff0)));
            steps.extend([(0x38, 0x4000), (0x44, 1), (0x24, 0), (0x20, 0xffff_ffff)]);
            // A queue that is not there.
            steps.extend([(0x30, 0xffff_ffff), (0x38, 4), (0x44, 1), (NOTIFY, 0xffff_ffff)]);
            // Steps back, and bits that are the device's.
            steps.extend([(STATUS, 11), (STATUS, 1), (STATUS, 64), (STATUS, 15)]);
            code = driver.registers(code, &steps);
        }
        // The configuration space is for reading, but for the balloon's `actual`.
        for offset in 0..16 {
            code = code
                .store8(driver.window + 0x100 + offset, 0xff)
                .store16(driver.window + 0x100 + offset, 0xffff)
                .store(driver.window + 0x100 + offset, 0xffff_ffff)
                .store(driver.window + 0xff0 + offset, 0xffff_ffff);
        }
        let code = driver.good(code, 1).power_off();
        let Some(outcome) = run(kind.spec(code)) else {
            return;
        };
        assert_eq!(
            String::from_utf8_lossy(&outcome.output),
            kind.answer(),
            "{kind:?}"
        );
    }
}

#[test]
fn a_status_in_any_order_leads_nowhere_and_a_reset_leads_back() {
    const ORDERS: &[&[u32]] = &[
        &[15],
        &[8, 4],
        &[1, 2, 4, 8],
        &[3, 11, 15],
        &[1, 3, 15],
        &[1, 3, 11, 128, 15],
        &[255, 0xffff_ffff, 64, 15],
    ];
    for kind in KINDS {
        let (driver, _) = kind.drivers();
        let mut code = Code::default();
        for order in ORDERS {
            code = driver.register(code, STATUS, 0);
            for value in *order {
                code = driver.register(code, STATUS, *value);
                code = driver.register(code, NOTIFY, 0);
            }
            // DRIVER_OK is not among its bits: mov eax, [status]; shr eax, 2; and al, 1; add al, 'a'
            code = code.load(driver.window + STATUS);
            code = code.raw(&[0xc1, 0xe8, 2, 0x24, 1, 0x04, b'a']).print_al();
        }
        let code = driver.good(driver.up(code), 1).power_off();
        let Some(outcome) = run(kind.spec(code)) else {
            return;
        };
        let expected = "a".repeat(ORDERS.len()) + kind.answer();
        assert_eq!(String::from_utf8_lossy(&outcome.output), expected, "{kind:?}");
    }
}

#[test]
fn a_head_offered_twice_and_a_reset_in_the_middle_leave_a_device_that_works() {
    for kind in KINDS {
        let (driver, other) = kind.drivers();
        let mut code = other.up(Code::default());
        for (queue, flag) in (0..).zip(kind.queues()) {
            let buffer = piece(u64::from(driver.buffer()) + 0x8000, 2048, *flag, 0);
            // A ring full of the same head, made available at once, and the driver gone before any is used.
            for n in [2, SIZE] {
                code = driver.descriptor(driver.up(code), queue, 0, &buffer);
                for entry in 0..n {
                    code = code.store16(driver.available(queue) + 4 + 2 * u32::from(entry), 0);
                }
                code = code.store16(driver.available(queue) + 2, n);
                code = driver.register(code, NOTIFY, queue);
                code = driver.provoke(code, queue);
                code = driver.register(code, STATUS, 0);
            }
        }
        code = other.good(code, 1);
        let code = driver.good(driver.up(code), 1).power_off();
        let Some(outcome) = run(kind.spec(code)) else {
            return;
        };
        let expected = other.kind.answer().to_owned() + kind.answer();
        assert_eq!(String::from_utf8_lossy(&outcome.output), expected, "{kind:?}");
    }
}

#[test]
fn kicks_in_a_flood_keep_nobody_else_from_work() {
    for kind in KINDS {
        let (driver, other) = kind.drivers();
        let mut code = driver.up(other.up(Code::default()));
        for n in 1..=4 {
            for queue in 0..kind.queues().len() as u32 {
                // mov ecx, 5000; l: mov dword [notify], queue; dec ecx; jnz l
                code = code.raw(&[0xb9]).raw(&5000u32.to_le_bytes());
                code = driver.register(code, NOTIFY, queue).raw(&[0x49, 0x75, 0xf3]);
            }
            code = other.good(code, n);
        }
        let code = driver.good(code, 1).power_off();
        let Some(outcome) = run(kind.spec(code)) else {
            return;
        };
        let expected = other.kind.answer().repeat(4) + kind.answer();
        assert_eq!(String::from_utf8_lossy(&outcome.output), expected, "{kind:?}");
    }
}

/// Numbers that are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        // xorshift64 (Marsaglia 2003)
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

#[test]
fn rings_and_headers_that_change_while_they_are_read() {
    const ENOUGH: u32 = 0x50_0000;
    /// Writes by the host's thread, which stands for a second vCPU.
    const WRITES: usize = 100_000;
    for kind in KINDS {
        let (driver, other) = kind.drivers();
        let queues = kind.queues().len() as u32;
        let setup = other.up(Code::default());
        let again = setup.0.len();
        let mut code = driver.up(setup);
        for _ in 0..20 {
            for queue in 0..queues {
                code = driver.register(code, NOTIFY, queue);
            }
        }
        // cmp word [ENOUGH], 1; jne again
        code = code.raw(&[0x66, 0x81, 0x3d]).raw(&ENOUGH.to_le_bytes());
        code = code.raw(&[1, 0, 0x0f, 0x85]);
        let back = again as i32 - (code.0.len() as i32 + 4);
        code = other.good(code.raw(&back.to_le_bytes()), 1);
        let code = driver.good(driver.up(code), 1).power_off();
        let Some((machine, phases)) = build(kind.spec(code)) else {
            return;
        };
        let memory = machine.memory.clone();
        let over = Arc::new(AtomicBool::new(false));
        let ended = over.clone();
        let scribbler = std::thread::spawn(move || {
            let mut numbers = Numbers(0x5eed);
            let put16 = |at: u32, value: u16| memory.write_obj(value, GuestAddress(at.into())).unwrap();
            let put32 = |at: u32, value: u32| memory.write_obj(value, GuestAddress(at.into())).unwrap();
            for n in 0..WRITES {
                let queue = numbers.below(queues.into()) as u32;
                let entry = numbers.below(SIZE.into()) as u32;
                let descriptor = driver.descriptors(queue) + 16 * entry;
                let place = driver.buffer() + numbers.below(16) as u32 * 0x100;
                match numbers.below(6) {
                    0 => put32(descriptor, place),
                    1 => put32(descriptor + 8, [1, 4, 16, 44, 512, 4096][n % 6]),
                    2 => put16(descriptor + 12, numbers.below(4) as u16),
                    3 => put16(descriptor + 14, numbers.below(SIZE.into()) as u16),
                    4 => {
                        put16(driver.available(queue) + 4 + 2 * entry, entry as u16);
                        put16(driver.available(queue) + 2, numbers.below(12) as u16);
                    }
                    // What headers are made of: types, sectors, lengths, page numbers that nobody uses.
                    _ => put32(place, [0, 1, 4, 8, 11, 0x900, 0x10_0000, u32::MAX][n % 8]),
                }
                if ended.load(Ordering::Relaxed) {
                    break;
                }
            }
            put16(ENOUGH, 1);
        });
        let outcome = finish(machine, phases, None);
        over.store(true, Ordering::Relaxed);
        scribbler.join().unwrap();
        let expected = other.kind.answer().to_owned() + kind.answer();
        assert_eq!(
            outcome.exit.reason,
            ExitReason::Shutdown,
            "{kind:?}: {:?}",
            outcome.exit
        );
        assert_eq!(String::from_utf8_lossy(&outcome.output), expected, "{kind:?}");
    }
}
