//! The devices under test, and the host's ends of them.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};

use mandoline_api::monitor::{Balloon as BalloonConfig, IoEngine, RateLimiter, TokenBucket};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::devices::balloon::Balloon;
use crate::devices::blk::{self, Blk};
use crate::devices::net::{self, Net};
use crate::devices::pmem::Pmem;
use crate::devices::rng::Rng;
use crate::devices::virtio::Device;
use crate::devices::vsock::Vsock;
use crate::devices::vsock::muxer::Muxer;
use crate::devices::vsock::outward::Outward;
use crate::fuzzing::script::RAM;

/// The guest's context id.
pub(super) const CID: u32 = 3;
/// Streams that the host's end keeps open at once.
const MOST_STREAMS: usize = 16;

/// Which device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    BlkSync,
    BlkAsync,
    Net,
    Vsock,
    Rng,
    Balloon,
    Pmem,
}

/// All of them.
pub(super) const KINDS: [Kind; 7] = [
    Kind::BlkSync,
    Kind::BlkAsync,
    Kind::Net,
    Kind::Vsock,
    Kind::Rng,
    Kind::Balloon,
    Kind::Pmem,
];

/// The host's end: what stays when the device is made anew from its saved state.
pub(super) struct Host {
    file: File,
    tap: OwnedFd,
    wire: UnixDatagram,
    /// Where streams of the guest are handed to, and the monitor's end of it.
    broker: OwnedFd,
    brokers_end: OwnedFd,
    /// The present listener's name.
    name: Vec<u8>,
    pub(super) streams: Vec<UnixStream>,
}

impl Host {
    pub(super) fn new() -> Self {
        let file = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(file);
        file.write_all(&[b'W'; 64 << 10]).unwrap();
        let (tap, wire) = UnixDatagram::pair().unwrap();
        for end in [&tap, &wire] {
            end.set_nonblocking(true).unwrap();
        }
        let (family, kind) = (
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
        );
        let flags = rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK;
        let (broker, brokers_end) = rustix::net::socketpair(family, kind, flags, None).unwrap();
        Self {
            file,
            tap: tap.into(),
            wire,
            broker,
            brokers_end,
            name: Vec::new(),
            streams: Vec::new(),
        }
    }

    /// A device on these ends. `limited`: with rate limits, small ones.
    pub(super) fn device(&mut self, kind: Kind, limited: bool) -> Box<dyn Device> {
        let bucket = |size| TokenBucket {
            size,
            one_time_burst: None,
            refill_time: 1,
        };
        let limit = if limited {
            RateLimiter {
                bandwidth: Some(bucket(4096)),
                ops: Some(bucket(4)),
            }
        } else {
            RateLimiter::default()
        };
        let file = || self.file.try_clone().unwrap();
        match kind {
            Kind::BlkSync | Kind::BlkAsync => {
                let options = blk::Options {
                    id: "disk".into(),
                    flush: true,
                    io_engine: if kind == Kind::BlkSync {
                        IoEngine::Sync
                    } else {
                        IoEngine::Async
                    },
                    rate_limiter: limit,
                    ..blk::Options::default()
                };
                Box::new(Blk::new(file(), &options).unwrap())
            }
            Kind::Net => {
                let options = net::Options {
                    mac: Some([2, 0, 0, 0, 0, 1]),
                    rx_rate_limiter: Some(limit),
                    tx_rate_limiter: Some(limit),
                    ..net::Options::default()
                };
                Box::new(Net::new(self.tap.try_clone().unwrap().into(), &options).unwrap())
            }
            Kind::Vsock => {
                let outward = Outward::Broker(self.broker.try_clone().unwrap());
                Box::new(Vsock::new(
                    CID,
                    Muxer::new(CID, self.listener(), outward).unwrap(),
                ))
            }
            Kind::Rng => Box::new(Rng::new(&limit).unwrap()),
            Kind::Balloon => {
                let options = BalloonConfig {
                    amount_mib: 1,
                    deflate_on_oom: true,
                    stats_polling_interval_s: 1,
                    free_page_hinting: false,
                    free_page_reporting: true,
                };
                Box::new(Balloon::new(&options, RAM).unwrap())
            }
            Kind::Pmem => {
                let window = 1 << 30..(1 << 30) + (2 << 20);
                Box::new(Pmem::new(file(), window, false, Some(&limit)).unwrap())
            }
        }
    }

    /// A listener of a name that nobody else has, in no file system.
    fn listener(&mut self) -> UnixListener {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        self.name = format!("mandoline-fuzzing-{}-{number}", std::process::id()).into_bytes();
        UnixListener::bind_addr(&SocketAddr::from_abstract_name(&self.name).unwrap()).unwrap()
    }

    /// Says something: a frame to the tap, or a new stream if the first byte is odd, or more on the last stream.
    pub(super) fn say(&mut self, kind: Kind, bytes: &[u8]) {
        if kind == Kind::Net {
            // Fails when the tap is full: then it is.
            let _ = self.wire.send(bytes);
            return;
        }
        let Some((first, rest)) = bytes.split_first() else {
            return;
        };
        if kind == Kind::Vsock && first & 1 != 0 && self.streams.len() < MOST_STREAMS {
            let address = SocketAddr::from_abstract_name(&self.name).unwrap();
            let stream = UnixStream::connect_addr(&address).unwrap();
            stream.set_nonblocking(true).unwrap();
            self.streams.push(stream);
        }
        if let Some(stream) = self.streams.last_mut() {
            let _ = rustix::net::send(stream, rest, rustix::net::SendFlags::NOSIGNAL);
        }
    }

    /// Takes the streams that the guest opened, and what the guest sent.
    pub(super) fn listen(&mut self) {
        let mut bytes = [0u8; 4096];
        while self.wire.recv(&mut bytes).is_ok() {}
        loop {
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut pieces = [std::io::IoSliceMut::new(&mut bytes)];
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            if rustix::net::recvmsg(self.brokers_end.as_fd(), &mut pieces, &mut ancillary, flags).is_err() {
                return;
            }
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    self.streams.extend(fds.map(UnixStream::from));
                }
            }
            self.streams.truncate(MOST_STREAMS);
        }
    }
}
