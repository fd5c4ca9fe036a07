//! How a stream that the guest opens reaches the host.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use mandoline_api::monitor::VsockOut;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};

/// See the module.
#[derive(Debug)]
pub enum Outward {
    /// To the Unix socket `<path>_<port>` (Firecracker's scheme); only before the jail closes the file system.
    Path(PathBuf),
    /// One end of a new pair goes over this `SOCK_SEQPACKET` socket, with the port.
    Broker(OwnedFd),
    /// Refused.
    None,
}

impl Outward {
    /// Opens a non-blocking stream for `port`.
    pub fn open(&self, port: u32) -> io::Result<UnixStream> {
        match self {
            Outward::None => Err(io::ErrorKind::ConnectionRefused.into()),
            Outward::Path(path) => {
                let mut name = path.clone().into_os_string();
                name.push(format!("_{port}"));
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
                // A Unix socket connects at once or, where the listener's backlog is full, not at all (EAGAIN).
                rustix::net::connect(&socket, &SocketAddrUnix::new(name)?)?;
                Ok(socket.into())
            }
            Outward::Broker(broker) => hand_out(broker.as_fd(), port),
        }
    }
}

fn hand_out(broker: BorrowedFd<'_>, port: u32) -> io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let message = serde_json::to_vec(&VsockOut { port })?;
    let fds = [theirs.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    // A broker that does not keep up (EAGAIN) refuses the stream: the monitor never waits for it.
    rustix::net::sendmsg(broker, &[IoSlice::new(&message)], &mut ancillary, flags)?;
    Ok(ours)
}
