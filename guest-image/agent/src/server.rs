//! One stream of the host: requests read, answered, until the stream ends or becomes an `exec` session.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use mandoline_api::agent::frame::decode;
use mandoline_api::agent::{
    ErrorReply, FrameError, GrowDiskReply, Phase, Request, SetKeysReply, ShutdownReply, read_frame,
    write_frame,
};
use serde::Serialize;

use crate::agent::{Agent, Command};
use crate::error::Error;
use crate::log::warning;
use crate::{exec, identity, initscript, join, root};

/// Streams served at once; `exec` sessions among them.
const MOST: u32 = 64;

/// How long a stream may stay without a request. Only an open stream costs a timer: an idle agent has none.
const PATIENCE: Duration = Duration::from_secs(60);

/// Stack of a stream's thread. Pages that aren't used aren't there.
const STACK: usize = 256 * 1024;

/// Milliseconds between SIGTERM and SIGKILL: default and maximum.
const GRACE_MS: (u32, u32) = (5_000, 60_000);

const OPERATIONS: [&str; 7] = [
    "hello",
    "join",
    "status",
    "exec",
    "set_keys",
    "grow_disk",
    "shutdown",
];

/// How many streams are served now.
static SERVED: AtomicU32 = AtomicU32::new(0);

/// Frees a stream's place, also when its thread panics.
struct Place;

impl Drop for Place {
    fn drop(&mut self) {
        SERVED.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves a stream on a thread of its own, if there is room.
pub(crate) fn serve(agent: &Arc<Agent>, mut stream: File) {
    let before = SERVED.fetch_add(1, Ordering::Relaxed);
    let place = Place;
    if before >= MOST {
        let error = Error::Busy(format!("{MOST} streams are open already")).body();
        let _ = limit_time(&stream);
        let _ = write_frame(&mut stream, &ErrorReply { error });
        return;
    }
    let agent = Arc::clone(agent);
    let spawned = std::thread::Builder::new()
        .name("stream".into())
        .stack_size(STACK)
        .spawn(move || {
            let _place = place;
            converse(&agent, stream);
        });
    if let Err(e) = spawned {
        warning!("no thread for a stream: {e}");
    }
}

fn limit_time(stream: &File) -> rustix::io::Result<()> {
    use rustix::net::sockopt::{Timeout, set_socket_timeout};
    set_socket_timeout(stream.as_fd(), Timeout::Recv, Some(PATIENCE))?;
    set_socket_timeout(stream.as_fd(), Timeout::Send, Some(PATIENCE))
}

fn converse(agent: &Arc<Agent>, mut stream: File) {
    let _ = limit_time(&stream);
    loop {
        let body = match read_frame(&mut stream) {
            Ok(Some(body)) => body,
            Ok(None) | Err(FrameError::Io(_)) => return,
            Err(e) => {
                // The stream's framing is lost: say so and close it.
                let _ = answer::<()>(&mut stream, Err(Error::BadRequest(e.to_string())));
                return;
            }
        };
        let request = match parse(&body) {
            Ok(request) => request,
            Err(e) => match answer::<()>(&mut stream, Err(e)) {
                Ok(()) => continue,
                Err(_) => return,
            },
        };
        let sent = match request {
            Request::Hello => answer(&mut stream, Ok(agent.hello())),
            Request::Status => answer(&mut stream, Ok(agent.status())),
            Request::Join(request) => {
                let script = request.initscript.clone();
                match join::join(agent, request) {
                    Ok((reply, first)) => {
                        // The answer goes first: the boot script must not delay `reachable`.
                        let sent = answer(&mut stream, Ok(reply));
                        if let (true, Some(script)) = (first, script) {
                            agent.start_initscript(&script);
                        }
                        sent
                    }
                    Err(e) => {
                        warning!("join: {e}");
                        answer::<()>(&mut stream, Err(e))
                    }
                }
            }
            Request::SetKeys { keys } => answer(&mut stream, set_keys(agent, &keys)),
            Request::GrowDisk => answer(&mut stream, grow_disk(agent)),
            Request::Shutdown { mode, grace_ms } => {
                let sent = answer(&mut stream, Ok(ShutdownReply { mode }));
                let grace_ms = grace_ms.unwrap_or(GRACE_MS.0).min(GRACE_MS.1);
                agent.ask(Command::Shutdown { mode, grace_ms });
                sent
            }
            Request::Exec(request) => match exec_session(agent, &request) {
                Ok(session) => return session.run(&stream),
                Err(e) => answer::<()>(&mut stream, Err(e)),
            },
        };
        if sent.is_err() {
            return;
        }
    }
}

fn answer<T: Serialize>(stream: &mut File, reply: Result<T, Error>) -> Result<(), FrameError> {
    match reply {
        Ok(reply) => write_frame(stream, &reply),
        Err(e) => write_frame(stream, &ErrorReply { error: e.body() }),
    }
}

/// The request, or an error that tells an unknown operation from a malformed one.
fn parse(body: &[u8]) -> Result<Request, Error> {
    #[derive(serde::Deserialize)]
    struct Operation {
        op: String,
    }
    decode(body).map_err(|e| match decode::<Operation>(body) {
        Ok(Operation { op }) if !OPERATIONS.contains(&op.as_str()) => {
            Error::Unsupported(op.chars().take(64).collect(), OPERATIONS.join(", "))
        }
        _ => Error::BadRequest(e.to_string()),
    })
}

fn set_keys(agent: &Agent, keys: &[String]) -> Result<SetKeysReply, Error> {
    if agent.phase() != Phase::Joined {
        return Err(Error::WrongPhase(
            "keys can be set once the guest has joined".into(),
        ));
    }
    Ok(SetKeysReply {
        keys: keys.len(),
        changed: identity::write_keys(keys)?,
    })
}

fn grow_disk(agent: &Agent) -> Result<GrowDiskReply, Error> {
    let life = agent.life.lock().unwrap_or_else(PoisonError::into_inner);
    match &life.root {
        Some(Some(device)) => root::grow(device),
        _ => Err(Error::WrongPhase(
            "the guest has not joined, or has no disk of its own".into(),
        )),
    }
}

fn exec_session(agent: &Agent, request: &mandoline_api::agent::Exec) -> Result<exec::Session, Error> {
    match agent.phase() {
        Phase::Stopping => Err(Error::WrongPhase("the sliver is being shut down".into())),
        _ => exec::start(request, &agent.children),
    }
}

impl Agent {
    fn start_initscript(&self, script: &str) {
        self.set_initscript(mandoline_api::agent::Initscript::Running);
        let state = initscript::start(script, &self.children);
        if state != mandoline_api::agent::Initscript::Running {
            self.initscript_done(state);
        }
    }

    /// The boot script ended.
    pub(crate) fn initscript_done(&self, initscript: mandoline_api::agent::Initscript) {
        self.set_initscript(initscript);
        self.tell(&mandoline_api::agent::Event::InitscriptDone { initscript });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mandoline_api::agent::ErrorKind;

    #[test]
    fn unknown_operations_are_told_from_malformed_ones() {
        let kind = |body: &str| parse(body.as_bytes()).expect_err("no request").body().kind;
        assert_eq!(kind(r#"{"op":"levitate"}"#), ErrorKind::Unsupported);
        assert_eq!(kind(r#"{"op":"exec"}"#), ErrorKind::BadRequest);
        assert_eq!(kind(r#"{"op":7}"#), ErrorKind::BadRequest);
        assert_eq!(kind("[]"), ErrorKind::BadRequest);
        assert_eq!(kind(""), ErrorKind::BadRequest);
        for op in OPERATIONS {
            // Known to the parser as well: whatever is missing, the operation is not what is wrong.
            assert_ne!(
                parse(format!(r#"{{"op":"{op}"}}"#).as_bytes())
                    .err()
                    .map(|e| e.body().kind),
                Some(ErrorKind::Unsupported)
            );
        }
    }
}
