//! What a guest reaches beside its queues: every port, every byte of the windows, a console that nobody reads.

use std::io::Read;

use mandoline_api::monitor::{ExitReason, Hardware};

use crate::common::*;
use crate::subject::*;

/// `l: <body>; inc edx; cmp edx, end; jne l`, from `start` on.
fn each(code: Code, start: u32, end: u32, body: &[u8]) -> Code {
    let code = code.raw(&[0xba]).raw(&start.to_le_bytes()).raw(body);
    let code = code.raw(&[0x42, 0x81, 0xfa]).raw(&end.to_le_bytes());
    let back = -(body.len() as i32 + 9);
    code.raw(&[0x75, (back as i8) as u8])
}

#[test]
fn every_port_in_every_size() {
    // Reads of 1, 2 and 4 bytes: in al, dx; in ax, dx; in eax, dx. Writes of zeroes likewise.
    let reads = [0xec, 0x66, 0xed, 0xed];
    let writes = [0x31, 0xc0, 0xee, 0x66, 0xef, 0xef];
    for hardware in [Hardware::MpTable, Hardware::Acpi] {
        let mut code = Code::default();
        // Not the interrupt controllers' and the timer's, which are KVM's.
        for (start, end) in [
            (0x60, 0x6f),
            (0x70, 0xa0),
            (0xa2, 0x4d0),
            (0x4d2, 0x1000),
            (0xfff0, 0x1_0000),
        ] {
            code = each(each(code, start, end, &reads), start, end, &writes);
        }
        // Registers as at first (LCR, IER, MCR), then many bytes at once: mov esi, ENTRY; mov ecx, 64; mov dx, port;
        // rep outsb; the same with rep insb to a buffer.
        code = code.out(0x3fb, 0).out(0x3f9, 0).out(0x3fc, 8).print(b"<");
        for port in [0x3f9u16, 0x3fd, 0x80, 0x601, 0xcf8] {
            let [low, high] = port.to_le_bytes();
            code = code.raw(&[0xbe]).raw(&(ENTRY as u32).to_le_bytes());
            code = code.raw(&[0xb9, 64, 0, 0, 0, 0x66, 0xba, low, high, 0xf3, 0x6e]);
            code = code.raw(&[0xbf]).raw(&BUFFER.to_le_bytes());
            code = code.raw(&[0xb9, 64, 0, 0, 0, 0x66, 0xba, low, high, 0xf3, 0x6c]);
        }
        let mut spec = spec(code.out(0x3fb, 0).out(0x3fc, 8).print(b">").power_off());
        spec.hardware = hardware;
        let Some(outcome) = run(spec) else { return };
        assert_eq!(outcome.exit.reason, ExitReason::Shutdown, "{:?}", outcome.exit);
        let text = String::from_utf8_lossy(&outcome.output);
        assert!(
            text.contains('<') && text.ends_with('>'),
            "{hardware:?}: {text:?}"
        );
    }
}

#[test]
fn every_byte_of_the_windows_in_every_size() {
    // Reads of 1, 2 and 4 bytes at any alignment, so across pages, too, and 8 bytes by cmpxchg8b, which also writes.
    let reads = [0x8a, 0x02, 0x66, 0x8b, 0x02, 0x8b, 0x02];
    // It changes edx: mov edi, edx; cmpxchg8b [edx]; mov edx, edi
    let eight = [0x89, 0xd7, 0x0f, 0xc7, 0x0a, 0x89, 0xfa];
    // Writes of ones, then of zeroes: mov [edx], al; mov [edx], ax; mov [edx], eax.
    let ones = [0x83, 0xc8, 0xff, 0x88, 0x02, 0x66, 0x89, 0x02, 0x89, 0x02];
    let zeroes = [0x31, 0xc0, 0x88, 0x02, 0x66, 0x89, 0x02, 0x89, 0x02];
    for kind in KINDS {
        let (driver, other) = kind.drivers();
        let mut code = driver.up(Code::default());
        // Registers and configuration, then where pages meet: the boot/exit page and a window, two windows, a window and
        // nothing, nothing at all.
        let windows = [EXIT_PAGE, WINDOW, WINDOW + 0x1000].map(|window| (window + 0xff8, 0x10));
        for (start, bytes) in [
            (driver.window, 0x140),
            (EXIT_PAGE, 0x10),
            (WINDOW + 0xf_fff8, 0x10),
        ]
        .into_iter()
        .chain(windows)
        {
            for body in [&reads[..], &ones, &zeroes, &eight] {
                code = each(code, start, start + bytes, body);
            }
        }
        let code = other.good(other.up(code), 1);
        let code = driver.good(driver.up(code), 1).power_off();
        let Some(outcome) = run(kind.spec(code)) else {
            return;
        };
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

#[test]
fn a_console_that_nobody_reads_stops_nobody() {
    const BYTES: u64 = 0x2_0000;
    // 128 KiB of output: mov ecx, 0x20000; mov esi, ENTRY; mov dx, 0x3f8; rep outsb
    let code = Code::default()
        .raw(&[0xb9, 0, 0, 2, 0, 0xbe])
        .raw(&(ENTRY as u32).to_le_bytes())
        .raw(&[0x66, 0xba, 0xf8, 0x03, 0xf3, 0x6e])
        .power_off();
    let Some((machine, phases)) = build(spec(code)) else {
        return;
    };
    let (mut theirs, ours) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&ours, 4096).unwrap();
    let console = machine.console.clone();
    let outcome = finish_to(machine, phases, std::os::fd::OwnedFd::from(ours).into());
    assert_eq!(outcome.exit.reason, ExitReason::Shutdown);
    let mut taken = Vec::new();
    theirs.read_to_end(&mut taken).unwrap();
    // What was neither taken nor lost waited to the end: the console's 64 KiB.
    let waited = BYTES - taken.len() as u64 - console.lost();
    assert_eq!(waited, 64 << 10);
    assert!(console.lost() > 0);
}

#[test]
fn an_exit_page_in_a_flood_ends_the_guest_once() {
    // Boot timer and every value to the reason's register: those that mean nothing first. Then what ends it, for ever:
    // l: mov byte [page + 8], 1; mov byte [page + 8], 2; jmp l
    let mut code = Code::default();
    for value in 4..=255 {
        code = code.store8(EXIT_PAGE, value).store8(EXIT_PAGE + 8, value);
    }
    let length = code.0.len();
    let code = code.store8(EXIT_PAGE + 8, 1).store8(EXIT_PAGE + 8, 2);
    let back = -((code.0.len() - length) as i32 + 2);
    let Some(outcome) = run(spec(code.raw(&[0xeb, back as u8]))) else {
        return;
    };
    assert_eq!(outcome.exit.reason, ExitReason::Shutdown);
    let reasons = outcome.states();
    assert_eq!(reasons.len(), 2, "{reasons:?}");
}
