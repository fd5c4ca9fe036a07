//! ssh into the sliver. The agent holds the listening port and gives each connection to an `sshd -i` of its
//! own, as inetd did: so a sliver is reachable the moment the port listens (no daemon to start and wait for),
//! an idle one keeps no sshd in memory, and a login costs what it costs anyway (`sshd -D`, too, executes
//! itself anew for each connection). `sshd_config` holds, read afresh for each connection, except `Port`,
//! `ListenAddress` and `MaxStartups`, which belong to a listener.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::children::{Children, Kind};
use crate::error::{Context as _, Error};
use crate::hostkey;
use crate::log::warning;

/// The program.
const SSHD: &str = "/usr/sbin/sshd";

/// Where it logs; there is no syslog daemon.
const LOG: &str = "/var/log/sshd.log";

/// From this size on the log is set aside (one old one is kept), bytes: strangers' attempts must not fill
/// the sliver's disk.
const LOG_LIMIT: u64 = 1 << 20;

/// Connections served at once: what sshd's own `MaxStartups` (10:30:100) allows at the most.
const MOST: usize = 100;

const PORT: u16 = 22;

/// Makes the host key if need be and listens; answers the public host keys.
pub(crate) fn prepare(hostname: &str) -> Result<Vec<String>, Error> {
    if !Path::new(SSHD).exists() {
        return Err(Error::NotFound(format!("{SSHD} is not in the image")));
    }
    // sshd's privilege separation wants its empty directory.
    match fs::create_dir("/run/sshd") {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(e).context(|| "making /run/sshd".to_owned()),
    }
    hostkey::ensure(Path::new("/etc/ssh"), hostname)
}

/// Opens the port: for both families where the kernel has IPv6.
pub(crate) fn listen() -> Result<TcpListener, Error> {
    let any: [IpAddr; 2] = [Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
    let listener = TcpListener::bind((any[0], PORT))
        .or_else(|_| TcpListener::bind((any[1], PORT)))
        .context(|| format!("listening on port {PORT}"))?;
    listener
        .set_nonblocking(true)
        .context(|| "setting the port non-blocking".to_owned())?;
    Ok(listener)
}

/// Takes one connection and starts its sshd.
pub(crate) fn accept(listener: &TcpListener, children: &Children) -> io::Result<()> {
    let (connection, peer) = match listener.accept() {
        Ok(accepted) => accepted,
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted
            ) =>
        {
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    let socket = OwnedFd::from(connection);
    let input = socket.try_clone()?;
    if fs::metadata(LOG).is_ok_and(|file| file.len() > LOG_LIMIT) {
        let _ = fs::rename(LOG, format!("{LOG}.1"));
    }
    let mut command = Command::new(SSHD);
    command
        .args(["-i", "-E", LOG])
        .env_clear()
        .env("PATH", crate::exec::PATH)
        .current_dir("/")
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(socket))
        .stderr(Stdio::null());
    if let Err(e) = children.spawn(Kind::Ssh, MOST, &mut command) {
        warning!("ssh connection from {peer}: {e}");
    }
    Ok(())
}
