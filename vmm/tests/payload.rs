//! The whole monitor with payloads of a few instructions on this machine's `/dev/kvm`.
//!
//! They need KVM, not Linux: an emulating backend that could not boot a kernel runs them too. Without
//! `/dev/kvm` each says so and passes.

#![allow(clippy::unwrap_used)] // a test ends where it fails

mod common;

use std::io::{Read, Seek};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use mandoline_api::monitor::{ExitReason, Hardware, InstanceState, Phase, RateLimiter, RunState, StateLine};
use mandoline_vmm::boot::{bzimage, elf};
use mandoline_vmm::config::Park;
use mandoline_vmm::devices::blk;
use mandoline_vmm::exit::Exit;
use mandoline_vmm::monitor::{Call, Calls, Report, Request};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use common::*;

#[test]
fn a_guest_prints_stops_the_boot_timer_and_powers_off() {
    let code = Code::default().store8(EXIT_PAGE, 123).print(b"Hi").power_off();
    let Some(outcome) = run(spec(code)) else { return };
    assert_eq!(
        outcome.exit,
        Exit {
            reason: ExitReason::Shutdown,
            detail: None
        }
    );
    assert_eq!(outcome.output, b"Hi");
    let at = |phase| outcome.phases.reached(phase).unwrap();
    assert!(at(Phase::FirstRun) <= at(Phase::BootTimer));
    assert!(at(Phase::BootTimer) <= at(Phase::FirstSerialByte));
    let states: Vec<_> = outcome
        .state
        .iter()
        .filter_map(|line| match line {
            StateLine::State(change) => Some((change.state, change.reason)),
            StateLine::Phase(_) => None,
        })
        .collect();
    assert_eq!(
        states,
        [
            (RunState::Running, None),
            (RunState::Exited, Some(ExitReason::Shutdown))
        ]
    );
}

#[test]
fn a_kernel_without_a_pvh_note_starts_in_long_mode_with_the_zero_page() {
    let code = Code::default()
        // Loading the segments that the protocol promises: mov eax, 0x18; mov ds, eax; mov ss, eax
        .raw(&[0xb8, 0x18, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xd0])
        // mov esp, 0x800000; push 0x10; lea rax, [rip + 3]; push rax; retfq
        .raw(&[0xbc, 0, 0, 0x80, 0, 0x6a, 0x10])
        .raw(&[0x48, 0x8d, 0x05, 3, 0, 0, 0, 0x50, 0x48, 0xcb])
        // The header's magic: mov eax, [rsi + 0x202]
        .raw(&[0x8b, 0x86, 0x02, 0x02, 0, 0])
        .print_al()
        .raw(&[0xc1, 0xe8, 8]) // shr eax, 8
        .print_al()
        // The command line: mov ebx, [rsi + 0x228]; mov al, [rbx]
        .raw(&[0x8b, 0x9e, 0x28, 0x02, 0, 0, 0x8a, 0x03])
        .print_al()
        // The boot/exit page lies above what is mapped: the last entry of the first directory leads to it.
        // mov dword [0xbff8], 0xc0000083; mov byte [0x3fe00008], 1
        .raw(&[0xc7, 0x04, 0x25, 0xf8, 0xbf, 0, 0, 0x83, 0, 0, 0xc0])
        .raw(&[0xc6, 0x04, 0x25, 0x08, 0, 0xe0, 0x3f, 1, 0xeb, 0xfe]);
    let at = 0x20_0000;
    for image in [elf::tiny_linux64(&code.0, at), bzimage::tiny(&code.0, at)] {
        let mut spec = spec(Code::default());
        spec.kernel = file(&image);
        spec.command_line = "quiet".into();
        let Some(outcome) = run(spec) else { return };
        assert_eq!(outcome.exit.reason, ExitReason::Shutdown, "{:?}", outcome.exit);
        assert_eq!(String::from_utf8_lossy(&outcome.output), "Hdq");
    }
}

#[test]
fn acpi_leads_to_its_tables_and_powers_off_and_resets() {
    let root = |code: Code| {
        code // hvm_start_info's rsdp_paddr: mov eax, [ebx + 32]; mov eax, [eax]
            .raw(&[0x8b, 0x43, 32, 0x8b, 0x00])
            .print_al()
            .raw(&[0xc1, 0xe8, 16]) // shr eax, 16
            .print_al()
    };
    for (port, value, reason) in [
        (0x600, 0x34, ExitReason::Shutdown),
        (0x602, 1, ExitReason::Reboot),
    ] {
        let mut spec = spec(root(Code::default()).out(port, value).raw(&[0xeb, 0xfe]));
        spec.hardware = Hardware::Acpi;
        let Some(outcome) = run(spec) else { return };
        assert_eq!(outcome.exit.reason, reason);
        assert_eq!(String::from_utf8_lossy(&outcome.output), "RD");
    }
}

#[test]
fn memory_reads_back_also_across_the_kernels_own_pages() {
    let code = Code::default()
        .store(0x80_0000, 0x4b4f)
        .load(0x80_0000)
        .print_al()
        .raw(&[0xc1, 0xe8, 8]) // shr eax, 8
        .print_al()
        .power_off();
    let Some(outcome) = run(spec(code)) else { return };
    assert_eq!(outcome.output, b"OK");
}

#[test]
fn ends_are_told_apart() {
    let reset = |text: &[u8]| Code::default().print(text).out(0x64, 0xfe).raw(&[0xeb, 0xfe]);
    // lidt of an empty table, then ud2: the fault cannot be delivered, nor the next
    let triple = Code::default()
        .raw(&[0x0f, 0x01, 0x1d])
        .raw(&0x80_0000u32.to_le_bytes())
        .raw(&[0x0f, 0x0b]);
    let panic = Code::default().store8(EXIT_PAGE + 8, 3).raw(&[0xeb, 0xfe]);
    for (code, reason) in [
        (reset(b"bye"), ExitReason::Reboot),
        (reset(b"Kernel panic - not syncing"), ExitReason::Panic),
        (panic, ExitReason::Panic),
        (triple, ExitReason::TripleFault),
    ] {
        let Some(outcome) = run(spec(code)) else { return };
        assert_eq!(outcome.exit.reason, reason, "{:?}", outcome.exit);
        if reason == ExitReason::TripleFault {
            assert!(outcome.exit.detail.unwrap().contains("rip 0x"));
        }
    }
}

#[test]
fn a_drive_is_read_by_kick_and_interrupt() {
    let mut disk = vec![0u8; 4096];
    disk[512] = b'S';
    for engine in ENGINES {
        let code = Code::default()
            .store(BUFFER, 0) // type: read
            .store(BUFFER + 8, 1) // sector 1
            .store8(BUFFER + 0x800, 0xff)
            .descriptor(0, BUFFER, 16, 1, 1)
            .descriptor(1, BUFFER + 0x100, 512, 3, 2)
            .descriptor(2, BUFFER + 0x800, 1, 2, 0)
            .activate()
            .offer(1, 0)
            .wait16(USED + 2, 1)
            .load(BUFFER + 0x100)
            .print_al()
            .load(BUFFER + 0x800) // status 0
            .raw(&[0x04, b'0']) // add al, '0'
            .print_al()
            // Interrupt status shows used buffers, and the interrupt controller has the line of the first device (5).
            // The status is shown before the line is raised: l: in al, 0x20; test al, 1 << 5; jz l
            .wait_bits(WINDOW + 0x60, 1)
            .out(0x20, 0x0a)
            .input(0x20)
            .raw(&[0xa8, 1 << 5, 0x74, 0xf7])
            .print_al()
            .power_off();
        let Some(outcome) = run(with_engine(with_drive(code, &disk, false).0, engine)) else {
            return;
        };
        assert_eq!(&outcome.output[..2], b"S0");
        assert_eq!(outcome.output[2] & 1 << 5, 1 << 5, "{:#x}", outcome.output[2]);
    }
}

/// Chains that no driver may make: (what, descriptors as (address, length, flags, next), head).
type Hostile = (&'static str, &'static [(u32, u32, u16, u16)], u16);

const HOSTILE: &[Hostile] = &[
    ("a loop", &[(BUFFER, 16, 1, 1), (BUFFER, 16, 1, 0)], 0),
    ("a head outside the table", &[], 900),
    ("next outside the table", &[(BUFFER, 16, 1, 77)], 0),
    ("outside memory", &[(0x8000_0000, 16, 1, 1), (BUFFER, 1, 2, 0)], 0),
    (
        "partly outside memory",
        &[(0xff_fff8, 16, 1, 1), (BUFFER, 1, 2, 0)],
        0,
    ),
    ("zero length", &[(BUFFER, 0, 1, 1), (BUFFER, 1, 2, 0)], 0),
    ("a header too short", &[(BUFFER, 8, 1, 1), (BUFFER, 1, 2, 0)], 0),
    ("no status", &[(BUFFER, 16, 0, 0)], 0),
    (
        "readable after writable",
        &[(BUFFER, 16, 1, 1), (BUFFER, 1, 3, 2), (BUFFER, 8, 0, 0)],
        0,
    ),
    (
        "all of 4 GiB",
        &[(0, 0xffff_ffff, 1, 1), (0, 0xffff_ffff, 2, 0)],
        0,
    ),
    ("an indirect table in itself", &[(DESCRIPTORS, 16, 4, 0)], 0),
    ("an indirect table of odd size", &[(BUFFER, 15, 4, 0)], 0),
    ("an indirect table outside memory", &[(0x9000_0000, 64, 4, 0)], 0),
];

#[test]
fn hostile_chains_break_the_device_and_nothing_else() {
    for ((what, descriptors, head), engine) in HOSTILE.iter().zip(ENGINES.into_iter().cycle()) {
        let mut code = Code::default();
        for (index, (address, length, flags, next)) in descriptors.iter().enumerate() {
            code = code.descriptor(index as u32, *address, *length, *flags, *next);
        }
        let code = code
            .activate()
            .offer(1, *head)
            .wait_bits(WINDOW + 0x70, NEEDS_RESET)
            .print(b"broken;")
            // Rings as new, and a good request after a reset works.
            .store(USED, 0)
            .store(AVAILABLE, 0)
            .store(BUFFER, 0)
            .store(BUFFER + 8, 0)
            .descriptor(0, BUFFER, 16, 1, 1)
            .descriptor(1, BUFFER + 0x100, 512, 3, 2)
            .descriptor(2, BUFFER + 0x800, 1, 2, 0)
            .activate()
            .offer(1, 0)
            .wait16(USED + 2, 1)
            .load(BUFFER + 0x100)
            .print_al()
            .power_off();
        let Some(outcome) = run(with_engine(with_drive(code, &[b'W'; 4096], false).0, engine)) else {
            return;
        };
        assert_eq!(outcome.exit.reason, ExitReason::Shutdown, "{what}");
        assert_eq!(String::from_utf8_lossy(&outcome.output), "broken;W", "{what}");
    }
}

#[test]
fn an_index_that_jumps_breaks_the_device() {
    let code = Code::default()
        .activate()
        .store16(AVAILABLE + 2, 999)
        .register(0x50, 0)
        .wait_bits(WINDOW + 0x70, NEEDS_RESET)
        .print(b"broken")
        .power_off();
    let Some(outcome) = run(with_drive(code, &[0; 4096], false).0) else {
        return;
    };
    assert_eq!(outcome.output, b"broken");
}

#[test]
fn a_read_only_drive_stays_as_it_is() {
    let code = Code::default()
        .store(BUFFER, 1) // type: write
        .store(BUFFER + 8, 0)
        .store8(BUFFER + 0x800, 0)
        .descriptor(0, BUFFER, 16, 1, 1)
        .descriptor(1, BUFFER + 0x100, 512, 1, 2)
        .descriptor(2, BUFFER + 0x800, 1, 2, 0)
        .activate()
        .offer(1, 0)
        .wait16(USED + 2, 1)
        .load(BUFFER + 0x800)
        .raw(&[0x04, b'0'])
        .print_al()
        .power_off();
    let (spec, mut disk) = with_drive(code, &[b'R'; 1024], true);
    let Some(outcome) = run(spec) else { return };
    assert_eq!(outcome.output, b"1", "VIRTIO_BLK_S_IOERR");
    let mut bytes = Vec::new();
    disk.rewind().unwrap();
    disk.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, [b'R'; 1024]);
}

#[test]
fn a_paused_guest_stands_still_and_goes_on() {
    const COUNTER: u32 = 0x80_0000;
    const FLAG: u32 = 0x80_0010;
    // l: inc dword [COUNTER]; cmp word [FLAG], 1; jne l
    let code = Code::default()
        .raw(&[0xff, 0x05])
        .raw(&COUNTER.to_le_bytes())
        .raw(&[0x66, 0x81, 0x3d])
        .raw(&FLAG.to_le_bytes())
        .raw(&[1, 0, 0x75, 0xef])
        .power_off();
    let Some((machine, phases)) = build(spec(code)) else {
        return;
    };
    let memory = machine.memory.clone();
    let (calls, receiver) = channel::<Call>();
    let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    let sender = event.clone();
    let driver = std::thread::spawn(move || {
        let ask = |request| {
            let (answer, report) = channel();
            calls.send((request, answer)).unwrap();
            sender.write(1).unwrap();
            report.recv().unwrap().unwrap().state
        };
        let counter = || memory.read_obj::<u32>(GuestAddress(u64::from(COUNTER))).unwrap();
        while counter() == 0 {
            std::thread::yield_now();
        }
        assert_eq!(ask(Request::Look), InstanceState::Running);
        assert_eq!(ask(Request::Pause), InstanceState::Paused);
        let still = counter();
        assert_eq!(ask(Request::Pause), InstanceState::Paused);
        assert_eq!(counter(), still);
        assert_eq!(ask(Request::Resume), InstanceState::Running);
        while counter() == still {
            std::thread::yield_now();
        }
        memory.write_obj(1u16, GuestAddress(u64::from(FLAG))).unwrap();
    });
    let outcome = finish(machine, phases, Some(Calls { receiver, event }));
    driver.join().unwrap();
    assert_eq!(outcome.exit.reason, ExitReason::Shutdown);
}

#[test]
fn a_guest_that_reboots_starts_again_with_everything_as_at_power_on() {
    const COUNTER: u32 = 0x30_0000;
    const WHAT_NEXT: u32 = 0x30_0010;
    // Brings its disk up, prints, and waits to be told by which byte to end.
    let code = Code::default()
        .activate()
        .descriptor(0, BUFFER, 16, 1, 1)
        .descriptor(1, BUFFER + 0x100, 512, 3, 2)
        .descriptor(2, BUFFER + 0x400, 1, 2, 0)
        .offer(1, 0)
        .wait16(USED + 2, 1)
        .print(b"b")
        .store(COUNTER, 1)
        .wait_bits(WHAT_NEXT, 3)
        .load(WHAT_NEXT)
        // mov [exit page + 8], al
        .raw(&[0xa2])
        .raw(&(EXIT_PAGE + 8).to_le_bytes())
        .raw(&[0xeb, 0xfe]);
    let (spec, _disk) = with_drive(code, &[7; 512], true);
    let Some((machine, phases)) = build(spec) else {
        return;
    };
    let memory = machine.memory.clone();
    let driver = std::thread::spawn(move || {
        let at = |address: u32| GuestAddress(u64::from(address));
        let read = |address: u32| memory.read_obj::<u32>(at(address)).unwrap();
        for (life, next) in [2u32, 2, 1].into_iter().enumerate() {
            while read(COUNTER) == 0 || read(WHAT_NEXT) != 0 {
                std::thread::yield_now();
            }
            assert_eq!(
                memory.read_obj::<u8>(at(BUFFER + 0x100)).unwrap(),
                7,
                "life {life}"
            );
            memory.write_obj(next, at(WHAT_NEXT)).unwrap();
            while next == 2 && read(WHAT_NEXT) != 0 {
                std::thread::yield_now();
            }
        }
    });
    let outcome = finish_or_restart(machine, phases, None, Some(Duration::ZERO));
    driver.join().unwrap();
    assert_eq!(outcome.exit.reason, ExitReason::Shutdown);
    assert_eq!(outcome.output, b"bbb");
    use RunState::{Exited, Rebooting, Running};
    assert_eq!(
        outcome.states(),
        [Running, Rebooting, Running, Rebooting, Running, Exited]
    );
}

/// Code that sleeps until its local APIC's timer, which fires every `ns`, has done so `times`, and then says so and powers off.
fn sleeper(ns: u32, times: u8, ready: u32) -> Code {
    const TABLES: u32 = 0x40_0000;
    const HANDLER_AT: usize = 0x800;
    const VECTOR: u32 = 0x40;
    const LOCAL_APIC: u32 = 0xfee0_0000;
    const COUNT: u32 = TABLES + 0x3000;
    const PERIODIC: u32 = 1 << 17;
    let handler = ENTRY as u32 + HANDLER_AT as u32;
    let mut code = Code::default()
        // A flat code and a flat data segment, for the interrupt to be delivered with.
        .store(TABLES + 0x1008, 0x0000_ffff)
        .store(TABLES + 0x100c, 0x00cf_9b00)
        .store(TABLES + 0x1010, 0x0000_ffff)
        .store(TABLES + 0x1014, 0x00cf_9300)
        .store16(TABLES, 0x17)
        .store(TABLES + 2, TABLES + 0x1000)
        .raw(&[0x0f, 0x01, 0x15])
        .raw(&TABLES.to_le_bytes())
        // The interrupt's gate.
        .store(TABLES + 0x2000 + 8 * VECTOR, 8 << 16 | handler & 0xffff)
        .store(TABLES + 0x2000 + 8 * VECTOR + 4, handler & 0xffff_0000 | 0x8e00)
        .store16(TABLES + 0x10, 0x7ff)
        .store(TABLES + 0x12, TABLES + 0x2000)
        .raw(&[0x0f, 0x01, 0x1d])
        .raw(&(TABLES + 0x10).to_le_bytes())
        // mov esp, ...
        .raw(&[0xbc])
        .raw(&(TABLES + 0x4000).to_le_bytes())
        // The APIC is on; its timer counts ns.
        .store(LOCAL_APIC + 0xf0, 0x1ff)
        .store(LOCAL_APIC + 0x3e0, 0xb)
        .store(LOCAL_APIC + 0x320, PERIODIC | VECTOR)
        .store(LOCAL_APIC + 0x380, ns)
        .store(ready, 1)
        // l: sti; hlt; jmp l
        .raw(&[0xfb, 0xf4, 0xeb, 0xfc]);
    assert!(code.0.len() <= HANDLER_AT);
    code.0.resize(HANDLER_AT, 0x90);
    // inc [COUNT]; cmp [COUNT], times
    code.raw(&[0xff, 0x05])
        .raw(&COUNT.to_le_bytes())
        .raw(&[0x83, 0x3d])
        .raw(&COUNT.to_le_bytes())
        .raw(&[times])
        // jae past the end of interrupt (10 bytes) and: add esp, 12; l: sti; hlt; jmp l. No iret: KVM does not emulate
        // it in protected mode, where the host's CPU virtualises nothing.
        .raw(&[0x73, 17])
        .store(LOCAL_APIC + 0xb0, 0)
        .raw(&[0x83, 0xc4, 12, 0xfb, 0xf4, 0xeb, 0xfc])
        .print(b"T")
        .power_off()
}

/// Asks for a guest to be parked until it is: until it has halted it is busy.
fn park(calls: &Sender<Call>, event: &EventFd) -> Report {
    loop {
        let (answer, report) = channel();
        calls.send((Request::Park, answer)).unwrap();
        event.write(1).unwrap();
        match report.recv().unwrap() {
            Ok(report) => return report,
            Err(refusal) => assert!(refusal.contains("busy"), "{refusal}"),
        }
    }
}

#[test]
fn a_parked_guest_has_no_memory_and_wakes_by_its_own_timer() {
    const READY: u32 = 0x30_0000;
    const KEPT: u32 = 0x31_0000;
    let mut spec = spec(sleeper(1_500_000_000, 1, READY));
    spec.park = Some(Park {
        file: tempfile::tempfile().unwrap(),
        idle: None,
    });
    let Some((machine, phases)) = build(spec) else {
        return;
    };
    let memory = machine.memory.clone();
    let (calls, receiver) = channel::<Call>();
    let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    let sender = event.clone();
    let driver = std::thread::spawn(move || {
        let at = |address: u32| GuestAddress(u64::from(address));
        while memory.read_obj::<u32>(at(READY)).unwrap() == 0 {
            std::thread::yield_now();
        }
        memory.write_obj(0x1234u32, at(KEPT)).unwrap();
        let report = park(&calls, &sender);
        (report.state, report.sleep.unwrap())
    });
    let kept = machine.memory.clone();
    let outcome = finish(machine, phases, Some(Calls { receiver, event }));
    let (state, counters) = driver.join().unwrap();
    assert_eq!(state, InstanceState::Parked);
    assert!(
        counters.freed_bytes >= 4096 && counters.written_bytes >= 4096,
        "{counters:?}"
    );
    assert_eq!(outcome.exit.reason, ExitReason::Shutdown);
    assert_eq!(outcome.output, b"T");
    assert_eq!(
        kept.read_obj::<u32>(GuestAddress(u64::from(KEPT))).unwrap(),
        0x1234
    );
    use RunState::{Exited, Parked, Running};
    assert_eq!(outcome.states(), [Running, Parked, Running, Exited]);
}

#[test]
fn a_guest_that_was_asked_to_park_does_so_again_after_its_timers() {
    const READY: u32 = 0x30_0000;
    let mut spec = spec(sleeper(400_000_000, 6, READY));
    spec.park = Some(Park {
        file: tempfile::tempfile().unwrap(),
        idle: None,
    });
    let Some((machine, phases)) = build(spec) else {
        return;
    };
    let memory = machine.memory.clone();
    let (calls, receiver) = channel::<Call>();
    let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    let sender = event.clone();
    let driver = std::thread::spawn(move || {
        while memory.read_obj::<u32>(GuestAddress(u64::from(READY))).unwrap() == 0 {
            std::thread::yield_now();
        }
        park(&calls, &sender);
    });
    let outcome = finish(machine, phases, Some(Calls { receiver, event }));
    driver.join().unwrap();
    assert_eq!(outcome.output, b"T");
    // Once because it was asked to; and again, though a busy machine may miss some of the guest's sleeps.
    let states = outcome.states();
    let parked = states
        .iter()
        .filter(|state| matches!(state, RunState::Parked))
        .count();
    assert!(parked >= 2, "{states:?}");
}

#[test]
fn a_jailed_drive_writes_syncs_resets_and_changes_its_file() {
    const READY: u32 = 0x80_0000;
    const GO_ON: u32 = 0x80_0010;
    let request = |code: Code, kind: u32, data: u16| {
        code.store(USED, 0)
            .store(AVAILABLE, 0)
            .store(BUFFER, kind)
            .store(BUFFER + 8, 1)
            .descriptor(0, BUFFER, 16, 1, 1)
            .descriptor(1, BUFFER + 0x100, 512, data | 1, 2)
            .descriptor(2, BUFFER + 0x800, 1, 2, 0)
            .activate()
            .offer(1, 0)
            .wait16(USED + 2, 1)
            .load(BUFFER + 0x800)
            .raw(&[0x04, b'0'])
            .print_al()
    };
    for engine in ENGINES {
        let code = request(Code::default().store8(BUFFER + 0x100, b'w'), 1, 0)
            .store(READY, 1)
            .wait_bits(GO_ON, 1);
        // From the other file now.
        let code = request(code, 0, 2).load(BUFFER + 0x100).print_al().power_off();
        let (spec, mut disk) = with_drive(code, &[b'o'; 4096], false);
        let Some((machine, phases)) = build(with_engine(spec, engine)) else {
            return;
        };
        let (sender, receiver) = channel::<Call>();
        let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let (memory, signal) = (machine.memory.clone(), event.clone());
        let driver = std::thread::spawn(move || {
            let at = |address: u32| GuestAddress(u64::from(address));
            while memory.read_obj::<u32>(at(READY)).unwrap() == 0 {
                std::thread::yield_now();
            }
            let other = file(&[b'n'; 8192]);
            let work = Request::Work(Box::new(move |slots| {
                let update = |blk: &mut blk::Blk| {
                    blk.set_rate_limiter(&RateLimiter::default());
                    let same = blk.grow().map_err(|error| error.to_string())?;
                    let sectors = blk
                        .replace_file(other, false)
                        .map_err(|error| error.to_string())?;
                    Ok(serde_json::json!([same, sectors]))
                };
                slots[0].with(update).ok_or("no drive")?
            }));
            let (answer, said) = channel();
            sender.send((work, answer)).unwrap();
            signal.write(1).unwrap();
            assert_eq!(said.recv().unwrap().unwrap().said, serde_json::json!([8, 16]));
            memory.write_obj(1u32, at(GO_ON)).unwrap();
        });
        let outcome = finish_with(machine, phases, Some(Calls { receiver, event }), None, true);
        driver.join().unwrap();
        assert_eq!(outcome.exit.reason, ExitReason::Shutdown);
        assert_eq!(String::from_utf8_lossy(&outcome.output), "00n", "{engine:?}");
        let mut bytes = Vec::new();
        disk.rewind().unwrap();
        disk.read_to_end(&mut bytes).unwrap();
        assert_eq!((bytes[511], bytes[512]), (b'o', b'w'));
    }
}
