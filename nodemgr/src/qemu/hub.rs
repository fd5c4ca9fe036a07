//! Streams that guests open to the host over the kernel's vsock: all guests share the host's ports, and the context id
//! of the other end, which the kernel vouches for, says whose stream it is.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use mandoline_api::agent::{HOST_EVENT_PORT, SERVICES_PORT};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use vsock::{VMADDR_CID_ANY, VsockListener, VsockStream};

use crate::vm_type::watch;

/// Streams of one guest that wait to be taken.
const WAITING: usize = 16;

/// A stream that a guest has opened, with the port of the host that it wants.
pub(crate) type Opened = (u32, UnixStream);

/// Hands the guests' streams out.
#[derive(Default)]
pub struct Hub {
    guests: Arc<Mutex<BTreeMap<u32, mpsc::Sender<Opened>>>>,
    listening: Mutex<Vec<JoinHandle<()>>>,
}

impl Drop for Hub {
    fn drop(&mut self) {
        let tasks = self.listening.get_mut().unwrap_or_else(PoisonError::into_inner);
        tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Hub {
    /// The streams of the guest with this context id, from now on. An earlier receiver of the same guest ends.
    pub(crate) fn streams(&self, cid: u32) -> io::Result<mpsc::Receiver<Opened>> {
        self.listen()?;
        let (sender, receiver) = mpsc::channel(WAITING);
        let mut guests = self.guests.lock().unwrap_or_else(PoisonError::into_inner);
        guests.retain(|_, sender| !sender.is_closed());
        guests.insert(cid, sender);
        Ok(receiver)
    }

    /// Listens on the ports that guests know, if that is not done yet.
    fn listen(&self) -> io::Result<()> {
        let mut listening = self.listening.lock().unwrap_or_else(PoisonError::into_inner);
        if !listening.is_empty() {
            return Ok(());
        }
        let bind = |port| {
            let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)?;
            listener.set_nonblocking(true)?;
            // Watched by a second descriptor of the same socket.
            let watched = watch(listener.as_fd().try_clone_to_owned()?)?;
            Ok::<_, io::Error>((listener, watched))
        };
        let listeners = [
            (HOST_EVENT_PORT, bind(HOST_EVENT_PORT)?),
            (SERVICES_PORT, bind(SERVICES_PORT)?),
        ];
        for (port, (listener, watched)) in listeners {
            let guests = Arc::clone(&self.guests);
            listening.push(tokio::spawn(async move {
                if let Err(error) = serve(port, &listener, &watched, &guests).await {
                    tracing::error!(port, %error, "streams of QEMU's guests are not taken any more");
                }
            }));
        }
        Ok(())
    }
}

async fn serve(
    port: u32,
    listener: &VsockListener,
    watched: &AsyncFd<OwnedFd>,
    guests: &Mutex<BTreeMap<u32, mpsc::Sender<Opened>>>,
) -> io::Result<()> {
    loop {
        let mut ready = watched.readable().await?;
        let Ok(accepted) = ready.try_io(|_| listener.accept()) else {
            continue;
        };
        let (stream, address) = accepted?;
        let cid = address.cid();
        let guest = guests
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&cid)
            .cloned();
        let Some(guest) = guest else {
            tracing::warn!(cid, port, "stream of no guest of ours; dropped");
            continue;
        };
        match as_unix(stream).map(|stream| guest.try_send((port, stream))) {
            Ok(Ok(())) => {}
            Ok(Err(_)) => tracing::warn!(cid, port, "too many streams of a guest; dropped"),
            Err(error) => tracing::warn!(cid, port, %error, "stream of a guest; dropped"),
        }
    }
}

/// Opens a stream to a port of a guest. Blocks for two seconds at most, the kernel's patience for vsock.
pub(crate) fn connect(cid: u32, port: u32) -> io::Result<UnixStream> {
    as_unix(VsockStream::connect_with_cid_port(cid, port)?)
}

/// A vsock stream in the clothes of a Unix one: after it is connected, reading, writing, polling and shutting down are
/// the same calls, and so whoever takes streams of our monitor takes these.
fn as_unix(stream: VsockStream) -> io::Result<UnixStream> {
    stream.set_nonblocking(true)?;
    UnixStream::from_std(std::os::unix::net::UnixStream::from(OwnedFd::from(stream)))
}
