//! Targets without a driver: what reads bytes of a file, of a client, of a configuration, and the console's registers.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mandoline_api::monitor::{self as api, TokenBucket};
use vmm_sys_util::eventfd::EventFd;

use crate::api::http::{self, Parsed};
use crate::api::routes;
use crate::boot::image;
use crate::boot::loader::{self, Boot};
use crate::config;
use crate::devices::serial::{Console, Uart};
use crate::devices::virtio::chain::{Chain, MAX_BUFFERS};
use crate::devices::virtio::rate_limiter::RateLimiter;
use crate::devices::virtio::testing::rings;
use crate::fuzzing::input::Input;
use crate::fuzzing::script::{RAM, Step, length, place};
use crate::memory;

fn file(bytes: &[u8]) -> File {
    let file = rustix::fs::memfd_create("input", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(file);
    file.write_all(bytes).unwrap();
    file
}

/// Descriptors, indirect tables and heads: every chain is refused, or is whole and inside memory.
pub(super) fn chain(bytes: &[u8]) {
    let (mut rings, activation, _) = rings(1, 16, 0);
    let mut queue = activation.queues.into_iter().next().flatten().unwrap();
    let (mut input, mut chain) = (Input::new(bytes), Chain::default());
    while let Some(step) = Step::read(&mut input) {
        match step {
            Step::Descriptor {
                index,
                place: at,
                length: bytes,
                flags,
                next,
                ..
            } => rings[0].descriptor(
                u16::from(index) % 16,
                place(at),
                length(bytes),
                flags.into(),
                next.into(),
            ),
            Step::Offer { head, .. } => rings[0].offer_head(head.into()),
            Step::Index { index, .. } => rings[0].set_available_index(index),
            Step::Write { place: at, bytes } if place(at).saturating_add(64) <= RAM => {
                rings[0].put(place(at), &bytes);
            }
            _ => match queue.pop(&mut chain) {
                Ok(true) => {
                    for buffers in [&mut chain.readable, &mut chain.writable] {
                        assert!(buffers.pieces().len() <= MAX_BUFFERS);
                        let total: u64 = buffers.pieces().iter().map(|piece| piece.iov_len as u64).sum();
                        assert_eq!(total, buffers.bytes());
                        let front = buffers.clone_front(total.min(7));
                        assert_eq!(front.bytes(), total.min(7));
                        let mut taken = [0; 5];
                        assert_eq!(buffers.take_front(&mut taken), total >= 5);
                        buffers.put_front(&taken);
                        buffers.take_last_byte();
                        buffers.truncate(100);
                        assert!(buffers.bytes() <= 100);
                    }
                    queue.used(chain.head, 0).unwrap();
                }
                Ok(false) => {}
                Err(_) => return,
            },
        }
    }
}

/// A kernel image: it is refused, or it is loaded inside memory.
pub(super) fn kernel(bytes: &[u8]) {
    let kernel = file(bytes);
    let read = image::read(&kernel);
    let boot = Boot {
        kernel,
        initrd: None,
        command_line: loader::command_line("quiet", &[]).unwrap(),
        vcpus: 1,
        acpi: None,
    };
    let memory = memory::create(RAM).unwrap();
    if let Ok(loaded) = boot.load(&memory) {
        assert!(read.is_ok() && loaded.kernel.end <= RAM, "{loaded:?}");
    }
}

/// A configuration file.
pub(super) fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(config) = config::parse(text) {
        let _ = config::check(&config);
        // What was read can be written and is the same then.
        let again = serde_json::to_string(&config).unwrap();
        assert_eq!(config::parse(&again).unwrap(), config);
    }
}

/// What a client of the control socket sends.
pub(super) fn api(bytes: &[u8]) {
    let mut rest = bytes;
    loop {
        match http::parse(rest) {
            Parsed::Whole(request, length) => {
                assert!(length > 0 && length <= rest.len());
                for booted in [false, true] {
                    if let Err(refusal) = routes::command(&request, booted) {
                        assert!(refusal.status >= 400);
                        assert!(!refusal.bytes(request.keep_alive).is_empty());
                    }
                }
                rest = &rest[length..];
            }
            Parsed::Partial | Parsed::Expects | Parsed::Bad(..) => return,
        }
    }
}

/// Limits, requests and times of all sizes: never more passes than the limits say.
pub(super) fn rate_limiter(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let bucket = |input: &mut Input<'_>| {
        let size = input.u64() >> (input.u8() & 63);
        let burst = input.u64() >> (input.u8() & 63);
        TokenBucket {
            size,
            one_time_burst: (burst != 0).then_some(burst),
            refill_time: input.u64() >> (input.u8() & 63),
        }
    };
    let bandwidth = bucket(&mut input);
    let config = api::RateLimiter {
        bandwidth: Some(bandwidth),
        ops: Some(bucket(&mut input)),
    };
    let time = Arc::new(AtomicU64::new(0));
    let clock = time.clone();
    let mut limiter =
        RateLimiter::with_clock(&config, Box::new(move || clock.load(Ordering::Relaxed))).unwrap();
    let limits = bandwidth.size != 0 && bandwidth.refill_time != 0;
    let (mut passed, mut largest, mut anew) = (0u128, 0u128, false);
    while !input.is_empty() {
        match input.u8() % 8 {
            0..=2 => {
                let bytes = input.u64() >> (input.u8() & 63);
                if limiter.consume(bytes, u64::from(input.u8())) {
                    passed += u128::from(bytes);
                    largest = largest.max(u128::from(bytes));
                }
            }
            3 | 4 => {
                let ns = input.u64() >> (input.u8() & 63);
                let now = time.load(Ordering::Relaxed).saturating_add(ns);
                time.store(now, Ordering::Relaxed);
            }
            5 => limiter.woken(),
            6 => {
                let saved = limiter.save();
                let text = serde_json::to_string(&saved).unwrap();
                limiter.restore(&serde_json::from_str(&text).unwrap());
                anew = true;
            }
            _ => {
                let ops = bucket(&mut input);
                limiter.update(&api::RateLimiter {
                    bandwidth: None,
                    ops: Some(ops),
                });
            }
        }
        let ns = u128::from(time.load(Ordering::Relaxed));
        let refilled =
            ns * u128::from(bandwidth.size) / (u128::from(bandwidth.refill_time.max(1)) * 1_000_000);
        let burst = u128::from(bandwidth.one_time_burst.unwrap_or(0));
        let most = u128::from(bandwidth.size) + burst + refilled + largest + 1;
        // Saving rounds the refill time to ms, so the sum holds for a limiter that was not made anew.
        assert!(
            !limits || anew || passed <= most,
            "{passed} of at most {most}: {config:?}"
        );
    }
}

/// Registers of the UART in any order, input, and a host's end that takes what it likes.
pub(super) fn serial(bytes: &[u8]) {
    struct Sink(usize);
    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let now = bytes.len().min(self.0);
            self.0 -= now;
            if now == 0 {
                Err(io::ErrorKind::WouldBlock.into())
            } else {
                Ok(now)
            }
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let console = Console::new(Arc::default()).unwrap();
    let uart = Uart::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), console.clone());
    let mut input = Input::new(bytes);
    while !input.is_empty() {
        match input.u8() % 6 {
            0 | 1 => uart.write(input.u8() % 8, input.u8()),
            2 => drop(uart.read(input.u8() % 8)),
            3 => {
                let count = usize::from(input.u8());
                let mut source = file(input.bytes(count));
                io::Seek::rewind(&mut source).unwrap();
                let _ = uart.feed(&mut source);
            }
            4 => {
                let _ = console.drain(&mut Sink(input.u16().into()));
            }
            _ => uart.power_on(),
        }
        assert!(console.tail().len() <= 3 * (4 << 10));
    }
}
