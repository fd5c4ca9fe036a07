//! `mandoline-lab connect ADDRESS`: joins its stdin and stdout to a TCP connection. QEMU starts one for each
//! connection that a node makes to 10.0.2.100:80, so that a node reaches one service of the host and nothing else.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

/// Copies both ways until both sides have ended.
pub fn connect(address: SocketAddr) -> std::io::Result<()> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut inward = stream.try_clone()?;
    std::thread::spawn(move || {
        let ended = copy(&mut inward, &mut std::io::stdout());
        // QEMU's side is one socket for both directions: when the service has said its last word the connection
        // is over, and waiting for more from the guest would keep a process for nothing.
        std::process::exit(i32::from(ended.is_err()));
    });
    let mut outward = stream;
    copy(&mut std::io::stdin(), &mut outward)?;
    outward.shutdown(Shutdown::Write)?;
    // The other thread ends the process when the service has closed.
    loop {
        std::thread::park();
    }
}

fn copy(from: &mut impl Read, to: &mut impl Write) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                to.write_all(&buffer[..n])?;
                to.flush()?;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}
