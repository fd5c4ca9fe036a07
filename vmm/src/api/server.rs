//! The control socket's connections: a few, none of which can hold up another.
//!
//! ```text
//!              readable: bytes and descriptors         a request is whole
//! (connected) --------------------------------> buffered ---------------> answered --> sent --> buffered ...
//!                                                            |                ^
//!                                      InstanceStart: `serve` returns -- `answer` --+
//! ```
//!
//! Before boot the server runs in the only thread there is; from then on in one of its own, with the same
//! connections.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::api::http::{CONTINUE, MAX_REQUEST, Parsed, Request, Response, parse};
use crate::fds::Inherited;

/// Most connections at once, as Firecracker has it.
const MAX_CONNECTIONS: usize = 10;
/// Most descriptors that wait for their request on a connection.
const MAX_FDS: usize = 16;
/// A client that does not read its answers gets no more of them than this, in bytes.
const MAX_UNSENT: usize = 64 << 10;

/// What becomes of a request.
#[derive(Debug)]
pub enum Reply {
    /// Its answer.
    Now(Response),
    /// The answer comes by [`Server::answer`]; until then [`Server::serve`] is left.
    Later,
}

/// Why [`Server::serve`] returned.
#[derive(Debug)]
pub enum Left {
    /// A request waits for its answer.
    Waiting(Waiting),
    /// The descriptor to stop at became readable.
    Stopped,
}

/// A request that waits for its answer.
#[derive(Debug)]
pub struct Waiting {
    connection: u64,
    keep_alive: bool,
}

struct Connection {
    number: u64,
    stream: UnixStream,
    received: Vec<u8>,
    fds: VecDeque<OwnedFd>,
    to_send: Vec<u8>,
    /// The sender was told to go on with the body.
    told: bool,
    /// A request waits for its answer: no other is looked at.
    waits: bool,
    /// Close when everything is sent.
    last: bool,
}

/// The listening socket and its connections.
pub struct Server {
    listener: UnixListener,
    connections: Vec<Connection>,
    accepted: u64,
}

impl Server {
    /// Serves on `listener`.
    pub fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            connections: Vec::new(),
            accepted: 0,
        })
    }

    /// Serves until a request is to be answered [`Reply::Later`], or `stop` is readable. `handler` gets each request with the
    /// descriptors that came with it.
    pub fn serve(
        &mut self,
        stop: Option<BorrowedFd<'_>>,
        handler: &mut dyn FnMut(&Request, Inherited) -> Reply,
    ) -> io::Result<Left> {
        loop {
            let mut waiting = None;
            self.connections
                .retain_mut(|connection| waiting.is_some() || connection.attend(handler, &mut waiting));
            if let Some(waiting) = waiting {
                return Ok(Left::Waiting(waiting));
            }
            let mut polled = vec![PollFd::new(&self.listener, PollFlags::IN)];
            for connection in &self.connections {
                let flags = if connection.to_send.is_empty() {
                    PollFlags::IN
                } else {
                    PollFlags::OUT
                };
                polled.push(PollFd::from_borrowed_fd(connection.stream.as_fd(), flags));
            }
            polled.extend(stop.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            match rustix::event::poll(&mut polled, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
            if stop.is_some() && ready.last() == Some(&true) {
                return Ok(Left::Stopped);
            }
            let mut index = 0;
            self.connections.retain_mut(|connection| {
                index += 1;
                !ready[index] || !connection.to_send.is_empty() || connection.receive()
            });
            if ready[0] {
                self.accept();
            }
        }
    }

    /// Answers a request that waits; nobody hears it if its connection is gone.
    pub fn answer(&mut self, waiting: &Waiting, response: &Response) {
        let mut connections = self.connections.iter_mut();
        if let Some(connection) = connections.find(|connection| connection.number == waiting.connection) {
            connection.waits = false;
            connection.to_send.extend(response.bytes(waiting.keep_alive));
            // At once, since the process may be about to end.
            connection.send();
        }
    }

    fn accept(&mut self) {
        while let Ok((mut stream, _)) = self.listener.accept() {
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if self.connections.len() >= MAX_CONNECTIONS {
                let refusal = Response::fault(503, format!("more than {MAX_CONNECTIONS} connections"));
                let _ = stream.write(&refusal.bytes(false));
                continue;
            }
            self.accepted += 1;
            self.connections.push(Connection {
                number: self.accepted,
                stream,
                received: Vec::new(),
                fds: VecDeque::new(),
                to_send: Vec::new(),
                told: false,
                waits: false,
                last: false,
            });
        }
    }
}

impl Connection {
    /// Takes what has come; false when the connection is over.
    fn receive(&mut self) -> bool {
        let mut chunk = [0u8; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = rustix::net::recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut chunk)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        );
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        match got {
            Ok(got) if got.bytes == 0 => false,
            Ok(got) => {
                self.received.extend_from_slice(&chunk[..got.bytes]);
                self.fds.len() <= MAX_FDS
            }
            Err(error) => would_block(error.into()),
        }
    }

    /// Answers whole requests and sends; false when the connection is over.
    fn attend(
        &mut self,
        handler: &mut dyn FnMut(&Request, Inherited) -> Reply,
        waiting: &mut Option<Waiting>,
    ) -> bool {
        loop {
            let full = self.process(handler, waiting);
            if !self.send() {
                return false;
            }
            if !self.to_send.is_empty() || waiting.is_some() || !full {
                return self.waits || !self.last || !self.to_send.is_empty();
            }
        }
    }

    /// Answers whole requests; true if it stopped only because the client has to read first.
    fn process(
        &mut self,
        handler: &mut dyn FnMut(&Request, Inherited) -> Reply,
        waiting: &mut Option<Waiting>,
    ) -> bool {
        while !self.last && !self.waits {
            if self.to_send.len() >= MAX_UNSENT {
                return true;
            }
            match parse(&self.received) {
                Parsed::Partial | Parsed::Expects if self.received.len() > MAX_REQUEST => self.last = true,
                Parsed::Expects if !self.told => {
                    self.told = true;
                    self.to_send.extend(CONTINUE);
                }
                Parsed::Partial | Parsed::Expects => break,
                Parsed::Whole(request, length) => {
                    self.received.drain(..length);
                    self.told = false;
                    let reply = match self.named(&request) {
                        Ok(fds) => handler(&request, fds),
                        Err(refusal) => Reply::Now(refusal),
                    };
                    self.last = !request.keep_alive;
                    match reply {
                        Reply::Now(response) => self.to_send.extend(response.bytes(request.keep_alive)),
                        Reply::Later => {
                            self.waits = true;
                            *waiting = Some(Waiting {
                                connection: self.number,
                                keep_alive: request.keep_alive,
                            });
                        }
                    }
                    if self.received.is_empty() {
                        // What came with a request and was not named belongs to nobody.
                        self.fds.clear();
                    }
                }
                Parsed::Bad(status, text) => {
                    self.to_send.extend(Response::fault(status, text).bytes(false));
                    self.last = true;
                }
            }
        }
        false
    }

    /// The descriptors that came with a request, by its names for them.
    fn named(&mut self, request: &Request) -> Result<Inherited, Response> {
        let wanted = request.fd_names.len();
        if wanted > self.fds.len() {
            let message = format!("{wanted} descriptors are named, {} came with it", self.fds.len());
            return Err(Response::fault(400, message));
        }
        let mut named = Inherited::default();
        for (name, fd) in request.fd_names.iter().zip(self.fds.drain(..wanted)) {
            named
                .insert(name, fd)
                .map_err(|error| Response::fault(400, error.to_string()))?;
        }
        Ok(named)
    }

    /// Sends what the client takes; false when the connection is over.
    fn send(&mut self) -> bool {
        while !self.to_send.is_empty() {
            match self.stream.write(&self.to_send) {
                Ok(length) => drop(self.to_send.drain(..length)),
                Err(error) => return would_block(error),
            }
        }
        true
    }
}

fn would_block(error: io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

    use super::*;

    /// A server on a socket in `dir`, and a client's connection to it.
    fn pair(dir: &tempfile::TempDir) -> (Server, UnixStream) {
        let path = dir.path().join("api");
        let server = Server::new(UnixListener::bind(&path).unwrap()).unwrap();
        (server, UnixStream::connect(path).unwrap())
    }

    /// Answers with the path until `/later` comes.
    fn serve(server: &mut Server, seen: &mut Vec<String>) -> Waiting {
        let left = server.serve(None, &mut |request, _| {
            seen.push(request.path.clone());
            if request.path == "/later" {
                return Reply::Later;
            }
            Reply::Now(Response::json(&request.path))
        });
        match left.unwrap() {
            Left::Waiting(waiting) => waiting,
            Left::Stopped => panic!("nothing to stop at"),
        }
    }

    fn get(path: &str) -> String {
        format!("GET {path} HTTP/1.1\r\n\r\n")
    }

    #[test]
    fn requests_behind_one_that_waits_are_answered_after_it_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let (mut server, mut client) = pair(&dir);
        let text = [get("/a"), get("/later"), get("/b"), get("/later")].concat();
        client.write_all(text.as_bytes()).unwrap();
        let mut seen = Vec::new();
        let first = serve(&mut server, &mut seen);
        assert_eq!(seen, ["/a", "/later"]);
        server.answer(&first, &Response::done());
        let second = serve(&mut server, &mut seen);
        assert_eq!(seen, ["/a", "/later", "/b", "/later"]);
        server.answer(&second, &Response::done());
        drop(server);
        let mut answers = String::new();
        client.read_to_string(&mut answers).unwrap();
        let places = ["\"/a\"", "204", "\"/b\""].map(|word| answers.find(word).unwrap());
        assert!(places.is_sorted(), "{answers}");
    }

    #[test]
    fn a_client_that_does_not_read_makes_no_heap_of_answers() {
        let dir = tempfile::tempdir().unwrap();
        let (mut server, client) = pair(&dir);
        let mut other = UnixStream::connect(dir.path().join("api")).unwrap();
        client.set_nonblocking(true).unwrap();
        let text = get(&format!("/{}", "x".repeat(4000)));
        let (mut sent, mut most) = (0, 0);
        for _ in 0..300 {
            while let Ok(length @ 1..) = (&client).write(&text.as_bytes()[sent % text.len()..]) {
                sent += length;
            }
            other.write_all(get("/later").as_bytes()).unwrap();
            let waiting = serve(&mut server, &mut Vec::new());
            server.answer(&waiting, &Response::done());
            // Small answers fill a socket too: this client reads.
            let _ = other.read(&mut [0; 1024]).unwrap();
            let unsent = server
                .connections
                .iter()
                .map(|connection| connection.to_send.len());
            most = most.max(unsent.max().unwrap());
        }
        // It was willing to send far more than it was answered.
        assert!(sent > 2 * MAX_UNSENT, "{sent}");
        assert!(most <= MAX_UNSENT + 8192, "{most}");
    }

    #[test]
    fn what_was_not_named_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let (mut server, client) = pair(&dir);
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [writer.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        let text = get("/later");
        let text = [io::IoSlice::new(text.as_bytes())];
        rustix::net::sendmsg(&client, &text, &mut ancillary, SendFlags::empty()).unwrap();
        drop(writer);
        serve(&mut server, &mut Vec::new());
        // Nobody has the other end any more.
        assert_eq!(rustix::io::read(&reader, &mut [0u8; 1]).unwrap(), 0);
    }
}
