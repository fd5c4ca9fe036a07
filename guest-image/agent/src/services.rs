//! Services of the node, inside the sliver: what connects to a port or socket here goes over vsock to the node,
//! which is told the service's name and knows the sliver by the channel.
//!
//! ```text
//!  http://localhost:33080          ─┐             ┌─► sensors
//!  /run/mandoline/nm.sock (root)   ─┴── vsock ────┴─► the node manager: get_rcap() is this sliver's
//!                                     port 1025
//! ```
//!
//! One thread for each connection, and none without: an idle sliver's agent sleeps.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mandoline_api::agent::{HOST_CID, SERVICES_PORT};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::Shutdown;
use vsock::VsockStream;

use crate::log::warning;

/// Port of the sensors, the papers' (OS paper, section 4.4.1).
const SENSORS_PORT: u16 = 33080;
/// Socket of the node manager; root's.
const NM_SOCKET: &str = "/run/mandoline/nm.sock";
/// Connections at once; the node takes as many.
const MOST: u32 = 64;
/// Bytes that one direction of a connection holds.
const BUFFER: usize = 16 * 1024;
/// Stack of a connection's thread. Its buffers are elsewhere.
const STACK: usize = 64 * 1024;
/// How long the node may take to answer which service it is.
const PATIENCE: Duration = Duration::from_secs(15);
/// Longest answer of the node.
const ANSWER_MAX: usize = 1024;

/// How many connections there are now.
static OPEN: AtomicU32 = AtomicU32::new(0);

/// Frees a connection's place, also when its thread panics.
struct Place;

impl Drop for Place {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where connections to a service arrive.
pub(crate) enum Listener {
    /// On a port of the loopback.
    Tcp(TcpListener, &'static str),
    /// On a socket.
    Unix(UnixListener, &'static str),
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Tcp(listener, _) => listener.as_fd(),
            Listener::Unix(listener, _) => listener.as_fd(),
        }
    }
}

/// Opens what can be opened. A sliver without sensors is a sliver all the same: what fails is only logged.
pub(crate) fn listen() -> Vec<Listener> {
    let sensors = TcpListener::bind((Ipv4Addr::LOCALHOST, SENSORS_PORT)).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(Listener::Tcp(listener, "sensors"))
    });
    let nm = fs::create_dir_all("/run/mandoline").and_then(|()| {
        let _ = fs::remove_file(NM_SOCKET);
        let listener = UnixListener::bind(NM_SOCKET)?;
        fs::set_permissions(NM_SOCKET, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Listener::Unix(listener, "nm"))
    });
    let mut listeners = Vec::new();
    for (place, listener) in [("port 33080", sensors), (NM_SOCKET, nm)] {
        match listener {
            Ok(listener) => listeners.push(listener),
            Err(e) => warning!("{place}: {e}"),
        }
    }
    listeners
}

/// Takes one connection and passes it on, on a thread of its own.
pub(crate) fn accept(listener: &Listener) -> io::Result<()> {
    let accepted = match listener {
        Listener::Tcp(listener, name) => listener.accept().map(|(c, _)| (OwnedFd::from(c), *name)),
        Listener::Unix(listener, name) => listener.accept().map(|(c, _)| (OwnedFd::from(c), *name)),
    };
    let (connection, name) = match accepted {
        Ok(accepted) => accepted,
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted
            ) =>
        {
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    let before = OPEN.fetch_add(1, Ordering::Relaxed);
    let place = Place;
    if before >= MOST {
        refuse(&connection, &format!("{MOST} connections are open already"));
        return Ok(());
    }
    std::thread::Builder::new()
        .name("service".into())
        .stack_size(STACK)
        .spawn(move || {
            let _place = place;
            match reach(name) {
                Ok(host) => {
                    if let Err(e) = relay(connection.as_fd(), host.as_fd()) {
                        warning!("connection to {name}: {e}");
                    }
                }
                Err(why) => refuse(&connection, &why),
            }
        })
        .map(drop)
}

/// Says in HTTP, which all of these services speak, that there is no service.
fn refuse(connection: &OwnedFd, why: &str) {
    let text = format!(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{why}\n",
        why.len() + 1
    );
    let _ = rustix::io::write(connection, text.as_bytes());
}

/// A stream to a service of the node.
fn reach(name: &str) -> Result<OwnedFd, String> {
    let unreachable = |e: io::Error| format!("the node cannot be reached: {e}");
    let mut stream = VsockStream::connect_with_cid_port(HOST_CID, SERVICES_PORT).map_err(unreachable)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(unreachable)?;
    stream
        .write_all(format!("CONNECT {name}\n").as_bytes())
        .map_err(unreachable)?;
    // Byte by byte: what follows the line is the service's.
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte).map_err(unreachable)?;
        match byte[0] {
            b'\n' => break,
            byte if line.len() < ANSWER_MAX => line.push(byte),
            _ => return Err("the node's answer is no line".into()),
        }
    }
    match line.as_slice() {
        b"OK" => Ok(stream.into()),
        other => Err(String::from_utf8_lossy(other).into_owned()),
    }
}

/// One direction of a connection.
struct Flow {
    bytes: Box<[u8; BUFFER]>,
    start: usize,
    end: usize,
    /// Nothing more comes in.
    ended: bool,
    /// And the other end has been told.
    closed: bool,
}

impl Flow {
    fn new() -> Self {
        Self {
            bytes: Box::new([0; BUFFER]),
            start: 0,
            end: 0,
            ended: false,
            closed: false,
        }
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Reads, when there is nothing left to write.
    fn fill(&mut self, from: BorrowedFd<'_>) -> rustix::io::Result<()> {
        match rustix::io::read(from, &mut self.bytes[..]) {
            Ok(0) => self.ended = true,
            Ok(length) => (self.start, self.end) = (0, length),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// Writes what there is, and passes the end on once all is written.
    fn drain(&mut self, to: BorrowedFd<'_>) -> rustix::io::Result<()> {
        if !self.is_empty() {
            match rustix::io::write(to, &self.bytes[self.start..self.end]) {
                Ok(length) => self.start += length,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(e) => return Err(e),
            }
        }
        if self.is_empty() && self.ended && !self.closed {
            self.closed = true;
            match rustix::net::shutdown(to, Shutdown::Write) {
                // The other end is gone already.
                Ok(()) | Err(Errno::NOTCONN) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// Passes bytes both ways until both have ended; each direction ends by itself.
fn relay(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> rustix::io::Result<()> {
    for fd in [a, b] {
        rustix::io::ioctl_fionbio(fd, true)?;
    }
    let (mut out, mut back) = (Flow::new(), Flow::new());
    while !(out.closed && back.closed) {
        // A descriptor of which nothing is wanted is left out: its end would wake us for nothing.
        let wants = |into: &Flow, from: &Flow| {
            let mut flags = PollFlags::empty();
            if into.is_empty() && !into.ended {
                flags |= PollFlags::IN;
            }
            if !from.is_empty() {
                flags |= PollFlags::OUT;
            }
            flags
        };
        let mut fds = Vec::with_capacity(2);
        for (fd, flags) in [(a, wants(&out, &back)), (b, wants(&back, &out))] {
            if !flags.is_empty() {
                fds.push(PollFd::from_borrowed_fd(fd, flags));
            }
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
        drop(fds);
        for (flow, from, to) in [(&mut out, a, b), (&mut back, b, a)] {
            if flow.is_empty() && !flow.ended {
                flow.fill(from)?;
            }
            flow.drain(to)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn bytes_pass_both_ways_and_each_end_by_itself() {
        let (mut client, a) = UnixStream::pair().expect("pair");
        let (b, mut server) = UnixStream::pair().expect("pair");
        let relaying = std::thread::spawn(move || relay(a.as_fd(), b.as_fd()));
        // More than all buffers on the way hold.
        let big: Vec<u8> = (0..4_000_000u32).map(|n| n as u8).collect();
        let expected = big.clone();
        let serving = std::thread::spawn(move || {
            let mut got = Vec::new();
            server.read_to_end(&mut got).expect("the client's half ends");
            assert!(got == expected);
            server.write_all(b"answer").expect("the other half is open");
        });
        client.write_all(&big).expect("write");
        client.shutdown(std::net::Shutdown::Write).expect("half-close");
        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("read");
        assert_eq!(answer, "answer");
        serving.join().expect("server");
        relaying.join().expect("thread").expect("relay");
    }

    #[test]
    fn an_end_that_breaks_ends_the_relay() {
        let (client, a) = UnixStream::pair().expect("pair");
        let (b, server) = UnixStream::pair().expect("pair");
        let relaying = std::thread::spawn(move || relay(a.as_fd(), b.as_fd()));
        drop(server);
        drop(client);
        // Whether the end is seen by reading or by writing, it comes.
        let _ = relaying.join().expect("thread");
    }
}
