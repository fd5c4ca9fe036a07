//! Talking to the guest agent: streams inwards by `CONNECT`, and streams that the guest opens outwards.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use mandoline_api::agent::{self, Decoder, FrameError, Request};
use mandoline_api::monitor::VsockOut;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde::de::DeserializeOwned;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::qemu;

/// Why the agent was not asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum AgentError {
    /// The monitor does not listen, or the guest refuses the stream.
    #[error("no stream to port {port} of the guest: {message}")]
    Connect {
        /// The guest's port.
        port: u32,
        /// What happened.
        message: String,
    },
    /// The stream failed, or the agent refused.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// How a guest's ports are reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Door {
    /// Our monitor's socket.
    Monitor(PathBuf),
    /// The kernel's vsock, by the guest's context id.
    Vsock(u32),
}

/// Opens a stream to a port of the guest.
pub(super) async fn connect(door: &Door, port: u32) -> Result<UnixStream, AgentError> {
    match door {
        Door::Monitor(socket) => through_monitor(socket, port).await,
        Door::Vsock(cid) => {
            let cid = *cid;
            let refuse = |message: String| AgentError::Connect { port, message };
            // Registered with the event loop of the thread that waits here, wherever it was connected.
            let connected = tokio::task::spawn_blocking(move || qemu::connect(cid, port)).await;
            connected
                .map_err(|e| refuse(e.to_string()))?
                .map_err(|e| refuse(e.to_string()))
        }
    }
}

/// By Firecracker's scheme: `CONNECT <port>` is answered by `OK <n>`.
async fn through_monitor(socket: &Path, port: u32) -> Result<UnixStream, AgentError> {
    let refuse = |message: String| AgentError::Connect { port, message };
    let mut stream = UnixStream::connect(socket)
        .await
        .map_err(|e| refuse(e.to_string()))?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await
        .map_err(|e| refuse(e.to_string()))?;
    let mut line = Vec::new();
    // Byte by byte: what follows the line belongs to the stream.
    loop {
        match stream.read_u8().await {
            Ok(b'\n') => break,
            Ok(byte) if line.len() < 64 => line.push(byte),
            Ok(_) => return Err(refuse("the monitor's answer is no line".to_owned())),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(refuse("nobody listens there".to_owned()));
            }
            Err(error) => return Err(refuse(error.to_string())),
        }
    }
    match line.starts_with(b"OK ") {
        true => Ok(stream),
        false => Err(refuse(format!(
            "the monitor answered {:?}",
            String::from_utf8_lossy(&line)
        ))),
    }
}

/// Frames of a stream.
pub(super) struct Frames {
    stream: UnixStream,
    decoder: Decoder,
}

impl Frames {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            decoder: Decoder::default(),
        }
    }

    /// The JSON of the next frame; none at the end of the stream.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<u8>>, FrameError> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(body) = self.decoder.next_frame()? {
                return Ok(Some(body.to_vec()));
            }
            match self.stream.read(&mut buffer).await? {
                0 => return Ok(None),
                length => self.decoder.push(&buffer[..length]),
            }
        }
    }
}

/// Asks the agent one thing.
pub(super) async fn ask<T: DeserializeOwned>(door: &Door, request: &Request) -> Result<T, AgentError> {
    let mut stream = connect(door, agent::AGENT_PORT).await?;
    stream
        .write_all(&agent::encode(request)?)
        .await
        .map_err(FrameError::Io)?;
    let body = Frames::new(stream).next().await?.ok_or(FrameError::Truncated)?;
    Ok(agent::decode_reply(&body)?)
}

/// The next stream that the guest opens, with the port that it wants. None: the monitor is gone.
pub(super) async fn accept(socket: &AsyncFd<OwnedFd>) -> io::Result<Option<(u32, UnixStream)>> {
    loop {
        let mut ready = socket.readable().await?;
        let Ok(message) = ready.try_io(|socket| receive(socket.get_ref())) else {
            continue;
        };
        let (bytes, descriptor) = message?;
        if bytes.is_empty() {
            return Ok(None);
        }
        let (Ok(out), Some(descriptor)) = (serde_json::from_slice::<VsockOut>(&bytes), descriptor) else {
            tracing::warn!(
                bytes = bytes.len(),
                "message of a monitor that is no stream; dropped"
            );
            continue;
        };
        let stream = std::os::unix::net::UnixStream::from(descriptor);
        stream.set_nonblocking(true)?;
        return Ok(Some((out.port, UnixStream::from_std(stream)?)));
    }
}

fn receive(socket: &OwnedFd) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut bytes = [0; 256];
    // Room for more than the one descriptor that belongs there: all that come are taken, and closed.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(
        socket,
        &mut [io::IoSliceMut::new(&mut bytes)],
        &mut control,
        flags,
    )?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let first = (!descriptors.is_empty()).then(|| descriptors.swap_remove(0));
    Ok((bytes[..received.bytes].to_vec(), first))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mandoline_api::agent::HelloReply;
    use rustix::net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    };
    use std::os::fd::AsFd;
    use tokio::net::UnixListener;

    #[tokio::test]
    async fn asks_through_the_monitors_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let monitor = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut line = [0; 13];
            stream.read_exact(&mut line).await.unwrap();
            assert_eq!(&line, b"CONNECT 1024\n");
            let hello = br#"{"version":1,"agent":"0","kernel":"6","phase":"up","mark_ns":1,"listen_ns":2}"#;
            let mut answer = b"OK 7\n".to_vec();
            answer.extend((hello.len() as u32).to_be_bytes());
            answer.extend(hello);
            stream.write_all(&answer).await.unwrap();
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.read_exact(&mut line).await.unwrap();
        });
        let door = Door::Monitor(path);
        let hello: HelloReply = ask(&door, &Request::Hello).await.unwrap();
        assert_eq!(hello.listen_ns, 2);
        let error = ask::<HelloReply>(&door, &Request::Hello).await.unwrap_err();
        assert!(error.to_string().contains("nobody listens"), "{error}");
        monitor.await.unwrap();
    }

    #[tokio::test]
    async fn takes_streams_that_the_guest_opens_and_sees_the_end() {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let ours = super::super::monitor::watch(ours).unwrap();
        let (mut guest, passed) = std::os::unix::net::UnixStream::pair().unwrap();
        let send = |bytes: &[u8], fd: Option<&std::os::unix::net::UnixStream>| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = fd.map(|fd| [fd.as_fd()]);
            if let Some(fds) = &fds {
                assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
            }
            rustix::net::sendmsg(
                &theirs,
                &[io::IoSlice::new(bytes)],
                &mut control,
                SendFlags::empty(),
            )
            .unwrap();
        };
        send(b"not a stream", None);
        send(br#"{"port":1024}"#, Some(&passed));
        drop(passed);
        let (port, stream) = accept(&ours).await.unwrap().unwrap();
        assert_eq!(port, 1024);
        use std::io::Write;
        guest.write_all(&[0, 0, 0, 2, b'{', b'}']).unwrap();
        drop(guest);
        let mut frames = Frames::new(stream);
        assert_eq!(frames.next().await.unwrap().as_deref(), Some(b"{}".as_slice()));
        assert!(frames.next().await.unwrap().is_none());
        drop(theirs);
        assert!(accept(&ours).await.unwrap().is_none());
    }
}
