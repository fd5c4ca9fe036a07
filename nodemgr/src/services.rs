//! Services that slivers reach over vsock: the node manager itself, the sensors, and those of the host that the
//! configuration gives a socket.
//!
//! A guest opens a stream to [`SERVICES_PORT`] and names the service that it wants; from then on the stream is
//! the service's. Who calls is certain, since a sliver's streams come on a channel of its own.
//!
//! ```text
//!  guest ── CONNECT <service>\n ──► dispatcher ── known? room? ──► nm, sensors: by a socket pair
//!        ◄── OK\n | ERR <why>\n ───     │                          others: PROXY line, then their Unix socket
//!        ◄════════ bytes, both ways, half-closes kept ════════►
//! ```
//!
//! The line that a service of the host reads first is that of the PROXY protocol, version 1, in the form whose
//! rest receivers ignore: `PROXY UNKNOWN slice=<slice> vm_id=<n> service=<name>\r\n`.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use mandoline_api::agent::{SERVICE_LINE_MAX, SERVICES_PORT};
use mandoline_api::nodemgr::VmId;
use mandoline_rspec::SliceId;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc};

/// The node manager's own interface, as slivers name it.
pub const NODE_MANAGER: &str = "nm";
/// The sensors, as slivers name them.
pub const SENSORS: &str = "sensors";

/// Streams that one sliver may have open at once.
const STREAMS_MAX: usize = 64;
/// Streams that wait for a server at once, of all slivers.
const BACKLOG: usize = 128;
/// How long a guest may take to name a service, and a service to take a stream.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes that a stream holds in each direction.
const BUFFER: usize = 16 << 10;

/// The sliver at the other end of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Who {
    /// Its slice.
    pub slice: SliceId,
    /// Its id.
    pub vm_id: VmId,
}

/// Streams for one of the node manager's own servers, which takes them like connections.
#[derive(Debug)]
pub struct Streams(mpsc::Receiver<(UnixStream, Who)>);

impl axum::serve::Listener for Streams {
    type Io = UnixStream;
    type Addr = Who;

    async fn accept(&mut self) -> (UnixStream, Who) {
        match self.0.recv().await {
            Some(accepted) => accepted,
            // The dispatcher is gone: no more will come, and whoever serves is told to end elsewhere.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Who> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// What a service has been used for.
#[derive(Debug, Default)]
pub struct Count {
    /// Streams opened.
    pub streams: AtomicU64,
    /// Bytes from slivers.
    pub received: AtomicU64,
    /// Bytes to slivers.
    pub sent: AtomicU64,
}

enum Target {
    Own(mpsc::Sender<(UnixStream, Who)>),
    Socket(PathBuf),
}

struct Service {
    target: Target,
    count: Arc<Count>,
}

/// Why a guest gets no stream.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("no line `CONNECT <service>`")]
    NoLine,
    #[error("no service {name:?}; allowed: {allowed}")]
    Unknown { name: String, allowed: String },
    #[error("{STREAMS_MAX} streams are open already")]
    Full,
    #[error("service {name}: {error}")]
    Unavailable { name: String, error: io::Error },
}

/// Gives slivers' streams to the services that they name.
pub struct Dispatcher {
    services: BTreeMap<String, Service>,
    /// Free places of each sliver that has a stream open.
    places: Mutex<BTreeMap<VmId, Weak<Semaphore>>>,
    /// Streams that got no service.
    refused: AtomicU64,
}

impl Dispatcher {
    /// A dispatcher for the services of the host with these sockets, and the streams for [`NODE_MANAGER`] and
    /// [`SENSORS`].
    pub fn new(sockets: impl IntoIterator<Item = (String, PathBuf)>) -> (Self, Streams, Streams) {
        let mut services = BTreeMap::new();
        let mut add = |name: String, target: Target| {
            let count = Arc::default();
            services.insert(name, Service { target, count });
        };
        for (name, socket) in sockets {
            add(name, Target::Socket(socket));
        }
        let (nm, nm_streams) = mpsc::channel(BACKLOG);
        let (sensors, sensor_streams) = mpsc::channel(BACKLOG);
        add(NODE_MANAGER.to_owned(), Target::Own(nm));
        add(SENSORS.to_owned(), Target::Own(sensors));
        let dispatcher = Self {
            services,
            places: Mutex::default(),
            refused: AtomicU64::new(0),
        };
        (dispatcher, Streams(nm_streams), Streams(sensor_streams))
    }

    /// What each service has been used for.
    pub fn counts(&self) -> impl Iterator<Item = (&str, &Count)> {
        self.services
            .iter()
            .map(|(name, service)| (name.as_str(), &*service.count))
    }

    /// Streams that got no service.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Takes a stream that a guest has opened to a port of the host. Ports without a meaning have nobody: the
    /// stream is closed.
    pub fn open(self: &Arc<Self>, who: &Who, port: u32, stream: UnixStream) {
        if port != SERVICES_PORT {
            tracing::debug!(slice = %who.slice, port, "no service on this port");
            return;
        }
        let places = self.places_of(who.vm_id);
        let (dispatcher, who) = (Arc::clone(self), who.clone());
        let place = places.try_acquire_owned();
        tokio::spawn(async move {
            let mut stream = stream;
            let served = match place {
                Ok(place) => {
                    let served = dispatcher.serve(&who, &mut stream).await;
                    drop(place);
                    served
                }
                Err(_) => Err(Refusal::Full),
            };
            if let Err(refusal) = served {
                dispatcher.refused.fetch_add(1, Ordering::Relaxed);
                tracing::info!(slice = %who.slice, vm_id = who.vm_id, %refusal, "no stream to a service");
                let line = format!("ERR {refusal}\n");
                let _ = tokio::time::timeout(PATIENCE, stream.write_all(line.as_bytes())).await;
            }
        });
    }

    fn places_of(&self, vm_id: VmId) -> Arc<Semaphore> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = places.get(&vm_id).and_then(Weak::upgrade) {
            return found;
        }
        // Who has no stream open any more needs no entry.
        places.retain(|_, places| places.strong_count() > 0);
        let new = Arc::new(Semaphore::new(STREAMS_MAX));
        places.insert(vm_id, Arc::downgrade(&new));
        new
    }

    async fn serve(&self, who: &Who, stream: &mut UnixStream) -> Result<(), Refusal> {
        let line = tokio::time::timeout(PATIENCE, first_line(stream))
            .await
            .ok()
            .flatten()
            .ok_or(Refusal::NoLine)?;
        let name = line.strip_prefix("CONNECT ").ok_or(Refusal::NoLine)?;
        let Some(service) = self.services.get(name) else {
            let allowed: Vec<_> = self.services.keys().map(String::as_str).collect();
            return Err(Refusal::Unknown {
                name: name.to_owned(),
                allowed: allowed.join(", "),
            });
        };
        let reached = tokio::time::timeout(PATIENCE, reach(&service.target, who, name)).await;
        let far = reached
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|error| Refusal::Unavailable {
                name: name.to_owned(),
                error,
            })?;
        service.count.streams.fetch_add(1, Ordering::Relaxed);
        if stream.write_all(b"OK\n").await.is_ok() {
            let ended = splice(stream, far, &service.count).await;
            tracing::debug!(slice = %who.slice, service = name, ?ended, "stream ended");
        }
        Ok(())
    }
}

/// The first line, without its end. Byte by byte: what follows belongs to the service.
async fn first_line(stream: &mut UnixStream) -> Option<String> {
    let mut line = Vec::new();
    loop {
        match stream.read_u8().await.ok()? {
            b'\n' => return String::from_utf8(line).ok(),
            byte if line.len() < SERVICE_LINE_MAX => line.push(byte),
            _ => return None,
        }
    }
}

async fn reach(target: &Target, who: &Who, name: &str) -> io::Result<UnixStream> {
    match target {
        Target::Own(server) => {
            let (near, far) = UnixStream::pair()?;
            let sent = server.send((far, who.clone())).await;
            sent.map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
            Ok(near)
        }
        Target::Socket(path) => {
            let mut stream = UnixStream::connect(path).await?;
            let line = format!(
                "PROXY UNKNOWN slice={} vm_id={} service={name}\r\n",
                who.slice, who.vm_id
            );
            stream.write_all(line.as_bytes()).await?;
            Ok(stream)
        }
    }
}

async fn splice(guest: &mut UnixStream, service: UnixStream, count: &Count) -> io::Result<()> {
    let mut guest = Counted {
        stream: guest,
        count: &count.received,
    };
    let mut service = service;
    let mut service = Counted {
        stream: &mut service,
        count: &count.sent,
    };
    tokio::io::copy_bidirectional_with_sizes(&mut guest, &mut service, BUFFER, BUFFER)
        .await
        .map(drop)
}

/// A stream whose bytes are counted as they are read.
struct Counted<'a> {
    stream: &'a mut UnixStream,
    count: &'a AtomicU64,
}

impl AsyncRead for Counted<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let polled = Pin::new(&mut *self.stream).poll_read(context, into);
        let read = into.filled().len().saturating_sub(before);
        self.count.fetch_add(read as u64, Ordering::Relaxed);
        polled
    }
}

impl AsyncWrite for Counted<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::serve::Listener;
    use mandoline_rspec::SliceName;
    use tokio::net::UnixListener;

    fn who(vm_id: VmId) -> Who {
        let slice = SliceId::local(SliceName::new("pl_conf").unwrap());
        Who { slice, vm_id }
    }

    async fn line_of(stream: &mut UnixStream) -> String {
        first_line(stream).await.unwrap()
    }

    #[tokio::test]
    async fn a_stream_reaches_its_service_with_who_calls_and_keeps_half_closes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("echo.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let service = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut all = String::new();
            // To its end: the guest has closed its half only.
            stream.read_to_string(&mut all).await.unwrap();
            stream.write_all(all.as_bytes()).await.unwrap();
        });
        let (dispatcher, _nm, _sensors) = Dispatcher::new([("echo".to_owned(), path)]);
        let dispatcher = Arc::new(dispatcher);
        let (mut guest, host) = UnixStream::pair().unwrap();
        dispatcher.open(&who(7), SERVICES_PORT, host);
        guest.write_all(b"CONNECT echo\nhello").await.unwrap();
        guest.shutdown().await.unwrap();
        let mut answer = String::new();
        guest.read_to_string(&mut answer).await.unwrap();
        assert_eq!(
            answer,
            "OK\nPROXY UNKNOWN slice=pl_conf vm_id=7 service=echo\r\nhello"
        );
        service.await.unwrap();
        let (_, count) = dispatcher.counts().find(|(name, _)| *name == "echo").unwrap();
        assert_eq!(count.streams.load(Ordering::Relaxed), 1);
        assert_eq!(count.received.load(Ordering::Relaxed), 5);
    }

    #[tokio::test]
    async fn own_services_get_the_sliver_as_their_peer() {
        let (dispatcher, mut nm, _sensors) = Dispatcher::new([]);
        let dispatcher = Arc::new(dispatcher);
        let (mut guest, host) = UnixStream::pair().unwrap();
        dispatcher.open(&who(3), SERVICES_PORT, host);
        guest.write_all(b"CONNECT nm\n").await.unwrap();
        let (mut server, peer) = nm.accept().await;
        assert_eq!(peer, who(3));
        assert_eq!(line_of(&mut guest).await, "OK");
        server.write_all(b"answer\n").await.unwrap();
        assert_eq!(line_of(&mut guest).await, "answer");
    }

    #[tokio::test]
    async fn what_is_not_there_is_said_and_counted() {
        let gone = ("gone".to_owned(), PathBuf::from("/nonexistent/socket"));
        let (dispatcher, _nm, _sensors) = Dispatcher::new([gone]);
        let dispatcher = Arc::new(dispatcher);
        for (line, want) in [
            (
                "CONNECT mail\n",
                "ERR no service \"mail\"; allowed: gone, nm, sensors",
            ),
            ("CONNECT gone\n", "ERR service gone: No such file"),
            ("GET / HTTP/1.1\r\n", "ERR no line `CONNECT <service>`"),
            (&"x".repeat(4096), "ERR no line `CONNECT <service>`"),
        ] {
            let (mut guest, host) = UnixStream::pair().unwrap();
            dispatcher.open(&who(1), SERVICES_PORT, host);
            guest.write_all(line.as_bytes()).await.unwrap();
            let answer = line_of(&mut guest).await;
            assert!(answer.starts_with(want), "{answer}");
        }
        assert_eq!(dispatcher.refused(), 4);
        let (mut guest, host) = UnixStream::pair().unwrap();
        dispatcher.open(&who(1), SERVICES_PORT + 1, host);
        assert_eq!(guest.read(&mut [0; 8]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_sliver_fills_its_own_places_only() {
        let (dispatcher, _nm, _sensors) = Dispatcher::new([]);
        let dispatcher = Arc::new(dispatcher);
        let mut held = Vec::new();
        for _ in 0..STREAMS_MAX {
            let (guest, host) = UnixStream::pair().unwrap();
            dispatcher.open(&who(1), SERVICES_PORT, host);
            held.push(guest);
        }
        let (mut late, host) = UnixStream::pair().unwrap();
        dispatcher.open(&who(1), SERVICES_PORT, host);
        assert!(line_of(&mut late).await.contains("64 streams are open"));
        let (mut other, host) = UnixStream::pair().unwrap();
        dispatcher.open(&who(2), SERVICES_PORT, host);
        other.write_all(b"CONNECT nm\n").await.unwrap();
        assert_eq!(line_of(&mut other).await, "OK");
    }
}
