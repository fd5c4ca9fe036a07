//! The control socket's thread: a few connections, none of which can hold up another.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::{PollFd, PollFlags};

use crate::api::http::{MAX_REQUEST, Parsed, Response, parse};
use crate::api::routes::{Context, answer};

/// Most connections at once, as Firecracker has it.
const MAX_CONNECTIONS: usize = 10;

struct Connection {
    stream: UnixStream,
    received: Vec<u8>,
    to_send: Vec<u8>,
    /// Close when everything is sent.
    last: bool,
}

/// Serves until the process ends.
pub fn serve(listener: &UnixListener, context: &Context) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let mut connections: Vec<Connection> = Vec::new();
    loop {
        let mut polled = vec![PollFd::new(listener, PollFlags::IN)];
        for connection in &connections {
            let flags = if connection.to_send.is_empty() {
                PollFlags::IN
            } else {
                PollFlags::OUT
            };
            polled.push(PollFd::from_borrowed_fd(connection.stream.as_fd(), flags));
        }
        match rustix::event::poll(&mut polled, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut index = 0;
        connections.retain_mut(|connection| {
            index += 1;
            !ready[index] || attend(connection, context)
        });
        if ready[0] {
            accept(listener, &mut connections);
        }
    }
}

fn accept(listener: &UnixListener, connections: &mut Vec<Connection>) {
    while let Ok((mut stream, _)) = listener.accept() {
        if stream.set_nonblocking(true).is_err() {
            continue;
        }
        if connections.len() >= MAX_CONNECTIONS {
            let body = format!(r#"{{"fault_message":"more than {MAX_CONNECTIONS} connections"}}"#);
            let _ = stream.write(&Response { status: 503, body }.bytes(false));
            continue;
        }
        connections.push(Connection {
            stream,
            received: Vec::new(),
            to_send: Vec::new(),
            last: false,
        });
    }
}

/// Goes on with a connection; false when it is over.
fn attend(connection: &mut Connection, context: &Context) -> bool {
    if connection.to_send.is_empty() {
        let mut chunk = [0u8; 4096];
        match connection.stream.read(&mut chunk) {
            Ok(0) => return false,
            Ok(length) => connection.received.extend(&chunk[..length]),
            Err(error) => return would_block(&error),
        }
        while !connection.last {
            match parse(&connection.received) {
                Parsed::Partial if connection.received.len() <= MAX_REQUEST => break,
                Parsed::Partial => return false,
                Parsed::Whole(request, length) => {
                    connection.received.drain(..length);
                    connection.last = !request.keep_alive;
                    let response = answer(&request, context);
                    connection.to_send.extend(response.bytes(request.keep_alive));
                }
                Parsed::Bad(status, text) => {
                    let body = serde_json::json!({ "fault_message": text }).to_string();
                    connection.to_send.extend(Response { status, body }.bytes(false));
                    connection.last = true;
                }
            }
        }
    }
    while !connection.to_send.is_empty() {
        match connection.stream.write(&connection.to_send) {
            Ok(length) => drop(connection.to_send.drain(..length)),
            Err(error) => return would_block(&error),
        }
    }
    !connection.last
}

fn would_block(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
