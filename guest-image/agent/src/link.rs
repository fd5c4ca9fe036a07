//! The streams between agent and host: vsock in a sliver, inherited Unix sockets in tests.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::{Mutex, PoisonError};

use mandoline_api::agent::{AGENT_PORT, Event, HOST_CID, HOST_EVENT_PORT, HelloReply, write_frame};
use vsock::{VMADDR_CID_ANY, VsockListener, VsockStream};

use crate::log::warning;

/// Where the host's streams arrive.
pub(crate) enum Listener {
    /// A sliver's.
    Vsock(VsockListener),
    /// A test's.
    Unix(UnixListener),
}

impl Listener {
    /// Listens on vsock for the host.
    pub(crate) fn vsock() -> io::Result<Self> {
        let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, AGENT_PORT)?;
        listener.set_nonblocking(true)?;
        Ok(Listener::Vsock(listener))
    }

    /// Listens on a Unix socket that somebody else bound.
    pub(crate) fn inherited(socket: OwnedFd) -> io::Result<Self> {
        let listener = UnixListener::from(socket);
        listener.set_nonblocking(true)?;
        Ok(Listener::Unix(listener))
    }

    /// The next stream from the host, if one waits. Streams of the guest's own programs (vsock has a
    /// loopback) are closed: whoever can run programs in a sliver must not become its root by that.
    pub(crate) fn accept(&self) -> io::Result<Option<File>> {
        let accepted = match self {
            Listener::Vsock(listener) => listener.accept().map(|(stream, peer)| {
                let stream = (peer.cid() == HOST_CID).then_some(stream);
                if stream.is_none() {
                    warning!(
                        "stream from vsock CID {}: only the host's, {HOST_CID}, are served",
                        peer.cid()
                    );
                }
                stream.map(OwnedFd::from)
            }),
            Listener::Unix(listener) => listener.accept().map(|(stream, _)| Some(OwnedFd::from(stream))),
        };
        match accepted {
            Ok(stream) => Ok(stream.map(File::from)),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::ConnectionAborted
                        | io::ErrorKind::ConnectionReset
                ) =>
            {
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Vsock(listener) => listener.as_fd(),
            Listener::Unix(listener) => listener.as_fd(),
        }
    }
}

/// The agent's event stream to the host. Events are hints, `status` is the truth: one that cannot be sent
/// is dropped.
pub(crate) struct Events {
    stream: Mutex<Option<File>>,
    connect: bool,
}

impl Events {
    /// Events to the host's vsock port.
    pub(crate) fn vsock() -> Self {
        Events {
            stream: Mutex::new(None),
            connect: true,
        }
    }

    /// Events to an inherited stream, or nowhere.
    pub(crate) fn inherited(stream: Option<OwnedFd>) -> Self {
        Events {
            stream: Mutex::new(stream.map(File::from)),
            connect: false,
        }
    }

    /// Sends [`Event::Up`] on a new stream: how every event stream begins.
    pub(crate) fn up(&self, hello: HelloReply) {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        if self.connect {
            *stream = connect();
        }
        if !send(&mut stream, &Event::Up(hello)) {
            *stream = None;
        }
    }

    /// Sends an event; on a new stream, after [`Event::Up`], if the old one is broken.
    pub(crate) fn send(&self, hello: HelloReply, event: &Event) {
        let sent = {
            let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
            send(&mut stream, event)
        };
        if !sent && self.connect {
            self.up(hello);
            let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = send(&mut stream, event);
        }
    }
}

fn connect() -> Option<File> {
    let stream = VsockStream::connect_with_cid_port(HOST_CID, HOST_EVENT_PORT).ok()?;
    // A host that doesn't read must not hold the agent.
    stream
        .set_write_timeout(Some(std::time::Duration::from_secs(2)))
        .ok()?;
    Some(File::from(OwnedFd::from(stream)))
}

fn send(stream: &mut Option<File>, event: &Event) -> bool {
    let sent = stream
        .as_mut()
        .is_some_and(|stream| write_frame(stream, event).is_ok());
    if !sent {
        *stream = None;
    }
    sent
}
