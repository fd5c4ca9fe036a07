//! The boot script: runs once the sliver is reachable, as root, apart from everything else; what it says
//! goes to `/var/log/initscript.log`.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::{Command, Stdio};

use mandoline_api::agent::{ExitStatus, Initscript};

use crate::children::{Children, Kind};
use crate::error::Error;
use crate::exec;
use crate::log::warning;
use crate::root::RUN;

const LOG: &str = "/var/log/initscript.log";

/// Largest script, bytes.
const LARGEST: usize = 256 * 1024;

/// What can be said about a script before it runs.
pub(crate) fn check(script: &str) -> Result<(), Error> {
    if script.len() <= LARGEST {
        return Ok(());
    }
    Err(Error::BadRequest(format!(
        "initscript has {} bytes; at most {LARGEST} are allowed",
        script.len()
    )))
}

/// Starts the script. The end comes through the reaper; a script that cannot be started has failed.
pub(crate) fn start(script: &str, children: &Children) -> Initscript {
    match try_start(script, children) {
        Ok(()) => Initscript::Running,
        Err(e) => {
            warning!("boot script: {e}");
            let _ = fs::write(LOG, format!("the boot script could not be started: {e}\n"));
            Initscript::Failed(ExitStatus {
                code: Some(127),
                signal: None,
            })
        }
    }
}

fn try_start(script: &str, children: &Children) -> io::Result<()> {
    let path = format!("{RUN}/initscript");
    crate::files::replace(path.as_ref(), script.as_bytes(), 0o700)?;
    let log = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o640)
        .open(LOG)?;
    let (program, argument) = interpreter(script);
    let mut command = Command::new(program);
    command
        .args(argument)
        .arg(path)
        .env_clear()
        .envs(exec::environment("root", "/root", "/bin/sh"))
        .current_dir("/root")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    children
        .spawn(Kind::Initscript, 1, &mut command)
        .map_err(io::Error::other)?;
    Ok(())
}

/// The program of the script's `#!` line and its one argument, as the kernel would cut it; `/bin/sh` without
/// one. (The kernel itself would refuse to run a file that a process just forked still holds open for writing.)
fn interpreter(script: &str) -> (&str, Option<&str>) {
    let line = script
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("#!"))
        .map(str::trim)
        .unwrap_or_default();
    match line.split_once([' ', '\t']) {
        Some((program, argument)) => (program, Some(argument.trim())),
        None if line.is_empty() => ("/bin/sh", None),
        None => (line, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interpreters_are_cut_as_the_kernel_does() {
        assert_eq!(interpreter("echo hi"), ("/bin/sh", None));
        assert_eq!(interpreter(""), ("/bin/sh", None));
        assert_eq!(interpreter("#!\nx"), ("/bin/sh", None));
        assert_eq!(interpreter("#!/usr/bin/python3\nx"), ("/usr/bin/python3", None));
        assert_eq!(
            interpreter("#! /usr/bin/env  python3 -u\r\nx"),
            ("/usr/bin/env", Some("python3 -u"))
        );
    }
}
