//! Streams that a guest opens by itself: those to the event port are its session's, the others go to the
//! services that they name.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use mandoline_api::agent::HOST_EVENT_PORT;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;

use super::agent::accept;
use crate::services::{Dispatcher, Who};
use crate::vm_type::Failure;

/// Event streams that wait for the session: a guest has one, and a second when it rebooted.
const WAITING: usize = 4;

/// Takes a guest's outward streams for as long as it is there.
pub(super) struct Outward {
    events: Mutex<mpsc::Receiver<Result<UnixStream, Failure>>>,
    task: JoinHandle<()>,
}

impl Drop for Outward {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Where a guest's outward streams come from.
pub(super) enum Source {
    /// Our monitor's socket.
    Monitor(AsyncFd<OwnedFd>),
    /// The kernel's vsock, already told apart by guest.
    Vsock(mpsc::Receiver<(u32, UnixStream)>),
}

impl Source {
    /// The next stream with the port that it wants; none when the guest is gone.
    async fn next(&mut self) -> io::Result<Option<(u32, UnixStream)>> {
        match self {
            Self::Monitor(socket) => accept(socket).await,
            Self::Vsock(streams) => Ok(streams.recv().await),
        }
    }
}

impl Outward {
    /// Starts taking a guest's streams.
    pub(super) fn start(mut source: Source, dispatcher: Arc<Dispatcher>, who: Who) -> Self {
        let (sender, events) = mpsc::channel(WAITING);
        let task = tokio::spawn(async move {
            loop {
                match source.next().await {
                    Ok(Some((HOST_EVENT_PORT, stream))) => {
                        if sender.try_send(Ok(stream)).is_err() {
                            tracing::warn!(slice = %who.slice, "too many event streams of a guest; dropped");
                        }
                    }
                    Ok(Some((port, stream))) => dispatcher.open(&who, port, stream),
                    // The monitor has closed its end: it is ending, and its end is reported elsewhere.
                    Ok(None) => return std::future::pending().await,
                    Err(error) => {
                        let failure = Failure::retryable(format!("outward streams: {error}"));
                        let _ = sender.send(Err(failure)).await;
                        return;
                    }
                }
            }
        });
        Self {
            events: Mutex::new(events),
            task,
        }
    }

    /// The next stream to the event port.
    pub(super) async fn next_event_stream(&self) -> Result<UnixStream, Failure> {
        match self.events.lock().await.recv().await {
            Some(stream) => stream,
            // Its failure has been told already.
            None => std::future::pending().await,
        }
    }
}
