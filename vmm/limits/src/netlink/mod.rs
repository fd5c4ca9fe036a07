//! Netlink, in one place: a connection that sends requests and reads what the kernel answers.
//!
//! The kernel works through a request inside the `send` that carries it, so by the time `send`
//! returns every answer is queued on the socket (the rest of a dump follows on each `recv`).
//! Nothing ever has to be waited for: calls are synchronous, and an answer that is not there is
//! an error, not a hang.
//!
//! A connection belongs to the network namespace of the thread that opened it, for ever.

pub mod conntrack;
pub mod link;
pub mod nft;
pub mod tc;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;

use netlink_packet_core::{NetlinkBuffer, NetlinkSerializable, NlasIterator};
use netlink_sys::{Socket, SocketAddr, protocols};
use rtnetlink::packet_route::RouteNetlinkMessage;

use crate::error::{Error, Result};

// linux/netlink.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLM_F_CAPPED: u16 = 0x100;
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLMSG_HDRLEN: usize = 16;

/// Make it if it is not there.
pub const CREATE: u16 = 0x400;
/// Fail if it is there.
pub const EXCL: u16 = 0x200;
/// Replace it if it is there.
pub const REPLACE: u16 = 0x100;
/// Answer with everything there is.
pub const DUMP: u16 = 0x300;

/// Room for one answer. The kernel builds dumps in pieces of at most 32 KiB.
const RECEIVE: usize = 64 * 1024;

/// One message on its way to the kernel, with words for what it does.
#[derive(Debug, Clone)]
pub struct Request {
    /// What it does, as it stands after "cannot".
    pub what: String,
    kind: u16,
    flags: u16,
    payload: Vec<u8>,
    /// Error numbers that count as success (it was there already; it was gone already).
    tolerate: Vec<i32>,
}

impl Request {
    /// A message of the given type. `flags` are [`CREATE`] and friends.
    pub fn new(what: impl Into<String>, kind: u16, flags: u16, payload: Vec<u8>) -> Self {
        Self {
            what: what.into(),
            kind,
            flags,
            payload,
            tolerate: Vec::new(),
        }
    }

    /// A typed rtnetlink message.
    pub fn route(what: impl Into<String>, flags: u16, message: &RouteNetlinkMessage) -> Self {
        let mut payload = vec![0; message.buffer_len()];
        message.serialize(&mut payload);
        Self::new(what, message.message_type(), flags, payload)
    }

    /// Counts this error number as success.
    #[must_use]
    pub fn tolerate(mut self, errno: i32) -> Self {
        self.tolerate.push(errno);
        self
    }

    fn emit(&self, sequence: u32, flags: u16, out: &mut Vec<u8>) {
        let length = NLMSG_HDRLEN + self.payload.len();
        out.extend_from_slice(&(length as u32).to_ne_bytes());
        out.extend_from_slice(&self.kind.to_ne_bytes());
        out.extend_from_slice(&flags.to_ne_bytes());
        out.extend_from_slice(&sequence.to_ne_bytes());
        out.extend_from_slice(&0u32.to_ne_bytes());
        out.extend_from_slice(&self.payload);
        out.resize(out.len().next_multiple_of(4), 0);
    }
}

/// An answer: its type and what follows the header.
pub(crate) type Answer = (u16, Vec<u8>);

/// A netlink connection.
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    sequence: u32,
}

impl Connection {
    /// To rtnetlink: links, addresses, routes, traffic control.
    pub fn route() -> Result<Self> {
        Self::open(protocols::NETLINK_ROUTE, "rtnetlink")
    }

    /// To netfilter: nftables.
    pub fn netfilter() -> Result<Self> {
        Self::open(protocols::NETLINK_NETFILTER, "nfnetlink")
    }

    fn open(protocol: isize, name: &'static str) -> Result<Self> {
        let failed = |call| {
            move |source| Error::Device {
                call,
                device: name.to_owned(),
                source,
            }
        };
        let mut socket = Socket::new(protocol).map_err(failed("socket"))?;
        socket.bind_auto().map_err(failed("bind"))?;
        socket
            .connect(&SocketAddr::new(0, 0))
            .map_err(failed("connect"))?;
        // The kernel's words for an error, and no copy of the request in every answer to it.
        socket.set_ext_ack(true).map_err(failed("NETLINK_EXT_ACK"))?;
        socket.set_cap_ack(true).map_err(failed("NETLINK_CAP_ACK"))?;
        // An nftables transaction is answered message by message at its end: all must fit.
        socket
            .set_rx_buf_sz(4 * 1024 * 1024_i32)
            .map_err(failed("SO_RCVBUF"))?;
        Ok(Self { socket, sequence: 1 })
    }

    /// Sends the requests in one go. All are attempted; the first error is returned.
    pub fn execute(&mut self, requests: &[Request]) -> Result<()> {
        if requests.is_empty() {
            return Ok(());
        }
        let first = self.sequence;
        let mut buffer = Vec::new();
        for request in requests {
            request.emit(
                self.next_sequence(),
                request.flags | NLM_F_REQUEST | NLM_F_ACK,
                &mut buffer,
            );
        }
        self.send(&buffer, &requests[0].what)?;
        self.acknowledge(requests, first)
    }

    /// Sends the requests as one nfnetlink transaction: all of them take effect, or none.
    pub(crate) fn transaction(&mut self, begin: &Request, requests: &[Request], end: &Request) -> Result<()> {
        if requests.is_empty() {
            return Ok(());
        }
        let mut buffer = Vec::new();
        begin.emit(self.next_sequence(), NLM_F_REQUEST, &mut buffer);
        let first = self.sequence;
        for request in requests {
            request.emit(
                self.next_sequence(),
                request.flags | NLM_F_REQUEST | NLM_F_ACK,
                &mut buffer,
            );
        }
        end.emit(self.next_sequence(), NLM_F_REQUEST, &mut buffer);
        self.send(&buffer, &requests[0].what)?;
        self.acknowledge(requests, first)
    }

    /// Sends a request that is answered with any number of messages.
    pub(crate) fn dump(&mut self, request: &Request) -> Result<Vec<Answer>> {
        self.query(request, request.flags | NLM_F_REQUEST | DUMP)
    }

    /// Sends a request that is answered with one message.
    pub(crate) fn get(&mut self, request: &Request) -> Result<Vec<Answer>> {
        self.query(request, request.flags | NLM_F_REQUEST | NLM_F_ACK)
    }

    fn query(&mut self, request: &Request, flags: u16) -> Result<Vec<Answer>> {
        let sequence = self.next_sequence();
        let mut buffer = Vec::new();
        request.emit(sequence, flags, &mut buffer);
        self.send(&buffer, &request.what)?;
        let mut answers = Vec::new();
        loop {
            let received = self.receive(&request.what)?;
            for message in Messages::new(&received) {
                let message = message.map_err(|detail| decode(&request.what, detail))?;
                if message.sequence != sequence {
                    continue;
                }
                match message.kind {
                    NLMSG_DONE => return Ok(answers),
                    NLMSG_ERROR => return message.into_result(request).map(|()| answers),
                    kind => answers.push((kind, message.payload.to_vec())),
                }
            }
        }
    }

    fn acknowledge(&mut self, requests: &[Request], first: u32) -> Result<()> {
        let mut missing = requests.len();
        let mut outcome = Ok(());
        while missing > 0 {
            let received = match self.receive(&requests[0].what) {
                // A transaction that failed as a whole leaves some of its messages unanswered.
                Err(_) if outcome.is_err() => return outcome,
                other => other?,
            };
            for message in Messages::new(&received) {
                let message = message.map_err(|detail| decode(&requests[0].what, detail))?;
                if message.kind != NLMSG_ERROR {
                    continue;
                }
                let index = message.sequence.wrapping_sub(first) as usize;
                let known = requests.get(index);
                // What comes before the first request is the transaction's own beginning.
                let result = message.into_result(known.unwrap_or(&requests[0]));
                missing -= usize::from(known.is_some());
                outcome = outcome.and(result);
                if missing == 0 {
                    break;
                }
            }
        }
        outcome
    }

    fn send(&mut self, buffer: &[u8], what: &str) -> Result<()> {
        self.drain();
        let failed = |source| Error::Netlink {
            what: what.to_owned(),
            source,
            detail: String::new(),
        };
        let sent = self.socket.send(buffer, 0).map_err(failed)?;
        if sent == buffer.len() {
            Ok(())
        } else {
            Err(failed(io::ErrorKind::WriteZero.into()))
        }
    }

    /// Throws away what a request that failed half-way may have left behind.
    fn drain(&self) {
        let mut byte = [0u8; 1];
        // SAFETY: the descriptor is open for the life of the socket, the buffer is valid for its length.
        while unsafe {
            libc::recv(
                self.socket.as_raw_fd(),
                byte.as_mut_ptr().cast(),
                1,
                libc::MSG_DONTWAIT | libc::MSG_TRUNC,
            )
        } >= 0
        {}
    }

    fn receive(&self, what: &str) -> Result<Vec<u8>> {
        let mut buffer = Vec::with_capacity(RECEIVE);
        self.socket
            .recv(&mut buffer, libc::MSG_DONTWAIT)
            .map_err(|source| Error::Netlink {
                what: what.to_owned(),
                source,
                detail: "no answer from the kernel".to_owned(),
            })?;
        Ok(buffer)
    }

    fn next_sequence(&mut self) -> u32 {
        let now = self.sequence;
        // Zero is left out: the kernel uses it for messages that nobody asked for.
        self.sequence = self.sequence.checked_add(1).unwrap_or(1);
        now
    }
}

struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl Message<'_> {
    /// Reads an NLMSG_ERROR, which is also what success looks like.
    fn into_result(self, request: &Request) -> Result<()> {
        let code = self
            .payload
            .get(..4)
            .and_then(|b| b.try_into().ok())
            .map(i32::from_ne_bytes);
        let code = code.ok_or_else(|| decode(&request.what, "an error message without a code"))?;
        let errno = code.saturating_neg();
        if errno == 0 || request.tolerate.contains(&errno) {
            return Ok(());
        }
        Err(Error::Netlink {
            what: request.what.clone(),
            source: io::Error::from_raw_os_error(errno),
            detail: self.words(),
        })
    }

    /// The kernel's own words, which follow the header of the request that failed.
    fn words(&self) -> String {
        if self.flags & NLM_F_ACK_TLVS == 0 {
            return String::new();
        }
        let request = match (
            self.flags & NLM_F_CAPPED,
            self.payload.get(4..8).and_then(|b| b.try_into().ok()),
        ) {
            (0, Some(length)) => u32::from_ne_bytes(length) as usize,
            _ => NLMSG_HDRLEN,
        };
        let attributes = self.payload.get(4 + request.next_multiple_of(4)..).unwrap_or(&[]);
        let text = NlasIterator::new(attributes)
            .flatten()
            .find(|a| a.kind() == NLMSGERR_ATTR_MSG);
        text.map(|a| {
            String::from_utf8_lossy(a.value())
                .trim_end_matches('\0')
                .to_owned()
        })
        .unwrap_or_default()
    }
}

/// The messages of one datagram.
struct Messages<'a> {
    rest: &'a [u8],
}

impl<'a> Messages<'a> {
    fn new(rest: &'a [u8]) -> Self {
        Self { rest }
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = std::result::Result<Message<'a>, String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let buffer = match NetlinkBuffer::new_checked(self.rest) {
            Ok(buffer) => buffer,
            Err(error) => {
                self.rest = &[];
                return Some(Err(error.to_string()));
            }
        };
        let length = buffer.length() as usize;
        let message = Message {
            kind: buffer.message_type(),
            flags: buffer.flags(),
            sequence: buffer.sequence_number(),
            payload: &self.rest[NLMSG_HDRLEN..length],
        };
        self.rest = self.rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Ok(message))
    }
}

pub(crate) fn decode(what: &str, detail: impl ToString) -> Error {
    Error::Decode {
        what: what.to_owned(),
        detail: detail.to_string(),
    }
}

/// The attributes of a message or of another attribute, by type; of equal ones the last.
pub(crate) fn attributes(bytes: &[u8]) -> Result<BTreeMap<u16, &[u8]>> {
    let mut rest = bytes;
    let mut found = BTreeMap::new();
    // Not NlasIterator: its items borrow from the iterator's copy, these live as long as `bytes`.
    while rest.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let kind = u16::from_ne_bytes([rest[2], rest[3]]) & 0x3fff;
        let value = rest
            .get(4..length)
            .ok_or_else(|| decode("attributes", format!("length {length} of {} bytes", rest.len())))?;
        found.insert(kind, value);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_cut_short_is_an_error_not_a_panic() {
        let whole = {
            let mut bytes = Vec::new();
            Request::new("test", 7, 0, vec![1, 2, 3]).emit(9, 0, &mut bytes);
            bytes
        };
        assert_eq!(Messages::new(&whole).next().unwrap().unwrap().payload, [1, 2, 3]);
        for length in 1..whole.len() - 1 {
            assert!(Messages::new(&whole[..length]).all(|m| m.is_err()), "{length}");
        }
    }

    #[test]
    fn the_kernels_words_are_found_behind_a_capped_request() {
        let mut payload = (-22i32).to_ne_bytes().to_vec();
        payload.extend_from_slice(&[0; NLMSG_HDRLEN]);
        payload.extend_from_slice(&[9, 0, 1, 0]);
        payload.extend_from_slice(b"nope\0\0\0\0");
        let message = Message {
            kind: NLMSG_ERROR,
            flags: NLM_F_ACK_TLVS | NLM_F_CAPPED,
            sequence: 1,
            payload: &payload,
        };
        let error = message
            .into_result(&Request::new("do it", 1, 0, vec![]))
            .unwrap_err();
        assert_eq!(error.errno(), Some(libc::EINVAL));
        assert!(error.to_string().ends_with("(nope)"), "{error}");
    }
}
