//! The 16550 at port 0x3f8: the guest's console.
//!
//! ```text
//! vCPU thread                          event loop
//! THR <- byte --> [Console: 64 KiB] --event--> host descriptor (never blocks; EAGAIN waits for EPOLLOUT)
//!                       |
//!                       +--> the last 4 KiB, kept for a panic's detail
//! RBR -> byte <-- [FIFO: 64 bytes] <--event--- host descriptor (read only while the FIFO has room)
//! ```
//!
//! A guest that prints faster than the host's end takes loses the newest bytes, and the loss is counted: a
//! console must neither grow without bound nor stop the guest.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use mandoline_api::monitor::Phase;
use vm_superio::Trigger;
use vm_superio::serial::{Serial, SerialEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::state::Phases;

/// Offsets and bits of the 16550's registers (National Semiconductor PC16550D, table II).
const DATA: u8 = 0;
const IER: u8 = 1;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;
const LSR_DATA_READY: u8 = 1;
const MCR_OUT2: u8 = 8;

/// Output that waits for the host's end.
const PENDING_BYTES: usize = 64 << 10;
/// Output that is remembered for a panic's detail.
const TAIL_BYTES: usize = 4 << 10;

/// The output side, between the vCPU that writes and the event loop that hands on.
#[derive(Debug)]
pub struct Console {
    buffers: Mutex<Buffers>,
    /// Signalled when there is output to hand on.
    pub output: EventFd,
    /// Signalled when the receive FIFO has room again.
    pub room: EventFd,
    phases: Arc<Phases>,
}

#[derive(Debug, Default)]
struct Buffers {
    pending: VecDeque<u8>,
    tail: VecDeque<u8>,
    lost: u64,
}

impl Console {
    /// An empty console.
    pub fn new(phases: Arc<Phases>) -> io::Result<Arc<Self>> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Arc::new(Self {
            buffers: Mutex::default(),
            output: event()?,
            room: event()?,
            phases,
        }))
    }

    fn buffers(&self) -> MutexGuard<'_, Buffers> {
        self.buffers
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn push(&self, bytes: &[u8]) {
        self.phases.mark(Phase::FirstSerialByte);
        let mut buffers = self.buffers();
        let wake = buffers.pending.is_empty();
        let room = PENDING_BYTES - buffers.pending.len();
        let taken = bytes.len().min(room);
        buffers.pending.extend(&bytes[..taken]);
        buffers.lost += (bytes.len() - taken) as u64;
        buffers.tail.extend(bytes);
        let surplus = buffers.tail.len().saturating_sub(TAIL_BYTES);
        buffers.tail.drain(..surplus);
        if wake {
            let _ = self.output.write(1);
        }
    }

    /// Hands output to `sink` until there is none or the sink takes no more (`WouldBlock`).
    pub fn drain(&self, sink: &mut impl Write) -> io::Result<()> {
        loop {
            let mut chunk = [0u8; 4096];
            let length = {
                let buffers = self.buffers();
                let mut from = &buffers.pending;
                io::Read::read(&mut Peek(&mut from), &mut chunk)?
            };
            if length == 0 {
                return Ok(());
            }
            // The lock is free while the host is written to: a vCPU never waits for it.
            match sink.write(&chunk[..length]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => drop(self.buffers().pending.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Drops what waits: the host's end is gone.
    pub fn discard(&self) {
        let mut buffers = self.buffers();
        buffers.lost += buffers.pending.len() as u64;
        buffers.pending.clear();
    }

    /// Bytes that were lost because the host's end was slow or gone.
    pub fn lost(&self) -> u64 {
        self.buffers().lost
    }

    /// The last output, for people.
    pub fn tail(&self) -> String {
        let buffers = self.buffers();
        let bytes: Vec<u8> = buffers.tail.iter().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Reads from a queue without taking.
struct Peek<'a>(&'a mut &'a VecDeque<u8>);

impl Read for Peek<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut length = 0;
        for (to, from) in buffer.iter_mut().zip(self.0.iter()) {
            *to = *from;
            length += 1;
        }
        Ok(length)
    }
}

/// The UART's side of the console.
#[derive(Debug, Clone)]
pub struct Output(Arc<Console>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SerialEvents for Output {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        let _ = self.0.room.write(1);
    }
}

/// The UART's interrupt line.
#[derive(Debug)]
pub struct Line(pub EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The UART on the port bus.
pub struct Uart {
    registers: Mutex<Serial<Line, Output, Output>>,
    input_closed: AtomicBool,
}

impl Uart {
    /// A UART that interrupts by `line` and prints to `console`.
    pub fn new(line: EventFd, console: Arc<Console>) -> Self {
        let output = Output(console);
        Self {
            registers: Mutex::new(Serial::with_events(Line(line), output.clone(), output)),
            input_closed: AtomicBool::new(false),
        }
    }

    fn registers(&self) -> MutexGuard<'_, Serial<Line, Output, Output>> {
        self.registers
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The guest writes a register.
    pub fn write(&self, offset: u8, value: u8) {
        // Fails only if the interrupt line's counter is full or, in loopback mode, the FIFO is: both are the
        // guest's own doing, and a UART has no way to say so.
        let _ = self.registers().write(offset, value);
    }

    /// Registers as they are at power-on; what waits for the host's end still goes there.
    pub fn power_on(&self) {
        let mut registers = self.registers();
        // Before all else: while its divisor latch bit is set, the data register is not there.
        let _ = registers.write(LCR, 0);
        // Bytes for the guest that is gone are dropped by reading them.
        while registers.read(LSR) & LSR_DATA_READY != 0 {
            registers.read(DATA);
        }
        for (offset, value) in [(IER, 0), (MCR, MCR_OUT2)] {
            // Cannot fail: none of these makes an interrupt or fills the FIFO.
            let _ = registers.write(offset, value);
        }
    }

    /// The guest reads a register.
    pub fn read(&self, offset: u8) -> u8 {
        self.registers().read(offset)
    }

    /// Feeds the guest from `source` while its FIFO has room. Ends quietly at `WouldBlock` and at the end.
    pub fn feed(&self, source: &mut File) -> io::Result<()> {
        while !self.input_closed.load(Ordering::Relaxed) {
            let mut registers = self.registers();
            let room = registers.fifo_capacity().min(64);
            if room == 0 {
                return Ok(());
            }
            let mut bytes = [0u8; 64];
            match source.read(&mut bytes[..room]) {
                Ok(0) => self.input_closed.store(true, Ordering::Relaxed),
                Ok(length) => {
                    let _ = registers.enqueue_raw_bytes(&bytes[..length]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.input_closed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console() -> Arc<Console> {
        Console::new(Arc::default()).unwrap()
    }

    #[test]
    fn output_is_handed_on_in_order_and_remembered() {
        let console = console();
        let uart = Uart::new(EventFd::new(0).unwrap(), console.clone());
        for byte in b"Kernel panic" {
            uart.write(0, *byte);
        }
        assert_eq!(
            console.output.read().unwrap(),
            1,
            "one wake for the first byte only"
        );
        let mut sink = Vec::new();
        console.drain(&mut sink).unwrap();
        assert_eq!(sink, b"Kernel panic");
        assert_eq!(console.tail(), "Kernel panic");
    }

    #[test]
    fn a_stuck_host_costs_bounded_memory_and_losses_are_counted() {
        let console = console();
        let chunk = [b'x'; 1000];
        for _ in 0..200 {
            console.push(&chunk);
        }
        assert_eq!(console.lost(), 200_000 - PENDING_BYTES as u64);
        assert_eq!(console.tail().len(), TAIL_BYTES);
        assert!(console.buffers().pending.len() <= PENDING_BYTES);
    }

    #[test]
    fn what_the_sink_refuses_stays() {
        struct Stuck(Vec<u8>);
        impl Write for Stuck {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                if self.0.len() >= 3 {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                self.0.extend(&bytes[..bytes.len().min(3)]);
                Ok(bytes.len().min(3))
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let console = console();
        console.push(b"abcdef");
        assert_eq!(
            console.drain(&mut Stuck(Vec::new())).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        let mut sink = Vec::new();
        console.drain(&mut sink).unwrap();
        assert_eq!(sink, b"def");
    }

    #[test]
    fn input_stops_at_the_fifo_and_goes_on_when_it_is_read() {
        use std::io::Seek;
        let console = console();
        let uart = Uart::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), console.clone());
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[b'k'; 100]).unwrap();
        file.rewind().unwrap();
        uart.feed(&mut file).unwrap();
        let mut got = 0;
        while uart.read(5) & 1 != 0 {
            assert_eq!(uart.read(0), b'k');
            got += 1;
        }
        assert_eq!(got, 64);
        assert!(console.room.read().unwrap() >= 1);
        uart.feed(&mut file).unwrap();
        while uart.read(5) & 1 != 0 {
            uart.read(0);
            got += 1;
        }
        assert_eq!(got, 100);
    }

    #[test]
    fn input_is_dropped_at_power_on_whatever_the_guest_set() {
        use std::io::Seek;
        let uart = Uart::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), console());
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"for the guest that is gone").unwrap();
        file.rewind().unwrap();
        uart.feed(&mut file).unwrap();
        for register in [LCR, IER, MCR] {
            uart.write(register, 0xff);
        }
        uart.power_on();
        assert_eq!(uart.read(LSR) & LSR_DATA_READY, 0);
        assert_eq!([uart.read(LCR), uart.read(IER), uart.read(MCR)], [0, 0, MCR_OUT2]);
    }
}
