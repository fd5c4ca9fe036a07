//! Tests of the stream sockets: both ways of opening, credit, half-closed streams, and packets that lie.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use proptest::prelude::*;

use super::packet::{SHUTDOWN_BOTH, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::*;
use crate::devices::virtio::FEATURE_EVENT_INDEX;
use crate::devices::virtio::testing::{Ring, rings};
use crate::devices::vsock::connection::BUFFER_BYTES;
use crate::devices::vsock::outward::Outward;

const TX_AT: u64 = 0x20_0000;
const RX_AT: u64 = 0x40_0000;
const EVENTS_AT: u64 = 0x8_0000;
const CID: u32 = 3;

struct Bench {
    vsock: Vsock,
    rx: Ring,
    tx: Ring,
    events: Ring,
    directory: tempfile::TempDir,
    offered: u64,
    waiting: Option<u64>,
}

fn bench() -> Bench {
    restored(None, 64, 0)
}

/// A device that took back a state before its driver's queues, of which that for events has `buffers`.
fn restored(saved: Option<&Saved>, size: u16, buffers: u64) -> Bench {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v");
    let listener = UnixListener::bind(&path).unwrap();
    let mut vsock = Vsock::new(CID, Muxer::new(CID, listener, Outward::Path(path)).unwrap());
    if let Some(saved) = saved {
        vsock.restore(saved).unwrap();
    }
    let (mut rings, activation, _) = rings(3, size, FEATURE_EVENT_INDEX);
    let mut events = rings.pop().unwrap();
    for n in 0..buffers {
        events.offer(&[(EVENTS_AT + 16 * n, 4, true)]);
    }
    vsock.activate(activation).unwrap();
    let (tx, rx) = (rings.pop().unwrap(), rings.pop().unwrap());
    Bench {
        vsock,
        rx,
        tx,
        events,
        directory,
        offered: 0,
        waiting: None,
    }
}

impl Bench {
    fn host(&mut self) {
        self.vsock.handle(Event::Host(MUXER_TOKEN, EventSet::IN)).unwrap();
    }

    fn send_raw(&mut self, header: &Header, data: &[u8]) -> Result<(), DeviceError> {
        self.tx.put(TX_AT, &[&header.bytes()[..], data].concat());
        // In two pieces that do not respect the header's end.
        let total = HEADER_BYTES as u32 + data.len() as u32;
        self.tx
            .offer(&[(TX_AT, 40, false), (TX_AT + 40, total - 40, false)]);
        self.vsock.handle(Event::Kick(TX))
    }

    fn send(&mut self, op: u16, (host_port, guest_port): (u32, u32), data: &[u8], flags: u32, fwd_cnt: u32) {
        let header = Header {
            src_cid: CID.into(),
            dst_cid: 2,
            src_port: guest_port,
            dst_port: host_port,
            length: data.len() as u32,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: 10_000,
            fwd_cnt,
        };
        self.send_raw(&header, data).unwrap();
    }

    /// The next packet that the guest gets. One buffer is always available to the device afterwards.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        if self.waiting.is_none() {
            let at = RX_AT + 0x2_0000 * (self.offered % 16);
            self.offered += 1;
            self.waiting = Some(at);
            self.rx.offer(&[(at, 44, true), (at + 44, 0x1_0000, true)]);
        }
        self.vsock.handle(Event::Kick(0)).unwrap();
        let (_, bytes) = self.rx.used()?;
        let at = self.waiting.take().unwrap();
        let header = Header::parse(&self.rx.get(at, HEADER_BYTES).try_into().unwrap());
        assert_eq!(bytes, HEADER_BYTES as u32 + header.length);
        Some((header, self.rx.get(at + 44, header.length as usize)))
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.directory.path().join("v")).unwrap()
    }

    /// An inward stream to guest port 1024, open.
    fn inward(&mut self) -> (UnixStream, (u32, u32)) {
        let mut stream = self.connect();
        stream.write_all(b"CONNECT 1024\n").unwrap();
        self.host();
        let (request, _) = self.receive().unwrap();
        assert_eq!((request.op, request.dst_port), (op::REQUEST, 1024));
        let key = (request.src_port, 1024);
        self.send(op::RESPONSE, key, b"", 0, 0);
        let mut answer = vec![0; format!("OK {}\n", key.0).len()];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, format!("OK {}\n", key.0).into_bytes());
        stream.set_nonblocking(true).unwrap();
        (stream, key)
    }
}

#[test]
fn the_host_opens_a_stream_and_both_talk() {
    let mut bench = bench();
    let (mut stream, key) = bench.inward();
    bench.send(op::DATA, key, b"from the guest", 0, 0);
    let mut got = [0; 14];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"from the guest");
    stream.write_all(b"from the host").unwrap();
    bench.host();
    let (header, data) = bench.receive().unwrap();
    assert_eq!(
        (header.op, header.fwd_cnt, data.as_slice()),
        (op::DATA, 14, &b"from the host"[..])
    );
}

#[test]
fn what_follows_the_greeting_at_once_is_for_the_guest() {
    let mut bench = bench();
    let mut stream = bench.connect();
    stream.write_all(b"CONNECT 7\nhello").unwrap();
    bench.host();
    let (request, _) = bench.receive().unwrap();
    bench.send(op::RESPONSE, (request.src_port, 7), b"", 0, 0);
    assert_eq!(bench.receive().unwrap().1, b"hello");
}

#[test]
fn greetings_that_are_none_are_hung_up_on() {
    for text in [
        &b"CONNECT x\n"[..],
        b"CONNECT 4294967296\n",
        b"GET / HTTP/1.1\n",
        &[b'C'; 100],
        b"\n",
    ] {
        let mut bench = bench();
        let mut stream = bench.connect();
        stream.write_all(text).unwrap();
        bench.host();
        assert_eq!(bench.vsock.muxer.streams(), 0);
        assert!(bench.receive().is_none());
        // What was not read makes it a reset, else it is an end: either way it is over.
        assert!(matches!(stream.read(&mut [0; 8]), Ok(0) | Err(_)));
    }
}

#[test]
fn the_guest_opens_a_stream_to_a_service() {
    let mut bench = bench();
    let listener = UnixListener::bind(bench.directory.path().join("v_1024")).unwrap();
    bench.send(op::REQUEST, (1024, 5000), b"", 0, 0);
    let (response, _) = bench.receive().unwrap();
    assert_eq!(
        (response.op, response.src_port, response.dst_port),
        (op::RESPONSE, 1024, 5000)
    );
    let (mut service, _) = listener.accept().unwrap();
    bench.send(op::DATA, (1024, 5000), b"event", 0, 0);
    let mut got = [0; 5];
    service.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"event");
    // Nobody at the next port.
    bench.send(op::REQUEST, (1025, 5001), b"", 0, 0);
    assert_eq!(bench.receive().unwrap().0.op, op::RESET);
}

#[test]
fn the_guest_is_never_sent_more_than_its_credit() {
    let mut bench = bench();
    let (mut stream, key) = bench.inward();
    stream.write_all(&[7; 30_000]).unwrap();
    bench.host();
    let mut got = 0;
    while let Some((header, _)) = bench.receive() {
        got += header.length;
        if header.length == 0 {
            assert_eq!(header.op, op::CREDIT_REQUEST);
        }
    }
    assert_eq!(got, 10_000);
    bench.send(op::CREDIT_UPDATE, key, b"", 0, 10_000);
    let mut more = 0;
    while let Some((header, _)) = bench.receive() {
        more += header.length;
    }
    assert_eq!(more, 10_000);
}

#[test]
fn a_slow_host_is_buffered_up_to_the_credit_and_a_guest_that_ignores_it_is_cut() {
    let mut bench = bench();
    let (mut stream, key) = bench.inward();
    let chunk = [9; 32 << 10];
    let mut sent = 0usize;
    let reset = loop {
        bench.send(op::DATA, key, &chunk, 0, 0);
        sent += chunk.len();
        match bench.receive() {
            Some((header, _)) if header.op == op::RESET => break true,
            _ if sent > 8 << 20 => break false,
            _ => {}
        }
    };
    assert!(reset, "{sent} bytes were taken");
    assert!(sent > BUFFER_BYTES as usize);
    let mut read = 0;
    let mut bytes = vec![0; 64 << 10];
    while let Ok(now @ 1..) = stream.read(&mut bytes) {
        read += now;
    }
    assert!(read < sent);
    assert_eq!(bench.vsock.muxer.streams(), 0);
}

#[test]
fn credit_comes_back_when_the_host_has_read() {
    let mut bench = bench();
    let (mut stream, key) = bench.inward();
    bench.send(op::DATA, key, &[1; 40_000], 0, 0);
    let (update, _) = bench.receive().unwrap();
    assert_eq!(
        (update.op, update.fwd_cnt, update.buf_alloc),
        (op::CREDIT_UPDATE, 40_000, BUFFER_BYTES)
    );
    let mut bytes = vec![0; 40_000];
    stream.read_exact(&mut bytes).unwrap();
}

#[test]
fn half_closed_streams_go_on_the_other_way() {
    let mut bench = bench();
    let (mut stream, key) = bench.inward();
    stream.write_all(b"last words").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    bench.host();
    assert_eq!(bench.receive().unwrap().1, b"last words");
    let (end, _) = bench.receive().unwrap();
    assert_eq!((end.op, end.flags), (op::SHUTDOWN, SHUTDOWN_SEND));
    bench.send(op::DATA, key, b"answer", 0, 10);
    let mut got = [0; 6];
    stream.read_exact(&mut got).unwrap();
    bench.send(op::SHUTDOWN, key, b"", SHUTDOWN_BOTH, 10);
    assert_eq!(stream.read(&mut got).unwrap(), 0);
    assert_eq!(bench.receive().unwrap().0.op, op::RESET);
    assert_eq!(bench.vsock.muxer.streams(), 0);
}

#[test]
fn a_host_that_leaves_is_told_to_the_guest_after_its_last_words() {
    let mut bench = bench();
    let (mut stream, key) = bench.inward();
    stream.write_all(b"bye").unwrap();
    drop(stream);
    bench.host();
    assert_eq!(bench.receive().unwrap().1, b"bye");
    let mut flags = 0;
    while let Some((header, _)) = bench.receive() {
        assert_eq!(header.op, op::SHUTDOWN);
        flags |= header.flags;
    }
    assert_eq!(flags, SHUTDOWN_BOTH);
    bench.send(op::RESET, key, b"", 0, 0);
    assert_eq!(bench.vsock.muxer.streams(), 0);
}

#[test]
fn packets_for_nobody_are_reset_and_foreign_addresses_met_with_silence() {
    let mut bench = bench();
    bench.send(op::DATA, (9, 9), b"x", 0, 0);
    assert_eq!(bench.receive().unwrap().0.op, op::RESET);
    bench.send(op::RESET, (9, 9), b"", 0, 0);
    assert!(bench.receive().is_none());
    let mut header = Header {
        src_cid: 99,
        dst_cid: 2,
        kind: TYPE_STREAM,
        op: op::REQUEST,
        ..Header::default()
    };
    bench.send_raw(&header, b"").unwrap();
    header = Header {
        src_cid: CID.into(),
        dst_cid: 77,
        ..header
    };
    bench.send_raw(&header, b"").unwrap();
    assert!(bench.receive().is_none());
    header = Header {
        dst_cid: 2,
        kind: 2,
        ..header
    };
    bench.send_raw(&header, b"").unwrap();
    assert!(bench.receive().is_some(), "another socket type is reset");
}

#[test]
fn a_length_that_lies_is_an_error() {
    for length in [1, 5, u32::MAX] {
        let mut bench = bench();
        let header = Header {
            src_cid: CID.into(),
            dst_cid: 2,
            kind: TYPE_STREAM,
            op: op::DATA,
            length,
            ..Header::default()
        };
        assert!(bench.send_raw(&header, b"").is_err(), "{length}");
    }
    let mut bench = bench();
    bench.tx.offer(&[(TX_AT, 43, false)]);
    assert!(bench.vsock.handle(Event::Kick(TX)).is_err());
}

#[test]
fn streams_that_come_and_go_unheard_leave_nothing_behind() {
    let mut bench = bench();
    let listener = UnixListener::bind(bench.directory.path().join("v_1024")).unwrap();
    for port in 0..200 {
        bench.send(op::REQUEST, (1024, port), b"", 0, 0);
        listener.accept().unwrap();
        // The answer to the request still waits for a buffer.
        assert!(bench.vsock.muxer.has_packet());
        bench.send(op::RESET, (1024, port), b"", 0, 0);
    }
    assert_eq!(bench.vsock.muxer.streams(), 0);
    assert!(!bench.vsock.muxer.has_packet());
}

#[test]
fn a_receive_buffer_without_room_for_data_is_an_error() {
    let mut bench = bench();
    let (mut stream, _) = bench.inward();
    stream.write_all(b"data").unwrap();
    bench.rx.offer(&[(RX_AT, HEADER_BYTES as u32, true)]);
    let event = Event::Host(MUXER_TOKEN, EventSet::IN);
    assert!(bench.vsock.handle(event).is_err());
}

#[test]
fn a_restored_guest_ends_its_streams_before_it_hears_of_new_ones() {
    let mut before = bench();
    let (_stream, (port, _)) = before.inward();
    let saved = before.vsock.save();

    let mut bench = restored(Some(&saved), 64, 3);
    assert_eq!(bench.events.used(), Some((0, 4)));
    assert_eq!(bench.events.used(), None);
    assert_eq!(bench.events.get(EVENTS_AT, 4), [0; 4]);
    let mut stream = bench.connect();
    stream.write_all(b"CONNECT 1024\n").unwrap();
    bench.host();
    assert!(bench.receive().is_none());
    // A kick of nothing, as after a pause, is no sign.
    bench.vsock.handle(Event::Kick(EVENTS)).unwrap();
    assert!(bench.receive().is_none());
    bench.events.offer(&[(EVENTS_AT, 4, true)]);
    assert!(bench.events.wants_kick());
    bench.vsock.handle(Event::Kick(EVENTS)).unwrap();
    let (request, _) = bench.receive().unwrap();
    assert_eq!(request.op, op::REQUEST);
    // The guest may still know the ports of before.
    assert_eq!(request.src_port, port + 1);
    assert_eq!(bench.events.used(), None);
}

#[test]
fn a_restored_driver_is_told_when_it_has_a_buffer_for_that() {
    let saved = bench().vsock.save();
    let mut bench = restored(Some(&saved), 64, 0);
    bench.host();
    assert_eq!(bench.events.used(), None);
    bench.events.offer(&[(EVENTS_AT, 4, true)]);
    assert!(bench.events.wants_kick());
    bench.vsock.handle(Event::Kick(EVENTS)).unwrap();
    assert_eq!(bench.events.used(), Some((0, 4)));
    // A reset is the end of all of it.
    bench.vsock.reset();
    assert_eq!(bench.vsock.transport_reset, TransportReset::None);
}

#[test]
fn states_that_cannot_be_are_refused() {
    let good = bench().vsock.save();
    let refused = |name: &str, value: u64| {
        let mut saved = good.clone();
        saved.state[name] = value.into();
        bench().vsock.restore(&saved).unwrap_err().to_string()
    };
    assert!(refused("guest_cid", 2).contains("guest_cid is 2"));
    assert!(refused("next_port", 1024).contains("next_port is 1024"));
    assert!(refused("streams", 1).contains("streams"));
}

#[test]
fn a_guest_without_buffers_gets_its_data_when_it_has_some() {
    let mut bench = bench();
    let (mut stream, _) = bench.inward();
    stream.write_all(b"first").unwrap();
    for _ in 0..3 {
        // Nothing is read from the socket, and the inner set is empty: nobody is called again.
        bench.host();
        let epoll = libc::pollfd {
            fd: bench.vsock.muxer.epoll_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let mut epoll = [epoll];
        // SAFETY: one descriptor, in an array that lives through the call.
        assert_eq!(unsafe { libc::poll(epoll.as_mut_ptr(), 1, 0) }, 0);
    }
    stream.write_all(b", second").unwrap();
    bench.host();
    assert_eq!(bench.receive().unwrap().1, b"first, second");
}

#[test]
fn streams_and_resets_are_bounded() {
    let mut bench = bench();
    for port in 0..300 {
        bench.send(op::DATA, (9, port), b"", 0, 0);
    }
    let metrics = bench.vsock.metrics();
    assert_eq!(metrics["resets_dropped"], 300 - 256);
    assert_eq!(metrics["tx_packets_count"], 300);

    let _streams: Vec<UnixStream> = (0..muxer::MAX_STREAMS + 5)
        .map(|_| {
            let stream = bench.connect();
            bench.host();
            stream
        })
        .collect();
    assert_eq!(bench.vsock.muxer.streams(), muxer::MAX_STREAMS);
}

#[test]
fn what_goes_by_is_counted() {
    let mut bench = bench();
    let (mut stream, key) = bench.inward();
    bench.send(op::DATA, key, b"12345", 0, 0);
    stream.write_all(b"123").unwrap();
    bench.host();
    bench.receive().unwrap();
    let metrics = bench.vsock.metrics();
    assert_eq!(
        (&metrics["tx_bytes_count"], &metrics["rx_bytes_count"]),
        (&5.into(), &3.into())
    );
    assert_eq!(
        (&metrics["conns_added"], &metrics["streams"]),
        (&1.into(), &1.into())
    );
    bench.send(op::RESET, key, b"", 0, 0);
    let metrics = bench.vsock.metrics();
    assert_eq!(
        (&metrics["tx_resets"], &metrics["conns_removed"]),
        (&1.into(), &1.into())
    );
    assert_eq!(metrics["streams"], 0);
}

#[test]
fn without_a_driver_streams_are_refused() {
    let mut bench = bench();
    bench.vsock.reset();
    let mut stream = bench.connect();
    bench.host();
    assert_eq!(stream.read(&mut [0; 4]).unwrap(), 0);
}

proptest! {
    /// Any packets of the guest's: no panic, bounded streams, and never more data to the guest than its credit.
    #[test]
    fn any_packets(
        packets in prop::collection::vec((0u16..10, 0u32..3, 0u32..3, 0usize..3000, any::<u32>(), 0u32..4), 0..60),
    ) {
        let mut bench = bench();
        let (mut stream, key) = bench.inward();
        let _ = stream.write(&[1; 5000]);
        for (op, host_port, guest_port, bytes, fwd_cnt, flags) in packets {
            let key = if host_port == 0 { key } else { (host_port, guest_port) };
            bench.send(op, key, &vec![5; bytes], flags, fwd_cnt);
            bench.host();
            while let Some((header, _)) = bench.receive() {
                prop_assert!(header.length <= 10_000);
            }
            prop_assert!(bench.vsock.muxer.streams() <= 2);
        }
    }
}
