//! What `run` says to the guest's agent.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use mandoline_api::agent::{
    AGENT_PORT, Bytes, FrameError, Interface, Join, JoinReply, MIN_ENTROPY, Request, ShutdownMode,
    ShutdownReply, decode_reply, read_frame, write_frame,
};

use crate::run::options::RunArgs;
use crate::state::realtime_ns;

/// The agent could not be talked to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No stream to it.
    #[error("reaching the guest's agent: {0}")]
    Connect(io::Error),
    /// It answered something else.
    #[error("the guest's agent: {0}")]
    Frame(#[from] FrameError),
    /// It hung up.
    #[error("the guest's agent hung up without an answer")]
    HungUp,
    /// A key file.
    #[error("{path}: {source}")]
    Keys {
        /// Which.
        path: String,
        /// What the host said.
        source: io::Error,
    },
}

/// Asks the agent through the monitor's socket.
fn ask<T: serde::de::DeserializeOwned>(socket: &Path, request: &Request) -> Result<T, Error> {
    let mut stream = connect(socket).map_err(Error::Connect)?;
    write_frame(&mut stream, request)?;
    let body = read_frame(&mut stream)?.ok_or(Error::HungUp)?;
    Ok(decode_reply(&body)?)
}

fn connect(socket: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes())?;
    // Byte by byte: what follows the line belongs to the agent's protocol.
    let mut line = Vec::new();
    let mut byte = [0u8];
    while byte[0] != b'\n' {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    if line.starts_with(b"OK ") {
        Ok(stream)
    } else {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

/// Gives the guest entropy, name, network, disk and keys.
pub fn join(args: &RunArgs, socket: &Path) -> Result<JoinReply, Error> {
    let mut entropy = vec![0; MIN_ENTROPY.max(64)];
    rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Error::Connect(error.into()))?;
    let mut keys = Vec::new();
    for path in &args.keys {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Keys {
            path: path.display().to_string(),
            source,
        })?;
        let lines = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        keys.extend(lines.map(str::to_owned));
    }
    let interface = args.tap.is_some().then(|| Interface {
        mac: args.mac(),
        addresses: args.address.into_iter().collect(),
        gateway: args.host_address().map(|(address, _)| address.into()),
        gateway6: None,
        mtu: None,
    });
    let join = Join {
        entropy: Bytes(entropy),
        slice: args.slice.clone(),
        hostname: args.hostname.clone(),
        time_unix_ns: Some(realtime_ns()),
        interface,
        dns: args.dns.clone(),
        disk: args.disk_device().map(str::to_owned),
        keys,
        initscript: None,
    };
    ask(socket, &Request::Join(Box::new(join)))
}

/// Asks the guest to power off.
pub fn shut_down(socket: &Path) -> Result<ShutdownReply, Error> {
    ask(
        socket,
        &Request::Shutdown {
            mode: ShutdownMode::Poweroff,
            grace_ms: None,
        },
    )
}
