//! `exec`: a program run for the host, its pipes carried over the stream.
//!
//! One thread and one poll loop for each session. What flows is bounded in both directions: output is read
//! from the program only while the host takes it, input is read from the host only while the program takes
//! it. When the stream closes before the program has ended, its process group is killed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt as _;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::Arc;

use mandoline_api::agent::frame::{MAX_DATA, decode};
use mandoline_api::agent::{Bytes, Decoder, Exec, ExecEvent, ExecInput, ExitStatus, FrameError, encode};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal};

use crate::children::{Children, Exit, Kind, SpawnError, Started};
use crate::error::Error;
use crate::user::User;

/// Where programs are looked for.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Programs run by `exec` at once.
const MOST: usize = 32;

/// Bytes that may wait for the host; above it the program's output isn't read.
const OUT_LIMIT: usize = 256 * 1024;

/// Bytes that may wait for the program; above it the host isn't read.
const IN_LIMIT: usize = 1 << 20;

/// Bytes read after the program's end from each pipe: all that it can have left there. Its descendants may
/// hold the pipe open and write on for ever.
const AFTER_END: usize = 1 << 20;

/// The environment that programs find.
pub(crate) fn environment<'a>(name: &'a str, home: &'a str, shell: &'a str) -> [(&'static str, &'a str); 6] {
    [
        ("PATH", PATH),
        ("HOME", home),
        ("USER", name),
        ("LOGNAME", name),
        ("SHELL", shell),
        ("LANG", "C.UTF-8"),
    ]
}

/// Starts the program. A session follows, see [`Session::run`].
pub(crate) fn start(exec: &Exec, children: &Arc<Children>) -> Result<Session, Error> {
    let Some((program, arguments)) = exec.argv.split_first() else {
        return Err(Error::BadRequest(
            "argv is empty; a program and its arguments are wanted".into(),
        ));
    };
    let user = match exec.user.as_deref() {
        None | Some("root") => User::root(),
        Some(name) => User::find(name)?,
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(environment(&user.name, &user.home, &user.shell))
        .envs(&exec.env)
        .stdin(if exec.stdin { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    match &exec.cwd {
        Some(cwd) => command.current_dir(cwd),
        // An image may lack a home; that must not keep a program from running.
        None if std::path::Path::new(&user.home).is_dir() => command.current_dir(&user.home),
        None => command.current_dir("/"),
    };
    if user.uid != 0 {
        let (uid, gid, groups) = (user.uid, user.gid, user.groups);
        let become_user = move || {
            // SAFETY: three system calls without side effects on memory; `groups` was made before the fork.
            let done = unsafe {
                libc::setgroups(groups.len(), groups.as_ptr()) == 0
                    && libc::setresgid(gid, gid, gid) == 0
                    && libc::setresuid(uid, uid, uid) == 0
            };
            if done {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        };
        // SAFETY: the closure only makes system calls: it allocates nothing and takes no lock.
        unsafe { command.pre_exec(become_user) };
    }
    let started = children
        .spawn(Kind::Exec, MOST, &mut command)
        .map_err(|e| match e {
            SpawnError::Full(most) => Error::Busy(format!("{most} programs of the host's run already")),
            SpawnError::Io(e) if e.kind() == io::ErrorKind::NotFound => {
                let place = exec
                    .cwd
                    .as_ref()
                    .map(|cwd| format!(" (in {cwd})"))
                    .unwrap_or_default();
                Error::NotFound(format!("program `{program}`{place}: {e}"))
            }
            SpawnError::Io(e) => Error::System {
                what: format!("starting `{program}`"),
                source: e,
            },
        })?;
    Ok(Session::new(started, Arc::clone(children)))
}

/// A program and the stream that it's carried over.
pub(crate) struct Session {
    children: Arc<Children>,
    pid: Pid,
    exit: Arc<Exit>,
    stdin: Option<ChildStdin>,
    /// Input that waits for the program, and whether it is the last.
    input: Vec<u8>,
    input_ended: bool,
    outputs: [Output; 2],
    /// Frames that wait for the host.
    out: Vec<u8>,
    decoder: Decoder,
}

/// One of the program's two outputs.
struct Output {
    pipe: Option<Box<dyn Pipe>>,
    event: fn(Bytes) -> ExecEvent,
    after_end: usize,
}

trait Pipe: Read + AsFd {}
impl<T: Read + AsFd> Pipe for T {}

/// How a session ended that has not been ended by the program.
enum Broken {
    Closed,
    Frame(FrameError),
}

impl From<io::Error> for Broken {
    fn from(_: io::Error) -> Self {
        Broken::Closed
    }
}

impl From<rustix::io::Errno> for Broken {
    fn from(_: rustix::io::Errno) -> Self {
        Broken::Closed
    }
}

impl From<FrameError> for Broken {
    fn from(e: FrameError) -> Self {
        Broken::Frame(e)
    }
}

impl Session {
    fn new(started: Started, children: Arc<Children>) -> Self {
        let Started { mut child, pid, exit } = started;
        let stdout = child.stdout.take().map(|pipe| Box::new(pipe) as Box<dyn Pipe>);
        let stderr = child.stderr.take().map(|pipe| Box::new(pipe) as Box<dyn Pipe>);
        Session {
            children,
            pid,
            exit,
            stdin: child.stdin.take(),
            input: Vec::new(),
            input_ended: false,
            outputs: [
                Output {
                    pipe: stdout,
                    event: |data| ExecEvent::Stdout { data },
                    after_end: 0,
                },
                Output {
                    pipe: stderr,
                    event: |data| ExecEvent::Stderr { data },
                    after_end: 0,
                },
            ],
            out: Vec::new(),
            decoder: Decoder::default(),
        }
    }

    /// Carries the program's pipes until it has ended or the stream has.
    pub(crate) fn run(mut self, stream: &File) {
        match self.carry(stream) {
            Ok(()) => linger(stream),
            Err(broken) => {
                self.children.signal_group(self.pid, Signal::KILL);
                if let Broken::Frame(e) = broken {
                    let error = Error::BadRequest(e.to_string()).body();
                    if let Ok(frame) = encode(&mandoline_api::agent::ErrorReply { error }) {
                        let mut stream = stream;
                        let _ = stream.write_all(&frame);
                    }
                }
            }
        }
    }

    fn carry(&mut self, stream: &File) -> Result<(), Broken> {
        set_nonblocking(stream)?;
        if let Some(stdin) = &self.stdin {
            set_nonblocking(stdin)?;
        }
        for output in &self.outputs {
            if let Some(pipe) = &output.pipe {
                set_nonblocking(pipe)?;
            }
        }
        let pid = u32::try_from(self.pid.as_raw_nonzero().get()).unwrap_or(0);
        self.queue(&ExecEvent::Started { pid })?;
        let mut ended: Option<ExitStatus> = None;
        let mut last_queued = false;
        loop {
            self.flush(stream)?;
            if last_queued && self.out.is_empty() {
                return Ok(());
            }
            if let (Some(status), false) = (ended, last_queued) {
                // Level-triggered to its end: read until the pipes are empty, as far as the host takes it.
                while self.out.len() < OUT_LIMIT && self.read_outputs(true)? {}
                if self.outputs.iter().all(|output| output.pipe.is_none()) {
                    self.queue(&ExecEvent::Exited(status))?;
                    last_queued = true;
                    continue;
                }
            }
            let ready = self.wait(stream, ended.is_some())?;
            if ready.closed {
                return Err(Broken::Closed);
            }
            if ready.host {
                self.read_host(stream)?;
            }
            self.write_input();
            if ended.is_none() {
                ended = self.exit.status();
            }
            self.read_outputs(ended.is_some())?;
        }
    }

    /// Sleeps until there is something to do.
    fn wait(&self, stream: &File, ended: bool) -> Result<Ready, Broken> {
        let mut interest = PollFlags::RDHUP;
        if self.input.len() < IN_LIMIT {
            interest |= PollFlags::IN;
        }
        if !self.out.is_empty() {
            interest |= PollFlags::OUT;
        }
        let mut fds = vec![PollFd::new(stream, interest)];
        if !ended {
            fds.push(PollFd::new(&*self.exit, PollFlags::IN));
        }
        if let (Some(stdin), false) = (&self.stdin, self.input.is_empty()) {
            fds.push(PollFd::new(stdin, PollFlags::OUT));
        }
        if self.out.len() < OUT_LIMIT {
            for output in &self.outputs {
                if let Some(pipe) = &output.pipe {
                    fds.push(PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN));
                }
            }
        }
        loop {
            match poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
                Ok(_) => break,
            }
        }
        let of_stream = fds.first().map_or(PollFlags::HUP, PollFd::revents);
        Ok(Ready {
            host: of_stream.contains(PollFlags::IN),
            // Unread bytes may still lie before the end: then `read` finds it after them.
            closed: of_stream.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::RDHUP)
                && !of_stream.contains(PollFlags::IN),
        })
    }

    fn queue(&mut self, event: &ExecEvent) -> Result<(), Broken> {
        self.out.extend(encode(event)?);
        Ok(())
    }

    fn flush(&mut self, mut stream: &File) -> Result<(), Broken> {
        while !self.out.is_empty() {
            match stream.write(&self.out) {
                Ok(0) => return Err(Broken::Closed),
                Ok(n) => drop(self.out.drain(..n.min(self.out.len()))),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Takes in what the host sent.
    fn read_host(&mut self, mut stream: &File) -> Result<(), Broken> {
        let mut buffer = vec![0; MAX_DATA];
        match stream.read(&mut buffer) {
            Ok(0) => return Err(Broken::Closed),
            Ok(n) => self.decoder.push(buffer.get(..n).unwrap_or_default()),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => return Err(e.into()),
        }
        while let Some(body) = self.decoder.next_frame()? {
            match decode::<ExecInput>(body)? {
                ExecInput::Stdin { data } if self.stdin.is_some() && !self.input_ended => {
                    self.input.extend(data.0);
                }
                // The program closed its input, or never had one: as with a pipe, nobody reads it.
                ExecInput::Stdin { .. } => {}
                ExecInput::StdinEof => self.input_ended = true,
                ExecInput::Signal { signal } => match Signal::from_named_raw(signal) {
                    Some(signal) => self.children.signal_group(self.pid, signal),
                    None => {
                        let error =
                            Error::BadRequest(format!("signal {signal} is unknown; 1 to 31 are allowed"));
                        let reply = mandoline_api::agent::ErrorReply { error: error.body() };
                        self.out.extend(encode(&reply)?);
                    }
                },
            }
        }
        Ok(())
    }

    /// Gives the program what it takes of its input.
    fn write_input(&mut self) {
        while let (Some(stdin), false) = (&mut self.stdin, self.input.is_empty()) {
            match stdin.write(&self.input) {
                Ok(n) if n > 0 => drop(self.input.drain(..n.min(self.input.len()))),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => {
                    self.stdin = None;
                    self.input = Vec::new();
                }
            }
        }
        if self.input_ended && self.input.is_empty() {
            self.stdin = None;
        }
    }

    /// Reads once from each output that has something; answers whether one had. Once the program has ended,
    /// an output that is empty, closed or without end is done with.
    fn read_outputs(&mut self, ended: bool) -> Result<bool, Broken> {
        let mut any = false;
        let mut buffer = Vec::new();
        for output in &mut self.outputs {
            if self.out.len() >= OUT_LIMIT {
                break;
            }
            let Some(pipe) = &mut output.pipe else { continue };
            buffer.resize(MAX_DATA, 0);
            match pipe.read(&mut buffer) {
                Ok(0) => output.pipe = None,
                Ok(n) => {
                    any = true;
                    buffer.truncate(n);
                    let event = (output.event)(Bytes(std::mem::take(&mut buffer)));
                    self.out.extend(encode(&event)?);
                    if ended {
                        output.after_end = output.after_end.saturating_add(n);
                        if output.after_end >= AFTER_END {
                            output.pipe = None;
                        }
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && !ended => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => any = true,
                Err(_) => output.pipe = None,
            }
        }
        Ok(any)
    }
}

/// What a session woke up for.
struct Ready {
    host: bool,
    closed: bool,
}

/// Ends our side and takes in what the host still sends, until it ends its own: a stream that is closed with
/// unread bytes in it may be reset, and with that the answer be lost on its way.
fn linger(mut stream: &File) {
    let blocking = rustix::fs::fcntl_getfl(stream)
        .and_then(|flags| rustix::fs::fcntl_setfl(stream, flags - rustix::fs::OFlags::NONBLOCK))
        .and_then(|()| rustix::net::shutdown(stream, rustix::net::Shutdown::Write));
    if blocking.is_ok() {
        let mut buffer = [0; 4096];
        // The stream's own time limit ends this as well.
        while matches!(stream.read(&mut buffer), Ok(n) if n > 0) {}
    }
}

fn set_nonblocking(fd: impl AsFd) -> rustix::io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)
}
