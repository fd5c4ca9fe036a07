//! All streams of a guest: who is connected to whom, and who sends next.
//!
//! ```text
//!                 +-- listening socket: inward streams
//! inner epoll <---+-- each stream's socket (edge-triggered)
//!      |
//! event loop --> host_events() --> ready: connections with something for the guest --> next_packet()
//! guest packet --> guest_packet() --> stream's socket, or a new outward stream
//! ```
//!
//! Everything is bounded: streams ([`MAX_STREAMS`]), what each buffers, and resets that wait ([`MAX_RESETS`]).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::devices::virtio::chain::Buffers;
use crate::devices::vsock::connection::{Connection, Key, State};
use crate::devices::vsock::metrics::Metrics;
use crate::devices::vsock::outward::Outward;
use crate::devices::vsock::packet::{Header, TYPE_STREAM, op};
use crate::log::RateLimit;

/// The host's context id.
pub const HOST_CID: u64 = 2;
/// Most streams at once.
pub const MAX_STREAMS: usize = 1024;
/// Most resets that wait for room in the guest's queue; more are left out, and the guest's own timeouts rule.
const MAX_RESETS: usize = 256;
/// First host port of inward streams; outward ones use the ports of services, far below.
pub(super) const FIRST_HOST_PORT: u32 = 1 << 30;
const LISTENER_TOKEN: u64 = u64::MAX;
const EVENTS_AT_ONCE: usize = 32;

/// See the module.
pub struct Muxer {
    guest_cid: u64,
    epoll: Epoll,
    listener: UnixListener,
    outward: Outward,
    connections: HashMap<Key, Connection>,
    /// Inward streams that have not said their port, by token.
    greeting: HashMap<u64, Connection>,
    /// Tokens of sockets in the epoll set to streams.
    tokens: HashMap<u64, Key>,
    /// The reverse.
    keys: HashMap<Key, u64>,
    next_token: u64,
    pub(super) next_port: u32,
    /// Streams with something for the guest, in turn; each once, and none that is gone.
    ready: VecDeque<Key>,
    /// Resets for packets that belong to no stream.
    resets: VecDeque<Header>,
    complaints: RateLimit,
    pub(super) metrics: Metrics,
}

impl Muxer {
    /// A muxer that listens on `listener` and connects outwards by `outward`.
    pub fn new(guest_cid: u32, listener: UnixListener, outward: Outward) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER_TOKEN);
        epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), event)?;
        Ok(Self {
            guest_cid: u64::from(guest_cid),
            epoll,
            listener,
            outward,
            connections: HashMap::new(),
            greeting: HashMap::new(),
            tokens: HashMap::new(),
            keys: HashMap::new(),
            next_token: 0,
            next_port: FIRST_HOST_PORT,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            complaints: RateLimit::new(10, std::time::Duration::from_secs(10)),
            metrics: Metrics::default(),
        })
    }

    /// Readable when a host's socket is ready.
    pub fn epoll_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// How many streams there are.
    pub fn streams(&self) -> usize {
        self.connections.len() + self.greeting.len()
    }

    /// Ends every stream: the guest's driver was reset.
    pub fn reset(&mut self) {
        self.metrics.conns_removed += self.connections.len() as u64;
        self.connections.clear();
        self.greeting.clear();
        self.tokens.clear();
        self.keys.clear();
        self.ready.clear();
        self.resets.clear();
    }

    /// Attends to the host's sockets. `up`: whether a driver is there; without one, inward streams are refused.
    pub fn host_events(&mut self, up: bool) {
        let mut events = [EpollEvent::default(); EVENTS_AT_ONCE];
        loop {
            let count = match self.epoll.wait(0, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            // A socket that was just accepted may be readable already.
            let mut again = count == events.len();
            for event in &events[..count] {
                if event.data() == LISTENER_TOKEN {
                    self.accept(up);
                    again = true;
                } else {
                    self.socket_ready(event.data(), event.event_set());
                }
            }
            if !again {
                return;
            }
        }
    }

    fn accept(&mut self, up: bool) {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    // Refused by closing: the caller reads EOF instead of "OK" and may try again.
                    if up && self.streams() < MAX_STREAMS && stream.set_nonblocking(true).is_ok() {
                        let connection = Connection::inward(stream);
                        if let Ok(token) = self.watch(&connection) {
                            self.greeting.insert(token, connection);
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // ECONNABORTED too: the next event brings the next. Out of descriptors: the same.
                Err(_) => return,
            }
        }
    }

    fn watch(&mut self, connection: &Connection) -> io::Result<u64> {
        let token = self.next_token;
        self.next_token += 1;
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(
            ControlOperation::Add,
            connection.fd(),
            EpollEvent::new(events, token),
        )?;
        Ok(token)
    }

    fn socket_ready(&mut self, token: u64, events: EventSet) {
        if let Some(mut connection) = self.greeting.remove(&token) {
            match connection.greet() {
                Ok(Some(guest_port)) => self.open_inward(token, guest_port, connection),
                Ok(None) if !events.contains(EventSet::HANG_UP) => {
                    self.greeting.insert(token, connection);
                }
                // A host program that does not speak the protocol, or left.
                _ => {}
            }
            return;
        }
        let Some(key) = self.tokens.get(&token).copied() else {
            return;
        };
        let Some(connection) = self.connections.get_mut(&key) else {
            return;
        };
        connection.host_ready(
            events.intersects(EventSet::IN | EventSet::READ_HANG_UP),
            events.contains(EventSet::OUT),
        );
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            connection.host_hung_up();
        }
        self.after(key);
    }

    fn open_inward(&mut self, token: u64, guest_port: u32, mut connection: Connection) {
        let key = loop {
            let key = (self.next_port, guest_port);
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            // Ends: there are fewer streams than ports.
            if !self.connections.contains_key(&key) {
                break key;
            }
        };
        connection.request();
        self.insert(token, key, connection);
    }

    fn insert(&mut self, token: u64, key: Key, connection: Connection) {
        self.metrics.conns_added += 1;
        self.tokens.insert(token, key);
        self.keys.insert(key, token);
        self.connections.insert(key, connection);
        self.after(key);
    }

    /// Queues or removes a stream after something happened to it.
    fn after(&mut self, key: Key) {
        let Some(connection) = self.connections.get(&key) else {
            return;
        };
        if connection.state == State::Closed {
            self.remove(key);
        } else if connection.has_packet() && !self.ready.contains(&key) {
            self.ready.push_back(key);
        }
    }

    fn remove(&mut self, key: Key) {
        if self.connections.remove(&key).is_some() {
            self.metrics.conns_removed += 1;
        }
        self.ready.retain(|ready| *ready != key);
        if let Some(token) = self.keys.remove(&key) {
            self.tokens.remove(&token);
        }
    }

    /// A packet from the guest; `data` holds exactly `header.length` bytes.
    pub fn guest_packet(&mut self, header: &Header, data: &mut Buffers) {
        self.metrics.tx_packets_count += 1;
        self.metrics.tx_bytes_count += u64::from(header.length);
        self.metrics.tx_resets += u64::from(header.op == op::RESET);
        // Nobody lives at other addresses; a guest that uses them gets silence, as on a wire.
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let key = (header.dst_port, header.src_port);
        if header.kind != TYPE_STREAM {
            return self.refuse(header);
        }
        if let Some(connection) = self.connections.get_mut(&key) {
            connection.guest_packet(header, data, key.0);
            return self.after(key);
        }
        match header.op {
            op::REQUEST => self.open_outward(header, key),
            op::RESET => {}
            _ => self.refuse(header),
        }
    }

    fn open_outward(&mut self, header: &Header, key: Key) {
        if self.streams() >= MAX_STREAMS {
            return self.refuse(header);
        }
        let result = self.outward.open(header.dst_port).and_then(|stream| {
            let connection = Connection::outward(stream, header);
            Ok((self.watch(&connection)?, connection))
        });
        match result {
            Ok((token, connection)) => self.insert(token, key, connection),
            Err(error) => {
                if let Some(suppressed) = self.complaints.pass() {
                    tracing::info!(port = header.dst_port, %error, suppressed, "vsock: outward stream refused");
                }
                self.refuse(header);
            }
        }
    }

    /// Answers a packet that belongs nowhere.
    fn refuse(&mut self, header: &Header) {
        if header.op == op::RESET {
            return;
        }
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(Header {
                src_port: header.dst_port,
                dst_port: header.src_port,
                kind: header.kind,
                op: op::RESET,
                ..Header::default()
            });
        } else {
            self.metrics.resets_dropped += 1;
        }
    }

    /// Whether something waits for the guest.
    pub fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest: data goes into `data`, the header is returned.
    pub fn next_packet(&mut self, data: &mut Buffers) -> Option<Header> {
        let header = self.take_packet(data)?;
        self.metrics.rx_packets_count += 1;
        self.metrics.rx_bytes_count += u64::from(header.length);
        self.metrics.rx_resets += u64::from(header.op == op::RESET);
        Some(header)
    }

    fn take_packet(&mut self, data: &mut Buffers) -> Option<Header> {
        let ours = Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            kind: TYPE_STREAM,
            ..Header::default()
        };
        if let Some(reset) = self.resets.pop_front() {
            return Some(Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                ..reset
            });
        }
        // Each stream once: one whose data the buffer has no room for is ready again at once.
        for _ in 0..self.ready.len() {
            let Some(key) = self.ready.pop_front() else {
                break;
            };
            let Some(connection) = self.connections.get_mut(&key) else {
                continue;
            };
            let mut header = Header {
                src_port: key.0,
                dst_port: key.1,
                ..ours
            };
            let packet = connection.next_packet(&mut header, data);
            self.after(key);
            if packet.is_some() {
                return Some(header);
            }
        }
        None
    }
}
