//! The nodes' joint network: a hub on Unix stream sockets. QEMU's `stream` netdev sends each frame as a 32-bit
//! big-endian length and its bytes. Frames that a port does not take at once are dropped, as a switch would.

use crate::{LabError, Result};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

/// The largest frame that QEMU's netdev passes (its NET_BUFSIZE): 64 KiB and headers.
const MAX_FRAME: usize = 4096 + 65536;
/// Frames that wait for a port before more are dropped.
const QUEUE: usize = 1024;

struct Port {
    id: usize,
    frames: SyncSender<Arc<[u8]>>,
    linked: Arc<AtomicBool>,
}

type Ports = Arc<Mutex<Vec<Port>>>;

/// The hub. Each port is a Unix socket that one QEMU connects to.
#[derive(Default)]
pub(crate) struct Hub {
    ports: Ports,
    next: usize,
}

impl Hub {
    /// A port at `path`, and the switch for its link.
    pub(crate) fn port(&mut self, path: &Path) -> Result<Link> {
        let listener = UnixListener::bind(path).map_err(LabError::file("listen on", path))?;
        let linked = Arc::new(AtomicBool::new(true));
        let id = self.next;
        self.next += 1;
        let (ports, link) = (self.ports.clone(), linked.clone());
        std::thread::spawn(move || {
            if let Ok((stream, _)) = listener.accept() {
                let _ = serve(id, stream, &ports, link);
                lock(&ports).retain(|p| p.id != id);
            }
        });
        Ok(Link {
            linked,
            path: path.to_owned(),
        })
    }
}

/// One node's cable into the hub.
pub(crate) struct Link {
    linked: Arc<AtomicBool>,
    path: PathBuf,
}

impl Link {
    /// Cuts or mends the link, both ways.
    pub(crate) fn set(&self, up: bool) {
        self.linked.store(up, Ordering::Relaxed);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // A node that never came: this lets the port's thread out of `accept`.
        let _ = UnixStream::connect(&self.path);
    }
}

fn lock(ports: &Ports) -> std::sync::MutexGuard<'_, Vec<Port>> {
    ports.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(id: usize, mut stream: UnixStream, ports: &Ports, linked: Arc<AtomicBool>) -> std::io::Result<()> {
    let (frames, inbox) = sync_channel(QUEUE);
    let writer = stream.try_clone()?;
    std::thread::spawn(move || write_frames(writer, &inbox));
    lock(ports).push(Port {
        id,
        frames,
        linked: linked.clone(),
    });
    loop {
        let mut length = [0; 4];
        stream.read_exact(&mut length)?;
        let length = u32::from_be_bytes(length) as usize;
        if length > MAX_FRAME {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        let mut frame = vec![0; 4 + length];
        frame[..4].copy_from_slice(&u32::to_be_bytes(length as u32));
        stream.read_exact(&mut frame[4..])?;
        if !linked.load(Ordering::Relaxed) {
            continue;
        }
        let frame: Arc<[u8]> = frame.into();
        for port in lock(ports)
            .iter()
            .filter(|p| p.id != id && p.linked.load(Ordering::Relaxed))
        {
            // A full queue drops the frame.
            let _ = port.frames.try_send(frame.clone());
        }
    }
}

fn write_frames(mut stream: UnixStream, inbox: &Receiver<Arc<[u8]>>) {
    while let Ok(frame) = inbox.recv() {
        if stream.write_all(&frame).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(text: &[u8]) -> Vec<u8> {
        let mut f = (text.len() as u32).to_be_bytes().to_vec();
        f.extend_from_slice(text);
        f
    }

    fn attach(hub: &mut Hub, path: &Path) -> (Link, UnixStream) {
        let before = lock(&hub.ports).len();
        let link = hub.port(path).expect("port");
        let stream = UnixStream::connect(path).expect("connect");
        while lock(&hub.ports).len() == before {
            std::thread::yield_now();
        }
        (link, stream)
    }

    #[test]
    fn frames_reach_the_others_and_only_while_linked() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut hub = Hub::default();
        let (_a, mut a) = attach(&mut hub, &dir.path().join("a"));
        let (link, mut b) = attach(&mut hub, &dir.path().join("b"));
        let (_c, mut c) = attach(&mut hub, &dir.path().join("c"));
        let expect = |s: &mut UnixStream, text: &[u8]| {
            let mut got = vec![0; 4 + text.len()];
            s.read_exact(&mut got).expect("frame");
            assert_eq!(got, frame(text));
        };
        a.write_all(&frame(b"one")).expect("write");
        expect(&mut b, b"one");
        expect(&mut c, b"one");
        link.set(false);
        a.write_all(&frame(b"two")).expect("write");
        expect(&mut c, b"two");
        link.set(true);
        a.write_all(&frame(b"three")).expect("write");
        expect(&mut c, b"three");
        // b never sees the second, and nobody sees their own.
        expect(&mut b, b"three");
        c.write_all(&frame(b"four")).expect("write");
        expect(&mut a, b"four");
    }
}
