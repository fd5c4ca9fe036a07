//! `run`'s side of the control socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use mandoline_api::monitor::Fault;
use serde::Serialize;
use serde_json::Value;

/// A monitor that does not answer for so long is stuck.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 1 << 20;

/// A request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// On the way.
    #[error("control socket: {0}")]
    Socket(#[from] io::Error),
    /// The answer is not HTTP or not JSON.
    #[error("control socket: an answer that cannot be read: {0}")]
    Answer(String),
    /// The monitor refused.
    #[error("{0}")]
    Refused(String),
}

/// Asks the monitor at `socket`; null where it has nothing to say.
pub fn ask(socket: &Path, method: &str, path: &str, body: Option<&impl Serialize>) -> Result<Value, Error> {
    let unreadable = |error: &dyn std::fmt::Display| Error::Answer(error.to_string());
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let body = body
        .map(serde_json::to_string)
        .transpose()
        .map_err(|error| unreadable(&error))?;
    let body = body.unwrap_or_default();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut bytes = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut bytes)?;
    let mut headers = [httparse::EMPTY_HEADER; 16];
    let mut response = httparse::Response::new(&mut headers);
    let parsed = response.parse(&bytes).map_err(|error| unreadable(&error))?;
    let (httparse::Status::Complete(head), Some(status)) = (parsed, response.code) else {
        return Err(unreadable(&"it is cut off"));
    };
    let text = bytes.get(head..).unwrap_or_default();
    if !(200..300).contains(&status) {
        let fault = serde_json::from_slice::<Fault>(text).map(|fault| fault.fault_message);
        return Err(Error::Refused(
            fault.unwrap_or_else(|_| format!("{path}: status {status}")),
        ));
    }
    if text.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(text).map_err(|error| unreadable(&error))
}
