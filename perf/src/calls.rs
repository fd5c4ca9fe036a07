//! Calls of the node manager, for the parts of benchmarks that run inside a lab node.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mandoline_api::nodemgr::OWNER_SOCKET;
use serde_json::{Value, json};

/// Time in which the node manager answers, after its node has booted and at each call.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until the node manager answers.
pub(crate) fn wait_for_node_manager() -> Result<()> {
    let began = Instant::now();
    while call(OWNER_SOCKET, "list", &json!({})).is_err() {
        if began.elapsed() > PATIENCE {
            bail!("the node manager does not answer");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// `POST /v1/<operation>`.
pub(crate) fn call(socket: &str, operation: &str, body: &Value) -> Result<Value> {
    ask(socket, "POST", operation, &body.to_string())
}

/// `GET /v1/<what>`.
pub(crate) fn get(socket: &str, what: &str) -> Result<Value> {
    ask(socket, "GET", what, "")
}

fn ask(socket: &str, method: &str, what: &str, body: &str) -> Result<Value> {
    let mut stream = UnixStream::connect(socket).with_context(|| socket.to_owned())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "{method} /v1/{what} HTTP/1.1\r\nHost: nm\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .with_context(|| format!("waiting for the answer to {what}"))?;
    let (head, content) = answer
        .split_once("\r\n\r\n")
        .with_context(|| format!("{what}: {answer}"))?;
    if !head.starts_with("HTTP/1.1 200") {
        bail!("{what} {body}: {content}");
    }
    serde_json::from_str(content).with_context(|| format!("{what}: {content}"))
}
