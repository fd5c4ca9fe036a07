//! One stream between a host's socket and a guest's.
//!
//! ```text
//! inward:   Greeting --CONNECT port\n--> Requested --RESPONSE--> Open          outward:  REQUEST --> Open
//!              |  (sends REQUEST)          | RESET                                       (sends RESPONSE)
//!              +---------> closed <--------+
//!
//! Open:  host reads EOF            -> SHUTDOWN(send) to the guest; the other direction goes on
//!        guest SHUTDOWN(send)      -> what is buffered is written, then the host's socket is shut for writing
//!        both directions shut      -> RESET to the guest, closed
//!        guest RESET, host error   -> closed
//! ```
//!
//! Flow control is by credit (5.10.6.3): the guest may have at most [`BUFFER_BYTES`] on the way to the host;
//! what the host's socket does not take is kept in a buffer of that size, and a guest that sends more is cut.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use crate::devices::virtio::chain::Buffers;
use crate::devices::vsock::packet::{Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};

/// The receive buffer that the guest is told of, for each stream.
pub const BUFFER_BYTES: u32 = 64 << 10;
/// The longest greeting: `CONNECT 4294967295\n`.
const GREETING_BYTES: usize = 32;
/// Tell the guest of new credit when it has used this much of the old.
const CREDIT_STEP: u32 = BUFFER_BYTES / 4;

/// The ports of a stream: (host's, guest's).
pub type Key = (u32, u32);

/// Where a stream stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The host's side connected and has not said where to.
    Greeting,
    /// The guest was asked.
    Requested,
    /// Data may flow.
    Open,
    /// Over: to be removed.
    Closed,
}

/// See the module.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// Where it stands.
    pub state: State,
    greeting: Vec<u8>,
    /// Guest to host: what the host's socket did not take yet.
    backlog: VecDeque<u8>,
    /// Bytes that went on to the host's socket, modulo 2^32.
    forwarded: u32,
    /// What the guest knows of `forwarded`.
    forwarded_told: u32,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    /// What the guest said of its own buffer.
    peer_alloc: u32,
    peer_forwarded: u32,
    /// The host's socket may have data (edge-triggered, so it is remembered).
    readable: bool,
    /// The directions that the host has ended: what is told to the guest by SHUTDOWN.
    host_shut: u32,
    /// The directions that the guest has ended.
    guest_shut: u32,
    /// Control packets that wait for room in the guest's queue.
    pending: Pending,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Pending {
    request: bool,
    response: bool,
    credit: bool,
    credit_request: bool,
    shutdown: bool,
    reset: bool,
}

impl Connection {
    /// A host's side that has just connected; `stream` must be non-blocking.
    pub fn inward(stream: UnixStream) -> Self {
        Self {
            stream,
            state: State::Greeting,
            greeting: Vec::new(),
            backlog: VecDeque::new(),
            forwarded: 0,
            forwarded_told: 0,
            sent: 0,
            peer_alloc: 0,
            peer_forwarded: 0,
            readable: true,
            host_shut: 0,
            guest_shut: 0,
            pending: Pending::default(),
        }
    }

    /// A stream that the guest asked for, connected to the host's side.
    pub fn outward(stream: UnixStream, request: &Header) -> Self {
        let mut connection = Self::inward(stream);
        connection.state = State::Open;
        connection.pending.response = true;
        connection.take_credit(request);
        connection
    }

    /// The host's descriptor.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Reads the greeting; the guest's port once it is complete.
    pub fn greet(&mut self) -> io::Result<Option<u32>> {
        let mut byte = [0u8];
        // Byte by byte, so that what follows stays in the socket for the guest.
        loop {
            match self.stream.read(&mut byte) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) if byte[0] == b'\n' => break,
                Ok(_) if self.greeting.len() < GREETING_BYTES => self.greeting.push(byte[0]),
                Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let text = std::str::from_utf8(&self.greeting).ok();
        let port = text
            .and_then(|text| text.strip_prefix("CONNECT "))
            .and_then(|port| port.trim().parse().ok());
        self.greeting = Vec::new();
        port.map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Asks the guest.
    pub fn request(&mut self) {
        self.state = State::Requested;
        self.pending.request = true;
    }

    /// The host's socket is ready for something.
    pub fn host_ready(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        if writable && self.state == State::Open {
            self.flush();
        }
    }

    /// A packet from the guest; `data` is what follows the header.
    pub fn guest_packet(&mut self, header: &Header, data: &mut Buffers, host_port: u32) {
        self.take_credit(header);
        match (header.op, self.state) {
            (op::RESET, _) => self.state = State::Closed,
            (op::RESPONSE, State::Requested) => {
                self.state = State::Open;
                let answer = format!("OK {host_port}\n");
                // A socket that was just connected takes a line; one that does not is gone.
                if self.stream.write_all(answer.as_bytes()).is_err() {
                    self.cut();
                }
            }
            (op::DATA, State::Open) if self.guest_shut & SHUTDOWN_SEND == 0 => self.data(data),
            (op::SHUTDOWN, State::Open) => {
                self.guest_shut |= header.flags & SHUTDOWN_BOTH;
                if self.guest_shut & SHUTDOWN_RECEIVE != 0 {
                    self.readable = false;
                }
                self.settle();
            }
            (op::CREDIT_UPDATE, State::Open) => {}
            (op::CREDIT_REQUEST, State::Open) => self.pending.credit = true,
            _ => self.cut(),
        }
    }

    /// Data from the guest: to the socket as far as it takes, the rest to the backlog.
    fn data(&mut self, data: &mut Buffers) {
        if data.bytes() + self.backlog.len() as u64 > u64::from(BUFFER_BYTES) {
            // More than it had credit for.
            return self.cut();
        }
        if self.backlog.is_empty() {
            while data.bytes() > 0 {
                let pieces = data.pieces();
                // MSG_NOSIGNAL has no vectored write(2) of its own, hence sendmsg.
                let mut message: libc::msghdr = empty_message();
                message.msg_iov = pieces.as_ptr().cast_mut();
                message.msg_iovlen = pieces.len();
                // SAFETY: the pieces are guest memory (see `Buffers`); sendmsg only reads the list.
                let done = unsafe { libc::sendmsg(self.fd(), &message, libc::MSG_NOSIGNAL) };
                match done {
                    1.. => {
                        data.skip_front(done as usize);
                        self.forwarded = self.forwarded.wrapping_add(done as u32);
                    }
                    _ => match io::Error::last_os_error().kind() {
                        io::ErrorKind::Interrupted => {}
                        io::ErrorKind::WouldBlock => break,
                        _ => return self.cut(),
                    },
                }
            }
        }
        let mut bytes = [0u8; 4096];
        while data.bytes() > 0 {
            let now = data.bytes().min(bytes.len() as u64) as usize;
            data.take_front(&mut bytes[..now]);
            self.backlog.extend(&bytes[..now]);
        }
        self.credit_due();
    }

    /// Writes the backlog as far as the socket takes it.
    fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let (front, _) = self.backlog.as_slices();
            match send(&self.stream, front) {
                Ok(done) => {
                    self.backlog.drain(..done);
                    self.forwarded = self.forwarded.wrapping_add(done as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return self.cut(),
            }
        }
        if self.backlog.is_empty() {
            // A stream that once was slow need not hold its memory for ever.
            self.backlog = VecDeque::new();
        }
        self.credit_due();
        self.settle();
    }

    fn credit_due(&mut self) {
        if self.forwarded.wrapping_sub(self.forwarded_told) >= CREDIT_STEP {
            self.pending.credit = true;
        }
    }

    /// Ends what both sides have ended.
    fn settle(&mut self) {
        if self.guest_shut & SHUTDOWN_SEND != 0 && self.backlog.is_empty() {
            let _ = self.stream.shutdown(Shutdown::Write);
            let receives = self.guest_shut & SHUTDOWN_RECEIVE == 0 && self.host_shut & SHUTDOWN_SEND == 0;
            if !receives {
                self.cut();
            }
        }
    }

    /// Ends the stream and tells the guest.
    pub fn cut(&mut self) {
        self.pending = Pending {
            reset: true,
            ..Pending::default()
        };
        self.readable = false;
        self.backlog = VecDeque::new();
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn take_credit(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        let on_the_way = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_alloc.saturating_sub(on_the_way)
    }

    /// Whether there is something for the guest now.
    pub fn has_packet(&self) -> bool {
        self.pending != Pending::default() || self.has_data()
    }

    fn has_data(&self) -> bool {
        self.state == State::Open && self.readable && self.credit() > 0
    }

    /// Fills in the next packet for the guest; `data` is the room after the header. `None` when there is
    /// nothing to send after all.
    pub fn next_packet(&mut self, header: &mut Header, data: &mut Buffers) -> Option<()> {
        header.buf_alloc = BUFFER_BYTES;
        let pending = &mut self.pending;
        header.op = if pending.reset {
            pending.reset = false;
            self.state = State::Closed;
            op::RESET
        } else if pending.request {
            pending.request = false;
            op::REQUEST
        } else if pending.response {
            pending.response = false;
            op::RESPONSE
        } else if self.has_data() {
            self.read_data(header, data)?
        } else if self.pending.shutdown {
            self.pending.shutdown = false;
            header.flags = self.host_shut;
            op::SHUTDOWN
        } else if self.pending.credit_request {
            self.pending.credit_request = false;
            op::CREDIT_REQUEST
        } else if self.pending.credit {
            op::CREDIT_UPDATE
        } else {
            return None;
        };
        // Every packet carries the credit.
        self.pending.credit = false;
        self.forwarded_told = self.forwarded;
        header.fwd_cnt = self.forwarded;
        Some(())
    }

    /// Reads from the host's socket straight into the guest's buffer; returns what the packet has become.
    fn read_data(&mut self, header: &mut Header, data: &mut Buffers) -> Option<u16> {
        data.truncate(u64::from(self.credit()));
        let pieces = data.pieces();
        if pieces.is_empty() {
            return None;
        }
        loop {
            // SAFETY: the pieces are guest memory (see `Buffers`), at most UIO_MAXIOV of them.
            let done = unsafe { libc::readv(self.fd(), pieces.as_ptr(), pieces.len() as libc::c_int) };
            match done {
                1.. => {
                    header.length = done as u32;
                    self.sent = self.sent.wrapping_add(done as u32);
                    if self.credit() == 0 {
                        self.pending.credit_request = true;
                    }
                    return Some(op::DATA);
                }
                0 => return Some(self.host_ended(header)),
                _ => match io::Error::last_os_error().kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => {
                        self.readable = false;
                        return self.other_packet(header);
                    }
                    _ => {
                        self.cut();
                        self.pending.reset = false;
                        self.state = State::Closed;
                        return Some(op::RESET);
                    }
                },
            }
        }
    }

    /// The host's side sends no more.
    fn host_ended(&mut self, header: &mut Header) -> u16 {
        self.readable = false;
        self.host_shut |= SHUTDOWN_SEND;
        self.pending.shutdown = false;
        header.flags = self.host_shut;
        self.settle();
        op::SHUTDOWN
    }

    /// There was no data after all: a credit update, if one is due.
    fn other_packet(&mut self, header: &mut Header) -> Option<u16> {
        if self.pending.shutdown {
            self.pending.shutdown = false;
            header.flags = self.host_shut;
            return Some(op::SHUTDOWN);
        }
        self.pending.credit.then_some(op::CREDIT_UPDATE)
    }

    /// The host closed its socket altogether: nobody will read what the guest sends.
    pub fn host_hung_up(&mut self) {
        match self.state {
            State::Open => {
                // What it wrote before is still to be read; EOF follows it.
                self.readable = self.guest_shut & SHUTDOWN_RECEIVE == 0;
                if self.host_shut & SHUTDOWN_RECEIVE == 0 {
                    self.host_shut |= SHUTDOWN_RECEIVE;
                    self.pending.shutdown = true;
                }
            }
            State::Greeting => self.state = State::Closed,
            State::Requested => self.cut(),
            State::Closed => {}
        }
    }
}

fn empty_message() -> libc::msghdr {
    // SAFETY: zeroes are a valid, empty msghdr.
    unsafe { std::mem::zeroed() }
}

fn send(stream: &UnixStream, bytes: &[u8]) -> io::Result<usize> {
    rustix::net::send(stream, bytes, rustix::net::SendFlags::NOSIGNAL).map_err(io::Error::from)
}
