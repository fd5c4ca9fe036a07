//! The programs that the demo starts: each with its log, each ended with the demo, whatever ends the demo.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

use crate::error::{About, Error, Result};

/// How long a program has to clean up before it is killed.
const GRACE: Duration = Duration::from_secs(15);

/// How many lines of a log say enough.
const TAIL: usize = 20;

/// A program that ends with this value.
pub(crate) struct Daemon {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command`; its standard error goes to `log`, its standard output there too unless `piped`.
    ///
    /// To be called from the main thread: the kernel ends the child with the *thread* that started it.
    pub(crate) fn start(name: &'static str, mut command: Command, log: &Path, piped: bool) -> Result<Self> {
        let errors = File::create(log).about(log.display())?;
        let output = if piped {
            Stdio::piped()
        } else {
            errors.try_clone().about(log.display())?.into()
        };
        // A group of its own, so that Ctrl-C reaches us alone and we decide the order.
        command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .process_group(0);
        // SAFETY: between fork and exec only prctl is called, which is async-signal-safe and allocates nothing.
        unsafe {
            command.pre_exec(|| set_parent_process_death_signal(Some(Signal::TERM)).map_err(io::Error::from));
        }
        let program = command.get_program().to_owned();
        let child = command.spawn().about(Path::new(&program).display())?;
        Ok(Self {
            name,
            child,
            log: log.to_owned(),
        })
    }

    /// Its standard output, once, when it was started `piped`.
    pub(crate) fn take_stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// An error if it has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        match self.child.try_wait().about(self.name)? {
            None => Ok(()),
            Some(status) => Err(self.ended(status)),
        }
    }

    fn ended(&self, status: ExitStatus) -> Error {
        Error::failure(format!(
            "{} has ended ({status}); the end of its log:\n{}",
            self.name,
            self.tail()
        ))
    }

    /// The end of its log.
    pub(crate) fn tail(&self) -> String {
        tail(&std::fs::read_to_string(&self.log).unwrap_or_default())
    }
}

/// The last lines, indented.
pub(crate) fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let from = lines.len().saturating_sub(TAIL);
    match lines.is_empty() {
        true => "    (empty)".into(),
        false => lines[from..]
            .iter()
            .map(|line| format!("    {line}"))
            .collect::<Vec<_>>()
            .join("\n"),
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) else {
            return;
        };
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        // It may just have ended by itself.
        let _ = kill_process(pid, Signal::TERM);
        let deadline = Instant::now() + GRACE;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        eprintln!("mandoline: {} does not end, killing it", self.name);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_program_that_ends_is_an_error_with_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut daemon = Daemon::start(
            "it",
            shell("echo no port >&2; exit 3"),
            &dir.path().join("log"),
            false,
        )
        .unwrap();
        daemon.child.wait().unwrap();
        let message = daemon.check().unwrap_err().to_string();
        assert!(
            message.contains("exit status: 3") && message.contains("no port"),
            "{message}"
        );
    }

    #[test]
    fn dropping_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let script = "trap 'echo cleaned; exit 0' TERM; echo ready; while :; do sleep 0.01; done";
        let mut daemon = Daemon::start("it", shell(script), &log, true).unwrap();
        let mut line = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(daemon.take_stdout().unwrap()), &mut line).unwrap();
        let pid = Pid::from_raw(i32::try_from(daemon.child.id()).unwrap()).unwrap();
        drop(daemon);
        assert!(rustix::process::test_kill_process(pid).is_err());
    }

    #[test]
    fn a_missing_program_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let result = Daemon::start(
            "it",
            Command::new("/no/such/program"),
            &dir.path().join("log"),
            false,
        );
        assert!(result.err().unwrap().to_string().contains("/no/such/program"));
    }

    #[test]
    fn tails_are_short() {
        let text = (0..100).map(|n| format!("line {n}\n")).collect::<String>();
        assert_eq!(tail(&text).lines().count(), TAIL);
        assert_eq!(tail("\n"), "    (empty)");
    }
}
