//! A device under test, and the driver that brings it up, breaks it and asks it for something good.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};

use mandoline_api::monitor::{Balloon, IoEngine, RateLimiter};
use mandoline_vmm::config::{Interface, Pmem, Spec, Vsock};
use mandoline_vmm::devices::net;
use mandoline_vmm::devices::vsock::outward::Outward;

use crate::common::*;

/// Where the rings and buffers of the device under test lie, and those of the other one.
const SUBJECT: u32 = 0x20_0000;
const OTHER: u32 = 0x30_0000;
/// Entries of each queue.
pub const SIZE: u16 = 8;
/// Descriptor flags (virtio 1.2, 2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
/// Registers (virtio 1.2, table 4.1).
pub const NOTIFY: u32 = 0x50;
pub const INTERRUPT_STATUS: u32 = 0x60;
pub const INTERRUPT_ACK: u32 = 0x64;
pub const STATUS: u32 = 0x70;
const CONFIG_CHANGED: u32 = 2;
const CID: u32 = 3;
/// The first of the guest's pages that a balloon may have: nothing of the tests lies from here on.
const FREE_PAGE: u32 = 0x800;

/// What is under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Blk(IoEngine),
    Net,
    Vsock,
    Rng,
    Balloon,
    Pmem,
}

pub const KINDS: [Kind; 7] = [
    Kind::Blk(IoEngine::Sync),
    Kind::Blk(IoEngine::Async),
    Kind::Net,
    Kind::Vsock,
    Kind::Rng,
    Kind::Balloon,
    Kind::Pmem,
];

impl Kind {
    /// Its queues: the flag that an honest driver's buffers begin with.
    pub fn queues(self) -> &'static [u16] {
        match self {
            Kind::Blk(_) | Kind::Pmem => &[0],
            Kind::Rng => &[WRITE],
            Kind::Net | Kind::Vsock => &[WRITE, 0],
            // Inflate, deflate, statistics, and reports in either of the places that drivers look for them.
            Kind::Balloon => &[0, 0, 0, WRITE, WRITE],
        }
    }

    /// Feature bits 0 to 31 that the driver takes.
    fn features(self) -> u32 {
        match self {
            // Statistics and reports.
            Kind::Balloon => 1 << 28 | 1 << 1 | 1 << 5,
            _ => 1 << 28,
        }
    }

    /// What an honest request prints.
    pub fn answer(self) -> &'static str {
        match self {
            Kind::Blk(_) => "0W",
            Kind::Net => "n",
            Kind::Vsock => "3", // RESET: nobody listens
            Kind::Rng => "r",
            Kind::Balloon => "b",
            Kind::Pmem => "0",
        }
    }

    /// A VM with this device and another one, which runs `code`.
    pub fn spec(self, code: Code) -> Spec {
        let mut spec = match self {
            Kind::Blk(engine) => with_engine(with_drive(code, &[b'W'; 4096], false).0, engine),
            // The other device is a drive; of all others it is the source of randomness.
            Kind::Rng => with_drive(code, &[b'W'; 4096], false).0,
            _ => spec(code),
        };
        spec.entropy = Some(RateLimiter::default());
        match self {
            Kind::Net => spec.interfaces.push(echo()),
            Kind::Vsock => spec.vsock = Some(vsock()),
            Kind::Balloon => {
                spec.balloon = Some(Balloon {
                    amount_mib: 1,
                    deflate_on_oom: false,
                    stats_polling_interval_s: 3600,
                    free_page_hinting: false,
                    free_page_reporting: true,
                });
            }
            Kind::Pmem => spec.pmem.push(Pmem {
                id: "pmem".into(),
                file: file(&[b'P'; 4096]),
                read_only: false,
                limit: None,
            }),
            _ => {}
        }
        spec
    }

    /// Its driver, and the other device's. Windows are in the order drives, interfaces, vsock, rng, balloon, pmem.
    pub fn drivers(self) -> (Driver, Driver) {
        let (window, other, other_kind) = match self {
            Kind::Rng => (1, 0, Kind::Blk(IoEngine::Sync)),
            Kind::Balloon | Kind::Pmem => (1, 0, Kind::Rng),
            _ => (0, 1, Kind::Rng),
        };
        let driver = |kind, window: u32, base| Driver {
            kind,
            window: WINDOW + 0x1000 * window,
            base,
        };
        (driver(self, window, SUBJECT), driver(other_kind, other, OTHER))
    }
}

/// An interface whose every frame comes back.
fn echo() -> Interface {
    let (tap, wire) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    std::thread::spawn(move || {
        let mut frame = vec![0; 70_000];
        // Ends with the VM.
        while let Ok(length @ 1..) = wire.recv(&mut frame) {
            let _ = wire.send(&frame[..length]);
        }
    });
    Interface {
        id: "eth0".into(),
        tap: OwnedFd::from(tap).into(),
        vhost: None,
        options: net::Options::default(),
    }
}

fn vsock() -> Vsock {
    let directory = tempfile::tempdir().unwrap();
    Vsock {
        guest_cid: CID,
        listener: UnixListener::bind(directory.path().join("v")).unwrap(),
        outward: Outward::None,
    }
}

/// A driver of one device.
#[derive(Debug, Clone, Copy)]
pub struct Driver {
    pub kind: Kind,
    pub window: u32,
    base: u32,
}

impl Driver {
    pub fn descriptors(&self, queue: u32) -> u32 {
        self.base + 0x4000 * queue
    }

    pub fn available(&self, queue: u32) -> u32 {
        self.descriptors(queue) + 0x1000
    }

    pub fn used(&self, queue: u32) -> u32 {
        self.descriptors(queue) + 0x2000
    }

    /// Buffers, apart from all rings.
    pub fn buffer(&self) -> u32 {
        self.base + 0x8_0000
    }

    pub fn register(&self, code: Code, offset: u32, value: u32) -> Code {
        code.store(self.window + offset, value)
    }

    /// Resets the device and goes up to `FEATURES_OK`.
    pub fn negotiate(&self, code: Code) -> Code {
        let steps = [
            (STATUS, 0),
            (STATUS, 1),
            (STATUS, 3),
            (0x24, 1),
            (0x20, 1), // VERSION_1
            (0x24, 0),
            (0x20, self.kind.features()),
            (STATUS, 11),
        ];
        self.registers(code, &steps)
    }

    pub fn registers(&self, code: Code, steps: &[(u32, u32)]) -> Code {
        steps
            .iter()
            .fold(code, |code, (offset, value)| self.register(code, *offset, *value))
    }

    /// Sets up `queue` with empty rings.
    pub fn queue(&self, code: Code, queue: u32) -> Code {
        let code = code.store(self.available(queue), 0).store(self.used(queue), 0);
        let steps = [
            (0x30, queue),
            (0x38, u32::from(SIZE)),
            (0x80, self.descriptors(queue)),
            (0x84, 0),
            (0x90, self.available(queue)),
            (0x94, 0),
            (0xa0, self.used(queue)),
            (0xa4, 0),
            (0x44, 1),
        ];
        self.registers(code, &steps)
    }

    /// Resets the device and brings it up with all its queues.
    pub fn up(&self, code: Code) -> Code {
        let queues = 0..self.kind.queues().len() as u32;
        let code = queues.fold(self.negotiate(code), |code, queue| self.queue(code, queue));
        self.register(code, STATUS, 15)
    }

    pub fn descriptor(&self, code: Code, queue: u32, index: u32, piece: &Piece) -> Code {
        let at = self.descriptors(queue) + 16 * index;
        code.store(at, piece.address as u32)
            .store(at + 4, (piece.address >> 32) as u32)
            .store(at + 8, piece.length)
            .store16(at + 12, piece.flags)
            .store16(at + 14, piece.next)
    }

    /// Makes `head` available as the `n`th of the queue and kicks.
    pub fn offer(&self, code: Code, queue: u32, n: u16, head: u16) -> Code {
        let entry = u32::from((n - 1) % SIZE);
        let code = code
            .store16(self.available(queue) + 4 + 2 * entry, head)
            .store16(self.available(queue) + 2, n);
        self.register(code, NOTIFY, queue)
    }

    /// A chain of (address, length, flags) as the `n`th of the queue.
    fn chain(&self, code: Code, queue: u32, n: u16, pieces: &[(u32, u32, u16)]) -> Code {
        let mut code = code;
        for (index, (address, length, flags)) in pieces.iter().enumerate() {
            let last = index + 1 == pieces.len();
            let piece = Piece {
                address: u64::from(*address),
                length: *length,
                flags: flags | if last { 0 } else { NEXT },
                next: index as u16 + 1,
            };
            code = self.descriptor(code, queue, index as u32, &piece);
        }
        self.offer(code, queue, n, 0)
    }

    /// Something that makes the device take a buffer of `queue`, where an offer alone does not.
    pub fn provoke(&self, code: Code, queue: u32) -> Code {
        match (self.kind, queue) {
            (Kind::Net | Kind::Vsock, 0) => self.transmit(code, 1),
            _ => code,
        }
    }

    /// The `n`th frame or packet, which gets an answer.
    fn transmit(&self, code: Code, n: u16) -> Code {
        let at = self.buffer() + 0x4000;
        if self.kind == Kind::Net {
            return self.chain(code, 1, n, &[(at, 12 + 60, 0)]);
        }
        // A request to a port where nobody listens: cids, ports, type, operation.
        let words = [CID, 0, 2, 0, 7, 9, 0, 1 | 1 << 16, 0, 0, 0];
        let code = (0..)
            .zip(words)
            .fold(code, |code, (n, word)| code.store(at + 4 * n, word));
        self.chain(code, 1, n, &[(at, 44, 0)])
    }

    /// The `n`th honest request since the device came up; waits for its answer and prints it. For a device that has just
    /// come up `n` is 1.
    pub fn good(&self, code: Code, n: u16) -> Code {
        let at = self.buffer();
        let digit = |code: Code| code.raw(&[0x04, b'0']).print_al(); // add al, '0'
        match self.kind {
            Kind::Blk(_) => {
                let code = code.store(at, 0).store(at + 8, 1).store(at + 12, 0);
                let pieces = [(at, 16, 0), (at + 0x200, 512, WRITE), (at + 0x800, 1, WRITE)];
                let code = self.chain(code.store(at + 0x800, 0xff), 0, n, &pieces);
                let code = code.wait16(self.used(0) + 2, n).load(at + 0x800);
                digit(code).load(at + 0x200).print_al()
            }
            Kind::Pmem => {
                let pieces = [(at, 4, 0), (at + 0x200, 4, WRITE)];
                let code = self.chain(code.store(at, 0).store(at + 0x200, 9), 0, n, &pieces);
                digit(code.wait16(self.used(0) + 2, n).load(at + 0x200))
            }
            Kind::Rng => {
                let code = self.chain(code, 0, n, &[(at, 16, WRITE)]);
                code.wait16(self.used(0) + 2, n).print(b"r")
            }
            Kind::Balloon => {
                let code = self.chain(code.store(at, FREE_PAGE), 0, n, &[(at, 4, 0)]);
                code.wait16(self.used(0) + 2, n).print(b"b")
            }
            Kind::Net | Kind::Vsock => {
                let code = self.chain(code, 0, n, &[(at, 0x1000, WRITE)]);
                let code = self.transmit(code, n);
                let code = code.wait16(self.used(1) + 2, n).wait16(self.used(0) + 2, n);
                match self.kind {
                    Kind::Net => code.print(b"n"),
                    // What the packet does: the upper half of the word at 28.
                    _ => digit(code.load(at + 30)),
                }
            }
        }
    }

    /// Waits until the device says that it needs a reset, by its status and by an interrupt.
    pub fn broken(&self, code: Code) -> Code {
        let code = code
            .wait_bits(self.window + STATUS, NEEDS_RESET)
            .wait_bits(self.window + INTERRUPT_STATUS, CONFIG_CHANGED);
        self.register(code, INTERRUPT_ACK, CONFIG_CHANGED)
    }
}

/// A descriptor.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
    pub next: u16,
}
